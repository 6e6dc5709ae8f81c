"""The gradient of the depthwise convolution as differentiable torch operations, for derivatives of higher order.

The kernels compute first derivatives; this module writes the same gradient with operations that autograd knows. With
u = grad silu'(y) (or grad), and over the taps that exist:

    dL/dxs[s] = sum_k weight[k] u[s + (K - 1 - k) dilation],   dL/dweight[k] = sum u[t] xs[t - (K - 1 - k) dilation].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def depthwise_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    dilation: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias, state); None for those that are not given. Shapes as in schema.py."""
    length, taps, wide = x.shape[2], weight.shape[1], weight.dtype
    left = (taps - 1) * dilation
    past = x.new_zeros((*x.shape[:2], left)) if state is None else state
    xs = torch.cat([past, x], -1).to(wide)
    exists = _existing(x, taps, dilation, state is not None, seq_idx)
    shifted = [
        torch.where(e, xs[:, :, k * dilation : k * dilation + length], 0.0) for k, e in zip(range(taps), exists)
    ]

    u = grad.to(wide)
    if silu:
        y = sum(torch.where(e, weight[:, k, None] * shifted[k], 0.0) for k, e in enumerate(exists))
        y = y if bias is None else y + bias[:, None]
        sigmoid = torch.sigmoid(y)
        u = u * sigmoid * (1 + y * (1 - sigmoid))
    if seq_idx is not None:
        u = torch.where(seq_idx[:, None] >= 0, u, 0.0)

    of_xs = torch.zeros_like(xs)
    of_weight = []
    for k, e in enumerate(exists):
        term = torch.where(e, weight[:, k, None] * torch.where(e, u, 0.0), 0.0)
        of_xs = of_xs + functional.pad(term, (k * dilation, left - k * dilation))
        of_weight.append(torch.where(e, u * shifted[k], 0.0).sum((0, 2)))
    return (
        of_xs[:, :, left:].to(x.dtype),
        torch.stack(of_weight, -1),
        None if bias is None else u.sum((0, 2)),
        None if state is None else of_xs[:, :, :left].to(x.dtype),
    )


def _existing(x: Tensor, taps: int, dilation: int, has_state: bool, seq_idx: Tensor | None) -> list[Tensor]:
    """For each tap, where it reads something: broadcasts to (B, 1, T)."""
    length, left = x.shape[2], (taps - 1) * dilation
    now = torch.arange(length, device=x.device)
    found = []
    for k in range(taps):
        position = now - left + k * dilation
        exists = ((position >= 0) | has_state)[None, None]
        if seq_idx is not None:
            other = seq_idx[:, position.clamp(min=0)]
            exists = exists & ((other == seq_idx) & (seq_idx >= 0))[:, None]
        found.append(exists)
    return found
