"""The dilated convolution over time in Triton: launches, block sizes, and the specialisations of the compile gates.

The kernels, with formulas and decomposition, are in :mod:`triton_kernels`. ``convolve``, ``weight_gradient`` and
``channel_sums`` also serve the gated layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks, library
from mpkernels.convolution.dilated_conv1d import schema
from mpkernels.convolution.dilated_conv1d import triton_kernels as kernels
from mpkernels.spec import TritonKernel

# (BLOCK_O, BLOCK_T, BLOCK_C, warps, stages) by kernel and bytes of an element; fewer channels take smaller blocks.
# Chosen by registers: an accumulator of 128 x 128 is 64 registers a thread of 8 warps; products of float32 are made by
# fused multiply-adds of numbers that threads hold, so their tiles are smaller. What kernels_to_compile names spills
# nothing. No GPU has measured them yet.
_BLOCKS = {
    ("taps", 2): (128, 64, 64, 8, 3),
    ("taps", 4): (64, 64, 16, 4, 2),
    ("taps", 8): (32, 32, 16, 4, 1),
    ("weight", 2): (128, 32, 64, 4, 3),
    ("weight", 4): (64, 16, 64, 8, 2),
    ("weight", 8): (32, 16, 32, 4, 1),
}
_SUM_BLOCKS = (16, 128)  # channels and positions of the sums over time
_PIECES_BLOCK = 256
_PROGRAMS = 1024  # that a sum over positions is cut into, about: several a multiprocessor
_INTERPRETED = 16  # the least that a product of tiles takes: small inputs still have several blocks


def padded(size: int) -> int:
    """The least power of two that a product of tiles takes and that is not below ``size``."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def cut(size: int, block: int) -> int:
    """How many blocks a size has."""
    return -(-size // block)


def blocks_of(kernel: str, element_size: int, outputs: int, inputs: int) -> tuple[dict[str, int], dict[str, int]]:
    """The blocks of a kernel, and its launch options."""
    block_o, block_t, block_c, warps, stages = _BLOCKS[kernel, element_size]
    if library.triton_interpreted():
        block_o, block_t, block_c = _INTERPRETED, 2 * _INTERPRETED, _INTERPRETED
    block_o, block_c = min(block_o, padded(outputs)), min(block_c, padded(inputs))
    if block_o < 64 or block_c < 32:
        warps = min(warps, 4)
    return {"BLOCK_O": block_o, "BLOCK_T": block_t, "BLOCK_C": block_c}, {"num_warps": warps, "num_stages": stages}


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What sums run in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def parts(x: float) -> tuple[float, float]:
    """A number as float32 and the rest: a float argument travels as float32."""
    narrow = float(numpy.float32(x))
    return narrow, x - narrow


def strides(x: Tensor | None, dimensions: int = 3) -> tuple[int, ...]:
    """Strides of the first dimensions; 0 for a missing tensor."""
    return (0,) * dimensions if x is None else x.stride()[:dimensions]


def launch(kernel, on: Tensor, programs: int, *arguments, **settings) -> None:
    """Starts a grid on the device of ``on``."""
    if programs == 0:
        return
    checks.programs("dilated_conv1d", programs)
    with torch.cuda.device_of(on):
        kernel[(programs,)](*arguments, **settings)


def convolve(
    source: Tensor,
    weight: Tensor,
    out: Tensor | None,
    *,
    history: Tensor | None = None,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    early: Tensor | None = None,
    dilation: int = 1,
    groups: int = 1,
    left: int = 0,
    transposed: bool = False,
    scale: float = 1.0,
    scaled: str = "",
) -> None:
    """Writes the convolution of ``source`` with ``weight`` (D, C / groups, K), or its transpose, to ``out``.

    ``early`` (B, ., n) takes the n positions before the first of ``out``. ``scaled`` says what ``scale`` multiplies:
    "" nothing, "added" what is added, "sum" all.
    """
    total, inputs, taps = weight.shape
    outputs = total // groups
    packed = weight if taps == 1 else weight.permute(2, 0, 1).contiguous()  # a tap's weights beside each other
    weight_first, weight_out, weight_in, weight_tap = 0, inputs, 1, total * inputs
    if transposed:
        weight_first, weight_out, weight_in, weight_tap = (taps - 1) * weight_tap, 1, inputs, -weight_tap
        inputs, outputs, left = outputs, inputs, (taps - 1) * dilation - left
    begin = 0 if early is None else -early.shape[2]
    end = 0 if out is None else out.shape[2]
    blocks, options = blocks_of("taps", source.element_size(), outputs, inputs)
    launch(
        kernels.dilated_conv1d_taps,
        source,
        source.shape[0] * groups * cut(outputs, blocks["BLOCK_O"]) * cut(end - begin, blocks["BLOCK_T"]),
        source,
        history,
        packed,
        bias,
        added,
        out,
        early,
        *strides(source),
        *strides(history, 2),
        weight_first,
        weight.shape[1] * weight.shape[0] // groups,
        weight_out,
        weight_in,
        weight_tap,
        *strides(added),
        *strides(out),
        *strides(early, 2),
        begin,
        end,
        source.shape[2],
        0 if history is None else history.shape[2],
        left,
        dilation,
        taps,
        groups,
        inputs,
        outputs,
        *parts(scale),
        HAS_HISTORY=history is not None,
        HAS_BIAS=bias is not None,
        HAS_ADDED=added is not None,
        HAS_OUT=out is not None,
        HAS_EARLY=early is not None,
        SCALE=scaled,
        COMPUTE=compute_type(source.dtype),
        **blocks,
        **options,
    )


def _pieces(units: int, programs: int) -> tuple[int, int]:
    """(pieces, units a piece) of a sum that ``programs`` programs a piece share: by the sizes alone, not the device."""
    pieces = max(min(_PROGRAMS // max(programs, 1), cut(units, 2)), 1)
    each = cut(units, pieces)
    return cut(units, max(each, 1)), each


def _add_pieces(workspace: Tensor, out: Tensor, taps: int, scale: float) -> None:
    """The sums of a workspace (pieces, taps, ...) to a contiguous ``out`` (..., taps)."""
    launch(
        kernels.dilated_conv1d_pieces,
        out,
        cut(out.numel(), _PIECES_BLOCK),
        workspace,
        out,
        out.numel(),
        taps,
        workspace.shape[0],
        *parts(scale),
        BLOCK=_PIECES_BLOCK,
        COMPUTE=compute_type(out.dtype),
    )


def _wide(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def weight_gradient(
    grad: Tensor,
    source: Tensor,
    history: Tensor | None,
    out: Tensor,
    dilation: int = 1,
    groups: int = 1,
    left: int = 0,
    scale: float = 1.0,
) -> None:
    """Writes the gradient of the weight (D, C / groups, K), times ``scale``, to a contiguous ``out``."""
    total, inputs, taps = out.shape
    outputs = total // groups
    batch, _, length = source.shape
    blocks, options = blocks_of("weight", source.element_size(), outputs, inputs)
    programs = cut(outputs, blocks["BLOCK_O"]) * cut(inputs, blocks["BLOCK_C"]) * taps * groups
    pieces, each = _pieces(batch * cut(length, blocks["BLOCK_T"]), programs)
    workspace = _wide(source, pieces, taps, total, inputs)
    launch(
        kernels.dilated_conv1d_weight,
        source,
        programs * pieces,
        grad,
        source,
        history,
        workspace,
        *strides(grad),
        *strides(source),
        *strides(history, 2),
        batch,
        length,
        0 if history is None else history.shape[2],
        left,
        dilation,
        taps,
        groups,
        inputs,
        outputs,
        each,
        HAS_HISTORY=history is not None,
        COMPUTE=compute_type(source.dtype),
        **blocks,
        **options,
    )
    _add_pieces(workspace, out, taps, scale)


def channel_sums(grad: Tensor, out: Tensor, segments: int = 1, scale: float = 1.0) -> None:
    """Writes sums of ``grad`` (B, D, T) over time, times ``scale``: each sequence's (B segments) or all together."""
    batch, channels, length = grad.shape
    block_o, block_t = _SUM_BLOCKS
    if library.triton_interpreted():
        block_t = 2 * _INTERPRETED
    batches = batch // max(segments, 1)
    programs = cut(channels, block_o) * segments
    pieces, each = _pieces(batches * cut(length, block_t), programs)
    workspace = _wide(grad, pieces, segments, channels)
    launch(
        kernels.dilated_conv1d_channel,
        grad,
        programs * pieces,
        grad,
        workspace,
        *strides(grad),
        segments,
        batches,
        channels,
        length,
        each,
        BLOCK_O=block_o,
        BLOCK_T=block_t,
        COMPUTE=compute_type(grad.dtype),
    )
    _add_pieces(workspace, out, 1, scale)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    dilation: int,
    groups: int,
    left: int,
    channels_last: bool,
) -> Tensor:
    """The op ``dilated_conv1d`` of schema.py: out (B, D, T)."""
    out = schema.new_sequences(x, x.shape[0], weight.shape[0], x.shape[2], channels_last)
    convolve(x, weight, out, history=state, bias=bias, dilation=dilation, groups=groups, left=left)
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    dilation: int,
    groups: int,
    left: int,
    channels_last: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``dilated_conv1d_backward`` of schema.py: gradients of x, weight, bias and state."""
    batch, channels, length = x.shape
    nothing = (0,)
    of_x = schema.new_sequences(x, batch, channels, length, channels_last) if needs_x else x.new_empty(nothing)
    of_weight = x.new_empty(weight.shape if needs_weight else nothing)
    of_bias = x.new_empty((weight.shape[0],) if needs_bias else nothing)
    of_state = x.new_empty((batch, channels, left) if needs_state else nothing)
    if needs_x or needs_state:
        convolve(
            grad_out,
            weight,
            of_x if needs_x else None,
            early=of_state if needs_state else None,
            dilation=dilation,
            groups=groups,
            left=left,
            transposed=True,
        )
    if needs_weight:
        weight_gradient(grad_out, x, state, of_weight, dilation, groups, left)
    if needs_bias:
        channel_sums(grad_out, of_bias)
    return of_x, of_weight, of_bias, of_state


def kernels_to_compile() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    found = []
    for dtype, inputs, outputs in (("bf16", 128, 256), ("fp32", 64, 128), ("fp64", 64, 128), ("bf16", 1, 16)):
        wide = "fp64" if dtype == "fp64" else "fp32"
        last = dtype == "bf16" and inputs > 1
        order = "channels last" if last else "channels first"
        one = "channel" if last else "position"
        size = {"bf16": 2, "fp32": 4, "fp64": 8}[dtype]
        blocks, options = blocks_of("taps", size, outputs, inputs)
        settings = blocks | {"HAS_HISTORY": True, "HAS_BIAS": True, "HAS_OUT": True}
        settings |= {"HAS_EARLY": False, "HAS_ADDED": False, "SCALE": "", "COMPUTE": compute_of(wide)}
        ones = {f"{name}_{one}": 1 for name in ("source", "out")} | {"weight_in": 1}
        words = f"{dtype}, {inputs} to {outputs}, {order}"
        found.append(
            specialised(
                kernels.dilated_conv1d_taps,
                words,
                dict.fromkeys(("source", "history", "weight", "bias", "out"), dtype),
                settings | ones | {"added": None, "early": None},
                options,
            )
        )
        blocks, options = blocks_of("weight", size, outputs, inputs)
        settings = blocks | {"HAS_HISTORY": True, "COMPUTE": compute_of(wide)}
        ones = {f"{name}_{one}": 1 for name in ("source", "grad")}
        found.append(
            specialised(
                kernels.dilated_conv1d_weight,
                words,
                dict.fromkeys(("source", "history", "grad"), dtype) | {"workspace": wide},
                settings | ones,
                options,
            )
        )
    transposed, options = blocks_of("taps", 2, 128, 256)
    settings = {"HAS_HISTORY": False, "HAS_BIAS": False, "HAS_OUT": True, "HAS_EARLY": True, "HAS_ADDED": True}
    settings |= {"SCALE": "added", "COMPUTE": tl.float32, "history": None, "bias": None, "weight_out": 1}
    settings |= {f"{name}_channel": 1 for name in ("source", "added", "out")}
    found.append(
        specialised(
            kernels.dilated_conv1d_taps,
            "bf16, transposed 256 to 128, channels last",
            dict.fromkeys(("source", "weight", "added", "out", "early"), "bf16"),
            transposed | settings,
            options,
        )
    )
    found.append(
        specialised(
            kernels.dilated_conv1d_channel,
            "bf16",
            {"grad": "bf16", "workspace": "fp32"},
            dict(zip(("BLOCK_O", "BLOCK_T"), _SUM_BLOCKS, strict=True)) | {"COMPUTE": tl.float32, "grad_position": 1},
            {},
        )
    )
    found.append(
        specialised(
            kernels.dilated_conv1d_pieces,
            "bf16",
            {"workspace": "fp32", "out": "bf16"},
            {"BLOCK": _PIECES_BLOCK, "COMPUTE": tl.float32},
            {},
        )
    )
    return tuple(found)


def compute_of(wide: str) -> tl.dtype:
    """The type of sums by its name in signatures."""
    return tl.float64 if wide == "fp64" else tl.float32


def specialised(
    function, words: str, pointers: Mapping[str, str], constexprs: Mapping[str, object], options: Mapping[str, int]
) -> TritonKernel:
    """A specialisation: dtypes of the pointers, and constants (also what is 1 or missing); all else is a number."""
    arguments: Sequence[str] = function.arg_names
    floats = ("scale", "scale_rest")
    kinds = {name: f"*{dtype}" for name, dtype in pointers.items()} | dict.fromkeys(floats, "fp32")
    kinds |= dict.fromkeys(constexprs, "constexpr")
    multiples = ("_batch", "_channel", "_position", "_group", "_out", "_in", "_tap", "_first", "inputs", "outputs")
    return TritonKernel(
        name=f"{function.fn.__name__}[{words}]",
        function=function,
        signature={name: kinds.get(name, "i32") for name in arguments},
        constexprs=constexprs,
        divisible=tuple(name for name in arguments if name.endswith(multiples) and name not in kinds),
        num_warps=options.get("num_warps", 4),
        num_stages=options.get("num_stages", 1),
    )
