"""Schemas and fake functions of the spline coupling. Imports torch (and the namespaces) alone.

Shapes, with B samples of C channels of S positions, K bins and P = 3 K - 1 parameters an element:

==================  ====================  =============================================================================
argument            shape                 meaning
==================  ====================  =============================================================================
x                   (B, C, S)
parameters          (B, C, S, P)          K of the widths, K of the heights, K - 1 of the inner derivatives, as in
                                          nflows; of the dtype of x
low                 (B, C, S) or None     what rounding x to its dtype lost: x + low is transformed
tail_bound          float > 0             the spline maps [-tail_bound, tail_bound] to itself; outside y = x
min_bin_width       float, 0 < K m < 1    of the interval scaled to length 1; min_bin_height likewise
min_derivative      float, 0 < m < 1
inverse             bool                  x from y
return_low          bool                  whether to return what rounding y to its dtype loses
parameters_first    bool                  memory order of the gradient of parameters: (B, C, P, S), not (B, C, S, P)
==================  ====================  =============================================================================

Monotone rational-quadratic spline (Durkan et al. 2019, eqs. 4 to 8, and appendix A.2 and A.3), linear tails:

    widths w_k = 2 tail_bound (m + (1 - K m) softmax(parameters[:K])_k), knots x_0 = -tail_bound, x_k+1 = x_k + w_k,
    x_K = tail_bound exactly; heights h_k and knots y_k likewise from the next K; d_k = min_derivative +
    softplus(parameters[2 K + k - 1]) for k = 1 .. K - 1, d_0 = d_K = 1
    k = number of inner knots <= x (on a knot: the bin on its right; x = tail_bound: the last bin), a = (x - x_k) / w_k
    s = h_k / w_k,  q = s + (d_k+1 + d_k - 2 s) a (1 - a)
    y = y_k + h_k (s a^2 + d_k a (1 - a)) / q
    f'(x) = s^2 (d_k+1 a^2 + 2 s a (1 - a) + d_k (1 - a)^2) / q^2
    log_abs_det[b] = sum of log f', or of -log f' for the inverse, over the elements inside

Outside the interval, and where x is NaN, y = x with log f' = 0; parameters there are not used, and get gradient 0.

Numerics, for inputs of float32 and the half types: the exponentials of softmax, and softplus, in float32; from their
sums on in float64 (a softmax that adds up to 1 in float32 alone could leave nothing of the last bin where min_bin_width
is tiny), w_k and h_k being differences of knots; forward and inverse have the very same knots. Slopes down to 1e-7
occur, where rounding y to float32 alone moves x by more than 0.1: y + low keeps it. The discriminant of the inverse is
limited to >= 0. y is the exact result rounded, low what that lost, rounded.

All tensors may have any strides; fast paths: parameters contiguous in P (a linear layer), or in S (a convolution).
y, log_abs_det, low and grad_x are contiguous. log_abs_det is float32 (float64 for float64), summed in a fixed order.
low is () -> shape (0,) where it is not asked for. Gradients: low is a constant.

Backward returns the gradients of x and parameters; one that is not needed has shape (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

FORWARD = "spline_coupling"
BACKWARD = "spline_coupling_backward"


def wide(x: Tensor) -> torch.dtype:
    """The dtype of log-determinants."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def new_parameters(like: Tensor, parameters_first: bool) -> Tensor:
    """An empty tensor in the shape of ``like``, (B, C, S, P), in the memory order asked for."""
    batch, channels, positions, number = like.shape
    if parameters_first:
        return like.new_empty((batch, channels, number, positions)).transpose(2, 3)
    return like.new_empty(like.shape)


def _fake_forward(
    x,
    parameters,
    low,
    tail_bound,
    min_bin_width,
    min_bin_height,
    min_derivative,
    inverse,
    return_low,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty((x.shape[0],), dtype=wide(x)),
        x.new_empty(x.shape if return_low else (0,)),
    )


def _fake_backward(
    grad_y,
    grad_log_abs_det,
    x,
    parameters,
    low,
    tail_bound,
    min_bin_width,
    min_bin_height,
    min_derivative,
    inverse,
    parameters_first,
    needs_x,
    needs_parameters,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        new_parameters(parameters, parameters_first) if needs_parameters else x.new_empty((0,)),
    )


library.define(
    f"{FORWARD}(Tensor x, Tensor parameters, Tensor? low, float tail_bound, float min_bin_width, float min_bin_height, "
    "float min_derivative, bool inverse, bool return_low) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
library.define(
    f"{BACKWARD}(Tensor grad_y, Tensor grad_log_abs_det, Tensor x, Tensor parameters, Tensor? low, float tail_bound, "
    "float min_bin_width, float min_bin_height, float min_derivative, bool inverse, bool parameters_first, "
    "bool needs_x, bool needs_parameters) -> (Tensor, Tensor)",
    _fake_backward,
)
