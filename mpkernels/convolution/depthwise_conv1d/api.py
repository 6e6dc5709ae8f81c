"""The public functions of the depthwise convolution over time: they check their input and choose a backend."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.convolution.depthwise_conv1d import autograd, reference, schema

ACTIVATIONS = (None, "silu", "swish")


@overload
def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    seq_idx: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    initial_state: Tensor | None = None,
    return_state: bool,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal convolution over time of each channel by itself, with SiLU and sequence boundaries in the same pass.

    y[b, c, t] = bias[c] + sum_k weight[c, k] x[b, c, t - (K - 1 - k) dilation], and out = y, or y / (1 + e^-y): the
    short convolution of state space models (Gu and Dao 2023, "Mamba", fig. 3; H3, Fu et al. 2023) and, dilated, a
    depthwise layer of WaveNet's kind. Inputs in front of x come from ``initial_state``, or count as nothing. No padded
    copy of x is made, in either memory order. A sequence may be cut anywhere, with the same bits on the CPU. Gradients
    of any order to x, weight, bias and initial_state, the same bits in every run.

    Args:
        x: (B, C, T), contiguous in T or (as the transpose of (B, T, C)) in C; anything else is copied first. float32,
            float64, bfloat16 or float16 (computed in float32).
        weight: (C, K), any K >= 1; the last tap reads the newest position. The dtype of x, or float32 beside a half
            type.
        bias: (C,), as weight.
        dilation: positions between taps, >= 1.
        initial_state: (B, C, (K - 1) dilation), what came before x, newest last; the dtype of x. Default: nothing.
        return_state: whether to return the state behind x too.
        seq_idx: (B, T) int32, for rows that hold several sequences one behind another: the number of the sequence of
            each position, in rising order. A tap that would read another sequence reads nothing. A number below 0 is
            padding: its output is 0, and nothing reads it. ``initial_state`` belongs to the sequence of position 0.
            Numbers on a GPU are not read to check them; a kernel compares them for equality alone.
        activation: None, "silu" or "swish" (the same).
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        out (B, C, T) in the dtype and the memory order of x; with ``return_state`` a pair (out, state), the state
        (B, C, (K - 1) dilation) for the next piece of the row: with ``seq_idx``, of the sequence of the last position
        (positions of others are 0).

    Raises:
        TypeError: an argument is no tensor, or has an integer or a different dtype; dilation is no integer.
        ValueError: shapes or devices do not match, ``dilation`` is below 1, ``seq_idx`` falls (on a CPU),
            ``activation`` is unknown.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import depthwise_conv1d
        >>> x, weight, bias = torch.randn(2, 64, 100), torch.randn(64, 4), torch.zeros(64)
        >>> whole = depthwise_conv1d(x, weight, bias, activation="silu")
        >>> first, state = depthwise_conv1d(x[..., :37], weight, bias, activation="silu", return_state=True)
        >>> second = depthwise_conv1d(x[..., 37:], weight, bias, activation="silu", initial_state=state)
        >>> torch.equal(torch.cat([first, second], -1), whole)
        True
    """
    left, weight, bias = _checked(x, weight, bias, dilation, activation)
    batch, channels, _ = x.shape
    if initial_state is not None:
        checks.same_kind("initial_state", initial_state, "x", x)
        checks.shape("initial_state", initial_state, (batch, channels, left), "(B, C, (K - 1) dilation)")
    if seq_idx is not None:
        _check_sequences(seq_idx, x)
    silu = activation is not None
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    if chosen == "reference":
        out = reference.depthwise_conv1d(x, weight, bias, initial_state, seq_idx, dilation, silu)
    else:
        out = autograd.run(x, weight, bias, initial_state, seq_idx, dilation, silu, backend=chosen)
    return (out, _state_behind(x, initial_state, seq_idx, left)) if return_state else out


