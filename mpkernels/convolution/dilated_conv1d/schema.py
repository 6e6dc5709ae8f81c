"""Schemas and fake functions of the dilated convolution over time. Imports torch (and the namespaces) alone.

Shapes of the two ops, with B sequences of T positions, C input and D output channels, K taps:

==============  ===================  =================================================================================
argument        shape                meaning
==============  ===================  =================================================================================
x               (B, C, T)            the sequences
weight          (D, C / groups, K)   K >= 1; the last tap reads the newest position
bias            (D,) or None
state           (B, C, left) | None  what came before x, newest last; zeros where None
dilation        int >= 1             positions between taps
groups          int                  divides C and D: the channels of a group see the inputs of their group alone
left            int >= 0             how far before an output its first tap reads: (K - 1) dilation for a causal one
channels_last   bool                 memory order of what is returned: (B, T, D) instead of (B, D, T)
==============  ===================  =================================================================================

    out[b, o, t] = bias[o] + sum_{k, c} weight[o, c, k] xs[b, c, t + k dilation - left]        for 0 <= t < T,

where xs is x, continued to the left by the state (by zeros without) and to the right by zeros. A position outside is
not read, and its weight is not multiplied: whatever they hold never matters.

x is contiguous in its last dimension, or (stride(1) == 1) in its channels; strides of the other dimensions are any.
The same holds, independently, for grad_out. weight, bias and state are contiguous.

Sums run in float32 (float64 for float64) and in the order k = 0 ... K - 1, and within a tap c = 0, 1, ..., from zero,
by fused multiply-adds where the processor has them; the bias is added last. An output has the same bits wherever the
sequence was cut, in any batch and on any number of threads.

Backward takes the gradient of out and returns those of x, weight, bias and state, in the shapes of the arguments; one
that is not needed has shape (0,). That of x is in the memory order that ``channels_last`` asks for.
"""

from __future__ import annotations

from torch import Tensor

from mpkernels import library

FORWARD = "dilated_conv1d"
BACKWARD = "dilated_conv1d_backward"

_TRITON = "mpkernels.convolution.dilated_conv1d.triton"


def new_sequences(like: Tensor, batch: int, channels: int, length: int, channels_last: bool) -> Tensor:
    """An empty (B, channels, T) tensor in the memory order that ``channels_last`` asks for."""
    if channels_last:
        return like.new_empty((batch, length, channels)).transpose(1, 2)
    return like.new_empty((batch, channels, length))


def _fake_forward(x, weight, bias, state, dilation, groups, left, channels_last) -> Tensor:
    return new_sequences(x, x.shape[0], weight.shape[0], x.shape[2], channels_last)


def _fake_backward(
    grad_out,
    x,
    weight,
    state,
    dilation,
    groups,
    left,
    channels_last,
    needs_x,
    needs_weight,
    needs_bias,
    needs_state,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        new_sequences(x, x.shape[0], x.shape[1], x.shape[2], channels_last) if needs_x else x.new_empty((0,)),
        x.new_empty(weight.shape if needs_weight else (0,)),
        x.new_empty((weight.shape[0],) if needs_bias else (0,)),
        x.new_empty((x.shape[0], x.shape[1], left) if needs_state else (0,)),
    )


library.define(
    f"{FORWARD}(Tensor x, Tensor weight, Tensor? bias, Tensor? state, int dilation, int groups, int left, "
    "bool channels_last) -> Tensor",
    _fake_forward,
)
library.define(
    f"{BACKWARD}(Tensor grad_out, Tensor x, Tensor weight, Tensor? state, int dilation, int groups, int left, "
    "bool channels_last, bool needs_x, bool needs_weight, bool needs_bias, bool needs_state) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
