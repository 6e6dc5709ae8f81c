"""Schemas and fake functions of actnorm. Imports torch (and the namespaces) alone.

Shapes, with B samples of C channels of S positions:

===========  =========  ===================================================================================
argument     shape      meaning
===========  =========  ===================================================================================
x            (B, C, S)  any strides; fast where S, or the channels, lie side by side
bias         (C,)       contiguous, as log_scale; of the dtype float32 (float64 beside float64)
log_scale    (C,)
shift_first  bool       (x + bias) e^log_scale, as in Glow, instead of x e^log_scale + bias
inverse      bool       x from y: x e^-log_scale - bias with shift_first, else (x - bias) e^-log_scale
===========  =========  ===================================================================================

    log_abs_det[b] = +-S sum_c log_scale[c]   (- for the inverse)

y and grad_x are contiguous, in the dtype of x. log_abs_det and the other gradients are float32 (float64), sums in a
fixed order. Backward returns the gradients of x, bias and log_scale; one that is not needed has shape (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

FORWARD = "actnorm"
BACKWARD = "actnorm_backward"

_TRITON = "mpkernels.flows.actnorm.triton"


def wide(x: Tensor) -> torch.dtype:
    """The dtype of log-determinants, and of the parameters."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_forward(x, bias, log_scale, shift_first, inverse) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0],), dtype=wide(x))


def _fake_backward(
    grad_y, grad_log_abs_det, x, bias, log_scale, shift_first, inverse, needs_x, needs_bias, needs_log_scale
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        bias.new_empty(bias.shape if needs_bias else (0,)),
        bias.new_empty(bias.shape if needs_log_scale else (0,)),
    )


library.define(
    f"{FORWARD}(Tensor x, Tensor bias, Tensor log_scale, bool shift_first, bool inverse) -> (Tensor, Tensor)",
    _fake_forward,
)
library.define(
    f"{BACKWARD}(Tensor grad_y, Tensor grad_log_abs_det, Tensor x, Tensor bias, Tensor log_scale, bool shift_first, "
    "bool inverse, bool needs_x, bool needs_bias, bool needs_log_scale) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
