"""Volume compositing, slowly: one sample after another, differentiated by autograd.

Emission-absorption rendering (Max 1995, "Optical models for direct volume rendering"; Mildenhall et al. 2020,
"NeRF", eq. 3), written in the order of the formula:

    alpha_i = 1 - exp(-sigma_i delta_i)               delta_i = t_end_i - t_start_i
    T_i     = prod_{j<i} (1 - alpha_j)                transmittance in front of sample i
    w_i     = T_i alpha_i
    value   = sum_i w_i c_i + (1 - sum_i w_i) background
    depth   = sum_i w_i (t_start_i + t_end_i) / 2

A ray stops in front of the first sample with T_i < early_stop_eps: samples behind have weight 0, whatever they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor


def composite(
    densities: Tensor,  # (..., S) sigma, or alpha where t_ends is None; packed: (N,)
    values: Tensor,  # (..., S, C); packed: (N, C)
    t_starts: Tensor,  # (..., S) interval starts, or sample positions where t_ends is None; packed: (N,)
    t_ends: Tensor | None,  # (..., S); packed: (N,)
    packed_info: Tensor | None,  # (R, 2) [start, count]
    background: Tensor | None,  # broadcasts to (..., C)
    early_stop_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (values (..., C), opacity (...), depth (...), weights (..., S) or (N,)), in the dtype of the input."""
    if packed_info is not None:
        return _composite_packed(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps)

    transmittance = torch.ones(densities.shape[:-1], dtype=densities.dtype, device=densities.device)
    alive = torch.ones_like(transmittance, dtype=torch.bool)
    value = values.new_zeros(values.shape[:-2] + values.shape[-1:])
    opacity = torch.zeros_like(transmittance)
    depth = torch.zeros_like(transmittance)
    weights = []

    ends = [None] * densities.shape[-1] if t_ends is None else t_ends.unbind(-1)
    for density, color, start, end in zip(
        densities.unbind(-1), values.unbind(-2), t_starts.unbind(-1), ends, strict=True
    ):
        if early_stop_eps > 0:
            alive = alive & (transmittance >= early_stop_eps)
        density, start = _where_alive(alive, density), _where_alive(alive, start)
        color = _where_alive(alive[..., None], color)
        if end is None:
            alpha, passed, position = density, 1 - density, start
        else:
            end = _where_alive(alive, end)
            # an infinite density counts as the largest finite one: it absorbs nothing over an empty interval
            optical_depth = density.clamp(max=torch.finfo(density.dtype).max) * (end - start)
            alpha, passed, position = -torch.expm1(-optical_depth), torch.exp(-optical_depth), (start + end) / 2

        weight = transmittance * alpha
        weights.append(weight)
        value = value + weight[..., None] * color
        opacity = opacity + weight
        depth = depth + weight * position
        transmittance = transmittance * passed

    if background is not None:
        value = value + (1 - opacity)[..., None] * background
    return value, opacity, depth, torch.stack(weights, dim=-1) if weights else torch.zeros_like(densities)


def _where_alive(alive: Tensor, x: Tensor) -> Tensor:
    return torch.where(alive, x, torch.zeros_like(x))


def _composite_packed(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps):
    """Pads the rays to one length with empty samples, composites them densely, takes the weights back."""
    starts, counts = packed_info.unbind(-1)
    longest = int(counts.max()) if counts.numel() else 0
    steps = torch.arange(longest, device=densities.device)
    inside = steps < counts[:, None]  # (R, longest)
    index = torch.where(inside, starts[:, None] + steps, torch.zeros_like(steps))

    def pad(x: Tensor) -> Tensor:  # (N, ...) -> (R, longest, ...)
        if not longest:
            return x.new_zeros(index.shape + x.shape[1:])
        mask = inside.reshape(inside.shape + (1,) * (x.dim() - 1))
        return torch.where(mask, x[index], torch.zeros((), dtype=x.dtype, device=x.device))

    value, opacity, depth, padded = composite(
        pad(densities),
        pad(values),
        pad(t_starts),
        None if t_ends is None else pad(t_ends),
        None,
        background,
        early_stop_eps,
    )
    weights = torch.zeros_like(densities).index_put((index[inside],), padded[inside])
    return value, opacity, depth, weights
