"""Cases, workloads and cost of WaveNet's layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mpkernels.convolution.gated_residual_layer import api, eager, schema
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, TritonKernel, Workload

_TENSORS = (
    "x",
    "weight",
    "bias",
    "residual_weight",
    "residual_bias",
    "skip_weight",
    "skip_bias",
    "condition",
    "condition_weight",
    "global_condition",
    "global_weight",
    "initial_state",
)


def _layer(return_state: bool = True, **arguments) -> tuple[Tensor, ...]:
    """The op with its state; an output that it does not have is empty."""
    found = api.gated_residual_layer(**arguments, return_state=return_state)
    nothing = arguments["x"][:, :0]
    outputs = [nothing if out is None else out for out in (found.residual, found.skip)]
    return (*outputs, found.state) if found.state is not None else tuple(outputs)


def _sized(
    batch: int,
    channels: int,
    gates: int,
    skips: int,
    length: int,
    taps: int = 2,
    *,
    residual: bool = True,
    biases: bool = True,
    local: int = 0,
    of_all: int = 0,
    state: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    condition_layout: Callable[[Tensor], Tensor] | None = None,
    change: Callable[[Arguments], None] | None = None,
    **settings,
):
    """Normal values for R, G, S; ``local`` and ``of_all`` are channels of conditions; ``layout`` changes strides."""

    def make(dtype, device, generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        arguments: Arguments = {
            "x": normal(batch, channels, length),
            "weight": normal(2 * gates, channels, taps) / math.sqrt(channels * taps),
        }
        if biases:
            arguments["bias"] = normal(2 * gates)
        for name, rows in (("residual", channels if residual else 0), ("skip", skips)):
            if rows:
                arguments[f"{name}_weight"] = normal(rows, gates) / math.sqrt(gates)
                if biases:
                    arguments[f"{name}_bias"] = normal(rows)
        if local:
            arguments["condition"] = normal(batch, local, length)
            arguments["condition_weight"] = normal(2 * gates, local) / math.sqrt(local)
        if of_all:
            arguments["global_condition"] = normal(batch, of_all)
            arguments["global_weight"] = normal(2 * gates, of_all) / math.sqrt(of_all)
        if state:
            arguments["initial_state"] = normal(batch, channels, (taps - 1) * settings.get("dilation", 1))
        if change is not None:
            change(arguments)
        arguments = {name: x.to(device, dtype) for name, x in arguments.items()}
        arguments["x"] = layout(arguments["x"])
        if local:
            arguments["condition"] = (condition_layout or layout)(arguments["condition"])
        return arguments | settings

    return make


def channels_last(x: Tensor) -> Tensor:
    """(B, T, C) in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(x: Tensor) -> Tensor:
    """Every second position and sequence of a larger tensor."""
    return x.repeat_interleave(2, 0).repeat_interleave(2, 2)[::2, :, ::2]


def _nan_before_the_sequence(arguments: Arguments) -> None:
    """NaN and Inf in taps that read nothing but what lies before the sequence."""
    arguments["weight"][..., 0] = math.nan
    arguments["weight"][..., 1] = math.inf


def _far(arguments: Arguments) -> None:
    """Sums of about 1e3 of either sign, where tanh and sigmoid are flat."""
    arguments["weight"] = arguments["weight"] * 1e3


