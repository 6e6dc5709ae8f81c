"""The Triton kernels of the projection of Gaussians.

EWA splatting (Zwicker et al. 2001) as in 3D Gaussian splatting (Kerbl et al. 2023), with the clamp, the blur and the
extents of gsplat 1.5.3:

    m = W mean + t        J = [fx/z 0 -fx tx/z^2; 0 fy/z -fy ty/z^2], tx = z clamp(x/z)      (ortho: [fx 0 0; 0 fy 0])
    A = J W (2 x 3)       cov0 = A Sigma A^T      cov = cov0 + eps2d I      conic = cov^-1      u = fx x/z + cx
    compensation = sqrt(max(0, det cov0 / det cov))      radius_x = ceil(k sqrt(cov_xx))

With T = A R S: cov0 = T T^T and det cov0 = |T_0 x T_1|^2, where nothing cancels; det cov = det cov0 + eps2d trace cov0
+ eps2d^2. Gradients: dL/dcov = -conic G conic, and d compensation = compensation / 2 eps2d conic cov0^-1 d cov.

Shapes, with B batches, C cameras and N Gaussians:
    means, scales (B, N, 3), quats (B, N, 4), covars (B, N, 6), opacities (B, N), viewmats (B, C, 4, 4), Ks (B, C, 3, 3)
    radii (B, C, N, 2) int32, means2d (B, C, N, 2), depths, compensations (B, C, N), conics (B, C, N, 3)
    partial sums of the gradients of cameras (B, tiles, C, 16): rotation, translation, fx, fy, cx, cy

Decomposition: a Gaussian a thread, BLOCK of them a program. The forward does one camera; the backward goes through all
cameras with its Gaussians and sums in registers. Gradients of cameras: a sum a program, then a second kernel sums the
programs in a fixed order, in double precision.

Bytes a Gaussian and camera, float32: forward 40 read and 36 written; backward 36 read, and 40 read and written for each
Gaussian.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@triton.jit
def _column(r, j: tl.constexpr):
    """Column j of rows r."""
    return r[0][j], r[1][j], r[2][j]


@triton.jit
def _times_symmetric(s, a):
    """S a, for S given by its upper triangle."""
    return (
        s[0] * a[0] + s[1] * a[1] + s[2] * a[2],
        s[1] * a[0] + s[3] * a[1] + s[4] * a[2],
        s[2] * a[0] + s[4] * a[1] + s[5] * a[2],
    )


@triton.jit
def _load3(pointer, at, mask):
    return (
        tl.load(pointer + 3 * at, mask=mask, other=0.0),
        tl.load(pointer + 3 * at + 1, mask=mask, other=0.0),
        tl.load(pointer + 3 * at + 2, mask=mask, other=0.0),
    )


@triton.jit
def _store3(pointer, at, x, mask):
    tl.store(pointer + 3 * at, x[0], mask=mask)
    tl.store(pointer + 3 * at + 1, x[1], mask=mask)
    tl.store(pointer + 3 * at + 2, x[2], mask=mask)


@triton.jit
def _camera(viewmats, intrinsics, view):
    """Rows of the rotation, translation, (fx, fy, cx, cy)."""
    v = viewmats + 16 * view
    k = intrinsics + 9 * view
    return (
        (
            (tl.load(v), tl.load(v + 1), tl.load(v + 2)),
            (tl.load(v + 4), tl.load(v + 5), tl.load(v + 6)),
            (tl.load(v + 8), tl.load(v + 9), tl.load(v + 10)),
        ),
        (tl.load(v + 3), tl.load(v + 7), tl.load(v + 11)),
        (tl.load(k), tl.load(k + 4), tl.load(k + 2), tl.load(k + 5)),
    )


@triton.jit
def _unit(quats, at, mask):
    """(w, x, y, z) of length 1, the length that was given, and whether that was 0 (then: the identity)."""
    w = tl.load(quats + 4 * at, mask=mask, other=0.0)
    x = tl.load(quats + 4 * at + 1, mask=mask, other=0.0)
    y = tl.load(quats + 4 * at + 2, mask=mask, other=0.0)
    z = tl.load(quats + 4 * at + 3, mask=mask, other=0.0)
    zero = (w == 0) & (x == 0) & (y == 0) & (z == 0)
    # divided by the largest component first: squares neither overflow nor vanish
    largest = tl.maximum(tl.maximum(tl.abs(w), tl.abs(x)), tl.maximum(tl.abs(y), tl.abs(z)))
    divisor = tl.where(zero, 1.0, largest)
    w = tl.where(zero, 1.0, w / divisor)
    x = x / divisor
    y = y / divisor
    z = z / divisor
    length = tl.sqrt(w * w + x * x + y * y + z * z)
    return (w / length, x / length, y / length, z / length), length * divisor, zero


@triton.jit
def _rotation(q):
    """The rows of R."""
    w, x, y, z = q
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )


@triton.jit
def _footprint(camera, m, rotation, scale, covar, width, height, eps2d, ORTHO: tl.constexpr, COVARS: tl.constexpr):
    """(1/z, x/z, y/z), what is not clamped, J, A, A R, T, normal, cov0, cov, (det, compensation)."""
    w, _, k = camera
    if ORTHO:
        inverse_z = m[2] * 0 + 1
        ratio_x = m[0]
        ratio_y = m[1]
        inside_x = m[0] == m[0]
        inside_y = inside_x
        j00 = m[2] * 0 + k[0]
        j11 = m[2] * 0 + k[1]
        j02 = m[2] * 0
        j12 = m[2] * 0
    else:
        inverse_z = 1 / m[2]
        ratio_x = m[0] * inverse_z
        ratio_y = m[1] * inverse_z
        low_x = -(k[2] + 0.15 * width) / k[0]
        high_x = (width - k[2] + 0.15 * width) / k[0]
        low_y = -(k[3] + 0.15 * height) / k[1]
        high_y = (height - k[3] + 0.15 * height) / k[1]
        inside_x = (ratio_x >= low_x) & (ratio_x <= high_x)
        inside_y = (ratio_y >= low_y) & (ratio_y <= high_y)
        j00 = k[0] * inverse_z
        j11 = k[1] * inverse_z
        clamped_x = tl.where(ratio_x > low_x, ratio_x, low_x)
        clamped_y = tl.where(ratio_y > low_y, ratio_y, low_y)
        j02 = -j00 * tl.where(clamped_x < high_x, clamped_x, high_x)
        j12 = -j11 * tl.where(clamped_y < high_y, clamped_y, high_y)
    a0 = (j00 * w[0][0] + j02 * w[2][0], j00 * w[0][1] + j02 * w[2][1], j00 * w[0][2] + j02 * w[2][2])
    a1 = (j11 * w[1][0] + j12 * w[2][0], j11 * w[1][1] + j12 * w[2][1], j11 * w[1][2] + j12 * w[2][2])
    if COVARS:
        b0 = a0
        b1 = a1
        t0 = _times_symmetric(covar, a0)
        t1 = _times_symmetric(covar, a1)
        normal = t0
        xx0 = _dot(a0, t0)
        xy = _dot(a0, t1)
        yy0 = _dot(a1, t1)
        det0 = xx0 * yy0 - xy * xy
    else:
        b0 = (_dot(a0, _column(rotation, 0)), _dot(a0, _column(rotation, 1)), _dot(a0, _column(rotation, 2)))
        b1 = (_dot(a1, _column(rotation, 0)), _dot(a1, _column(rotation, 1)), _dot(a1, _column(rotation, 2)))
        t0 = (b0[0] * scale[0], b0[1] * scale[1], b0[2] * scale[2])
        t1 = (b1[0] * scale[0], b1[1] * scale[1], b1[2] * scale[2])
        normal = _cross(t0, t1)
        xx0 = _dot(t0, t0)
        xy = _dot(t0, t1)
        yy0 = _dot(t1, t1)
        det0 = _dot(normal, normal)
    det = det0 + eps2d * (xx0 + yy0 + eps2d)
    positive = (det0 > 0) & (det > 0)
    compensation = tl.where(positive, tl.sqrt(tl.where(positive, det0 / det, 1.0)), 0.0)
    return (
        (inverse_z, ratio_x, ratio_y),
        (inside_x, inside_y),
        (j00, j02, j11, j12),
        (a0, a1),
        (b0, b1),
        (t0, t1),
        normal,
        (xx0, xy, yy0),
        (xx0 + eps2d, yy0 + eps2d),
        (det, compensation),
    )


@triton.jit
def _to_camera(camera, mean):
    w, t, _ = camera
    return _dot(w[0], mean) + t[0], _dot(w[1], mean) + t[1], _dot(w[2], mean) + t[2]


@triton.jit
def _load_shape(quats, scales, covars, at, mask, COVARS: tl.constexpr):
    """(unit quaternion, its length, whether that was 0), rotation, scale, covariance; what is absent is a copy."""
    if COVARS:
        p = covars + 6 * at
        covar = (
            tl.load(p, mask=mask, other=0.0),
            tl.load(p + 1, mask=mask, other=0.0),
            tl.load(p + 2, mask=mask, other=0.0),
            tl.load(p + 3, mask=mask, other=0.0),
            tl.load(p + 4, mask=mask, other=0.0),
            tl.load(p + 5, mask=mask, other=0.0),
        )
        scale = (covar[0], covar[1], covar[2])
        rotation = (scale, scale, scale)
        unit = ((covar[0], covar[1], covar[2], covar[3]), covar[0], covar[0] == 0)
    else:
        unit = _unit(quats, at, mask)
        rotation = _rotation(unit[0])
        scale = _load3(scales, at, mask)
        covar = (scale[0], scale[0], scale[0], scale[0], scale[0], scale[0])
    return unit, rotation, scale, covar


@triton.jit
def project_forward(
    means,
    quats,
    scales,
    covars,
    opacities,
    viewmats,
    intrinsics,
    radii,
    means2d,
    depths,
    conics,
    compensations,
    cameras,
    gaussians,
    tiles,
    width,
    height,
    near_plane,
    near_rest,
    far_plane,
    far_rest,
    radius_clip,
    radius_clip_rest,
    eps2d,
    eps2d_rest,
    COVARS: tl.constexpr,
    HAS_OPACITIES: tl.constexpr,
    ORTHO: tl.constexpr,
    ANTIALIASED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Projects BLOCK Gaussians by one camera; a setting and its rest add up to float64."""
    program = tl.program_id(0).to(tl.int64)
    view = program // tiles
    n = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    exists = n < gaussians
    at = view // cameras * gaussians + n
    to = view * gaussians + n
    zero = tl.full((), 0.0, COMPUTE)
    width = zero + width
    height = zero + height
    eps2d = zero + eps2d + eps2d_rest
    clip = zero + radius_clip + radius_clip_rest
    camera = _camera(viewmats, intrinsics, view)
    _, _, k = camera
    m = _to_camera(camera, _load3(means, at, exists))
    _, rotation, scale, covar = _load_shape(quats, scales, covars, at, exists, COVARS)
    ratio, _, jacobian, _, _, _, _, cov0, cov, dets = _footprint(
        camera, m, rotation, scale, covar, width, height, eps2d, ORTHO, COVARS
    )
    det, compensation = dets
    u = k[0] * ratio[1] + k[2]
    v = k[1] * ratio[2] + k[3]
    conic = (cov[1] / det, -cov0[1] / det, cov[0] / det)
    # 0 times a number is 0, times NaN or infinity NaN
    finite = u * 0 + v * 0 + m[2] * 0 + cov[0] * 0 + cov0[1] * 0 + cov[1] * 0 + det * 0
    finite = finite + conic[0] * 0 + conic[1] * 0 + conic[2] * 0
    extent = zero + 3.33
    valid = (det > 0) & (jacobian[0] != 0) & (jacobian[2] != 0)  # not without a focal length
    if HAS_OPACITIES:
        opacity = tl.load(opacities + at, mask=exists, other=0.0)
        if ANTIALIASED:
            opacity = opacity * compensation
        finite = finite + opacity * 0
        times_least = tl.where(255 * opacity > 1, 255 * opacity, 1.0)
        faint = tl.sqrt(2 * tl.log(times_least))
        extent = tl.where(faint < extent, faint, extent)
        valid = valid & (opacity >= 1 / 255)
    x = tl.ceil(extent * tl.sqrt(cov[0]))
    y = tl.ceil(extent * tl.sqrt(cov[1]))
    valid = valid & (finite == 0) & (m[2] >= zero + near_plane + near_rest) & (m[2] <= zero + far_plane + far_rest)
    valid = valid & ((x > clip) | (y > clip)) & (u + x > 0) & (u - x < width) & (v + y > 0) & (v - y < height)
    radius_x = tl.where(valid, tl.where(x < 1e9, x, 1e9), 0.0)
    radius_y = tl.where(valid, tl.where(y < 1e9, y, 1e9), 0.0)
    tl.store(radii + 2 * to, radius_x.to(tl.int32), mask=exists)
    tl.store(radii + 2 * to + 1, radius_y.to(tl.int32), mask=exists)
    tl.store(means2d + 2 * to, tl.where(valid, u, 0.0), mask=exists)
    tl.store(means2d + 2 * to + 1, tl.where(valid, v, 0.0), mask=exists)
    tl.store(depths + to, tl.where(valid, m[2], 0.0), mask=exists)
    tl.store(conics + 3 * to, tl.where(valid, conic[0], 0.0), mask=exists)
    tl.store(conics + 3 * to + 1, tl.where(valid, conic[1], 0.0), mask=exists)
    tl.store(conics + 3 * to + 2, tl.where(valid, conic[2], 0.0), mask=exists)
    tl.store(compensations + to, tl.where(valid, compensation, 0.0), mask=exists)


