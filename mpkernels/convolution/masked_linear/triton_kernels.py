"""The Triton kernels of MADE's layer.

In the order of degrees the mask is a staircase: output r sees the inputs [0, count[r]), and input s is seen by the
outputs [first[s], O). (Germain et al. 2015, "MADE", eq. 8 and 9; shapes in schema.py.)

    y[n, o]         = bias[o] + sum_i weight[o, i] x[n, i]     over the inputs that o sees
    of_x[n, i]      = sum_o weight[o, i] grad[n, o]            over the outputs that see i
    of_weight[o, i] = sum_n grad[n, o] x[n, i]                 where o sees i, and 0 elsewhere

``masked_linear_product`` is the first two: a program forms a block of rows times a block of sorted units, and walks the
sorted units of the other side in blocks. Blocks that nobody sees are not visited, and in those that all see the product
is a plain one. In a block on the staircase hidden weights are not loaded but 0, and 0 times a finite number adds
nothing; where the other factor holds a NaN or an infinity the block is summed term by term, with what is hidden left
out. ``masked_linear_of_weight`` forms a block of the gradient of the weight over all rows; blocks beyond the staircase
only write zeros. Every result is written by one program, whose sums have a fixed order.

Bytes: a program of the product loads depth (BLOCK_N + BLOCK_U) numbers for BLOCK_N BLOCK_U sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wide(x):
    """A size in 64 bits, before it is multiplied: where it is 1, it comes as a constant."""
    return tl.zeros((), tl.int64) + x


@triton.jit
def number(x):
    """A size as a number of the device."""
    return tl.zeros((), tl.int32) + x


@triton.jit
def factors(x, weight, row, row_inside, unit, depth_of, d, depth, visible, unit_stride, depth_stride):
    """Tiles of both factors at the sorted places ``d`` of the other side: (BLOCK_N, BLOCK_D) and (BLOCK_D, BLOCK_U)."""
    inside = d < depth
    other = tl.load(depth_of + d, mask=inside, other=0).to(tl.int64)
    left = tl.load(x + row[:, None] * depth + other[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
    place = other[:, None] * depth_stride + unit[None, :] * unit_stride
    return left, tl.load(weight + place, mask=visible & inside[:, None], other=0.0)


@triton.jit
def masked_linear_product(
    x,  # (rows, depth)
    weight,  # (O, I)
    bias,  # (units,)
    y,  # (rows, units)
    unit_of,  # (units,) int32: the unit at each sorted place
    depth_of,  # (depth,) int32
    limit,  # (units,) int32: a unit takes the sorted places [0, limit), or [limit, depth) where not FORWARD
    rows,
    units,
    depth,
    unit_stride,  # of the weight
    depth_stride,
    FORWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of BLOCK_N rows and BLOCK_U units, in the order of degrees."""
    unit_blocks = tl.cdiv(units, BLOCK_U)
    block = tl.program_id(0)
    depth, units = number(depth), wide(units)
    row = (block // unit_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = block % unit_blocks * BLOCK_U + tl.arange(0, BLOCK_U)
    row_inside, unit_inside = row < rows, place < units
    unit = tl.load(unit_of + place, mask=unit_inside, other=0).to(tl.int64)
    last = tl.load(limit + place, mask=unit_inside, other=0)
    most = tl.max(last, axis=0)
    least = tl.min(tl.where(unit_inside, last, depth), axis=0)
    if FORWARD:
        full_begin, full_end = least * 0, least // BLOCK_D * BLOCK_D
        begin, end = full_end, most
    else:
        begin, end = least // BLOCK_D * BLOCK_D, tl.minimum(tl.cdiv(most, BLOCK_D) * BLOCK_D, depth)
        full_begin, full_end = tl.cdiv(most, BLOCK_D) * BLOCK_D, depth
    total = tl.zeros((BLOCK_N, BLOCK_U), COMPUTE)
    for start in range(begin, end, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        if FORWARD:
            visible = (d[:, None] < last[None, :]) & unit_inside[None, :]
        else:
            visible = (d[:, None] >= last[None, :]) & unit_inside[None, :]
        a, w = factors(x, weight, row, row_inside, unit, depth_of, d, depth, visible, unit_stride, depth_stride)
        wide_a = a.to(COMPUTE)
        odd = tl.max(tl.max((wide_a - wide_a != 0).to(tl.int32), axis=1), axis=0)
        if odd == 0:
            total = tl.dot(a, w, total, input_precision="ieee", out_dtype=COMPUTE)
        else:
            for k in range(start, tl.minimum(start + BLOCK_D, depth)):
                if FORWARD:
                    seen = (k < last) & unit_inside
                else:
                    seen = (k >= last) & unit_inside
                other = tl.load(depth_of + k).to(tl.int64)
                a_k = tl.load(x + row * depth + other, mask=row_inside, other=0.0).to(COMPUTE)
                w_k = tl.load(weight + other * depth_stride + unit * unit_stride, mask=seen, other=0.0).to(COMPUTE)
                total += tl.where(seen[None, :], a_k[:, None] * w_k[None, :], 0.0)
    for start in range(full_begin, full_end, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        visible = unit_inside[None, :]
        a, w = factors(x, weight, row, row_inside, unit, depth_of, d, depth, visible, unit_stride, depth_stride)
        total = tl.dot(a, w, total, input_precision="ieee", out_dtype=COMPUTE)
    if HAS_BIAS:
        total += tl.load(bias + unit, mask=unit_inside, other=0.0).to(COMPUTE)[None, :]
    to = y + row[:, None] * units + unit[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=row_inside[:, None] & unit_inside[None, :])


@triton.jit
def masked_linear_of_weight(
    grad,  # (rows, outputs)
    x,  # (rows, inputs)
    of_weight,  # (outputs, inputs)
    order_out,  # (outputs,) int32
    order_in,  # (inputs,) int32
    count,  # (outputs,) int32
    rows,
    outputs,
    inputs,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A block of BLOCK_O outputs and BLOCK_I inputs, in the order of degrees, over all rows."""
    input_blocks = tl.cdiv(inputs, BLOCK_I)
    block = tl.program_id(0)
    outputs, inputs = wide(outputs), wide(inputs)
    r = block // input_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    s = block % input_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    out_inside, in_inside = r < outputs, s < inputs
    output = tl.load(order_out + r, mask=out_inside, other=0).to(tl.int64)
    input = tl.load(order_in + s, mask=in_inside, other=0).to(tl.int64)
    seen = tl.load(count + r, mask=out_inside, other=0)
    total = tl.zeros((BLOCK_O, BLOCK_I), COMPUTE)
    if tl.max(seen, axis=0) > tl.min(s, axis=0):
        for start in range(0, rows, BLOCK_N):
            n = wide(start) + tl.arange(0, BLOCK_N)
            inside = n < rows
            g = tl.load(
                grad + n[None, :] * outputs + output[:, None], mask=out_inside[:, None] & inside[None, :], other=0.0
            )
            a = tl.load(x + n[:, None] * inputs + input[None, :], mask=inside[:, None] & in_inside[None, :], other=0.0)
            total = tl.dot(g, a, total, input_precision="ieee", out_dtype=COMPUTE)
    total = tl.where(s[None, :] < seen[:, None], total, 0.0)
    to = of_weight + output[:, None] * inputs + input[None, :]
    tl.store(to, total.to(of_weight.dtype.element_ty), mask=out_inside[:, None] & in_inside[None, :])
