"""The public function of MADE's layer: it checks its input, sorts units by degree and chooses a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.convolution.masked_linear import autograd, reference, schema

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MOST_UNITS = 2**30  # places in the order of degrees are 32-bit numbers


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear map in which output o sees input i only where their degrees allow it: the layer of MADE.

        y[..., o] = bias[o] + sum over i with in_degrees[i] <= out_degrees[o] of weight[o, i] x[..., i]

    (Germain et al. 2015, "MADE: Masked Autoencoder for Distribution Estimation", eq. 8 for hidden layers and, with <
    instead of <=, eq. 9 for the output.) It is ``F.linear(x, weight * mask, bias)``, without the mask and without the
    multiplications that it takes away: units are sorted by degree, in which order the mask is a staircase. Gradients
    go to ``x``, ``weight`` and ``bias``, to any order; that of a weight that does not count is exactly 0, and what such
    a weight, or an input that no output sees, holds (NaN, infinity) never matters.

    Args:
        x: (..., I), any leading dimensions; float32, float64, bfloat16 or float16 (summed in float32 or wider).
        weight: (O, I).
        bias: (O,), or None.
        in_degrees: (I,) integers of at least 0, one an input: in MADE the place of a variable in the order in which
            they are predicted, or what a hidden unit may see at most.
        out_degrees: (O,) integers of at least 0, one an output.
        strict: compare with < (output layers) instead of <= (hidden layers).
        backend: "reference", "cpu" or "triton"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (..., O), of the dtype of ``x``.

    Raises:
        TypeError: a tensor is none, has another dtype than ``x``, or degrees are no integers.
        ValueError: shapes or devices do not fit, or a degree is negative.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        Three variables in their natural order; the second may depend on the first, the third on both:

        >>> import torch
        >>> from mpkernels.convolution import masked_linear
        >>> degrees = torch.tensor([0, 1, 2])
        >>> masked_linear(torch.tensor([[1.0, 10.0, 100.0]]), torch.ones(3, 3), None, degrees, degrees, strict=True)
        tensor([[ 0.,  1., 11.]])
    """
    _check(x, weight, bias, in_degrees, out_degrees, strict)
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_zeros((x.shape[:-1].numel(), 0))
    if chosen == "reference":
        y = reference.masked_linear(rows, weight, bias, in_degrees, out_degrees, strict)
    else:
        order_in, order_out, count = _staircase(in_degrees, out_degrees, strict)
        y = autograd.run(rows, weight, bias, order_in, order_out, count, backend=chosen)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _staircase(in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """order_in, order_out and count of schema.py. Made in every call: two sorts cost less than a stale order."""
    sorted_in, order_in = in_degrees.long().sort(stable=True)
    sorted_out, order_out = out_degrees.long().sort(stable=True)
    count = torch.searchsorted(sorted_in, sorted_out, right=not strict, out_int32=True)
    return order_in.int(), order_out.int(), count


def _check(x, weight, bias, in_degrees, out_degrees, strict) -> None:
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., I), got ()")
    checks.same_kind("weight", weight, "x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        expected = f"shape (O, {x.shape[-1]}), for the {x.shape[-1]} inputs of x"
        raise ValueError(f"weight: expected {expected}, got {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    for name, size in (("x", inputs), ("weight", outputs)):
        if size >= _MOST_UNITS:
            raise ValueError(f"{name}: expected fewer than 2^30 {'inputs' if name == 'x' else 'outputs'}, got {size}")
    if bias is not None:
        checks.same_kind("bias", bias, "x", x)
        checks.shape("bias", bias, (outputs,), "an output each")
    if not isinstance(strict, bool):
        raise TypeError(f"strict: expected a bool, got {type(strict).__name__}")
    for name, degrees, size, units in (
        ("in_degrees", in_degrees, inputs, "an input each"),
        ("out_degrees", out_degrees, outputs, "an output each"),
    ):
        checks.tensor(name, degrees)
        if degrees.dtype not in _INTEGERS:
            raise TypeError(f"{name}: expected integers, got {degrees.dtype}")
        checks.shape(name, degrees, (size,), units)
        if degrees.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {degrees.device}")
        # (torch.compile cannot ask for a value; a GPU answers only when it has done everything before)
        if degrees.device.type == "cpu" and size and not torch.compiler.is_compiling():
            least = int(degrees.min())
            if least < 0:
                raise ValueError(f"{name}: expected degrees of at least 0, got {least}")
