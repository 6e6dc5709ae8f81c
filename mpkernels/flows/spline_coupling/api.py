"""The public function of the spline coupling: checks its input and chooses a backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.flows.spline_coupling import autograd, reference, schema


@overload
def spline_coupling(
    x: Tensor,
    parameters: Tensor,
    *,
    tail_bound: float = 3.0,
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameters_dim: int = -1,
    low: Tensor | None = None,
    return_low: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def spline_coupling(
    x: Tensor,
    parameters: Tensor,
    *,
    tail_bound: float = 3.0,
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameters_dim: int = -1,
    low: Tensor | None = None,
    return_low: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def spline_coupling(
    x: Tensor,
    parameters: Tensor,
    *,
    tail_bound: float = 3.0,
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameters_dim: int = -1,
    low: Tensor | None = None,
    return_low: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]: ...


def spline_coupling(
    x: Tensor,
    parameters: Tensor,
    *,
    tail_bound: float = 3.0,
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameters_dim: int = -1,
    low: Tensor | None = None,
    return_low: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Monotone rational-quadratic spline of each element, with linear tails, and log|det| of its Jacobian.

    Durkan et al. 2019, "Neural Spline Flows", eqs. 4 to 8: K bins from -tail_bound to tail_bound, whose widths,
    heights and slopes at the inner knots come from a network; in front of and behind the interval y = x. The
    parameters are nflows', in its order. Gradients of any order to ``x`` and ``parameters``, the same bits in every
    run; a kept element (outside, or NaN) neither reads its parameters nor gives them a gradient. A NaN in the
    parameters of an element inside is a NaN of that element (and in its log_abs_det).

    The round trip. A spline may be as flat as 1e-7 (8 bins, parameters of standard deviation 5), and rounding y to
    float32 then moves x by up to 1: no inverse that is given y alone can undo that. What holds instead:

    * the inverse never raises and gives no NaN, and x' = inverse(y) is off by no more than what that rounding makes
      of it, ulp(y) / 2 divided by the least slope between x and x', and one rounding of x' itself (plus 1e-6); so
      |x' - x| <= 1e-4 wherever the slope is above 2e-3 (tail_bound 3), and f(x') is y up to roundings everywhere;
    * with ``return_low`` the forward returns what rounding y lost as a second tensor, and ``inverse(y, low=low)``
      then returns to x within 1e-6 in float32; ask that inverse for its ``low`` too and further layers keep it. The
      same in the other direction. (In half types y + low has 16 or 22 bits, and in float64 low is 0.)

    Args:
        x: (B, ...), float32, float64, bfloat16 or float16, any strides. All elements are transformed.
        parameters: the shape of x and 3 K - 1 at the end: K for the widths, K for the heights, K - 1 for the slopes at
            inner knots, before softmax and softplus. With ``parameters_dim=1`` a convolution's output
            (B, C (3 K - 1), ...) for x (B, C, ...), channel c in channels c (3 K - 1) and up, as in nflows. Dtype of
            x, any strides, read in place; the gradient comes in the same memory order.
        tail_bound: half the length of the interval, finite and > 0.
        inverse: whether to return x for y; log_abs_det is then that of the inverse.
        min_bin_width: least width of a bin, of an interval of length 1, above 0 and below 1 / K.
        min_bin_height: as min_bin_width.
        min_derivative: least slope at a knot, above 0 and below 1.
        parameters_dim: -1 (last) or 1 (channels).
        low: of the shape and dtype of x; x + low is transformed. A constant: it gets no gradient.
        return_low: whether to return what rounding y to its dtype lost.
        backend: "reference", "cpu" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (y, log_abs_det), or with ``return_low`` (y, log_abs_det, low): y and low in shape and dtype of x, log_abs_det
        (B,) in float32 (float64 for float64): the sum of log dy/dx over all elements of a sample.

    Raises:
        TypeError: an argument is no floating-point tensor, or no number, or dtypes differ.
        ValueError: shapes do not match, fewer than 2 bins, a setting is outside its range.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.flows import spline_coupling
        >>> x, parameters = torch.randn(4, 10), torch.randn(4, 10, 3 * 8 - 1)
        >>> y, log_abs_det, low = spline_coupling(x, parameters, return_low=True)
        >>> back, of_inverse = spline_coupling(y, parameters, inverse=True, low=low)
        >>> torch.allclose(back, x, atol=1e-6), torch.allclose(of_inverse, -log_abs_det, atol=1e-4)
        (True, True)
    """
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected (B, ...), got a tensor without dimensions")
    checks.same_kind("parameters", parameters, "x", x)
    values, raw = _as_three(x), _as_four(x, parameters, parameters_dim)
    if raw.shape[3] < 5 or raw.shape[3] % 3 != 2:
        raise ValueError(f"parameters: expected 3 K - 1 numbers an element with K >= 2 bins, got {raw.shape[3]}")
    bins = (raw.shape[3] + 1) // 3
    numbers = (
        _between("tail_bound", tail_bound, math.inf, "finite and above 0"),
        _between("min_bin_width", min_bin_width, 1 / bins, f"above 0 and below 1 / K = {1 / bins:.4g}"),
        _between("min_bin_height", min_bin_height, 1 / bins, f"above 0 and below 1 / K = {1 / bins:.4g}"),
        _between("min_derivative", min_derivative, 1.0, "above 0 and below 1"),
    )
    rest = None
    if low is not None:
        checks.same_kind("low", low, "x", x)
        checks.shape("low", low, x.shape, "the shape of x")
        rest = _as_three(low.detach())
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    if chosen == "reference":
        y, log_abs_det, lost = reference.spline_coupling(values, raw, rest, *numbers, inverse)
    else:
        y, log_abs_det, lost = autograd.run(
            values, raw, rest, *numbers, bool(inverse), bool(return_low), backend=chosen
        )
    y = y.reshape(x.shape)
    return (y, log_abs_det, lost.reshape(x.shape)) if return_low else (y, log_abs_det)


