"""The public function of the dilated convolution over time: checks its input and chooses a backend."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.convolution.depthwise_conv1d import depthwise_conv1d
from mpkernels.convolution.dilated_conv1d import autograd, reference, schema, sequences

LARGEST_DILATION = 2**31 - 1
ACTIVATIONS = (None, "silu", "swish")


@overload
def dilated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def dilated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def dilated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def dilated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A convolution over time whose taps are ``dilation`` positions apart, without a padded copy of the input.

    out[b, o, t] = bias[o] + sum_{k, c} weight[o, c, k] x[b, c, t + (k - K + 1) dilation]: the last tap reads the
    newest position, and nothing reads the future (van den Oord et al. 2016, "WaveNet", section 2.1). What lies before
    the sequence is ``initial_state``, or zeros. With ``return_state`` a sequence can be cut anywhere (training in
    chunks, streaming): each part takes the state that the part before it returned, and the result has the same bits.

    Positions outside of the sequence are not read: a weight that meets only such positions is multiplied by nothing,
    and its gradient is exactly 0. Gradients are exact, of any order, and the same bits in every run.

    Args:
        x: (B, C, T) sequences; float32, float64, bfloat16 or float16 (accumulated in float32). Contiguous in T, or in
            C (a transposed view of (B, T, C)), which is read without a copy and gives a result in that order.
        weight: (D, C / groups, K), any width K >= 1; dtype of ``x``.
        bias: (D,); None for none.
        dilation: positions between neighbouring taps, at least 1.
        groups: divides C and D: outputs of a group see the inputs of their group alone. groups = C = D, a depthwise
            convolution, has kernels of its own.
        causal: False for a centred convolution: K odd, (K - 1) / 2 taps on either side, zeros around the sequence.
        initial_state: (B, C, (K - 1) dilation): what came before ``x``, newest last. Causal convolutions only.
        return_state: whether to return the state after ``x`` too. Causal convolutions only.
        activation: "silu" (or its other name, "swish") applies x sigmoid(x) to the result.
        seq_idx: (B, T) int32, for depthwise causal convolutions: positions of different numbers belong to different
            sequences and do not see each other; see :func:`mpkernels.convolution.depthwise_conv1d`.
        backend: "reference", "cpu" or "triton"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        out (B, D, T); with ``return_state`` (out, state), state (B, C, (K - 1) dilation) the last positions of
        [initial_state, x], differentiable. T = 0 gives an empty result and the state unchanged.

    Raises:
        TypeError: an argument is no tensor or number, or has an integer or a different dtype.
        ValueError: shapes or devices do not match, or a number is outside of its range.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import dilated_conv1d
        >>> x, weight = torch.randn(2, 3, 100), torch.randn(5, 3, 2)
        >>> whole = dilated_conv1d(x, weight, dilation=8)
        >>> first, state = dilated_conv1d(x[..., :60], weight, dilation=8, return_state=True)
        >>> rest = dilated_conv1d(x[..., 60:], weight, dilation=8, initial_state=state)
        >>> torch.allclose(torch.cat([first, rest], -1), whole, atol=1e-5)
        True
    """
    left = check_convolution(x, weight, bias, dilation, groups, causal)
    check_state(initial_state, x, left, causal)
    if return_state and not causal:
        raise ValueError("return_state: expected False for a centred convolution (causal=False), got True")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected 'silu', 'swish' or None, got {activation!r}")
    if causal and groups == x.shape[1] == weight.shape[0]:
        return depthwise_conv1d(
            x,
            weight[:, 0],
            bias,
            dilation=dilation,
            initial_state=initial_state,
            return_state=return_state,
            seq_idx=seq_idx,
            activation=activation,
            backend=backend,
        )
    if seq_idx is not None:
        raise ValueError(
            "seq_idx: expected None unless the convolution is causal and depthwise (groups = C = D), got a "
            f"{type(seq_idx).__name__} with groups {groups}, {x.shape[1]} channels in and {weight.shape[0]} out"
        )
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    if chosen == "reference":
        out = reference.dilated_conv1d(x, weight, bias, initial_state, dilation, groups, left)
    else:
        last = sequences.channels_last(x)
        out = autograd.run(x, weight, bias, initial_state, dilation, groups, left, last, chosen)
    if activation is not None:
        out = torch.nn.functional.silu(out)
    return (out, sequences.next_state(x, initial_state, left)) if return_state else out


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int = 1, causal: bool = True
) -> int:
    """Raises unless the arguments belong together; returns how far before an output its first tap reads."""
    checks.floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected shape (B, C, T), got {tuple(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"x: expected one channel or more, got shape {tuple(x.shape)}")
    check_integer("dilation", dilation, LARGEST_DILATION)
    check_integer("groups", groups, LARGEST_DILATION)
    checks.same_kind("weight", weight, "x", x)
    channels = x.shape[1]
    if channels % groups:
        raise ValueError(f"groups: expected a divisor of the {channels} channels of x, got {groups}")
    if weight.dim() != 3 or weight.shape[0] < 1 or weight.shape[1] != channels // groups or weight.shape[2] < 1:
        raise ValueError(
            f"weight: expected shape (D, {channels // groups}, K) with D and K at least 1, for {channels} channels of "
            f"x in {groups} groups, got {tuple(weight.shape)}"
        )
    outputs, _, taps = weight.shape
    if outputs % groups:
        raise ValueError(f"groups: expected a divisor of the {outputs} outputs of weight, got {groups}")
    if bias is not None:
        checks.same_kind("bias", bias, "x", x)
        checks.shape("bias", bias, (outputs,), "one for each output of weight")
    if causal:
        return (taps - 1) * dilation
    if taps % 2 == 0:
        raise ValueError(
            "weight: expected an odd number of taps for a centred convolution (causal=False), got shape "
            f"{tuple(weight.shape)}"
        )
    return (taps - 1) // 2 * dilation


def check_integer(name: str, value: object, largest: int) -> None:
    """Raises unless ``value`` is an integer from 1 to ``largest``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not 1 <= value <= largest:
        raise ValueError(f"{name}: expected an integer from 1 to {largest}, got {value}")


def check_state(state: Tensor | None, x: Tensor, left: int, causal: bool = True) -> None:
    """Raises unless ``state`` is what comes before ``x``."""
    if state is None:
        return
    if not causal:
        raise ValueError("initial_state: expected None for a centred convolution (causal=False), got a state")
    checks.same_kind("initial_state", state, "x", x)
    checks.shape("initial_state", state, (*x.shape[:2], left), "(K - 1) dilation positions of the channels of x")
