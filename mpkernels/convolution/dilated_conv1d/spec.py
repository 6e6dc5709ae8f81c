"""Cases, workloads and cost of the dilated convolution over time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mpkernels.convolution.dilated_conv1d import api, schema
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, TritonKernel, Workload


def _convolution(return_state: bool | None = None, **arguments) -> tuple[Tensor, ...]:
    """The op with its state; that of a centred convolution is empty."""
    causal = arguments.get("causal", True)
    found = api.dilated_conv1d(**arguments, return_state=causal if return_state is None else return_state)
    if isinstance(found, tuple):
        return found
    return (found,) if return_state is False else (found, found.new_empty((0,)))


def _sequences(
    batch: int,
    channels: int,
    outputs: int,
    length: int,
    taps: int,
    *,
    bias: bool = True,
    state: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    change: Callable[[Arguments], None] | None = None,
    **settings,
):
    """Normal values; ``layout`` changes strides of x, not its values."""

    def make(dtype, device, generator):
        groups = settings.get("groups", 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        arguments: Arguments = {
            "x": normal(batch, channels, length),
            "weight": normal(outputs, channels // groups, taps) / math.sqrt(channels // groups * taps),
        }
        if bias:
            arguments["bias"] = normal(outputs)
        if state:
            arguments["initial_state"] = normal(batch, channels, (taps - 1) * settings.get("dilation", 1))
        if change is not None:
            change(arguments)
        arguments = {name: x.to(device, dtype) for name, x in arguments.items()}
        arguments["x"] = layout(arguments["x"])
        return arguments | settings

    return make


def channels_last(x: Tensor) -> Tensor:
    """(B, T, C) in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(x: Tensor) -> Tensor:
    """Every second position and sequence of a larger tensor."""
    return x.repeat_interleave(2, 0).repeat_interleave(2, 2)[::2, :, ::2]


def part_of_more_channels(x: Tensor) -> Tensor:
    """Channels 1 to C + 1 of C + 3, positions contiguous."""
    return torch.cat([x[:, :1], x, x[:, :1], x[:, :1]], dim=1)[:, 1 : x.shape[1] + 1]


def _nan_before_the_sequence(arguments: Arguments) -> None:
    """NaN and Inf in taps that read nothing but what lies before the sequence."""
    arguments["weight"][..., 0] = math.nan
    arguments["weight"][..., 1] = math.inf


_CASES = (
    Case("small", _sequences(2, 2, 3, 4, 2), second_order=True),
    Case("small, state, wide apart", _sequences(1, 2, 3, 3, 3, state=True, dilation=2), second_order=True),
    Case(
        "small, centred, silu, groups",
        _sequences(1, 4, 2, 5, 3, causal=False, groups=2, activation="silu"),
        second_order=True,
    ),
    Case("typical", _sequences(2, 32, 48, 100, 2, dilation=4)),
    Case("one tap", _sequences(2, 17, 5, 9, 1, bias=False)),
    Case("odd sizes", _sequences(3, 5, 17, 123, 5, dilation=7)),
    Case("one input channel, swish", _sequences(2, 1, 3, 70, 3, activation="swish")),
    Case("shorter than the receptive field", _sequences(2, 3, 5, 9, 3, dilation=7)),
    Case("dilation 512", _sequences(1, 3, 4, 600, 2, dilation=512, bias=False)),
    Case("dilation 512, state", _sequences(1, 3, 4, 40, 2, dilation=512, state=True)),
    Case("groups", _sequences(2, 6, 4, 33, 3, dilation=2, groups=2, state=True)),
    Case("channels last", _sequences(2, 17, 24, 70, 3, dilation=2, state=True, layout=channels_last)),
    Case("strided", _sequences(2, 3, 5, 21, 2, layout=every_second)),
    Case("part of more channels", _sequences(2, 5, 6, 21, 2, layout=part_of_more_channels)),
    Case("centred", _sequences(2, 5, 6, 70, 5, causal=False, dilation=7)),
    Case("NaN that reads nothing", _sequences(1, 3, 4, 5, 4, dilation=3, change=_nan_before_the_sequence)),
    Case("no positions", _sequences(2, 3, 4, 0, 3, state=True)),
    Case("no sequences", _sequences(0, 3, 4, 5, 2)),
    Case("many", _sequences(2, 70, 130, 700, 2, dilation=64), large=True),
    Case("many, channels last", _sequences(1, 66, 64, 650, 3, dilation=5, layout=channels_last), large=True),
)


