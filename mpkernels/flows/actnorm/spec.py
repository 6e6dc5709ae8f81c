"""Cases, workloads and cost of ActNorm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.flows.actnorm import api, schema
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload


def _actnorm(*shape: int, channels_last: bool = False, strided: bool = False, spread: float = 0.5, **settings):
    """Normal inputs and parameters; ``strided`` takes every second number of the last dimension."""

    def make(dtype, device, generator):
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        x = normal(*shape[:-1], shape[-1] * 2 if strided else shape[-1]).to(device, dtype)
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        arguments: Arguments = {
            "x": x[..., ::2] if strided else x,
            "bias": normal(shape[1]).to(device, dtype),
            "log_scale": (spread * normal(shape[1])).to(device, dtype),
        }
        return arguments | settings

    return make


def _eager(x, bias, log_scale, inverse=False, shift_first=True) -> tuple[Tensor, ...]:
    """As flows are written in torch."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    shift, scale = bias.view(shape), log_scale.exp().view(shape)
    log_abs_det = (log_scale.sum() * math.prod(x.shape[2:])).repeat(x.shape[0])
    if inverse:
        return (x / scale - shift if shift_first else (x - shift) / scale), -log_abs_det
    return ((x + shift) * scale if shift_first else x * scale + shift), log_abs_det


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: x read, y written; backward also reads the gradient."""
    x = arguments["x"]
    return Cost(flops=(5 if backward else 2) * x.numel(), bytes=(3 if backward else 2) * x.numel() * x.element_size())


def _changed(**changes):
    return lambda dtype, device, generator: (
        _actnorm(2, 3, 5)(dtype, device, generator)
        | {name: value(device) if callable(value) else value for name, value in changes.items()}
    )


def _triton_kernels():
    from mpkernels.flows.actnorm import triton

    return triton.compiled_kernels()


SPECS = (
    OpSpec(
        name="actnorm",
        family="flows",
        op=schema.FORWARD,
        function=api.actnorm,
        formula="(x + bias) e^log_scale, log_abs_det = S sum log_scale",
        differentiable=("x", "bias", "log_scale"),
        outputs=("y", "log_abs_det"),
        cases=(
            Case("small", _actnorm(2, 3, 2, 2), second_order=True),
            Case("small, features, inverse, scale first", _actnorm(3, 2, inverse=True, shift_first=False), True),
            Case("small, channels last, scale first", _actnorm(1, 2, 3, channels_last=True, shift_first=False), True),
            Case("typical", _actnorm(2, 12, 8, 9)),
            Case("inverse", _actnorm(2, 5, 33, inverse=True)),
            Case("channels last", _actnorm(2, 19, 5, 7, channels_last=True)),
            Case("channels last, inverse", _actnorm(2, 16, 40, channels_last=True, inverse=True, shift_first=False)),
            Case("features", _actnorm(37, 21)),
            Case("features, many samples", _actnorm(700, 5, inverse=True, shift_first=False), large=True),
            Case("one channel", _actnorm(2, 1, 123, shift_first=False)),
            Case("strided", _actnorm(2, 3, 17, strided=True)),
            Case("strided features", _actnorm(4, 17, strided=True, inverse=True)),
            Case("no samples", _actnorm(0, 3, 5)),
            Case("no channels", _actnorm(2, 0, 5)),
            Case("no positions", _actnorm(2, 3, 0)),
            Case("many", _actnorm(2, 9, 70, 71, spread=0.1), large=True),
        ),
        bad_inputs=(
            BadInput("x is no tensor", _changed(x=[1.0]), TypeError, "x.*Tensor.*list"),
            BadInput("x of one dimension", _changed(x=lambda d: torch.zeros(3, device=d)), ValueError, r"x.*\(B, C, "),
            BadInput("integer x", _changed(x=lambda d: torch.zeros(2, 3, device=d).long()), TypeError, "x.*int64"),
            BadInput("other channels", _changed(bias=lambda d: torch.zeros(4, device=d)), ValueError, r"bias.*\(3,\)"),
            BadInput(
                "matrix as log_scale",
                _changed(log_scale=lambda d: torch.zeros(3, 1, device=d)),
                ValueError,
                "log_scale.*3, 1",
            ),
            BadInput(
                "double log_scale",
                _changed(log_scale=lambda d: torch.zeros(3, device=d).double()),
                TypeError,
                "log_scale.*float32.*float64",
            ),
            BadInput("unknown backend", _changed(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
        ),
        workloads=(Workload("64 x 48 x 16 x 16", _actnorm(64, 48, 16, 16), 64),),
        eager=_eager,
        cost=_cost,
        triton_kernels=_triton_kernels,
        fastest_on_cuda="triton",
        dtypes=dict.fromkeys(
            ("reference", "cpu", "triton"), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        ),
    ),
)
