"""SSIM in Triton: the launches, and the specialisations that the compile gates build.

The kernels themselves, with the formula and the decomposition, are in :mod:`triton_kernels`.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks
from mpkernels.spec import TritonKernel
from mpkernels.splatting.ssim import triton_kernels as kernels

_ROWS, _COLUMNS, _TAPS, _WARPS = 16, 64, 16, 4  # 32 sums in the registers of a thread; twice as many spill


@functools.lru_cache(maxsize=32)
def _constants(size: int, sigma: float, data_range: float, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The window, and C1 and C2: in memory, where they keep float64."""
    weights = [math.exp(-0.5 * ((i - size // 2) / sigma) ** 2) for i in range(size)]
    total = math.fsum(weights)
    numbers = [w / total for w in weights], [(0.01 * data_range) ** 2, (0.03 * data_range) ** 2]
    return [torch.tensor(x, dtype=dtype, device=device) for x in numbers]


class _Problem:
    """The sizes of both passes, and their launches."""

    def __init__(self, image: Tensor, step: int, size: int, sigma: float, data_range: float, valid: bool):
        planes, rows, columns = image.shape
        around = size - 1 if valid else 0
        before = 0 if valid else size // 2
        behind = size - 1 - before
        self.map_shape = (planes, rows - around, columns - around * step)
        self.pixels = math.prod(self.map_shape)
        self.image = image
        self.weights, self.constants = _constants(size, sigma, data_range, image.dtype, image.device)
        self.forward = (*image.shape, *self.map_shape[1:], before, before * step, step)
        self.backward = (*self.map_shape, rows, columns, behind, behind * step, step)
        self.settings = {
            "SIZE": size,
            "ROWS": _ROWS,
            "COLUMNS": _COLUMNS,
            "TAPS": _TAPS,
            "TYPE": tl.float64 if image.dtype == torch.float64 else tl.float32,
        }

    @staticmethod
    def tiles(sizes: tuple) -> int:
        planes, _, _, rows, columns, *_ = sizes
        return planes * -(-rows // _ROWS) * -(-columns // _COLUMNS)

    def launch(self, kernel, sizes: tuple, *tensors, **settings) -> None:
        tiles = self.tiles(sizes)
        if tiles == 0:
            return
        checks.programs("ssim", tiles)
        with torch.cuda.device_of(self.image):
            kernel[(tiles,)](*tensors, *sizes, **self.settings, **settings, num_warps=_WARPS, num_stages=1)


def forward(
    image: Tensor,  # (P, H, M)
    target: Tensor,  # (P, H, M)
    step: int,
    window_size: int,
    sigma: float,
    data_range: float,
    valid: bool,
    mean: bool,
) -> Tensor:
    """The op ``ssim`` of schema.py: the map, or its mean."""
    problem = _Problem(image, step, window_size, sigma, data_range, valid)
    if mean:
        out = image.new_empty((problem.tiles(problem.forward),), dtype=torch.float64)
    else:
        out = image.new_empty(problem.map_shape)
    problem.launch(
        kernels.ssim_forward, problem.forward, image, target, problem.weights, problem.constants, out, MEAN=mean
    )
    return (out.sum() / max(problem.pixels, 1)).to(image.dtype) if mean else out


def backward(
    grad: Tensor,  # (P, H', M'), or () for the mean
    image: Tensor,
    target: Tensor,
    step: int,
    window_size: int,
    sigma: float,
    data_range: float,
    valid: bool,
    mean: bool,
    needs_image: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``ssim_backward`` of schema.py: gradients of image and target."""
    problem = _Problem(image, step, window_size, sigma, data_range, valid)
    of_image = image.new_empty(image.shape if needs_image else (0,))
    of_target = target.new_empty(target.shape if needs_target else (0,))
    maps = image.new_empty((4, *problem.map_shape))
    constants = (problem.weights, problem.constants)
    problem.launch(kernels.ssim_derivatives, problem.forward, image, target, *constants, grad, maps, MEAN=mean)
    problem.launch(
        kernels.ssim_backward,
        problem.backward,
        maps,
        image,
        target,
        problem.weights,
        of_image,
        of_target,
        NEEDS_IMAGE=needs_image,
        NEEDS_TARGET=needs_target,
    )
    return of_image, of_target


def compiled_kernels() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    found = [
        _compiled(function, mean)
        for function in (kernels.ssim_forward, kernels.ssim_derivatives)
        for mean in (True, False)
    ]
    return (*found, _compiled(kernels.ssim_backward, None))


def _compiled(function, mean: bool | None) -> TritonKernel:
    constexprs: dict = {"SIZE": 11, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "TAPS": _TAPS, "TYPE": tl.float32}
    constexprs |= {"NEEDS_IMAGE": True, "NEEDS_TARGET": True} if mean is None else {"MEAN": mean}
    forward = function is kernels.ssim_forward

    def kind(argument: str) -> str:
        if argument in constexprs:
            return "constexpr"
        if argument == "out" and mean:
            return "*fp64"
        pointers = ("image", "target", "weights", "constants", "grad", "maps", "out", "of_image", "of_target")
        return "*fp32" if argument in pointers else "i64"

    name = "ssim_forward" if forward else "ssim_derivatives" if mean is not None else "ssim_backward"
    kinds = "fp32" if mean is None else f"fp32, {'mean' if mean else 'map'}"
    return TritonKernel(
        name=f"{name}[{kinds}]",
        function=function,
        signature={argument: kind(argument) for argument in function.arg_names},
        constexprs=constexprs,
        num_warps=_WARPS,
    )
