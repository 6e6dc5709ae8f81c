"""The Triton kernels of ActNorm.

    y = (x + bias) e^log_scale  or  x e^log_scale + bias          log_abs_det = S sum of log_scale

(shapes: schema.py). INNER says that the bias is added before the product; INVERSE negates bias and log_scale. Forward:
a program has BLOCK elements side by side of y, in the order of (B, C, S). Backward: a program has BLOCK_C channels and
TILES blocks of BLOCK_N positions, in the order of (B, S), of which it writes the gradient of x and, for each channel,
two sums in float64: of g, and of g x or g (x + bias). A second kernel adds these parts in their order.

Bytes: forward reads x and writes y; backward reads x and the gradient of y, and writes the gradient of x, all once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def actnorm_forward(x, bias, log_scale, y, x_b, x_c, x_s, count, channels, positions,
                    INNER: tl.constexpr, INVERSE: tl.constexpr, NESTED: tl.constexpr, LARGE: tl.constexpr,
                    TYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK elements of y (B, C, S). NESTED: x is contiguous. LARGE: elements are counted in 64 bits."""
    program = tl.program_id(0)
    j = (program.to(tl.int64) if LARGE else program) * BLOCK + tl.arange(0, BLOCK)
    inside = j < count
    row = j // positions
    c = row % channels
    if NESTED:
        at = j
    else:
        b, s = row // channels, j % positions
        at = b.to(tl.int64) * x_b + c.to(tl.int64) * x_c + s.to(tl.int64) * x_s
    value = tl.load(x + at, mask=inside, other=0.0).to(TYPE)
    shift = tl.load(bias + c, mask=inside, other=0.0)
    scale = tl.load(log_scale + c, mask=inside, other=0.0)
    shift = -shift if INVERSE else shift
    factor = tl.exp(-scale if INVERSE else scale)
    value = (value + shift) * factor if INNER else value * factor + shift
    tl.store(y + j, value, mask=inside)


@triton.jit
def actnorm_log_abs_det(log_scale, out, batch, channels, positions, INVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of log_abs_det (B,), each the same sum over the channels."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        total += tl.load(log_scale + c, mask=c < channels, other=0.0).to(tl.float64)
    found = tl.sum(total, axis=0) * positions
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + b, (-found if INVERSE else found) + tl.zeros((BLOCK,), tl.float64), mask=b < batch)


@triton.jit
def actnorm_backward(grad, x, bias, log_scale, of_x, parts, grad_b, grad_c, grad_s, x_b, x_c, x_s, count, channels,
                     positions, blocks_c, INNER: tl.constexpr, INVERSE: tl.constexpr, LARGE: tl.constexpr,
                     TYPE: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_SUMS: tl.constexpr, BLOCK_C: tl.constexpr,
                     BLOCK_N: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """A tile of of_x (B, C, S), and its sums: parts (pieces, 2, C). count: B S."""
    program = tl.program_id(0)
    block_c = program % blocks_c
    piece = program // blocks_c
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    channel = c < channels
    shift = tl.load(bias + c, mask=channel, other=0.0)
    scale = tl.load(log_scale + c, mask=channel, other=0.0)
    shift = -shift if INVERSE else shift
    factor = tl.exp(-scale if INVERSE else scale)
    wide_c = c.to(tl.int64)
    sum_g = tl.zeros((BLOCK_C, BLOCK_N), TYPE)
    sum_gx = tl.zeros((BLOCK_C, BLOCK_N), TYPE)
    for tile in tl.static_range(TILES):
        start = (piece.to(tl.int64) if LARGE else piece) * (TILES * BLOCK_N) + tile * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)[None, :]
        inside = channel & (n < count)
        b = (n // positions).to(tl.int64)
        s = (n % positions).to(tl.int64)
        g = tl.load(grad + b * grad_b + wide_c * grad_c + s * grad_s, mask=inside, other=0.0).to(TYPE)
        if NEEDS_X:
            tl.store(of_x + (b * channels + wide_c) * positions + s, g * factor, mask=inside)
        if NEEDS_SUMS:
            value = tl.load(x + b * x_b + wide_c * x_c + s * x_s, mask=inside, other=0.0).to(TYPE)
            sum_g += g
            # (0 for what is not inside, whatever the shift)
            sum_gx += tl.where(inside, g * (value + shift), 0.0) if INNER else g * value
    if NEEDS_SUMS:
        at = parts + piece.to(tl.int64) * (2 * channels) + wide_c
        tl.store(at, tl.sum(sum_g.to(tl.float64), axis=1)[:, None], mask=channel)
        tl.store(at + channels, tl.sum(sum_gx.to(tl.float64), axis=1)[:, None], mask=channel)


@triton.jit
def actnorm_sum(parts, grad_log, log_scale, of_bias, of_log_scale, grad_log_b, pieces, batch, channels, positions,
                INNER: tl.constexpr, INVERSE: tl.constexpr, BLOCK_P: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """of_bias and of_log_scale (C,) from the parts (pieces, 2, C)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    rows = tl.arange(0, BLOCK_P)[:, None]
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    sum_gx = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, pieces, BLOCK_P):
        at = parts + (start + rows).to(tl.int64) * (2 * channels) + c
        inside = (start + rows < pieces) & (c < channels)
        sum_g += tl.load(at, mask=inside, other=0.0)
        sum_gx += tl.load(at + channels, mask=inside, other=0.0)
    of_log = tl.zeros((BLOCK_P * BLOCK_C,), tl.float64)
    for start in range(0, batch, BLOCK_P * BLOCK_C):
        b = start + tl.arange(0, BLOCK_P * BLOCK_C).to(tl.int64)
        of_log += tl.load(grad_log + b * grad_log_b, mask=b < batch, other=0.0).to(tl.float64)
    total_log = tl.sum(of_log, axis=0) * positions
    total_g = tl.sum(sum_g, axis=0)[None, :]
    total_gx = tl.sum(sum_gx, axis=0)[None, :]
    scale = tl.load(log_scale + c, mask=c < channels, other=0.0).to(tl.float64)
    factor = tl.exp(-scale if INVERSE else scale)
    total_g = total_g * factor if INNER else total_g
    total_gx = total_gx * factor + total_log
    tl.store(of_bias + c, -total_g if INVERSE else total_g, mask=c < channels)
    tl.store(of_log_scale + c, -total_gx if INVERSE else total_gx, mask=c < channels)