def _bad(**changes):
    """A good call of 4 channels in, 6 out, 3 taps, with arguments that are replaced (by a function of the tensor)."""

    def make(dtype, device, generator):
        arguments = _sequences(2, 4, 6, 10, 3)(dtype, device, generator)
        for name, change in changes.items():
            arguments[name] = change(arguments.get(name)) if callable(change) else change
        return arguments

    return make


_BAD = (
    BadInput("x is no tensor", _bad(x=lambda x: x.tolist()), TypeError, "x.*Tensor.*list"),
    BadInput("integer x", _bad(x=lambda x: x.long()), TypeError, "x.*floating.*int64"),
    BadInput("x of two dimensions", _bad(x=lambda x: x[0]), ValueError, r"x.*\(B, C, T\).*\(4, 10\)"),
    BadInput("no channels", _bad(x=lambda x: x[:, :0]), ValueError, r"x.*one channel.*\(2, 0, 10\)"),
    BadInput("weight of another dtype", _bad(weight=lambda w: w.double()), TypeError, "weight.*float32.*float64"),
    BadInput("weight of another device", _bad(weight=lambda w: w.to("meta")), ValueError, "weight.*device.*meta"),
    BadInput("weight of two dimensions", _bad(weight=lambda w: w[0]), ValueError, r"weight.*\(D, 4, K\).*\(4, 3\)"),
    BadInput("other channels", _bad(weight=lambda w: w[:, :3]), ValueError, r"weight.*\(D, 4, K\).*\(6, 3, 3\)"),
    BadInput("no taps", _bad(weight=lambda w: w[..., :0]), ValueError, r"weight.*K at least 1.*\(6, 4, 0\)"),
    BadInput("no outputs", _bad(weight=lambda w: w[:0]), ValueError, r"weight.*D and K at least 1.*\(0, 4, 3\)"),
    BadInput("groups that do not divide channels", _bad(groups=3), ValueError, "groups.*divisor.*4 channels.*3"),
    BadInput(
        "groups that do not divide outputs",
        _bad(weight=lambda w: w[:, :1], groups=4),
        ValueError,
        "groups.*divisor.*6 outputs.*4",
    ),
    BadInput("groups 0", _bad(groups=0), ValueError, "groups.*from 1.*0"),
    BadInput("bias too long", _bad(bias=lambda b: b.repeat(2)), ValueError, r"bias.*\(6,\).*\(12,\)"),
    BadInput("bias of another dtype", _bad(bias=lambda b: b.half()), TypeError, "bias.*float32.*float16"),
    BadInput("dilation 0", _bad(dilation=0), ValueError, "dilation.*from 1.*0"),
    BadInput("dilation a float", _bad(dilation=2.0), TypeError, "dilation.*integer.*float"),
    BadInput("dilation past 32 bits", _bad(dilation=2**31), ValueError, "dilation.*2147483647.*2147483648"),
    BadInput(
        "state of the wrong size",
        _bad(initial_state=torch.zeros(2, 4, 3), dilation=2),
        ValueError,
        r"initial_state.*\(2, 4, 4\).*\(2, 4, 3\)",
    ),
    BadInput("state of another dtype", _bad(initial_state=torch.zeros(2, 4, 2).double()), TypeError, "initial_state"),
    BadInput("state of no tensor", _bad(initial_state=0.0), TypeError, "initial_state.*Tensor.*float"),
    BadInput(
        "centred, even width", _bad(weight=lambda w: w[..., :2], causal=False), ValueError, r"weight.*odd.*\(6, 4, 2\)"
    ),
    BadInput(
        "centred with a state",
        _bad(initial_state=torch.zeros(2, 4, 2), causal=False),
        ValueError,
        "initial_state.*causal=False",
    ),
    BadInput("centred, state returned", _bad(return_state=True, causal=False), ValueError, "return_state.*causal"),
    BadInput("activation unknown", _bad(activation="relu"), ValueError, "activation.*'silu'.*'relu'"),
    BadInput(
        "seq_idx of a dense convolution",
        _bad(seq_idx=torch.zeros(2, 10, dtype=torch.int32)),
        ValueError,
        "seq_idx.*depthwise.*groups 1",
    ),
    BadInput("unknown backend", _bad(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _sized(channels: int, outputs: int, dilation: int, length: int = 16_000, **settings):
    return _sequences(1, channels, outputs, length, 2, dilation=dilation, return_state=False, **settings)


_WORKLOADS = (
    Workload("64 -> 128, K2 T16000, dilation 1", _sized(64, 128, 1), 16_000),
    Workload("64 -> 128, K2 T16000, dilation 512", _sized(64, 128, 512), 16_000),
    Workload("128 -> 256, K2 T16000, dilation 1", _sized(128, 256, 1), 16_000),
    Workload("128 -> 256, K2 T16000, dilation 512", _sized(128, 256, 512), 16_000),
    Workload("64 -> 128, K2 T16000, dilation 512, channels last", _sized(64, 128, 512, layout=channels_last), 16_000),
    Workload("call overhead: 8 -> 8, K2 T8", _sized(8, 8, 1, 8), 8),
)


def _eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    groups: int = 1,
    causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = True,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """What users write: torch's convolution of a padded copy."""
    left = (weight.shape[2] - 1) * dilation
    functional = torch.nn.functional
    if causal:
        padded = functional.pad(x, (left, 0)) if initial_state is None else torch.cat([initial_state, x], dim=2)
    else:
        padded = functional.pad(x, (left // 2, left // 2))
    out = functional.conv1d(padded, weight, bias, dilation=dilation, groups=groups)
    if activation is not None:
        out = functional.silu(out)
    if not return_state:
        return (out,)
    return out, padded[:, :, padded.shape[2] - left :] if causal else out.new_empty((0,))


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: each input read once, each output written once. Operations: of taps that meet a position.

    Backward, the products are those of the forward twice: for the gradient of x and for that of the weights.
    """
    x, weight = arguments["x"], arguments["weight"]
    batch, _, length = x.shape
    outputs, width, taps = weight.shape
    dilation, state = arguments.get("dilation", 1), arguments.get("initial_state")
    left = (taps - 1) * dilation if arguments.get("causal", True) else (taps - 1) // 2 * dilation
    before = 0 if state is None else left
    met = sum(
        max(0, min(length, length - shift) - max(0, -before - shift))
        for shift in (k * dilation - left for k in range(taps))
    )
    flops = 2 * batch * outputs * width * met
    inputs = x.numel() + weight.numel() + outputs + (0 if state is None else state.numel())
    out = batch * outputs * length
    if backward:
        return Cost(2 * flops, (2 * inputs + out) * x.element_size())
    return Cost(flops, (inputs + out) * x.element_size())


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.convolution.dilated_conv1d import triton

    return triton.kernels_to_compile()


SPECS = (
    OpSpec(
        name="dilated_conv1d",
        family="convolution",
        op=schema.FORWARD,
        function=_convolution,
        formula="out_t = bias + sum_k weight_k x_(t + (k - K + 1) dilation)",
        differentiable=("x", "weight", "bias", "initial_state"),
        outputs=("out", "state"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=_WORKLOADS,
        eager=_eager,
        cost=_cost,
        triton_kernels=_triton_kernels,
        fastest_on_cuda="triton",
        trained=("x", "weight", "bias"),
    ),
)
