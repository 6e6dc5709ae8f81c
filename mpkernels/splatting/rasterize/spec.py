"""Cases, bad inputs, workloads and cost of rasterization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.spec import BadInput, Case, Cost, OpSpec, Workload
from mpkernels.splatting.rasterize import api, eager, schema


def lists(means2d: Tensor, conics: Tensor, width: int, height: int, tile_size: int) -> tuple[Tensor, Tensor]:
    """(isect_offsets (I, th, tw), flatten_ids (n,)) of (I, N) Gaussians, front to back in the order they are given.

    By the bounding box of 3.4 standard deviations; independent of the op that makes the lists of real scenes.
    """
    images, count = means2d.shape[:2]
    high, wide = -(-height // tile_size), -(-width // tile_size)
    a, b, c = conics.double().unbind(-1)
    area = a * c - b * b
    reach = 3.4 * torch.stack([c / area, a / area], -1).clamp(min=0).sqrt()  # (I, N, 2)
    low, end = (means2d.double() - reach) / tile_size, (means2d.double() + reach) / tile_size
    tiles = torch.stack(torch.meshgrid(torch.arange(wide), torch.arange(high), indexing="xy"), -1)  # (th, tw, 2)
    tiles = tiles[None, :, :, None]
    hit = ((tiles + 1 > low[:, None, None]) & (tiles < end[:, None, None])).all(-1)  # (I, th, tw, N)
    per_tile = hit.sum(-1)
    offsets = (per_tile.flatten().cumsum(0) - per_tile.flatten()).reshape(images, high, wide)
    ids = torch.arange(images)[:, None, None, None] * count + torch.arange(count)
    return offsets, ids.expand(images, high, wide, count)[hit].to(torch.int32)


def _scene(
    count: int,
    width: int,
    height: int,
    *,
    images: tuple[int, ...] = (),
    tile_size: int = 16,
    channels: int = 3,
    background: bool = True,
    spread: tuple[float, float] = (1.0, 6.0),
    opacity: tuple[float, float] = (0.1, 0.95),
    masked: bool = False,
    packed: bool = False,
    change=None,
):
    """Gaussians with standard deviations and opacities drawn evenly from the ranges, anywhere in the image."""

    def make(dtype, device, generator):
        n_images = math.prod(images)

        def rand(*shape, low=0.0, high=1.0):
            return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

        means2d = rand(n_images, count, 2) * torch.tensor([width, height], dtype=torch.float64)
        angle, sigma = rand(n_images, count, high=math.pi), rand(n_images, count, 2, low=spread[0], high=spread[1])
        u, v = sigma.square().reciprocal().unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        conics = torch.stack([cos**2 * u + sin**2 * v, cos * sin * (u - v), sin**2 * u + cos**2 * v], -1)
        arguments = {
            "means2d": means2d,
            "conics": conics,
            "colors": rand(n_images, count, channels, low=-0.5),
            "opacities": rand(n_images, count, low=opacity[0], high=opacity[1]),
        }
        offsets, ids = lists(means2d, conics, width, height, tile_size)
        if background:
            arguments["backgrounds"] = rand(n_images, channels)
        if masked:
            arguments["masks"] = torch.rand(offsets.shape, generator=generator) < 0.6
        arguments["isect_offsets"] = offsets
        if change is not None:
            change(arguments)
        shaped = {
            name: x.reshape(-1, *x.shape[2:]) if packed and name in _PER_GAUSSIAN else x.reshape(*images, *x.shape[1:])
            for name, x in arguments.items()
        }
        shaped |= {"flatten_ids": ids}
        return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in shaped.items()} | {
            "width": width,
            "height": height,
            "tile_size": tile_size,
        }

    return make


_PER_GAUSSIAN = ("means2d", "conics", "colors", "opacities")


def _set(name: str, index, value: float | Tensor):
    def change(arguments: dict) -> None:
        arguments[name][index] = value

    return change


def _all(*changes):
    def change(arguments: dict) -> None:
        for one in changes:
            one(arguments)

    return change


def _strided(make):
    def changed(dtype, device, generator):
        arguments = make(dtype, device, generator)
        for name in _PER_GAUSSIAN:
            x = arguments[name]
            arguments[name] = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        return arguments

    return changed


_bad_gaussians = _all(
    _set("means2d", (0, 3, 0), torch.nan),
    _set("conics", (0, 5, 1), torch.nan),
    _set("opacities", (0, 7), torch.nan),
    _set("opacities", (0, 8), torch.inf),
    _set("means2d", (0, 9, 1), torch.inf),
    _set("conics", (0, 11), torch.inf),
    _set("opacities", (0, 13), 0.0),
    _set("opacities", (0, 14), -1.0),
    _set("colors", (0, 13, 0), torch.nan),
)
# conics that are no ellipse: every row, and pixels with a negative sigma left out
_hyperbola = _set("conics", (0, 2), torch.tensor([-0.02, 0.01, 0.03], dtype=torch.float64))

_CASES = (
    Case("one Gaussian", _scene(1, 9, 7), second_order=True),
    Case(
        "small tiles, two images",
        _scene(2, 6, 5, images=(2,), tile_size=4, spread=(1.0, 3.0)),
        second_order=True,
    ),
    Case("five channels", _scene(2, 5, 9, channels=5, tile_size=8, background=False), second_order=True),
    Case("typical", _scene(60, 37, 29)),
    Case("one channel", _scene(30, 20, 17, channels=1)),
    Case("four channels, batch dimensions", _scene(20, 19, 18, images=(2, 1), channels=4)),
    Case("packed", _scene(20, 19, 18, images=(3,), packed=True)),
    Case("a feature vector of 19", _scene(20, 17, 9, channels=19)),
    Case("large tiles", _scene(40, 70, 37, tile_size=40)),
    Case("tiles of one pixel", _scene(10, 5, 4, tile_size=1)),
    Case("tiles of 5 pixels, masked", _scene(30, 23, 17, tile_size=5, masked=True)),
    Case("one pixel wide", _scene(5, 1, 33)),
    Case("opaque", _scene(50, 33, 17, spread=(5.0, 30.0), opacity=(0.97, 1.0))),
    Case("more than opaque", _scene(8, 18, 17, spread=(2.0, 5.0), opacity=(1.2, 3.0))),
    Case("a needle", _scene(6, 40, 40, spread=(0.3, 200.0))),
    Case("not finite, not opaque", _scene(16, 33, 17, images=(1,), spread=(2.0, 9.0), change=_bad_gaussians)),
    Case("no ellipse", _scene(4, 17, 19, images=(1,), change=_hyperbola)),
    Case("strided", _strided(_scene(20, 17, 17))),
    Case("no Gaussians", _scene(0, 7, 5, images=(2,))),
    Case("no images", _scene(3, 7, 5, images=(0,))),
    Case("many", _scene(900, 120, 90), large=True, flips=8),
)


def _bad(**changes):
    def make(dtype, device, generator):
        arguments = _scene(4, 20, 20, images=(1,))(dtype, device, generator)
        for name, change in changes.items():
            arguments[name] = change(arguments.get(name))
        return arguments

    return make


def _bad_input(name: str, error, message: str, **changes) -> BadInput:
    return BadInput(name, _bad(**changes), error, message)


_BAD = (
    _bad_input("means2d is no tensor", TypeError, "means2d.*Tensor.*list", means2d=lambda x: x.tolist()),
    _bad_input("means2d of half precision", TypeError, "means2d.*float32 or float64.*float16", means2d=Tensor.half),
    _bad_input("means2d of 3 numbers", ValueError, r"means2d.*2\).*\(1, 4, 3\)", means2d=lambda x: x.new_ones(1, 4, 3)),
    _bad_input("conics as matrices", ValueError, r"conics.*\(1, 4, 3\)", conics=lambda x: x.new_ones(1, 4, 2, 2)),
    _bad_input("conics of another dtype", TypeError, "conics.*float32.*float64", conics=Tensor.double),
    _bad_input(
        "opacities with a channel", ValueError, r"opacities.*\(1, 4\).*\(1, 4, 1\)", opacities=lambda x: x[..., None]
    ),
    _bad_input("no channels", ValueError, r"colors.*D >= 1.*\(1, 4, 0\)", colors=lambda x: x[..., :0]),
    _bad_input("colors of 3 Gaussians", ValueError, r"colors.*\(1, 4, 'D'\).*\(1, 3, 3\)", colors=lambda x: x[:, :3]),
    _bad_input("width of 0", ValueError, "width.*>= 1.*0", width=lambda _: 0),
    _bad_input("height a float", TypeError, "height.*integer.*float", height=lambda _: 20.0),
    _bad_input("tile_size of 0", ValueError, "tile_size.*>= 1.*0", tile_size=lambda _: 0),
    _bad_input("another tile size", ValueError, r"isect_offsets.*3, 3.*\(1, 2, 2\)", tile_size=lambda _: 8),
    _bad_input("isect_offsets of floats", TypeError, "isect_offsets.*int32 or int64", isect_offsets=Tensor.float),
    _bad_input(
        "isect_offsets of 2 images",
        ValueError,
        r"isect_offsets.*\(1,\).*\(2,\)",
        isect_offsets=lambda x: x.repeat(2, 1, 1),
    ),
    _bad_input("flatten_ids of two dimensions", ValueError, r"flatten_ids.*\(n,\)", flatten_ids=lambda x: x[None]),
    _bad_input(
        "backgrounds of 4 channels",
        ValueError,
        r"backgrounds.*\(1, 3\).*\(1, 4\)",
        backgrounds=lambda x: x.new_ones(1, 4),
    ),
    _bad_input("masks of integers", TypeError, "masks.*bool.*int64", masks=lambda _: torch.ones(1, 2, 2).long()),
    _bad_input(
        "masks of pixels",
        ValueError,
        r"masks.*\(1, 2, 2\).*\(1, 20, 20\)",
        masks=lambda _: torch.ones(1, 20, 20).bool(),
    ),
    _bad_input("another device", ValueError, "conics.*device.*meta", conics=lambda x: x.to("meta")),
    _bad_input("unknown backend", ValueError, "backend.*'reference'.*'cudnn'", backend=lambda _: "cudnn"),
)


def _cost(arguments: dict, backward: bool) -> Cost:
    """Every Gaussian read once, every list entry once (its id, and the Gaussian), every pixel written once.

    Operations: the pixels of all tiles' lists are an upper bound; about half of an entry's pixels are evaluated.
    """
    size = arguments["means2d"].element_size()
    channels = arguments["colors"].shape[-1]
    entries = arguments["flatten_ids"].numel()
    pixels = arguments["isect_offsets"][..., 0, 0].numel() * arguments["width"] * arguments["height"]
    evaluated = entries * arguments["tile_size"] ** 2 // 2
    per_gaussian = (6 + channels) * size
    moved = entries * (4 + per_gaussian) + pixels * (channels + 3) * size
    if backward:
        moved += 2 * entries * (6 + channels) * size + arguments["opacities"].numel() * per_gaussian
    return Cost(evaluated * ((45 + 6 * channels) if backward else (24 + 2 * channels)), moved)


SPECS = (
    OpSpec(
        name="rasterize",
        family="splatting",
        op=schema.FORWARD,
        function=api.rasterize,
        formula="color = sum_i T_i alpha_i c_i + T background, alpha_i = min(0.999, o_i exp(-d^T Sigma_i^-1 d / 2))",
        differentiable=("means2d", "conics", "colors", "opacities", "backgrounds"),
        outputs=api.RasterizedImage._fields,
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            Workload("20,000 Gaussians, 320 x 240, RGB", _scene(20000, 320, 240, spread=(0.7, 3.0)), 320 * 240),
        ),
        eager=eager.rasterize,
        cost=_cost,
        second_order=False,
        batched=False,
        dtypes=dict.fromkeys(("reference", "cpu", "cuda", "fibres"), (torch.float32, torch.float64)),
    ),
)
