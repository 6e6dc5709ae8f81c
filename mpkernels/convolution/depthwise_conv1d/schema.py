"""Schemas and fake functions of the depthwise convolution over time. Imports torch (and the namespaces) alone.

Shapes, with B rows of T positions, C channels, K taps and left = (K - 1) dilation:

==============  ===================  =================================================================================
argument        shape                meaning
==============  ===================  =================================================================================
x               (B, C, T)
weight          (C, K)               K >= 1; the last tap reads the newest position. float32 (float64 beside float64)
bias            (C,) or None         of the dtype of weight
state           (B, C, left) | None  what came before x, newest last
seq_idx         (B, T) int32 | None  the sequence that a position belongs to; below 0: padding
dilation        int >= 1             positions between taps
silu            bool                 whether out is silu(y) = y / (1 + e^-y) instead of y
channels_last   bool                 memory order of all (B, C, T) tensors, the state too: (B, T, C), or (B, C, T)
==============  ===================  =================================================================================

    y[b, c, t] = sum_k weight[c, k] xs[b, c, t - (K - 1 - k) dilation] + bias[c]

where xs is x, continued to the left by the state. A tap that would read in front of both, or a position of another
sequence, is left out: neither is read. The state belongs to the sequence of position 0. Outputs of padding are 0.

x and grad_out are contiguous in their last dimension, or with channels_last in their channels, and have any other
strides; the rest is contiguous (state in the memory order of x). Sums run in float32 (float64 for float64) from k = 0
on, from zero, by fused multiply-adds where the processor has them; the bias is added last. An output has the same bits
wherever a sequence is cut.

Backward returns the gradients of x, weight, bias and state, in the shapes, dtypes and memory orders of the arguments;
one that is not needed has shape (0,).

The update is a step of generation, and writes to ``state`` (N, C, S), S >= left, any strides: x (B, C, T) has the few
next positions. Row b continues row state_indices[b] (int32; b where it is None) of the state; one below 0 is skipped:
its outputs are 0. Without cache_seqlens the newest position is the last one, and x is shifted in. With them (B,) int32
the state is a circular buffer, and x[b, :, t] is written to position (cache_seqlens[b] + t) mod S.
"""

from __future__ import annotations

from torch import Tensor

from mpkernels import library

FORWARD = "depthwise_conv1d"
BACKWARD = "depthwise_conv1d_backward"
UPDATE = "depthwise_conv1d_update"

_TRITON = "mpkernels.convolution.depthwise_conv1d.triton"


def new_sequences(like: Tensor, batch: int, channels: int, length: int, channels_last: bool) -> Tensor:
    """An empty (B, C, T) tensor in the memory order that ``channels_last`` asks for."""
    if channels_last:
        return like.new_empty((batch, length, channels)).transpose(1, 2)
    return like.new_empty((batch, channels, length))


def _fake_forward(x, weight, bias, state, seq_idx, dilation, silu, channels_last) -> Tensor:
    return new_sequences(x, *x.shape, channels_last)


def _fake_backward(
    grad_out,
    x,
    weight,
    bias,
    state,
    seq_idx,
    dilation,
    silu,
    channels_last,
    needs_x,
    needs_weight,
    needs_bias,
    needs_state,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left = (weight.shape[1] - 1) * dilation
    return (
        new_sequences(x, *x.shape, channels_last) if needs_x else x.new_empty((0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty((weight.shape[0],) if needs_bias else (0,)),
        new_sequences(x, x.shape[0], x.shape[1], left, channels_last) if needs_state else x.new_empty((0,)),
    )


def _fake_update(x, state, weight, bias, cache_seqlens, state_indices, dilation, silu) -> Tensor:
    return x.new_empty(x.shape)


library.define(
    f"{FORWARD}(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? seq_idx, int dilation, bool silu, "
    "bool channels_last) -> Tensor",
    _fake_forward,
)
library.define(
    f"{BACKWARD}(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? seq_idx, "
    "int dilation, bool silu, bool channels_last, bool needs_x, bool needs_weight, bool needs_bias, bool needs_state) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.define(
    f"{UPDATE}(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? cache_seqlens, Tensor? state_indices, "
    "int dilation, bool silu) -> Tensor",
    _fake_update,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
