"""WaveNet's layer, slowly: the formula in plain torch, a tap of the convolution after another."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_residual_layer(
    x: Tensor,  # (B, R, T)
    weight: Tensor,  # (2 G, R, K)
    offset: Tensor | None,  # (B or 1, 2 G)
    condition: Tensor | None,  # (B, A, T)
    condition_weight: Tensor | None,  # (2 G, A)
    projection: Tensor,  # (P, G)
    projection_bias: Tensor | None,  # (P,)
    state: Tensor | None,  # (B, R, left)
    dilation: int,
    residual: bool,
    residual_scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns (residual (B, R, T), or (B, 0, T) without; skip (B, P - R, T)) in x's dtype.

    z = convolution of x + condition_weight condition + offset, h = tanh(z[:G]) sigmoid(z[G:]); the rows of projection h
    are first those of the residual, which x is added to, then those of the skip output. Positions before the sequence
    (and its state) are not multiplied.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels, length = x.shape
    gates, _, taps = weight.shape
    xs = (x if state is None else torch.cat([state, x], dim=2)).to(wide)
    start = length - xs.shape[2]  # the position of xs[..., 0]

    z = torch.zeros(batch, gates, length, dtype=wide, device=x.device)
    for k in range(taps):
        shift = (k + 1 - taps) * dilation
        begin = max(0, start - shift)  # the first output whose input at this tap exists
        if begin < length:
            seen = xs[..., begin + shift - start : length + shift - start]
            z = z + torch.nn.functional.pad(weight[..., k].to(wide) @ seen, (begin, 0))
    if condition is not None and condition_weight is not None:
        z = z + condition_weight.to(wide) @ condition.to(wide)
    if offset is not None:
        z = z + offset.to(wide)[..., None]

    filters, openings = z.chunk(2, dim=1)
    h = torch.tanh(filters) * torch.sigmoid(openings)  # (B, G, T)
    out = projection.to(wide) @ h  # (B, P, T)
    if projection_bias is not None:
        out = out + projection_bias.to(wide)[:, None]
    rows = channels if residual else 0
    continued = residual_scale * (x.to(wide) + out[:, :rows]) if residual else out[:, :0]
    return continued.to(x.dtype), out[:, rows:].to(x.dtype)
