"""The Triton kernels of the depthwise convolution over time.

    y[b, c, t] = sum_k weight[c, k] xs[b, c, t - (K - 1 - k) dilation] + bias[c],   out = y or silu(y)

(shapes: schema.py). A program has a tile of BLOCK_C channels and BLOCK_T positions of one row, one of them wide in the
memory order of x, and reads it once for each tap; after the first time it lies in the L1 cache. The tile of the
backward is one of inputs: where there is no activation, or no more than 4 taps, it recomputes the gradient of y at the
outputs of each tap; for more taps `depthwise_gradient_of_y` has written it down before. Sums for weight and bias are
written for each tile, and added in their order. Taps that do not exist are not read.

Bytes: forward reads x and writes out once; backward reads x and grad_out, and writes the gradient of x once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(channels, length, blocks_c, blocks_t, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):
    """(row, channels (BLOCK_C, 1), positions (1, BLOCK_T), block of positions) of this program."""
    program = tl.program_id(0).to(tl.int64)
    block_c = program % blocks_c
    block_t = program // blocks_c % blocks_t
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)[:, None].to(tl.int64)
    t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)[None, :].to(tl.int64)
    return program // blocks_c // blocks_t, c, t, block_t


@triton.jit
def _tap(x, state, seq_idx, x_batch, x_channel, x_time, b, c, t, back, inside, length, left, channels,
         CHANNELS_LAST: tl.constexpr, HAS_STATE: tl.constexpr, HAS_SEQ: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """What the outputs t that are inside read `back` positions before them, 0 where nothing; and whether they do."""
    p = t - back
    exists = inside
    if HAS_SEQ:
        sequences = seq_idx + b * length
        ok = (t >= 0) & (t < length)
        own = tl.load(sequences + t, mask=ok, other=-1)
        other = tl.load(sequences + tl.maximum(p, 0), mask=ok & (p < length), other=-1)
        exists = exists & (own >= 0) & (own == other)
    present = exists & (p >= 0)
    value = tl.load(x + b * x_batch + c * x_channel + p * x_time, mask=present, other=0.0).to(TYPE)
    if HAS_STATE:
        behind = left + p  # in the state
        if CHANNELS_LAST:
            at = (b * left + behind) * channels + c
        else:
            at = (b * channels + c) * left + behind
        value += tl.load(state + at, mask=exists & (p < 0), other=0.0).to(TYPE)
    else:
        exists = present
    return value, exists


@triton.jit
def _y(x, weight, bias, state, seq_idx, x_batch, x_channel, x_time, b, c, t, inside, length, left, channels,
       dilation, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
       HAS_SEQ: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """The sums at the outputs t, before silu; anything where they are not inside."""
    total = tl.zeros(inside.shape, TYPE)
    for k in range(TAPS):
        value, exists = _tap(
            x, state, seq_idx, x_batch, x_channel, x_time, b, c, t, (TAPS - 1 - k) * dilation, inside, length, left,
            channels, CHANNELS_LAST, HAS_STATE, HAS_SEQ, TYPE,
        )  # fmt: skip
        factor = tl.load(weight + c * TAPS + k, mask=c < channels, other=0.0)
        total = tl.where(exists, factor * value + total, total)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < channels, other=0.0)
    return total


@triton.jit
def depthwise_forward(x, weight, bias, state, seq_idx, out, x_batch, x_channel, x_time, out_channel, out_time,
                      channels, length, left, dilation, blocks_c, blocks_t,
                      TAPS: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr,
                      HAS_STATE: tl.constexpr, HAS_SEQ: tl.constexpr, TYPE: tl.constexpr, BLOCK_C: tl.constexpr,
                      BLOCK_T: tl.constexpr):  # fmt: skip
    """A tile of outputs."""
    b, c, t, _ = _place(channels, length, blocks_c, blocks_t, BLOCK_C, BLOCK_T)
    inside = (c < channels) & (t < length)
    y = _y(
        x, weight, bias, state, seq_idx, x_batch, x_channel, x_time, b, c, t, inside, length, left, channels, dilation,
        TAPS, CHANNELS_LAST, HAS_BIAS, HAS_STATE, HAS_SEQ, TYPE,
    )  # fmt: skip
    if SILU:
        y = y / (1 + tl.exp(-y))
    if HAS_SEQ:
        own = tl.load(seq_idx + b * length + t, mask=t < length, other=-1)
        y = tl.where(own >= 0, y, 0.0)
    tl.store(out + b * channels * length + c * out_channel + t * out_time, y, mask=inside)


@triton.jit
def _of_y(grad, x, weight, bias, state, seq_idx, grad_batch, grad_channel, grad_time, x_batch, x_channel, x_time, b,
          c, t, inside, length, left, channels, dilation, TAPS: tl.constexpr, SILU: tl.constexpr,
          CHANNELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_SEQ: tl.constexpr,
          TYPE: tl.constexpr):  # fmt: skip
    """The gradient of y at the outputs t; 0 where they are not inside, or padding."""
    if HAS_SEQ:
        own = tl.load(seq_idx + b * length + t, mask=(t >= 0) & (t < length), other=-1)
        inside = inside & (own >= 0)
    u = tl.load(grad + b * grad_batch + c * grad_channel + t * grad_time, mask=inside, other=0.0).to(TYPE)
    if SILU:
        y = _y(
            x, weight, bias, state, seq_idx, x_batch, x_channel, x_time, b, c, t, inside, length, left, channels,
            dilation, TAPS, CHANNELS_LAST, HAS_BIAS, HAS_STATE, HAS_SEQ, TYPE,
        )  # fmt: skip
        sigmoid = 1 / (1 + tl.exp(-y))
        u = tl.where(inside, u * sigmoid * (1 + y * (1 - sigmoid)), 0.0)
    return u


@triton.jit
def depthwise_gradient_of_y(grad, x, weight, bias, state, seq_idx, out, grad_batch, grad_channel, grad_time,
                            x_batch, x_channel, x_time, out_channel, out_time, channels, length, left, dilation,
                            blocks_c, blocks_t, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                            HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_SEQ: tl.constexpr,
                            TYPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """The gradient of y, through silu, in the type that is computed in."""
    b, c, t, _ = _place(channels, length, blocks_c, blocks_t, BLOCK_C, BLOCK_T)
    inside = (c < channels) & (t < length)
    u = _of_y(
        grad, x, weight, bias, state, seq_idx, grad_batch, grad_channel, grad_time, x_batch, x_channel, x_time, b, c,
        t, inside, length, left, channels, dilation, TAPS, True, CHANNELS_LAST, HAS_BIAS, HAS_STATE, HAS_SEQ, TYPE,
    )  # fmt: skip
    tl.store(out + b * channels * length + c * out_channel + t * out_time, u, mask=inside)


@triton.jit
def depthwise_backward(grad, x, weight, bias, state, seq_idx, of_x, parts, grad_batch, grad_channel, grad_time,
                       x_batch, x_channel, x_time, out_channel, out_time, out_length, shift, channels, length, left,
                       dilation, blocks_c, blocks_t,
                       TAPS: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr,
                       HAS_STATE: tl.constexpr, HAS_SEQ: tl.constexpr, NEEDS_X: tl.constexpr,
                       NEEDS_PARTS: tl.constexpr, TYPE: tl.constexpr, BLOCK_C: tl.constexpr,
                       BLOCK_T: tl.constexpr):  # fmt: skip
    """A tile of the gradient of inputs, and its parts (B, blocks_t, K + 1, C) of the sums for weight and bias.

    The inputs are those of x (shift 0, out_length = length), or those of the state (shift and out_length = left).
    """
    b, c, j, block_t = _place(channels, out_length, blocks_c, blocks_t, BLOCK_C, BLOCK_T)
    p = j - shift
    wanted = (c < channels) & (j < out_length)
    if NEEDS_X:
        total = tl.zeros(wanted.shape, TYPE)
        for i in range(TAPS):
            t = p + i * dilation
            inside = wanted & (t >= 0) & (t < length)
            if HAS_SEQ:
                sequences = seq_idx + b * length
                own = tl.load(sequences + t, mask=(t >= 0) & (t < length), other=-1)
                other = tl.load(sequences + tl.maximum(p, 0), mask=p < length, other=-1)
                inside = inside & (own >= 0) & (own == other)
            u = _of_y(
                grad, x, weight, bias, state, seq_idx, grad_batch, grad_channel, grad_time, x_batch, x_channel, x_time,
                b, c, t, inside, length, left, channels, dilation, TAPS, SILU, CHANNELS_LAST, HAS_BIAS, HAS_STATE,
                HAS_SEQ, TYPE,
            )  # fmt: skip
            factor = tl.load(weight + c * TAPS + (TAPS - 1 - i), mask=c < channels, other=0.0)
            total = tl.where(inside, factor * u + total, total)
        tl.store(of_x + b * channels * out_length + c * out_channel + j * out_time, total, mask=wanted)
    if NEEDS_PARTS:
        u = _of_y(
            grad, x, weight, bias, state, seq_idx, grad_batch, grad_channel, grad_time, x_batch, x_channel, x_time, b,
            c, p, wanted, length, left, channels, dilation, TAPS, SILU, CHANNELS_LAST, HAS_BIAS, HAS_STATE, HAS_SEQ,
            TYPE,
        )  # fmt: skip
        at = parts + (b * blocks_t + block_t) * (TAPS + 1) * channels + c
        for k in range(TAPS):
            value, exists = _tap(
                x, state, seq_idx, x_batch, x_channel, x_time, b, c, p, (TAPS - 1 - k) * dilation, wanted, length,
                left, channels, CHANNELS_LAST, HAS_STATE, HAS_SEQ, TYPE,
            )  # fmt: skip
            product = tl.where(exists, u * value, 0.0)
            tl.store(at + k * channels, tl.sum(product, axis=1)[:, None], mask=c < channels)
        tl.store(at + TAPS * channels, tl.sum(u, axis=1)[:, None], mask=c < channels)
