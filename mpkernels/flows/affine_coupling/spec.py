"""Cases, workloads and cost of the affine coupling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.flows.affine_coupling import api, schema
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload


def _affine(
    *shape: int,
    mask: str = "none",  # "tensor" draws one, as large as a sample
    parity: int = 0,
    layout: str | None = None,
    parameters: tuple[tuple[int, ...], tuple[int, ...]] | None = None,  # shapes, where they are broadcast
    strided: bool = False,
    spread: float = 1.0,
    **settings,
):
    """Normal inputs and parameters: halves of one network's output, or all of it with a layout."""

    def make(dtype, device, generator):
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        if strided:
            x = normal(shape[0], *(2 * n for n in shape[1:]))[(slice(None), *(slice(None, None, 2) for _ in shape[1:]))]
        else:
            x = normal(*shape)
        channels = shape[1] if len(shape) > 1 else 1
        if mask == "channel":
            channels = (channels + 1) // 2 if parity else channels // 2
        h = (spread * normal(shape[0], 2 * channels, *shape[2:])).to(device, dtype)
        raw, shift = h[:, :channels], h[:, channels:]
        if len(shape) == 1 and layout is None:
            raw, shift = raw[:, 0], shift[:, 0]
        if parameters is not None:
            raw, shift = (normal(*sizes).to(device, dtype) for sizes in parameters)
        arguments: Arguments = {"x": x.to(device, dtype), "mask": mask, "parity": parity, **settings}
        if layout is not None:
            return arguments | {"log_scale_or_raw": h, "layout": layout}
        if mask == "tensor":
            arguments["mask"] = (normal(*shape[1:]) > 0).to(device)
        additive = settings.get("scale") == "additive"
        return arguments | {"log_scale_or_raw": None if additive else raw, "shift": shift}

    return make