_CASES = (
    Case("small", _sized(1, 2, 1, 2, 3, dilation=2, residual_scale=0.5), second_order=True),
    Case("small, conditions, state", _sized(2, 1, 2, 1, 2, local=1, of_all=2, state=True), second_order=True),
    Case("small, skip alone", _sized(1, 2, 1, 1, 3, 3, residual=False, biases=False, local=2), second_order=True),
    Case("typical", _sized(2, 32, 32, 48, 100, dilation=4, local=20, of_all=8)),
    Case("one tap, residual alone", _sized(2, 5, 7, 0, 19, 1, biases=False)),
    Case("odd sizes", _sized(3, 5, 17, 3, 123, 5, dilation=7, local=3, residual_scale=math.sqrt(0.5))),
    Case("one channel of each", _sized(1, 1, 1, 1, 70, 3)),
    Case("shorter than the receptive field", _sized(2, 3, 4, 5, 9, 3, dilation=7, of_all=3)),
    Case("dilation 512", _sized(1, 3, 4, 5, 600, dilation=512)),
    Case("dilation 512, state", _sized(1, 3, 4, 5, 40, dilation=512, state=True)),
    Case("channels last", _sized(2, 17, 16, 24, 70, 3, dilation=2, state=True, local=5, layout=channels_last)),
    Case("condition channels last", _sized(2, 8, 9, 4, 67, local=18, condition_layout=channels_last)),
    Case("strided", _sized(2, 3, 5, 4, 21, local=2, layout=every_second)),
    Case("NaN that reads nothing", _sized(1, 3, 4, 5, 5, 4, dilation=3, change=_nan_before_the_sequence)),
    Case("far from zero", _sized(1, 4, 6, 5, 33, biases=False, change=_far)),
    Case("no positions", _sized(2, 3, 4, 5, 0, 3, state=True, local=2)),
    Case("no sequences", _sized(0, 3, 4, 5, 6, local=2, of_all=2)),
    Case("many", _sized(2, 64, 66, 70, 600, dilation=64, local=17, of_all=3), large=True),
    Case("many, channels last", _sized(1, 66, 64, 60, 550, 3, dilation=5, layout=channels_last), large=True),
)


def _bad(**changes):
    """A good call with both conditions, with arguments that are replaced (by a function of the tensor)."""

    def make(dtype, device, generator):
        arguments = _sized(2, 4, 3, 5, 10, local=2, of_all=6)(dtype, device, generator)
        for name, change in changes.items():
            arguments[name] = change(arguments.get(name)) if callable(change) else change
        return arguments

    return make


