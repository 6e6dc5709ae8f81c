"""What the Triton kernels of attention share: tiles, masks, scores, dropout, and which blocks a program visits.

A key block is *full* for a query block where every row sees every key of it, *partial* where some pair is seen, and
is not visited otherwise. Key intervals are known by their ends: the partial and full blocks of a program follow from
four numbers, found in its own rows. Where a dense mask says more, or a key block asks for its query blocks, the blocks
come from lists that ``triton_plan`` makes once a call.

Tuples that functions hand on, for the program's batch and head:
    tensors  (mask, bias, seed)                               seed is the number itself
    strides  (mask_row, mask_key, bias_row, bias_key)
    numbers  (rows L, keys S, inner, outer, threshold, head, kept)
             the factors of the scores; of dropout: its threshold, b H + h, and the factor of the weights that are kept
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from mpkernels.attention.attention import schema

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MOST = tl.constexpr(2147483647)
HIDES = tl.constexpr(schema.HIDES)


@dataclass(frozen=True)
class Settings:
    """What a kernel is specialised for."""

    E: int  # head size of queries and keys
    F: int  # head size of values
    BLOCK_E: int
    BLOCK_F: int
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    HAS_INTERVALS: bool
    HAS_MASK: bool
    HAS_BIAS: bool
    HAS_SOFTCAP: bool
    HAS_DROPOUT: bool
    RAGGED: bool  # whether the last block that a program walks over is cut off
    SCALE_LAST: bool  # whether scores are only a positive scale away from dot products
    COMPUTE: tl.dtype
    PRECISION: str  # of products of float32


@triton.jit
def number(x):
    """A size as a number of the device: where it is 1, it comes as a constant."""
    return tl.zeros((), tl.int32) + x


@triton.jit
def wide(x):
    """A number in 64 bits, before it is multiplied with a stride."""
    return tl.zeros((), tl.int64) + x


@triton.jit
def load_tile(
    matrix,
    start,  # the tile's first row
    stride,
    low,
    high,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """(ROWS, BLOCK_WIDTH) of a matrix of WIDTH columns: 0 past them, and (CHECK) in rows outside [low, high)."""
    local = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    at = matrix + wide(start) * stride + (local.to(tl.int64)[:, None] * stride + column[None, :])
    row = start + local
    if CHECK:
        inside = ((row >= low) & (row < high))[:, None] & (column < WIDTH)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    elif WIDTH == BLOCK_WIDTH:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(matrix, tile, start, stride, high, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Writes what of a (ROWS, BLOCK_WIDTH) tile is above row ``high`` and left of column WIDTH."""
    local = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    at = matrix + wide(start) * stride + (local.to(tl.int64)[:, None] * stride + column[None, :])
    inside = ((start + local) < high)[:, None] & (column < WIDTH)[None, :]
    tl.store(at, tile.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(matrix, row, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, COMPUTE: tl.constexpr):
    """(BLOCK_WIDTH,) a row of a matrix, in the type that is computed in."""
    column = tl.arange(0, BLOCK_WIDTH)
    return tl.load(matrix + wide(row) * stride + column, mask=column < WIDTH, other=0.0).to(COMPUTE)


@triton.jit
def dot_with_rows(
    matrix,
    start,
    stride,
    high,
    vector,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(ROWS,) products of rows of a matrix with a vector in memory, 16 columns at a time to keep registers free."""
    local = tl.arange(0, ROWS)
    exists = start + local < high
    rows = matrix + wide(start) * stride + local.to(tl.int64) * stride
    found = tl.zeros((ROWS,), S.COMPUTE)
    for left in range(0, BLOCK_WIDTH, 16):
        column = left + tl.arange(0, 16)
        inside = column < WIDTH
        tile = tl.load(rows[:, None] + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        line = tl.load(vector + column, mask=inside, other=0.0)
        found += tl.sum(tile.to(S.COMPUTE) * line.to(S.COMPUTE)[None, :], axis=1)
    return found


@triton.jit
def load_interval(first, last, row, rows, HAS_INTERVALS: tl.constexpr):
    """[first, last) of the keys that each row sees; nothing in rows past the end."""
    if HAS_INTERVALS:
        begin = tl.load(first + row, mask=row < rows, other=0)
        end = tl.load(last + row, mask=row < rows, other=0)
    else:
        begin = tl.zeros(row.shape, tl.int32)
        end = tl.full(row.shape, MOST, tl.int32)
    return begin, end


@triton.jit
def interval_hull(begin, end, row, rows, keys, HAS_INTERVALS: tl.constexpr):
    """(low, high): keys that any row sees lie in it; (all_low, all_high): every row sees all of it."""
    if HAS_INTERVALS:
        exists = row < rows
        sees = begin < end
        low = tl.min(tl.where(sees, begin, MOST), axis=0)
        high = tl.max(tl.where(sees, end, 0), axis=0)
        all_low = tl.max(tl.where(exists, begin, 0), axis=0)
        all_high = tl.min(tl.where(exists, end, MOST), axis=0)
        high = tl.minimum(high, keys)
        low = tl.minimum(low, high)
    else:
        low = keys * 0
        high = keys
        all_low = keys * 0
        all_high = keys
    return low, high, all_low, tl.minimum(all_high, keys)


@triton.jit
def split_blocks(low, high, all_low, all_high, SIZE: tl.constexpr):
    """(partial, begin, before, full_begin, full) of the blocks that lie in [low, high).

    That is the number of partial blocks, where they begin, how many of them come before the full ones, and where those
    begin and how many they are.
    """
    begin = low // SIZE
    end = (high + SIZE - 1) // SIZE
    full_begin = tl.minimum(tl.maximum((all_low + SIZE - 1) // SIZE, begin), end)
    full_end = tl.maximum(tl.minimum(all_high // SIZE, end), full_begin)
    full = full_end - full_begin
    return end - begin - full, begin, full_begin - begin, full_begin, full


@triton.jit
def partial_block(step, blocks, begin, before, full, LISTED: tl.constexpr):
    """The block of a step of the loop over partial blocks."""
    if LISTED:
        block = tl.load(blocks + step)
    else:
        block = begin + step + tl.where(step >= before, full, 0)
    return block


@triton.jit
def full_block(step, blocks, full_begin, slots, LISTED: tl.constexpr):
    """The block of a step of the loop over full blocks; lists hold them from their far end."""
    if LISTED:
        block = tl.load(blocks + (slots - 1 - step))
    else:
        block = full_begin + step
    return block


@triton.jit
def pair_visible(row, column, begin, end, tensors, strides, numbers, S: tl.constexpr):
    """Which pairs are seen; ``row``, ``begin`` and ``end`` broadcast against ``column``."""
    visible = (row < numbers[0]) & (column < numbers[1])
    if S.HAS_INTERVALS:
        visible = visible & (column >= begin) & (column < end)
    if S.HAS_MASK:
        at = tensors[0] + row.to(tl.int64) * strides[0] + column.to(tl.int64) * strides[1]
        visible = visible & (tl.load(at, mask=visible, other=0) != 0)
    return visible


@triton.jit
def tanh(x, COMPUTE: tl.constexpr):
    """(tanh x, 1 - tanh^2 x)."""
    e = tl.exp(-2.0 * tl.abs(x))
    share = 1.0 / (1.0 + e)
    size = (1.0 - e) * share
    if tl.float32 == COMPUTE:  # the difference has lost digits where x is small, and the series has them
        square = x * x
        series = tl.abs(x) * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        size = tl.where(square < 0.015625, series, size)
    return tl.where(x < 0, -size, size), 4.0 * e * share * share


@triton.jit
def score_factors(scale, scale_rest, softcap, softcap_rest, S: tl.constexpr):
    """(inner, outer): scores in units of ln 2 are outer cap(inner dot), and the softcap is a tanh; see ``logits``."""
    factor = tl.zeros((), S.COMPUTE) + scale + scale_rest
    inner = factor
    outer = factor * LOG2_E
    if S.HAS_SOFTCAP:
        cap = tl.zeros((), S.COMPUTE) + softcap + softcap_rest
        inner = factor / cap
        outer = cap * LOG2_E
    return inner, outer


@triton.jit
def logits(dots, row, column, tensors, strides, numbers, S: tl.constexpr):
    """Scores in units of ln 2, so that their exponential is exp2, and how the softcap changes with its argument."""
    rows, keys, inner, outer = numbers[0], numbers[1], numbers[2], numbers[3]
    slope = dots
    if S.HAS_SOFTCAP:
        capped, slope = tanh(dots * inner, S.COMPUTE)  # pyright: ignore[reportGeneralTypeIssues]
        scores = capped * outer
    else:
        scores = dots * outer
    if S.HAS_BIAS:
        at = tensors[1] + row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]
        added = tl.load(at, mask=(row < rows) & (column < keys), other=0.0).to(S.COMPUTE)
        scores = tl.where(added <= HIDES, float("-inf"), scores + added * LOG2_E)
    return scores, slope


@triton.jit
def tile_dropped(row, start, seed, numbers, SIZE: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which weights of a tile of SIZE keys from ``start`` (a multiple of 4) are dropped; see schema.py.

    A call of Philox gives words for four keys side by side. ``row`` is (M, 1) for a tile of (M, SIZE), (1, M) for
    (SIZE, M).
    """
    QUARTER: tl.constexpr = SIZE // 4
    fours = start // 4 + tl.arange(0, QUARTER)
    if KEYS_FIRST:
        column, line = tl.broadcast(fours[:, None], row)
    else:
        column, line = tl.broadcast(fours[None, :], row)
    zero = tl.zeros(line.shape, tl.uint32)
    a, b, c, d = tl.philox(seed, column.to(tl.uint32), line.to(tl.uint32), zero + numbers[5].to(tl.uint32), zero)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # (., ., 2, 2) in the order a, b, c, d
    if KEYS_FIRST:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (SIZE, row.shape[1]))
    else:
        words = tl.reshape(words, (row.shape[0], SIZE))
    return words.to(tl.int64) < numbers[4]


@triton.jit
def key_dropped(row, key, seed, numbers):
    """Which weights of one key are dropped, for rows (M,)."""
    zero = tl.zeros(row.shape, tl.uint32)
    column = zero + (number(key) // 4).to(tl.uint32)
    a, b, c, d = tl.philox(seed, column, row.to(tl.uint32), zero + numbers[5].to(tl.uint32), zero)
    word = key % 4
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d))).to(tl.int64) < numbers[4]


