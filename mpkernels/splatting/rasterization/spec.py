"""Cases, bad inputs, workloads and cost of the whole pipeline."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload
from mpkernels.splatting.rasterization import api, reference
from mpkernels.splatting.rasterize import schema

_PER_GAUSSIAN = ("means", "quats", "scales", "opacities", "colors")


def scene(
    count: int,
    width: int,
    height: int,
    *,
    cameras: int = 1,
    channels: int = 3,
    sh_degree: int | None = None,
    size: tuple[float, float] = (0.02, 0.25),
    background: bool = True,
    change=None,
    **settings,
):
    """Gaussians in the cube [-1, 1]^3, looked at from a distance of about 4 from several sides."""

    def make(dtype, device, generator) -> Arguments:
        def rand(*shape, low=0.0, high=1.0):
            return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

        focal = 1.5 * max(width, height)
        viewmats = torch.eye(4, dtype=torch.float64).repeat(cameras, 1, 1)
        for c in range(cameras):
            turn = 0.3 + 1.1 * c
            viewmats[c, 0, 0] = viewmats[c, 2, 2] = math.cos(turn)
            viewmats[c, 0, 2], viewmats[c, 2, 0] = math.sin(turn), -math.sin(turn)
            viewmats[c, 2, 3] = 4 - 0.3 * c
        if settings.get("camera_model") == "ortho":
            focal /= 4
        K = torch.tensor([[focal, 0, width / 2], [0, 1.1 * focal, height / 2 + 0.2], [0, 0, 1]], dtype=torch.float64)
        arguments = {
            "means": rand(count, 3, low=-1),
            "quats": torch.randn(count, 4, generator=generator, dtype=torch.float64),
            "scales": size[0] * (size[1] / size[0]) ** rand(count, 3),
            "opacities": rand(count, low=0.05, high=0.98),
            "colors": rand(count, channels)
            if sh_degree is None
            else torch.randn(count, (sh_degree + 1) ** 2, 3, generator=generator, dtype=torch.float64) * 0.3,
            "viewmats": viewmats,
            "Ks": K.repeat(cameras, 1, 1),
        }
        if background:
            arguments["backgrounds"] = rand(cameras, channels)
        arguments |= settings | {"width": width, "height": height, "sh_degree": sh_degree}
        if change is not None:
            change(arguments)
        return {
            name: x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
            for name, x in arguments.items()
        }

    return make


def _covars(arguments: Arguments) -> None:
    """Covariances instead of quaternions and scales."""
    axes = torch.linalg.qr(torch.stack([arguments["quats"][:, 1:]] * 3, -1) + torch.eye(3))[0]
    axes = axes * arguments.pop("scales")[:, None]
    arguments.pop("quats")
    arguments |= {"quats": None, "scales": None, "covars": axes @ axes.mT}


def _colors_of_cameras(arguments: Arguments) -> None:
    arguments["colors"] = torch.stack([arguments["colors"], arguments["colors"].flip(0)])


def _behind(arguments: Arguments) -> None:
    arguments["viewmats"][:, 2, 3] = -5.0


def _off_screen(arguments: Arguments) -> None:
    arguments["viewmats"][:, 0, 3] = 50.0


def _everywhere(arguments: Arguments) -> None:
    arguments["scales"] = torch.tensor([[30.0, 20.0, 10.0]], dtype=torch.float64).repeat(3, 1)
    arguments["opacities"][:] = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)


def _not_finite(arguments: Arguments) -> None:
    for name, rows in (("means", (0, 1)), ("scales", (2, 3)), ("opacities", (4, 5)), ("quats", (6, 7))):
        arguments[name][rows[0]] = torch.nan
        arguments[name][rows[1]] = torch.inf
    arguments["quats"][8] = 0.0
    arguments["scales"][9] = 0.0
    arguments["opacities"][10] = -1.0


_CASES = (
    Case("one Gaussian", scene(1, 9, 7), second_order=True),
    Case("two cameras, harmonics", scene(4, 11, 8, cameras=2, sh_degree=1, tile_size=8), second_order=True),
    Case("covariances, dense", scene(5, 8, 8, change=_covars, packed=False, background=False), second_order=True),
    Case("typical", scene(80, 40, 33)),
    Case("depth", scene(30, 19, 17, render_mode="D")),
    Case("expected depth", scene(30, 19, 17, render_mode="ED", background=False, size=(0.1, 0.5))),
    Case("colors and depth, dense", scene(30, 19, 17, cameras=2, render_mode="RGB+D", packed=False)),
    Case(
        "colors and expected depth",
        scene(30, 19, 17, channels=5, render_mode="RGB+ED", background=False, size=(0.1, 0.5)),
    ),
    Case("antialiased", scene(30, 19, 17, rasterize_mode="antialiased", size=(0.002, 0.05))),
    Case("harmonics of degree 3", scene(30, 19, 17, sh_degree=3, cameras=2, packed=False)),
    Case("colors of each camera", scene(20, 17, 17, cameras=2, change=_colors_of_cameras)),
    Case("orthographic", scene(30, 24, 18, camera_model="ortho")),
    Case("covariances, packed", scene(20, 17, 17, change=_covars)),
    Case("no Gaussians", scene(0, 9, 7)),
    Case("everything behind the camera", scene(6, 9, 7, change=_behind)),
    Case("everything off screen, dense", scene(6, 9, 7, change=_off_screen, packed=False)),
    Case("over the whole image, opacity 0 and 1", scene(3, 33, 18, change=_everywhere)),
    Case("not finite", scene(16, 24, 18, change=_not_finite)),
    Case("not finite, dense", scene(16, 24, 18, change=_not_finite, packed=False)),
    Case("one pixel", scene(20, 1, 1)),
    Case("near and far, radius_clip", scene(40, 24, 18, near_plane=3.6, far_plane=4.5, radius_clip=3.0)),
)


def _bad(name: str, error, message: str, **changes) -> BadInput:
    def make(dtype, device, generator):
        arguments = scene(4, 20, 20)(dtype, device, generator)
        for argument, change in changes.items():
            arguments[argument] = change(arguments.get(argument))
        return arguments

    return BadInput(name, make, error, message)


_BAD = (
    _bad("means as a list", TypeError, "means.*Tensor.*list", means=lambda x: x.tolist()),
    _bad("means of half precision", TypeError, "means.*float32 or float64.*float16", means=Tensor.half),
    _bad("means of 2 numbers", ValueError, r"means.*\(\.\.\., N, 3\).*\(4, 2\)", means=lambda x: x[:, :2]),
    _bad("quats of 3 numbers", ValueError, r"quats.*\(4, 4\).*\(4, 3\)", quats=lambda x: x[:, :3]),
    _bad("scales of one Gaussian", ValueError, r"scales.*\(4, 3\).*\(1, 3\)", scales=lambda x: x[:1]),
    _bad("opacities with a channel", ValueError, r"opacities.*\(4,\).*\(4, 1\)", opacities=lambda x: x[:, None]),
    _bad("one viewmat", ValueError, r"viewmats.*'C', 4, 4.*\(4, 4\)", viewmats=lambda x: x[0]),
    _bad("K of 3 x 4", ValueError, r"Ks.*\(1, 3, 3\).*\(1, 3, 4\)", Ks=lambda x: x.new_ones(1, 3, 4)),
    _bad("colors without channels", ValueError, r"colors.*'D'.*\(4,\)", colors=lambda x: x[:, 0]),
    _bad("colors for sh_degree", ValueError, r"colors.*harmonics.*\(4, 3\)", sh_degree=lambda _: 1),
    _bad(
        "too few coefficients",
        ValueError,
        r"colors.*at least 9.*sh_degree 2.*got 4",
        sh_degree=lambda _: 2,
        colors=lambda x: x.new_ones(4, 4, 3),
    ),
    _bad("sh_degree of 5", ValueError, "sh_degree.*0 to 4.*5", sh_degree=lambda _: 5),
    _bad("a background of 4 channels", ValueError, r"backgrounds.*\(1, 3\)", backgrounds=lambda x: x.new_ones(1, 4)),
    _bad("an unknown render_mode", ValueError, "render_mode.*'RGB\\+ED'.*'depth'", render_mode=lambda _: "depth"),
    _bad("an unknown rasterize_mode", ValueError, "rasterize_mode.*classic.*'mip'", rasterize_mode=lambda _: "mip"),
    _bad("width of 0", ValueError, "width.*0", width=lambda _: 0),
    _bad("a fisheye", (NotImplementedError, ValueError), "camera_model.*fisheye", camera_model=lambda _: "fisheye"),
    _bad("sparse_grad", NotImplementedError, "sparse_grad.*not supported", sparse_grad=lambda _: True),
    _bad("3DGUT", NotImplementedError, "with_ut.*not supported", with_ut=lambda _: True),
    _bad("rolling shutter", NotImplementedError, "rolling_shutter.*GLOBAL", rolling_shutter=lambda _: "TOP_TO_BOTTOM"),
    _bad("unknown backend", ValueError, "backend.*'reference'.*'cudnn'", backend=lambda _: "cudnn"),
)


def _cost(arguments: dict, backward: bool) -> Cost:
    """Gaussians read once, pixels written once; what lies between depends on the view, and is not counted."""
    size = arguments["means"].element_size()
    cameras, count = len(arguments["viewmats"]), len(arguments["means"])
    gaussians = cameras * count * (11 + arguments["colors"][0].numel()) * size
    pixels = cameras * arguments["width"] * arguments["height"] * 7 * size
    return Cost(cameras * count * (900 if backward else 300), (3 if backward else 1) * (gaussians + pixels))


SPECS = (
    OpSpec(
        name="rasterization",
        family="splatting",
        op=schema.FORWARD,
        function=lambda **arguments: api.rasterization(**arguments)[:2],
        formula="project, colour, intersect with tiles and draw Gaussians: gsplat's rasterization",
        differentiable=(*_PER_GAUSSIAN, "viewmats", "Ks", "backgrounds", "covars"),
        outputs=("colors", "alphas"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            Workload(
                "100,000 Gaussians, 640 x 480, RGB",
                scene(100_000, 640, 480, size=(0.003, 0.02), packed=False),
                640 * 480,
                eager=False,
            ),
        ),
        eager=reference.rasterization,
        cost=_cost,
        second_order=False,
        batched=False,
        demo="python_models.gaussian_splatting",
        demo_name="splat",
        dtypes=dict.fromkeys(("reference", "cpu", "cuda", "fibres"), (torch.float32, torch.float64)),
    ),
)