_BAD = (
    BadInput("x is no tensor", _bad(x=1.0), TypeError, "x.*Tensor.*float"),
    BadInput("x of two dimensions", _bad(x=lambda x: x[0]), ValueError, r"x.*\(B, C, T\).*\(4, 10\)"),
    BadInput("odd rows of weight", _bad(weight=lambda w: w[:5], bias=None), ValueError, r"weight.*even.*\(5, 4, 2\)"),
    BadInput("other channels", _bad(weight=lambda w: w[:, :3]), ValueError, r"weight.*\(D, 4, K\).*\(6, 3, 2\)"),
    BadInput("bias too long", _bad(bias=torch.zeros(7)), ValueError, r"bias.*\(6,\).*\(7,\)"),
    BadInput("dilation 0", _bad(dilation=0), ValueError, "dilation.*from 1.*0"),
    BadInput(
        "state of the wrong size",
        _bad(initial_state=torch.zeros(2, 4, 2), dilation=3),
        ValueError,
        r"initial_state.*\(2, 4, 3\).*\(2, 4, 2\)",
    ),
    BadInput(
        "no projection",
        _bad(residual_weight=None, residual_bias=None, skip_weight=None, skip_bias=None),
        ValueError,
        "residual_weight.*skip_weight.*None",
    ),
    BadInput(
        "residual of other channels",
        _bad(residual_weight=torch.zeros(5, 3)),
        ValueError,
        r"residual_weight.*\(4, 3\).*\(5, 3\)",
    ),
    BadInput(
        "skip of other gates", _bad(skip_weight=torch.zeros(5, 6)), ValueError, r"skip_weight.*\(S, 3\).*\(5, 6\)"
    ),
    BadInput("skip without rows", _bad(skip_weight=torch.zeros(0, 3)), ValueError, r"skip_weight.*one row.*\(0, 3\)"),
    BadInput("skip of another dtype", _bad(skip_weight=lambda w: w.double()), TypeError, "skip_weight.*float64"),
    BadInput("bias of no residual", _bad(residual_weight=None), ValueError, "residual_bias.*without residual_weight"),
    BadInput("skip_bias too long", _bad(skip_bias=torch.zeros(6)), ValueError, r"skip_bias.*\(5,\).*\(6,\)"),
    BadInput(
        "condition without weight", _bad(condition_weight=None), ValueError, "condition_weight.*condition is given"
    ),
    BadInput("weight without condition", _bad(global_condition=None), ValueError, "global_condition.*global_weight is"),
    BadInput(
        "condition too short", _bad(condition=lambda c: c[..., :9]), ValueError, r"condition.*\(2, 2, 10\).*\(2, 2, 9\)"
    ),
    BadInput(
        "condition of one sequence",
        _bad(condition=lambda c: c[:1]),
        ValueError,
        r"condition.*\(2, 2, 10\).*\(1, 2, 10\)",
    ),
    BadInput(
        "global condition over time",
        _bad(global_condition=torch.zeros(2, 6, 10)),
        ValueError,
        r"global_condition.*\(2, 6\).*\(2, 6, 10\)",
    ),
    BadInput(
        "condition_weight of other channels",
        _bad(condition_weight=torch.zeros(6, 3)),
        ValueError,
        r"condition_weight.*\(6, 2\).*\(6, 3\)",
    ),
    BadInput("integer condition", _bad(condition=lambda c: c.long()), TypeError, "condition.*float32.*int64"),
    BadInput("residual_scale a string", _bad(residual_scale="1"), TypeError, "residual_scale.*number.*str"),
    BadInput("residual_scale NaN", _bad(residual_scale=math.nan), ValueError, "residual_scale.*finite.*nan"),
    BadInput("unknown backend", _bad(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _wavenet(length: int = 16_000, **settings):
    """nv-wavenet's "Medium": 64 channels, 64 gates, 128 skip channels."""
    return _sized(1, 64, 64, 128, length, return_state=False, **settings)


_WORKLOADS = (
    Workload("R64 S128 T16000, dilation 1", _wavenet(dilation=1), 16_000),
    Workload("R64 S128 T16000, dilation 512", _wavenet(dilation=512), 16_000),
    Workload("R64 S128 T16000, dilation 16, condition of 80", _wavenet(dilation=16, local=80), 16_000),
    Workload("R64 S128 T16000, dilation 16, channels last", _wavenet(dilation=16, layout=channels_last), 16_000),
    Workload("call overhead: R64 S128 T1, state", _wavenet(1, dilation=1, state=True), 1),
)


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: each input read once, each output written once; gates are read by the backward. Operations: products.

    Forward 2 (2 G R K + 2 G A + P G) a position; backward each product twice, for its two factors, and 60 for a gate.
    """
    x, weight = arguments["x"], arguments["weight"]
    batch, channels, length = x.shape
    gates, _, taps = weight.shape
    rows = sum(arguments[name].shape[0] for name in ("residual_weight", "skip_weight") if name in arguments)
    local = arguments["condition"].shape[1] if "condition" in arguments else 0
    positions = batch * length
    products = 2 * (gates * channels * taps + gates * local + rows * (gates // 2))
    inputs = sum(arguments[name].numel() for name in _TENSORS if name in arguments)
    outputs = positions * rows
    size = x.element_size()
    if backward:
        kept = positions * gates * max(size, 4)
        return Cost(positions * (2 * products + 30 * gates), (2 * inputs + outputs) * size + kept)
    return Cost(positions * (products + 30 * gates), (inputs + outputs) * size)


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.convolution.gated_residual_layer import triton

    return triton.kernels_to_compile()


SPECS = (
    OpSpec(
        name="gated_residual_layer",
        family="convolution",
        op=schema.FORWARD,
        function=_layer,
        formula="residual = scale (x + P tanh(filter) sigmoid(gate)), skip = Q tanh(filter) sigmoid(gate)",
        differentiable=_TENSORS,
        outputs=("residual", "skip", "state"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=_WORKLOADS,
        eager=eager.gated_residual_layer,
        cost=_cost,
        triton_kernels=_triton_kernels,
        fastest_on_cuda="triton",
        trained=_TENSORS,
    ),
)
