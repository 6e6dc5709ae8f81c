"""The gradient of the spline coupling as differentiable torch operations, for derivatives of higher order.

The kernels compute first derivatives; this module writes the same gradient with operations that autograd knows. With
the bin's b = a (1 - a), t = d_0 + d_1 - 2 s, q = s + t b, n = s a^2 + d_0 b, m = d_1 a^2 + 2 s b + d_0 (1 - a)^2:

    y = y_k + h n / q,  log f' = 2 log s + log m - 2 log q,

and for gradients g of y and l of log f' the derivatives by a and s (then by the bin's edges), d_0 and d_1 are sums of
two terms. The inverse is differentiated implicitly: with r = (g - l d(log f')/dx) / f' the gradient of its input is r,
and those of the parameters are the forward ones for -r and -l (here l is the gradient of -log f').
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mpkernels.flows.spline_coupling.schema import wide


def spline_gradient(
    grad_y: Tensor,  # (B, C, S)
    grad_log_abs_det: Tensor,  # (B,)
    x: Tensor,
    parameters: Tensor,  # (B, C, S, 3 K - 1)
    low: Tensor | None,
    tail_bound: float,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of (x, parameters)."""
    value = x.double() if low is None else x.double() + low.double()
    inside = value.abs() <= tail_bound
    value = torch.where(inside, value, 0.0)
    raw = torch.where(inside[..., None], parameters, 0.0).to(wide(x))
    bins = (parameters.shape[-1] + 1) // 3
    to_x = _Axis(raw[..., :bins], tail_bound, min_bin_width)
    to_y = _Axis(raw[..., bins : 2 * bins], tail_bound, min_bin_height)
    g = torch.where(inside, grad_y, 0.0).double()
    g_log = grad_log_abs_det.double()[:, None, None].expand(g.shape)

    k = ((to_y if inverse else to_x).starts[..., 1:] <= value[..., None]).sum(-1, keepdim=True)
    at = torch.arange(bins, device=x.device) == k  # (B, C, S, K)
    x_k, w = to_x.bin(at)
    y_k, h = to_y.bin(at)
    slopes = functional.pad(raw[..., 2 * bins :], (1, 1)).double()
    d_0 = torch.where(k[..., 0] == 0, 1.0, min_derivative + functional.softplus(_chosen(at, slopes[..., :-1])))
    d_1 = torch.where(k[..., 0] == bins - 1, 1.0, min_derivative + functional.softplus(_chosen(at, slopes[..., 1:])))

    s = h / w
    t = d_0 + d_1 - 2 * s
    if inverse:
        rest = value - y_k
        of_a = h * d_0 - rest * t
        of_a2 = h * s - of_a
        constant = s * rest
        root = (of_a * of_a + 4 * of_a2 * constant).clamp(min=0).sqrt()
        a = torch.where(of_a >= 0, 2 * constant, root - of_a) / torch.where(of_a >= 0, of_a + root, 2 * of_a2)
    else:
        a = (value - x_k) / w
    b = a * (1 - a)
    q = s + t * b
    n = s * a * a + d_0 * b
    m = d_1 * a * a + 2 * s * b + d_0 * (1 - a) * (1 - a)

    log_by_a = 2 * (d_1 * a + s * (1 - 2 * a) - d_0 * (1 - a)) / m - 2 * t * (1 - 2 * a) / q
    slope = s * s * m / (q * q)
    if inverse:
        of_x = (g - g_log * log_by_a / w) / slope
        g, g_log = -of_x, -g_log
        of_a = g * slope * w + g_log * log_by_a
    else:
        of_a = g * slope * w + g_log * log_by_a
        of_x = of_a / w
    of_s = g * h * (a * a * q - n * (1 - 2 * b)) / (q * q) + g_log * (2 / s + 2 * b / m - 2 * (1 - 2 * b) / q)
    of_d_0 = g * h * b * (q - n) / (q * q) + g_log * ((1 - a) * (1 - a) / m - 2 * b / q)
    of_d_1 = -g * h * b * n / (q * q) + g_log * (a * a / m - 2 * b / q)

    left = at & (torch.arange(bins, device=x.device) > 0)  # d_0 and d_K are no parameters
    right = at & (torch.arange(bins, device=x.device) < bins - 1)
    of_slopes = (
        torch.where(left, of_d_0[..., None], 0.0)[..., 1:] + torch.where(right, of_d_1[..., None], 0.0)[..., :-1]
    )
    of_raw = torch.cat(
        [
            to_x.gradient(k, at, -of_a / w, -(of_a * a + of_s * s) / w),
            to_y.gradient(k, at, g, g * n / q + of_s / w),
            of_slopes * torch.sigmoid(raw[..., 2 * bins :]).double(),
        ],
        -1,
    )
    return (
        torch.where(inside, of_x.to(x.dtype), grad_y),
        torch.where(inside[..., None], of_raw, 0.0).to(parameters.dtype),
    )


def _chosen(at: Tensor, table: Tensor) -> Tensor:
    """The entry of each row where ``at`` is True; the others are not multiplied."""
    return torch.where(at, table, 0.0).sum(-1)


class _Axis:
    """The bins of x, or of y, and the way back to the numbers that made them."""

    def __init__(self, raw: Tensor, tail_bound: float, smallest: float) -> None:
        self.share = torch.softmax(raw, -1).double()
        self.share = self.share / self.share.sum(-1, keepdim=True)
        self.scale = 2 * tail_bound * (1 - raw.shape[-1] * smallest)
        self.sizes = 2 * tail_bound * smallest + self.scale * self.share
        self.starts = self.sizes.cumsum(-1) - self.sizes - tail_bound

    def bin(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return _chosen(at, self.starts), _chosen(at, self.sizes)

    def gradient(self, k: Tensor, at: Tensor, of_start: Tensor, of_size: Tensor) -> Tensor:
        """Of the numbers before softmax: a bin starts behind the sizes of those before it."""
        below = torch.arange(self.share.shape[-1], device=at.device) < k
        of_sizes = torch.where(below, of_start[..., None], torch.where(at, of_size[..., None], 0.0))
        mean = (self.share * of_sizes).sum(-1, keepdim=True)
        return self.scale * self.share * (of_sizes - mean)