@triton.jit
def not_finite(tile):
    """Whether anything in a tile is NaN or infinite (or the sum of zero times all of it would not be 0)."""
    return tl.sum(tile * 0.0) != 0.0


@triton.jit
def weigh(dots, row, column, top, tensors, strides, numbers, S: tl.constexpr):
    """Weights of the dot products q . k, nothing masked or dropped yet, and the slope of the softcap."""
    scores, slope = logits(dots, row, column, tensors, strides, numbers, S)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.exp2(scores - top), slope


@triton.jit
def kept_weights(weights, visible, dropped, S: tl.constexpr, MASKED: tl.constexpr):
    """The weights as they meet the values (but for the factor of those that dropout keeps)."""
    if S.HAS_DROPOUT:
        weights = tl.where(dropped, 0.0, weights)
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    return weights


@triton.jit
def differentiate(weights, slope, grads, delta, visible, dropped, numbers, S: tl.constexpr, MASKED: tl.constexpr):
    """Gradients of the scores, and of the dot products but for the scale; ``grads`` are dO . v."""
    if S.HAS_DROPOUT:
        grads = tl.where(dropped, 0.0, grads * numbers[6])
    grad_scores = weights * (grads - delta)
    grad_dots = grad_scores
    if S.HAS_SOFTCAP:
        grad_dots = grad_scores * slope
    if MASKED:
        grad_scores = tl.where(visible, grad_scores, 0.0)
        grad_dots = tl.where(visible, grad_dots, 0.0)
    return grad_scores, grad_dots
