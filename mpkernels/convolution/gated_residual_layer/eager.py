"""WaveNet's layer as a user writes it in plain torch: what ``bench`` compares with. Not used by any backend."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_residual_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    condition: Tensor | None = None,
    condition_weight: Tensor | None = None,
    global_condition: Tensor | None = None,
    global_weight: Tensor | None = None,
    dilation: int = 1,
    residual_scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, ...]:
    """(residual, skip, state), the first two empty where they are not asked for."""
    functional = torch.nn.functional
    left = (weight.shape[2] - 1) * dilation
    padded = functional.pad(x, (left, 0)) if initial_state is None else torch.cat([initial_state, x], dim=2)
    z = functional.conv1d(padded, weight, bias, dilation=dilation)
    if condition is not None and condition_weight is not None:
        z = z + functional.conv1d(condition, condition_weight[..., None])
    if global_condition is not None and global_weight is not None:
        z = z + functional.linear(global_condition, global_weight)[..., None]
    filters, gates = z.chunk(2, dim=1)
    h = torch.tanh(filters) * torch.sigmoid(gates)
    residual = skip = x.new_empty((x.shape[0], 0, x.shape[2]))
    if residual_weight is not None:
        residual = (x + functional.conv1d(h, residual_weight[..., None], residual_bias)) * residual_scale
    if skip_weight is not None:
        skip = functional.conv1d(h, skip_weight[..., None], skip_bias)
    return (residual, skip, padded[:, :, padded.shape[2] - left :]) if return_state else (residual, skip)
