"""Cases, workloads and cost of the spline coupling."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from mpkernels.flows.spline_coupling import api, schema
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload


def _spline(
    *shape: int,
    bins: int = 8,
    spread: float = 1.0,
    reach: float = 1.2,  # of x, in intervals
    channels_first: bool = False,  # whether parameters come as a convolution's output
    low: bool = False,
    change=lambda x, parameters: (x, parameters),
    **settings,
):
    """Uniform x, normal parameters; ``change`` makes them strided or expanded, or puts something in."""

    def make(dtype, device, generator):
        bound = settings.get("tail_bound", 3.0) * reach
        x = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound
        number = 3 * bins - 1
        raw_shape = (shape[0], shape[1] * number, *shape[2:]) if channels_first else (*shape, number)
        raw = torch.randn(raw_shape, generator=generator, dtype=torch.float64) * spread
        arguments: Arguments = dict(
            zip(("x", "parameters"), change(x.to(device, dtype), raw.to(device, dtype)), strict=True)
        )
        if low:
            arguments["low"] = torch.full_like(arguments["x"], 2.0**-30)
        return arguments | ({"parameters_dim": 1} if channels_first else {}) | settings

    return make


def _at_edges(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """X on the bounds, on the middle knot of bins that are all alike, and far outside with NaN in the parameters."""
    x, parameters = x.clone(), parameters.clone()
    x[..., :5] = torch.tensor([-3.0, 3.0, 0.0, 40.0, -math.inf], dtype=x.dtype, device=x.device)
    parameters[..., 2, :] = 0.0
    parameters[..., 3:5, :] = math.nan
    return x, parameters


def _eager(
    x,
    parameters,
    tail_bound=3.0,
    inverse=False,
    min_bin_width=1e-3,
    min_bin_height=1e-3,
    min_derivative=1e-3,
    parameters_dim=-1,
    low=None,
) -> tuple[Tensor, ...]:
    """As a user writes it: every knot, searchsorted, the paper's equations."""
    if parameters_dim == 1:
        parameters = parameters.unflatten(1, (x.shape[1], -1)).movedim(2, -1)
    if low is not None:
        x = x + low
    bins = (parameters.shape[-1] + 1) // 3
    raw_w, raw_h, raw_d = parameters.split([bins, bins, bins - 1], -1)
    inside = x.abs() <= tail_bound

    def knots(raw, least):
        sizes = least + (1 - least * bins) * functional.softmax(raw, -1)
        edges = functional.pad(sizes.cumsum(-1), (1, 0)) * 2 * tail_bound - tail_bound
        return torch.cat([edges[..., :-1], torch.full_like(edges[..., -1:], tail_bound)], -1)

    xs, ys = knots(raw_w, min_bin_width), knots(raw_h, min_bin_height)
    ds = functional.pad(min_derivative + functional.softplus(raw_d), (1, 1), value=1.0)
    at = torch.where(inside, x, 0.0)[..., None]
    k = torch.searchsorted((ys if inverse else xs)[..., 1:-1].contiguous(), at.contiguous(), right=True)
    x0, x1, y0, y1, d0, d1 = (table.gather(-1, index)[..., 0] for table in (xs, ys, ds) for index in (k, k + 1))
    at = at[..., 0]
    s = (y1 - y0) / (x1 - x0)
    if inverse:
        rest = (at - y0) * (d1 + d0 - 2 * s)
        a, b, c = (y1 - y0) * (s - d0) + rest, (y1 - y0) * d0 - rest, -s * (at - y0)
        theta = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
        out = theta * (x1 - x0) + x0
    else:
        theta = (at - x0) / (x1 - x0)
        out = y0 + (y1 - y0) * (s * theta**2 + d0 * theta * (1 - theta)) / (s + (d1 + d0 - 2 * s) * theta * (1 - theta))
    slope = d1 * theta**2 + 2 * s * theta * (1 - theta) + d0 * (1 - theta) ** 2
    log = 2 * s.log() + slope.log() - 2 * (s + (d1 + d0 - 2 * s) * theta * (1 - theta)).log()
    log = torch.where(inside, -log if inverse else log, 0.0)
    return torch.where(inside, out, x), log.flatten(1).sum(1)


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: x and parameters read, y written; backward those and the gradient of y read, both gradients written."""
    x, parameters = arguments["x"], arguments["parameters"]
    numbers = 3 * x.numel() + 2 * parameters.numel() if backward else 2 * x.numel() + parameters.numel()
    flops = parameters.numel() * (25 if backward else 15) + x.numel() * (150 if backward else 60)
    return Cost(flops=flops, bytes=numbers * x.element_size())


def _changed(**changes):
    return lambda dtype, device, generator: (
        _spline(2, 3, bins=4)(dtype, device, generator)
        | {name: value(device) if callable(value) else value for name, value in changes.items()}
    )


def _strided(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, ::2], parameters[:, ::2]


def _expanded(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    return x[:1].expand_as(x), parameters[:, :1].expand_as(parameters)


_CASES = (
    # (interpreters run costly checks on the first of those for gradcheck)
    Case("small", _spline(2, 3, bins=3, reach=1.4), second_order=True),
    Case("small, inverse, channels", _spline(1, 2, 2, bins=2, channels_first=True, inverse=True), second_order=True),
    Case("typical", _spline(5, 64)),
    Case("typical, inverse", _spline(5, 64, inverse=True)),
    Case("two bins, three dimensions", _spline(2, 5, 61, bins=2, tail_bound=1.0)),
    Case("32 bins", _spline(2, 19, bins=32, tail_bound=10.0, inverse=True)),
    Case("channels first", _spline(2, 3, 5, 4, bins=5, channels_first=True, min_bin_width=1e-2)),
    Case("channels first, inverse", _spline(2, 3, 4, 16, channels_first=True, inverse=True, min_derivative=1e-2)),
    Case("one element a row", _spline(70, bins=4)),
    Case("on knots and bounds, NaN outside", _spline(2, 9, bins=4, change=_at_edges)),
    Case("on knots and bounds, NaN outside, inverse", _spline(2, 9, bins=4, change=_at_edges, inverse=True)),
    Case("all outside", _spline(2, 20, reach=0.0, change=lambda x, parameters: (x + 5.0, parameters))),
    Case("strided, with low", _spline(3, 14, bins=3, low=True, change=_strided)),
    Case("expanded", _spline(4, 6, bins=6, change=_expanded)),
    Case("no rows", _spline(0, 3)),
    Case("many", _spline(3, 4, 1500, channels_first=True), large=True),
)

_BAD = (
    BadInput("x is no tensor", _changed(x=[1.0]), TypeError, "x.*Tensor.*list"),
    BadInput("x without dimensions", _changed(x=lambda d: torch.zeros((), device=d)), ValueError, r"x.*\(B, ...\)"),
    BadInput("double parameters", _changed(parameters=lambda d: torch.zeros(2, 3, 11).double().to(d)), TypeError, "64"),
    BadInput(
        "other rows", _changed(parameters=lambda d: torch.zeros(1, 3, 11, device=d)), ValueError, "parameters.*2, 3"
    ),
    BadInput(
        "one bin", _changed(parameters=lambda d: torch.zeros(2, 3, 2, device=d)), ValueError, "parameters.*K >= 2"
    ),
    BadInput("12 numbers", _changed(parameters=lambda d: torch.zeros(2, 3, 12, device=d)), ValueError, "3 K - 1.*12"),
    BadInput(
        "channels of a convolution",
        _changed(parameters=lambda d: torch.zeros(2, 34, device=d), parameters_dim=1),
        ValueError,
        r"parameters.*C \(3 K - 1\).*2, 34",
    ),
    BadInput("dimension 2", _changed(parameters_dim=2), ValueError, "parameters_dim.*-1 or 1.*2"),
    BadInput("tail_bound 0", _changed(tail_bound=0.0), ValueError, "tail_bound.*above 0.*0"),
    BadInput("endless interval", _changed(tail_bound=math.inf), ValueError, "tail_bound.*finite.*inf"),
    BadInput("wide bins", _changed(min_bin_width=0.25), ValueError, "min_bin_width.*1 / K.*0.25"),
    BadInput("high bins", _changed(min_bin_height=0.3), ValueError, "min_bin_height.*1 / K.*0.3"),
    BadInput("slope 1", _changed(min_derivative=1.0), ValueError, "min_derivative.*below 1.*1"),
    BadInput("bound in words", _changed(tail_bound="3"), TypeError, "tail_bound.*number.*str"),
    BadInput("short low", _changed(low=lambda d: torch.zeros(2, 2, device=d)), ValueError, "low.*2, 3.*2, 2"),
    BadInput("unknown backend", _changed(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

SPECS = (
    OpSpec(
        name="spline_coupling",
        family="flows",
        op=schema.FORWARD,
        function=api.spline_coupling,
        formula="y_k + h (s a^2 + d_k a (1 - a)) / (s + (d_k+1 + d_k - 2 s) a (1 - a)), a = (x - x_k) / w",
        differentiable=("x", "parameters"),
        outputs=("y", "log_abs_det"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            Workload("262,144 elements, 8 bins", _spline(4096, 64), 1 << 18),
            Workload("262,144 elements, 8 bins, inverse", _spline(4096, 64, inverse=True), 1 << 18),
            Workload(
                "16 x 64 x 16 x 16, 8 bins, channels first", _spline(16, 64, 16, 16, channels_first=True), 1 << 18
            ),
        ),
        eager=_eager,
        cost=_cost,
        dtypes={
            "reference": _FLOATING,
            "cpu": _FLOATING,
            "cuda": _FLOATING,
            "fibres": (torch.float32, torch.float64),
        },
    ),
)
