"""Schemas and fake functions of MADE's layer. Imports torch (and the namespaces) alone.

Units are sorted by their degrees, which makes the mask a staircase. Shapes of the two ops, with N rows, I inputs and O
outputs:

=================  ==============  ===================================================================================
argument           shape           meaning
=================  ==============  ===================================================================================
x                  (N, I)
weight             (O, I)          in the order of the caller, as x is
bias               (O,) or None
order_in           (I,) int32      a permutation: the input that stands at each place of the sorted order
order_out          (O,) int32      the same of the outputs
count              (O,) int32      place r of the sorted outputs sees the places [0, count[r]) of the sorted inputs;
                                   in [0, I], and never falling
=================  ==============  ===================================================================================

    y[n, order_out[r]] = bias[order_out[r]] + sum_{s < count[r]} weight[order_out[r], order_in[s]] x[n, order_in[s]]

(Germain et al. 2015, "MADE", eq. 8 and 9: s < count[r] is their mask.) Sums run in float32 (float64 for float64). What
the mask hides is neither multiplied nor added, whatever it holds.

Backward takes the gradient of y (N, O) and returns those of x, weight and bias, in that order. Bit i of ``needs``
(1 << i) stands for the i-th of the three; one that is not needed has shape (0,). Where the mask hides a weight, the
gradient is exactly 0. All tensors are contiguous.
"""

from __future__ import annotations

from torch import Tensor

from mpkernels import library

FORWARD = "masked_linear"
BACKWARD = "masked_linear_backward"

_PLAN = "Tensor order_in, Tensor order_out, Tensor count"
_TRITON = "mpkernels.convolution.masked_linear.triton"


def _fake_forward(x, weight, bias, order_in, order_out, count) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_backward(grad, x, weight, order_in, order_out, count, needs) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs & 1 else (0,)),
        x.new_empty(weight.shape if needs & 2 else (0,)),
        x.new_empty((weight.shape[0],) if needs & 4 else (0,)),
    )


library.define(f"{FORWARD}(Tensor x, Tensor weight, Tensor? bias, {_PLAN}) -> Tensor", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor grad, Tensor x, Tensor weight, {_PLAN}, int needs) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
