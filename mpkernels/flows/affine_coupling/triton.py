"""The affine coupling in Triton: the launches, and the specialisations that the compile gates build.

The kernels themselves, with the formula and the decomposition, are in :mod:`triton_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks, library
from mpkernels.flows.affine_coupling import schema
from mpkernels.flows.affine_coupling import triton_kernels as kernels
from mpkernels.spec import TritonKernel

_SUM_BLOCK = 256
_LARGEST = 2**31 - 2**16  # elements of a sample that are counted in 32 bits


def _block(size: int, double: bool) -> tuple[int, int]:
    """(BLOCK, warps) for samples of `size` elements: 8 elements a thread, 4 of float64."""
    if library.triton_interpreted():
        return 1024, 4  # the interpreter takes its time by the program
    most = 512 if double else 1024
    block = 64
    while block < size and block < most:
        block *= 2
    return block, 4 if block == most else 1


def _split(p: Tensor, layout: int) -> tuple[Tensor, Tensor]:
    """(raw, shift) of a joint layout, views."""
    half = p.shape[1] // 2
    if layout == schema.SHIFT_SCALE:
        return p[:, half:], p[:, :half]
    if layout == schema.SCALE_SHIFT:
        return p[:, :half], p[:, half:]
    if layout == schema.SHIFT_SCALE_INTERLEAVED:
        return p[:, 1::2], p[:, ::2]
    return p[:, ::2], p[:, 1::2]


def _nested(p: Tensor | None) -> bool:
    """Whether (C, H, W) of a tensor lie side by side."""
    if p is None:
        return True
    step = 1
    for d in (3, 2, 1):
        if p.shape[d] != 1 and p.stride(d) != step:
            return False
        step *= p.shape[d]
    return True


def _strides(p: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if p is None else p.stride()


class _Problem:
    """The sizes and settings of a call."""

    def __init__(self, x, raw, shift, mask, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse):
        if layout != schema.SEPARATE:
            raw, shift = _split(raw, layout)
        self.x, self.raw, self.shift, self.mask = x, raw, shift, mask
        self.batch, channels, height, width = x.shape
        self.size = channels * height * width
        first = (channels + 1) // 2
        c_first, c_last = 0, channels
        if pattern == schema.CHANNEL:
            c_first, c_last = (first, channels) if parity == 0 else (0, first)
        self.ranges = (height, width, c_first * height * width, c_last * height * width, c_first)
        self.block, self.warps = _block(self.size, x.dtype == torch.float64)
        self.pieces = (self.size + self.block - 1) // self.block
        self.programs = self.batch * self.pieces
        checks.programs("affine_coupling", self.programs)
        self.settings: dict = {
            "SCALE": scale,
            "CLAMP": clamp,
            "EPSILON": epsilon,
            "PATTERN": pattern,
            "PARITY": parity,
            "INNER": shift_first != inverse,
            "INVERSE": inverse,
            "NESTED": all(_nested(p) for p in (x, raw, shift, mask)),
            "LARGE": self.size > _LARGEST,
            "TYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
            "BLOCK": self.block,
        }


def forward(
    x: Tensor,  # (B, C, H, W)
    raw: Tensor | None,  # (B, P, H, W), or (B, 2 P, H, W)
    shift: Tensor | None,  # (B, P, H, W)
    mask: Tensor | None,  # (B, C, H, W)
    scale: int,
    clamp: float,
    epsilon: float,
    layout: int,
    pattern: int,
    parity: int,
    shift_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``affine_coupling`` of schema.py."""
    problem = _Problem(x, raw, shift, mask, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse)
    y = x.new_empty(x.shape)
    wide = schema.wide(x)
    if scale == schema.ADDITIVE or problem.programs == 0:
        log_abs_det = parts = x.new_zeros((problem.batch,), dtype=wide)
    else:
        log_abs_det = parts = x.new_empty((problem.batch,), dtype=wide)
        if problem.pieces > 1:
            parts = x.new_empty((problem.batch, problem.pieces), dtype=torch.float64)
    if problem.programs == 0:
        return y, log_abs_det
    tensors = (x, problem.raw, problem.shift, problem.mask)
    with torch.cuda.device_of(x):
        kernels.coupling_forward[(problem.programs,)](
            *tensors,
            y,
            parts,
            *(stride for p in tensors for stride in _strides(p)),
            problem.size,
            problem.pieces,
            *problem.ranges,
            **problem.settings,
            num_warps=problem.warps,
            num_stages=1,
        )
        if parts is not log_abs_det:
            kernels.coupling_sum[(problem.batch,)](
                parts, log_abs_det, problem.pieces, BLOCK=_SUM_BLOCK, num_warps=1, num_stages=1
            )
    return y, log_abs_det


