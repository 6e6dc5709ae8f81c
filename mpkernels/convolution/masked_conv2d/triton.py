"""The masked convolution in Triton: a product of matrices whose left one is gathered from the pictures as it is needed.

    out[p, n] = bias[n] + sum_{t, k} source[k, place(p, t)] weight[t, k, n]        (the formula: schema.py)

over the seen taps t and the channels k alone: p runs over the pixels of all pictures, n over output channels. The
gradient of x is the same product, with the roles of the channels exchanged and the places turned around
(TRANSPOSED): the input pixel (y, x) collects from the outputs at ((y - dy) / stride_y, (x - dx) / stride_x), where
these are whole numbers. The gradient of the weight sums over pixels:

    of_weight[t, k, n] = sum_p source[k, place(p, t)] grad[p, n]

Decomposition: a program makes BLOCK_M pixels of BLOCK_N output channels of one colour: the filters of a colour see the
same channels through the tap that colours share, so that its hidden channels are left out of the loop. Seen weights
are laid out once a call, neighbours in n. Where channels are few, pairs (t, k) are taken together (FOLDED), so that
pictures of one colour fill a product's depth. A program of the weight's gradient makes BLOCK_M pairs (t, k) of BLOCK_N
outputs over a share of the pixels; shares are added in their order, without atomics: the same bits in every run.

Work: 2 FLOPs a pixel, seen weight and output channel. Bytes: the output once; pictures once for every seen tap, and
weights once for every block of pixels, from L2 as long as they fit there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpkernels import checks, library
from mpkernels.spec import TritonKernel


@dataclass(frozen=True)
class Settings:
    """What a kernel is specialised for."""

    KH: int
    KW: int
    STRIDE_Y: int
    STRIDE_X: int
    DILATION_Y: int
    DILATION_X: int
    COLORS: int
    INCLUSIVE: bool
    TRANSPOSED: bool
    FOLDED: bool
    HAS_BIAS: bool
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    COMPUTE: tl.dtype


@triton.jit
def _offset(tap, S: tl.constexpr):
    """Where a tap reads, relative to the pixel."""
    dy = (tap // S.KW - S.KH // 2).to(tl.int64) * S.DILATION_Y
    dx = (tap % S.KW - S.KW // 2).to(tl.int64) * S.DILATION_X
    return dy, dx


@triton.jit
def _place(y, x, dy, dx, height, width, S: tl.constexpr):
    """(index within a plane, whether there is one) of what the outputs at (y, x) read through taps at (dy, dx)."""
    if S.TRANSPOSED:
        y -= dy
        x -= dx
        inside = (y >= 0) & (x >= 0) & (y % S.STRIDE_Y == 0) & (x % S.STRIDE_X == 0)
        y = y // S.STRIDE_Y
        x = x // S.STRIDE_X
        inside = inside & (y < height) & (x < width)
    else:
        y = y * S.STRIDE_Y + dy
        x = x * S.STRIDE_X + dx
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return y * width + x, inside


@triton.jit
def _step(
    acc,
    source,  # of each pixel's picture, (BLOCK_M, 1)
    weight,
    begin,  # the first pair (FOLDED), or channel
    end,
    tap,  # of all channels, where not FOLDED
    y,  # (BLOCK_M, 1)
    x,
    valid,
    n,  # (1, BLOCK_N)
    n_valid,
    channels,
    filters,
    height,
    width,
    S: tl.constexpr,
):
    """BLOCK_K pairs of a tap and a channel."""
    BLOCK_K: tl.constexpr = S.BLOCK_K
    k = begin + tl.arange(0, BLOCK_K)
    k_valid = k < end
    if S.FOLDED:
        channel = (k % channels)[None, :].to(tl.int64)
        pair = k.to(tl.int64)
        dy, dx = _offset((k // channels)[None, :], S)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        channel = k[None, :].to(tl.int64)
        pair = tap.to(tl.int64) * channels + k
        dy, dx = _offset(tap, S)  # pyright: ignore[reportGeneralTypeIssues]
    at, inside = _place(y, x, dy, dx, height, width, S)
    plane = (tl.zeros((), tl.int64) + height) * width
    picture = tl.load(source + (channel * plane + at), mask=valid & inside & k_valid[None, :], other=0.0)
    matrix = tl.load(weight + pair[:, None] * filters + n, mask=k_valid[:, None] & n_valid, other=0.0)
    return tl.dot(picture, matrix, acc, input_precision="ieee", out_dtype=S.COMPUTE)


@triton.jit
def masked_conv2d_pixels(
    source,  # (B, channels, height, width)
    weight,  # (taps, channels, filters): those that are seen; last the one that colours share
    bias,  # (filters,)
    out,  # (B, filters, rows, columns)
    taps,  # that see every channel
    channels,
    filters,
    height,
    width,
    rows,
    columns,
    pixels,  # B rows columns
    S: tl.constexpr,
):
    """The convolution, or the gradient of its input, of BLOCK_M pixels and BLOCK_N channels."""
    BLOCK_M: tl.constexpr = S.BLOCK_M
    BLOCK_N: tl.constexpr = S.BLOCK_N
    BLOCK_K: tl.constexpr = S.BLOCK_K
    of_color = filters // S.COLORS
    blocks_of_color = (of_color + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) % (blocks_of_color * S.COLORS)
    color = block // blocks_of_color
    local = (block % blocks_of_color) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = (color * of_color + local)[None, :].to(tl.int64)
    n_valid = (local < of_color)[None, :]

    p = (tl.program_id(0) // (blocks_of_color * S.COLORS)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = (p < pixels)[:, None]
    plane = (tl.zeros((), tl.int64) + rows) * columns
    batch = (p // plane)[:, None]
    in_plane = (p % plane)[:, None]
    y, x = in_plane // columns, in_plane % columns
    source += batch * channels * height * width

    acc = tl.zeros((BLOCK_M, BLOCK_N), S.COMPUTE)
    zero = tl.zeros((), tl.int32)
    full = zero + taps * channels
    if S.FOLDED:
        for begin in range(0, full, BLOCK_K):
            acc = _step(
                acc, source, weight, begin, full, zero, y, x, valid, n, n_valid, channels, filters, height, width, S
            )
    else:
        steps = (channels + BLOCK_K - 1) // BLOCK_K
        for step in range(0, taps * steps):
            begin = step % steps * BLOCK_K
            tap = zero + step // steps
            acc = _step(
                acc, source, weight, begin, channels, tap, y, x, valid, n, n_valid, channels, filters, height, width, S
            )
    if S.COLORS > 1:
        if S.TRANSPOSED:
            first = (color + (0 if S.INCLUSIVE else 1)) * (channels // S.COLORS)
            last = zero + channels
        else:
            first = zero
            last = (color + (1 if S.INCLUSIVE else 0)) * (channels // S.COLORS)
        if S.FOLDED:
            first += full
            last += full
        for begin in range(first, last, BLOCK_K):
            acc = _step(
                acc,
                source,
                weight,
                begin,
                last,
                zero + taps,
                y,
                x,
                valid,
                n,
                n_valid,
                channels,
                filters,
                height,
                width,
                S,
            )
    if S.HAS_BIAS:
        acc += tl.load(bias + n, mask=n_valid, other=0.0).to(S.COMPUTE)
    to = out + (batch * filters + n) * plane + in_plane
    tl.store(to, acc.to(out.dtype.element_ty), mask=valid & n_valid)


@triton.jit
def masked_conv2d_weight(
    source,  # (B, channels, height, width)
    grad,  # (B, filters, rows, columns)
    partial,  # (shares, taps and the one that colours share, channels, filters)
    pairs,  # taps channels, of those too
    full,  # pairs of the taps that see every channel
    channels,
    filters,
    height,
    width,
    rows,
    columns,
    pixels,  # B rows columns
    share_blocks,  # blocks of pixels in a share
    S: tl.constexpr,
):
    """The gradient of BLOCK_M weights (tap, channel) of BLOCK_N filters, over one share of the pixels."""
    BLOCK_M: tl.constexpr = S.BLOCK_M
    BLOCK_N: tl.constexpr = S.BLOCK_N
    BLOCK_K: tl.constexpr = S.BLOCK_K
    blocks_m = (pairs + BLOCK_M - 1) // BLOCK_M
    blocks_n = (filters + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    share = program // (blocks_m * blocks_n)
    pair = (program // blocks_n % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    filter = program % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pair_valid = (pair < pairs)[:, None]
    n_valid = (filter < filters)[None, :]
    n = filter[None, :].to(tl.int64)
    channel = pair % channels
    dy, dx = _offset((pair // channels)[:, None], S)  # pyright: ignore[reportGeneralTypeIssues]
    plane = (tl.zeros((), tl.int64) + rows) * columns
    source_plane = (tl.zeros((), tl.int64) + height) * width

    seen = pair_valid & n_valid
    if S.COLORS > 1:
        into = (channel // (channels // S.COLORS))[:, None]
        of = (filter // (filters // S.COLORS))[None, :]
        if S.INCLUSIVE:
            seen = seen & ((pair < full)[:, None] | (into <= of))
        else:
            seen = seen & ((pair < full)[:, None] | (into < of))
    blocks = share_blocks
    if tl.sum(tl.sum(seen.to(tl.int32), axis=1), axis=0) == 0:
        blocks = share_blocks * 0

    acc = tl.zeros((BLOCK_M, BLOCK_N), S.COMPUTE)
    for block in range(0, blocks):
        p = (share.to(tl.int64) * share_blocks + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        p_valid = p < pixels
        batch, in_plane = p // plane, p % plane
        y, x = (in_plane // columns)[None, :], (in_plane % columns)[None, :]
        at, inside = _place(y, x, dy, dx, height, width, S)
        at += (batch[None, :] * channels + channel[:, None]) * source_plane
        picture = tl.load(source + at, mask=inside & pair_valid & p_valid[None, :], other=0.0)
        of_out = tl.load(
            grad + (batch[:, None] * filters + n) * plane + in_plane[:, None],
            mask=p_valid[:, None] & n_valid,
            other=0.0,
        )
        acc = tl.dot(picture, of_out, acc, input_precision="ieee", out_dtype=S.COMPUTE)
    to = partial + (share.to(tl.int64) * pairs + pair[:, None]) * filters + n
    tl.store(to, tl.where(seen, acc, 0.0), mask=pair_valid & n_valid)


# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) by kernel and bytes of an element. What kernels_to_compile names spills
# nothing. No GPU has measured them yet.
_BLOCKS = {
    ("pixels", 2): (128, 64, 32, 8, 3),
    ("pixels", 4): (64, 32, 16, 4, 2),
    ("pixels", 8): (32, 32, 16, 4, 1),
    ("weight", 2): (64, 64, 32, 8, 2),
    ("weight", 4): (32, 32, 16, 4, 2),
    ("weight", 8): (32, 32, 16, 4, 1),
}
_FOLD_BELOW = 16  # channels
_PROGRAMS = 512  # that the weight's gradient is split for


def _settings(
    kernel: str,
    dtype: torch.dtype,
    kernel_size: tuple[int, int],
    numbers: tuple[int, ...],  # stride and dilation
    colors: int,
    inclusive: bool,
    transposed: bool = False,
    folded: bool = False,
    has_bias: bool = False,
    pixels: int = 0,
) -> tuple[Settings, dict[str, int]]:
    block_m, block_n, block_k, warps, stages = _BLOCKS[kernel, dtype.itemsize]
    if library.triton_interpreted():  # few programs, but more than one
        many = 32 if pixels <= 64 else 512
        block_m, block_n, block_k = (many, 16, 16) if kernel == "pixels" else (16, 16, many)
    settings = Settings(
        *kernel_size,
        *numbers,
        COLORS=colors,
        INCLUSIVE=inclusive,
        TRANSPOSED=transposed,
        FOLDED=folded,
        HAS_BIAS=has_bias,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return settings, {"num_warps": warps, "num_stages": stages}


def _launch(kernel, like: Tensor, programs: int, *arguments, **options) -> None:
    checks.programs("masked_conv2d", programs)
    with torch.cuda.device_of(like):
        kernel[(programs,)](*arguments, **options)


def _seen_weights(weight: Tensor, taps: int, order: tuple[int, int, int]) -> Tensor:
    """The first taps of (D, C, kh, kw), in another order of (filters, channels, taps)."""
    return weight.flatten(2)[:, :, :taps].permute(order).contiguous()


def _run_pixels(source, weight, bias, out, taps, settings, options) -> None:
    """One launch: (B, K, ., .) and (taps, K, N) to (B, N, ., .)."""
    _, channels, height, width = source.shape
    batch, filters, rows, columns = out.shape
    pixels = batch * rows * columns
    blocks = settings.COLORS * -(-(filters // settings.COLORS) // settings.BLOCK_N)
    _launch(
        masked_conv2d_pixels,
        out,
        blocks * -(-pixels // settings.BLOCK_M),
        source,
        weight,
        bias,
        out,
        taps,
        channels,
        filters,
        height,
        width,
        rows,
        columns,
        pixels,
        settings,
        **options,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: int,
    colors: int,
    inclusive: bool,
    stride_y: int,
    stride_x: int,
    dilation_y: int,
    dilation_x: int,
) -> Tensor:
    """The op ``masked_conv2d`` of schema.py."""
    filters, channels, kh, kw = weight.shape
    out = x.new_empty((x.shape[0], filters, -(-x.shape[2] // stride_y), -(-x.shape[3] // stride_x)))
    if out.numel() == 0:
        return out
    settings, options = _settings(
        "pixels",
        x.dtype,
        (kh, kw),
        (stride_y, stride_x, dilation_y, dilation_x),
        colors,
        inclusive,
        folded=channels < _FOLD_BELOW,
        has_bias=bias is not None,
        pixels=out.numel() // filters,
    )
    matrices = _seen_weights(weight, taps + (colors > 1), (2, 1, 0))
    _run_pixels(x.contiguous(), matrices, bias, out, taps, settings, options)
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    taps: int,
    colors: int,
    inclusive: bool,
    stride_y: int,
    stride_x: int,
    dilation_y: int,
    dilation_x: int,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``masked_conv2d_backward`` of schema.py: gradients of x, weight and bias."""
    numbers = (stride_y, stride_x, dilation_y, dilation_x)
    filters, _, kh, kw = weight.shape
    seen = taps + (colors > 1)
    grad_out, x = grad_out.contiguous(), x.contiguous()
    of_x, of_weight, of_bias = (x.new_empty((0,)) for _ in range(3))
    if needs_x:
        of_x = torch.empty_like(x)
        if x.numel() > 0:
            folded = filters < _FOLD_BELOW
            pixels = x.shape[0] * x.shape[2] * x.shape[3]
            settings, options = _settings(
                "pixels", x.dtype, (kh, kw), numbers, colors, inclusive, transposed=True, folded=folded, pixels=pixels
            )
            matrices = _seen_weights(weight, seen, (2, 0, 1))
            _run_pixels(grad_out, matrices, None, of_x, taps, settings, options)
    if needs_weight:
        of_weight = torch.zeros_like(weight)
        if grad_out.numel() > 0 and seen > 0 and weight.numel() > 0:
            pixels = grad_out.numel() // filters
            settings, options = _settings("weight", x.dtype, (kh, kw), numbers, colors, inclusive, pixels=pixels)
            found = _run_weight(x, grad_out, taps, seen, settings, options)  # (seen, C, D)
            of_weight.flatten(2)[:, :, :seen] = found.permute(2, 1, 0).to(weight.dtype)
    if needs_bias:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        of_bias = grad_out.sum((0, 2, 3), dtype=wide).to(x.dtype)
    return of_x, of_weight, of_bias


