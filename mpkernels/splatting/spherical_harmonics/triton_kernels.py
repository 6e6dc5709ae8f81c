"""The Triton kernels of spherical harmonics.

color = sum_k Y_k(u) coeffs_k with u = dir / |dir| and, for k = l^2 + l + m,

    Y = Q_l^m(z) Re (x + i y)^m  for m >= 0,     Y = Q_l^|m|(z) Im (x + i y)^|m|  for m < 0

(Sloan 2013, "Efficient spherical harmonic evaluation", with the signs of 3DGS: (-1)^m). With w_k = grad . coeffs_k the
gradient to u is that of the polynomial sum_k w_k Y_k, and that to the direction is (g - u (u . g)) / |dir|.

Shapes: dirs, colors (B, C, N, 3); coeffs (B, N, K, 3); masks (B, C, N); all contiguous.

Decomposition: a program takes BLOCK Gaussians of a batch, a thread each, and one camera after another. Rows of
coefficients are 12 K bytes apart: a load of one coefficient touches a sector a thread, and those beside it find the
sector in the first-level cache. The gradient of coefficients is summed over cameras in their order, in its own memory:
a program alone writes it. A direction that is zero or not finite keeps the term of degree 0 alone.

Bytes a Gaussian, float32, degree 3, one camera: forward 204 read and 12 written, backward 216 read and 204 written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _zonal(l: tl.constexpr, m: tl.constexpr, z):  # noqa: E741
    """Q_l^m(z) and its derivative."""
    zz = z * z
    one = zz * 0 + 1
    if l == 0:
        q, slope = one * 0.28209479177387814347, one * 0
    elif l == 1:
        if m == 0:
            q, slope = 0.48860251190291992159 * z, one * 0.48860251190291992159
        else:
            q, slope = one * -0.48860251190291992159, one * 0
    elif l == 2:
        if m == 0:
            q, slope = 0.31539156525252000603 * (3 * zz - 1), 1.89234939151512003618 * z
        elif m == 1:
            q, slope = -1.09254843059207907054 * z, one * -1.09254843059207907054
        else:
            q, slope = one * 0.54627421529603953527, one * 0
    elif l == 3:
        if m == 0:
            q = 0.37317633259011539141 * z * (5 * zz - 3)
            slope = 0.37317633259011539141 * (15 * zz - 3)
        elif m == 1:
            q, slope = -0.45704579946446573615 * (5 * zz - 1), -4.57045799464465736150 * z
        elif m == 2:
            q, slope = 1.44530572132027702769 * z, one * 1.44530572132027702769
        else:
            q, slope = one * -0.59004358992664351034, one * 0
    else:
        if m == 0:
            q = 0.10578554691520430380 * (zz * (35 * zz - 30) + 3)
            slope = 0.10578554691520430380 * z * (140 * zz - 60)
        elif m == 1:
            q = -0.66904654355728916795 * z * (7 * zz - 3)
            slope = -0.66904654355728916795 * (21 * zz - 3)
        elif m == 2:
            q, slope = 0.47308734787878000905 * (7 * zz - 1), 6.62322287030292012670 * z
        elif m == 3:
            q, slope = -1.77013076977993053104 * z, one * -1.77013076977993053104
        else:
            q, slope = one * 0.62583573544917613459, one * 0
    return q, slope


@triton.jit
def _direction(dirs, at, wanted):
    """The unit vector, 0 where there is none; the largest component; the length over it; whether there is one."""
    x = tl.load(dirs + 3 * at, mask=wanted, other=0.0)
    y = tl.load(dirs + 3 * at + 1, mask=wanted, other=0.0)
    z = tl.load(dirs + 3 * at + 2, mask=wanted, other=0.0)
    infinite = float("inf")
    scale = tl.maximum(tl.maximum(tl.abs(x), tl.abs(y)), tl.abs(z))
    usable = (tl.abs(x) < infinite) & (tl.abs(y) < infinite) & (tl.abs(z) < infinite) & (scale > 0)
    scale = tl.where(usable, scale, 1.0)
    x = tl.where(usable, x, 0.0) / scale
    y = tl.where(usable, y, 0.0) / scale
    z = tl.where(usable, z, 0.0) / scale
    length = tl.where(usable, tl.sqrt(x * x + y * y + z * z), 1.0)
    return x / length, y / length, z / length, scale, length, usable


@triton.jit
def _load_color(colors, at, mask):
    red = tl.load(colors + at, mask=mask, other=0.0)
    green = tl.load(colors + at + 1, mask=mask, other=0.0)
    blue = tl.load(colors + at + 2, mask=mask, other=0.0)
    return red, green, blue


@triton.jit
def _store_color(colors, at, red, green, blue, mask):
    tl.store(colors + at, red, mask=mask)
    tl.store(colors + at + 1, green, mask=mask)
    tl.store(colors + at + 2, blue, mask=mask)


@triton.jit
def _wanted(masks, at, exists, HAS_MASKS: tl.constexpr):
    wanted = exists
    if HAS_MASKS:
        wanted = exists & (tl.load(masks + at, mask=exists, other=0) != 0)
    return wanted


@triton.jit
def spherical_harmonics_forward(
    dirs,
    coeffs,
    masks,
    colors,
    cameras,
    gaussians,
    coefficients,
    DEGREE: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes colors."""
    blocks = tl.cdiv(gaussians, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    gaussian = program % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = gaussian < gaussians
    row = (batch * gaussians + gaussian) * 3 * coefficients
    for camera in range(0, cameras):
        at = (batch * cameras + camera) * gaussians + gaussian
        wanted = _wanted(masks, at, exists, HAS_MASKS)
        x, y, z, _, _, usable = _direction(dirs, at, wanted)
        red, green, blue = x * 0, x * 0, x * 0
        re, im = x * 0 + 1, x * 0  # (x + i y)^m
        for m in tl.static_range(0, DEGREE + 1):
            for l in tl.static_range(m, DEGREE + 1):  # noqa: E741
                q, _ = _zonal(l, m, z)
                read = wanted & (usable | (l == 0))
                c0, c1, c2 = _load_color(coeffs, row + 3 * (l * l + l + m), read)
                red, green, blue = red + re * q * c0, green + re * q * c1, blue + re * q * c2
                if m > 0:
                    c0, c1, c2 = _load_color(coeffs, row + 3 * (l * l + l - m), read)
                    red, green, blue = red + im * q * c0, green + im * q * c1, blue + im * q * c2
            re, im = x * re - y * im, x * im + y * re
        _store_color(colors, 3 * at, red, green, blue, exists)


@triton.jit
def _add_color(sums, at, factor, red, green, blue, first, mask):
    """Writes factor times a colour for the first camera, and adds it for the others."""
    before_red, before_green, before_blue = _load_color(sums, at, mask & (first == 0))
    _store_color(sums, at, before_red + factor * red, before_green + factor * green, before_blue + factor * blue, mask)


@triton.jit
def spherical_harmonics_backward(
    grad,
    dirs,
    coeffs,
    masks,
    of_dirs,
    of_coeffs,
    cameras,
    gaussians,
    coefficients,
    DEGREE: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    NEEDS_DIRS: tl.constexpr,
    NEEDS_COEFFS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the gradients of directions and of the coefficients that are read."""
    blocks = tl.cdiv(gaussians, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    gaussian = program % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = gaussian < gaussians
    row = (batch * gaussians + gaussian) * 3 * coefficients
    for camera in range(0, cameras):
        at = (batch * cameras + camera) * gaussians + gaussian
        wanted = _wanted(masks, at, exists, HAS_MASKS)
        x, y, z, scale, length, usable = _direction(dirs, at, wanted)
        red, green, blue = _load_color(grad, 3 * at, wanted)
        gx, gy, gz = x * 0, x * 0, x * 0
        re, im = x * 0 + 1, x * 0  # (x + i y)^m
        re_before, im_before = x * 0, x * 0  # (x + i y)^(m - 1)
        for m in tl.static_range(0, DEGREE + 1):
            for l in tl.static_range(m, DEGREE + 1):  # noqa: E741
                q, slope = _zonal(l, m, z)
                k = 3 * (l * l + l + m)
                if NEEDS_DIRS:
                    c0, c1, c2 = _load_color(coeffs, row + k, wanted & usable)
                    weight = red * c0 + green * c1 + blue * c2
                    gx += m * re_before * q * weight
                    gy -= m * im_before * q * weight
                    gz += re * slope * weight
                if NEEDS_COEFFS:
                    factor = tl.where(usable | (l == 0), re * q, 0.0)
                    _add_color(of_coeffs, row + k, factor, red, green, blue, camera == 0, exists)
                if m > 0:
                    k = 3 * (l * l + l - m)
                    if NEEDS_DIRS:
                        c0, c1, c2 = _load_color(coeffs, row + k, wanted & usable)
                        weight = red * c0 + green * c1 + blue * c2
                        gx += m * im_before * q * weight
                        gy += m * re_before * q * weight
                        gz += im * slope * weight
                    if NEEDS_COEFFS:
                        factor = tl.where(usable, im * q, 0.0)
                        _add_color(of_coeffs, row + k, factor, red, green, blue, camera == 0, exists)
            re_before, im_before = re, im
            re, im = x * re_before - y * im_before, x * im_before + y * re_before
        if NEEDS_DIRS:
            along = gx * x + gy * y + gz * z
            gx = tl.where(usable, (gx - along * x) / length / scale, 0.0)
            gy = tl.where(usable, (gy - along * y) / length / scale, 0.0)
            gz = tl.where(usable, (gz - along * z) / length / scale, 0.0)
            _store_color(of_dirs, 3 * at, gx, gy, gz, exists)
        tl.debug_barrier()  # another thread may add the next camera's part
