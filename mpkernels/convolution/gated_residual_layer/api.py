"""The public function of WaveNet's layer: checks its input and chooses a backend."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.convolution.dilated_conv1d import sequences
from mpkernels.convolution.dilated_conv1d.api import check_convolution, check_state
from mpkernels.convolution.gated_residual_layer import autograd, reference, schema


class GatedResidualLayer(NamedTuple):
    """What a layer returns; None where it was not asked for."""

    residual: Tensor | None  # (B, R, T), the input of the next layer
    skip: Tensor | None  # (B, S, T), to be summed over layers
    state: Tensor | None  # (B, R, (K - 1) dilation), what the next part of the sequence starts from


def gated_residual_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    condition: Tensor | None = None,
    condition_weight: Tensor | None = None,
    global_condition: Tensor | None = None,
    global_weight: Tensor | None = None,
    dilation: int = 1,
    residual_scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> GatedResidualLayer:
    """WaveNet's layer in one pass: dilated causal convolution, conditions, gate, residual and skip projections.

    z = weight * x + bias + condition_weight condition + global_weight global_condition, with * the causal convolution
    of :func:`mpkernels.convolution.dilated_conv1d`; h = tanh(z[:G]) sigmoid(z[G:]); then

        residual = residual_scale (x + residual_weight h + residual_bias),     skip = skip_weight h + skip_bias

    (van den Oord et al. 2016, "WaveNet", equations 2 and 3, figure 4). WaveNet's residual_scale is 1; r9y9's
    wavenet_vocoder takes sqrt(1/2), which keeps the variance. A sequence can be cut anywhere, with the same bits: each
    part takes the state that the part before it returned. Gradients are exact, of any order, and the same bits in every
    run.

    Args:
        x: (B, R, T) sequences; float32, float64, bfloat16 or float16 (accumulated in float32). Contiguous in T, or in
            R (a transposed view of (B, T, R)), which is read without a copy and gives results in that order.
        weight: (2 G, R, K) of the convolution, any width K >= 1: first the G filters, then the G gates.
        bias: (2 G,); None for none, as for every bias here.
        residual_weight: (R, G); None where the residual is not wanted (the last layer).
        residual_bias: (R,), with ``residual_weight`` alone.
        skip_weight: (S, G); None where no skip output is wanted. One of the two projections must be given.
        skip_bias: (S,), with ``skip_weight`` alone.
        condition: (B, A, T), what changes over time (a spectrogram at the rate of x); either memory order, as x.
        condition_weight: (2 G, A), given with ``condition``.
        global_condition: (B, E), what does not change over time (the embedding of a speaker).
        global_weight: (2 G, E), given with ``global_condition``.
        dilation: positions between neighbouring taps, at least 1.
        residual_scale: factor of the residual output.
        initial_state: (B, R, (K - 1) dilation): what came before ``x``, newest last; zeros where None.
        return_state: whether to return the state after ``x``.
        backend: "reference", "cpu" or "triton"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (residual (B, R, T), skip (B, S, T), state (B, R, (K - 1) dilation)), each None where it was not asked for.

    Raises:
        TypeError: an argument is no tensor or number, or has an integer or a different dtype.
        ValueError: shapes or devices do not match, a number is outside of its range, no projection was given.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import gated_residual_layer
        >>> x, weight = torch.randn(1, 4, 50), torch.randn(12, 4, 2)
        >>> out = gated_residual_layer(x, weight, residual_weight=torch.randn(4, 6), skip_weight=torch.randn(8, 6))
        >>> out.residual.shape, out.skip.shape
        (torch.Size([1, 4, 50]), torch.Size([1, 8, 50]))
    """
    left = check_convolution(x, weight, bias, dilation)
    check_state(initial_state, x, left)
    width = weight.shape[0]
    if width % 2:
        raise ValueError(f"weight: expected an even number of rows, filters and gates, got {tuple(weight.shape)}")
    _, channels, length = x.shape
    _check_projection("residual", residual_weight, residual_bias, x, width // 2, channels)
    _check_projection("skip", skip_weight, skip_bias, x, width // 2, None)
    if residual_weight is None and skip_weight is None:
        raise ValueError("residual_weight: expected a tensor here or in skip_weight, got None for both")
    _check_condition("condition", condition, condition_weight, x, width, (length,))
    _check_condition("global_condition", global_condition, global_weight, x, width, ())
    if isinstance(residual_scale, bool) or not isinstance(residual_scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"residual_scale: expected a number, got {type(residual_scale).__name__}")
    if not math.isfinite(residual_scale):
        raise ValueError(f"residual_scale: expected a finite number, got {residual_scale}")
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)

    arguments = (
        x,
        weight,
        _offset(bias, global_condition, global_weight),
        condition,
        condition_weight,
        *_joined(residual_weight, residual_bias, skip_weight, skip_bias),
        initial_state,
        dilation,
        residual_weight is not None,
        float(residual_scale),
    )
    if chosen == "reference":
        residual, skip = reference.gated_residual_layer(*arguments)
    else:
        residual, skip = autograd.run(*arguments, sequences.channels_last(x), backend=chosen)
    return GatedResidualLayer(
        None if residual_weight is None else residual,
        None if skip_weight is None else skip,
        sequences.next_state(x, initial_state, left) if return_state else None,
    )


def _check_projection(
    name: str, weight: Tensor | None, bias: Tensor | None, x: Tensor, gates: int, rows: int | None
) -> None:
    """Raises unless (rows, G) ``weight`` and (rows,) ``bias`` fit; any number of rows where None."""
    if weight is None:
        if bias is not None:
            raise ValueError(f"{name}_bias: expected None without {name}_weight, got a {type(bias).__name__}")
        return
    checks.same_kind(f"{name}_weight", weight, "x", x)
    if weight.dim() != 2 or weight.shape[1] != gates or weight.shape[0] != (weight.shape[0] if rows is None else rows):
        expected = f"({'S' if rows is None else rows}, {gates})"
        raise ValueError(
            f"{name}_weight: expected shape {expected}, for {gates} gates of weight, got {tuple(weight.shape)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{name}_weight: expected one row or more, got {tuple(weight.shape)}")
    if bias is not None:
        checks.same_kind(f"{name}_bias", bias, "x", x)
        checks.shape(f"{name}_bias", bias, (weight.shape[0],), f"the rows of {name}_weight")


def _check_condition(
    name: str, condition: Tensor | None, weight: Tensor | None, x: Tensor, width: int, length: tuple[int, ...]
) -> None:
    """Raises unless both or none are given, (B, channels, *length) and (2 G, channels)."""
    weight_name = name.removesuffix("_condition") + "_weight"
    if (condition is None) != (weight is None):
        missing, given = (name, weight_name) if condition is None else (weight_name, name)
        raise ValueError(f"{missing}: expected a tensor, because {given} is given, got None")
    if condition is None or weight is None:
        return
    checks.same_kind(name, condition, "x", x)
    checks.same_kind(weight_name, weight, "x", x)
    shape = (x.shape[0], condition.shape[1] if condition.dim() > 1 else "channels", *length)
    if tuple(condition.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, for x of {tuple(x.shape)}, got {tuple(condition.shape)}")
    if condition.shape[1] < 1:
        raise ValueError(f"{name}: expected one channel or more, got shape {tuple(condition.shape)}")
    checks.shape(weight_name, weight, (width, condition.shape[1]), f"the rows of weight, the channels of {name}")


def _offset(bias: Tensor | None, condition: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """What does not change over time: (B or 1, 2 G)."""
    if condition is None or weight is None:
        return None if bias is None else bias[None]
    return torch.nn.functional.linear(condition, weight, bias)


def _joined(
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Both projections as one, rows of the residual first: (P, G), and (P,) or None."""
    pairs = [(w, b) for w, b in ((residual_weight, residual_bias), (skip_weight, skip_bias)) if w is not None]
    if len(pairs) == 1:
        return pairs[0]
    weight = torch.cat([w for w, _ in pairs])
    if residual_bias is None and skip_bias is None:
        return weight, None
    return weight, torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in pairs])