def _eager(
    x,
    log_scale_or_raw,
    shift=None,
    scale="exp",
    mask="none",
    parity=0,
    inverse=False,
    layout=None,
    clamp=None,
    epsilon=0.0,
    shift_first=False,
) -> tuple[Tensor, Tensor]:
    """As a user writes it: chunks and a concatenation, or products with a mask of zeros and ones."""
    raw = log_scale_or_raw
    if layout is not None:
        first, second = (raw[:, 0::2], raw[:, 1::2]) if layout.endswith("interleaved") else raw.chunk(2, 1)
        raw, shift = (first, second) if layout.startswith("scale") else (second, first)
        if x.dim() == 1:
            raw, shift = raw[:, 0], shift[:, 0]
    if scale == "sigmoid":
        s = torch.sigmoid(raw + 2) + epsilon
        log_scale = torch.log(s)
    elif scale == "additive":
        log_scale, s = torch.zeros_like(x if mask != "channel" else shift), 1.0
    else:
        log_scale = {
            "exp": lambda: raw,
            "tanh": lambda: (1.0 if clamp is None else clamp) * torch.tanh(raw),
            "softclamp": lambda: (2.0 if clamp is None else clamp) * 0.636 * torch.atan(raw),
        }[scale]()
        s = torch.exp(log_scale)
    other, moved, b = None, x, None
    if isinstance(mask, str) and mask == "channel":
        other, moved = x.chunk(2, 1) if x.shape[1] > 1 else (x, x[:, :0])
        if parity:
            other, moved = moved, other
    elif not isinstance(mask, str):
        b = mask.to(x.dtype)
    elif mask == "checkerboard":
        h, w = x.shape[2:] if x.dim() == 4 else (1, x.shape[-1])
        index = torch.arange(h, device=x.device)[:, None] + torch.arange(w, device=x.device)
        b = ((index + parity) % 2).to(x.dtype)
        b = b if x.dim() == 4 else b[0]
    if inverse:
        y = moved / s - shift if shift_first else (moved - shift) / s
        log_scale = -log_scale
    else:
        y = (moved + shift) * s if shift_first else moved * s + shift
    log_scale = log_scale.expand_as(y)
    if b is not None:
        y, log_scale = b * x + (1 - b) * y, (1 - b) * log_scale
    elif other is not None:
        y = torch.cat([y, other] if parity else [other, y], 1)
    return y, log_scale.flatten(1).sum(1) if log_scale.dim() > 1 else log_scale


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes of x, the parameters and y; backward: also a gradient of each input. An exponential counts as 20."""
    x, raw, shift = arguments["x"], arguments.get("log_scale_or_raw"), arguments.get("shift")
    parameters = sum(p.numel() for p in (raw, shift) if p is not None)
    moved = parameters // (1 if arguments.get("scale") == "additive" else 2)
    elements = (3 * x.numel() + 2 * parameters) if backward else (2 * x.numel() + parameters)
    return Cost(flops=(40 if backward else 30) * moved, bytes=elements * x.element_size())


def _changed(**changes):
    return lambda dtype, device, generator: (
        _affine(2, 4, 3, 5)(dtype, device, generator)
        | {name: value(device) if callable(value) else value for name, value in changes.items()}
    )


def _zeros(*shape: int, dtype: torch.dtype = torch.float32):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


_GLOW = {"scale": "sigmoid", "mask": "channel", "layout": "shift_scale_interleaved", "shift_first": True}
_NFLOWS = {"scale": "sigmoid", "mask": "channel", "layout": "shift_scale", "epsilon": 1e-3}

_CASES = (
    # (interpreters run costly checks on the first of those for gradcheck)
    Case(
        "small checkerboard",
        _affine(2, 1, 2, 3, scale="sigmoid", mask="checkerboard", layout="scale_shift_interleaved"),
        second_order=True,
    ),
    Case(
        "small channels, inverse",
        _affine(2, 3, 1, 2, scale="softclamp", mask="channel", parity=1, inverse=True, clamp=1.5),
        second_order=True,
    ),
    Case(
        "small mask, inverse",
        _affine(2, 3, scale="sigmoid", mask="tensor", epsilon=0.1, shift_first=True, inverse=True),
        second_order=True,
    ),
    Case("typical", _affine(3, 8, 9, 7, mask="checkerboard", parity=1)),
    Case("Glow", _affine(2, 13, 6, 8, **_GLOW)),
    Case("nflows", _affine(21, 7, **_NFLOWS)),
    Case("FrEIA", _affine(2, 6, 5, 1, scale="softclamp", layout="scale_shift", inverse=True)),
    Case("NICE", _affine(3, 19, scale="additive", mask="channel", inverse=True)),
    Case("tanh, odd planes", _affine(2, 3, 5, 3, scale="tanh", mask="checkerboard", clamp=0.7, inverse=True)),
    Case("alternating", _affine(13, 9, scale="sigmoid", mask="checkerboard", inverse=True, spread=2.0)),
    Case("no dimension but the batch", _affine(9, mask="checkerboard", layout="shift_scale")),
    Case("five dimensions", _affine(2, 3, 2, 3, 5, mask="tensor", strided=True)),
    Case("broadcast", _affine(2, 6, 4, 5, scale="tanh", parameters=((6, 1, 1), (2, 1, 1, 5)))),
    Case("no samples", _affine(0, 4, 3, 3, **_GLOW)),
    Case("no elements", _affine(2, 0, mask="channel")),
    Case("many", _affine(2, 5, 75, 90, mask="checkerboard", scale="sigmoid", layout="shift_scale"), large=True),
)

_BAD = (
    BadInput("x is no tensor", _changed(x=[1.0]), TypeError, "x.*Tensor.*list"),
    BadInput("integer x", _changed(x=_zeros(2, 4, 3, 5, dtype=torch.int32)), TypeError, "x.*floating.*int32"),
    BadInput("x without dimensions", _changed(x=_zeros()), ValueError, r"x.*\(B, \.\.\.\)"),
    BadInput("unknown scale", _changed(scale="softplus"), ValueError, "scale.*'tanh'.*'softplus'"),
    BadInput("parity 2", _changed(parity=2), ValueError, "parity.*0 or 1.*2"),
    BadInput("unknown layout", _changed(layout="st"), ValueError, "layout.*'shift_scale'.*'st'"),
    BadInput("shift beside a layout", _changed(layout="shift_scale"), ValueError, "shift.*None with a layout"),
    BadInput("no shift", _changed(shift=None), ValueError, "shift.*layout.*None"),
    BadInput("no raw", _changed(log_scale_or_raw=None), TypeError, "log_scale_or_raw.*Tensor.*None"),
    BadInput("raw of additive", _changed(scale="additive"), ValueError, "log_scale_or_raw.*None.*additive"),
    BadInput(
        "odd channels of both",
        _changed(shift=None, layout="scale_shift"),
        ValueError,
        r"log_scale_or_raw.*\(2, 8, 3, 5\).*\(2, 4, 3, 5\)",
    ),
    BadInput("shift of another shape", _changed(shift=_zeros(2, 3, 3, 5)), ValueError, r"shift.*\(2, 4, 3, 5\).*2, 3"),
    BadInput("all channels of half", _changed(mask="channel"), ValueError, r"log_scale_or_raw.*\(2, 2, 3, 5\)"),
    BadInput("double shift", _changed(shift=_zeros(4, 1, 1, dtype=torch.float64)), TypeError, "shift.*float32.*64"),
    BadInput("unknown mask", _changed(mask="columns"), ValueError, "mask.*'checkerboard'.*'columns'"),
    BadInput("mask of numbers", _changed(mask=_zeros(4, 3, 5)), TypeError, "mask.*bool.*float32"),
    BadInput("mask of a list", _changed(mask=[True]), TypeError, "mask.*list"),
    BadInput("mask of another shape", _changed(mask=_zeros(3, 3, 5, dtype=torch.bool)), ValueError, "mask.*2, 4.*3, 3"),
    BadInput(
        "checkerboard of five dimensions",
        _changed(x=_zeros(2, 4, 3, 5, 1), mask="checkerboard"),
        ValueError,
        "mask.*4 dimensions.*2, 4, 3, 5, 1",
    ),
    BadInput("clamp of exp", _changed(clamp=1.0), ValueError, "clamp.*None.*'exp'"),
    BadInput("infinite clamp", _changed(scale="tanh", clamp=math.inf), ValueError, "clamp.*finite.*inf"),
    BadInput("clamp is no number", _changed(scale="tanh", clamp="1"), TypeError, "clamp.*number.*str"),
    BadInput("epsilon below 0", _changed(scale="sigmoid", epsilon=-1e-3), ValueError, "epsilon.*>= 0.*-0.001"),
    BadInput("epsilon of exp", _changed(epsilon=1e-3), ValueError, "epsilon.*sigmoid.*0.001"),
    BadInput("unknown backend", _changed(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _triton_kernels():
    from mpkernels.flows.affine_coupling import triton

    return triton.compiled_kernels()


SPECS = (
    OpSpec(
        name="affine_coupling",
        family="flows",
        op=schema.FORWARD,
        function=api.affine_coupling,
        formula="kept ? x : x e^l + t, and the sum of l",
        differentiable=("x", "log_scale_or_raw", "shift"),
        outputs=("y", "log_abs_det"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            Workload("Glow, 32 x 48 x 32 x 32", _affine(32, 48, 32, 32, **_GLOW), 32 * 48 * 32 * 32),
            Workload(
                "checkerboard, 32 x 48 x 32 x 32",
                _affine(32, 48, 32, 32, mask="checkerboard", layout="scale_shift"),
                32 * 48 * 32 * 32,
            ),
        ),
        eager=_eager,
        cost=_cost,
        triton_kernels=_triton_kernels,
        trained=("x", "log_scale_or_raw"),
    ),
)