def backward(
    grad_y: Tensor,  # (B, C, H, W)
    grad_log_abs_det: Tensor,  # (B,)
    x: Tensor,
    raw: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    scale: int,
    clamp: float,
    epsilon: float,
    layout: int,
    pattern: int,
    parity: int,
    shift_first: bool,
    inverse: bool,
    needs_x: bool,
    needs_raw: bool,
    needs_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``affine_coupling_backward`` of schema.py."""
    problem = _Problem(x, raw, shift, mask, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse)
    needs_raw, needs_shift = needs_raw and raw is not None, needs_shift and shift is not None
    of_x = x.new_empty(x.shape if needs_x else (0,))
    of_raw = x.new_empty(raw.shape if raw is not None and needs_raw else (0,))
    of_shift = x.new_empty(shift.shape if shift is not None and needs_shift else (0,))
    to_raw, to_shift = of_raw, of_shift
    if layout != schema.SEPARATE and needs_raw:
        needs_shift = True
        to_raw, to_shift = _split(of_raw, layout)
    if problem.programs == 0 or not (needs_x or needs_raw or needs_shift):
        return of_x, of_raw, of_shift
    settings = problem.settings | {"NEEDS_X": needs_x, "NEEDS_RAW": needs_raw, "NEEDS_SHIFT": needs_shift}
    written = [p for p, needed in ((to_raw, needs_raw), (to_shift, needs_shift)) if needed]
    settings["NESTED"] = settings["NESTED"] and all(_nested(p) for p in (grad_y, *written))
    inputs = (x, problem.raw, problem.shift, problem.mask)
    with torch.cuda.device_of(x):
        kernels.coupling_backward[(problem.programs,)](
            grad_y,
            grad_log_abs_det,
            *inputs,
            of_x,
            to_raw,
            to_shift,
            *grad_y.stride(),
            grad_log_abs_det.stride(0),
            *(stride for p in inputs for stride in _strides(p)),
            *(to_raw.stride()[:2] if needs_raw else (0, 0)),
            *(to_shift.stride()[:2] if needs_shift else (0, 0)),
            problem.size,
            problem.pieces,
            *problem.ranges,
            **settings,
            num_warps=problem.warps,
            num_stages=1,
        )
    return of_x, of_raw, of_shift


def compiled_kernels() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    return tuple(_specialisations())


def _specialisations() -> Iterator[TritonKernel]:
    variants = (
        ("sigmoid, channels", {"SCALE": schema.SIGMOID, "PATTERN": schema.CHANNEL, "INNER": True}),
        ("exp, checkerboard", {"SCALE": schema.EXP, "PATTERN": schema.CHECKERBOARD}),
        ("softclamp, any strides", {"SCALE": schema.SOFTCLAMP, "PATTERN": schema.TENSOR, "NESTED": False}),
    )
    for title, settings in variants:
        for name in ("fp32", "bf16"):
            yield _compiled(kernels.coupling_forward, name, title, settings)
            yield _compiled(kernels.coupling_backward, name, title, settings)
    yield TritonKernel(
        name="coupling_sum[fp32]",
        function=kernels.coupling_sum,
        signature={"parts": "*fp64", "out": "*fp32", "pieces": "i64"},
        constexprs={"BLOCK": _SUM_BLOCK},
        num_warps=1,
    )


def _compiled(function, name: str, title: str, settings: Mapping) -> TritonKernel:
    block, warps = _block(1 << 20, False)
    constexprs: dict = {
        "CLAMP": 2.0,
        "EPSILON": 0.0,
        "PARITY": 0,
        "INNER": False,
        "INVERSE": False,
        "NESTED": True,
        "LARGE": False,
        "TYPE": tl.float32,
        "BLOCK": block,
        # strides of 1, as Triton specialises them
        **{f"{p}_w": 1 for p in ("x", "raw", "shift", "mask")},
        **settings,
    }
    if constexprs["PATTERN"] != schema.TENSOR:
        constexprs["mask"] = None
    if function is kernels.coupling_backward:
        constexprs |= {"grad_w": 1, "NEEDS_X": True, "NEEDS_RAW": True, "NEEDS_SHIFT": True}

    def kind(argument: str) -> str:
        if argument in constexprs:
            return "constexpr"
        if argument in ("x", "raw", "shift", "y", "grad", "of_x", "of_raw", "of_shift"):
            return f"*{name}"
        return {"mask": "*i1", "parts": "*fp64", "grad_log": "*fp32"}.get(argument, "i32")

    return TritonKernel(
        name=f"{function.fn.__name__}[{name}, {title}]",
        function=function,
        signature={argument: kind(argument) for argument in function.arg_names},
        constexprs=constexprs,
        num_warps=warps,
        divisible=tuple(
            a
            for a in function.arg_names
            if kind(a) == "i32" and (a in ("size", "first", "last", "width") or a.endswith(("_b", "_c", "_h")))
        ),
    )
