"""Cases, workloads and cost of the depthwise convolution over time, and of its step of generation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from mpkernels.convolution.depthwise_conv1d import api, schema
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload


def _depthwise(
    batch: int,
    channels: int,
    length: int,
    taps: int,
    *,
    bias: bool = True,
    state: bool = False,
    sequences: list[list[int]] | None = None,  # lengths in each row; the rest is padding
    channels_last: bool = False,
    strided: bool = False,
    poison: bool = False,
    **settings,
):
    """Normal inputs, weights and state; ``poison`` puts NaN into the padding."""

    def make(dtype, device, generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def ordered(x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x

        x = ordered(normal(batch, channels, length * 2 if strided else length).to(device, dtype))
        arguments: Arguments = {"x": x[:, :, ::2] if strided else x}
        arguments["weight"] = (normal(channels, taps) / math.sqrt(taps)).to(device, dtype)
        if bias:
            arguments["bias"] = normal(channels).to(device, dtype)
        if state:
            left = (taps - 1) * settings.get("dilation", 1)
            arguments["initial_state"] = ordered(normal(batch, channels, left).to(device, dtype))
        if sequences is not None:
            rows = [
                [7 * i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * (length - sum(lengths))
                for lengths in sequences
            ]
            arguments["seq_idx"] = torch.tensor(rows, dtype=torch.int32, device=device).reshape(batch, length)
            if poison:
                arguments["x"] = torch.where(arguments["seq_idx"][:, None] < 0, math.nan, arguments["x"])
        return arguments | settings

    return make


def _function(return_state: bool = True, **arguments) -> tuple[Tensor, ...]:
    found = api.depthwise_conv1d(**arguments, return_state=return_state)
    return found if isinstance(found, tuple) else (found,)


def _eager(
    x,
    weight,
    bias=None,
    dilation=1,
    initial_state=None,
    return_state=True,
    seq_idx=None,
    activation=None,
) -> tuple[Tensor, ...]:
    """A padded copy and torch's own convolution; with sequences, shifted products, masked."""
    channels, taps = weight.shape
    left, length = (taps - 1) * dilation, x.shape[2]
    padded = functional.pad(x, (left, 0)) if initial_state is None else torch.cat([initial_state, x], -1)
    owner = None
    if seq_idx is None:
        y = functional.conv1d(padded, weight[:, None], bias, dilation=dilation, groups=channels)
    else:
        owner = functional.pad(seq_idx, (left, 0), value=-1)
        if initial_state is not None:
            owner = torch.cat([seq_idx[:, :1].expand(-1, left), seq_idx], -1)
        y = x.new_zeros(()) if bias is None else bias[:, None]
        for k in range(taps):
            now = slice(k * dilation, k * dilation + length)
            y = y + weight[:, k, None] * torch.where((owner[:, now] == seq_idx)[:, None], padded[:, :, now], 0.0)
    y = functional.silu(y) if activation else y
    if seq_idx is not None:
        y = torch.where(seq_idx[:, None] >= 0, y, 0.0)
    if not return_state:
        return (y,)
    state = padded[:, :, padded.shape[2] - left :]
    if owner is not None and seq_idx is not None:
        owner = owner[:, owner.shape[1] - left :]
        state = torch.where(((owner == seq_idx[:, -1:]) & (owner >= 0))[:, None], state, 0.0)
    return y, state


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: x read, out written; backward x and its gradient read, one written. A multiply-add counts as 2."""
    x, taps = arguments["x"], arguments["weight"].shape[1]
    flops = x.numel() * (2 * taps + (30 if arguments.get("activation") else 0))
    return Cost(flops=(3 if backward else 1) * flops, bytes=(3 if backward else 2) * x.numel() * x.element_size())


def _changed(**changes):
    return lambda dtype, device, generator: (
        _depthwise(2, 3, 5, 4, state=True)(dtype, device, generator)
        | {name: value(device) if callable(value) else value for name, value in changes.items()}
    )


def _numbers(rows: list, dtype: torch.dtype = torch.int32):
    return lambda device: torch.tensor(rows, dtype=dtype, device=device)


_CASES = (
    # (interpreters run costly checks on the first of those for gradcheck)
    Case("dilated, without bias", _depthwise(1, 2, 5, 2, bias=False, dilation=3), second_order=True),
    Case("typical", _depthwise(2, 48, 70, 4, activation="silu")),
    Case("channels last", _depthwise(2, 44, 70, 4, channels_last=True, activation="silu")),
    Case("small", _depthwise(1, 2, 5, 4, state=True, activation="silu"), second_order=True),
    Case(
        "sequences",
        _depthwise(1, 2, 7, 3, channels_last=True, state=True, sequences=[[2, 3]], activation="silu"),
        second_order=True,
    ),
    Case("three taps, no activation", _depthwise(2, 8, 40, 3, state=True)),
    Case("two taps, channels last", _depthwise(1, 16, 33, 2, channels_last=True, state=True)),
    Case("seven taps, dilated", _depthwise(2, 5, 123, 7, dilation=5, state=True, activation="swish")),
    Case("one tap", _depthwise(1, 5, 9, 1)),
    Case("shorter than the reach", _depthwise(2, 17, 5, 4, dilation=8, state=True, channels_last=True)),
    Case("sequences, NaN in the padding", _depthwise(2, 20, 50, 4, sequences=[[1, 30, 4], []], poison=True)),
    Case("no positions", _depthwise(2, 3, 0, 4, state=True, activation="silu")),
    Case("no rows", _depthwise(0, 3, 5, 4)),
    Case("strided", _depthwise(2, 9, 21, 4, strided=True)),
    Case("many", _depthwise(1, 6, 17000, 4, activation="silu"), large=True),
    Case("many, channels last", _depthwise(1, 300, 150, 4, channels_last=True, activation="silu"), large=True),
)

_BAD = (
    BadInput("x is no tensor", _changed(x=[1.0]), TypeError, "x.*Tensor.*list"),
    BadInput("x of two dimensions", _changed(x=lambda d: torch.zeros(3, 5, device=d)), ValueError, r"x.*\(B, C, T\)"),
    BadInput("other channels", _changed(weight=lambda d: torch.zeros(4, 4, device=d)), ValueError, "weight.*3.*4, 4"),
    BadInput("no taps", _changed(weight=lambda d: torch.zeros(3, 0, device=d)), ValueError, "weight.*K >= 1.*3, 0"),
    BadInput("double weight", _changed(weight=lambda d: torch.zeros(3, 4, device=d).double()), TypeError, "weight.*64"),
    BadInput("bias of another size", _changed(bias=lambda d: torch.zeros(4, device=d)), ValueError, r"bias.*\(3,\)"),
    BadInput("dilation 0", _changed(dilation=0), ValueError, "dilation.*1.*0"),
    BadInput("dilation of 1.0", _changed(dilation=1.0), TypeError, "dilation.*integer.*float"),
    BadInput(
        "short state",
        _changed(initial_state=lambda d: torch.zeros(2, 3, 2, device=d)),
        ValueError,
        "initial_state.*2, 3, 3",
    ),
    BadInput(
        "long sequence numbers",
        _changed(seq_idx=_numbers([[0] * 5] * 2, torch.int64)),
        TypeError,
        "seq_idx.*int32.*int64",
    ),
    BadInput("sequences of another shape", _changed(seq_idx=_numbers([[0] * 5])), ValueError, "seq_idx.*2, 5"),
    BadInput("unknown activation", _changed(activation="relu"), ValueError, "activation.*silu.*relu"),
    BadInput("unknown backend", _changed(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _triton_kernels():
    from mpkernels.convolution.depthwise_conv1d import triton

    return triton.compiled_kernels()


def _step(
    batch: int,
    channels: int,
    steps: int | None,
    taps: int,
    size: int,
    *,
    rows: list[int] | None = None,
    known: list[int] | None = None,
    state_last: bool = False,
    **settings,
):
    """Inputs of the update: ``rows`` of a larger state, ``known`` positions before in a circular one."""

    def make(dtype, device, generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        states = batch if rows is None else 2 * batch + 1
        state = normal(states, size, channels).transpose(1, 2) if state_last else normal(states, channels, size)
        arguments: Arguments = {
            "x": normal(batch, channels) if steps is None else normal(batch, channels, steps),
            "state": state,
            "weight": normal(channels, taps),
            "bias": normal(channels),
        }
        for name, values in (("state_indices", rows), ("cache_seqlens", known)):
            if values is not None:
                arguments[name] = torch.tensor(values, dtype=torch.int32, device=device)
        return arguments | settings

    return make


def _update(**arguments) -> tuple[Tensor, ...]:
    """The update of a copy of the state, which is returned too."""
    state = arguments["state"]
    if isinstance(state, Tensor):
        state = torch.empty_strided(state.shape, state.stride(), dtype=state.dtype, device=state.device).copy_(state)
    changed: Arguments = arguments | {"state": state}
    return api.depthwise_conv1d_update(**changed), state


def _eager_update(
    x, state, weight, bias=None, dilation=1, activation=None, cache_seqlens=None, state_indices=None
) -> tuple[Tensor, ...]:
    """As a generation loop without a kernel writes it, a row at a time."""
    steps = x if x.dim() == 3 else x[..., None]
    state, out = state.clone(), torch.zeros_like(steps)
    size = state.shape[2]
    for b in range(x.shape[0]):
        row = b if state_indices is None else int(state_indices[b])
        if row < 0:
            continue
        turn = 0 if cache_seqlens is None else int(cache_seqlens[b])
        past = state[row].roll(-turn, -1)
        joined = torch.cat([past, steps[b]], -1)
        reach = joined[:, size - (weight.shape[1] - 1) * dilation :]
        out[b] = functional.conv1d(reach[None], weight[:, None], bias, dilation=dilation, groups=len(weight))[0]
        state[row] = joined[:, steps.shape[2] :].roll(0 if cache_seqlens is None else turn + steps.shape[2], -1)
    out = functional.silu(out) if activation else out
    return (out if x.dim() == 3 else out[..., 0]), state


def _update_cost(arguments: Arguments, backward: bool) -> Cost:
    x, taps = arguments["x"], arguments["weight"].shape[1]
    return Cost(flops=x.numel() * (2 * taps + 30), bytes=(2 + taps) * x.numel() * x.element_size())


def _changed_step(**changes):
    return lambda dtype, device, generator: (
        _step(2, 3, None, 4, 3)(dtype, device, generator)
        | {name: value(device) if callable(value) else value for name, value in changes.items()}
    )


_WITHOUT_TRITON = {
    "reference": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "fibres": (torch.float32, torch.float64),
}

SPECS = (
    OpSpec(
        name="depthwise_conv1d",
        family="convolution",
        op=schema.FORWARD,
        function=_function,
        formula="silu(b + sum_k w_k x_{t - (K - 1 - k) dilation}), each channel by itself",
        differentiable=("x", "weight", "bias", "initial_state"),
        outputs=("out", "state"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            Workload(
                "2 x 1024 x 2048, 4 taps, silu",
                _depthwise(2, 1024, 2048, 4, activation="silu", return_state=False),
                1 << 22,
            ),
            Workload(
                "2 x 1024 x 2048, 4 taps, silu, channels last",
                _depthwise(2, 1024, 2048, 4, activation="silu", channels_last=True, return_state=False),
                1 << 22,
            ),
        ),
        eager=_eager,
        cost=_cost,
        triton_kernels=_triton_kernels,
        trained=("x", "weight", "bias"),
    ),
    OpSpec(
        name="depthwise_conv1d_update",
        family="convolution",
        op=schema.UPDATE,
        function=_update,
        formula="a step of depthwise_conv1d, with its state updated in place",
        differentiable=(),
        outputs=("out", "state"),
        cases=(
            Case("typical", _step(5, 40, None, 4, 3, activation="silu"), second_order=True),
            Case("longer state, few positions", _step(2, 17, 5, 4, 7, activation="silu"), second_order=True),
            Case("circular", _step(3, 9, 2, 4, 5, known=[0, 4, 1003], state_last=True), second_order=True),
            Case("rows of a cache", _step(4, 20, None, 3, 4, rows=[6, -1, 0, 3], state_last=True), second_order=True),
            Case("circular, dilated, rows", _step(2, 6, 3, 3, 9, known=[7, 2], rows=[1, 4], dilation=4)),
            Case("more positions than the state", _step(1, 3, 6, 3, 2, known=[1])),
            Case("one tap, no state", _step(2, 3, 2, 1, 0)),
            Case("no rows", _step(0, 3, None, 4, 3)),
        ),
        bad_inputs=(
            BadInput("x is no tensor", _changed_step(x=[1.0]), TypeError, "x.*Tensor.*list"),
            BadInput(
                "short state",
                _changed_step(state=lambda d: torch.zeros(2, 3, 2, device=d)),
                ValueError,
                "state.*at least 3",
            ),
            BadInput(
                "state of another batch",
                _changed_step(state=lambda d: torch.zeros(3, 3, 3, device=d)),
                ValueError,
                "state.*2, 3",
            ),
            BadInput(
                "double state",
                _changed_step(state=lambda d: torch.zeros(2, 3, 3, device=d).double()),
                TypeError,
                "state.*float64",
            ),
            BadInput(
                "long indices",
                _changed_step(state_indices=_numbers([0, 1], torch.int64)),
                TypeError,
                "state_indices.*int32",
            ),
            BadInput(
                "a gradient",
                _changed_step(weight=lambda d: torch.zeros(3, 4, device=d).requires_grad_()),
                ValueError,
                "weight.*gradient",
            ),
        ),
        workloads=(
            Workload("64 x 4096, 4 taps", _step(64, 4096, None, 4, 3, activation="silu"), 64 * 4096, backward=False),
        ),
        eager=_eager_update,
        cost=_update_cost,
        second_order=False,
        batched=False,
        dtypes=_WITHOUT_TRITON,
    ),
)
