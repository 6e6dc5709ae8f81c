"""WaveNet's layer in Triton: launches, block sizes, and the specialisations that the compile gates build.

The kernels, with formulas and decomposition, are in :mod:`triton_kernels`. Up to 256 gates of two bytes, 128 of four
and 32 of eight the forward is one kernel; above, h is written, and two convolutions of one tap project it.
"""

from __future__ import annotations

from torch import Tensor

from mpkernels import library
from mpkernels.convolution.dilated_conv1d import triton as conv
from mpkernels.convolution.dilated_conv1d.schema import new_sequences
from mpkernels.convolution.gated_residual_layer import triton_kernels as kernels
from mpkernels.spec import TritonKernel

# (BLOCK_G, BLOCK_T, BLOCK_C, BLOCK_P, warps, stages) by bytes of an element, for at most BLOCK_G gates; the last of a
# list also where there are more, not fused. Chosen by registers, as those of the dilated convolution: two accumulators
# and what repairs them. No GPU has measured them yet.
_BLOCKS = {
    2: ((64, 64, 32, 64, 8, 3), (128, 32, 32, 64, 8, 3), (256, 16, 32, 64, 8, 2)),
    4: ((64, 32, 16, 32, 8, 2), (128, 32, 16, 32, 8, 2)),
    8: ((32, 16, 16, 32, 4, 1),),
}
# (BLOCK_G, BLOCK_T, BLOCK_P, warps, stages) of the backward
_GRAD_BLOCKS = {2: (64, 64, 32, 8, 3), 4: (64, 64, 16, 8, 2), 8: (32, 32, 16, 4, 1)}
_LENGTH = 16_000  # of the sequences that the gates compile for
_MOST_INTERPRETED = 16  # gates of a block in the interpreter


def _forward_blocks(
    element_size: int, pairs: int, length: int, channels: int
) -> tuple[bool, dict[str, int], dict[str, int]]:
    """Whether the forward is one kernel, its blocks, and its launch options."""
    table = _BLOCKS[element_size]
    if library.triton_interpreted():
        table = ((_MOST_INTERPRETED, conv.halved(length), conv.halved(channels), 32, 4, 1),)
    chosen = next((blocks for blocks in table if pairs <= blocks[0]), None)
    block_g, block_t, block_c, block_p, warps, stages = chosen or table[0]
    blocks = {"BLOCK_G": min(block_g, conv.padded(pairs)), "BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_P": block_p}
    if blocks["BLOCK_G"] < 64:
        warps = min(warps, 4)
    return chosen is not None, blocks, {"num_warps": warps, "num_stages": stages}


def _grad_blocks(element_size: int, pairs: int, length: int) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks of the backward, and its launch options."""
    block_g, block_t, block_p, warps, stages = _GRAD_BLOCKS[element_size]
    if library.triton_interpreted():
        block_g, block_t, block_p = _MOST_INTERPRETED, conv.halved(length), 32
    blocks = {"BLOCK_G": min(block_g, conv.padded(pairs)), "BLOCK_T": block_t, "BLOCK_P": block_p}
    return blocks, {"num_warps": min(warps, 4) if blocks["BLOCK_G"] < 64 else warps, "num_stages": stages}


def forward(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    condition: Tensor | None,
    condition_weight: Tensor | None,
    projection: Tensor,
    projection_bias: Tensor | None,
    state: Tensor | None,
    dilation: int,
    residual: bool,
    residual_scale: float,
    channels_last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``gated_residual_layer`` of schema.py: residual (B, R, T) or (B, 0, T), skip (B, S, T), gates."""
    batch, channels, length = x.shape
    pairs, taps = weight.shape[0] // 2, weight.shape[2]
    rows = channels if residual else 0
    continued = new_sequences(x, batch, rows, length, channels_last)
    skip = new_sequences(x, batch, projection.shape[0] - rows, length, channels_last)
    wide = conv.wide(x)
    gates = new_sequences(wide, batch, 2 * pairs, length, channels_last) if keep else wide
    fused, blocks, options = _forward_blocks(x.element_size(), pairs, length, channels)
    hidden = None if fused else new_sequences(x, batch, pairs, length, channels_last)
    packed = weight if taps == 1 else weight.permute(2, 0, 1).contiguous()  # a tap's weights beside each other
    conv.launch(
        kernels.gated_residual_forward,
        x,
        batch * conv.cut(length, blocks["BLOCK_T"]) * (1 if fused else conv.cut(pairs, blocks["BLOCK_G"])),
        x,
        state,
        packed,
        offset,
        condition,
        condition_weight,
        projection,
        projection_bias,
        continued,
        skip,
        gates if keep else None,
        hidden,
        *conv.strides(x),
        *conv.strides(state, 2),
        channels,
        1,
        2 * pairs * channels,
        0 if offset is None or offset.shape[0] == 1 else offset.stride(0),
        *conv.strides(condition),
        *conv.strides(continued),
        *conv.strides(skip),
        *conv.strides(gates if keep else None),
        *conv.strides(hidden),
        length,
        0 if state is None else state.shape[2],
        (taps - 1) * dilation,
        dilation,
        taps,
        channels,
        pairs,
        0 if condition is None else condition.shape[1],
        rows,
        skip.shape[1],
        *conv.parts(residual_scale),
        HAS_HISTORY=state is not None,
        HAS_OFFSET=offset is not None,
        HAS_CONDITION=condition is not None,
        HAS_BIAS=projection_bias is not None,
        KEEP=keep,
        FUSED=fused,
        COMPUTE=conv.compute_type(x.dtype),
        **blocks,
        **options,
    )
    if hidden is not None:
        biases = (None, None) if projection_bias is None else (projection_bias[:rows], projection_bias[rows:])
        first, rest = projection[:rows, :, None], projection[rows:, :, None]
        conv.convolve(hidden, first, continued, bias=biases[0], added=x, scale=residual_scale, scaled="sum")
        conv.convolve(hidden, rest, skip, bias=biases[1])
    return continued, skip, gates


