"""The backward of attention in Triton, which computes the weights again from lse: formulas, and the kernels that own
queries. Those that own keys are in :mod:`triton_backward_keys`.

Formulas (Dao 2023, "FlashAttention-2", algorithm 2), with gradients dO of out and dl of lse, and D the dropout's
factors (1 without it):

    P_ij     = exp(s_ij - lse_i)                    dV_j = sum_i P_ij D_ij dO_i
    delta_i  = dO_i . O_i - dl_i                    dS_ij = P_ij (D_ij dO_i . v_j - delta_i)    = dbias_ij
    dX_ij    = scale cap'(.) dS_ij                  dQ_i = sum_j dX_ij k_j         dK_j = sum_i dX_ij q_i

Shapes as in schema.py. top and delta are (B, H, L padded to whole blocks) in the type that is computed in; top is +inf,
and so all weights 0, where a row sees nothing or is padding.

Decomposition, without atomics, every sum in the order of a loop:
    attention_backward_delta  a program a block of queries: delta, and top = log2(e) lse
    attention_backward_keys   a program BLOCK_N keys of one key head: dK and dV stay in registers while it walks over
                              the query heads of the group and, in each, over the query blocks that see the keys. Its
                              tiles are (keys, queries): so the weights enter the products with dO and q as they are.
    attention_backward_query  a program BLOCK_M queries: dQ stays in registers, as in the forward
    attention_backward_bias   a program a tile of the bias, over the batches and heads (and rows) that share it
Partial blocks come first, full blocks after them without a mask. Hidden NaNs are met as in the forward: where the sums
over partial blocks are not finite, these are made again, a key (a query) at a time, with selects.

Work: 4 products for dK and dV, 3 for dQ, 2 for the bias, each 2 E or 2 F FLOPs a visible pair. Bytes: dK and dV read
queries and dO once a key block, dQ reads keys and values once a query block, from L2 as far as they fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpkernels.attention.attention.triton_common import (
    LOG2_E,
    differentiate,
    dot_with_rows,
    full_block,
    interval_hull,
    key_dropped,
    load_interval,
    load_tile,
    load_vector,
    not_finite,
    number,
    pair_visible,
    partial_block,
    score_factors,
    split_blocks,
    store_tile,
    tile_dropped,
    weigh,
    wide,
)


@triton.jit
def attention_backward_delta(
    grad_out,
    out,
    grad_lse,  # (B, H, L)
    lse,  # (B, H, L)
    top,  # (B, H, padded)
    delta,  # (B, H, padded)
    grad_batch,
    grad_head,
    grad_row,
    out_batch,
    out_head,
    out_row,
    grad_lse_batch,
    grad_lse_head,
    grad_lse_row,
    heads,
    rows,
    padded,
    S: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    """The statistics top and delta of BLOCK_M queries, there or not."""
    program = tl.program_id(0)
    rows = number(rows)
    BLOCK_M: tl.constexpr = S.BLOCK_M
    row_blocks = padded // BLOCK_M
    start = (program % row_blocks) * BLOCK_M
    head_of_all = program // row_blocks
    batch = (head_of_all // heads).to(tl.int64)
    head = (head_of_all % heads).to(tl.int64)
    grad_out += batch * grad_batch + head * grad_head
    out += batch * out_batch + head * out_head
    grad = load_tile(grad_out, start, grad_row, 0, rows, S.F, S.BLOCK_F, BLOCK_M, True).to(S.COMPUTE)
    value = load_tile(out, start, out_row, 0, rows, S.F, S.BLOCK_F, BLOCK_M, True).to(S.COMPUTE)
    found = tl.sum(grad * value, axis=1)
    row = start + tl.arange(0, BLOCK_M)
    if HAS_GRAD_LSE:
        grad_lse += batch * grad_lse_batch + head * grad_lse_head
        found -= tl.load(grad_lse + row.to(tl.int64) * grad_lse_row, mask=row < rows, other=0.0).to(S.COMPUTE)
    at_rows = head_of_all.to(tl.int64) * padded
    ended = tl.load(lse + head_of_all.to(tl.int64) * rows + row, mask=row < rows, other=float("-inf"))
    tl.store(top + at_rows + row, tl.where(ended == float("-inf"), float("inf"), ended * LOG2_E))
    tl.store(delta + at_rows + row, found)


@triton.jit
def _query_tile(
    acc, q, grad, block, place, key, value, tensors, strides, numbers, S: tl.constexpr, MASKED: tl.constexpr
):
    """The sum dQ over a block of keys, by products of tiles."""
    row, begin, end, low, high, top, delta = place
    start = block * S.BLOCK_N
    column = (start + tl.arange(0, S.BLOCK_N))[None, :]
    k = load_tile(key[0], start, key[1], low, high, S.E, S.BLOCK_E, S.BLOCK_N, MASKED)
    v = load_tile(value[0], start, value[1], low, high, S.F, S.BLOCK_F, S.BLOCK_N, MASKED)
    dots = tl.dot(q, tl.trans(k), input_precision=S.PRECISION, out_dtype=S.COMPUTE)
    grads = tl.dot(grad, tl.trans(v), input_precision=S.PRECISION, out_dtype=S.COMPUTE)
    line = row[:, None]
    visible = dots
    dropped = dots
    if MASKED:
        visible = pair_visible(line, column, begin[:, None], end[:, None], tensors, strides, numbers, S)
    if S.HAS_DROPOUT:
        dropped = tile_dropped(line, start, tensors[2], numbers, S.BLOCK_N, False)
    weights, slope = weigh(dots, line, column, top[:, None], tensors, strides, numbers, S)
    _, grad_dots = differentiate(weights, slope, grads, delta[:, None], visible, dropped, numbers, S, MASKED)
    return tl.dot(grad_dots.to(k.dtype), k, acc, input_precision=S.PRECISION, out_dtype=S.COMPUTE)


@triton.jit
def _query_key(acc, query, grad_out, at_key, place, key, value, tensors, strides, numbers, S: tl.constexpr):
    """The sum dQ over one key, without a product that a hidden number takes part in."""
    row, begin, end, _, _, top, delta = place
    rows = numbers[0]
    at_k, at_v = key[0] + wide(at_key) * key[1], value[0] + wide(at_key) * value[1]
    dots = dot_with_rows(query[0], query[2], query[1], rows, at_k, S.E, S.BLOCK_E, S, S.BLOCK_M)
    grads = dot_with_rows(grad_out[0], query[2], grad_out[1], rows, at_v, S.F, S.BLOCK_F, S, S.BLOCK_M)
    column = tl.zeros(row.shape, tl.int32) + at_key
    visible = pair_visible(row, column, begin, end, tensors, strides, numbers, S)
    dropped = dots
    if S.HAS_DROPOUT:
        dropped = key_dropped(row, at_key, tensors[2], numbers)
    weights, slope = weigh(dots, row, column, top, tensors, strides, numbers, S)
    _, grad_dots = differentiate(weights, slope, grads, delta, visible, dropped, numbers, S, True)
    k = load_vector(key[0], at_key, key[1], S.E, S.BLOCK_E, S.COMPUTE)
    return acc + tl.where(visible[:, None], grad_dots[:, None] * k[None, :], 0.0)


@triton.jit
def attention_backward_query(
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
    grad_out,
    top,
    delta,
    grad_query,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    grad_batch,
    grad_head,
    grad_row,
    to_batch,
    to_head,
    to_row,
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
    padded,
    scale,  # scale, softcap and kept are each the sum of a float32 and the rest of a float64
    scale_rest,
    softcap,
    softcap_rest,
    kept,
    kept_rest,
    threshold,
    S: tl.constexpr,
):
    """The gradient dQ of BLOCK_M queries of one head."""
    program = tl.program_id(0)
    rows, keys = number(rows), number(keys)
    BLOCK_M: tl.constexpr = S.BLOCK_M
    BLOCK_N: tl.constexpr = S.BLOCK_N
    BLOCK_E: tl.constexpr = S.BLOCK_E
    row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    block_m = row_blocks - 1 - program % row_blocks
    head_of_all = program // row_blocks  # b H + h
    batch = (head_of_all // heads).to(tl.int64)
    head = (head_of_all % heads).to(tl.int64)
    key_of = (head_of_all % heads // group).to(tl.int64)
    queries = (query + batch * query_batch + head * query_head, query_row, block_m * BLOCK_M)
    gradients = (grad_out + batch * grad_batch + head * grad_head, grad_row)
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
    numbers = (rows, keys, inner, outer, threshold, head_of_all, tl.zeros((), S.COMPUTE) + kept + kept_rest)

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
    at_rows = head_of_all.to(tl.int64) * padded
    place = (row, begin, end, low, high, tl.load(top + at_rows + row), tl.load(delta + at_rows + row))

    acc = tl.zeros((BLOCK_M, BLOCK_E), S.COMPUTE)
    q = load_tile(queries[0], queries[2], query_row, 0, rows, S.E, BLOCK_E, BLOCK_M, True)
    grad = load_tile(gradients[0], queries[2], grad_row, 0, rows, S.F, S.BLOCK_F, BLOCK_M, True)
    if S.HAS_INTERVALS or S.HAS_MASK or S.RAGGED:
        for step in range(0, partial):
            block = partial_block(step, blocks, block_begin, before, full, S.HAS_MASK)
            acc = _query_tile(acc, q, grad, block, place, key_rows, value_rows, tensors, strides, numbers, S, True)
    if S.HAS_INTERVALS or S.HAS_MASK:  # noqa: SIM102 (constants, apart from what the device finds)
        if not_finite(acc):
            acc = tl.zeros((BLOCK_M, BLOCK_E), S.COMPUTE)
            for step in range(0, partial):
                block = partial_block(step, blocks, block_begin, before, full, S.HAS_MASK)
                for at_key in range(block * BLOCK_N, tl.minimum(block * BLOCK_N + BLOCK_N, keys)):
                    acc = _query_key(
                        acc, queries, gradients, at_key, place, key_rows, value_rows, tensors, strides, numbers, S
                    )
    for step in range(0, full):
        block = full_block(step, blocks, full_begin, slots, S.HAS_MASK)
        acc = _query_tile(acc, q, grad, block, place, key_rows, value_rows, tensors, strides, numbers, S, False)

    factor = tl.zeros((), S.COMPUTE) + scale + scale_rest
    grad_query += batch * to_batch + head * to_head
    store_tile(grad_query, acc * factor, queries[2], to_row, rows, S.E, BLOCK_E, BLOCK_M)
