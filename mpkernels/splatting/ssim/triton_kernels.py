"""The Triton kernels of SSIM.

With the averages mu_p, mu_d, E[p^2] and E[d^2] of the sum p = x + y and the difference d = x - y of the images,

    A = (mu_p^2 + mu_d^2) / 2 + C1      B = (var_p + var_d) / 2 + C2      SSIM = (1 - mu_d^2 / A) (1 - var_d / B)

which is Wang et al. 2004, eq. 13, since 4 x y = p^2 - d^2 and 2 (x^2 + y^2) = p^2 + d^2. The gradient, with maps
G_p = grad dSSIM/dmu_p and so on, w * being the same convolution back (maps are zero outside):

    dL/dp = w * G_p + 2 p (w * G_pp)    dL/dd = w * G_d + 2 d (w * G_dd)    dL/dx = dL/dp + dL/dd, dL/dy = dL/dp - dL/dd

Shapes: image, target (P, H, M), rows of neighbours ``step`` apart; map (P, H', M'); maps of derivatives (4, P, H', M').

Decomposition: a program takes a tile of ROWS by COLUMNS of the result, and walks down the rows that its windows hold:
a row is weighed along itself, TAPS numbers of the window at a time, by loads that meet in the first-level cache, and
added, weighted by its distance, to the sums of all rows of the tile, which are in registers. The mean is the sum of the
tiles' sums.

Bytes a number, float32: forward 8 read (and 4 written for a map), 13 instead of 8 with what neighbouring tiles share;
backward 8 read (12) and 16 written, then 24 read and 8 written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _averages(
    x,
    y,
    weights,
    plane,
    first_row,
    first_column,
    rows,
    columns,
    planes,
    out_rows,
    before_row,
    before_column,
    step,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    MAPS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The four sums (ROWS, COLUMNS) of a tile; x and y are images; for MAPS x is four maps, one behind the other."""
    p = tl.zeros((ROWS, COLUMNS), TYPE)
    d = tl.zeros((ROWS, COLUMNS), TYPE)
    pp = tl.zeros((ROWS, COLUMNS), TYPE)
    dd = tl.zeros((ROWS, COLUMNS), TYPE)
    top = first_row - before_row
    bottom = top + tl.minimum(out_rows - first_row, ROWS) + SIZE - 1
    volume = planes * rows * columns
    left = first_column - before_column + tl.arange(0, COLUMNS)
    for row in range(tl.maximum(top, 0), tl.minimum(bottom, rows)):
        row_p = tl.zeros((COLUMNS,), TYPE)
        row_d = tl.zeros((COLUMNS,), TYPE)
        row_pp = tl.zeros((COLUMNS,), TYPE)
        row_dd = tl.zeros((COLUMNS,), TYPE)
        for first_tap in tl.static_range(0, SIZE, TAPS):
            tap = first_tap + tl.arange(0, TAPS)
            weight = tl.load(weights + tap, mask=tap < SIZE, other=0.0)[:, None]
            column = left[None, :] + tap[:, None] * step  # (TAPS, COLUMNS)
            inside = (column >= 0) & (column < columns) & (tap < SIZE)[:, None]
            at = (plane * rows + row) * columns + column
            if MAPS:
                row_p += tl.sum(weight * tl.load(x + at, mask=inside, other=0.0), axis=0)
                row_d += tl.sum(weight * tl.load(x + volume + at, mask=inside, other=0.0), axis=0)
                row_pp += tl.sum(weight * tl.load(x + 2 * volume + at, mask=inside, other=0.0), axis=0)
                row_dd += tl.sum(weight * tl.load(x + 3 * volume + at, mask=inside, other=0.0), axis=0)
            else:
                value_x = tl.load(x + at, mask=inside, other=0.0)
                value_y = tl.load(y + at, mask=inside, other=0.0)
                total = value_x + value_y
                difference = value_x - value_y
                row_p += tl.sum(weight * total, axis=0)
                row_d += tl.sum(weight * difference, axis=0)
                row_pp += tl.sum(weight * (total * total), axis=0)
                row_dd += tl.sum(weight * (difference * difference), axis=0)
        tap = (row - top).to(tl.int32) - tl.arange(0, ROWS)
        sees = (tap >= 0) & (tap < SIZE)
        weight = tl.load(weights + tap, mask=sees, other=0.0)[:, None]
        sees = sees[:, None]
        p = tl.where(sees, p + weight * row_p[None, :], p)
        d = tl.where(sees, d + weight * row_d[None, :], d)
        pp = tl.where(sees, pp + weight * row_pp[None, :], pp)
        dd = tl.where(sees, dd + weight * row_dd[None, :], dd)
    return p, d, pp, dd