def backward(
    grad_residual: Tensor | None,
    grad_skip: Tensor | None,
    gates: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    condition: Tensor | None,
    condition_weight: Tensor | None,
    projection: Tensor,
    projection_bias: Tensor | None,
    state: Tensor | None,
    dilation: int,
    residual: bool,
    residual_scale: float,
    channels_last: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``gated_residual_layer_backward`` of schema.py: gradients of the eight tensors of the forward."""
    given = (x, weight, offset, condition, condition_weight, projection, projection_bias, state)
    wanted = [argument is not None and bool(needs >> i & 1) for i, argument in enumerate(given)]
    found = [
        x.new_empty((0,))
        if argument is None or not want
        else new_sequences(x, argument.shape[0], argument.shape[1], argument.shape[2], channels_last)
        if argument is x or argument is condition
        else x.new_empty(argument.shape)
        for argument, want in zip(given, wanted, strict=True)
    ]
    of_x, of_weight, of_offset, of_condition, of_condition_weight, of_projection, of_bias, of_state = found
    needs_x, needs_weight, needs_offset, needs_condition, needs_condition_weight, needs_projection, needs_bias, _ = (
        wanted
    )
    needs_state = wanted[7]
    rows = x.shape[1] if residual else 0
    if not residual:
        grad_residual = None
    if rows == projection.shape[0]:
        grad_skip = None

    if any(wanted[:6]) or needs_state:
        pairs = weight.shape[0] // 2
        grad_z = new_sequences(x, x.shape[0], 2 * pairs, x.shape[2], channels_last)
        hidden = new_sequences(x, x.shape[0], pairs, x.shape[2], channels_last) if needs_projection else None
        _grad_gates(grad_residual, grad_skip, gates, projection, rows, residual_scale, grad_z, hidden)
        if needs_x or needs_state:
            conv.convolve(
                grad_z,
                weight,
                of_x if needs_x else None,
                added=grad_residual if needs_x else None,
                early=of_state if needs_state else None,
                dilation=dilation,
                left=(weight.shape[2] - 1) * dilation,
                transposed=True,
                scale=residual_scale,
                scaled="added",
            )
        if needs_weight:
            conv.weight_gradient(grad_z, x, state, of_weight, dilation, left=(weight.shape[2] - 1) * dilation)
        if needs_offset:
            conv.channel_sums(grad_z, of_offset, of_offset.shape[0])
        if needs_condition and condition_weight is not None:
            conv.convolve(grad_z, condition_weight[:, :, None], of_condition, transposed=True)
        if needs_condition_weight and condition is not None:
            conv.weight_gradient(grad_z, condition, None, of_condition_weight[:, :, None])
        if hidden is not None:
            for grad, part, scale in (
                (grad_residual, of_projection[:rows], residual_scale),
                (grad_skip, of_projection[rows:], 1.0),
            ):
                if grad is None:
                    part.zero_()
                else:
                    conv.weight_gradient(grad, hidden, None, part[:, :, None], scale=scale)
    if needs_bias:
        for grad, part, scale in ((grad_residual, of_bias[:rows], residual_scale), (grad_skip, of_bias[rows:], 1.0)):
            if grad is None:
                part.zero_()
            else:
                conv.channel_sums(grad, part, scale=scale)
    return of_x, of_weight, of_offset, of_condition, of_condition_weight, of_projection, of_bias, of_state


def _grad_gates(
    grad_residual: Tensor | None,
    grad_skip: Tensor | None,
    gates: Tensor,
    projection: Tensor,
    rows: int,
    residual_scale: float,
    grad_z: Tensor,
    hidden: Tensor | None,
) -> None:
    """Writes the gradient of z, and h where it is asked for."""
    batch, width, length = grad_z.shape
    pairs = width // 2
    blocks, options = _grad_blocks(grad_z.element_size(), pairs, length)
    conv.launch(
        kernels.gated_residual_grad_gates,
        grad_z,
        batch * conv.cut(length, blocks["BLOCK_T"]) * conv.cut(pairs, blocks["BLOCK_G"]),
        grad_residual,
        grad_skip,
        gates,
        projection,
        grad_z,
        hidden,
        *conv.strides(grad_residual),
        *conv.strides(grad_skip),
        *conv.strides(gates),
        *conv.strides(grad_z),
        *conv.strides(hidden),
        length,
        pairs,
        rows,
        projection.shape[0] - rows,
        *conv.parts(residual_scale),
        HAS_RESIDUAL=grad_residual is not None,
        HAS_SKIP=grad_skip is not None,
        NEEDS_HIDDEN=hidden is not None,
        COMPUTE=conv.compute_type(grad_z.dtype),
        **blocks,
        **options,
    )


def kernels_to_compile() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    found = []
    for dtype, pairs, last in (
        ("bf16", 64, True),
        ("bf16", 128, True),
        ("bf16", 256, False),
        ("bf16", 512, True),
        ("fp32", 64, False),
        ("fp32", 128, False),
        ("fp64", 64, False),
    ):
        wide = "fp64" if dtype == "fp64" else "fp32"
        size = {"bf16": 2, "fp32": 4, "fp64": 8}[dtype]
        one = "channel" if last else "position"
        order = "channels last" if last else "channels first"
        fused, blocks, options = _forward_blocks(size, pairs, _LENGTH, pairs)
        tensors = ["x", "history", "weight", "offset", "condition", "condition_weight", "projection"]
        tensors += ["projection_bias", "residual", "skip", "hidden"]
        settings = blocks | {f"HAS_{name}": True for name in ("HISTORY", "OFFSET", "CONDITION", "BIAS")}
        settings |= {"KEEP": True, "FUSED": fused, "COMPUTE": conv.compute_of(wide), "weight_in": 1}
        settings |= {f"{name}_{one}": 1 for name in ("x", "condition", "residual", "skip", "gates", "hidden")}
        settings |= {"hidden": None} if fused else {}
        found.append(
            conv.specialised(
                kernels.gated_residual_forward,
                f"{dtype}, G={pairs}, {'fused, ' if fused else ''}{order}",
                {"gates": wide} | {name: dtype for name in tensors if name not in settings},
                settings,
                options,
            )
        )
        if pairs > 128:
            continue
        blocks, options = _grad_blocks(size, pairs, _LENGTH)
        settings = blocks | {"HAS_RESIDUAL": True, "HAS_SKIP": True, "NEEDS_HIDDEN": True}
        settings |= {"COMPUTE": conv.compute_of(wide)}
        settings |= {f"{name}_{one}": 1 for name in ("grad_residual", "grad_skip", "gates", "grad_gates", "hidden")}
        tensors = ("grad_residual", "grad_skip", "projection", "grad_gates", "hidden")
        found.append(
            conv.specialised(
                kernels.gated_residual_grad_gates,
                f"{dtype}, G={pairs}, {order}",
                dict.fromkeys(tensors, dtype) | {"gates": wide},
                settings,
                options,
            )
        )
    return tuple(found)
