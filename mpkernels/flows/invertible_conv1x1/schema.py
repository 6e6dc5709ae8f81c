"""Schemas and fake functions of the product with a matrix at every position. Imports torch (and the namespaces) alone.

    y[b, o, p] = sum_c weight[o, c] x[b, c, p] + bias[o]

with x (B, C, S) of any strides, weight (O, C) and bias (O,) or None contiguous and of the dtype that is computed in:
float32 (float64 beside float64). y (B, O, S) is contiguous, in the dtype of x.

Backward returns the gradients of x (contiguous, in its dtype), weight and bias; one that is not needed has shape (0,).
Sums run in float32 (float64) in a fixed order.
"""

from __future__ import annotations

from torch import Tensor

from mpkernels import library

FORWARD = "channel_mix"
BACKWARD = "channel_mix_backward"


def _fake_forward(x, weight, bias) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))


def _fake_backward(grad_y, x, weight, needs_x, needs_weight, needs_bias) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty((weight.shape[0],) if needs_bias else (0,)),
    )


library.define(f"{FORWARD}(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor grad_y, Tensor x, Tensor weight, bool needs_x, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