@triton.jit
def _tile(out_rows, out_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's plane, first row and first column; offsets in the result, and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(out_columns, COLUMNS)
    down = tl.cdiv(out_rows, ROWS)
    plane = program // (across * down)
    first_row = program // across % down * ROWS
    first_column = program % across * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    at = (plane * out_rows + row)[:, None] * out_columns + column[None, :]
    exists = (row < out_rows)[:, None] & (column < out_columns)[None, :]
    return plane, first_row, first_column, at, exists


@triton.jit
def _terms(p, d, pp, dd, constants):
    """1 / A, 1 / B, var_d, 1 - mu_d^2 / A and 1 - var_d / B."""
    variance = dd - d * d
    a = 1 / ((p * p + d * d) * 0.5 + tl.load(constants))
    b = 1 / ((pp - p * p + variance) * 0.5 + tl.load(constants + 1))
    return a, b, variance, 1 - d * d * a, 1 - variance * b


@triton.jit
def ssim_forward(
    image,
    target,
    weights,
    constants,
    out,
    planes,
    rows,
    columns,
    out_rows,
    out_columns,
    before_row,
    before_column,
    step,
    SIZE: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Writes the map, or, for MEAN, the float64 sums of the tiles."""
    plane, first_row, first_column, at, exists = _tile(out_rows, out_columns, ROWS, COLUMNS)
    p, d, pp, dd = _averages(
        image,
        target,
        weights,
        plane,
        first_row,
        first_column,
        rows,
        columns,
        planes,
        out_rows,
        before_row,
        before_column,
        step,
        SIZE,
        ROWS,
        COLUMNS,
        TAPS,
        False,
        TYPE,
    )
    _, _, _, luminance, contrast = _terms(p, d, pp, dd, constants)
    value = luminance * contrast
    if MEAN:
        total = tl.sum(tl.sum(tl.where(exists, value, 0.0).to(tl.float64), axis=1), axis=0)
        tl.store(out + tl.program_id(0), total)
    else:
        tl.store(out + at, value, mask=exists)


@triton.jit
def ssim_derivatives(
    image,
    target,
    weights,
    constants,
    grad,
    maps,
    planes,
    rows,
    columns,
    out_rows,
    out_columns,
    before_row,
    before_column,
    step,
    SIZE: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Writes the four maps; ``grad`` has the map's shape, or is one number for MEAN."""
    plane, first_row, first_column, at, exists = _tile(out_rows, out_columns, ROWS, COLUMNS)
    p, d, pp, dd = _averages(
        image,
        target,
        weights,
        plane,
        first_row,
        first_column,
        rows,
        columns,
        planes,
        out_rows,
        before_row,
        before_column,
        step,
        SIZE,
        ROWS,
        COLUMNS,
        TAPS,
        False,
        TYPE,
    )
    a, b, variance, luminance, contrast = _terms(p, d, pp, dd, constants)
    through_a = contrast * d * a
    through_b = luminance * b
    of_pp = through_b * variance * b * 0.5
    of_dd = of_pp - through_b
    of_p = through_a * d * a * p - 2 * of_pp * p
    of_d = through_a * (d * d * a - 2) - 2 * of_dd * d
    if MEAN:
        seed = (tl.load(grad).to(tl.float64) / (planes * out_rows * out_columns).to(tl.float64)).to(TYPE)
    else:
        seed = tl.load(grad + at, mask=exists, other=0.0)
    volume = planes * out_rows * out_columns
    tl.store(maps + at, seed * of_p, mask=exists)
    tl.store(maps + volume + at, seed * of_d, mask=exists)
    tl.store(maps + 2 * volume + at, seed * of_pp, mask=exists)
    tl.store(maps + 3 * volume + at, seed * of_dd, mask=exists)


@triton.jit
def ssim_backward(
    maps,
    image,
    target,
    weights,
    of_image,
    of_target,
    planes,
    rows,
    columns,
    out_rows,
    out_columns,
    before_row,
    before_column,
    step,
    SIZE: tl.constexpr,
    NEEDS_IMAGE: tl.constexpr,
    NEEDS_TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Writes the gradients of the images from the maps, whose rows and columns come first."""
    plane, first_row, first_column, at, exists = _tile(out_rows, out_columns, ROWS, COLUMNS)
    p, d, pp, dd = _averages(
        maps,
        maps,
        weights,
        plane,
        first_row,
        first_column,
        rows,
        columns,
        planes,
        out_rows,
        before_row,
        before_column,
        step,
        SIZE,
        ROWS,
        COLUMNS,
        TAPS,
        True,
        TYPE,
    )
    x = tl.load(image + at, mask=exists, other=0.0)
    y = tl.load(target + at, mask=exists, other=0.0)
    of_p = p + 2 * (x + y) * pp
    of_d = d + 2 * (x - y) * dd
    if NEEDS_IMAGE:
        tl.store(of_image + at, of_p + of_d, mask=exists)
    if NEEDS_TARGET:
        tl.store(of_target + at, of_p - of_d, mask=exists)
