"""Cases, workloads and cost of the projection of Gaussians."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mpkernels.spec import BadInput, Case, Cost, OpSpec, TritonKernel, Workload
from mpkernels.splatting.project_gaussians import api, eager, schema


def _run(**arguments) -> tuple[Tensor, ...]:
    """The public function; quats and scales may be left out."""
    complete: dict[str, Any] = {"quats": None, "scales": None} | arguments
    return api.project_gaussians(**complete)


def _to(dtype: torch.dtype, device: torch.device, arguments: dict) -> dict:
    return {name: x.to(device, dtype) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _scene(
    n: int,
    cameras: int = 1,
    *,
    lead: tuple[int, ...] = (),
    width: int = 64,
    height: int = 48,
    covars: int = 0,  # 0: quats and scales; else the length of the shape of a covariance, 1 or 2
    opacities: bool = False,
    spread: float = 1.0,
    **settings,
):
    """Gaussians around the origin, seen by cameras that stand about 4 away, each turned a little."""

    def make(dtype, device, generator):
        def rand(*shape: int) -> Tensor:
            return torch.rand(*lead, *shape, generator=generator, dtype=torch.float64)

        arguments: dict = {"means": (rand(n, 3) - 0.5) * torch.tensor([3.0, 2.2, 2.0]).double() * spread}
        scales = rand(n, 3) * 0.25 + 0.02
        if covars:
            a = (rand(n, 3, 3) - 0.5) * scales[..., None]
            full = a @ a.mT
            arguments["covars"] = full if covars == 2 else full[..., (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
        else:
            arguments |= {"quats": rand(n, 4) * 3 - 1.5, "scales": scales}
        if opacities:
            arguments["opacities"] = rand(n)
        angles = (rand(cameras, 3) - 0.5) * 0.4
        axes = torch.linalg.matrix_exp(
            torch.stack([angles[..., i, None, None] * _GENERATORS[i] for i in range(3)]).sum(0)
        )
        viewmats = torch.eye(4, dtype=torch.float64).expand(*lead, cameras, 4, 4).clone()
        viewmats[..., :3, :3] = axes
        viewmats[..., :3, 3] = (rand(cameras, 3) - 0.5) * 0.3 + torch.tensor([0.0, 0.0, 4.0]).double()
        focal = width * (1.1 + 0.2 * rand(cameras, 2))
        if settings.get("camera_model") == "ortho":
            focal = focal / 4
        center = torch.tensor([width, height]).double() * (0.4 + 0.2 * rand(cameras, 2))
        Ks = torch.eye(3, dtype=torch.float64).expand(*lead, cameras, 3, 3).clone()
        Ks[..., 0, 0], Ks[..., 1, 1] = focal.unbind(-1)
        Ks[..., 0, 2], Ks[..., 1, 2] = center.unbind(-1)
        arguments |= {"viewmats": viewmats, "Ks": Ks}
        return _to(dtype, device, arguments) | {"width": width, "height": height} | settings

    return make


_GENERATORS = torch.tensor(
    [
        [[0, 0, 0], [0, 0, -1], [0, 1, 0]],
        [[0, 0, 1], [0, 0, 0], [-1, 0, 0]],
        [[0, -1, 0], [1, 0, 0], [0, 0, 0]],
    ],
    dtype=torch.float64,
)


def _changed(make, *changes):
    """A case made from another: each of ``changes`` edits converted arguments in place."""

    def changed(dtype, device, generator):
        arguments = make(dtype, device, generator)
        for change in changes:
            change(arguments)
        return arguments

    return changed


def _set(name: str, index, value):
    def change(arguments: dict) -> None:
        x = arguments[name].clone()
        x[index] = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        arguments[name] = x

    return change


def _camera_on_axis(arguments: dict) -> None:
    """Camera 0 at the origin, looking along z, so that means are what the camera sees."""
    arguments["viewmats"] = torch.eye(4).to(arguments["viewmats"]).expand_as(arguments["viewmats"]).clone()


def _at_the_edges(arguments: dict) -> None:
    """Large Gaussians whose centres lie left, right, above and below the clamp, but whose extents reach the image."""
    _camera_on_axis(arguments)
    arguments["means"] = arguments["means"].new_tensor(
        [[-2.5, 0.1, 2], [2.6, -0.2, 2.2], [0.1, -2.2, 2], [0.2, 2.4, 2.1], [-2.5, -2.0, 2], [2.6, 2.1, 2]]
    )
    arguments["scales"] = arguments["scales"] + 0.9


def _hard(arguments: dict) -> None:
    """NaN, infinity, zero, huge, behind the camera, beside its plane, off the image: one Gaussian each."""
    _camera_on_axis(arguments)
    means, quats, scales = (arguments[name].clone() for name in ("means", "quats", "scales"))
    means[..., 2] += 4
    nan, inf = torch.nan, torch.inf
    means[0, 0], means[1, 2], means[2, 1] = nan, inf, -inf
    quats[3, 1], quats[4] = nan, means.new_tensor([inf, 0, 0, 0])
    scales[5, 2], scales[6, 0] = nan, inf
    quats[7] = 0
    scales[8] = 0
    means[9], quats[9] = means.new_tensor([0, 0, 4]), means.new_tensor([1, 0, 0, 0])
    scales[9] = means.new_tensor([0.5, 0, 0])  # a line, with a det of exactly 0 in every order of operations
    scales[10, 2] = 0  # a disc
    means[11] = means.new_tensor([0.1, 0.1, -3])  # behind
    means[12] = means.new_tensor([0.0, 0.0, 0.0])  # at the centre of the camera
    means[13] = means.new_tensor([0.002, 0.001, 0.0101])  # just in front of the near plane
    means[14] = means.new_tensor([0.002, 0.001, 0.0099])
    means[15] = means.new_tensor([30.0, 0, 4])  # off screen
    scales[16] = 1e3  # covers the image
    quats[17] *= 1e-2
    quats[18] *= 1e10
    quats[19] = means.new_tensor([0.0, 0, 0, 1])
    arguments |= {"means": means, "quats": quats, "scales": scales}


def _opacities(arguments: dict) -> None:
    arguments["opacities"] = arguments["opacities"].clone()
    arguments["opacities"][:9] = arguments["opacities"].new_tensor(
        [0.0, 1.0, 0.0039, 0.004, -1.0, torch.nan, torch.inf, 2.0, 0.02]
    )


def _hard_cameras(arguments: dict) -> None:
    """Cameras with NaN, with infinity, without focal lengths, turned away; the last one is good."""
    views, Ks = arguments["viewmats"].clone(), arguments["Ks"].clone()
    views[0, 0, 0] = torch.nan
    views[1, 2, 3] = torch.inf
    Ks[2, 0, 0] = 0
    Ks[3, 1, 1] = 0
    Ks[4, 0, 2] = torch.nan
    views[5, :3, :3] = -views[5, :3, :3]
    views[5, :3, 3] = -views[5, :3, 3]
    arguments |= {"viewmats": views, "Ks": Ks}


def _no_blur(arguments: dict) -> None:
    """Without a blur what has no extent on the image is culled (its det is 0), and compensations are 1."""
    arguments["scales"] = arguments["scales"].clone()
    arguments["scales"][::3] = 0


def _expanded(arguments: dict) -> None:
    for name in ("means", "quats", "scales"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    arguments["viewmats"] = arguments["viewmats"].mT.contiguous().mT
    arguments["Ks"] = arguments["Ks"][:, :1].expand_as(arguments["Ks"])


def _not_positive(arguments: dict) -> None:
    """Covariances that are not positive on the image: det before the blur is 0 or below."""
    _camera_on_axis(arguments)
    arguments["means"] = arguments["means"] + arguments["means"].new_tensor([0, 0, 4])
    arguments["covars"] = arguments["covars"].clone()
    arguments["covars"][0::3] = 0
    arguments["covars"][1::3] = arguments["covars"].new_tensor([0.02, 0, 0, -1e-4, 0, 0])


_CASES = (
    Case("two cameras", _scene(7, 2), second_order=True),
    Case("covars, ortho", _scene(5, covars=1, camera_model="ortho"), second_order=True),
    Case("both clamps", _changed(_scene(6), _at_the_edges), second_order=True),
    Case("covars", _scene(5, covars=1)),
    Case("ortho", _scene(5, 2, camera_model="ortho")),
    Case("several tiles", _scene(300, 2)),
    Case("antialiased", _changed(_scene(9, opacities=True, antialiased=True), _opacities)),
    Case("batch dimensions", _scene(5, 2, lead=(2, 3), opacities=True)),
    Case("matrices of covariances", _scene(37, 2, covars=2, opacities=True)),
    Case("not positive covariances", _changed(_scene(12, covars=1), _not_positive)),
    Case("odd sizes", _scene(123, 5, width=33, height=1)),
    Case("a pixel", _scene(1, width=1, height=1)),
    Case("opacities", _changed(_scene(33, opacities=True), _opacities)),
    Case("no Gaussians", _scene(0, 2)),
    Case("no cameras", _scene(5, 0)),
    Case("hard Gaussians", _changed(_scene(26), _hard)),
    Case("hard cameras", _changed(_scene(19, 7), _hard_cameras)),
    Case("all behind the camera", _changed(_scene(20), lambda a: a.update(means=a["means"] - 20), _camera_on_axis)),
    Case("far plane and radius clip", _scene(60, 2, far_plane=4.0, radius_clip=6.0, near_plane=3.5)),
    Case("no blur", _changed(_scene(9, eps2d=0.0), _no_blur)),
    Case("expanded", _changed(_scene(9, 2, lead=(2,)), _expanded)),
    Case("many", _scene(3001, 2, width=640, height=480, opacities=True, spread=2.0), large=True, flips=2),
)


def _bad(change, base=None):
    return _changed(base or _scene(4, 2, opacities=True), change)


def _replace(name: str, function):
    def change(arguments: dict) -> None:
        arguments[name] = function(arguments.get(name))

    return change


_BAD = (
    BadInput("means is no tensor", _bad(_replace("means", lambda x: x.tolist())), TypeError, "means.*Tensor.*list"),
    BadInput("means of bfloat16", _bad(_replace("means", lambda x: x.bfloat16())), TypeError, "means.*float32 or"),
    BadInput("means of 4", _bad(_replace("means", lambda x: x.new_ones(4, 4))), ValueError, r"means.*N, 3.*\(4, 4\)"),
    BadInput("no shape", _bad(lambda a: a.update(quats=None, scales=None)), ValueError, "quats.*None without covars"),
    BadInput("quats alone", _bad(_replace("scales", lambda _: None)), ValueError, "scales.*None without covars"),
    BadInput("quats of 3", _bad(_replace("quats", lambda x: x[:, :3])), ValueError, r"quats.*\(4, 4\).*\(4, 3\)"),
    BadInput("scales too short", _bad(_replace("scales", lambda x: x[1:])), ValueError, r"scales.*\(4, 3\).*\(3, 3\)"),
    BadInput("scales of float64", _bad(_replace("scales", lambda x: x.double())), TypeError, "scales.*float32"),
    BadInput("scales elsewhere", _bad(_replace("scales", lambda x: x.to("meta"))), ValueError, "scales.*device.*meta"),
    BadInput("covars and quats", _bad(_replace("covars", lambda _: torch.zeros(4, 6))), ValueError, "quats.*None"),
    BadInput(
        "covars of 5",
        _bad(_replace("covars", lambda x: x[:, :5]), _scene(4, covars=1)),
        ValueError,
        r"covars.*\(4, 6\) or \(4, 3, 3\).*\(4, 5\)",
    ),
    BadInput("opacities (N, 1)", _bad(_replace("opacities", lambda x: x[:, None])), ValueError, r"opacities.*\(4,\)"),
    BadInput("viewmats 3x4", _bad(_replace("viewmats", lambda x: x[:, :3])), ValueError, r"viewmats.*\(2, 3, 4\)"),
    BadInput("one viewmat", _bad(_replace("viewmats", lambda x: x[0])), ValueError, r"viewmats.*'C', 4, 4"),
    BadInput("Ks 2x3", _bad(_replace("Ks", lambda x: x[:, :2])), ValueError, r"Ks.*\(2, 3, 3\).*\(2, 2, 3\)"),
    BadInput("Ks of one camera", _bad(_replace("Ks", lambda x: x[:1])), ValueError, r"Ks.*\(2, 3, 3\).*\(1, 3, 3\)"),
    BadInput("width 0", _bad(_replace("width", lambda _: 0)), ValueError, "width.*1, 2.*got 0"),
    BadInput("height a float", _bad(_replace("height", lambda _: 4.0)), TypeError, "height.*integer.*float"),
    BadInput("near behind far", _bad(lambda a: a.update(near_plane=2.0, far_plane=1.0)), ValueError, "near_plane.*far"),
    BadInput("near NaN", _bad(_replace("near_plane", lambda _: math.nan)), ValueError, "near_plane.*nan"),
    BadInput("near negative", _bad(_replace("near_plane", lambda _: -1.0)), ValueError, "near_plane.*0 <=.*-1.0"),
    BadInput("eps2d negative", _bad(_replace("eps2d", lambda _: -0.3)), ValueError, "eps2d.*>= 0.*-0.3"),
    BadInput("radius_clip a string", _bad(_replace("radius_clip", lambda _: "3")), TypeError, "radius_clip.*str"),
    BadInput("fisheye", _bad(_replace("camera_model", lambda _: "fisheye")), ValueError, "camera_model.*not supp"),
    BadInput("unknown camera", _bad(_replace("camera_model", lambda _: "lens")), ValueError, "camera_model.*'lens'"),
    BadInput("unknown backend", _bad(_replace("backend", lambda _: "cudnn")), ValueError, "backend.*'cudnn'"),
)


def _cost(arguments: dict, backward: bool) -> Cost:
    means = arguments["means"]
    batches, n = math.prod(means.shape[:-2]), means.shape[-2]
    cameras = arguments["viewmats"].shape[-3]
    gaussians = batches * n * (9 if "covars" in arguments else 10)  # numbers read of all Gaussians
    projected = batches * n * cameras
    if backward:
        return Cost(projected * 420, means.element_size() * (2 * gaussians + projected * 7) + projected * 8)
    return Cost(projected * 170, means.element_size() * (gaussians + projected * 7) + projected * 8)


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.splatting.project_gaussians import triton

    return triton.compiled_kernels()


_BOTH = (torch.float32, torch.float64)

SPECS = (
    OpSpec(
        name="project_gaussians",
        family="splatting",
        op=schema.FORWARD,
        function=_run,
        formula="conic = (J R Sigma R^T J^T + eps2d I)^-1 at u = fx x / z + cx",
        differentiable=("means", "quats", "scales", "covars", "viewmats", "Ks"),
        outputs=api.ProjectedGaussians._fields,
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            Workload("111,785 Gaussians, one camera", _scene(111785, width=648, height=420), 111785),
            Workload("1,000,000 Gaussians, one camera", _scene(1000000, width=1920, height=1080), 1000000),
        ),
        eager=eager.project_gaussians,
        cost=_cost,
        triton_kernels=_triton_kernels,
        second_order=False,
        dtypes={"reference": _BOTH, "cpu": _BOTH, "fibres": _BOTH, "cuda": _BOTH, "triton": _BOTH},
    ),
)
