"""Cases, workloads and cost of tile intersection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload
from mpkernels.splatting.constants import EXTENT
from mpkernels.splatting.intersect_tiles import api, eager, schema

_BOTH = (torch.float32, torch.float64)


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _conics(deviations: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Conics (..., 3), and the standard deviations along x and y (..., 2), of ellipses with these along their axes."""
    turned = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1).unflatten(-1, (2, 2))
    covariances = turned @ torch.diag_embed(deviations.square()) @ turned.mT
    inverse = turned @ torch.diag_embed(deviations.square().reciprocal()) @ turned.mT
    conics = torch.stack([inverse[..., 0, 0], inverse[..., 0, 1], inverse[..., 1, 1]], dim=-1)
    return conics, torch.diagonal(covariances, dim1=-2, dim2=-1).sqrt()


def _radii(opacities: Tensor, deviations: Tensor) -> Tensor:
    reach = (2 * torch.log(255 * opacities).clamp(min=0)).sqrt().clamp(max=EXTENT)
    return (reach[..., None] * deviations).ceil().int()


def _scene(*lead: int, width: int, height: int, largest: float = 12.0, thinnest: float = 0.6, boxes=False, **settings):
    """Gaussians (..., N) of random place, size and direction, some outside of the image, some too faint."""

    def make(dtype, device, generator):
        means2d = (_rand(generator, *lead, 2) * 1.6 - 0.3) * torch.tensor([width, height])
        deviations = thinnest + _rand(generator, *lead, 2) ** 3 * largest
        conics, along = _conics(deviations, _rand(generator, *lead) * math.pi)
        opacities = _rand(generator, *lead) ** 2 * 1.1
        arguments = {
            "means2d": means2d,
            "radii": _radii(opacities, along),
            "depths": _rand(generator, *lead) * 10 + 0.1,
            "conics": conics,
            "opacities": opacities,
        }
        if boxes:
            del arguments["conics"], arguments["opacities"]
        return _to(dtype, device, arguments) | {"width": width, "height": height} | settings

    return make


def _to(dtype: torch.dtype, device: torch.device, arguments: Arguments) -> Arguments:
    def convert(x):
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: convert(x) for name, x in arguments.items()}


def _packed(images: int, *, out_of_range: bool = False, **settings):
    """Packed Gaussians whose images come in no order."""
    scene = _scene(90, width=60, height=45, **settings)

    def make(dtype, device, generator):
        arguments = scene(dtype, device, generator)
        ids = torch.randint(0, images, (90,), generator=generator)
        if out_of_range:
            ids[::7], ids[1::7], ids[2::7] = images, -1, 2**40
        return arguments | {"image_ids": ids.to(device), "n_images": images}

    return make


def _changed(make, change):
    def changed(dtype, device, generator):
        arguments = make(dtype, device, generator)
        change(arguments)
        return arguments

    return changed


_UNUSABLE = (
    *(("means2d", axis, value) for axis in (0, 1) for value in (math.nan, math.inf, -math.inf)),
    *(("radii", axis, value) for axis in (0, 1) for value in (0, -5)),
    *(("conics", entry, value) for entry in (0, 1, 2) for value in (math.nan, math.inf, -math.inf)),
    *(("conics", entry, value) for entry in (0, 2) for value in (0.0, -1.0)),
    *(("opacities", ..., value) for value in (math.nan, math.inf, -1.0, 0.0, 0.99999 / 255)),
)
_USABLE = [((i * 7) % 60 + 0.5, (i * 11) % 40 + 0.5, 3.0, 2.0, i, 0.8) for i in range(2 * len(_UNUSABLE))]


def _unusable(arguments: Arguments) -> None:
    """Every second Gaussian is given what is no number, or no ellipse; the others stay."""
    for i, (name, entry, value) in enumerate(_UNUSABLE):
        if name in arguments:
            arguments[name][2 * i, entry] = value


