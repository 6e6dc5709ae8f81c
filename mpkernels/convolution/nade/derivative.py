"""The gradient of NADE's log-likelihood as differentiable torch operations, for derivatives of higher order.

The kernels compute first derivatives. To differentiate those again, this module writes the same gradient with torch
operations that autograd knows, all dimensions at once: it keeps (N, D, H) tensors, and is used for nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_prob_gradient(
    grad: Tensor, x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of (x, in_weight, in_bias, out_weight, out_bias); shapes as in schema.py."""
    dtype = x.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad, x, in_weight, in_bias, out_weight, out_bias = (
        tensor.to(wide) for tensor in (grad, x, in_weight, in_bias, out_weight, out_bias)
    )
    dimensions = x.shape[1]
    columns = in_weight.T  # (D, H)
    steps = x[:, :, None] * columns  # (N, D, H)
    start = torch.zeros_like(steps[:, :1])
    hidden = torch.sigmoid(in_bias + torch.cat([start, steps[:, :-1].cumsum(1)], dim=1))
    logits = (hidden * out_weight).sum(-1) + out_bias
    delta = grad[:, None] * (x - torch.sigmoid(logits))
    of_activation = delta[:, :, None] * out_weight * hidden * (1 - hidden)
    # behind[n, d] = sum of of_activation over the dimensions after d
    behind = torch.cat([of_activation[:, 1:].flip(1).cumsum(1).flip(1), start], dim=1)[:, :dimensions]
    found = (
        grad[:, None] * logits + (behind * columns).sum(-1),
        (x[:, :, None] * behind).sum(0).T,
        of_activation.sum((0, 1)),
        (delta[:, :, None] * hidden).sum(0),
        delta.sum(0),
    )
    return tuple(tensor.to(dtype) for tensor in found)
