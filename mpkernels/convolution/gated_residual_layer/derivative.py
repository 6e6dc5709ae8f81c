"""The gradient of WaveNet's layer as differentiable torch operations, for derivatives of second and higher order.

The kernels compute first derivatives. To differentiate those again, this module writes the same gradient with torch
operations and the dilated convolution (which can be differentiated again itself). It is used for nothing else.

With z, t = tanh(z[:G]), s = sigmoid(z[G:]), h = t s, and the gradient p of (residual_scale times residual, skip):

    gh = projection^T p,     gz = (gh s (1 - t^2), gh t s (1 - s)),     gx = backward of the convolution + residual part
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.convolution.dilated_conv1d import autograd as convolution


def layer_gradient(
    grad_residual: Tensor | None,  # (B, R, T)
    grad_skip: Tensor | None,  # (B, S, T)
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    condition: Tensor | None,
    condition_weight: Tensor | None,
    projection: Tensor,
    projection_bias: Tensor | None,
    state: Tensor | None,
    dilation: int,
    residual: bool,
    residual_scale: float,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of the eight tensors, shapes as in schema.py; None for those that are missing."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    settings = (dilation, 1, (weight.shape[2] - 1) * dilation, channels_last, backend)
    xs, taps = x.to(wide), weight.to(wide)
    before = None if state is None else state.to(wide)

    z = convolution.run(xs, taps, None, before, *settings)
    if condition is not None and condition_weight is not None:
        z = z + condition_weight.to(wide) @ condition.to(wide)
    if offset is not None:
        z = z + offset.to(wide)[..., None]
    filters, openings = z.chunk(2, dim=1)
    t, s = torch.tanh(filters), torch.sigmoid(openings)

    rows = x.shape[1] if residual else 0
    skips = projection.shape[0] - rows
    of_residual = None if grad_residual is None or not residual else residual_scale * grad_residual.to(wide)
    parts = [
        x.new_zeros(x.shape[0], size, x.shape[2], dtype=wide) if grad is None else grad.to(wide)
        for size, grad in ((rows, of_residual), (skips, grad_skip))
    ]
    p = torch.cat(parts, dim=1)  # (B, P, T)
    of_h = projection.to(wide).T @ p
    of_z = torch.cat([of_h * s * (1 - t * t), of_h * t * s * (1 - s)], dim=1)

    found: list[Tensor | None] = [None] * 8
    of_x, of_weight, _, of_state = convolution.run_backward(
        of_z, xs, taps, before, settings, (True, True, False, state is not None)
    )
    found[0] = of_x if of_residual is None else of_x + of_residual
    found[1] = of_weight
    if offset is not None:
        found[2] = of_z.sum(-1).sum_to_size(offset.shape)
    if condition is not None and condition_weight is not None:
        found[3] = condition_weight.to(wide).T @ of_z
        found[4] = torch.einsum("bzt,bat->za", of_z, condition.to(wide))
    found[5] = torch.einsum("bpt,bgt->pg", p, t * s)
    if projection_bias is not None:
        found[6] = p.sum((0, 2))
    if state is not None:
        found[7] = of_state
    return tuple(None if g is None else g.to(x.dtype) for g in found)
