"""The gradient of the affine coupling as differentiable torch operations, for derivatives of higher order.

The kernels compute first derivatives; this module writes the same gradient with operations that autograd knows. With
m the factor e^l or e^-l, and v what it multiplies (x, x + t or x - t), y = v m (+- t), and g the gradient of y:

    dv = g m,    dl = +-(g v m + dL/dlog_abs_det),    draw = dl l'(raw)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.flows.affine_coupling import schema


def affine_gradient(
    grad_y: Tensor,
    grad_log_abs_det: Tensor,
    x: Tensor,
    raw: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    scale: int,
    clamp: float,
    epsilon: float,
    layout: int,
    pattern: int,
    parity: int,
    shift_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, raw, shift); None for those that are not given. Shapes as in schema.py."""
    wide = schema.wide(x)
    joint = layout != schema.SEPARATE
    if pattern == schema.CHANNEL:
        first = (x.shape[1] + 1) // 2
        g, v = (u[:, first:] if parity == 0 else u[:, :first] for u in (grad_y, x))
    else:
        g, v = grad_y, x
    s, t = _joint_parts(raw, layout) if joint and raw is not None else (raw, shift)
    assert t is not None
    kept = _kept(x, mask, pattern, parity)
    g, v, t = g.to(wide), _unless(kept, v.to(wide)), _unless(kept, t.to(wide))
    moved = _unless(kept, g)
    sign = -1.0 if inverse else 1.0
    if shift_first != inverse:
        v = v + sign * t
    if s is None:
        of_v, of_s = moved, None
    else:
        slope, factor, limited = _factor(_unless(kept, s.to(wide)), scale, clamp, epsilon, inverse)
        of_v = moved * factor
        through = torch.where(limited, 0.0, moved * v * factor)
        of_log = through + grad_log_abs_det.to(wide)[:, None, None, None]
        of_s = _unless(kept, sign * of_log * slope).to(x.dtype)
    of_t = _unless(kept, sign * (of_v if shift_first != inverse else moved)).to(x.dtype)
    of_x = (of_v if kept is None else torch.where(kept, g, of_v)).to(x.dtype)
    if pattern == schema.CHANNEL:
        first = (x.shape[1] + 1) // 2
        of_x = torch.cat([grad_y[:, :first], of_x] if parity == 0 else [of_x, grad_y[:, first:]], 1)
    if joint:
        assert of_s is not None
        return of_x, _joined(of_s, of_t, layout), None
    return of_x, of_s, of_t


def _unless(kept: Tensor | None, x: Tensor) -> Tensor:
    return x if kept is None else torch.where(kept, 0.0, x)


def _kept(x: Tensor, mask: Tensor | None, pattern: int, parity: int) -> Tensor | None:
    """Broadcasts to x; None where the formula is for all elements (with CHANNEL the others are sliced away)."""
    if pattern in (schema.NONE, schema.CHANNEL):
        return None
    if pattern == schema.TENSOR:
        return mask
    _, channels, height, width = x.shape
    if pattern == schema.ALTERNATING:
        return (torch.arange(channels, device=x.device) % 2 != parity)[:, None, None]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return (rows[:, None] + columns) % 2 != parity


def _joint_parts(h: Tensor, layout: int) -> tuple[Tensor, Tensor]:
    half = h.shape[1] // 2
    if layout in (schema.SHIFT_SCALE, schema.SCALE_SHIFT):
        first, second = h[:, :half], h[:, half:]
    else:
        first, second = h.unflatten(1, (half, 2)).unbind(2)
    return (first, second) if layout in (schema.SCALE_SHIFT, schema.SCALE_SHIFT_INTERLEAVED) else (second, first)


def _joined(s: Tensor, t: Tensor, layout: int) -> Tensor:
    both = (s, t) if layout in (schema.SCALE_SHIFT, schema.SCALE_SHIFT_INTERLEAVED) else (t, s)
    if layout in (schema.SHIFT_SCALE, schema.SCALE_SHIFT):
        return torch.cat(both, 1)
    return torch.stack(both, 2).flatten(1, 2)


def _factor(raw: Tensor, scale: int, clamp: float, epsilon: float, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(l'(raw), the factor, where it is limited)."""
    limit = 708.0 if raw.dtype == torch.float64 else 87.0
    if scale == schema.SIGMOID:
        u = raw + 2
        sigma = torch.sigmoid(u.clamp(-limit, limit))
        slope = torch.sigmoid(-u) if epsilon == 0 else sigma * (1 - sigma) / (sigma + epsilon)
        factor = 1 / (sigma + epsilon) if inverse else sigma + epsilon
        return slope, factor, (u > limit) | (u < -limit)
    if scale == schema.EXP:
        k, slope = raw, torch.ones_like(raw)
    elif scale == schema.TANH:
        tanh = torch.tanh(raw)
        k, slope = clamp * tanh, clamp * (1 - tanh * tanh)
    else:
        k, slope = clamp * 0.636 * torch.atan(raw), clamp * 0.636 / (1 + raw * raw)
    k = -k if inverse else k
    return slope, torch.exp(k.clamp(-limit, limit)), (k > limit) | (k < -limit)
