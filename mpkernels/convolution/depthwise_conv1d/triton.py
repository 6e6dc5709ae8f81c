"""The depthwise convolution in Triton: the launches, and the specialisations that the compile gates build.

The kernels themselves, with the formula and the decomposition, are in :mod:`triton_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks, library
from mpkernels.convolution.depthwise_conv1d import triton_kernels as kernels
from mpkernels.convolution.depthwise_conv1d.schema import new_sequences
from mpkernels.spec import TritonKernel

_WARPS = 4
_MOST_RECOMPUTED_TAPS = 4


def _tile(channels_last: bool, backward: bool) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_T): 8 elements a thread, 4 backward (more spill), and 128 bytes or more side by side."""
    if library.triton_interpreted():
        return 32, 64  # the interpreter takes its time by the program
    if channels_last:
        return (64, 8) if backward else (64, 16)
    return (1, 512) if backward else (1, 1024)


def _blocks(count: int, size: int) -> int:
    return (count + size - 1) // size


class _Problem:
    """The sizes of a call, and its launches."""

    def __init__(self, x, weight, bias, state, seq_idx, dilation: int, channels_last: bool):
        self.batch, self.channels, self.length = x.shape
        self.taps = weight.shape[1]
        self.dilation, self.left = dilation, (self.taps - 1) * dilation
        self.channels_last = channels_last
        self.x = x
        self.tensors = (x, weight, bias, state, seq_idx)
        self.settings = {
            "TAPS": self.taps,
            "CHANNELS_LAST": channels_last,
            "HAS_BIAS": bias is not None,
            "HAS_STATE": state is not None,
            "HAS_SEQ": seq_idx is not None,
            "TYPE": tl.float64 if weight.dtype == torch.float64 else tl.float32,
        }

    def blocks(self, length: int, backward: bool) -> tuple[int, int]:
        block_c, block_t = _tile(self.channels_last, backward)
        return _blocks(self.channels, block_c), _blocks(length, block_t)

    def launch(self, kernel, outputs: tuple, numbers: tuple, length: int, *, grad=None, backward=False, **settings):
        """Starts a program for each tile of a (B, C, length) tensor."""
        blocks = self.blocks(length, backward)
        programs = self.batch * blocks[0] * blocks[1]
        if programs == 0:
            return
        checks.programs("depthwise_conv1d", programs)
        block_c, block_t = _tile(self.channels_last, backward)
        inputs = self.tensors if grad is None else (grad, *self.tensors)
        strides = self.x.stride() if grad is None else (*grad.stride(), *self.x.stride())
        with torch.cuda.device_of(self.x):
            kernel[(programs,)](
                *inputs,
                *outputs,
                *strides,
                *numbers,
                self.channels,
                self.length,
                self.left,
                self.dilation,
                *blocks,
                **self.settings,
                **settings,
                BLOCK_C=block_c,
                BLOCK_T=block_t,
                num_warps=_WARPS,
                num_stages=1,
            )

    def order(self, length: int) -> tuple[int, int]:
        """Strides of channels and positions of a fresh (B, C, length) tensor."""
        return (1, self.channels) if self.channels_last else (length, 1)


def forward(
    x: Tensor,  # (B, C, T)
    weight: Tensor,  # (C, K)
    bias: Tensor | None,  # (C,)
    state: Tensor | None,  # (B, C, left)
    seq_idx: Tensor | None,  # (B, T)
    dilation: int,
    silu: bool,
    channels_last: bool,
) -> Tensor:
    """The op ``depthwise_conv1d`` of schema.py."""
    problem = _Problem(x, weight, bias, state, seq_idx, dilation, channels_last)
    out = new_sequences(x, problem.batch, problem.channels, problem.length, channels_last)
    problem.launch(kernels.depthwise_forward, (out,), problem.order(problem.length), problem.length, SILU=silu)
    return out


