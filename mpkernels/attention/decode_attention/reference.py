"""Attention of few queries to many keys, slowly: the formula, in plain torch.

Scaled dot-product attention (Vaswani et al. 2017, "Attention is all you need", eq. 1) over the keys that a query sees:

    s_ij  = softcap tanh(scale q_i . k_j / softcap) + bias_ij      without softcap: scale q_i . k_j + bias_ij
    lse_i = log sum_j e^s_ij
    out_i = sum_j e^(s_ij - lse_i) v_j

A query that sees no key gives out 0 and lse -inf. Keys that are hidden are selected away, never multiplied with 0, so
that a NaN in them stays where it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.attention.attention.schema import HIDES


def decode_attention(
    query: Tensor,  # (B, H, L, E)
    key: Tensor,  # (B, G, S, E)
    value: Tensor,  # (B, G, S, F)
    first: Tensor | None,  # (B or 1, H or 1, L)
    last: Tensor | None,  # (B or 1, H or 1, L)
    mask: Tensor | None,  # broadcasts to (B, H, L, S)
    bias: Tensor | None,  # broadcasts to (B, H, L, S)
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Returns (out (B, H, L, F), lse (B, H, L)); half types are computed in float32."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    group = heads // max(key.shape[1], 1)
    key = key.to(wide).repeat_interleave(group, 1)  # (B, H, S, E)
    value = value.to(wide).repeat_interleave(group, 1)  # (B, H, S, F)

    scores = scale * (query.to(wide) @ key.transpose(-2, -1))  # (B, H, L, S)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        bias = bias.to(wide)
        scores = torch.where(bias <= HIDES, -math.inf, scores + bias)
    position = torch.arange(keys, device=query.device)
    if first is not None and last is not None:
        seen = (first[..., None] <= position) & (position < last[..., None])
        scores = torch.where(seen, scores, -math.inf)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf)

    hidden = scores == -math.inf
    lse = torch.logsumexp(scores, -1) if keys > 0 else scores.new_full((batch, heads, rows), -math.inf)
    weights = torch.where(hidden, 0.0, torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None]))
    out = [
        (weights[:, :, i, :, None] * torch.where(hidden[:, :, i, :, None], 0.0, value)).sum(-2) for i in range(rows)
    ]  # of each query (B, H, F)
    stacked = torch.stack(out, 2) if rows > 0 else value.new_zeros((batch, heads, 0, value.shape[-1]))
    return stacked.to(query.dtype), lse
