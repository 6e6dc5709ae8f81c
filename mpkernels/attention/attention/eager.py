"""Attention as a user writes it in plain torch: what ``bench`` compares with. Not used by any backend."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mpkernels import masks
from mpkernels.attention.attention import dropout


@functools.lru_cache(maxsize=1)
def _kept_mask(mask: masks.Mask, rows: int, keys: int, device: torch.device) -> Tensor:
    """A mask that a training script would build once, as bool."""
    return masks.to_dense(mask, (rows, keys), device).contiguous()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask=None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    seed: int = 0,
    return_lse: bool = True,
) -> tuple[Tensor, ...]:
    """Torch's function where it returns what is asked for, else the usual lines with the scores stored."""
    if not return_lse and visible is None and softcap is None and dropout_p == 0:
        causal = mask == masks.causal()
        seen: Tensor | None = mask if isinstance(mask, Tensor) else None
        if isinstance(mask, masks.Mask) and not causal:
            seen = _kept_mask(mask, query.shape[-2], key.shape[-2], query.device)
        if bias is not None:
            seen = bias if seen is None else torch.where(seen, bias, -torch.inf)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=enable_gqa
        )
        return (out,)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    for x in (mask, visible):
        if x is not None:
            scores = scores.masked_fill(~masks.to_dense(x, scores.shape, scores.device), -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    if dropout_p > 0:
        number = torch.tensor(seed, device=query.device)
        stays = dropout.kept(number, dropout_p, math.prod(scores.shape[:-3]), *scores.shape[-3:]).view(scores.shape)
        weights = weights * stays / (1 - dropout_p)
    return weights @ value, torch.logsumexp(scores, dim=-1)
