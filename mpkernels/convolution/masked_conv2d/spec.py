"""Cases, workloads and cost of the masked convolution and of the two stacks."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.convolution.masked_conv2d import api, schema
from mpkernels.convolution.masked_conv2d.mask import pixelcnn_mask
from mpkernels.spec import BadInput, Case, Cost, OpSpec, TritonKernel, Workload


def _made(
    batch: int,
    channels: int,
    filters: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    *,
    bias: bool = True,
    change=lambda arguments: None,
    **settings,
):
    """Normal values; ``change`` edits the arguments in place."""

    def make(dtype, device, generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        arguments = {"x": normal(batch, channels, *size), "weight": normal(filters, channels, *kernel)}
        if bias:
            arguments["bias"] = normal(filters)
        arguments |= settings
        change(arguments)
        return arguments

    return make


def _strided(arguments: dict) -> None:
    """Every second pixel of a larger picture with the channels last in memory; a transposed weight."""
    x, weight = arguments["x"], arguments["weight"]
    wide = x.repeat_interleave(2, 3).contiguous(memory_format=torch.channels_last)
    arguments["x"] = wide[..., ::2]
    arguments["weight"] = weight.transpose(0, 1).contiguous().transpose(0, 1)


def _expanded(arguments: dict) -> None:
    arguments["x"] = arguments["x"][:1, :, :1].expand_as(arguments["x"])
    arguments["bias"] = arguments["bias"][:1].expand_as(arguments["bias"])


def _nan_where_hidden(arguments: dict) -> None:
    """NaN in every hidden weight."""
    weight = arguments["weight"]
    filters, channels, kh, kw = weight.shape
    seen = pixelcnn_mask(kh, kw, filters, channels, arguments["mask_type"], arguments["colors"])
    arguments["weight"] = torch.where(seen.to(weight.device), weight, torch.nan)


_CASES = (
    Case("type A, one colour", _made(2, 1, 2, (3, 3), (3, 3), mask_type="A"), second_order=True),
    Case("type B, three colours", _made(1, 3, 6, (2, 3), (3, 3), mask_type="B", colors=3), second_order=True),
    Case(
        "strides and dilations",
        _made(1, 2, 4, (5, 4), (3, 3), bias=False, mask_type="A", colors=2, stride=(2, 1), dilation=(1, 2)),
        second_order=True,
    ),
    Case("MNIST's first layer", _made(2, 1, 20, (28, 28), (7, 7), mask_type="A"), large=True),
    Case("a picture's first layer", _made(2, 3, 30, (17, 17), (7, 7), mask_type="A", colors=3), large=True),
    Case("typical", _made(2, 32, 70, (16, 32), (5, 5), mask_type="B"), large=True),
    Case("typical, colours", _made(2, 33, 21, (17, 5), (3, 3), mask_type="B", colors=3)),
    Case("a 1 x 1 kernel", _made(3, 9, 12, (5, 9), (1, 1), mask_type="B", colors=3)),
    Case("a 1 x 1 kernel that sees nothing", _made(1, 2, 3, (3, 4), (1, 1), mask_type="A")),
    Case("dilation beyond the picture", _made(2, 3, 4, (5, 6), (5, 3), mask_type="B", dilation=(2, 7))),
    Case("a stride of three", _made(2, 6, 9, (11, 10), (3, 5), mask_type="B", colors=3, stride=3, dilation=2)),
    Case("one pixel", _made(3, 2, 4, (1, 1), (3, 3), mask_type="B")),
    Case("no pictures", _made(0, 2, 4, (5, 5), (3, 3), mask_type="B")),
    Case("no pixels", _made(2, 2, 4, (0, 5), (3, 3), mask_type="B")),
    Case("strided", _made(2, 6, 5, (6, 5), (3, 3), mask_type="B", change=_strided)),
    Case("expanded", _made(2, 3, 6, (6, 5), (3, 3), mask_type="A", colors=3, change=_expanded)),
    Case("NaN in hidden weights", _made(2, 6, 9, (6, 5), (3, 5), mask_type="A", colors=3, change=_nan_where_hidden)),
)

_VERTICAL = (
    Case("type A", _made(1, 1, 2, (3, 2), (3, 3), mask_type="A"), second_order=True),
    Case("type B", _made(2, 5, 8, (9, 7), (5, 3), mask_type="B")),
    Case("a stride and a dilation", _made(1, 4, 5, (8, 9), (3, 3), mask_type="B", stride=2, dilation=2)),
)

_HORIZONTAL = (
    Case("type A, small", _made(1, 1, 2, (2, 3), (1, 3), mask_type="A"), second_order=True),
    Case("type B", _made(2, 6, 9, (5, 21), (1, 7), mask_type="B", colors=3)),
    Case("one colour", _made(2, 4, 5, (3, 40), (1, 5), bias=False, mask_type="A", dilation=3)),
)


def _bad(**changes):
    """A good call, with arguments replaced; a function is called with the value that it replaces."""

    def make(dtype, device, generator):
        arguments = _made(2, 6, 9, (5, 7), (3, 3), mask_type="B")(dtype, device, generator)
        for name, value in changes.items():
            arguments[name] = value(arguments[name]) if callable(value) else value
        return arguments

    return make


_BAD = (
    BadInput("x is no tensor", _bad(x=[1.0]), TypeError, "x.*Tensor.*list"),
    BadInput("integer x", _bad(x=lambda x: x.long()), TypeError, "x.*floating.*int64"),
    BadInput("x of one picture", _bad(x=lambda x: x[0]), ValueError, r"x.*\(B, C, H, W\).*\(6, 5, 7\)"),
    BadInput("weight of another dtype", _bad(weight=lambda w: w.double()), TypeError, "weight.*float32.*float64"),
    BadInput("weight of other channels", _bad(weight=lambda w: w[:, :5]), ValueError, r"weight.*C = 6.*\(9, 5, 3, 3\)"),
    BadInput("an even kernel", _bad(weight=lambda w: w[..., :2]), ValueError, r"weight.*odd.*\(9, 6, 3, 2\)"),
    BadInput("bias of another size", _bad(bias=lambda b: b[:8]), ValueError, r"bias.*\(9,\).*\(8,\)"),
    BadInput("another mask type", _bad(mask_type="a"), ValueError, "mask_type.*'A' or 'B'.*'a'"),
    BadInput("channels of x in 4 colours", _bad(colors=4), ValueError, "x: .*4 equal blocks.*6"),
    BadInput("filters in 2 colours", _bad(colors=2), ValueError, "weight: .*2 equal blocks.*9"),
    BadInput("no colours", _bad(colors=0), ValueError, "colors.*1 or more.*0"),
    BadInput("a stride of 0", _bad(stride=(1, 0)), ValueError, "stride.*1 or more.*0"),
    BadInput("three dilations", _bad(dilation=(1, 1, 1)), ValueError, "dilation.*one number.*1, 1, 1"),
    BadInput("a dilation that is no number", _bad(dilation=1.5), TypeError, "dilation.*whole number.*float"),
    BadInput("unknown backend", _bad(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _masked(x, weight, bias, seen: Tensor, stride, dilation) -> tuple[Tensor]:
    """The line that users write: the whole convolution with a weight that is masked."""
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    padding = tuple(size // 2 * d for size, d in zip(weight.shape[2:], dilations, strict=True))
    masked = weight * seen.to(x.device, x.dtype)
    return (torch.nn.functional.conv2d(x, masked, bias, stride, padding, dilation),)


def _eager(x, weight, mask_type, bias=None, colors=1, stride=1, dilation=1):
    filters, channels, kh, kw = weight.shape
    return _masked(x, weight, bias, pixelcnn_mask(kh, kw, filters, channels, mask_type, colors), stride, dilation)


def _eager_vertical(x, weight, mask_type, bias=None, stride=1, dilation=1):
    kh = weight.shape[2]
    seen = torch.arange(kh) < kh // 2 + (mask_type == "B")
    return _masked(x, weight, bias, seen[:, None], stride, dilation)


def _weights(arguments, vertical: bool) -> int:
    """How many weights are seen."""
    filters, channels, kh, kw = arguments["weight"].shape
    inclusive = arguments["mask_type"] == "B"
    if vertical:
        return filters * channels * (kh // 2 + inclusive) * kw
    mask = pixelcnn_mask(kh, kw, filters, channels, arguments["mask_type"], arguments.get("colors", 1))
    return int(mask.sum())


def _cost(vertical: bool):
    def cost(arguments, backward: bool) -> Cost:
        x, weight = arguments["x"], arguments["weight"]
        strides = arguments.get("stride", 1)
        step_y, step_x = (strides, strides) if isinstance(strides, int) else strides
        pixels = x.shape[0] * -(-x.shape[2] // step_y) * -(-x.shape[3] // step_x)
        seen = _weights(arguments, vertical)
        moved = x.numel() + pixels * weight.shape[0] + seen
        # backward reads x, weight and the gradient of out, and writes those of x and weight
        flops = 2 * pixels * seen * (2 if backward else 1)
        return Cost(flops=flops, bytes=(moved + (x.numel() + seen if backward else 0)) * x.element_size())

    return cost


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.convolution.masked_conv2d import triton

    return triton.kernels_to_compile()


_PIXELS = 8 * 32 * 32

SPECS = (
    OpSpec(
        name="masked_conv2d",
        family="convolution",
        op=schema.FORWARD,
        function=lambda **arguments: (api.masked_conv2d(**arguments),),
        formula="sum of seen w x",
        differentiable=("x", "weight", "bias"),
        outputs=("out",),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            Workload("5x5 B, 64 to 128, 32x32", _made(8, 64, 128, (32, 32), (5, 5), mask_type="B"), _PIXELS),
            Workload(
                "5x5 B, 66 to 132, 3 colours", _made(8, 66, 132, (32, 32), (5, 5), mask_type="B", colors=3), _PIXELS
            ),
            Workload("7x7 A, 1 to 64, 28x28", _made(16, 1, 64, (28, 28), (7, 7), mask_type="A"), 16 * 28 * 28),
        ),
        eager=_eager,
        cost=_cost(vertical=False),
        triton_kernels=_triton_kernels,
        fastest_on_cuda="triton",
        trained=("x", "weight", "bias"),
    ),
    OpSpec(
        name="vertical_stack",
        family="convolution",
        op=schema.FORWARD,
        function=lambda **arguments: (api.vertical_stack(**arguments),),
        formula="sum of w x above",
        differentiable=("x", "weight", "bias"),
        outputs=("out",),
        cases=_VERTICAL,
        bad_inputs=(
            BadInput(
                "an even kernel", _bad(weight=lambda w: w[..., :2, :]), ValueError, r"weight.*odd.*\(9, 6, 2, 3\)"
            ),
            BadInput("no mask type", _bad(mask_type=None), ValueError, "mask_type.*'A' or 'B'.*None"),
        ),
        workloads=(Workload("3x3 B, 64 to 128, 32x32", _made(8, 64, 128, (32, 32), (3, 3), mask_type="B"), _PIXELS),),
        eager=_eager_vertical,
        cost=_cost(vertical=True),
        fastest_on_cuda="triton",
        trained=("x", "weight", "bias"),
    ),
    OpSpec(
        name="horizontal_stack",
        family="convolution",
        op=schema.FORWARD,
        function=lambda **arguments: (api.horizontal_stack(**arguments),),
        formula="sum of w x to the left",
        differentiable=("x", "weight", "bias"),
        outputs=("out",),
        cases=_HORIZONTAL,
        bad_inputs=(
            BadInput("a kernel of three rows", _bad(), ValueError, r"weight.*\(D, C, 1, kw\).*\(9, 6, 3, 3\)"),
        ),
        workloads=(Workload("1x3 B, 64 to 128, 32x32", _made(8, 64, 128, (32, 32), (1, 3), mask_type="B"), _PIXELS),),
        eager=_eager,
        cost=_cost(vertical=False),
        fastest_on_cuda="triton",
        trained=("x", "weight", "bias"),
    ),
)
