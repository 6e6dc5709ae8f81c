"""Cases, workloads and cost of MADE's layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mpkernels.convolution.masked_linear import api, schema
from mpkernels.spec import BadInput, Case, Cost, OpSpec, TritonKernel, Workload

Degrees = Callable[[int, torch.Generator], Tensor]


def _function(*, mask: Tensor | None = None, **arguments) -> tuple[Tensor, ...]:
    """The op; ``mask`` is what plain torch multiplies with, made once, as implementations of MADE keep it."""
    del mask
    return (api.masked_linear(**arguments),)


def _eager(x, weight, bias, in_degrees, out_degrees, strict=False, mask=None) -> tuple[Tensor, ...]:
    if mask is None:
        inputs, outputs = in_degrees[None, :], out_degrees[:, None]
        mask = (inputs < outputs if strict else inputs <= outputs).to(weight.dtype)
    return (F.linear(x, weight * mask, bias),)


def _drawn(most: int) -> Degrees:
    return lambda size, generator: torch.randint(0, most + 1, (size,), generator=generator)


def _each(value: int) -> Degrees:
    return lambda size, generator: torch.full((size,), value)


def _rising(size: int, generator: torch.Generator) -> Tensor:
    del generator
    return torch.arange(size)


def _case(
    *lead: int,
    inputs: int,
    outputs: int,
    degrees: tuple[Degrees, Degrees],
    strict: bool = False,
    bias: bool = True,
    poison: bool = False,
    strided: bool = False,
    keep_mask: bool = False,
):
    """Normal values, weights of size 1 / sqrt(inputs); ``poison`` puts NaN and infinity where nothing is to be read."""

    def make(dtype, device, generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x = normal(*lead, inputs)
        weight = normal(outputs, inputs) / max(inputs, 1) ** 0.5
        in_degrees, out_degrees = (d(size, generator) for d, size in zip(degrees, (inputs, outputs), strict=True))
        below = torch.lt if strict else torch.le
        visible = below(in_degrees[None, :], out_degrees[:, None])
        if poison:
            weight[~visible] = torch.nan
            weight[:, ::2][~visible[:, ::2]] = torch.inf
            x[..., ~visible.any(dim=0)] = torch.nan
        if strided:
            x = x.repeat_interleave(2, -1)[..., ::2]
            weight = weight.T.contiguous().T
        arguments = {
            "x": x.to(device, dtype),
            "weight": weight.to(device, dtype),
            "bias": normal(outputs).to(device, dtype) if bias else None,
            "in_degrees": in_degrees.to(device),
            "out_degrees": out_degrees.to(device),
            "strict": strict,
        }
        if keep_mask:
            arguments["mask"] = visible.to(device, dtype)
        return arguments

    return make


_MIXED = (_drawn(6), _drawn(6))

_CASES = (
    Case("small", _case(2, inputs=3, outputs=4, degrees=(_drawn(2), _drawn(2))), second_order=True),
    Case(
        "small, strict, no bias",
        _case(2, inputs=4, outputs=3, degrees=(_rising, _drawn(4)), strict=True, bias=False),
        second_order=True,
    ),
    Case("typical", _case(33, inputs=40, outputs=70, degrees=(_rising, _drawn(39)))),
    Case("odd sizes, strict", _case(5, inputs=123, outputs=60, degrees=(_drawn(70), _rising), strict=True)),
    Case("one of each", _case(1, inputs=1, outputs=1, degrees=(_each(0), _each(0)))),
    Case("one row, five inputs", _case(1, inputs=5, outputs=17, degrees=_MIXED)),
    Case("one output", _case(5, inputs=123, outputs=1, degrees=(_drawn(122), _each(60)))),
    Case("few degrees", _case(18, inputs=50, outputs=40, degrees=(_drawn(3), _drawn(3)))),
    Case("leading dimensions", _case(2, 3, 5, inputs=17, outputs=5, degrees=_MIXED, strict=True)),
    Case("no leading dimension", _case(inputs=17, outputs=5, degrees=_MIXED)),
    Case("nothing is visible", _case(5, inputs=17, outputs=18, degrees=(_each(3), _each(3)), strict=True, poison=True)),
    Case("everything is visible", _case(17, inputs=20, outputs=33, degrees=(_each(3), _each(3)))),
    Case(
        "NaN in what is hidden",
        _case(19, inputs=40, outputs=37, degrees=(_drawn(30), _drawn(25)), strict=True, poison=True),
    ),
    Case("strided", _case(6, inputs=17, outputs=19, degrees=_MIXED, strided=True)),
    Case("no rows, no inputs", _case(0, 2, inputs=0, outputs=3, degrees=_MIXED)),
    Case("large", _case(530, inputs=140, outputs=300, degrees=(_drawn(12), _drawn(12))), large=True),
)


def _bad(**changes):
    """A good call of 3 inputs and 2 outputs, with arguments that are replaced (by a function of the tensor)."""

    def make(dtype, device, generator):
        arguments = _case(4, inputs=3, outputs=2, degrees=_MIXED)(dtype, device, generator)
        for name, change in changes.items():
            arguments[name] = change(arguments.get(name)) if callable(change) else change
        return arguments

    return make


_BAD = (
    BadInput("x is no tensor", _bad(x=lambda x: x.tolist()), TypeError, "x.*Tensor.*list"),
    BadInput("integer x", _bad(x=lambda x: x.long()), TypeError, "x.*floating.*int64"),
    BadInput("x without a dimension", _bad(x=lambda x: x[0, 0]), ValueError, r"x.*\(\.\.\., I\).*\(\)"),
    BadInput("weight of another dtype", _bad(weight=lambda w: w.double()), TypeError, "weight.*float32.*float64"),
    BadInput("weight on another device", _bad(weight=lambda w: w.to("meta")), ValueError, "weight.*device.*meta"),
    BadInput("weight transposed", _bad(weight=lambda w: w.T), ValueError, r"weight.*\(O, 3\).*\(3, 2\)"),
    BadInput("bias too long", _bad(bias=lambda b: b.repeat(2)), ValueError, r"bias.*\(2,\).*\(4,\)"),
    BadInput("bias is no tensor", _bad(bias=1.0), TypeError, "bias.*Tensor.*float"),
    BadInput("degrees are a list", _bad(in_degrees=[0, 1, 2]), TypeError, "in_degrees.*Tensor.*list"),
    BadInput("degrees are floats", _bad(in_degrees=lambda d: d.float()), TypeError, "in_degrees.*integers.*float32"),
    BadInput("degrees are bool", _bad(out_degrees=lambda d: d > 0), TypeError, "out_degrees.*integers.*bool"),
    BadInput("too few degrees", _bad(in_degrees=lambda d: d[:2]), ValueError, r"in_degrees.*\(3,\).*\(2,\)"),
    BadInput("degrees exchanged", _bad(out_degrees=lambda d: d.repeat(2)), ValueError, r"out_degrees.*\(2,\).*\(4,\)"),
    BadInput("degrees on another device", _bad(out_degrees=lambda d: d.to("meta")), ValueError, "out_degrees.*meta"),
    BadInput("a degree below 0", _bad(in_degrees=lambda d: d - 7), ValueError, "in_degrees.*at least 0.*-"),
    BadInput("strict is an integer", _bad(strict=1), TypeError, "strict.*bool.*int"),
    BadInput("unknown backend", _bad(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _made(inputs: int, outputs: int, degrees: tuple[Degrees, Degrees], strict: bool = False):
    return _case(256, inputs=inputs, outputs=outputs, degrees=degrees, strict=strict, keep_mask=True)


def _mixed_order(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)


_HIDDEN = _drawn(782)
_WORKLOADS = (
    Workload("784 to 2000, batch 256", _made(784, 2000, (_rising, _HIDDEN)), 256),
    Workload("2000 to 2000, batch 256", _made(2000, 2000, (_HIDDEN, _HIDDEN)), 256),
    Workload("2000 to 784, strict, batch 256", _made(2000, 784, (_HIDDEN, _rising), True), 256),
    Workload("784 in a random order to 2000, batch 256", _made(784, 2000, (_mixed_order, _HIDDEN)), 256),
    Workload("call overhead: 8 to 8, batch 1", _case(1, inputs=8, outputs=8, degrees=_MIXED, keep_mask=True), 1),
)


def _cost(arguments: dict, backward: bool) -> Cost:
    """Operations: of the weights that count alone. Bytes: each of those, and each other number, moved once."""
    x, weight = arguments["x"], arguments["weight"]
    inputs, outputs = arguments["in_degrees"][None, :], arguments["out_degrees"][:, None]
    visible = int((inputs < outputs if arguments.get("strict", False) else inputs <= outputs).sum())
    rows = x.numel() // max(x.shape[-1], 1)
    y = rows * weight.shape[0]
    if backward:  # two products; x, weight and the gradient of y read, the gradients of x and of all weights written
        moved = 2 * x.numel() + visible + weight.numel() + y
        return Cost(4 * rows * visible, moved * x.element_size())
    return Cost(2 * rows * visible, (x.numel() + visible + y) * x.element_size())


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.convolution.masked_linear import triton

    return triton.kernels_to_compile()


SPECS = (
    OpSpec(
        name="masked_linear",
        family="convolution",
        op=schema.FORWARD,
        function=_function,
        formula="y_o = b_o + sum of w_oi x_i over the inputs whose degree is at most (strict: below) that of o",
        differentiable=("x", "weight", "bias"),
        outputs=("y",),
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
