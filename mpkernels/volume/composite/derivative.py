"""The gradient of compositing as differentiable torch operations, for derivatives of second and higher order.

The kernels compute first derivatives. To differentiate those again, this module writes the same gradient with torch
operations that autograd knows: all samples at once, prefix products and sums by doubling (log2 S steps), and no
division anywhere, so that it holds at alpha = 1. It is slower than the kernels and is used for nothing else.

With G_i = dL/dw_i taken with the other weights fixed, and the linear recurrence behind sample i

    B_i = alpha_{i+1} G_{i+1} + (1 - alpha_{i+1}) B_{i+1},     B_last = 0,

    dL/dalpha_i = T_i (G_i - B_i)         dL/d(sigma_i delta_i) = T_i (1 - alpha_i) (G_i - B_i).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _shift(x: Tensor, by: int, fill: float) -> Tensor:
    """Moves the last dimension towards higher indices (``by`` > 0) or lower ones, filling what comes in."""
    length = x.shape[-1]
    edge = torch.full_like(x[..., : min(abs(by), length)], fill)
    if by > 0:
        return torch.cat([edge, x[..., : max(length - by, 0)]], dim=-1)
    return torch.cat([x[..., min(-by, length) :], edge], dim=-1)


def exclusive_product(x: Tensor) -> Tensor:
    """prod_{j<i} x_j along the last dimension."""
    product = _shift(x, 1, 1.0)
    step = 1
    while step < x.shape[-1]:
        product = product * _shift(product, step, 1.0)
        step *= 2
    return product


def behind(alpha: Tensor, passed: Tensor, gains: Tensor) -> Tensor:
    """B_i = alpha_{i+1} G_{i+1} + passed_{i+1} B_{i+1} along the last dimension."""
    factor, offset = _shift(passed, -1, 1.0), _shift(alpha * gains, -1, 0.0)
    step = 1
    while step < alpha.shape[-1]:
        offset = offset + factor * _shift(offset, -step, 0.0)
        factor = factor * _shift(factor, -step, 1.0)
        step *= 2
    return offset


def composite_gradient(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], early_stop_eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of (densities, values, t_starts, t_ends, background); None for those that are not given.

    Args:
        gradients: of (values, opacity, depth, weights), None for zeros.
        inputs: (densities, values, t_starts, t_ends, packed_info, background), shapes as in schema.py.
        early_stop_eps: as in the op.
    """
    grad_values, grad_opacity, grad_depth, grad_weights = gradients
    densities, values, t_starts, t_ends, packed_info, background = inputs
    assert densities is not None
    assert values is not None
    assert t_starts is not None
    if packed_info is not None:
        inside, index = _padding(packed_info)

        def pad(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            mask = inside.reshape(inside.shape + (1,) * (x.dim() - 1))
            return (
                torch.where(mask, x[index], x.new_zeros(())) if x.shape[0] else x.new_zeros(index.shape + x.shape[1:])
            )

        samples = (densities, values, t_starts, t_ends)
        padded = composite_gradient(
            (grad_values, grad_opacity, grad_depth, pad(grad_weights)),
            (*(pad(x) for x in samples), None, background),
            early_stop_eps,
        )
        packed = [
            None if x is None or like is None else torch.zeros_like(like).index_put((index[inside],), x[inside])
            for x, like in zip(padded[:4], samples, strict=True)
        ]
        return (*packed, padded[4])

    def forward_parts(densities: Tensor, t_starts: Tensor, t_ends: Tensor | None):
        if t_ends is None:
            return densities, densities, 1 - densities, None
        finite = densities.clamp(max=torch.finfo(densities.dtype).max)
        delta = t_ends - t_starts
        return finite, -torch.expm1(-finite * delta), torch.exp(-finite * delta), delta

    alive = None
    if early_stop_eps > 0:
        with torch.no_grad():
            # a NaN makes every later transmittance NaN, which is not >= eps: what lies behind is dead
            passed = forward_parts(densities, t_starts, t_ends)[2]
            dead = ~(exclusive_product(passed) >= early_stop_eps)
            alive = dead.cumsum(-1) == 0
        densities, t_starts = (torch.where(alive, x, torch.zeros_like(x)) for x in (densities, t_starts))
        t_ends = None if t_ends is None else torch.where(alive, t_ends, torch.zeros_like(t_ends))
        values = torch.where(alive[..., None], values, torch.zeros_like(values))
        if grad_weights is not None:
            grad_weights = torch.where(alive, grad_weights, torch.zeros_like(grad_weights))

    finite, alpha, passed, delta = forward_parts(densities, t_starts, t_ends)
    position = t_starts if t_ends is None else (t_starts + t_ends) / 2
    transmittance = exclusive_product(passed)
    weights = transmittance * alpha

    gains = torch.zeros_like(densities)
    grad_background = None
    if grad_values is not None:
        gains = gains + (values * grad_values[..., None, :]).sum(-1)
        if background is not None:
            gains = gains - (grad_values * background).sum(-1, keepdim=True)
            grad_background = (1 - weights.sum(-1))[..., None] * grad_values
    if grad_opacity is not None:
        gains = gains + grad_opacity[..., None]
    if grad_depth is not None:
        gains = gains + grad_depth[..., None] * position
    if grad_weights is not None:
        gains = gains + grad_weights

    difference = transmittance * (gains - behind(alpha, passed, gains))
    grad_position = torch.zeros_like(weights) if grad_depth is None else weights * grad_depth[..., None]
    grad_samples = torch.zeros_like(values) if grad_values is None else weights[..., None] * grad_values[..., None, :]
    if background is not None and grad_background is None:
        grad_background = torch.zeros_like(background)
    if delta is None:
        found = difference, grad_samples, grad_position, None, grad_background
    else:
        grad_optical_depth = passed * difference
        along = finite * grad_optical_depth
        found = (
            delta * grad_optical_depth,
            grad_samples,
            grad_position / 2 - along,
            grad_position / 2 + along,
            grad_background,
        )
    if alive is None:
        return found
    mask = (alive, alive[..., None], alive, alive)
    masked = [
        None if x is None else torch.where(m, x, torch.zeros_like(x)) for x, m in zip(found[:4], mask, strict=True)
    ]
    return (*masked, found[4])


def _padding(packed_info: Tensor) -> tuple[Tensor, Tensor]:
    starts, counts = packed_info.unbind(-1)
    longest = int(counts.max()) if counts.numel() else 0
    steps = torch.arange(longest, device=packed_info.device)
    inside = steps < counts[:, None]
    return inside, torch.where(inside, starts[:, None] + steps, torch.zeros_like(steps))
