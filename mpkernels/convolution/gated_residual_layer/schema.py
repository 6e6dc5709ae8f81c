"""Schemas and fake functions of WaveNet's layer. Imports torch (and the namespaces) alone.

Shapes of the two ops, with B sequences of T positions, R residual channels, G gate channels, K taps, A channels of a
local condition, and P = R + S rows of the projection (P = S where the layer has no residual output):

=================  =======================  ==========================================================================
argument           shape                    meaning
=================  =======================  ==========================================================================
x                  (B, R, T)                the sequences
weight             (2 G, R, K)              of the dilated convolution: first the G filters, then the G gates
offset             (B or 1, 2 G) or None    added to the convolution: its bias, and what does not change over time
condition          (B, A, T) or None        what changes over time
condition_weight   (2 G, A) or None         given with ``condition``
projection         (P, G)                   first the R rows of the residual, then the S rows of the skip output
projection_bias    (P,) or None
state              (B, R, left) or None     what came before x, newest last, left = (K - 1) dilation; zeros where None
dilation           int >= 1
residual           bool                     whether the projection has rows of the residual
residual_scale     float                    factor of the residual output: 1, or sqrt(1/2)
channels_last      bool                     memory order of all (B, ., T) results: (B, T, .)
keep               bool                     whether ``gates`` is wanted (for the backward)
=================  =======================  ==========================================================================

    z        = sum_{k, c} weight[., c, k] xs[c, t + k dilation - left]
             + sum_a condition_weight[., a] condition[a, t] + offset
    h        = tanh(z[:G]) sigmoid(z[G:])
    residual = residual_scale (x + projection[:R] h + projection_bias[:R])
    skip     = projection[R:] h + projection_bias[R:]

(van den Oord et al. 2016, "WaveNet", eq. 2 and figure 4.) Returned: residual (B, R, T), or (B, 0, T) without;
skip (B, S, T); gates (B, 2 G, T), which is z in float32 (float64 for float64), or shape (0,) unless ``keep``.

x and condition are contiguous in their last dimension, or (stride(1) == 1) in their channels, each by itself; the
same holds for gradients of outputs. gates is contiguous in the order that ``channels_last`` asked for. Everything else
is contiguous.

Sums run in float32 (float64 for float64), from zero: those of z over k = 0 ... K - 1 and within a tap over the
channels, then over the channels of the condition, by fused multiply-adds where the processor has them; the offset is
added last. Those of the projections run over the channels of h; then the bias is added, then x, then the scale is
multiplied. An output has the same bits wherever the sequence was cut, in any batch, on any number of threads.

Backward takes the gradients of both outputs (either may be missing), and returns those of x, weight, offset, condition,
condition_weight, projection, projection_bias and state, in the shapes of the arguments; a missing argument, or one that
``needs`` leaves out, has a gradient of shape (0,): bit i of ``needs`` (1 << i) stands for the i-th of these eight.
Gradients of x and condition are in the memory order of ``channels_last``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library
from mpkernels.convolution.dilated_conv1d.schema import new_sequences

FORWARD = "gated_residual_layer"
BACKWARD = "gated_residual_layer_backward"

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? offset, Tensor? condition, Tensor? condition_weight, Tensor projection, "
    "Tensor? projection_bias, Tensor? state, int dilation, bool residual, float residual_scale, bool channels_last"
)
_TRITON = "mpkernels.convolution.gated_residual_layer.triton"


def _fake_forward(
    x,
    weight,
    offset,
    condition,
    condition_weight,
    projection,
    projection_bias,
    state,
    dilation,
    residual,
    residual_scale,
    channels_last,
    keep,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = x.shape
    channels = channels if residual else 0
    wide = torch.empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    return (
        new_sequences(x, batch, channels, length, channels_last),
        new_sequences(x, batch, projection.shape[0] - channels, length, channels_last),
        new_sequences(wide, batch, weight.shape[0], length, channels_last) if keep else wide.new_empty((0,)),
    )


def _fake_backward(
    grad_residual,
    grad_skip,
    gates,
    x,
    weight,
    offset,
    condition,
    condition_weight,
    projection,
    projection_bias,
    state,
    dilation,
    residual,
    residual_scale,
    channels_last,
    needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (x, weight, offset, condition, condition_weight, projection, projection_bias, state)

    def gradient(i: int, argument: Tensor | None) -> Tensor:
        if argument is None or not needs >> i & 1:
            return x.new_empty((0,))
        if argument is x or argument is condition:
            return new_sequences(x, argument.shape[0], argument.shape[1], argument.shape[2], channels_last)
        return x.new_empty(argument.shape)

    found = [gradient(i, argument) for i, argument in enumerate(given)]
    return found[0], found[1], found[2], found[3], found[4], found[5], found[6], found[7]


library.define(f"{FORWARD}({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor)", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor? grad_residual, Tensor? grad_skip, Tensor gates, {_ARGUMENTS}, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
