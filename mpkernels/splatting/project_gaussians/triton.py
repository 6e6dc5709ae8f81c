"""The projection of Gaussians in Triton: the launches, and the specialisations that the compile gates build.

The kernels themselves, with the formula and the decomposition, are in :mod:`triton_kernels`.
"""

from __future__ import annotations

import math

import numpy
import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks
from mpkernels.spec import TritonKernel
from mpkernels.splatting.project_gaussians import triton_kernels as kernels

_BLOCK = 128  # Gaussians a program, one a thread: the backward needs most of a thread's registers
_STRIDES = 64  # programs summed side by side


def _halves(x: float) -> tuple[float, float]:
    """A float argument travels as float32: the rest makes it exact where float64 is computed."""
    with numpy.errstate(over="ignore"):
        near = float(numpy.float32(x))
    return near, x - near if math.isfinite(near) else 0.0


def _tiles(gaussians: int) -> int:
    return (gaussians + _BLOCK - 1) // _BLOCK


def _compute_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _launch(kernel, programs: int, device_of: Tensor, *arguments, **settings) -> None:
    checks.programs("project_gaussians", programs)
    if programs:
        with torch.cuda.device_of(device_of):
            kernel[(programs,)](*arguments, **settings, num_warps=_BLOCK // 32, num_stages=1)


def forward(
    means: Tensor,  # (B, N, 3)
    quats: Tensor | None,  # (B, N, 4)
    scales: Tensor | None,  # (B, N, 3)
    covars: Tensor | None,  # (B, N, 6)
    opacities: Tensor | None,  # (B, N)
    viewmats: Tensor,  # (B, C, 4, 4)
    Ks: Tensor,  # (B, C, 3, 3)
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    ortho: bool,
    antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``project_gaussians`` of schema.py."""
    batches, n, cameras = means.shape[0], means.shape[1], viewmats.shape[1]
    shape = (batches, cameras, n)
    outputs = (
        means.new_empty((*shape, 2), dtype=torch.int32),
        means.new_empty((*shape, 2)),
        means.new_empty(shape),
        means.new_empty((*shape, 3)),
        means.new_empty(shape),
    )
    _launch(
        kernels.project_forward,
        batches * cameras * _tiles(n),
        means,
        means,
        quats,
        scales,
        covars,
        opacities,
        viewmats,
        Ks,
        *outputs,
        cameras,
        n,
        _tiles(n),
        width,
        height,
        *_halves(near_plane),
        *_halves(far_plane),
        *_halves(radius_clip),
        *_halves(eps2d),
        COVARS=covars is not None,
        HAS_OPACITIES=opacities is not None,
        ORTHO=ortho,
        ANTIALIASED=antialiased,
        COMPUTE=_compute_type(means.dtype),
        BLOCK=_BLOCK,
    )
    return outputs


def backward(
    grad_means2d: Tensor | None,  # (B, C, N, 2)
    grad_depths: Tensor | None,  # (B, C, N)
    grad_conics: Tensor | None,  # (B, C, N, 3)
    grad_compensations: Tensor | None,  # (B, C, N)
    radii: Tensor,  # (B, C, N, 2) int32
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    covars: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    eps2d: float,
    ortho: bool,
    needs_gaussians: bool,
    needs_cameras: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``project_gaussians_backward`` of schema.py."""
    batches, n, cameras = means.shape[0], means.shape[1], viewmats.shape[1]
    tiles = _tiles(n)

    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        return like.new_empty(like.shape) if needed and like is not None else means.new_empty((0,))

    of_means, of_quats, of_scales, of_covars = (gradient(x, needs_gaussians) for x in (means, quats, scales, covars))
    of_viewmats, of_Ks = (gradient(x, needs_cameras) for x in (viewmats, Ks))
    of_tiles = means.new_empty((batches, tiles, cameras, 16)) if needs_cameras else None
    _launch(
        kernels.project_backward,
        batches * tiles,
        means,
        grad_means2d,
        grad_depths,
        grad_conics,
        grad_compensations,
        radii,
        means,
        quats,
        scales,
        covars,
        viewmats,
        Ks,
        of_means,
        of_quats,
        of_scales,
        of_covars,
        of_tiles,
        cameras,
        n,
        tiles,
        width,
        height,
        *_halves(eps2d),
        COVARS=covars is not None,
        ORTHO=ortho,
        HAS_MEANS2D=grad_means2d is not None,
        HAS_DEPTHS=grad_depths is not None,
        HAS_CONICS=grad_conics is not None,
        HAS_COMPENSATIONS=grad_compensations is not None,
        NEEDS_GAUSSIANS=needs_gaussians,
        NEEDS_CAMERAS=needs_cameras,
        COMPUTE=_compute_type(means.dtype),
        BLOCK=_BLOCK,
    )
    if needs_cameras:
        _launch(
            kernels.sum_cameras,
            batches * cameras,
            means,
            of_tiles,
            of_viewmats,
            of_Ks,
            cameras,
            tiles,
            STRIDES=_STRIDES,
        )
    return of_means, of_quats, of_scales, of_covars, of_viewmats, of_Ks


def compiled_kernels() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    found = []
    for covars in (False, True):
        shape = {"COVARS": covars, "ORTHO": False, "COMPUTE": tl.float32, "BLOCK": _BLOCK}
        absent = {"quats": None, "scales": None} if covars else {"covars": None}
        forward_settings = shape | absent | {"HAS_OPACITIES": True, "ANTIALIASED": True}
        found.append(_compiled("project_forward", kernels.project_forward, covars, forward_settings))
        if covars:
            absent = absent | {"of_quats": None, "of_scales": None}
        else:
            absent = absent | {"of_covars": None}
        names = ("HAS_MEANS2D", "HAS_DEPTHS", "HAS_CONICS", "HAS_COMPENSATIONS", "NEEDS_GAUSSIANS", "NEEDS_CAMERAS")
        backward_settings = shape | absent | dict.fromkeys(names, True)
        found.append(_compiled("project_backward", kernels.project_backward, covars, backward_settings))
    found.append(_compiled("project_sum_cameras", kernels.sum_cameras, None, {"STRIDES": _STRIDES}))
    return tuple(found)


_INTEGERS = ("cameras", "gaussians", "tiles", "width", "height")
_FLOATS = ("near_plane", "near_rest", "far_plane", "far_rest", "radius_clip", "radius_clip_rest", "eps2d", "eps2d_rest")


def _compiled(name: str, function, covars: bool | None, constexprs: dict) -> TritonKernel:
    def kind(argument: str) -> str:
        if argument in constexprs:
            return "constexpr"
        if argument in _INTEGERS:
            return "i64"
        if argument in _FLOATS:
            return "fp32"
        return "*i32" if argument == "radii" else "*fp32"

    label = "" if covars is None else (", covars" if covars else ", quats and scales")
    return TritonKernel(
        name=f"{name}[fp32{label}]",
        function=function,
        signature={argument: kind(argument) for argument in function.arg_names},
        constexprs=constexprs,
        num_warps=_BLOCK // 32,
    )
