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
    length, taps, wide = x.shape[2], weight.shape[1], weight.dtype
    now = torch.arange(length, device=x.device)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for k in range(taps):
        shift = (taps - 1 - k) * dilation
        if state is None and shift >= length:
            continue  # nothing is so far back
        past = x.new_zeros((*x.shape[:2], shift)) if state is None else state[:, :, state.shape[2] - shift :]
        value = torch.cat([past, x], -1)[:, :, :length].to(wide)  # (B, C, T) what each output reads
        exists = ((now >= shift) | (state is not None))[None, None]  # (1, 1, T)
        if seq_idx is not None and length > 0:
            owner = torch.cat([seq_idx[:, :1].expand(-1, shift), seq_idx], -1)[:, :length]
            exists = exists & ((owner == seq_idx) & (seq_idx >= 0))[:, None]  # (B, 1, T)
        value = torch.where(exists, value, 0.0)
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
