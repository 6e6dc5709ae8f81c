"""Volume compositing in Triton: the launches, the tile sizes, and the specialisations that the compile gates build.

The kernels themselves, with the formula and the decomposition, are in :mod:`triton_kernels`.
"""

from __future__ import annotations

import numpy
import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks
from mpkernels.spec import TritonKernel
from mpkernels.volume.composite import triton_kernels as kernels

# Elements of values that a thread holds: 8 samples of 3 channels (padded to 4). A warp then has 256 samples, 6 KB of
# float32 loads, in flight at once, and the 16 warps that fit beside each other (about 95 registers a thread) three
# times the ~25 to 35 KB with which a multiprocessor of an H100 or H200 hides the latency of its memory.
_VALUES_A_THREAD = 32
_MOST_WARPS = 4
_CHANNEL_BLOCK = 32  # channels side by side in a warp: 64 to 128 contiguous bytes a sample


def _power_of_two(x: int) -> int:
    """The least power of two that is not below ``x``."""
    return 1 << max(x - 1, 0).bit_length()


def _blocks(x: int, size: int) -> int:
    return (x + size - 1) // size


def _tile(samples: int, channels: int, packed: bool) -> tuple[int, int, int, int]:
    """(BLOCK_R, BLOCK_S, BLOCK_C, warps) for rays of ``samples`` samples (packed: on average).

    One table for sm_80, sm_90 and sm_100: the kernels only stream, and the tiles are bounded by registers, of which
    the three have equally many. The choice, for RGB:

    ===============  =======  =======  =====  ==================================================================
    rays             BLOCK_R  BLOCK_S  warps  reason
    ===============  =======  =======  =====  ==================================================================
    dense, S <= 256  256 / S  S        1      scans stay inside a warp: no barrier, no shared-memory stage
    dense, S = 512   1        512      2      a ray in one tile: the backward reads each sample once
    dense, longer    1        1024     4      blocks of a ray one after another
    packed           128 / S  <= 128   1      half the mean length: few idle lanes at the end of a ragged ray; half
                                              as many samples, since a loop over blocks holds more registers
    ===============  =======  =======  =====  ==================================================================

    The forward and the backward use the same tile, so that both multiply transmittances in the same order and
    stop at the same sample.
    """
    block_c = min(_power_of_two(channels), _CHANNEL_BLOCK)
    capacity = 32 * _VALUES_A_THREAD // max(block_c, 4)  # samples a warp holds
    length = _power_of_two(max(samples, 1))
    if packed:
        capacity = max(capacity // 2, 32)
        block_s = min(max(length // 2, 32), capacity)
        return capacity // block_s, block_s, block_c, 1
    block_s = min(max(length, 16), capacity * _MOST_WARPS)
    warps = max(block_s // capacity, 1)
    return max(capacity // block_s, 1), block_s, block_c, warps


def _compute_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _stride(x: Tensor | None, packed: bool) -> int:
    """Elements between the rows that a kernel counts in: rays, or the samples of packed rays."""
    if x is None:
        return 0
    return x.stride(0) if not packed else (1 if x.dim() == 1 else x.shape[1])


class _Problem:
    """What both passes need: sizes, tile, grid and the arguments that their kernels share."""

    def __init__(self, densities, values, t_starts, t_ends, packed_info, background, early_stop_eps):
        self.packed = packed_info is not None
        self.rays = packed_info.shape[0] if self.packed else densities.shape[0]
        self.channels = values.shape[-1]
        self.samples = densities.shape[-1]  # of a ray; packed: of all rays
        mean = self.samples // max(self.rays, 1) if self.packed else self.samples
        self.block_r, self.block_s, self.block_c, self.warps = _tile(mean, self.channels, self.packed)
        # a float argument travels as float32: the rest makes it exact where float64 is computed
        eps = float(numpy.float32(early_stop_eps))
        self.inputs = (densities, values, t_starts, t_ends, packed_info, background)
        self.sizes = (
            self.rays,
            self.samples,
            *(_stride(x, self.packed) for x in (densities, values, t_starts, t_ends)),
            0 if background is None else background.stride(0),
            eps,
            early_stop_eps - eps,
        )
        self.settings = {
            "CHANNELS": self.channels,
            "HAS_ENDS": t_ends is not None,
            "PACKED": self.packed,
            "HAS_BACKGROUND": background is not None,
            "EARLY_STOP": early_stop_eps > 0,
            "ONE_BLOCK": not self.packed and self.samples <= self.block_s,
            "COMPUTE": _compute_type(densities.dtype),
            "BLOCK_R": self.block_r,
            "BLOCK_S": self.block_s,
            "BLOCK_C": self.block_c,
        }

    def launch(self, kernel, parts: int, *arguments, **settings) -> None:
        if not self.rays:
            return
        programs = _blocks(self.rays, self.block_r) * parts
        if programs > checks.MOST_PROGRAMS:
            raise ValueError(
                f"composite: expected at most {checks.MOST_PROGRAMS} programs, got {programs} ({self.rays} rays)"
            )
        with torch.cuda.device_of(self.inputs[0]):
            kernel[(programs,)](*arguments, **self.settings, **settings, num_warps=self.warps, num_stages=1)


def forward(
    densities: Tensor,  # (R, S), packed (N,)
    values: Tensor,  # (R, S, C), packed (N, C)
    t_starts: Tensor,  # (R, S), packed (N,)
    t_ends: Tensor | None,  # (R, S), packed (N,)
    packed_info: Tensor | None,  # (R, 2) int64 [start, count]
    background: Tensor | None,  # (R, C)
    early_stop_eps: float,
    gaps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``composite`` of schema.py: values (R, C), opacity (R,), depth (R,), weights (R, S) or (N,)."""
    problem = _Problem(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps)
    outputs = (
        values.new_empty((problem.rays, problem.channels)),
        densities.new_empty((problem.rays,)),
        densities.new_empty((problem.rays,)),
        _fresh(densities, gaps),
    )
    parts = _blocks(problem.channels, problem.block_c)
    problem.launch(kernels.composite_forward, parts, *problem.inputs, *outputs, *problem.sizes)
    return outputs


def backward(
    grad_values: Tensor | None,  # (R, C)
    grad_opacity: Tensor | None,  # (R,)
    grad_depth: Tensor | None,  # (R,)
    grad_weights: Tensor | None,  # (R, S), packed (N,)
    densities: Tensor,
    values: Tensor,
    t_starts: Tensor,
    t_ends: Tensor | None,
    packed_info: Tensor | None,
    background: Tensor | None,
    early_stop_eps: float,
    gaps: bool,
    needs_values: bool,
    needs_ts: bool,
    needs_background: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``composite_backward`` of schema.py: gradients of densities, values, t_starts, t_ends, background."""
    problem = _Problem(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps)

    def gradient(like: Tensor | None, needed: bool, zero: bool = gaps) -> Tensor:
        return _fresh(like, zero) if needed and like is not None else densities.new_empty((0,))

    outputs = (
        _fresh(densities, gaps),
        gradient(values, needs_values),
        gradient(t_starts, needs_ts),
        gradient(t_ends, needs_ts),
        gradient(background, needs_background, False),
    )
    checkpoints = None
    if not problem.settings["ONE_BLOCK"]:
        wide = torch.float64 if densities.dtype == torch.float64 else torch.float32
        checkpoints = densities.new_empty((densities.numel() // problem.block_s,), dtype=wide)
    problem.launch(
        kernels.composite_backward,
        1,
        grad_values,
        grad_opacity,
        grad_depth,
        grad_weights,
        *problem.inputs,
        checkpoints,
        *outputs,
        _stride(grad_weights, problem.packed),
        *problem.sizes,
        HAS_GRAD_VALUES=grad_values is not None,
        HAS_GRAD_OPACITY=grad_opacity is not None,
        HAS_GRAD_DEPTH=grad_depth is not None,
        HAS_GRAD_WEIGHTS=grad_weights is not None,
        NEEDS_VALUES=needs_values,
        NEEDS_TS=needs_ts,
        NEEDS_BACKGROUND=needs_background and background is not None,
    )
    return outputs


def _fresh(like: Tensor, zero: bool) -> Tensor:
    return like.new_zeros(like.shape) if zero else like.new_empty(like.shape)


def compiled_kernels() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    found = []
    for name in ("fp32", "bf16"):
        for packed in (False, True):
            for channels in (3, 64):
                found += [_compiled(True, name, packed, channels), _compiled(False, name, packed, channels)]
    return tuple(found)


def _compiled(forward: bool, dtype: str, packed: bool, channels: int) -> TritonKernel:
    block_r, block_s, block_c, warps = _tile(256 if packed else 128, channels, packed)
    function = kernels.composite_forward if forward else kernels.composite_backward
    constexprs = {
        "CHANNELS": channels,
        "HAS_ENDS": True,
        "PACKED": packed,
        "HAS_BACKGROUND": True,
        "EARLY_STOP": packed,
        "ONE_BLOCK": not packed and block_s >= 128,
        "COMPUTE": tl.float32,
        "BLOCK_R": block_r,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
    }
    if not forward:
        constexprs |= {f"HAS_GRAD_{name}": True for name in ("VALUES", "OPACITY", "DEPTH", "WEIGHTS")}
        constexprs |= {f"NEEDS_{name}": True for name in ("VALUES", "TS", "BACKGROUND")}

    def kind(argument: str) -> str:
        if argument in constexprs:
            return "constexpr"
        if argument == "packed_info":
            return "*i64"
        if argument == "checkpoints":
            return "*fp32"
        if argument.startswith("early_stop"):
            return "fp32"
        return "i64" if argument in ("rays", "samples") or argument.endswith("_stride") else f"*{dtype}"

    absent = {}  # what a call leaves out, or what the launcher makes a constant because it is 1
    if packed:
        absent |= {"density_stride": 1, "start_stride": 1, "end_stride": 1}
        if not forward:
            absent["grad_weight_stride"] = 1
    else:
        absent["packed_info"] = None
    if not forward and constexprs["ONE_BLOCK"]:
        absent["checkpoints"] = None
    constexprs |= absent
    layout = "packed" if packed else "dense"
    return TritonKernel(
        name=f"composite_{'forward' if forward else 'backward'}[{dtype}, {layout}, C={channels}]",
        function=function,
        signature={argument: kind(argument) for argument in function.arg_names},
        constexprs=constexprs,
        num_warps=warps,
    )