def _run_weight(x: Tensor, grad_out: Tensor, taps: int, seen: int, settings: Settings, options) -> Tensor:
    """The gradient of the seen taps, (seen, C, D), in the type that is computed in."""
    _, channels, height, width = x.shape
    batch, filters, rows, columns = grad_out.shape
    pixels, pairs = batch * rows * columns, seen * channels
    pixel_blocks = -(-pixels // settings.BLOCK_K)
    blocks = -(-pairs // settings.BLOCK_M) * -(-filters // settings.BLOCK_N)
    # a share has 512 pixels or more, so that adding shares costs little; their number follows from the shapes alone
    shares = max(1, min(_PROGRAMS // blocks, pixels // 512))
    share_blocks = -(-pixel_blocks // shares)
    shares = -(-pixel_blocks // share_blocks)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty((shares, seen, channels, filters), dtype=wide)
    _launch(
        masked_conv2d_weight,
        x,
        blocks * shares,
        x,
        grad_out,
        partial,
        pairs,
        taps * channels,
        channels,
        filters,
        height,
        width,
        rows,
        columns,
        pixels,
        share_blocks,
        settings,
        **options,
    )
    return partial.sum(0) if shares > 1 else partial[0]


def kernels_to_compile() -> tuple[TritonKernel, ...]:
    """The specialisations of the compile gates."""
    found = [
        _specialised("pixels", masked_conv2d_pixels, torch.bfloat16, has_bias=True),
        _specialised("pixels", masked_conv2d_pixels, torch.bfloat16, transposed=True),
        _specialised("pixels", masked_conv2d_pixels, torch.float32, has_bias=True),
        _specialised("pixels", masked_conv2d_pixels, torch.float32, has_bias=True, folded=True),
        _specialised("pixels", masked_conv2d_pixels, torch.float64, transposed=True),
        _specialised("weight", masked_conv2d_weight, torch.bfloat16),
        _specialised("weight", masked_conv2d_weight, torch.float32),
    ]
    return tuple(found)


def _specialised(blocks: str, function, dtype: torch.dtype, **flags) -> TritonKernel:
    """A 5 x 5 kernel on pictures of three colours."""
    settings, options = _settings(blocks, dtype, (5, 5), (1, 1, 1, 1), 3, True, **flags)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]
    constexprs = {"S": settings} | ({} if flags.get("has_bias") else {"bias": None})
    constexprs = {key: value for key, value in constexprs.items() if key in function.arg_names}
    kinds: dict[str, str] = dict.fromkeys(("source", "weight", "bias", "grad", "out"), f"*{name}")
    kinds["partial"] = "*fp64" if dtype == torch.float64 else "*fp32"
    signature = {
        argument: "constexpr" if argument in constexprs else kinds.get(argument, "i32")
        for argument in function.arg_names
    }
    words = [name, f"{settings.BLOCK_M}x{settings.BLOCK_N}x{settings.BLOCK_K}", *(key for key in flags if flags[key])]
    return TritonKernel(
        name=f"{function.fn.__name__}[{', '.join(words)}]",
        function=function,
        signature=signature,
        constexprs=constexprs,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        divisible=("width", "columns"),
    )
