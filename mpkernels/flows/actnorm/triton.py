"""ActNorm in Triton: the launches, and the specialisations that the compile gates build.

The kernels themselves, with the formula and the decomposition, are in :mod:`triton_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks, library
from mpkernels.flows.actnorm import schema
from mpkernels.flows.actnorm import triton_kernels as kernels
from mpkernels.spec import TritonKernel

_WARPS = 4
_LOG_BLOCK = 256
_SUM_TILE = (32, 8)  # (BLOCK_P, BLOCK_C)
_LARGEST = 2**31 - 2**16  # elements that are counted in 32 bits


def _block(double: bool) -> int:
    """Elements of a program forward: 8 a thread, 4 of float64."""
    return 512 if double else 1024


def _tile(channels_last: bool, double: bool) -> tuple[int, int, int]:
    """(BLOCK_C, BLOCK_N, TILES) backward: 8 elements a thread at a time, 4 of float64, wide where x is."""
    if library.triton_interpreted():
        return 16, 256, 2  # the interpreter takes its time by the program
    if channels_last:
        return 64, 8 if double else 16, 4
    return 1, 512 if double else 1024, 4


def _blocks(count: int, size: int) -> int:
    return (count + size - 1) // size


def _type(x: Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def forward(
    x: Tensor,  # (B, C, S)
    bias: Tensor,  # (C,)
    log_scale: Tensor,  # (C,)
    shift_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``actnorm`` of schema.py."""
    batch, channels, positions = x.shape
    y = x.new_empty(x.shape)
    log_abs_det = x.new_empty((batch,), dtype=schema.wide(x))
    count = x.numel()
    block = _block(x.dtype == torch.float64)
    checks.programs("actnorm", _blocks(count, block))
    with torch.cuda.device_of(x):
        if count > 0:
            kernels.actnorm_forward[(_blocks(count, block),)](
                x,
                bias,
                log_scale,
                y,
                *x.stride(),
                count,
                channels,
                positions,
                INNER=shift_first != inverse,
                INVERSE=inverse,
                NESTED=x.is_contiguous(),
                LARGE=count > _LARGEST,
                TYPE=_type(x),
                BLOCK=block,
                num_warps=_WARPS,
                num_stages=1,
            )
        if batch > 0:
            kernels.actnorm_log_abs_det[(_blocks(batch, _LOG_BLOCK),)](
                log_scale, log_abs_det, batch, channels, positions, INVERSE=inverse, BLOCK=_LOG_BLOCK, num_warps=_WARPS
            )
    return y, log_abs_det


def backward(
    grad_y: Tensor,  # (B, C, S)
    grad_log_abs_det: Tensor,  # (B,)
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    shift_first: bool,
    inverse: bool,
    needs_x: bool,
    needs_bias: bool,
    needs_log_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``actnorm_backward`` of schema.py."""
    batch, channels, positions = x.shape
    count = batch * positions
    sums = needs_bias or needs_log_scale
    of_x = x.new_empty(x.shape if needs_x else (0,))
    of_bias, of_log_scale = bias.new_empty((channels if sums else 0,)), bias.new_empty((channels if sums else 0,))
    block_c, block_n, tiles = _tile(positions == 1 or x.stride(1) == 1, x.dtype == torch.float64)
    blocks_c, pieces = _blocks(channels, block_c), _blocks(count, block_n * tiles)
    checks.programs("actnorm", blocks_c * pieces)
    parts = x.new_empty((pieces if sums else 0, 2, channels), dtype=torch.float64)
    directions = {"INNER": shift_first != inverse, "INVERSE": inverse}
    with torch.cuda.device_of(x):
        if x.numel() > 0 and (needs_x or sums):
            kernels.actnorm_backward[(blocks_c * pieces,)](
                grad_y,
                x,
                bias,
                log_scale,
                of_x,
                parts,
                *grad_y.stride(),
                *x.stride(),
                count,
                channels,
                positions,
                blocks_c,
                **directions,
                LARGE=count > _LARGEST,
                TYPE=_type(x),
                NEEDS_X=needs_x,
                NEEDS_SUMS=sums,
                BLOCK_C=block_c,
                BLOCK_N=block_n,
                TILES=tiles,
                num_warps=_WARPS,
                num_stages=1,
            )
        if sums and channels > 0:
            block_p, block_c = _SUM_TILE
            kernels.actnorm_sum[(_blocks(channels, block_c),)](
                parts,
                grad_log_abs_det,
                log_scale,
                of_bias,
                of_log_scale,
                grad_log_abs_det.stride(0),
                pieces,
                batch,
                channels,
                positions,
                **directions,
                BLOCK_P=block_p,
                BLOCK_C=block_c,
                num_warps=_WARPS,
                num_stages=1,
            )
    none = bias.new_empty((0,))
    return of_x, of_bias if needs_bias else none, of_log_scale if needs_log_scale else bias.new_empty((0,))


def compiled_kernels() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    return tuple(_specialisations())


def _specialisations() -> Iterator[TritonKernel]:
    directions = {"INNER": True, "INVERSE": False}
    for name in ("fp32", "bf16"):
        settings = {**directions, "LARGE": False, "TYPE": tl.float32}
        forward = {**settings, "NESTED": True, "BLOCK": _block(False), "x_s": 1}
        yield _compiled(kernels.actnorm_forward, f"{name}", name, forward)
        for channels_last in (False, True):
            block_c, block_n, tiles = _tile(channels_last, False)
            tile = {"BLOCK_C": block_c, "BLOCK_N": block_n, "TILES": tiles, "NEEDS_X": True, "NEEDS_SUMS": True}
            side = "c" if channels_last else "s"
            order = "channels last" if channels_last else "channels first"
            strides = {f"grad_{side}": 1, f"x_{side}": 1}
            yield _compiled(kernels.actnorm_backward, f"{name}, {order}", name, {**settings, **tile, **strides})
    yield _compiled(kernels.actnorm_log_abs_det, "fp32", "fp32", {"INVERSE": False, "BLOCK": _LOG_BLOCK})
    tile = {"BLOCK_P": _SUM_TILE[0], "BLOCK_C": _SUM_TILE[1]}
    yield _compiled(kernels.actnorm_sum, "fp32", "fp32", {**directions, **tile, "grad_log_b": 1})


def _compiled(function, title: str, name: str, constexprs: dict) -> TritonKernel:
    def kind(argument: str) -> str:
        if argument in constexprs:
            return "constexpr"
        if argument in ("x", "y", "grad", "of_x"):
            return f"*{name}"
        if argument in ("bias", "log_scale", "grad_log", "of_bias", "of_log_scale", "out"):
            return "*fp32"
        return "*fp64" if argument == "parts" else "i32"

    return TritonKernel(
        name=f"{function.fn.__name__}[{title}]",
        function=function,
        signature={argument: kind(argument) for argument in function.arg_names},
        constexprs=constexprs,
        num_warps=_WARPS,
        divisible=tuple(
            a for a in function.arg_names if kind(a) == "i32" and a not in ("pieces", "batch", "blocks_c")
        ),
    )