def pack_spline_parameters(widths: Tensor, heights: Tensor, derivatives: Tensor) -> Tensor:
    """The parameters of :func:`spline_coupling` from three tensors, as other libraries hold them: a copy.

    Args:
        widths: (..., K), before softmax.
        heights: (..., K), before softmax.
        derivatives: (..., K - 1), of the inner knots, before softplus.

    Returns:
        (..., 3 K - 1).

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ.
        ValueError: shapes do not match.

    Example:
        >>> import torch
        >>> from mpkernels.flows import pack_spline_parameters
        >>> pack_spline_parameters(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2, 7)).shape
        torch.Size([2, 23])
    """
    checks.floating("widths", widths)
    checks.same_kind("heights", heights, "widths", widths)
    checks.same_kind("derivatives", derivatives, "widths", widths)
    if widths.dim() == 0:
        raise ValueError("widths: expected (..., K), got a tensor without dimensions")
    checks.shape("heights", heights, widths.shape, "the shape of widths")
    checks.shape("derivatives", derivatives, (*widths.shape[:-1], widths.shape[-1] - 1), "(..., K - 1)")
    return torch.cat([widths, heights, derivatives], -1)


def _as_three(x: Tensor) -> Tensor:
    """(B, ...) as (B, C, S): the first dimension behind B, and the others; a view where strides allow it."""
    return x.flatten(2) if x.dim() > 2 else x[:, :, None] if x.dim() == 2 else x[:, None, None]


def _as_four(x: Tensor, parameters: Tensor, parameters_dim: int) -> Tensor:
    """The parameters as (B, C, S, P), read in place."""
    if parameters_dim not in (-1, 1):
        raise ValueError(f"parameters_dim: expected -1 or 1, got {parameters_dim!r}")
    shape = tuple(x.shape)
    if parameters_dim == 1:
        if x.dim() < 2:
            raise ValueError(f"parameters_dim: expected -1 for x of shape {shape}, got 1 (x has no channels)")
        channels = shape[1]
        if (
            parameters.dim() != x.dim()
            or (parameters.shape[0], *parameters.shape[2:]) != (shape[0], *shape[2:])
            or (parameters.shape[1] % channels if channels else parameters.shape[1])
        ):
            raise ValueError(
                f"parameters: expected (B, C (3 K - 1), ...) for x of shape {shape}, got {tuple(parameters.shape)}"
            )
        if channels == 0:
            return parameters.reshape(shape[0], 0, math.prod(shape[2:]), 5)  # (as good a number as any)
        split = parameters.unflatten(1, (channels, parameters.shape[1] // channels))  # (B, C, P, ...)
        return (split.flatten(3) if split.dim() > 3 else split[..., None]).transpose(2, 3)
    if parameters.dim() != x.dim() + 1 or parameters.shape[:-1] != x.shape:
        raise ValueError(
            f"parameters: expected the shape of x and 3 K - 1, {(*shape, '3 K - 1')}, got {tuple(parameters.shape)}"
        )
    if x.dim() == 1:
        return parameters[:, None, None]
    return parameters.flatten(2, -2) if x.dim() > 2 else parameters[:, :, None]


def _between(name: str, value: float, most: float, expected: str) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < value < most:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return float(value)
