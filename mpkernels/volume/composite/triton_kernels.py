"""The Triton kernels of volume compositing.

Emission-absorption rendering (Max 1995, "Optical models for direct volume rendering"; Mildenhall et al. 2020, "NeRF",
eq. 3), for densities sigma over intervals, or for given alphas at positions t:

    tau_i = sigma_i (t_end_i - t_start_i)     alpha_i = 1 - exp(-tau_i)     passed_i = exp(-tau_i) = 1 - alpha_i
    T_i   = prod_{j<i} passed_j               w_i = T_i alpha_i             m_i = (t_start_i + t_end_i) / 2
    value = sum_i w_i c_i + (1 - sum_i w_i) background        opacity = sum_i w_i        depth = sum_i w_i m_i

and its gradient, without a division anywhere. With G_i = dL/dw_i taken with the other weights fixed,

    G_i = g_value . c_i + (g_opacity - g_value . background) + g_depth m_i + g_w_i
    dL/dtau_i   = T_{i+1} G_i - sum_{j>i} w_j G_j                                                (densities)
    dL/dalpha_i = T_i (G_i - B_i),   B_i = alpha_{i+1} G_{i+1} + passed_{i+1} B_{i+1}            (alphas)

Sums over what lies behind a sample are true scans from the far end (the total minus a prefix would leave the rounding
error of opaque samples in front, times a delta that may be 1e10).

Shapes: R rays, S samples a ray or N samples in all, C channels.
    densities, t_starts, t_ends, weights, grad_weights: (R, S), packed (N,)         values: (R, S, C), packed (N, C)
    packed_info: (R, 2) [start, count]      background: (R, C)      out_values: (R, C)      opacity, depth: (R,)
A ray's row of samples is contiguous; ``<name>_stride`` elements lie between rows (packed: between samples).

Decomposition: a program takes BLOCK_R rays and walks over their samples, BLOCK_S at a time. The (BLOCK_R, BLOCK_S)
tile of densities and positions is loaded along the samples (16 bytes a thread where alignment allows), and T is an
exclusive scan in registers, inside a warp for BLOCK_S <= 256. The channels are interleaved, so the
(BLOCK_R, BLOCK_S, BLOCK_C) tile of values has the channels fastest: for RGB, BLOCK_C = 4 with one lane in four idle, a
warp reads or writes 8 samples = 96 contiguous bytes = 3 whole sectors, so nothing is moved twice. The weights change
layout once on the way to that tile, through shared memory. Many channels: the forward gives each block of channels to
a program of its own (which scans again: the densities then come from L2), the backward loops over them.
The backward first walks forwards over all blocks of a ray but the last and notes the transmittance in front of each in
``checkpoints``, a float for every BLOCK_S samples, then walks from the far end. A ray of one block is read once.

Bytes a sample that must move, float32 and RGB: forward 24 read + 4 written, backward 24 read + 16 written (24 with
gradients of t). The backward of a ray longer than BLOCK_S asks for 12 of the 24 twice, the second time from L2 as
long as the rays in flight fit there (a few thousand samples a ray).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product_before(product, before, next_product, next_before):
    """Scanned over (x_i, 1) gives (prod_{j<=i} x_j, prod_{j<i} x_j)."""
    return product * next_product, product * next_before


@triton.jit
def _sum_before(total, before, next_total, next_before):
    """Scanned over (x_i, 0) gives (sum_{j<=i} x_j, sum_{j<i} x_j)."""
    return total + next_total, total + next_before


@triton.jit
def _recurrence_before(
    factor, offset, factor_before, offset_before, factor_i, offset_i, factor_before_i, offset_before_i
):
    """Composes the maps b -> offset_i + factor_i b; scanned over (factor_i, offset_i, 1, 0), also without the i-th."""
    return (
        factor * factor_i,
        offset_i + factor_i * offset,
        factor * factor_before_i,
        offset_before_i + factor_before_i * offset,
    )


@triton.jit
def _product(x, y):
    return x * y


@triton.jit
def _absorb(tau):
    """(1 - exp(-tau), exp(-tau)), each to about an ulp; for |tau| < 1/2 by the Taylor series of expm1."""
    terms: tl.constexpr = 15 if tau.dtype == tl.float64 else 8
    small = tl.abs(tau) < 0.5
    near = tl.where(small, tau, 0.0)
    series = tl.full(tau.shape, 1.0, tau.dtype)
    for k in tl.static_range(terms - 1):
        series = 1.0 - series * (near * (1.0 / (terms - k)))
    absorbed = near * series
    passed = tl.where(small, 1.0 - absorbed, tl.exp(-tau))
    return tl.where(small, absorbed, 1.0 - passed), passed


@triton.jit
def _rays_of_program(packed_info, tile, rays, samples, PACKED: tl.constexpr, BLOCK_R: tl.constexpr):
    """Which rays, whether they exist, their rows, and how many samples they have (never outside of the tensors)."""
    ray = tile * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,) int64
    exists = ray < rays
    if PACKED:
        start = tl.load(packed_info + 2 * ray, mask=exists, other=0)
        count = tl.load(packed_info + 2 * ray + 1, mask=exists, other=0)
        row = tl.minimum(tl.maximum(start, 0), samples)
        count = tl.minimum(tl.maximum(count, 0), samples - row)
    else:
        row = ray
        count = tl.where(exists, samples, 0).to(tl.int64)
    return ray, exists, row, count


@triton.jit
def _value_tile(at_ray, sample, length, channel, CHANNELS: tl.constexpr):
    """(BLOCK_R, BLOCK_S, BLOCK_C) offsets of a block's values, and which of them exist."""
    if CHANNELS > 2**20:  # else at most 1024 * 2**20 elements, which 32 bits count
        sample = sample.to(tl.int64)
    at = at_ray[:, None, None] + (sample[:, None] * CHANNELS + channel[None, :])[None, :, :]
    return at, (sample[None, :] < length[:, None])[:, :, None] & (channel < CHANNELS)[None, None, :]


