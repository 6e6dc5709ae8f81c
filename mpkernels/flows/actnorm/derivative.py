"""The gradient of ActNorm as differentiable torch operations, for derivatives of higher order.

Every variant is y = (x + before) scale + after, with scale = e^+-log_scale; for it

    dL/dx = g scale,   dL/dbefore = scale sum g,   dL/dafter = sum g,
    dL/dlog_scale = +-(scale sum g (x + before) + S h)

where g is the gradient of y, h the sum of those of log_abs_det, and sums run over samples and positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.flows.actnorm import schema


def actnorm_gradient(
    grad_y: Tensor,
    grad_log_abs_det: Tensor,
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    shift_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, bias, log_scale). Shapes as in schema.py."""
    wide, sign = schema.wide(x), -1 if inverse else 1
    gradient, value = grad_y.to(wide), x.to(wide)
    scale = torch.exp(sign * log_scale)
    inside = shift_first != inverse  # the shift is added before the product
    if inside:
        value = value + sign * bias[:, None]
    total = sign * gradient.sum((0, 2))
    of_log_scale = scale * (gradient * value).sum((0, 2)) + x.shape[2] * grad_log_abs_det.sum()
    return (gradient * scale[:, None]).to(x.dtype), total * scale if inside else total, sign * of_log_scale