def backward(
    grad_out: Tensor,  # (B, C, T)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    dilation: int,
    silu: bool,
    channels_last: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``depthwise_conv1d_backward`` of schema.py."""
    problem = _Problem(x, weight, bias, state, seq_idx, dilation, channels_last)
    batch, channels, length = x.shape
    left, taps = problem.left, problem.taps
    grad = grad_out
    if silu and taps > _MOST_RECOMPUTED_TAPS:
        grad = new_sequences(weight, batch, channels, length, channels_last)
        problem.launch(
            kernels.depthwise_gradient_of_y, (grad,), problem.order(length), length, grad=grad_out, backward=True
        )
        silu = False
    sums = needs_weight or needs_bias
    of_x = new_sequences(x, batch, channels, length, channels_last) if needs_x else x.new_empty((0,))
    parts = weight.new_empty((batch * problem.blocks(length, True)[1] if sums else 0, taps + 1, channels))
    if needs_x or sums:
        problem.launch(
            kernels.depthwise_backward,
            (of_x, parts),
            (*problem.order(length), length, 0),
            length,
            grad=grad,
            backward=True,
            SILU=silu,
            NEEDS_X=needs_x,
            NEEDS_PARTS=sums,
        )
    of_state = x.new_empty((0,))
    if needs_state:
        of_state = new_sequences(x, batch, channels, left, channels_last)
        problem.launch(
            kernels.depthwise_backward,
            (of_state, parts),
            (*problem.order(left), left, left),
            left,
            grad=grad,
            backward=True,
            SILU=silu,
            NEEDS_X=True,
            NEEDS_PARTS=False,
        )
    total = parts.sum(0, dtype=torch.float64).to(weight.dtype) if sums else parts
    return (
        of_x,
        total[:taps].t().contiguous() if needs_weight else weight.new_empty((0,)),
        total[taps].clone() if needs_bias else weight.new_empty((0,)),
        of_state,
    )


def compiled_kernels() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    return tuple(_specialisations())


def _specialisations() -> Iterator[TritonKernel]:
    for name in ("fp32", "bf16"):
        for channels_last in (False, True):
            yield _compiled(kernels.depthwise_forward, name, channels_last, False, {"SILU": True})
            needs = {"SILU": True, "NEEDS_X": True, "NEEDS_PARTS": True}
            yield _compiled(kernels.depthwise_backward, name, channels_last, True, needs)
    yield _compiled(kernels.depthwise_gradient_of_y, "fp32", False, True, {}, taps=7)


def _compiled(function, name: str, channels_last: bool, backward: bool, settings: dict, taps: int = 4) -> TritonKernel:
    block_c, block_t = _tile(channels_last, backward)
    constexprs = {
        "TAPS": taps,
        "CHANNELS_LAST": channels_last,
        "HAS_BIAS": True,
        "HAS_STATE": False,
        "HAS_SEQ": False,
        "TYPE": tl.float32,
        "BLOCK_C": block_c,
        "BLOCK_T": block_t,
        # strides of 1 and missing arguments, as Triton specialises them
        "x_channel" if channels_last else "x_time": 1,
        "out_channel" if channels_last else "out_time": 1,
        "state": None,
        "seq_idx": None,
        **settings,
    }
    if backward:
        constexprs["grad_channel" if channels_last else "grad_time"] = 1

    def kind(argument: str) -> str:
        if argument in constexprs:
            return "constexpr"
        if argument in ("weight", "bias", "parts") or (argument == "out" and backward):
            return "*fp32"
        return f"*{name}" if argument in ("x", "out", "grad", "of_x") else "i64"

    order = "channels last" if channels_last else "channels first"
    return TritonKernel(
        name=f"{function.fn.__name__}[{name}, {order}]",
        function=function,
        signature={argument: kind(argument) for argument in function.arg_names},
        constexprs=constexprs,
        num_warps=_WARPS,
        divisible=tuple(
            a
            for a in ("x_batch", "x_channel", "x_time", "grad_batch", "grad_channel", "grad_time", "channels", "length")
            if a not in constexprs and a in function.arg_names
        ),
    )