def _depths(*values: float):
    def change(arguments: Arguments) -> None:
        depths = arguments["depths"]
        chosen = torch.tensor(values, dtype=depths.dtype, device=depths.device)
        arguments["depths"] = chosen.repeat(-(-depths.numel() // chosen.numel()))[: depths.numel()].reshape(
            depths.shape
        )

    return change


def _few(rows: list[tuple[float, ...]], *, width: int, height: int, radii: int | None = None, boxes=False, **settings):
    """Gaussians (x, y, deviation, deviation across, angle, opacity), one a row."""

    def make(dtype, device, generator):
        values = torch.tensor(rows, dtype=torch.float64)
        conics, along = _conics(values[:, 2:4], values[:, 4])
        reach = _radii(values[:, 5], along.clamp(max=1e8))
        arguments = {
            "means2d": values[:, :2],
            "radii": reach if radii is None else torch.full_like(reach, radii),
            "depths": torch.arange(len(rows), 0, -1).double(),
            "conics": conics,
            "opacities": values[:, 5],
        }
        if boxes:
            del arguments["conics"], arguments["opacities"]
        return _to(dtype, device, arguments) | {"width": width, "height": height} | settings

    return make


def _strided(arguments: Arguments) -> None:
    for name in ("means2d", "radii", "depths", "conics", "opacities"):
        arguments[name] = arguments[name].repeat_interleave(2, 0)[::2]
    arguments["depths"] = arguments["depths"][:1].expand_as(arguments["depths"])
    arguments["opacities"] = arguments["opacities"][:1].expand_as(arguments["opacities"])


_TYPICAL = _scene(150, width=100, height=70)
_NEEDLES = [  # bounding boxes far larger than the ellipses; the last two are too thin for float32
    (50.3, 40.2, 40.0, 0.55, math.pi / 4, 0.9),
    (20.1, 60.7, 300.0, 0.6, -math.pi / 4, 0.5),
    (64.0, 32.0, 90.0, 0.55, 0.3, 1.0),
    (70.0, 20.0, 20.0, 0.55, math.pi / 2, 1.0),
    (10.0, 70.0, 25.0, 0.55, 0.0, 1.0),
    (33.0, 41.0, 3e4, 0.5, math.pi / 4, 1.0),
    (900.0, 900.0, 1e6, 0.5, 1.1, 1.0),
]
_FAR = [
    (1e8, 1e8, 5.0, 4.0, 0.1, 0.9),
    (-1e8, 20.0, 3e8, 7.0, 0.0, 0.9),
    (30.0, -1e8, 4.0, 4e7, 0.0, 0.9),
    (3e9, 10.0, 6.0, 6.0, 0.0, 0.9),
    (16.0, 12.0, 1.0, 2.0, 0.0, 0.9),
]

_CASES = (
    Case("a few", _scene(9, width=40, height=30), second_order=True),
    Case("a few, boxes", _scene(2, 5, width=40, height=30, boxes=True), second_order=True),
    Case("packed, a few", _changed(_packed(3, largest=4.0), lambda _: None), second_order=True),
    Case("typical", _TYPICAL),
    Case("typical, boxes", _scene(150, width=100, height=70, boxes=True, tile_size=10)),
    Case("one pixel", _scene(40, width=1, height=1)),
    Case("a row of pixels", _scene(50, width=123, height=1, tile_size=5)),
    Case("a column of pixels", _scene(50, width=1, height=67, tile_size=1)),
    Case("tiles of one pixel", _scene(20, width=23, height=19, tile_size=1)),
    Case("tiles of two pixels", _scene(300, width=60, height=50, tile_size=2)),
    Case("tiles of 64", _scene(60, width=150, height=140, largest=60.0, tile_size=64)),
    Case("a tile larger than the image", _scene(30, width=37, height=21, tile_size=1000)),
    Case("batch dimensions", _scene(2, 3, 31, width=70, height=40)),
    Case("packed, images out of range", _packed(4, out_of_range=True)),
    Case("packed, boxes", _packed(5, boxes=True)),
    Case("strided and expanded", _changed(_TYPICAL, _strided)),
    Case("one Gaussian over the image", _few([(90, 60, 500, 400, 0.2, 1.0)], width=170, height=130), second_order=True),
    Case("needles", _few(_NEEDLES, width=130, height=125, tile_size=8)),
    Case("far away", _few(_FAR, width=64, height=48)),
    Case("huge radii", _few(_FAR, width=64, height=48, radii=10**9, boxes=True)),
    Case("opacities above 1", _few([(40, 30, 6, 4, 0.3, 30.0), (9, 9, 3, 3, 0.0, 1.5)], width=80, height=64)),
    Case("every second one unusable", _changed(_few(_USABLE, width=60, height=40), _unusable)),
    Case("every second box unusable", _changed(_few(_USABLE, width=60, height=40, boxes=True), _unusable)),
    Case("equal depths", _changed(_TYPICAL, _depths(2.5, 1.5, 2.5))),
    Case("extreme depths", _changed(_TYPICAL, _depths(0.0, 1e-40, 1e30, float("inf"), 1.0, 1.0000001, -1.0))),
    Case("everything culled", _changed(_TYPICAL, lambda a: a["radii"].zero_())),
    Case("no Gaussians", _scene(0, width=33, height=20)),
    Case("no Gaussians in three images", _scene(3, 0, width=33, height=20)),
    Case("no images", _scene(0, 7, width=33, height=20)),
    Case("packed, no images", _changed(_packed(1), lambda a: a.update(n_images=0))),
    Case("many", _scene(5000, width=110, height=90, largest=9.0), large=True),
    Case("many in many rows", _scene(300, width=4, height=280, largest=900.0, tile_size=4)),
)


def _bad(change, base=None):
    return _changed(base or _scene(6, width=40, height=30), change)


def _replace(name: str, function):
    return lambda arguments: arguments.update({name: function(arguments.get(name))})


_PACKED = _packed(3)

_BAD = (
    BadInput("a list", _bad(_replace("means2d", lambda x: x.tolist())), TypeError, "means2d.*Tensor.*list"),
    BadInput("half", _bad(_replace("means2d", lambda x: x.half())), TypeError, "means2d.*float32 or float64.*float16"),
    BadInput("one mean", _bad(_replace("means2d", lambda x: x[0])), ValueError, r"means2d.*\(\.\.\., N, 2\).*\(2,\)"),
    BadInput("means in 3-D", _bad(_replace("means2d", lambda x: x[:, [0, 1, 1]])), ValueError, r"means2d.*\(6, 3\)"),
    BadInput("radii of int64", _bad(_replace("radii", lambda x: x.long())), TypeError, "radii.*int32.*int64"),
    BadInput("one radius each", _bad(_replace("radii", lambda x: x[:, 0])), ValueError, r"radii.*\(6, 2\).*\(6,\)"),
    BadInput("radii elsewhere", _bad(_replace("radii", lambda x: x.to("meta"))), ValueError, "radii.*device.*meta"),
    BadInput("depths too short", _bad(_replace("depths", lambda x: x[1:])), ValueError, r"depths.*\(6,\).*\(5,\)"),
    BadInput("no depths", _bad(_replace("depths", lambda _: None)), TypeError, "depths.*Tensor.*NoneType"),
    BadInput("depths in double", _bad(_replace("depths", lambda x: x.double())), TypeError, "depths.*float32.*float64"),
    BadInput("conics of 4", _bad(_replace("conics", lambda x: x[:, [0, 1, 1, 2]])), ValueError, r"conics.*\(6, 3\)"),
    BadInput("conics alone", _bad(_replace("opacities", lambda _: None)), ValueError, "opacities.*conics are given"),
    BadInput("opacities alone", _bad(_replace("conics", lambda _: None)), ValueError, "conics.*opacities are given"),
    BadInput(
        "opacities (N, 1)",
        _bad(_replace("opacities", lambda x: x[:, None])),
        ValueError,
        r"opacities.*\(6,\).*\(6, 1\)",
    ),
    BadInput("width 0", _bad(_replace("width", lambda _: 0)), ValueError, "width.*>= 1.*0"),
    BadInput("height a float", _bad(_replace("height", lambda _: 30.0)), TypeError, "height.*integer.*float"),
    BadInput("tile_size 0", _bad(_replace("tile_size", lambda _: 0)), ValueError, "tile_size.*>= 1.*0"),
    BadInput("tile_size True", _bad(_replace("tile_size", lambda _: True)), TypeError, "tile_size.*integer.*bool"),
    BadInput(
        "too many tiles",
        _bad(lambda a: a.update(width=10**6, height=10**6, tile_size=1)),
        ValueError,
        "tile_size.*31 bits.*40 bits.*larger tiles",
    ),
    BadInput("n_images missing", _bad(_replace("n_images", lambda _: None), _PACKED), TypeError, "n_images.*NoneType"),
    BadInput("n_images negative", _bad(_replace("n_images", lambda _: -1), _PACKED), ValueError, "n_images.*>= 0.*-1"),
    BadInput("n_images alone", _bad(_replace("n_images", lambda _: 2)), ValueError, "image_ids.*n_images is given"),
    BadInput(
        "image_ids of int32",
        _bad(_replace("image_ids", lambda x: x.int()), _PACKED),
        TypeError,
        "image_ids.*int64.*int32",
    ),
    BadInput(
        "image_ids too short", _bad(_replace("image_ids", lambda x: x[1:]), _PACKED), ValueError, r"image_ids.*\(90,\)"
    ),
    BadInput(
        "image_ids of a batch",
        _bad(
            lambda a: a.update(image_ids=torch.zeros(2, dtype=torch.int64), n_images=1), _scene(2, 3, width=9, height=9)
        ),
        ValueError,
        r"means2d.*packed \(nnz, 2\).*\(2, 3, 2\)",
    ),
    BadInput("unknown backend", _bad(_replace("backend", lambda _: "cub")), ValueError, "backend.*'reference'.*'cub'"),
)

_WORKLOADS = (
    Workload(
        "111,785 Gaussians on 648 x 420", _scene(111785, width=648, height=420, largest=20.0), 111785, backward=False
    ),
    Workload(
        "2,000,000 Gaussians on 1920 x 1080",
        _scene(2_000_000, width=1920, height=1080, largest=20.0),
        2_000_000,
        devices=("cuda",),
        backward=False,
    ),
)


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: inputs read once, outputs written once, and what a sort by depth, 8 bytes a Gaussian, reads and writes.

    The number of intersections is counted by the reference's formula for boxes or ellipses on the CPU. Operations: 30 a
    Gaussian.
    """
    gaussians = arguments["depths"].numel()
    size = arguments["depths"].element_size()
    inputs = gaussians * ((3 if arguments.get("conics") is None else 7) * size + 8)
    outputs = api.intersect_tiles(**arguments)
    written = sum(x.numel() * x.element_size() for x in outputs)
    return Cost(30 * gaussians, inputs + written + 16 * gaussians)


SPECS = (
    OpSpec(
        name="intersect_tiles",
        family="splatting",
        op=schema.FORWARD,
        function=api.intersect_tiles,
        formula="tiles with (a dx^2 + c dy^2) / 2 + b dx dy <= ln(255 o) at some point, sorted by image, tile, depth",
        differentiable=(),
        outputs=api.TileIntersections._fields,
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=_WORKLOADS,
        eager=eager.intersect_tiles,
        cost=_cost,
        second_order=False,
        batched=False,
        dtypes={"reference": _BOTH, "cpu": _BOTH, "fibres": _BOTH, "cuda": _BOTH},
    ),
)
