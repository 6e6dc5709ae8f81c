"""The depthwise convolution over time, slowly: the formula, tap by tap, in plain torch.

    y[b, c, t] = sum_k weight[c, k] xs[b, c, t - (K - 1 - k) dilation] + bias[c]

over the taps that read the same sequence (shapes in schema.py). What is left out is selected away twice, before the
product and behind it, so that neither the values nor the gradients of a NaN there are ever added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def depthwise_conv1d(
    x: Tensor,  # (B, C, T)
    weight: Tensor,  # (C, K)
    bias: Tensor | None,  # (C,)
    state: Tensor | None,  # (B, C, left)
    seq_idx: Tensor | None,  # (B, T)
    dilation: int,
    silu: bool,
) -> Tensor:
    """Returns out (B, C, T); half types are computed in float32."""
    batch, channels, length = x.shape
    taps = weight.shape[1]
    known = 0 if state is None else state.shape[2]
    xs = x if state is None else torch.cat([state, x], -1)
    wide = weight.dtype
    sequence = None
    if seq_idx is not None:
        sequence = torch.cat([seq_idx[:, :1].expand(batch, known if length > 0 else 0), seq_idx], -1)
    now = torch.arange(length, device=x.device)
    y = torch.zeros((batch, channels, length), dtype=wide, device=x.device)
    for k in range(taps):
        position = now - (taps - 1 - k) * dilation + known
        exists = position >= 0
        position = position.clamp(min=0)
        exists = exists.expand(batch, length)
        if seq_idx is not None and sequence is not None:
            exists = exists & (sequence[:, position] == seq_idx) & (seq_idx >= 0)
        exists = exists[:, None]  # (B, 1, T)
        value = torch.where(exists, xs[:, :, position].to(wide), 0.0)
        y = y + torch.where(exists, weight[:, k, None] * value, 0.0)
    if bias is not None:
        y = y + bias[:, None]
    if silu:
        y = functional.silu(y)
    if seq_idx is not None:
        y = torch.where(seq_idx[:, None] >= 0, y, 0.0)
    return y.to(x.dtype)


def depthwise_conv1d_update(
    x: Tensor,  # (B, C, T)
    state: Tensor,  # (N, C, S), written to
    weight: Tensor,  # (C, K)
    bias: Tensor | None,  # (C,)
    cache_seqlens: Tensor | None,  # (B,)
    state_indices: Tensor | None,  # (B,)
    dilation: int,
    silu: bool,
) -> Tensor:
    """Returns out (B, C, T), and moves ``state`` on by T positions."""
    batch, _, length = x.shape
    size, left = state.shape[2], (weight.shape[1] - 1) * dilation
    rows = torch.arange(batch, device=x.device) if state_indices is None else state_indices.to(torch.int64)
    kept = rows >= 0
    rows = rows[kept]
    starts = None if cache_seqlens is None else cache_seqlens.to(torch.int64)[kept]
    before = state[rows]  # (M, C, S)
    if starts is not None and size > 0:
        oldest_first = torch.remainder(starts[:, None] + torch.arange(size, device=x.device), size)
        before = before.gather(2, oldest_first[:, None].expand_as(before))
    joined = torch.cat([before, x[kept]], -1)
    out = torch.zeros_like(x)
    out[kept] = depthwise_conv1d(x[kept], weight, bias, before[:, :, size - left :], None, dilation, silu)
    after = joined[:, :, length:]  # (M, C, S)
    if starts is not None and size > 0:
        back = torch.remainder(torch.arange(size, device=x.device) - starts[:, None] - length, size)
        after = after.gather(2, back[:, None].expand_as(after))
    state[rows] = after
    return out
