"""Which blocks of the scores hold visible pairs: tables that the attention kernels walk over, made once a call.

``attention_block_states``: (P, blocks of queries, blocks of keys) int8, 0 nothing is seen, 1 something, 2 everything.
P is 1, or the batches and heads in which intervals or mask differ. A program a query block where there are intervals
alone, a program a pair of blocks where a dense mask is read (once, a byte a pair).

``attention_block_lists``: for each query block (or each key block) its partial blocks in order, from the front of a row
of ``blocks``, and its full blocks from the far end backwards; ``counts`` has how many there are of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpkernels.attention.attention.triton_common import interval_hull, load_interval, number, pair_visible


@triton.jit
def attention_block_states(
    first,  # (., ., L) int32
    last,
    mask,  # (., ., L, S) bytes
    states,  # (P, blocks of queries, blocks of keys) int8
    first_batch,
    first_head,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    plan_heads,
    rows,
    keys,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The states of a pair of blocks (of all key blocks of a query block, CHUNK at a time, without a mask)."""
    program = tl.program_id(0).to(tl.int64)
    rows, keys = number(rows), number(keys)
    BLOCK_M: tl.constexpr = S.BLOCK_M
    BLOCK_N: tl.constexpr = S.BLOCK_N
    row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    key_blocks = (keys + BLOCK_N - 1) // BLOCK_N
    block_n = (program * 0).to(tl.int32)
    if S.HAS_MASK:
        block_n = (program % key_blocks).to(tl.int32)
        program = program // key_blocks
    block_m = (program % row_blocks).to(tl.int32)
    plan = program // row_blocks
    batch, head = plan // plan_heads, plan % plan_heads

    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if S.HAS_INTERVALS:
        first += batch * first_batch + head * first_head
        last += batch * first_batch + head * first_head
    begin, end = load_interval(first, last, row, rows, S.HAS_INTERVALS)
    states += (plan * row_blocks + block_m) * key_blocks
    if S.HAS_MASK:
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = pair_visible(
            row[:, None],
            column[None, :],
            begin[:, None],
            end[:, None],
            (mask + batch * mask_batch + head * mask_head, None, None),
            (mask_row, mask_key, 0, 0),
            (rows, keys),
            S,
        )
        some = tl.max(tl.max(visible.to(tl.int32), axis=1), axis=0)
        every = tl.min(tl.min((visible | (row >= rows)[:, None]).to(tl.int32), axis=1), axis=0)
        tl.store(states + block_n, (some + some * every).to(tl.int8))
    else:
        low, high, all_low, all_high = interval_hull(begin, end, row, rows, keys, S.HAS_INTERVALS)
        for start in range(0, key_blocks, CHUNK):
            block = start + tl.arange(0, CHUNK)
            left = block * BLOCK_N
            some = (left < high) & (left + BLOCK_N > low)
            every = some & (left >= all_low) & (left + BLOCK_N <= all_high)
            tl.store(states + block, some.to(tl.int8) + every.to(tl.int8), mask=block < key_blocks)


@triton.jit
def attention_block_lists(
    states,  # (P, ., .) int8
    blocks,  # (P, lines, slots) int32
    counts,  # (P, lines, 2) int32: partial, full
    plan_stride,  # of states, as the next two
    line_stride,
    slot_stride,
    lines,
    slots,
    CHUNK: tl.constexpr,
):
    """The list of one line: the blocks across it that are not empty."""
    program = tl.program_id(0).to(tl.int64)
    slots = number(slots)
    states += (program // lines) * plan_stride + (program % lines) * line_stride
    blocks += program * slots
    partial = slots * 0
    full = slots * 0
    for start in range(0, slots, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        state = tl.load(states + slot.to(tl.int64) * slot_stride, mask=slot < slots, other=0)
        is_partial = (state == 1).to(tl.int32)
        is_full = (state == 2).to(tl.int32)
        at_partial = partial + tl.cumsum(is_partial, 0) - 1
        at_full = slots - full - tl.cumsum(is_full, 0)
        tl.store(blocks + at_partial, slot, mask=is_partial != 0)
        tl.store(blocks + at_full, slot, mask=is_full != 0)
        partial += tl.sum(is_partial, axis=0)
        full += tl.sum(is_full, axis=0)
    tl.store(counts + program * 2, partial)
    tl.store(counts + program * 2 + 1, full)
