"""The functions of causal_conv1d, on :func:`mpkernels.convolution.depthwise_conv1d` and its update."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import checks
from mpkernels.convolution import depthwise_conv1d, depthwise_conv1d_update


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal convolution of each channel by itself, as ``causal_conv1d.causal_conv1d_fn``.

    Args:
        x: (batch, dim, seqlen), contiguous in seqlen or in dim; nothing is copied in either.
        weight: (dim, width), any width.
        bias: (dim,).
        seq_idx: (batch, seqlen) int32: positions of other sequences are not read; below 0 is padding, with output 0.
        initial_states: (batch, dim, width - 1), what came before x.
        return_final_states: whether to return the last width - 1 inputs too, for the next call.
        final_states_out: (batch, dim, width - 1), written to and returned as the final states (outside of gradients).
        activation: None, "silu" or "swish".

    Returns:
        out (batch, dim, seqlen); with ``return_final_states`` a pair (out, final_states).

    Raises:
        TypeError, ValueError: as :func:`mpkernels.convolution.depthwise_conv1d`, with the names of its arguments.

    Example:
        >>> import torch
        >>> from mpkernels.compat.causal_conv1d import causal_conv1d_fn
        >>> out, states = causal_conv1d_fn(torch.randn(2, 8, 5), torch.randn(8, 4), return_final_states=True)
        >>> out.shape, states.shape
        (torch.Size([2, 8, 5]), torch.Size([2, 8, 3]))
    """
    weight, bias = _weights(x, weight, bias)
    if not return_final_states:
        return depthwise_conv1d(x, weight, bias, initial_state=initial_states, seq_idx=seq_idx, activation=activation)
    out, states = depthwise_conv1d(
        x,
        weight,
        bias,
        initial_state=initial_states,
        return_state=True,
        seq_idx=seq_idx,
        activation=activation,
    )
    if final_states_out is None:
        return out, states
    checks.same_kind("final_states_out", final_states_out, "x", x)
    checks.shape("final_states_out", final_states_out, states.shape, "(batch, dim, width - 1)")
    return out, final_states_out.copy_(states)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """A step of generation, as ``causal_conv1d.causal_conv1d_update``; no gradients.

    Args:
        x: (batch, dim), or (batch, dim, seqlen) for a few positions.
        conv_state: (batch, dim, state_len) with state_len >= width - 1, updated in place; the newest is the last.
        weight: (dim, width), any width.
        bias: (dim,).
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,) int32: ``conv_state`` is a circular buffer, and x is written from
            cache_seqlens % state_len on.
        conv_state_indices: (batch,) int32: the rows of a larger ``conv_state``. Below 0: the row is skipped, its
            output is 0.

    Returns:
        out, in the shape of x.

    Raises:
        TypeError, ValueError: as :func:`mpkernels.convolution.depthwise_conv1d_update`, with the names of its
            arguments (``state`` for conv_state, ``state_indices`` for conv_state_indices).

    Example:
        >>> import torch
        >>> from mpkernels.compat.causal_conv1d import causal_conv1d_update
        >>> state = torch.zeros(2, 8, 3)
        >>> causal_conv1d_update(torch.ones(2, 8), state, torch.ones(8, 4))[0, 0], state[0, 0]
        (tensor(1.), tensor([0., 0., 1.]))
    """
    with torch.no_grad():
        weight, bias = _weights(x, weight, bias)
        return depthwise_conv1d_update(
            x,
            conv_state,
            weight,
            bias,
            activation=activation,
            cache_seqlens=cache_seqlens,
            state_indices=conv_state_indices,
        )


def _weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in a dtype that the op takes beside x."""
    checks.floating("x", x)
    checks.floating("weight", weight)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if bias is not None:
        checks.floating("bias", bias)
        bias = bias if bias.dtype == x.dtype else bias.to(wide)
    return weight if weight.dtype == x.dtype else weight.to(wide), bias
