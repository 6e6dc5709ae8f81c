"""The Triton kernels of the affine coupling.

    y = kept ? x : x e^l + t            log_abs_det[b] = sum of l over the transformed elements

and its variants (shapes, scales, layouts and masks: schema.py). A program has BLOCK elements side by side of one
sample, element j being the j-th of (C, H, W); the parameters of a CHANNEL coupling begin at element `first`. The parts
of a joint layout come as two tensors with strides. Masks are computed from j. Where every tensor has (C, H, W) side by
side (NESTED), j is the offset; else channel, row and column are divided out of it.

Log-determinants are summed in float64, a part for each program, and the parts of a sample in their order.

Bytes: forward reads x, raw and shift once and writes y; backward reads x, raw and the gradient of y (and shift, where it
is added first) and writes three gradients. Where a mask is CHANNEL, parameters of kept elements are not read.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from mpkernels.flows.affine_coupling import schema

_EXP = tl.constexpr(schema.EXP)
_SIGMOID = tl.constexpr(schema.SIGMOID)
_TANH = tl.constexpr(schema.TANH)
_SOFTCLAMP = tl.constexpr(schema.SOFTCLAMP)
_ADDITIVE = tl.constexpr(schema.ADDITIVE)
_CHECKERBOARD = tl.constexpr(schema.CHECKERBOARD)
_CHANNEL = tl.constexpr(schema.CHANNEL)
_TENSOR = tl.constexpr(schema.TENSOR)
_ALTERNATING = tl.constexpr(schema.ALTERNATING)

_SOFT = tl.constexpr(0.636)
_STEP = tl.constexpr(math.pi / 16)
_HALF_PI = tl.constexpr(math.pi / 2)
_CENTRE_1 = tl.constexpr(math.tan(math.pi / 16))
_CENTRE_2 = tl.constexpr(math.tan(math.pi / 8))
_CENTRE_3 = tl.constexpr(math.tan(3 * math.pi / 16))
_BORDER_1 = tl.constexpr(math.tan(math.pi / 32))
_BORDER_2 = tl.constexpr(math.tan(3 * math.pi / 32))
_BORDER_3 = tl.constexpr(math.tan(5 * math.pi / 32))
_BORDER_4 = tl.constexpr(math.tan(7 * math.pi / 32))


@triton.jit
def _log_1p(e):
    """log(1 + e) for e in [0, 1], with the digits of a small e."""
    total = 1 + e
    return tl.log(total) + (e - (total - 1)) / total


@triton.jit
def _atan(x):
    """The arc tangent, to a few roundings: 1/|x| above 1, then the nearest of five centres, then eight terms."""
    size = tl.abs(x)
    above = size > 1
    t = tl.where(above, 1 / tl.maximum(size, 1.0), size)
    zero = tl.zeros_like(t)
    centre = tl.where(t > _BORDER_1, _CENTRE_1, zero)
    angle = tl.where(t > _BORDER_1, _STEP, zero)
    centre = tl.where(t > _BORDER_2, _CENTRE_2, centre)
    angle = tl.where(t > _BORDER_2, 2 * _STEP, angle)
    centre = tl.where(t > _BORDER_3, _CENTRE_3, centre)
    angle = tl.where(t > _BORDER_3, 3 * _STEP, angle)
    centre = tl.where(t > _BORDER_4, 1.0, centre)
    angle = tl.where(t > _BORDER_4, 4 * _STEP, angle)
    r = (t - centre) / (1 + centre * t)
    q = -r * r
    series = q / 15 + 1.0 / 13
    series = series * q + 1.0 / 11
    series = series * q + 1.0 / 9
    series = series * q + 1.0 / 7
    series = series * q + 1.0 / 5
    series = series * q + 1.0 / 3
    found = angle + (r + r * q * series)
    found = tl.where(above, _HALF_PI - found, found)
    found = tl.where(x != x, x, found)
    return tl.where(x < 0, -found, found)


@triton.jit
def _limited(x):
    """(x limited so that e^x is neither 0 nor infinite, where it was beyond); a NaN stays."""
    limit: tl.constexpr = 708.0 if x.dtype == tl.float64 else 87.0
    beyond = tl.abs(x) > limit
    return tl.where(beyond, tl.where(x > 0, limit, -limit).to(x.dtype), x), beyond


@triton.jit
def _multiplier(raw, SCALE: tl.constexpr, CLAMP: tl.constexpr, EPSILON: tl.constexpr, INVERSE: tl.constexpr):
    """(e^l, l, how l changes with raw, where e^l is limited); for the inverse of -l."""
    if SCALE == _SIGMOID:
        u, beyond = _limited(raw + 2)
        e = tl.exp(-tl.abs(u))
        small = e / (1 + e)
        large = 1 / (1 + e)
        sigmoid = tl.where(u < 0, small, large)
        slope = tl.where(u < 0, large, small)
        if EPSILON == 0:
            log_scale = tl.where(u < 0, raw + 2, 0.0) - _log_1p(e)
            # (1 + e^-u, without a quotient of numbers that are hardly above 0)
            factor = tl.where(u < 0, 1 + 1 / e, 1 + e) if INVERSE else sigmoid
        else:
            scale = sigmoid + EPSILON
            log_scale = tl.log(scale)
            slope = sigmoid * slope / scale
            factor = 1 / scale if INVERSE else scale
        log_scale = -log_scale if INVERSE else log_scale
    else:
        if SCALE == _TANH:
            e = tl.exp(-2 * tl.abs(raw))
            size = (1 - e) / (1 + e)
            log_scale = CLAMP * tl.where(raw < 0, -size, size)
            slope = CLAMP * (4 * e / ((1 + e) * (1 + e)))
        elif SCALE == _SOFTCLAMP:
            log_scale = (CLAMP * _SOFT) * _atan(raw)
            slope = (CLAMP * _SOFT) / (1 + raw * raw)
        else:
            log_scale = raw
            slope = tl.full(raw.shape, 1.0, raw.dtype)
        log_scale = -log_scale if INVERSE else log_scale
        exponent, beyond = _limited(log_scale)
        factor = tl.exp(exponent)
    return factor, log_scale, -slope if INVERSE else slope, beyond


@triton.jit
def _place(size, pieces, LARGE: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, piece, elements) of this program; elements in 32 bits unless the sample is LARGE."""
    program = tl.program_id(0)
    piece = program % pieces
    if LARGE:
        j = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    else:
        j = piece * BLOCK + tl.arange(0, BLOCK)
    return (program // pieces).to(tl.int64), piece, j


@triton.jit
def _position(j, height, width, NESTED: tl.constexpr, PATTERN: tl.constexpr):
    """(channel, row, column) of the elements, where anything reads them."""
    if NESTED and PATTERN != _CHECKERBOARD and PATTERN != _ALTERNATING:
        return j, j, j
    else:
        row = j // width
        return row // height, row % height, j % width


@triton.jit
def _offset(c, h, w, stride_c, stride_h, stride_w):
    return c.to(tl.int64) * stride_c + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def _transformed(mask, b, j, c, h, w, inside, first, last, mask_b, mask_c, mask_h, mask_w,
                 PATTERN: tl.constexpr, PARITY: tl.constexpr, NESTED: tl.constexpr):  # fmt: skip
    """Which of the elements inside are transformed."""
    if PATTERN == _CHECKERBOARD:
        return inside & (((h + w) & 1) == PARITY)
    elif PATTERN == _ALTERNATING:
        return inside & ((c & 1) == PARITY)
    elif PATTERN == _CHANNEL:
        return inside & (j >= first) & (j < last)
    elif PATTERN == _TENSOR:
        at = j if NESTED else _offset(c, h, w, mask_c, mask_h, mask_w)
        return inside & (tl.load(mask + b * mask_b + at, mask=inside, other=1) == 0)
    else:
        return inside


@triton.jit
def _parameters(tensor, b, j, c, h, w, transformed, inside, first, c_first, stride_b, stride_c, stride_h, stride_w,
                PATTERN: tl.constexpr, NESTED: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Parameters of the transformed elements, 0 for the others."""
    at = j - first if NESTED else _offset(c - c_first, h, w, stride_c, stride_h, stride_w)
    # a whole block where there are parameters for it: a mask that changes from element to element would narrow the loads
    readable = transformed if PATTERN == _CHANNEL else inside
    found = tl.load(tensor + b * stride_b + at, mask=readable, other=0.0).to(TYPE)
    return tl.where(transformed, found, 0.0)


@triton.jit
def coupling_forward(x, raw, shift, mask, y, parts, x_b, x_c, x_h, x_w, raw_b, raw_c, raw_h, raw_w,
                     shift_b, shift_c, shift_h, shift_w, mask_b, mask_c, mask_h, mask_w, size, pieces, height, width,
                     first, last, c_first, SCALE: tl.constexpr, CLAMP: tl.constexpr, EPSILON: tl.constexpr,
                     PATTERN: tl.constexpr, PARITY: tl.constexpr, INNER: tl.constexpr, INVERSE: tl.constexpr,
                     NESTED: tl.constexpr, LARGE: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK elements of y (B, size), and their part of log_abs_det (B, pieces). INNER: the shift is added first."""
    b, piece, j = _place(size, pieces, LARGE, BLOCK)
    inside = j < size
    c, h, w = _position(j, height, width, NESTED, PATTERN)
    transformed = _transformed(
        mask, b, j, c, h, w, inside, first, last, mask_b, mask_c, mask_h, mask_w, PATTERN, PARITY, NESTED
    )
    at = j if NESTED else _offset(c, h, w, x_c, x_h, x_w)
    kept = tl.load(x + b * x_b + at, mask=inside, other=0.0)
    t = _parameters(
        shift, b, j, c, h, w, transformed, inside, first, c_first, shift_b, shift_c, shift_h, shift_w, PATTERN, NESTED,
        TYPE,
    )  # fmt: skip
    t = -t if INVERSE else t
    if SCALE == _ADDITIVE:
        value = kept.to(TYPE) + t
    else:
        u = _parameters(
            raw, b, j, c, h, w, transformed, inside, first, c_first, raw_b, raw_c, raw_h, raw_w, PATTERN, NESTED, TYPE
        )
        factor, log_scale, _, _ = _multiplier(u, SCALE, CLAMP, EPSILON, INVERSE)
        value = (kept.to(TYPE) + t) * factor if INNER else kept.to(TYPE) * factor + t
        total = tl.sum(tl.where(transformed, log_scale, 0.0).to(tl.float64), axis=0)
        tl.store(parts + b * pieces + piece, total)
    # (kept elements go from x to y as they are)
    tl.store(y + b * size + j, tl.where(transformed, value.to(kept.dtype), kept), mask=inside)


@triton.jit
def coupling_sum(parts, out, pieces, BLOCK: tl.constexpr):
    """log_abs_det of a sample from its parts, in their order."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, pieces, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(parts + b * pieces + at, mask=at < pieces, other=0.0)
    tl.store(out + b, tl.sum(total, axis=0))


@triton.jit
def coupling_backward(grad, grad_log, x, raw, shift, mask, of_x, of_raw, of_shift, grad_b, grad_c, grad_h, grad_w,
                      grad_log_b, x_b, x_c, x_h, x_w, raw_b, raw_c, raw_h, raw_w, shift_b, shift_c, shift_h, shift_w,
                      mask_b, mask_c, mask_h, mask_w, of_raw_b, of_raw_c, of_shift_b, of_shift_c, size, pieces,
                      height, width, first, last, c_first, SCALE: tl.constexpr, CLAMP: tl.constexpr,
                      EPSILON: tl.constexpr, PATTERN: tl.constexpr, PARITY: tl.constexpr, INNER: tl.constexpr,
                      INVERSE: tl.constexpr, NESTED: tl.constexpr, LARGE: tl.constexpr, TYPE: tl.constexpr,
                      NEEDS_X: tl.constexpr, NEEDS_RAW: tl.constexpr, NEEDS_SHIFT: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK elements of the gradients: of_x (B, size); of_raw and of_shift with (H, W) side by side."""
    b, _, j = _place(size, pieces, LARGE, BLOCK)
    inside = j < size
    c, h, w = _position(j, height, width, NESTED, PATTERN)
    transformed = _transformed(
        mask, b, j, c, h, w, inside, first, last, mask_b, mask_c, mask_h, mask_w, PATTERN, PARITY, NESTED
    )
    at = j if NESTED else _offset(c, h, w, grad_c, grad_h, grad_w)
    kept = tl.load(grad + b * grad_b + at, mask=inside, other=0.0)
    g = kept.to(TYPE)
    of_value = g  # the gradient of x, and without its sign, of a shift that is added first
    if SCALE != _ADDITIVE:
        u = _parameters(
            raw, b, j, c, h, w, transformed, inside, first, c_first, raw_b, raw_c, raw_h, raw_w, PATTERN, NESTED, TYPE
        )
        factor, _, slope, beyond = _multiplier(u, SCALE, CLAMP, EPSILON, INVERSE)
        of_value = g * factor
    if NEEDS_X:
        tl.store(of_x + b * size + j, tl.where(transformed, of_value.to(kept.dtype), kept), mask=inside)
    owned = inside & (j >= first) & (j < last) if PATTERN == _CHANNEL else inside  # elements that have parameters
    plane = j if NESTED else h * width + w
    if NEEDS_RAW:
        at = j if NESTED else _offset(c, h, w, x_c, x_h, x_w)
        value = tl.load(x + b * x_b + at, mask=inside, other=0.0).to(TYPE)
        if INNER:
            t = _parameters(
                shift, b, j, c, h, w, transformed, inside, first, c_first, shift_b, shift_c, shift_h, shift_w, PATTERN,
                NESTED, TYPE,
            )  # fmt: skip
            value = value - t if INVERSE else value + t
        of_log = tl.load(grad_log + b * grad_log_b).to(TYPE)
        through = tl.where(beyond, 0.0, of_value * value)  # (a limited e^l does not change)
        of_u = tl.where(transformed, (through + of_log) * slope, 0.0)
        at = j - first if NESTED else (c - c_first).to(tl.int64) * of_raw_c + plane
        tl.store(of_raw + b * of_raw_b + at, of_u, mask=owned)
    if NEEDS_SHIFT:
        of_t = of_value if INNER else g
        of_t = tl.where(transformed, -of_t if INVERSE else of_t, 0.0)
        at = j - first if NESTED else (c - c_first).to(tl.int64) * of_shift_c + plane
        tl.store(of_shift + b * of_shift_b + at, of_t, mask=owned)