@triton.jit
def _load_ray_channels(tensor, at_ray, exists, channel, CHANNELS: tl.constexpr, COMPUTE: tl.constexpr):
    """(BLOCK_R, BLOCK_C) of a tensor (R, C)."""
    mask = exists[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(tensor + at_ray[:, None] + channel[None, :], mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _load_samples(
    densities,
    t_starts,
    t_ends,
    at_density,
    at_start,
    at_end,
    inside,
    HAS_ENDS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """alpha, passed, tau, the position along the ray, and the two factors of tau; samples outside absorb nothing."""
    density = tl.load(densities + at_density, mask=inside, other=0.0).to(COMPUTE)
    start = tl.load(t_starts + at_start, mask=inside, other=0.0).to(COMPUTE)
    if HAS_ENDS:
        end = tl.load(t_ends + at_end, mask=inside, other=0.0).to(COMPUTE)
        largest: tl.constexpr = 1.7976931348623157e308 if density.dtype == tl.float64 else 3.4028234663852886e38
        finite = tl.where(density > largest, largest, density)  # NaN stays NaN
        delta = end - start
        tau = finite * delta
        alpha, passed = _absorb(tau)
        position = (start + end) * 0.5
    else:
        finite = density
        delta = start
        tau = density
        alpha = density
        passed = 1.0 - density
        position = start
    return alpha, passed, tau, position, finite, delta


@triton.jit
def _transmit(passed, tau, HAS_ENDS: tl.constexpr, COMPUTE: tl.constexpr):
    """(BLOCK_R, BLOCK_S) transmittance from the block's front to each sample, and (BLOCK_R,) through the block.

    Of densities by one exp of summed optical depths: a product of factors just below one, taken as a tree, rounds in
    one direction, which a thousand samples show.
    """
    if HAS_ENDS:
        _, before = tl.associative_scan((tau, tl.zeros(tau.shape, COMPUTE)), 1, _sum_before)
        return tl.exp(-before), tl.exp(-tl.sum(tau, axis=1))
    else:
        _, before = tl.associative_scan((passed, tl.full(passed.shape, 1.0, COMPUTE)), 1, _product_before)
        return before, tl.reduce(passed, 1, _product)


@triton.jit
def _first_stopped(transmittance, sample, early_stop_eps, BLOCK_S: tl.constexpr):
    """(BLOCK_R,) the first sample of the block in front of which its ray stops, BLOCK_S if none; NaN stops too."""
    return tl.min(tl.where(transmittance >= early_stop_eps, BLOCK_S, sample[None, :]), axis=1)


@triton.jit
def _transmittance_behind(front, through, stopped, EARLY_STOP: tl.constexpr, BLOCK_S: tl.constexpr):
    """(BLOCK_R,) in front of the next block; a ray that has stopped goes on with 0, and so stays stopped."""
    behind = front * through
    if EARLY_STOP:
        behind = tl.where(stopped < BLOCK_S, 0.0, behind)
    return behind


@triton.jit
def composite_forward(
    densities,
    values,
    t_starts,
    t_ends,
    packed_info,
    background,
    out_values,
    out_opacity,
    out_depth,
    out_weights,
    rays,
    samples,  # of a ray, packed: of all rays
    density_stride,
    value_stride,
    start_stride,
    end_stride,
    background_stride,
    early_stop_eps,
    early_stop_rest,
    CHANNELS: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    EARLY_STOP: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Values, opacity, depth and weights of BLOCK_R rays, for one block of channels."""
    parts: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0).to(tl.int64)
    part = program % parts
    ray, exists, row, count = _rays_of_program(packed_info, program // parts, rays, samples, PACKED, BLOCK_R)
    writes = exists & (part == 0)  # the other parts have the same weights
    eps = tl.full((), 0.0, COMPUTE) + early_stop_eps + early_stop_rest

    sample = tl.arange(0, BLOCK_S)
    channel = (part * BLOCK_C).to(tl.int32) + tl.arange(0, BLOCK_C)
    front = tl.full((BLOCK_R,), 1.0, COMPUTE)  # transmittance in front of the block
    value = tl.zeros((BLOCK_R, BLOCK_C), COMPUTE)
    opacity = tl.zeros((BLOCK_R,), COMPUTE)
    depth = tl.zeros((BLOCK_R,), COMPUTE)
    blocks = 1 if ONE_BLOCK else tl.cdiv(tl.max(count, axis=0), BLOCK_S)

    for block in range(0, blocks):
        first = tl.full((), 0, tl.int64) + block * BLOCK_S
        length = tl.minimum(tl.maximum(count - first, 0), BLOCK_S).to(tl.int32)
        inside = sample[None, :] < length[:, None]  # (BLOCK_R, BLOCK_S)
        read = length
        if EARLY_STOP:
            read = tl.where(front >= eps, length, 0)
        # the values first: all loads are in flight at once, and the compiler gives the tiles of samples the layout
        # of what is loaded last (the layout of the values, with a sample in four lanes, would do each scan four times)
        at_value, has_value = _value_tile(row * value_stride + first * CHANNELS, sample, read, channel, CHANNELS)
        color = tl.load(values + at_value, mask=has_value, other=0.0).to(COMPUTE)  # (BLOCK_R, BLOCK_S, BLOCK_C)
        alpha, passed, tau, position, _, _ = _load_samples(
            densities,
            t_starts,
            t_ends,
            (row * density_stride + first)[:, None] + sample[None, :],
            (row * start_stride + first)[:, None] + sample[None, :],
            (row * end_stride + first)[:, None] + sample[None, :],
            sample[None, :] < read[:, None],
            HAS_ENDS,
            COMPUTE,
        )
        before, through = _transmit(passed, tau, HAS_ENDS, COMPUTE)
        transmittance = front[:, None] * before
        stopped = length
        valid = inside
        if EARLY_STOP:
            stopped = _first_stopped(transmittance, sample, eps, BLOCK_S)
            valid = inside & (sample[None, :] < stopped[:, None])
            position = tl.where(valid, position, 0.0)
            color = tl.where((sample[None, :] < stopped[:, None])[:, :, None], color, 0.0)
        weight = tl.where(valid, transmittance * alpha, 0.0)

        flat = row if PACKED else row * samples
        tl.store(out_weights + (flat + first)[:, None] + sample[None, :], weight, mask=inside & writes[:, None])
        value += tl.sum(weight[:, :, None] * color, axis=1)
        opacity += tl.sum(weight, axis=1)
        depth += tl.sum(weight * position, axis=1)
        if not ONE_BLOCK:
            front = _transmittance_behind(front, through, stopped, EARLY_STOP, BLOCK_S)

    has_output = exists[:, None] & (channel < CHANNELS)[None, :]
    if HAS_BACKGROUND:
        seen = _load_ray_channels(background, ray * background_stride, exists, channel, CHANNELS, COMPUTE)
        value += (1.0 - opacity)[:, None] * seen
    tl.store(out_values + ray[:, None] * CHANNELS + channel[None, :], value, mask=has_output)
    tl.store(out_opacity + ray, opacity, mask=writes)
    tl.store(out_depth + ray, depth, mask=writes)


@triton.jit
def composite_backward(
    grad_values,
    grad_opacity,
    grad_depth,
    grad_weights,
    densities,
    values,
    t_starts,
    t_ends,
    packed_info,
    background,
    checkpoints,  # (samples of all rays // BLOCK_S,) transmittance in front of each full block
    out_densities,
    out_values,
    out_t_starts,
    out_t_ends,
    out_background,
    grad_weight_stride,
    rays,
    samples,  # of a ray, packed: of all rays
    density_stride,
    value_stride,
    start_stride,
    end_stride,
    background_stride,
    early_stop_eps,
    early_stop_rest,
    CHANNELS: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    EARLY_STOP: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_GRAD_VALUES: tl.constexpr,
    HAS_GRAD_OPACITY: tl.constexpr,
    HAS_GRAD_DEPTH: tl.constexpr,
    HAS_GRAD_WEIGHTS: tl.constexpr,
    NEEDS_VALUES: tl.constexpr,
    NEEDS_TS: tl.constexpr,
    NEEDS_BACKGROUND: tl.constexpr,
):
    """Gradients of BLOCK_R rays; see the head of the file for the formula and the order of the walk."""
    tile = tl.program_id(0).to(tl.int64)
    ray, exists, row, count = _rays_of_program(packed_info, tile, rays, samples, PACKED, BLOCK_R)
    eps = tl.full((), 0.0, COMPUTE) + early_stop_eps + early_stop_rest
    sample = tl.arange(0, BLOCK_S)
    all_channels = tl.arange(0, BLOCK_C)
    flat = row if PACKED else row * samples  # the ray's first sample in contiguous tensors
    front = tl.full((BLOCK_R,), 1.0, COMPUTE)  # transmittance in front of the block
    last = tl.zeros((BLOCK_R,), tl.int64)  # the ray's last block
    if ONE_BLOCK:
        blocks = 1
    else:
        last = tl.maximum(tl.cdiv(count, BLOCK_S), 1) - 1
        blocks = tl.max(last, axis=0) + 1
        for full in range(0, blocks - 1):  # full blocks: each has a slot of its own, wherever the ray starts
            first = tl.full((), 0, tl.int64) + full * BLOCK_S
            walks = full < last
            tl.store(checkpoints + (flat + first) // BLOCK_S, front, mask=walks)
            read = (walks & (front >= eps)) if EARLY_STOP else walks
            _, passed, tau, _, _, _ = _load_samples(
                densities,
                t_starts,
                t_ends,
                (row * density_stride + first)[:, None] + sample[None, :],
                (row * start_stride + first)[:, None] + sample[None, :],
                (row * end_stride + first)[:, None] + sample[None, :],
                (sample[None, :] < BLOCK_S) & read[:, None],
                HAS_ENDS,
                COMPUTE,
            )
            before, through = _transmit(passed, tau, HAS_ENDS, COMPUTE)
            stopped = tl.full((BLOCK_R,), BLOCK_S, tl.int32)
            if EARLY_STOP:
                stopped = _first_stopped(front[:, None] * before, sample, eps, BLOCK_S)
            front = tl.where(walks, _transmittance_behind(front, through, stopped, EARLY_STOP, BLOCK_S), front)
        tl.debug_barrier()  # other threads of the program read the checkpoints

    grad_of_opacity = tl.zeros((BLOCK_R,), COMPUTE)  # g_opacity - g_value . background
    if HAS_GRAD_OPACITY:
        grad_of_opacity = tl.load(grad_opacity + ray, mask=exists, other=0.0).to(COMPUTE)
    if HAS_GRAD_VALUES and HAS_BACKGROUND:
        for first_channel in range(0, CHANNELS, BLOCK_C):
            channel = first_channel + all_channels
            grad_value = _load_ray_channels(grad_values, ray * CHANNELS, exists, channel, CHANNELS, COMPUTE)
            seen = _load_ray_channels(background, ray * background_stride, exists, channel, CHANNELS, COMPUTE)
            grad_of_opacity -= tl.sum(grad_value * seen, axis=1)
    grad_of_depth = tl.zeros((BLOCK_R,), COMPUTE)
    if HAS_GRAD_DEPTH:
        grad_of_depth = tl.load(grad_depth + ray, mask=exists, other=0.0).to(COMPUTE)
    behind_block = tl.zeros((BLOCK_R,), COMPUTE)  # sum_{j behind} w_j G_j, or B of the block's last sample
    opacity = tl.zeros((BLOCK_R,), COMPUTE)

    for step in range(0, blocks):
        block = last - step  # (BLOCK_R,) every ray counts from its own far end
        first = block * BLOCK_S
        if not ONE_BLOCK:
            noted = tl.load(checkpoints + (flat + first) // BLOCK_S, mask=(step > 0) & (block >= 0), other=0.0)
            front = tl.where(step > 0, noted, front)
        length = tl.where(block >= 0, tl.minimum(count - first, BLOCK_S), 0).to(tl.int32)
        inside = sample[None, :] < length[:, None]  # (BLOCK_R, BLOCK_S)
        read = length
        if EARLY_STOP:
            read = tl.where(front >= eps, length, 0)
        at_values = row * value_stride + first * CHANNELS
        gain = tl.zeros((BLOCK_R, BLOCK_S), COMPUTE)  # G_i
        if HAS_GRAD_VALUES:
            if CHANNELS <= BLOCK_C:  # loaded first, used last: all loads are in flight at once, and see the forward
                at_value, has_value = _value_tile(at_values, sample, read, all_channels, CHANNELS)
                color = tl.load(values + at_value, mask=has_value, other=0.0)
            else:
                for first_channel in range(0, CHANNELS, BLOCK_C):
                    channel = first_channel + all_channels
                    at_value, has_value = _value_tile(at_values, sample, read, channel, CHANNELS)
                    part = tl.load(values + at_value, mask=has_value, other=0.0).to(COMPUTE)
                    grad_value = _load_ray_channels(grad_values, ray * CHANNELS, exists, channel, CHANNELS, COMPUTE)
                    gain += tl.sum(part * grad_value[:, None, :], axis=2)
        alpha, passed, tau, position, finite, delta = _load_samples(
            densities,
            t_starts,
            t_ends,
            (row * density_stride + first)[:, None] + sample[None, :],
            (row * start_stride + first)[:, None] + sample[None, :],
            (row * end_stride + first)[:, None] + sample[None, :],
            sample[None, :] < read[:, None],
            HAS_ENDS,
            COMPUTE,
        )
        if HAS_GRAD_VALUES and CHANNELS <= BLOCK_C:
            grad_value = _load_ray_channels(grad_values, ray * CHANNELS, exists, all_channels, CHANNELS, COMPUTE)
            gain += tl.sum(color.to(COMPUTE) * grad_value[:, None, :], axis=2)

        before, through = _transmit(passed, tau, HAS_ENDS, COMPUTE)
        transmittance = front[:, None] * before
        stopped = length
        if EARLY_STOP:
            stopped = tl.minimum(_first_stopped(transmittance, sample, eps, BLOCK_S), length)
        valid = sample[None, :] < stopped[:, None]
        if HAS_GRAD_WEIGHTS:
            at_weight = (row * grad_weight_stride + first)[:, None] + sample[None, :]
            gain += tl.load(grad_weights + at_weight, mask=valid, other=0.0).to(COMPUTE)
        gain += grad_of_opacity[:, None]
        if HAS_GRAD_DEPTH:
            gain += grad_of_depth[:, None] * position
        gain = tl.where(valid, gain, 0.0)
        weight = tl.where(valid, transmittance * alpha, 0.0)
        opacity += tl.sum(weight, axis=1)
        grad_position = weight * grad_of_depth[:, None]

        at_out = (flat + first)[:, None] + sample[None, :]
        if HAS_ENDS:
            contribution = weight * gain
            zero = tl.zeros(contribution.shape, COMPUTE)
            _, behind = tl.associative_scan((contribution, zero), 1, _sum_before, reverse=True)
            behind += behind_block[:, None]
            behind_block += tl.sum(contribution, axis=1)
            grad_tau = transmittance * passed * gain - behind
            tl.store(out_densities + at_out, tl.where(valid, delta * grad_tau, 0.0), mask=inside)
            if NEEDS_TS:
                along = finite * grad_tau
                grad_start = tl.where(valid, 0.5 * grad_position - along, 0.0)
                grad_end = tl.where(valid, 0.5 * grad_position + along, 0.0)
                tl.store(out_t_starts + at_out, grad_start, mask=inside)
                tl.store(out_t_ends + at_out, grad_end, mask=inside)
        else:
            factor = tl.where(valid, passed, 1.0)
            offset = tl.where(valid, alpha, 0.0) * gain
            one = tl.full(factor.shape, 1.0, COMPUTE)
            zero = tl.zeros(factor.shape, COMPUTE)
            factor_all, offset_all, factor, offset = tl.associative_scan(
                (factor, offset, one, zero), 1, _recurrence_before, reverse=True
            )
            behind = offset + factor * behind_block[:, None]
            tl.store(out_densities + at_out, tl.where(valid, transmittance * (gain - behind), 0.0), mask=inside)
            if not ONE_BLOCK:
                through = offset_all + factor_all * behind_block[:, None]
                behind_block = tl.sum(tl.where(sample[None, :] == 0, through, 0.0), axis=1)
            if NEEDS_TS:
                tl.store(out_t_starts + at_out, tl.where(valid, grad_position, 0.0), mask=inside)

        if NEEDS_VALUES:
            for first_channel in range(0, CHANNELS, BLOCK_C):
                channel = first_channel + all_channels
                at_value, has_value = _value_tile((flat + first) * CHANNELS, sample, length, channel, CHANNELS)
                grad_color = tl.zeros((BLOCK_R, BLOCK_S, BLOCK_C), COMPUTE)
                if HAS_GRAD_VALUES:
                    grad_value = _load_ray_channels(grad_values, ray * CHANNELS, exists, channel, CHANNELS, COMPUTE)
                    grad_color = weight[:, :, None] * grad_value[:, None, :]
                    if EARLY_STOP:
                        alive = (sample[None, :] < stopped[:, None])[:, :, None]
                        grad_color = tl.where(alive, grad_color, 0.0)
                tl.store(out_values + at_value, grad_color, mask=has_value)

    if NEEDS_BACKGROUND:
        for first_channel in range(0, CHANNELS, BLOCK_C):
            channel = first_channel + all_channels
            grad_of_background = tl.zeros((BLOCK_R, BLOCK_C), COMPUTE)
            if HAS_GRAD_VALUES:
                grad_value = _load_ray_channels(grad_values, ray * CHANNELS, exists, channel, CHANNELS, COMPUTE)
                grad_of_background = (1.0 - opacity)[:, None] * grad_value
            mask = exists[:, None] & (channel < CHANNELS)[None, :]
            tl.store(out_background + ray[:, None] * CHANNELS + channel[None, :], grad_of_background, mask=mask)
