"""The spline coupling, slowly: the formula in plain torch, as schema.py has it, differentiable by autograd.

Outside the interval everything is replaced before it is used, by a 0 and by parameters of 0, so that neither a value
nor a gradient of what does not count is ever multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mpkernels.flows.spline_coupling.schema import wide


def spline_coupling(
    x: Tensor,  # (B, C, S)
    parameters: Tensor,  # (B, C, S, 3 K - 1)
    low: Tensor | None,  # (B, C, S)
    tail_bound: float,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, C, S), log_abs_det (B,) and what rounding y lost (B, C, S)."""
    value = x.double() if low is None else x.double() + low.detach().double()
    inside = (value >= -tail_bound) & (value <= tail_bound)
    value = torch.where(inside, value, 0.0)
    raw = torch.where(inside[..., None], parameters.to(wide(x)), 0.0)
    bins = (parameters.shape[-1] + 1) // 3

    knots_x = _knots(raw[..., :bins], tail_bound, min_bin_width)
    knots_y = _knots(raw[..., bins : 2 * bins], tail_bound, min_bin_height)
    of_input = knots_y if inverse else knots_x
    k = (of_input[..., 1:-1] <= value[..., None]).sum(-1, keepdim=True)

    def pick(table: Tensor, index: Tensor) -> Tensor:
        return table.gather(-1, index)[..., 0]

    x_k, w = pick(knots_x, k), pick(knots_x, k + 1) - pick(knots_x, k)
    y_k, h = pick(knots_y, k), pick(knots_y, k + 1) - pick(knots_y, k)
    slopes = functional.pad(raw[..., 2 * bins :], (1, 1))
    d_0 = min_derivative + functional.softplus(pick(slopes, k)).double()
    d_1 = min_derivative + functional.softplus(pick(slopes, k + 1)).double()
    d_0 = torch.where(k[..., 0] == 0, 1.0, d_0)
    d_1 = torch.where(k[..., 0] == bins - 1, 1.0, d_1)

    s = h / w
    t = d_1 + d_0 - 2 * s
    if inverse:  # the root in [0, 1] of A a^2 + B a - C = 0, in the form that does not cancel
        of_a2 = h * (s - d_0) + (value - y_k) * t
        of_a = h * d_0 - (value - y_k) * t
        constant = s * (value - y_k)
        root = (of_a.square() + 4 * of_a2 * constant).clamp(min=0).sqrt()
        above = torch.where(of_a >= 0, 2 * constant, root - of_a)
        a = above / torch.where(of_a >= 0, of_a + root, 2 * of_a2)
        y = x_k + w * a
    else:
        a = (value - x_k) / w
        y = y_k + h * (s * a.square() + d_0 * a * (1 - a)) / (s + t * a * (1 - a))
    q = s + t * a * (1 - a)
    numerator = d_1 * a.square() + 2 * s * a * (1 - a) + d_0 * (1 - a).square()
    log_slope = torch.log(s.square() * numerator / q.square())
    log_slope = torch.where(inside, -log_slope if inverse else log_slope, 0.0)

    rounded = torch.where(inside, y.to(x.dtype), x)
    kept = torch.zeros_like(x) if low is None else low
    lost = torch.where(inside, (y - rounded.double()).to(x.dtype), kept).detach()
    return rounded, log_slope.flatten(1).sum(1).to(wide(x)), lost


def _knots(raw: Tensor, tail_bound: float, smallest: float) -> Tensor:
    """The K + 1 knots of K bins, in float64."""
    bins = raw.shape[-1]
    share = torch.softmax(raw, -1).double()
    share = share / share.sum(-1, keepdim=True)  # (what float32 rounded must not shorten the last bin)
    sizes = 2 * tail_bound * (smallest + (1 - bins * smallest) * share)
    inner = sizes[..., :-1].cumsum(-1) - tail_bound
    return torch.cat(
        [torch.full_like(inner[..., :1], -tail_bound), inner, torch.full_like(inner[..., :1], tail_bound)], -1
    )
