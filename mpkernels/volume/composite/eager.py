"""Compositing as a training script writes it in plain torch: what ``bench`` compares with. Not used by any backend."""

from __future__ import annotations

import torch
from torch import Tensor


def composite(sigmas, values, t_starts, t_ends, packed_info=None, background=None, early_stop_eps=0.0):
    """The usual lines of a NeRF script: exp, a cumulative product, three weighted sums (packed: scatter sums)."""
    deltas = t_ends - t_starts
    midpoints = (t_starts + t_ends) / 2
    if packed_info is not None:
        return _composite_packed(sigmas * deltas, values, midpoints, packed_info, background)
    return _weigh(1 - torch.exp(-sigmas * deltas), values, midpoints, background)


def composite_from_alphas(alphas, values, ts, packed_info=None, background=None, early_stop_eps=0.0):
    """The same from opacities."""
    if packed_info is not None:
        return _composite_packed(-torch.log1p(-alphas), values, ts, packed_info, background)
    return _weigh(alphas, values, ts, background)


def _weigh(alphas: Tensor, values: Tensor, positions: Tensor, background: Tensor | None):
    ones = torch.ones_like(alphas[..., :1])
    transmittance = torch.cumprod(torch.cat([ones, 1 - alphas[..., :-1]], dim=-1), dim=-1)
    weights = transmittance * alphas
    opacity = weights.sum(-1)
    out = (weights[..., None] * values).sum(-2)
    if background is not None:
        out = out + (1 - opacity)[..., None] * background
    return out, opacity, (weights * positions).sum(-1), weights


def _composite_packed(optical_depths, values, positions, packed_info, background):
    """Rays one after another without gaps, as samplers pack them."""
    starts, counts = packed_info.unbind(-1)
    rays = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)
    before = torch.cumsum(optical_depths, 0) - optical_depths
    first = before[starts.clamp(max=before.shape[0] - 1)] if before.shape[0] else before.new_zeros(counts.shape)
    weights = torch.exp(first[rays] - before) * (1 - torch.exp(-optical_depths))
    zeros = weights.new_zeros(counts.shape[0])
    opacity = zeros.index_add(0, rays, weights)
    out = weights.new_zeros(counts.shape[0], values.shape[-1]).index_add(0, rays, weights[:, None] * values)
    if background is not None:
        out = out + (1 - opacity)[:, None] * background
    return out, opacity, zeros.index_add(0, rays, weights * positions), weights
