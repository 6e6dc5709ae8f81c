"""The backward kernels of attention in Triton that own keys: dK and dV, and the gradient of the bias.

Formulas, shapes, decomposition and work of the whole backward: :mod:`triton_backward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpkernels.attention.attention.triton_common import (
    differentiate,
    dot_with_rows,
    full_block,
    kept_weights,
    load_interval,
    load_tile,
    load_vector,
    not_finite,
    number,
    pair_visible,
    partial_block,
    score_factors,
    store_tile,
    tile_dropped,
    weigh,
    wide,
)


@triton.jit
def _keys_tile(state, k, v, column, block, queries, tensors, strides, numbers, S: tl.constexpr, MASKED: tl.constexpr):
    """The sums dK and dV over a block of queries, by products of tiles (keys, queries)."""
    of_key, of_value = state
    query, query_row, grad_out, grad_row, top, delta, first, last = queries
    rows = numbers[0]
    start = block * S.BLOCK_M
    row = start + tl.arange(0, S.BLOCK_M)
    q = load_tile(query, start, query_row, 0, rows, S.E, S.BLOCK_E, S.BLOCK_M, S.RAGGED)
    grad = load_tile(grad_out, start, grad_row, 0, rows, S.F, S.BLOCK_F, S.BLOCK_M, S.RAGGED)
    tops = tl.load(top + row)
    deltas = tl.load(delta + row)
    dots = tl.dot(k, tl.trans(q), input_precision=S.PRECISION, out_dtype=S.COMPUTE)
    line = row[None, :]
    visible = dots
    dropped = dots
    if MASKED:
        begin, end = load_interval(first, last, row, rows, S.HAS_INTERVALS)
        visible = pair_visible(line, column[:, None], begin[None, :], end[None, :], tensors, strides, numbers, S)
    if S.HAS_DROPOUT:
        dropped = tile_dropped(line, tl.min(column, axis=0), tensors[2], numbers, S.BLOCK_N, True)
    weights, slope = weigh(dots, line, column[:, None], tops[None, :], tensors, strides, numbers, S)
    meeting = kept_weights(weights, visible, dropped, S, MASKED)
    of_value = tl.dot(meeting.to(grad.dtype), grad, of_value, input_precision=S.PRECISION, out_dtype=S.COMPUTE)
    grads = tl.dot(v, tl.trans(grad), input_precision=S.PRECISION, out_dtype=S.COMPUTE)
    _, grad_dots = differentiate(weights, slope, grads, deltas[None, :], visible, dropped, numbers, S, MASKED)
    of_key = tl.dot(grad_dots.to(q.dtype), q, of_key, input_precision=S.PRECISION, out_dtype=S.COMPUTE)
    return of_key, of_value


@triton.jit
def _keys_row(state, key, value, column, row, queries, tensors, strides, numbers, S: tl.constexpr):
    """The sums dK and dV over one query, without a product that a hidden number takes part in."""
    of_key, of_value = state
    query, query_row, grad_out, grad_row, top, delta, first, last = queries
    rows, keys = numbers[0], numbers[1]
    start = tl.min(column, axis=0)
    at_q, at_grad = query + wide(row) * query_row, grad_out + wide(row) * grad_row
    dots = dot_with_rows(key[0], start, key[1], keys, at_q, S.E, S.BLOCK_E, S, S.BLOCK_N)
    grads = dot_with_rows(value[0], start, value[1], keys, at_grad, S.F, S.BLOCK_F, S, S.BLOCK_N)
    line = tl.zeros(column.shape, tl.int32) + row
    tops = tl.load(top + line)
    deltas = tl.load(delta + line)
    begin, end = load_interval(first, last, line, rows, S.HAS_INTERVALS)
    visible = pair_visible(line, column, begin, end, tensors, strides, numbers, S)
    dropped = dots
    if S.HAS_DROPOUT:
        one = tl.zeros((1, 1), tl.int32) + row
        dropped = tl.reshape(tile_dropped(one, start, tensors[2], numbers, S.BLOCK_N, True), column.shape)
    weights, slope = weigh(dots, line, column, tops, tensors, strides, numbers, S)
    _, grad_dots = differentiate(weights, slope, grads, deltas, visible, dropped, numbers, S, True)
    weights = kept_weights(weights, visible, dropped, S, True)
    grad = load_vector(grad_out, row, grad_row, S.F, S.BLOCK_F, S.COMPUTE)
    of_value += tl.where(visible[:, None], weights[:, None] * grad[None, :], 0.0)
    tl.debug_barrier()  # keeps the loads, and their registers, apart
    q = load_vector(query, row, query_row, S.E, S.BLOCK_E, S.COMPUTE)
    of_key += tl.where(visible[:, None], grad_dots[:, None] * q[None, :], 0.0)
    return of_key, of_value


@triton.jit
def attention_backward_keys(
    query,
    key,
    value,
    first,
    last,
    mask,
    bias,
    seed,
    blocks,  # (P, blocks of keys, slots): the lists of triton_plan, where there are intervals or a dense mask
    counts,
    grad_out,
    top,
    delta,
    grad_key,
    grad_value,
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
    to_key_batch,
    to_key_head,
    to_key_row,
    to_value_batch,
    to_value_head,
    to_value_row,
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
    """The gradients dK and dV of BLOCK_N keys of one key head."""
    program = tl.program_id(0)
    rows, keys = number(rows), number(keys)
    BLOCK_M: tl.constexpr = S.BLOCK_M
    BLOCK_N: tl.constexpr = S.BLOCK_N
    BLOCK_E: tl.constexpr = S.BLOCK_E
    BLOCK_F: tl.constexpr = S.BLOCK_F
    LISTED: tl.constexpr = S.HAS_INTERVALS or S.HAS_MASK
    key_blocks = (keys + BLOCK_N - 1) // BLOCK_N
    block_n = program % key_blocks
    key_heads = heads // group
    batch = (program // key_blocks) // key_heads
    key_of = ((program // key_blocks) % key_heads).to(tl.int64)
    wide_batch = batch.to(tl.int64)
    key_rows = (key + wide_batch * key_batch + key_of * key_head, key_row)
    value_rows = (value + wide_batch * value_batch + key_of * value_head, value_row)
    inner, outer = score_factors(scale, scale_rest, softcap, softcap_rest, S)
    factor_kept = tl.zeros((), S.COMPUTE) + kept + kept_rest
    seed_value = 0
    if S.HAS_DROPOUT:
        seed_value = tl.load(seed)
    slots = (rows + BLOCK_M - 1) // BLOCK_M

    start = block_n * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    k = load_tile(key_rows[0], start, key_row, 0, keys, S.E, BLOCK_E, BLOCK_N, True)
    v = load_tile(value_rows[0], start, value_row, 0, keys, S.F, BLOCK_F, BLOCK_N, True)
    of_key = tl.zeros((BLOCK_N, BLOCK_E), S.COMPUTE)
    of_value = tl.zeros((BLOCK_N, BLOCK_F), S.COMPUTE)
    state = (of_key, of_value)

    # partial blocks of all heads of the group, those again where a NaN was met, then full blocks of all heads
    for turn in tl.static_range(0 if LISTED else 2, 3):
        again = True
        if turn == 1:
            again = not_finite(state[0]) | not_finite(state[1])
        if again:
            if turn == 1:
                state = (tl.zeros((BLOCK_N, BLOCK_E), S.COMPUTE), tl.zeros((BLOCK_N, BLOCK_F), S.COMPUTE))
            for member in range(0, group):
                head = key_of * group + member
                head_of_all = batch * heads + head.to(tl.int32)
                at_rows = head_of_all.to(tl.int64) * padded
                list_of, mask_of, bias_of, first_of, last_of = 0, 0, 0, 0, 0  # what is absent
                count = slots
                if LISTED:
                    line = (wide_batch * plan_batch + head * plan_head) * key_blocks + block_n
                    list_of = blocks + line * slots
                    count = tl.load(counts + line * 2 + (1 if turn == 2 else 0))
                if S.HAS_INTERVALS:
                    at_first = wide_batch * first_batch + head * first_head
                    first_of = first + at_first
                    last_of = last + at_first
                if S.HAS_MASK:
                    mask_of = mask + wide_batch * mask_batch + head * mask_head
                if S.HAS_BIAS:
                    bias_of = bias + wide_batch * bias_batch + head * bias_head
                tensors = (mask_of, bias_of, seed_value)
                strides = (mask_row, mask_key, bias_row, bias_key)
                numbers = (rows, keys, inner, outer, threshold, head_of_all, factor_kept)
                queries = (
                    query + wide_batch * query_batch + head * query_head,
                    query_row,
                    grad_out + wide_batch * grad_batch + head * grad_head,
                    grad_row,
                    top + at_rows,
                    delta + at_rows,
                    first_of,
                    last_of,
                )
                for step in range(0, count):
                    if turn == 2:
                        block = full_block(step, list_of, 0, slots, LISTED)
                        state = _keys_tile(state, k, v, column, block, queries, tensors, strides, numbers, S, False)
                    elif turn == 0:
                        block = partial_block(step, list_of, 0, 0, 0, True)
                        state = _keys_tile(state, k, v, column, block, queries, tensors, strides, numbers, S, True)
                    else:
                        block = partial_block(step, list_of, 0, 0, 0, True)
                        for row in range(block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, rows)):
                            state = _keys_row(
                                state, key_rows, value_rows, column, row, queries, tensors, strides, numbers, S
                            )

    of_key, of_value = state
    if S.HAS_DROPOUT:
        of_value *= factor_kept
    of_key *= tl.zeros((), S.COMPUTE) + scale + scale_rest
    grad_key += wide_batch * to_key_batch + key_of * to_key_head
    grad_value += wide_batch * to_value_batch + key_of * to_value_head
    store_tile(grad_key, of_key, start, to_key_row, keys, S.E, BLOCK_E, BLOCK_N)
    store_tile(grad_value, of_value, start, to_value_row, keys, S.F, BLOCK_F, BLOCK_N)


@triton.jit
def attention_backward_bias(
    query,
    key,
    value,
    first,
    last,
    mask,
    bias,
    seed,
    grad_out,
    top,
    delta,
    grad_bias,  # (1 or B, 1 or H, 1 or L, S)
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
    bias_heads,  # heads of the bias
    batch_share,  # batches and heads that share a number of the bias
    head_share,
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
    SUM_ROWS: tl.constexpr,  # whether all rows share a number
):
    """The gradient of a (BLOCK_M, BLOCK_N) tile of the bias, or of BLOCK_N numbers that all rows share."""
    program = tl.program_id(0)
    rows, keys = number(rows), number(keys)
    BLOCK_M: tl.constexpr = S.BLOCK_M
    BLOCK_N: tl.constexpr = S.BLOCK_N
    key_blocks = (keys + BLOCK_N - 1) // BLOCK_N
    row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    start = program % key_blocks * BLOCK_N
    part = program // key_blocks
    from_block = row_blocks * 0
    to_block = row_blocks
    if not SUM_ROWS:
        from_block = part % row_blocks
        to_block = from_block + 1
        part = part // row_blocks
    column = start + tl.arange(0, BLOCK_N)
    inner, outer = score_factors(scale, scale_rest, softcap, softcap_rest, S)
    seed_value = 0
    if S.HAS_DROPOUT:
        seed_value = tl.load(seed)
    strides = (mask_row, mask_key, bias_row, bias_key)
    factor_kept = tl.zeros((), S.COMPUTE) + kept + kept_rest
    if SUM_ROWS:
        acc = tl.zeros((BLOCK_N,), S.COMPUTE)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), S.COMPUTE)
    for next_batch in range(0, batch_share):
        for next_head in range(0, head_share):
            batch = wide(part // bias_heads + next_batch)
            head = wide(part % bias_heads + next_head)
            key_of = wide((part % bias_heads + next_head) // group)
            head_of_all = (part // bias_heads + next_batch) * heads + part % bias_heads + next_head
            at_rows = head_of_all.to(tl.int64) * padded
            numbers = (rows, keys, inner, outer, threshold, head_of_all, factor_kept)
            mask_of, first_of, last_of = 0, 0, 0
            if S.HAS_MASK:
                mask_of = mask + batch * mask_batch + head * mask_head
            if S.HAS_INTERVALS:
                at_first = batch * first_batch + head * first_head
                first_of = first + at_first
                last_of = last + at_first
            tensors = (mask_of, bias + batch * bias_batch + head * bias_head, seed_value)
            at_query = query + batch * query_batch + head * query_head
            at_grad = grad_out + batch * grad_batch + head * grad_head
            at_key = key + batch * key_batch + key_of * key_head
            at_value = value + batch * value_batch + key_of * value_head
            for block in range(from_block, to_block):
                row = block * BLOCK_M + tl.arange(0, BLOCK_M)
                begin, end = load_interval(first_of, last_of, row, rows, S.HAS_INTERVALS)
                line = row[:, None]
                visible = pair_visible(
                    line, column[None, :], begin[:, None], end[:, None], tensors, strides, numbers, S
                )
                if tl.max(tl.max(visible.to(tl.int32), axis=1), axis=0) != 0:
                    q = load_tile(at_query, block * BLOCK_M, query_row, 0, rows, S.E, S.BLOCK_E, BLOCK_M, True)
                    k = load_tile(at_key, start, key_row, 0, keys, S.E, S.BLOCK_E, BLOCK_N, True)
                    dots = tl.dot(q, tl.trans(k), input_precision=S.PRECISION, out_dtype=S.COMPUTE)
                    grad = load_tile(at_grad, block * BLOCK_M, grad_row, 0, rows, S.F, S.BLOCK_F, BLOCK_M, True)
                    v = load_tile(at_value, start, value_row, 0, keys, S.F, S.BLOCK_F, BLOCK_N, True)
                    grads = tl.dot(grad, tl.trans(v), input_precision=S.PRECISION, out_dtype=S.COMPUTE)
                    tops = tl.load(top + at_rows + row)
                    deltas = tl.load(delta + at_rows + row)
                    dropped = dots
                    if S.HAS_DROPOUT:
                        dropped = tile_dropped(line, start, seed_value, numbers, BLOCK_N, False)
                    weights, slope = weigh(dots, line, column[None, :], tops[:, None], tensors, strides, numbers, S)
                    grad_scores, _ = differentiate(
                        weights, slope, grads, deltas[:, None], visible, dropped, numbers, S, True
                    )
                    if SUM_ROWS:
                        acc += tl.sum(grad_scores, axis=0)
                    else:
                        acc += grad_scores
    if SUM_ROWS:
        tl.store(grad_bias + wide(part) * keys + column, acc.to(grad_bias.dtype.element_ty), mask=column < keys)
    else:
        row_of = wide(part) * rows + from_block * BLOCK_M
        at = grad_bias + (row_of + tl.arange(0, BLOCK_M))[:, None] * keys + column[None, :]
        inside = ((from_block * BLOCK_M + tl.arange(0, BLOCK_M)) < rows)[:, None] & (column < keys)[None, :]
        tl.store(at, acc.to(grad_bias.dtype.element_ty), mask=inside)