@triton.jit
def _add3(sums, g, drawn):
    """Sums and the terms of what is drawn."""
    return (
        sums[0] + tl.where(drawn, g[0], 0.0),
        sums[1] + tl.where(drawn, g[1], 0.0),
        sums[2] + tl.where(drawn, g[2], 0.0),
    )


@triton.jit
def _outer(x, a, y, b):
    """The row x a^T + y b^T."""
    return x * a[0] + y * b[0], x * a[1] + y * b[1], x * a[2] + y * b[2]


@triton.jit
def _add_sum(to, x, drawn):
    tl.store(to, tl.sum(tl.where(drawn, x, 0.0), axis=0))


@triton.jit
def project_backward(
    grad_means2d,
    grad_depths,
    grad_conics,
    grad_compensations,
    radii,
    means,
    quats,
    scales,
    covars,
    viewmats,
    intrinsics,
    of_means,
    of_quats,
    of_scales,
    of_covars,
    of_cameras,
    cameras,
    gaussians,
    tiles,
    width,
    height,
    eps2d,
    eps2d_rest,
    COVARS: tl.constexpr,
    ORTHO: tl.constexpr,
    HAS_MEANS2D: tl.constexpr,
    HAS_DEPTHS: tl.constexpr,
    HAS_CONICS: tl.constexpr,
    HAS_COMPENSATIONS: tl.constexpr,
    NEEDS_GAUSSIANS: tl.constexpr,
    NEEDS_CAMERAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of BLOCK Gaussians, summed over cameras, and their sums for each camera."""
    program = tl.program_id(0).to(tl.int64)
    batch = program // tiles
    n = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    exists = n < gaussians
    at = batch * gaussians + n
    zero = tl.full((), 0.0, COMPUTE)
    width = zero + width
    height = zero + height
    eps2d = zero + eps2d + eps2d_rest
    mean = _load3(means, at, exists)
    unit, rotation, scale, covar = _load_shape(quats, scales, covars, at, exists, COVARS)
    none = tl.zeros((BLOCK,), COMPUTE)
    sum_mean = (none, none, none)
    sum_scale = (none, none, none)
    sum_0 = (none, none, none)  # rows of the rotation; of covars: xx, xy, xz
    sum_1 = (none, none, none)  # yy, yz, zz
    sum_2 = (none, none, none)
    for c in range(0, cameras):
        view = batch * cameras + c
        here = view * gaussians + n
        drawn = exists & (
            (tl.load(radii + 2 * here, mask=exists, other=0) | tl.load(radii + 2 * here + 1, mask=exists, other=0)) != 0
        )
        of_u = none
        of_v = none
        of_depth = none
        of_compensation = none
        of_conic = (none, none, none)
        if HAS_MEANS2D:
            of_u = tl.load(grad_means2d + 2 * here, mask=drawn, other=0.0)
            of_v = tl.load(grad_means2d + 2 * here + 1, mask=drawn, other=0.0)
        if HAS_DEPTHS:
            of_depth = tl.load(grad_depths + here, mask=drawn, other=0.0)
        if HAS_CONICS:
            of_conic = _load3(grad_conics, here, drawn)
        if HAS_COMPENSATIONS:
            of_compensation = tl.load(grad_compensations + here, mask=drawn, other=0.0)

        camera = _camera(viewmats, intrinsics, view)
        w, _, k = camera
        m = _to_camera(camera, mean)
        ratio, inside, jacobian, a, b, t, normal, cov0, cov, dets = _footprint(
            camera, m, rotation, scale, covar, width, height, eps2d, ORTHO, COVARS
        )
        inverse_z, ratio_x, ratio_y = ratio
        j00, j02, j11, j12 = jacobian
        det, compensation = dets
        ka = cov[1] / det
        kb = -cov0[1] / det
        kc = cov[0] / det
        # dL/dcov = -conic G conic
        half = of_conic[1] * 0.5
        l00 = of_conic[0] * ka + half * kb
        l01 = of_conic[0] * kb + half * kc
        l10 = half * ka + of_conic[2] * kb
        l11 = half * kb + of_conic[2] * kc
        of_xx = -(ka * l00 + kb * l10)
        of_xy = -(ka * l01 + kb * l11)
        of_yy = -(kb * l01 + kc * l11)
        gain = tl.where(compensation > 0, eps2d * of_compensation / (det * compensation), 0.0)
        if COVARS:
            gain = gain * 0.5 / det
            of_xx += gain * (cov[1] * cov0[2] + cov0[1] * cov0[1])
            of_xy -= gain * (cov0[1] * (cov0[0] + cov[1]))
            of_yy += gain * (cov[0] * cov0[0] + cov0[1] * cov0[1])
            g0 = _outer(of_xx, a[0], of_xy, a[1])  # dL/dcov A
            g1 = _outer(of_xy, a[0], of_yy, a[1])
            of_a0 = _outer(2 * of_xx, t[0], 2 * of_xy, t[1])
            of_a1 = _outer(2 * of_xy, t[0], 2 * of_yy, t[1])
            sum_0 = _add3(
                sum_0,
                (
                    a[0][0] * g0[0] + a[1][0] * g1[0],
                    2 * (a[0][0] * g0[1] + a[1][0] * g1[1]),
                    2 * (a[0][0] * g0[2] + a[1][0] * g1[2]),
                ),
                drawn,
            )
            sum_1 = _add3(
                sum_1,
                (
                    a[0][1] * g0[1] + a[1][1] * g1[1],
                    2 * (a[0][1] * g0[2] + a[1][1] * g1[2]),
                    a[0][2] * g0[2] + a[1][2] * g1[2],
                ),
                drawn,
            )
        else:
            turned0 = _cross(t[1], normal)  # cov0^-1 T det cov0
            turned1 = _cross(normal, t[0])
            through0 = _outer(2 * of_xx, t[0], 2 * of_xy, t[1])
            through1 = _outer(2 * of_xy, t[0], 2 * of_yy, t[1])
            more0 = _outer(gain * ka, turned0, gain * kb, turned1)
            more1 = _outer(gain * kb, turned0, gain * kc, turned1)
            of_t0 = (through0[0] + more0[0], through0[1] + more0[1], through0[2] + more0[2])
            of_t1 = (through1[0] + more1[0], through1[1] + more1[1], through1[2] + more1[2])
            of_scale = (
                of_t0[0] * b[0][0] + of_t1[0] * b[1][0],
                of_t0[1] * b[0][1] + of_t1[1] * b[1][1],
                of_t0[2] * b[0][2] + of_t1[2] * b[1][2],
            )
            sum_scale = _add3(sum_scale, of_scale, drawn)
            of_b0 = (of_t0[0] * scale[0], of_t0[1] * scale[1], of_t0[2] * scale[2])
            of_b1 = (of_t1[0] * scale[0], of_t1[1] * scale[1], of_t1[2] * scale[2])
            of_a0 = (_dot(of_b0, rotation[0]), _dot(of_b0, rotation[1]), _dot(of_b0, rotation[2]))
            of_a1 = (_dot(of_b1, rotation[0]), _dot(of_b1, rotation[1]), _dot(of_b1, rotation[2]))
            sum_0 = _add3(sum_0, _outer(a[0][0], of_b0, a[1][0], of_b1), drawn)
            sum_1 = _add3(sum_1, _outer(a[0][1], of_b0, a[1][1], of_b1), drawn)
            sum_2 = _add3(sum_2, _outer(a[0][2], of_b0, a[1][2], of_b1), drawn)

        of_j00 = _dot(of_a0, w[0])
        of_j02 = _dot(of_a0, w[2])
        of_j11 = _dot(of_a1, w[1])
        of_j12 = _dot(of_a1, w[2])
        of_cx = of_u
        of_cy = of_v
        of_fx = of_u * ratio_x
        of_fy = of_v * ratio_y
        if ORTHO:
            of_x = of_u * k[0]
            of_y = of_v * k[1]
            of_z = of_depth
            of_fx += of_j00
            of_fy += of_j11
        else:
            # -fx x/z^2 has gradients to x, z and fx; clamped, it is (cx + constant)/z
            scaled_x = of_j02 * inverse_z
            scaled_y = of_j12 * inverse_z
            free_x = tl.where(inside[0], scaled_x, 0.0)
            free_y = tl.where(inside[1], scaled_y, 0.0)
            of_cx += scaled_x - free_x
            of_cy += scaled_y - free_y
            of_fx += of_j00 * inverse_z - free_x * ratio_x
            of_fy += of_j11 * inverse_z - free_y * ratio_y
            of_x = j00 * (of_u - free_x)
            of_y = j11 * (of_v - free_y)
            of_z = of_depth - ratio_x * of_x - ratio_y * of_y
            of_z -= inverse_z * (j00 * of_j00 + j11 * of_j11 + j02 * of_j02 + j12 * of_j12)
        of_mean = (
            of_x * w[0][0] + of_y * w[1][0] + of_z * w[2][0],
            of_x * w[0][1] + of_y * w[1][1] + of_z * w[2][1],
            of_x * w[0][2] + of_y * w[1][2] + of_z * w[2][2],
        )
        sum_mean = _add3(sum_mean, of_mean, drawn)
        if NEEDS_CAMERAS:
            to = of_cameras + (program * cameras + c) * 16
            for j in tl.static_range(3):
                _add_sum(to + j, of_x * mean[j] + j00 * of_a0[j], drawn)
                _add_sum(to + 3 + j, of_y * mean[j] + j11 * of_a1[j], drawn)
                _add_sum(to + 6 + j, of_z * mean[j] + j02 * of_a0[j] + j12 * of_a1[j], drawn)
            _add_sum(to + 9, of_x, drawn)
            _add_sum(to + 10, of_y, drawn)
            _add_sum(to + 11, of_z, drawn)
            _add_sum(to + 12, of_fx, drawn)
            _add_sum(to + 13, of_fy, drawn)
            _add_sum(to + 14, of_cx, drawn)
            _add_sum(to + 15, of_cy, drawn)

    if NEEDS_GAUSSIANS:
        _store3(of_means, at, sum_mean, exists)
        if COVARS:
            _store3(of_covars, 2 * at, sum_0, exists)
            _store3(of_covars, 2 * at + 1, sum_1, exists)
        else:
            _store3(of_scales, at, sum_scale, exists)
            q, norm, is_zero = unit
            qw, qx, qy, qz = q
            # what the rotation gains by turning about an axis, and symmetric parts
            gw = 2 * (qx * (sum_2[1] - sum_1[2]) + qy * (sum_0[2] - sum_2[0]) + qz * (sum_1[0] - sum_0[1]))
            gx = 2 * (qy * (sum_0[1] + sum_1[0]) + qz * (sum_0[2] + sum_2[0]) + qw * (sum_2[1] - sum_1[2]))
            gy = 2 * (qx * (sum_0[1] + sum_1[0]) + qz * (sum_1[2] + sum_2[1]) + qw * (sum_0[2] - sum_2[0]))
            gz = 2 * (qx * (sum_0[2] + sum_2[0]) + qy * (sum_1[2] + sum_2[1]) + qw * (sum_1[0] - sum_0[1]))
            gx -= 4 * qx * (sum_1[1] + sum_2[2])
            gy -= 4 * qy * (sum_0[0] + sum_2[2])
            gz -= 4 * qz * (sum_0[0] + sum_1[1])
            along = qw * gw + qx * gx + qy * gy + qz * gz
            finite = (norm * 0 == 0) & ~is_zero  # else the identity, or culled by every camera
            tl.store(of_quats + 4 * at, tl.where(finite, (gw - qw * along) / norm, 0.0), mask=exists)
            tl.store(of_quats + 4 * at + 1, tl.where(finite, (gx - qx * along) / norm, 0.0), mask=exists)
            tl.store(of_quats + 4 * at + 2, tl.where(finite, (gy - qy * along) / norm, 0.0), mask=exists)
            tl.store(of_quats + 4 * at + 3, tl.where(finite, (gz - qz * along) / norm, 0.0), mask=exists)


@triton.jit
def sum_cameras(of_tiles, of_viewmats, of_intrinsics, cameras, tiles, STRIDES: tl.constexpr):
    """Sums the programs of one camera, STRIDES at a time, into gradients of its viewmat (4, 4) and K (3, 3)."""
    view = tl.program_id(0).to(tl.int64)
    batch = view // cameras
    c = view % cameras
    entry = tl.arange(0, 16)
    total = tl.zeros((STRIDES, 16), tl.float64)
    for first in range(0, tiles, STRIDES):
        tile = first + tl.arange(0, STRIDES)[:, None]
        at = ((batch * tiles + tile) * cameras + c) * 16 + entry[None, :]
        total += tl.load(of_tiles + at, mask=tile < tiles, other=0.0).to(tl.float64)
    found = tl.sum(total, axis=0)
    of_rotation = entry < 9
    of_translation = (entry >= 9) & (entry < 12)
    place = tl.where(of_rotation, entry // 3 * 4 + entry % 3, (entry - 9) * 4 + 3)
    tl.store(of_viewmats + view * 16 + place, found, mask=of_rotation | of_translation)
    tl.store(of_viewmats + view * 16 + entry, tl.zeros((16,), tl.float64), mask=entry >= 12)
    # fx, fy, cx, cy
    place = tl.where(entry == 12, 0, tl.where(entry == 13, 4, tl.where(entry == 14, 2, 5)))
    tl.store(of_intrinsics + view * 9 + place, found, mask=entry >= 12)
    others = (entry == 1) | (entry == 3) | ((entry >= 6) & (entry < 9))
    tl.store(of_intrinsics + view * 9 + entry, tl.zeros((16,), tl.float64), mask=others)
