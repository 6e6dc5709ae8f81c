"""The Triton kernels of the dilated convolution over time, by products of tiles; nothing is padded or unfolded.

Formula, with the tensors of schema.py, for one of ``groups`` (whose channels alone are counted here):

    out[b, o, t]      = bias[o] + sum_{k, c} weight[o, c, k] xs[b, c, t + k dilation - left]
    grad_xs[b, c, j]  = sum_{k, o} weight[o, c, k] grad[b, o, j - k dilation + left]
    grad_weight       = sum_{b, t} grad[b, o, t] xs[b, c, t + k dilation - left]

The second is a convolution like the first: with k' = K - 1 - k it reads at j + k' dilation - ((K - 1) dilation - left).
So ``dilated_conv1d_taps`` makes both, the gradients of x and of the state in one pass over j = -left ... T - 1.

Shapes: source (B, C, T) and out (B, D, T) by any strides, history (B, C, past), weight by its three strides.
``<name>_<dimension>`` is a stride in elements.

Decomposition, without atomics, every sum in the order of a loop:
    dilated_conv1d_taps     a program BLOCK_O output channels x BLOCK_T positions of a group of a sequence. It walks
                            over the taps that read anything, first those that read what came before, and over
                            BLOCK_C channels at a time.
    dilated_conv1d_weight   a program BLOCK_O x BLOCK_C weights of a tap, over one piece of all (b, t), to a workspace
    dilated_conv1d_channel  a program BLOCK_O sums over one piece of the positions, to a workspace
    dilated_conv1d_pieces   adds the pieces of a workspace in their order

What a tap does not read must not matter, and 0 times a NaN is NaN. Products of tiles take a 0 for what lies outside; if
a sum is then not finite (it hardly ever is) where a tap reads outside for some positions of a tile and inside for
others, it is made again a channel at a time, with selects. The sum over positions hides grad where x is outside.

Work: 2 K C / groups FLOPs an output, as many again for each gradient. Bytes: source once for each block of output
channels, from L2 as far as it holds BLOCK_T (and K taps) of all channels; weights once a program, from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def taps_below(bound, dilation, taps):
    """How many taps k have k dilation < bound."""
    return tl.minimum((tl.maximum(bound, 0) + dilation - 1) // dilation, taps)


@triton.jit
def tap_ranges(start, stop, low, length, left, dilation, taps):
    """Taps of the outputs [start, stop) of a source [0, length) after what came before in [low, 0).

    Returns (first, now, last, ragged): those in [first, last) read something, those in [now, last) nothing that came
    before; and whether one of them reads outside for some outputs and inside for others.
    """
    first = taps_below(low + left - stop + 1, dilation, taps)
    last = tl.maximum(taps_below(length + left - start, dilation, taps), first)
    now = tl.minimum(tl.maximum(taps_below(left - start, dilation, taps), first), last)
    left_of_all = taps_below(low + left - start, dilation, taps)
    right_of_none = taps_below(length + left - stop + 1, dilation, taps)
    return first, now, last, (left_of_all > first) | (right_of_none < last)


@triton.jit
def not_finite(tile):
    """Whether anything in a tile is NaN or infinite."""
    return tl.sum(tile * 0.0) != 0.0


@triton.jit
def repair(acc, exact):
    """What the products of tiles found, except where it is not finite: there what was found without zeros outside."""
    return tl.where(acc * 0.0 == 0.0, acc, exact)


@triton.jit
def next_block(batch, start, length, BLOCK_T: tl.constexpr):
    """The block of positions after one, in the next sequence where this one ends."""
    start += BLOCK_T
    ends = start >= length
    return tl.where(ends, batch + 1, batch), tl.where(ends, 0, start)


@triton.jit
def read_tile(
    source,  # of this sequence and group, as history
    history,
    channel,  # (channels, 1) or (1, channels), 64 bits
    exists,  # of its shape: which channels there are
    read,  # (1, positions) or (positions, 1), 64 bits
    strides,  # source_channel, source_position, history_channel
    length,
    past,
    HAS_HISTORY: tl.constexpr,
):
    """A tile of what came before and source, 0 outside of both."""
    inside = exists & (read >= 0) & (read < length)
    tile = tl.load(source + channel * strides[0] + read * strides[1], mask=inside, other=0.0)
    if HAS_HISTORY:
        before = exists & (read < 0) & (read >= -past)
        earlier = tl.load(history + channel * strides[2] + (read + past), mask=before, other=0.0)
        tile = tl.where(before, earlier, tile)
    return tile


@triton.jit
def load_weights(weight, tap, row, column, strides, rows, columns):
    """(., .) weights of a tap, 0 past the last row and column."""
    at = weight + tap.to(tl.int64) * strides[5] + row * strides[3] + column * strides[4]
    return tl.load(at, mask=(row < rows) & (column < columns), other=0.0)


@triton.jit
def _sum_taps(
    acc,
    first,  # taps [first, last)
    last,
    source,
    history,
    weight,
    row,  # (BLOCK_O, 1): output channels
    position,  # (1, BLOCK_T): where tap 0 reads
    strides,  # source_channel, source_position, history_channel, weight_out, weight_in, weight_tap
    sizes,  # length, past, dilation, inputs, outputs
    HAS_HISTORY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Adds the products of some taps; what they read outside counts as 0."""
    length, past, dilation, inputs, outputs = sizes
    blocks = ((inputs + BLOCK_C - 1) // BLOCK_C).to(tl.int32)  # a 64-bit division in the loop would be slow
    for step in range(first.to(tl.int32) * blocks, last.to(tl.int32) * blocks):
        tap = step // blocks
        column = ((step - tap * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
        read = position + tap * dilation
        w = load_weights(weight, tap, row, column[None, :], strides, outputs, inputs)
        exists = (column < inputs)[:, None]
        x = read_tile(source, history, column[:, None], exists, read, strides, length, past, HAS_HISTORY)
        acc = tl.dot(w, x, acc, input_precision="ieee", out_dtype=COMPUTE)
    return acc


@triton.jit
def sum_exactly(
    acc,
    first,
    last,
    source,
    history,
    weight,
    row,
    position,
    strides,
    sizes,
    HAS_HISTORY: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """As ``_sum_taps``, a channel at a time: what lies outside takes no part, whatever its weight is."""
    length, past, dilation, inputs, outputs = sizes
    channels = inputs.to(tl.int32)
    low = length * 0
    if HAS_HISTORY:
        low = -past
    for step in range(first.to(tl.int32) * channels, last.to(tl.int32) * channels):
        tap = step // channels
        channel = (step - tap * channels).to(tl.int64)
        read = position + tap * dilation
        w = load_weights(weight, tap, row, channel, strides, outputs, inputs).to(COMPUTE)
        exists = read == read
        x = read_tile(source, history, channel, exists, read, strides, length, past, HAS_HISTORY).to(COMPUTE)
        acc = tl.where((read >= low) & (read < length), acc + w * x, acc)
    return acc


@triton.jit
def dilated_conv1d_taps(
    source,  # (B, groups inputs, length)
    history,  # (B, groups inputs, past)
    weight,  # groups of (outputs, inputs, taps)
    bias,  # (groups outputs,)
    added,  # (B, groups outputs, end)
    out,  # (B, groups outputs, end): positions from 0 on
    early,  # (B, groups outputs, -begin): positions before 0
    source_batch,
    source_channel,
    source_position,
    history_batch,
    history_channel,
    weight_first,  # where tap 0 is
    weight_group,
    weight_out,
    weight_in,
    weight_tap,
    added_batch,
    added_channel,
    added_position,
    out_batch,
    out_channel,
    out_position,
    early_batch,
    early_channel,
    begin,
    end,
    length,
    past,
    left,
    dilation,
    taps,
    groups,
    inputs,
    outputs,
    scale,  # the sum of a float32 and the rest of a float64
    scale_rest,
    HAS_HISTORY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_EARLY: tl.constexpr,
    SCALE: tl.constexpr,  # "": nothing; "added": what is added; "sum": the sum of all
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Outputs of BLOCK_O channels of a group at BLOCK_T positions of [begin, end)."""
    program = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((), tl.int64)  # makes a number of what comes as a constant, because it is 1
    begin, end, length, past, left = zero + begin, zero + end, zero + length, zero + past, zero + left
    dilation, taps, inputs, outputs = zero + dilation, zero + taps, zero + inputs, zero + outputs
    blocks_o = (outputs + BLOCK_O - 1) // BLOCK_O
    blocks_t = (end - begin + BLOCK_T - 1) // BLOCK_T
    start_o = program % blocks_o * BLOCK_O
    program = program // blocks_o
    start = begin + program % blocks_t * BLOCK_T
    program = program // blocks_t
    group = program % groups
    batch = program // groups
    source += batch * source_batch + group * inputs * source_channel
    weight += weight_first + group * weight_group
    low = length * 0
    if HAS_HISTORY:
        history += batch * history_batch + group * inputs * history_channel
        low = -past

    stop = tl.minimum(start + BLOCK_T, end)
    first, now, last, ragged = tap_ranges(start, stop, low, length, left, dilation, taps)
    position = (start + tl.arange(0, BLOCK_T))[None, :]
    row = (start_o + tl.arange(0, BLOCK_O))[:, None]
    strides = (source_channel, source_position, history_channel, weight_out, weight_in, weight_tap)
    sizes = (length, past, dilation, inputs, outputs)
    at = position - left
    acc = tl.zeros((BLOCK_O, BLOCK_T), COMPUTE)
    if HAS_HISTORY:
        acc = _sum_taps(acc, first, now, source, history, weight, row, at, strides, sizes, True, BLOCK_C, COMPUTE)
        first_now = now
    else:
        first_now = first
    acc = _sum_taps(acc, first_now, last, source, history, weight, row, at, strides, sizes, False, BLOCK_C, COMPUTE)
    if ragged:  # noqa: SIM102 (the second question costs a reduction)
        if not_finite(acc):
            exact = tl.zeros((BLOCK_O, BLOCK_T), COMPUTE)
            exact = sum_exactly(
                exact, first, last, source, history, weight, row, at, strides, sizes, HAS_HISTORY, COMPUTE
            )
            acc = repair(acc, exact)

    channel = group * outputs + row
    here = (row < outputs) & (position < end)
    if HAS_BIAS:
        acc += tl.load(bias + channel, mask=row < outputs, other=0.0).to(COMPUTE)
    if HAS_ADDED:
        at_added = added + batch * added_batch + channel * added_channel + position * added_position
        more = tl.load(at_added, mask=here & (position >= 0), other=0.0).to(COMPUTE)
        if SCALE == "added":
            more *= tl.zeros((), COMPUTE) + scale + scale_rest
        acc += more
    if SCALE == "sum":
        acc *= tl.zeros((), COMPUTE) + scale + scale_rest
    if HAS_OUT:
        at_out = out + batch * out_batch + channel * out_channel + position * out_position
        tl.store(at_out, acc.to(out.dtype.element_ty), mask=here & (position >= 0))
    if HAS_EARLY:
        at_early = early + batch * early_batch + channel * early_channel + (position - begin)
        tl.store(at_early, acc.to(early.dtype.element_ty), mask=here & (position < 0))


@triton.jit
def dilated_conv1d_weight(
    grad,  # (B, groups outputs, length)
    source,  # (B, groups inputs, length)
    history,  # (B, groups inputs, past)
    workspace,  # (pieces, taps, groups outputs, inputs)
    grad_batch,
    grad_channel,
    grad_position,
    source_batch,
    source_channel,
    source_position,
    history_batch,
    history_channel,
    batches,
    length,
    past,
    left,
    dilation,
    taps,
    groups,
    inputs,
    outputs,
    units_a_piece,  # blocks of positions
    HAS_HISTORY: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The sums over one piece of the positions, of BLOCK_O x BLOCK_C weights of a tap."""
    program = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((), tl.int64)
    length, past, left, taps = zero + length, zero + past, zero + left, zero + taps
    inputs, outputs = zero + inputs, zero + outputs
    blocks_o = (outputs + BLOCK_O - 1) // BLOCK_O
    blocks_c = (inputs + BLOCK_C - 1) // BLOCK_C
    blocks_t = (length + BLOCK_T - 1) // BLOCK_T
    start_o = program % blocks_o * BLOCK_O
    program = program // blocks_o
    start_c = program % blocks_c * BLOCK_C
    program = program // blocks_c
    tap = program % taps
    program = program // taps
    group = program % groups
    piece = program // groups

    row = (start_o + tl.arange(0, BLOCK_O))[:, None]
    column = (start_c + tl.arange(0, BLOCK_C))[None, :]
    local = tl.arange(0, BLOCK_T)
    shift = tap * dilation - left
    low = length * 0
    if HAS_HISTORY:
        low = -past
    strides = (source_channel, source_position, history_channel)
    grad += group * outputs * grad_channel
    source += group * inputs * source_channel
    if HAS_HISTORY:
        history += group * inputs * history_channel
    acc = tl.zeros((BLOCK_O, BLOCK_C), COMPUTE)
    first = piece * units_a_piece
    batch = first // blocks_t
    start = (first - batch * blocks_t) * BLOCK_T
    for _ in range(first, tl.minimum(first + units_a_piece, batches * blocks_t)):
        position = start + local
        read = position + shift
        inside = (position < length) & (read >= low) & (read < length)
        at = grad + batch * grad_batch + row * grad_channel + position[None, :] * grad_position
        g = tl.load(at, mask=(row < outputs) & inside[None, :], other=0.0)
        earlier = history
        if HAS_HISTORY:
            earlier += batch * history_batch
        x = read_tile(
            source + batch * source_batch,
            earlier,
            column,
            (column < inputs) & (position < length)[:, None],
            read[:, None],
            strides,
            length,
            past,
            HAS_HISTORY,
        )
        acc = tl.dot(g, x, acc, input_precision="ieee", out_dtype=COMPUTE)
        batch, start = next_block(batch, start, length, BLOCK_T)
    at = workspace + ((piece * taps + tap) * groups * outputs + group * outputs + row) * inputs + column
    tl.store(at, acc, mask=(row < outputs) & (column < inputs))


@triton.jit
def dilated_conv1d_channel(
    grad,  # (B, channels, length)
    workspace,  # (pieces, segments, channels)
    grad_batch,
    grad_channel,
    grad_position,
    segments,  # B: each sequence has sums of its own; 1: all have the same
    batches,  # of a segment
    channels,
    length,
    units_a_piece,  # blocks of positions
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The sums over one piece of the positions of a segment, of BLOCK_O channels."""
    program = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((), tl.int64)
    length, channels, segments = zero + length, zero + channels, zero + segments
    blocks_o = (channels + BLOCK_O - 1) // BLOCK_O
    blocks_t = (length + BLOCK_T - 1) // BLOCK_T
    row = program % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    program = program // blocks_o
    segment = program % segments
    piece = program // segments
    acc = tl.zeros((BLOCK_O, BLOCK_T), COMPUTE)
    first = piece * units_a_piece
    batch = first // blocks_t
    start = (first - batch * blocks_t) * BLOCK_T
    for _ in range(first, tl.minimum(first + units_a_piece, batches * blocks_t)):
        position = start + tl.arange(0, BLOCK_T)
        at = grad + (segment * batches + batch) * grad_batch
        at = at + row[:, None] * grad_channel + position[None, :] * grad_position
        acc += tl.load(at, mask=(row < channels)[:, None] & (position < length)[None, :], other=0.0).to(COMPUTE)
        batch, start = next_block(batch, start, length, BLOCK_T)
    at_sum = workspace + (piece * segments + segment) * channels + row
    tl.store(at_sum, tl.sum(acc, axis=1), mask=row < channels)


@triton.jit
def dilated_conv1d_pieces(
    workspace,  # (pieces, taps, numel / taps)
    out,  # (numel / taps, taps)
    numel,
    taps,
    pieces,
    scale,  # the sum of a float32 and the rest of a float64
    scale_rest,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Writes scale times the sums of all pieces, in their order; the taps become the last dimension."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((), tl.int64)
    numel, taps = zero + numel, zero + taps
    acc = tl.zeros((BLOCK,), COMPUTE)
    for piece in range(0, pieces):
        acc += tl.load(workspace + piece * numel + at, mask=at < numel, other=0.0)
    acc *= tl.zeros((), COMPUTE) + scale + scale_rest
    each = numel // taps
    tap = at // each
    tl.store(out + (at - tap * each) * taps + tap, acc.to(out.dtype.element_ty), mask=at < numel)
