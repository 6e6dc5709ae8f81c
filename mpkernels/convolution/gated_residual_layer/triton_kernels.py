"""The Triton kernels of WaveNet's layer.

Formula (van den Oord et al. 2016, "WaveNet", eq. 2 and figure 4), with the tensors and the order of sums of schema.py:

    z        = weight * xs + condition_weight condition + offset        h = tanh(z[:G]) sigmoid(z[G:])
    residual = residual_scale (x + projection[:R] h + bias[:R])         skip = projection[R:] h + bias[R:]

and backward, with f = z[:G], g = z[G:] and the gradients dR, dS of both outputs:

    dh   = residual_scale projection[:R]^T dR + projection[R:]^T dS
    dz_f = dh sigmoid(g) (1 - tanh(f)^2)         dz_g = dh tanh(f) sigmoid(g) sigmoid(-g)

from which the kernels of the dilated convolution make all other gradients (those of the condition and the projections
are convolutions of one tap).

Shapes: x (B, R, T), history (B, R, past), weight (2 G, R, K), condition (B, A, T), gates (B, 2 G, T) float32 or wider,
hidden (B, G, T); each by its strides in elements, ``<name>_<dimension>``.

Decomposition:
    gated_residual_forward     a program BLOCK_T positions of a sequence, and BLOCK_G filters with the BLOCK_G gates
                               that belong to them: they read a tile of x once. FUSED, BLOCK_G is all of them: h stays
                               on the chip, and the program makes the residual and the skip outputs of its positions,
                               BLOCK_P rows at a time. Otherwise it writes h, which two convolutions of one tap project.
    gated_residual_grad_gates  a program BLOCK_G pairs x BLOCK_T positions: dz, and h again for the projections

Work: 2 (2 G (R K + A) + P G) FLOPs a position. Bytes, fused: x and condition once (x again for the residual, from L2),
residual and skip once, gates where they are kept; weights once a program, from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpkernels.convolution.dilated_conv1d.triton_kernels import (
    not_finite,
    read_tile,
    repair,
    sum_exactly,
    tap_ranges,
)


@triton.jit
def gate_values(filters, openings, COMPUTE: tl.constexpr):
    """(tanh f, 1 - tanh^2 f, sigmoid g, sigmoid -g): no exponent is positive, so nothing overflows."""
    e = tl.exp(-2.0 * tl.abs(filters))
    share = 1.0 / (1.0 + e)
    size = (1.0 - e) * share
    # the difference has lost digits where f is small, and the series has them
    square = filters * filters
    limit: tl.constexpr = 0.0625 if tl.float32 == COMPUTE else 0.00390625
    series = -1382.0 / 155925.0 + square * (21844.0 / 6081075.0)
    series = -17.0 / 315.0 + square * (62.0 / 2835.0 + square * series)
    series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series))
    size = tl.where(square < limit, tl.abs(filters) * series, size)
    e_open = tl.exp(-tl.abs(openings))
    near = 1.0 / (1.0 + e_open)
    far = e_open * near
    positive = openings >= 0
    return (
        tl.where(filters < 0, -size, size),
        4.0 * e * share * share,
        tl.where(positive, near, far),
        tl.where(positive, far, near),
    )


@triton.jit
def _sum_pairs(
    filters,
    openings,
    first,  # taps [first, last)
    last,
    source,
    history,
    weight,  # of the filters
    to_gates,  # from a filter's weights to its gate's
    row,  # (BLOCK_G, 1)
    position,  # (1, BLOCK_T): where tap 0 reads
    strides,  # source_channel, source_position, history_channel, weight_out, weight_in, weight_tap
    sizes,  # length, past, dilation, inputs, outputs
    HAS_HISTORY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Adds the products of some taps to filters and gates; what they read outside counts as 0."""
    length, past, dilation, inputs, outputs = sizes
    blocks = ((inputs + BLOCK_C - 1) // BLOCK_C).to(tl.int32)  # a 64-bit division in the loop would be slow
    for step in range(first.to(tl.int32) * blocks, last.to(tl.int32) * blocks):
        tap = step // blocks
        column = ((step - tap * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
        read = position + tap * dilation
        at = weight + tap.to(tl.int64) * strides[5] + row * strides[3] + column[None, :] * strides[4]
        inside = (row < outputs) & (column < inputs)[None, :]
        w_filter = tl.load(at, mask=inside, other=0.0)
        w_gate = tl.load(at + to_gates, mask=inside, other=0.0)
        exists = (column < inputs)[:, None]
        x = read_tile(source, history, column[:, None], exists, read, strides, length, past, HAS_HISTORY)
        filters = tl.dot(w_filter, x, filters, input_precision="ieee", out_dtype=COMPUTE)
        openings = tl.dot(w_gate, x, openings, input_precision="ieee", out_dtype=COMPUTE)
    return filters, openings


@triton.jit
def _project(
    h,  # (BLOCK_G, BLOCK_T)
    projection,  # (rows, G)
    bias,  # (rows,)
    added,  # (rows, T) of this sequence
    out,  # (rows, T) of this sequence
    added_channel,
    added_position,
    out_channel,
    out_position,
    rows,
    pairs,
    position,  # (1, BLOCK_T)
    length,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows of a projection of h, BLOCK_P at a time: scale (added + projection h + bias), or without both."""
    column = tl.arange(0, BLOCK_G).to(tl.int64)[None, :]
    for start in range(0, rows, BLOCK_P):
        row = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        w = tl.load(projection + row * pairs + column, mask=(row < rows) & (column < pairs), other=0.0)
        found = tl.dot(w, h, input_precision="ieee", out_dtype=COMPUTE)
        here = (row < rows) & (position < length)
        if HAS_BIAS:
            found += tl.load(bias + row, mask=row < rows, other=0.0).to(COMPUTE)
        if HAS_ADDED:
            at_added = added + row * added_channel + position * added_position
            found = (found + tl.load(at_added, mask=here, other=0.0).to(COMPUTE)) * scale
        tl.store(out + row * out_channel + position * out_position, found.to(out.dtype.element_ty), mask=here)


@triton.jit
def gated_residual_forward(
    x,
    history,
    weight,
    offset,  # (B or 1, 2 G)
    condition,
    condition_weight,  # (2 G, A)
    projection,  # (P, G)
    projection_bias,  # (P,)
    residual,  # (B, R, T)
    skip,  # (B, P - R, T)
    gates,
    hidden,
    x_batch,
    x_channel,
    x_position,
    history_batch,
    history_channel,
    weight_out,
    weight_in,
    weight_tap,
    offset_batch,
    condition_batch,
    condition_channel,
    condition_position,
    residual_batch,
    residual_channel,
    residual_position,
    skip_batch,
    skip_channel,
    skip_position,
    gates_batch,
    gates_channel,
    gates_position,
    hidden_batch,
    hidden_channel,
    hidden_position,
    length,
    past,
    left,
    dilation,
    taps,
    inputs,  # R
    pairs,  # G
    conditions,  # A
    residual_rows,  # R, or 0 without a residual output
    skip_rows,
    scale,  # residual_scale: the sum of a float32 and the rest of a float64
    scale_rest,
    HAS_HISTORY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_CONDITION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The layer at BLOCK_T positions (FUSED), or the h of BLOCK_G pairs there."""
    program = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0, tl.int64)  # makes a number of what comes as a constant, because it is 1
    length, past, left, dilation, taps = zero + length, zero + past, zero + left, zero + dilation, zero + taps
    inputs, pairs = zero + inputs, zero + pairs
    start_g = zero
    if not FUSED:
        blocks_g = (pairs + BLOCK_G - 1) // BLOCK_G
        start_g = program % blocks_g * BLOCK_G
        program = program // blocks_g
    blocks_t = (length + BLOCK_T - 1) // BLOCK_T
    start = program % blocks_t * BLOCK_T
    batch = program // blocks_t
    x += batch * x_batch
    low = length * 0
    if HAS_HISTORY:
        history += batch * history_batch
        low = -past

    stop = tl.minimum(start + BLOCK_T, length)
    first, now, last, ragged = tap_ranges(start, stop, low, length, left, dilation, taps)
    position = (start + tl.arange(0, BLOCK_T))[None, :]
    row = (start_g + tl.arange(0, BLOCK_G))[:, None]
    strides = (x_channel, x_position, history_channel, weight_out, weight_in, weight_tap)
    sizes = (length, past, dilation, inputs, pairs)
    to_gates = pairs * weight_out
    at = position - left
    f = tl.full((BLOCK_G, BLOCK_T), 0.0, COMPUTE)
    g = tl.full((BLOCK_G, BLOCK_T), 0.0, COMPUTE)
    if HAS_HISTORY:
        f, g = _sum_pairs(
            f, g, first, now, x, history, weight, to_gates, row, at, strides, sizes, True, BLOCK_C, COMPUTE
        )
        first_now = now
    else:
        first_now = first
    f, g = _sum_pairs(
        f, g, first_now, last, x, history, weight, to_gates, row, at, strides, sizes, False, BLOCK_C, COMPUTE
    )
    if ragged:  # noqa: SIM102 (the second question costs a reduction)
        if not_finite(f + g):
            exact = tl.full((BLOCK_G, BLOCK_T), 0.0, COMPUTE)
            exact = sum_exactly(exact, first, last, x, history, weight, row, at, strides, sizes, HAS_HISTORY, COMPUTE)
            f = repair(f, exact)
            exact = tl.full((BLOCK_G, BLOCK_T), 0.0, COMPUTE)
            exact = sum_exactly(
                exact, first, last, x, history, weight + to_gates, row, at, strides, sizes, HAS_HISTORY, COMPUTE
            )
            g = repair(g, exact)
    if HAS_CONDITION:
        columns = zero + conditions
        condition_strides = (condition_channel, condition_position, 0, columns, 1, 0)
        condition_sizes = (length, past, dilation, columns, pairs)
        f, g = _sum_pairs(
            f,
            g,
            zero,
            zero + 1,
            condition + batch * condition_batch,
            condition,
            condition_weight,
            pairs * columns,
            row,
            position,
            condition_strides,
            condition_sizes,
            False,
            BLOCK_C,
            COMPUTE,
        )
    if HAS_OFFSET:
        at_offset = offset + batch * offset_batch + row
        f += tl.load(at_offset, mask=row < pairs, other=0.0).to(COMPUTE)
        g += tl.load(at_offset + pairs, mask=row < pairs, other=0.0).to(COMPUTE)
    here = (row < pairs) & (position < length)
    if KEEP:
        at_gates = gates + batch * gates_batch + row * gates_channel + position * gates_position
        tl.store(at_gates, f, mask=here)
        tl.store(at_gates + pairs * gates_channel, g, mask=here)

    tanh_f, _, sigmoid_g, _ = gate_values(f, g, COMPUTE)
    h = (tanh_f * sigmoid_g).to(x.dtype.element_ty)
    if FUSED:
        _project(
            h,
            projection,
            projection_bias,
            x,
            residual + batch * residual_batch,
            x_channel,
            x_position,
            residual_channel,
            residual_position,
            residual_rows,
            pairs,
            position,
            length,
            tl.full((), 0, COMPUTE) + scale + scale_rest,
            HAS_BIAS,
            True,
            BLOCK_G,
            BLOCK_P,
            COMPUTE,
        )
        rest_of_bias = projection_bias
        if HAS_BIAS:
            rest_of_bias += residual_rows
        _project(
            h,
            projection + residual_rows * pairs,
            rest_of_bias,
            x,
            skip + batch * skip_batch,
            x_channel,
            x_position,
            skip_channel,
            skip_position,
            skip_rows,
            pairs,
            position,
            length,
            1.0,
            HAS_BIAS,
            False,
            BLOCK_G,
            BLOCK_P,
            COMPUTE,
        )
    else:
        tl.store(hidden + batch * hidden_batch + row * hidden_channel + position * hidden_position, h, mask=here)


@triton.jit
def _sum_rows(
    acc,  # (BLOCK_G, BLOCK_T)
    grad,  # (rows, T) of this sequence
    projection,  # (rows, G)
    grad_channel,
    grad_position,
    rows,
    pairs,
    row,  # (BLOCK_G, 1): columns of the projection
    position,
    length,
    BLOCK_P: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Adds the transposed projection of a gradient."""
    for start in range(0, rows, BLOCK_P):
        line = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        exists = line < rows
        w = tl.load(projection + line[None, :] * pairs + row, mask=exists[None, :] & (row < pairs), other=0.0)
        at = grad + line[:, None] * grad_channel + position * grad_position
        d = tl.load(at, mask=exists[:, None] & (position < length), other=0.0)
        acc = tl.dot(w, d, acc, input_precision="ieee", out_dtype=COMPUTE)
    return acc


@triton.jit
def gated_residual_grad_gates(
    grad_residual,  # (B, R, T)
    grad_skip,  # (B, P - R, T)
    gates,
    projection,  # (P, G)
    grad_gates,  # (B, 2 G, T)
    hidden,
    grad_residual_batch,
    grad_residual_channel,
    grad_residual_position,
    grad_skip_batch,
    grad_skip_channel,
    grad_skip_position,
    gates_batch,
    gates_channel,
    gates_position,
    grad_gates_batch,
    grad_gates_channel,
    grad_gates_position,
    hidden_batch,
    hidden_channel,
    hidden_position,
    length,
    pairs,
    residual_rows,
    skip_rows,
    scale,  # residual_scale: the sum of a float32 and the rest of a float64
    scale_rest,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    NEEDS_HIDDEN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The gradient of z, and h, of BLOCK_G pairs at BLOCK_T positions."""
    program = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0, tl.int64)
    length, pairs = zero + length, zero + pairs
    blocks_g = (pairs + BLOCK_G - 1) // BLOCK_G
    blocks_t = (length + BLOCK_T - 1) // BLOCK_T
    row = (program % blocks_g * BLOCK_G + tl.arange(0, BLOCK_G))[:, None]
    program = program // blocks_g
    position = (program % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
    batch = program // blocks_t

    grad_h = tl.full((BLOCK_G, BLOCK_T), 0.0, COMPUTE)
    if HAS_RESIDUAL:
        grad_h = _sum_rows(
            grad_h,
            grad_residual + batch * grad_residual_batch,
            projection,
            grad_residual_channel,
            grad_residual_position,
            residual_rows,
            pairs,
            row,
            position,
            length,
            BLOCK_P,
            COMPUTE,
        )
        grad_h *= tl.full((), 0, COMPUTE) + scale + scale_rest
    if HAS_SKIP:
        grad_h = _sum_rows(
            grad_h,
            grad_skip + batch * grad_skip_batch,
            projection + residual_rows * pairs,
            grad_skip_channel,
            grad_skip_position,
            skip_rows,
            pairs,
            row,
            position,
            length,
            BLOCK_P,
            COMPUTE,
        )

    here = (row < pairs) & (position < length)
    at_gates = gates + batch * gates_batch + row * gates_channel + position * gates_position
    f = tl.load(at_gates, mask=here, other=0.0)
    g = tl.load(at_gates + pairs * gates_channel, mask=here, other=0.0)
    tanh_f, slope_f, sigmoid_g, far_g = gate_values(f, g, COMPUTE)
    element = grad_gates.dtype.element_ty
    at = grad_gates + batch * grad_gates_batch + row * grad_gates_channel + position * grad_gates_position
    tl.store(at, (grad_h * sigmoid_g * slope_f).to(element), mask=here)
    tl.store(at + pairs * grad_gates_channel, (grad_h * tanh_f * sigmoid_g * far_g).to(element), mask=here)
    if NEEDS_HIDDEN:
        at_hidden = hidden + batch * hidden_batch + row * hidden_channel + position * hidden_position
        tl.store(at_hidden, (tanh_f * sigmoid_g).to(element), mask=here)