def depthwise_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A step of generation: :func:`depthwise_conv1d` of the next position (or few), with the state updated in place.

    On the CPU the bits are those of the whole sequence in one call. There are no gradients.

    Args:
        x: the next inputs, (B, C), or (B, C, T) for T positions at once. float32, float64, bfloat16 or float16.
        state: the last inputs of each sequence, (B, C, S) with S >= (K - 1) dilation, in the dtype of x and any
            strides; with ``state_indices`` (N, C, S). Written to. The newest position is the last one.
        weight: (C, K), the dtype of x, or float32 beside a half type.
        bias: (C,), as weight.
        dilation: positions between taps, >= 1.
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: (B,) int32, how many positions each sequence had before: the state is then a circular buffer,
            nothing is moved, and position t of x is written to (cache_seqlens + t) mod S.
        state_indices: (B,) int32, the row of ``state`` of each row of x, all different. Where it is below 0 the row is
            skipped: its output is 0, and no state is written. On a GPU a row behind the state is skipped too.
        backend: "reference", "cpu" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        out, in the shape and the dtype of x.

    Raises:
        TypeError: an argument is no tensor, or has an integer or a different dtype; dilation is no integer.
        ValueError: shapes or devices do not match, the state is too short, an index is not a row of the state (on a
            CPU), ``dilation`` is below 1, ``activation`` is unknown, or a gradient is asked for.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import depthwise_conv1d, depthwise_conv1d_update
        >>> x, weight = torch.randn(2, 64, 10), torch.randn(64, 4)
        >>> state = torch.zeros(2, 64, 3)
        >>> steps = [depthwise_conv1d_update(x[..., t], state, weight) for t in range(10)]
        >>> torch.equal(torch.stack(steps, -1), depthwise_conv1d(x, weight))
        True
    """
    checks.floating("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected shape (B, C) or (B, C, T), got {tuple(x.shape)}")
    steps = x[..., None] if x.dim() == 2 else x
    for name, value in (("x", x), ("state", state), ("weight", weight), ("bias", bias)):
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient, got one with requires_grad: "
                "depthwise_conv1d_update has none; use depthwise_conv1d, or torch.no_grad()"
            )
    left, weight, bias = _checked(steps, weight, bias, dilation, activation)
    batch, channels, _ = steps.shape
    checks.same_kind("state", state, "x", x)
    rows = batch if state_indices is None else "N"
    if state.dim() != 3 or state.shape[1] != channels or (state_indices is None and state.shape[0] != batch):
        raise ValueError(f"state: expected shape {(rows, channels, 'S')}, got {tuple(state.shape)}")
    if state.shape[2] < left:
        raise ValueError(f"state: expected at least {left} positions, (K - 1) dilation, got shape {tuple(state.shape)}")
    for name, value in (("cache_seqlens", cache_seqlens), ("state_indices", state_indices)):
        if value is not None:
            _check_integers(name, value, x, (batch,), "(B,)")
    if state_indices is not None and _readable(state_indices) and int(state_indices.max()) >= state.shape[0]:
        raise ValueError(
            f"state_indices: expected rows of state, below {state.shape[0]}, got {int(state_indices.max())}"
        )
    if cache_seqlens is not None and _readable(cache_seqlens) and int(cache_seqlens.min()) < 0:
        raise ValueError(f"cache_seqlens: expected lengths from 0 on, got {int(cache_seqlens.min())}")
    chosen = backends.choose(schema.UPDATE, x.device.type, backend)
    arguments = (steps, state, weight, bias, cache_seqlens, state_indices, dilation, activation is not None)
    if chosen == "reference":
        out = reference.depthwise_conv1d_update(*arguments)
    else:
        tensors = (x if x is None else x.contiguous() for x in (weight, bias, cache_seqlens, state_indices))
        out = backends.call(chosen, schema.UPDATE)(steps, state, *tensors, *arguments[6:])
    return out[..., 0] if x.dim() == 2 else out


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, activation: str | None
) -> tuple[int, Tensor, Tensor | None]:
    """How far the first tap reads back, and weight and bias in the type that is computed in."""
    checks.floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected shape (B, C, T), got {tuple(x.shape)}")
    if isinstance(dilation, bool) or not isinstance(dilation, int):
        raise TypeError(f"dilation: expected an integer, got {type(dilation).__name__}")
    if dilation < 1:
        raise ValueError(f"dilation: expected at least 1, got {dilation}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    channels = x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None and name == "bias":
            continue
        checks.tensor(name, value)
        assert value is not None
        checks.floating(name, value)
        if value.dtype not in (x.dtype, wide):
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, or {wide}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"weight: expected shape {(channels, 'K')}, K >= 1 (the channels of x), got {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.shape("bias", bias, (channels,), "the channels of x")
        bias = bias if bias.dtype == wide else bias.to(wide)
    left = (weight.shape[1] - 1) * dilation
    if left >= 2**62:
        raise ValueError(f"dilation: expected (K - 1) dilation below 2**62, got {dilation}")
    return left, weight if weight.dtype == wide else weight.to(wide), bias


def _check_integers(name: str, value: Tensor, x: Tensor, shape: tuple[int, ...], because: str) -> None:
    checks.tensor(name, value)
    if value.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
    checks.shape(name, value, shape, because)


def _readable(x: Tensor) -> bool:
    """Whether values may be looked at: not while compiling or mapping, and not where it waits for a GPU."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _check_sequences(seq_idx: Tensor, x: Tensor) -> None:
    _check_integers("seq_idx", seq_idx, x, (x.shape[0], x.shape[2]), "(B, T), that of x")
    if not _readable(seq_idx):
        return
    highest = seq_idx.cummax(-1).values
    falls = (seq_idx < highest) & (seq_idx >= 0)
    if falls.any():
        b, t = falls.nonzero()[0].tolist()
        raise ValueError(
            f"seq_idx: expected numbers that do not fall along a row (below 0 for padding), got "
            f"{int(seq_idx[b, t])} behind {int(highest[b, t])} at {(b, t)}"
        )


def _state_behind(x: Tensor, state: Tensor | None, seq_idx: Tensor | None, left: int) -> Tensor:
    """The last ``left`` inputs of the sequence that a row ends with: what the next piece of the row begins with."""
    batch, channels, length = x.shape
    if length >= left:
        found = x[:, :, length - left :].clone()
    else:
        past = x.new_zeros((batch, channels, left)) if state is None else state
        found = torch.cat([past[:, :, length:], x], -1)
    if seq_idx is None or length == 0:
        return found
    owner = seq_idx[:, max(length - left, 0) :]
    owner = torch.cat([seq_idx[:, :1].expand(batch, left - owner.shape[1]), owner], -1)
    kept = (owner == seq_idx[:, -1:]) & (owner >= 0)
    return torch.where(kept[:, None], found, 0.0)
