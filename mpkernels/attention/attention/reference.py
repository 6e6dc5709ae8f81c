"""Attention, slowly: the formula in plain torch, differentiated by autograd.

Scaled dot-product attention (Vaswani et al. 2017, "Attention is all you need", eq. 1) over the keys that a query sees:

    s_ij  = scale q_i . k_j                      softcap tanh(s_ij / softcap), where one is given; then + bias_ij,
                                                 which hides where it is -1e30 or less
    lse_i = log sum_{j visible} exp(s_ij)
    w_ij  = exp(s_ij - lse_i)                    dropped, or divided by 1 - dropout_p
    out_i = sum_{j visible} w_ij v_j

A key that is hidden from a query must not touch it, whatever it holds: 0 times NaN is NaN, also in the products of the
gradient. So where anything is hidden, products are written out for every pair (query, key), with zeros in place of the
keys and values of hidden pairs; what a select does not take gets no gradient, not even from a NaN. That takes L S E
numbers: this is for small tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.attention.attention import dropout, schema


def attention(
    query: Tensor,  # (B, H, L, E)
    key: Tensor,  # (B, G, S, E)
    value: Tensor,  # (B, G, S, F)
    first: Tensor | None,  # (B or 1, H or 1, L)
    last: Tensor | None,
    mask: Tensor | None,  # broadcasts to (B, H, L, S)
    bias: Tensor | None,  # broadcasts to (B, H, L, S)
    seed: Tensor | None,  # ()
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, H, L, F) in the dtype of the input and lse (B, H, L) in float32 (float64 for float64)."""
    dtype = query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    group = heads // key.shape[1]
    query = query.to(wide)
    key = key.to(wide).repeat_interleave(group, dim=1)  # (B, H, S, E)
    value = value.to(wide).repeat_interleave(group, dim=1)

    visible = None
    if first is not None and last is not None:
        j = torch.arange(keys, device=query.device)
        visible = (first[..., None] <= j) & (j < last[..., None])
    if mask is not None:
        visible = mask if visible is None else visible & mask

    if bias is not None:
        shown = ~(bias <= schema.HIDES)
        visible = shown if visible is None else visible & shown

    if visible is None:
        scores = scale * (query @ key.transpose(-1, -2))
    else:
        scores = scale * (query[:, :, :, None] * _select(visible, key[:, :, None])).sum(-1)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)

    # a constant that is taken off every score of a row changes no weight: its gradient is not needed
    largest = torch.nn.functional.pad(scores.detach(), (0, 1), value=-torch.inf).amax(-1)
    empty = largest == -torch.inf
    shift = torch.where(empty, 0.0, largest)
    exponentials = torch.where(empty[..., None], 0.0, torch.exp(scores - shift[..., None]))
    total = torch.where(empty, 1.0, exponentials.sum(-1))
    lse = torch.where(empty, -torch.inf, shift + torch.log(total))
    weights = exponentials / total[..., None]

    if seed is not None and dropout_p > 0:
        stays = dropout.kept(seed, dropout_p, batch, heads, rows, keys)
        weights = torch.where(stays, weights / max(1 - dropout_p, torch.finfo(wide).tiny), 0.0)
    if visible is None:
        out = weights @ value
    else:
        out = (weights[..., None] * _select(visible, value[:, :, None])).sum(-2)
    return out.to(dtype), lse


def _select(visible: Tensor, x: Tensor) -> Tensor:
    """``x`` for every pair (..., L, S, E) that is visible, zeros for the others."""
    return torch.where(visible[..., None], x, 0.0)
