"""Cases, workloads and cost of the invertible 1x1 convolution, with a matrix and with its parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.flows.invertible_conv1x1 import api, schema
from mpkernels.flows.invertible_conv1x1.matrix import PLU
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload

_PARTS = ("permutation", "lower", "upper", "sign", "log_scale")


def _mix(
    *shape: int,
    parts: bool = False,
    bias: bool = True,
    channels_last: bool = False,
    strided: bool = False,
    hidden: float = 0.0,  # what stands outside the strict triangles of the parts
    **settings,
):
    """Normal inputs, and a matrix near a rotation, or the parts of one."""

    def make(dtype, device, generator):
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        channels = shape[1]
        x = normal(*shape[:-1], shape[-1] * 2 if strided else shape[-1]).to(device, dtype)
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        arguments: Arguments = {"x": x[..., ::2] if strided else x}
        if parts:
            below = torch.ones(channels, channels, dtype=torch.bool).tril(-1)
            triangle = 0.3 * normal(channels, channels)
            arguments |= {
                "permutation": torch.randperm(channels, generator=generator).to(device),
                "lower": torch.where(below, triangle, hidden).to(device, dtype),
                "upper": torch.where(below.T, triangle, hidden).to(device, dtype),
                "sign": normal(channels).sign().to(device, dtype),
                "log_scale": (0.3 * normal(channels)).to(device, dtype),
            }
        else:
            rotation = torch.linalg.qr(normal(channels, channels)).Q
            arguments["weight"] = (rotation + 0.1 * torch.eye(channels)).to(device, dtype)
        if bias:
            arguments["bias"] = normal(channels).to(device, dtype)
        return arguments | settings

    return make


def _function(x, weight=None, bias=None, inverse=False, backend=None, **parts) -> tuple[Tensor, ...]:
    """The parts of a matrix as arguments, so that tools see their gradients."""
    return api.invertible_conv1x1(x, PLU(**parts) if parts else weight, bias, inverse=inverse, backend=backend)  # pyright: ignore


def _eager(x, weight=None, bias=None, inverse=False, **parts) -> tuple[Tensor, ...]:
    """As flows are written in torch; the parts as Glow has them."""
    if parts:
        permutation, lower, upper, sign, log_scale = (parts[name] for name in _PARTS)
        identity = torch.eye(x.shape[1], dtype=lower.dtype, device=x.device)
        weight = identity[permutation] @ (lower.tril(-1) + identity) @ (upper.triu(1) + (sign * log_scale.exp()).diag())
        log_abs_det = log_scale.sum()
    else:
        assert weight is not None
        log_abs_det = torch.linalg.slogdet(weight)[1]
    positions = math.prod(x.shape[2:])
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    if inverse:
        flat = flat if bias is None else flat - bias[:, None]
        y, log_abs_det = torch.linalg.inv(weight) @ flat, -log_abs_det
    else:
        y = torch.nn.functional.conv1d(flat, weight[..., None], bias)
    return y.reshape(x.shape), (log_abs_det * positions).repeat(x.shape[0])


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: x read, y written; backward also reads the gradient. A multiply-add counts as 2."""
    x = arguments["x"]
    return Cost(
        flops=(2 if backward else 1) * 2 * x.shape[1] * x.numel(),
        bytes=(3 if backward else 2) * x.numel() * x.element_size(),
    )


def _changed(make=None, **changes):
    return lambda dtype, device, generator: (
        (make or _mix(2, 3, 5))(dtype, device, generator)
        | {name: value(device) if callable(value) else value for name, value in changes.items()}
    )


_BAD = (
    BadInput("x is no tensor", _changed(x=[1.0]), TypeError, "x.*Tensor.*list"),
    BadInput("x of one dimension", _changed(x=lambda d: torch.zeros(3, device=d)), ValueError, r"x.*\(B, C, "),
    BadInput("weight is no tensor", _changed(weight=[1.0]), TypeError, "weight.*Tensor.*list"),
    BadInput("other channels", _changed(weight=lambda d: torch.eye(4, device=d)), ValueError, r"weight.*3, 3.*4, 4"),
    BadInput("double weight", _changed(weight=lambda d: torch.eye(3, device=d).double()), TypeError, "weight.*float64"),
    BadInput("bias of another size", _changed(bias=lambda d: torch.zeros(4, device=d)), ValueError, r"bias.*\(3,\)"),
    BadInput(
        "no permutation",
        _changed(_mix(2, 3, 5, parts=True), permutation=lambda d: torch.tensor([0, 2, 2], device=d)),
        ValueError,
        r"permutation.*once.*\[0, 2, 2\]",
    ),
    BadInput(
        "a matrix of a permutation",
        _changed(_mix(2, 3, 5, parts=True), permutation=lambda d: torch.eye(3, device=d)),
        TypeError,
        "permutation.*int64.*float32",
    ),
    BadInput(
        "short log_scale",
        _changed(_mix(2, 3, 5, parts=True), log_scale=lambda d: torch.zeros(2, device=d)),
        ValueError,
        r"log_scale.*\(3,\).*\(2,\)",
    ),
    BadInput("unknown backend", _changed(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)

SPECS = (
    OpSpec(
        name="invertible_conv1x1",
        family="flows",
        op=schema.FORWARD,
        function=_function,
        formula="W x + bias at every position, log_abs_det = S log |det W|",
        differentiable=("x", "weight", "bias", "lower", "upper", "log_scale"),
        outputs=("y", "log_abs_det"),
        cases=(
            Case("small", _mix(2, 3, 2, 2), second_order=True),
            Case("small, parts, inverse", _mix(1, 2, 3, parts=True, inverse=True), second_order=True),
            Case("features, parts", _mix(3, 2, parts=True, bias=False), second_order=True),
            Case("typical", _mix(2, 12, 8, 9, bias=False)),
            Case("parts, NaN where nothing is read", _mix(2, 7, 33, parts=True, hidden=float("nan"))),
            Case("inverse", _mix(2, 20, 70, inverse=True)),
            Case("channels last", _mix(2, 19, 5, 7, channels_last=True)),
            Case("features", _mix(70, 21)),
            Case("strided", _mix(2, 5, 17, strided=True)),
            Case("one channel", _mix(2, 1, 123)),
            Case("no samples", _mix(0, 3, 5)),
            Case("no channels", _mix(2, 0, 5)),
            Case("no positions", _mix(2, 3, 0, parts=True)),
            Case("many", _mix(3, 48, 16, 16, parts=True), large=True),
            Case("many channels", _mix(2, 100, 130), large=True),
        ),
        bad_inputs=_BAD,
        workloads=(
            Workload("64 x 48 x 16 x 16", _mix(64, 48, 16, 16), 64),
            Workload("64 x 48 x 16 x 16, parts", _mix(64, 48, 16, 16, parts=True), 64),
        ),
        eager=_eager,
        cost=_cost,
        trained=("x", "weight", "bias", "lower", "upper", "log_scale"),
        dtypes=dict.fromkeys(("reference", "cpu"), (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    ),
)
