"""Spherical harmonics in Triton: the launches, and the specialisations that the compile gates build.

The kernels themselves, with the formula and the decomposition, are in :mod:`triton_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import checks
from mpkernels.spec import TritonKernel
from mpkernels.splatting.spherical_harmonics import triton_kernels as kernels

_BLOCK, _WARPS = 128, 4  # a Gaussian a thread


def _launch(kernel, degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None, *tensors, **settings) -> None:
    batches, cameras, gaussians = dirs.shape[:3]
    programs = batches * ((gaussians + _BLOCK - 1) // _BLOCK)
    if programs == 0 or cameras == 0:
        return
    checks.programs("spherical_harmonics", programs)
    with torch.cuda.device_of(dirs):
        kernel[(programs,)](
            *tensors,
            cameras,
            gaussians,
            coeffs.shape[2],
            DEGREE=degree,
            HAS_MASKS=masks is not None,
            BLOCK=_BLOCK,
            **settings,
            num_warps=_WARPS,
            num_stages=1,
        )


def forward(
    degree: int,
    dirs: Tensor,  # (B, C, N, 3)
    coeffs: Tensor,  # (B, N, K, 3)
    masks: Tensor | None,  # (B, C, N)
) -> Tensor:
    """The op ``spherical_harmonics`` of schema.py: colors (B, C, N, 3)."""
    colors = dirs.new_empty(dirs.shape)
    _launch(kernels.spherical_harmonics_forward, degree, dirs, coeffs, masks, dirs, coeffs, masks, colors)
    return colors


def backward(
    grad: Tensor,  # (B, C, N, 3)
    degree: int,
    dirs: Tensor,
    coeffs: Tensor,
    masks: Tensor | None,
    needs_dirs: bool,
    needs_coeffs: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``spherical_harmonics_backward`` of schema.py: gradients of dirs and coeffs."""
    of_dirs = dirs.new_empty(dirs.shape if needs_dirs else (0,))
    all_written = coeffs.shape[2] == (degree + 1) ** 2 and dirs.shape[1] > 0
    shape = coeffs.shape if needs_coeffs else (0,)
    of_coeffs = coeffs.new_empty(shape) if all_written else coeffs.new_zeros(shape)
    _launch(
        kernels.spherical_harmonics_backward,
        degree,
        dirs,
        coeffs,
        masks,
        grad,
        dirs,
        coeffs,
        masks,
        of_dirs,
        of_coeffs,
        NEEDS_DIRS=needs_dirs,
        NEEDS_COEFFS=needs_coeffs,
    )
    return of_dirs, of_coeffs


def compiled_kernels() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    found = []
    for degree in (0, 3):
        for masked in (False, True):
            found += [_compiled(True, degree, masked), _compiled(False, degree, masked)]
    return tuple(found)


def _compiled(forward: bool, degree: int, masked: bool) -> TritonKernel:
    function = kernels.spherical_harmonics_forward if forward else kernels.spherical_harmonics_backward
    constexprs: dict = {"DEGREE": degree, "HAS_MASKS": masked, "BLOCK": _BLOCK}
    if not forward:
        constexprs |= {"NEEDS_DIRS": True, "NEEDS_COEFFS": True}
    if not masked:
        constexprs["masks"] = None

    def kind(argument: str) -> str:
        if argument in constexprs:
            return "constexpr"
        if argument == "masks":
            return "*i1"
        return "i64" if argument in ("cameras", "gaussians", "coefficients") else "*fp32"

    return TritonKernel(
        name=f"spherical_harmonics_{'forward' if forward else 'backward'}"
        f"[fp32, degree {degree}{', masks' if masked else ''}]",
        function=function,
        signature={argument: kind(argument) for argument in function.arg_names},
        constexprs=constexprs,
        num_warps=_WARPS,
    )
