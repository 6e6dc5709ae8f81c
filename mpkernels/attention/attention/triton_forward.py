"""The forward kernel of attention in Triton: out = softmax(scale Q K^T + bias) V, the scores never in memory.

Formula (Vaswani et al. 2017, eq. 1) by the algorithm of Dao 2023, "FlashAttention-2", algorithm 1, for a block of
queries i and one block of keys j after another:

    s_ij = log2(e) (cap(scale q_i . k_j) + bias_ij)       cap(x) = softcap tanh(x / softcap), or x
    m'   = max(m, max_j s_ij)       p_ij = 2^(s_ij - m')       l = l 2^(m - m') + sum_j p_ij
    acc  = acc 2^(m - m') + sum_j p_ij v_j                (of the p_ij that dropout keeps)
    out  = acc / l          lse = ln(2) (m + log2 l);     where nothing is seen, l = 0: out 0, lse -inf

Shapes: query (B, H, L, E), key (B, G, S, E), value (B, G, S, F), out (B, H, L, F), lse (B, H, L); the rest as in
schema.py. ``<name>_<dimension>`` is a stride in elements, 0 where a tensor is expanded.

Decomposition: a program takes BLOCK_M queries of one head, and walks over the key blocks that its rows see: first the
partial ones, pair by pair masked, then the full ones, whose inner loop knows of no mask. The blocks of a head run
beside each other (its keys and values stay in L2), the last rows first: with a causal mask those have most to do.

Hidden keys. 0 times a NaN is NaN, so one in a hidden value reaches acc through a weight of 0. The partial blocks are
walked first, with products of whole tiles; if acc is then not finite (it hardly ever is), they are walked again, a key
at a time, and what is hidden is left out by a select. Full blocks hide nothing, and need no second look.

Work: 2 (E + F) FLOPs a visible pair. Bytes: query, out and lse once; keys and values once for every query block, from
L2 as long as the keys and values of the heads in flight fit there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpkernels.attention.attention.triton_common import (
    LN_2,
    dot_with_rows,
    full_block,
    interval_hull,
    key_dropped,
    load_interval,
    load_tile,
    load_vector,
    logits,
    not_finite,
    number,
    pair_visible,
    partial_block,
    score_factors,
    split_blocks,
    store_tile,
    tile_dropped,
    wide,
)


@triton.jit
def _online(top, total, acc, scores, factor, GUARD: tl.constexpr):
    """One step of the online softmax: weights of these scores, and what came before on their scale."""
    new_top = tl.maximum(top, tl.max(scores, axis=1) * factor)
    base = new_top
    if GUARD:  # nothing seen yet: -inf - -inf is NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(top - base)
    return new_top, total * shrink + tl.sum(weights, axis=1), acc * shrink[:, None], weights


@triton.jit
def _tile_step(state, q, block, place, key, value, tensors, strides, numbers, S: tl.constexpr, MASKED: tl.constexpr):
    """A block of keys, by products of tiles."""
    top, total, acc = state
    row, begin, end, low, high = place
    start = block * S.BLOCK_N
    column = (start + tl.arange(0, S.BLOCK_N))[None, :]
    k = load_tile(key[0], start, key[1], low, high, S.E, S.BLOCK_E, S.BLOCK_N, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=S.PRECISION, out_dtype=S.COMPUTE)
    factor = numbers[3]
    if not S.SCALE_LAST:
        factor = 1.0
        scores, _ = logits(scores, row[:, None], column, tensors, strides, numbers, S)
    if MASKED:
        visible = pair_visible(row[:, None], column, begin[:, None], end[:, None], tensors, strides, numbers, S)
        scores = tl.where(visible, scores, float("-inf"))
    top, total, acc, weights = _online(top, total, acc, scores, factor, MASKED or S.HAS_BIAS)
    if S.HAS_DROPOUT:
        weights = tl.where(tile_dropped(row[:, None], start, tensors[2], numbers, S.BLOCK_N, False), 0.0, weights)
    v = load_tile(value[0], start, value[1], low, high, S.F, S.BLOCK_F, S.BLOCK_N, MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=S.PRECISION, out_dtype=S.COMPUTE)
    return top, total, acc


@triton.jit
def _key_step(state, query, at_key, place, key, value, tensors, strides, numbers, S: tl.constexpr):
    """One key, without a product that a hidden number takes part in."""
    top, total, acc = state
    row, begin, end, _, _ = place
    at = key[0] + wide(at_key) * key[1]
    dots = dot_with_rows(query[0], query[2], query[1], numbers[0], at, S.E, S.BLOCK_E, S, S.BLOCK_M)
    column = tl.zeros(row.shape, tl.int32) + at_key
    scores, _ = logits(dots, row, column, tensors, strides, numbers, S)
    visible = pair_visible(row, column, begin, end, tensors, strides, numbers, S)
    scores = tl.where(visible, scores, float("-inf"))
    top, total, acc, weights = _online(top, total, acc, scores[:, None], 1.0, True)
    if S.HAS_DROPOUT:
        weights = tl.where(key_dropped(row, at_key, tensors[2], numbers)[:, None], 0.0, weights)
    v = load_vector(value[0], at_key, value[1], S.F, S.BLOCK_F, S.COMPUTE)
    return top, total, acc + tl.where(visible[:, None], weights * v[None, :], 0.0)


@triton.jit
def _nothing_yet(S: tl.constexpr):
    """(top, total, acc) before any key."""
    BLOCK_M: tl.constexpr = S.BLOCK_M
    BLOCK_F: tl.constexpr = S.BLOCK_F
    top = tl.full((BLOCK_M,), float("-inf"), S.COMPUTE)
    return top, tl.zeros((BLOCK_M,), S.COMPUTE), tl.zeros((BLOCK_M, BLOCK_F), S.COMPUTE)


@triton.jit
def attention_forward(
    query,
    key,
    value,
    first,
    last,
    mask,
    bias,
    seed,
    blocks,  # (P, blocks of queries, slots): the lists of triton_plan, where there is a dense mask
    counts,
    out,
    lse,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    out_batch,
    out_head,
    out_row,
    first_batch,
    first_head,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    bias_batch,
    bias_head,
    bias_row,
    bias_key,
    plan_batch,
    plan_head,
    heads,
    group,
    rows,
    keys,
    scale,  # scale, softcap and kept are each the sum of a float32 and the rest of a float64
    scale_rest,
    softcap,
    softcap_rest,
    kept,
    kept_rest,
    threshold,
    S: tl.constexpr,
):
    """The outputs out and lse of BLOCK_M queries of one head."""
    program = tl.program_id(0)
    rows, keys = number(rows), number(keys)
    BLOCK_M: tl.constexpr = S.BLOCK_M
    BLOCK_N: tl.constexpr = S.BLOCK_N
    row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    block_m = row_blocks - 1 - program % row_blocks
    head_of_all = program // row_blocks  # b H + h
    batch = (head_of_all // heads).to(tl.int64)
    head = (head_of_all % heads).to(tl.int64)
    key_of = (head_of_all % heads // group).to(tl.int64)
    queries = (query + batch * query_batch + head * query_head, query_row, block_m * BLOCK_M)
    key_rows = (key + batch * key_batch + key_of * key_head, key_row)
    value_rows = (value + batch * value_batch + key_of * value_head, value_row)
    inner, outer = score_factors(scale, scale_rest, softcap, softcap_rest, S)
    seed_value = 0
    if S.HAS_DROPOUT:
        seed_value = tl.load(seed)
    if S.HAS_BIAS:
        bias += batch * bias_batch + head * bias_head
    if S.HAS_MASK:
        mask += batch * mask_batch + head * mask_head
    if S.HAS_INTERVALS:
        first += batch * first_batch + head * first_head
        last += batch * first_batch + head * first_head
    tensors = (mask, bias, seed_value)
    strides = (mask_row, mask_key, bias_row, bias_key)
    numbers = (rows, keys, inner, outer, threshold, head_of_all)

    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = load_interval(first, last, row, rows, S.HAS_INTERVALS)
    low, high, all_low, all_high = interval_hull(begin, end, row, rows, keys, S.HAS_INTERVALS)
    partial, block_begin, before, full_begin, full = split_blocks(low, high, all_low, all_high, BLOCK_N)
    slots = (keys + BLOCK_N - 1) // BLOCK_N
    if S.HAS_MASK:
        line = (batch * plan_batch + head * plan_head) * row_blocks + block_m
        blocks += line * slots
        partial = tl.load(counts + line * 2)
        full = tl.load(counts + line * 2 + 1)
    place = (row, begin, end, low, high)

    state = _nothing_yet(S)
    q = load_tile(queries[0], queries[2], query_row, 0, rows, S.E, S.BLOCK_E, BLOCK_M, True)
    if S.HAS_INTERVALS or S.HAS_MASK or S.RAGGED:
        for step in range(0, partial):
            block = partial_block(step, blocks, block_begin, before, full, S.HAS_MASK)
            state = _tile_step(state, q, block, place, key_rows, value_rows, tensors, strides, numbers, S, True)
    if S.HAS_INTERVALS or S.HAS_MASK:  # noqa: SIM102 (constants, apart from what the device finds)
        if not_finite(state[2]):
            state = _nothing_yet(S)
            for step in range(0, partial):
                block = partial_block(step, blocks, block_begin, before, full, S.HAS_MASK)
                for at_key in range(block * BLOCK_N, tl.minimum(block * BLOCK_N + BLOCK_N, keys)):
                    state = _key_step(state, queries, at_key, place, key_rows, value_rows, tensors, strides, numbers, S)
    for step in range(0, full):
        block = full_block(step, blocks, full_begin, slots, S.HAS_MASK)
        state = _tile_step(state, q, block, place, key_rows, value_rows, tensors, strides, numbers, S, False)

    top, total, acc = state
    sees = total != 0.0  # NaN sees too
    total = tl.where(sees, total, 1.0)
    share = 1.0 / total
    if S.HAS_DROPOUT:
        share *= tl.zeros((), S.COMPUTE) + kept + kept_rest
    out += batch * out_batch + head * out_head
    store_tile(out, acc * share[:, None], block_m * BLOCK_M, out_row, rows, S.F, S.BLOCK_F, BLOCK_M)
    found = tl.where(sees, (top + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse + head_of_all.to(tl.int64) * rows + row, found, mask=row < rows)
