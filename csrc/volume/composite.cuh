// Volume compositing on a GPU, forward and backward.
//
//   alpha_i = 1 - exp(-sigma_i delta_i)   T_i = prod_{j<i} (1 - alpha_j)   w_i = T_i alpha_i
//   value = sum w_i c_i + (1 - sum w_i) background    opacity = sum w_i    depth = sum w_i (start_i + end_i) / 2
//
// (Max 1995, "Optical models for direct volume rendering"; Mildenhall et al. 2020, "NeRF", eq. 3), or alpha_i given.
// With G_i = dL/dw_i, the other weights fixed, the backward is
//
//   G_i                   = g_value . c_i + (g_opacity - g_value . background) + g_depth (start_i + end_i) / 2 + g_w_i
//   dL/d(sigma_i delta_i) = T_{i+1} G_i - sum_{j>i} w_j G_j
//   dL/dalpha_i           = T_i (G_i - B_i),   B_i = alpha_{i+1} G_{i+1} + (1 - alpha_{i+1}) B_{i+1}
//
// Nothing is divided (the usual sum_{j>i} w_j G_j / (1 - alpha_i) is 0 / 0 at alpha = 1), and both are scanned from the
// far end: a total minus a prefix would leave the rounding of opaque samples in front of transparent ones.
//
// Shapes: R rays of S samples, or N packed samples in all, C channels.
//   densities, t_starts, t_ends, weights    (R, S) or (N,)
//   values                                  (R, S, C) or (N, C)
//   background, composited values           (R, C)
//   opacity, depth                          (R,)
//   packed_info                             (R, 2) [start, count]
// A ray's samples are contiguous, rays may be any distance apart (0 for expanded tensors); offsets have 64 bits.
//
// Decomposition: a warp takes a ray, in chunks of 128 samples (64 in double precision), 4 (2) consecutive samples a
// lane. A lane composes its own samples in registers, one scan over the lanes (5 shuffles) joins them, and one factor
// passes from chunk to chunk. All reads of a chunk are issued before the first is used: 96 bytes a lane for RGB in
// float32, 3 KB a warp. They are coalesced: 16 bytes a lane where addresses and counts are multiples of 16 bytes, else
// (packed rays) 4 bytes a lane; shared memory turns that order into a lane's own samples, and results back. Many rays
// keep a GPU busy; a few very long ones do not, since a ray is never divided among warps.
//
// The backward of a ray of one chunk reads everything once. A longer ray is walked twice: forwards over densities and
// positions to note the transmittance in front of each chunk, in the memory of the chunk's own grad_densities, which is
// overwritten on the way back; then backwards. No atomics: rays are independent, and a ray's sums have a fixed order.
//
// 1 and 3 channels are compiled in. Any other number takes the general path: lanes are spread over the channels, and
// over consecutive samples if there are fewer than 17 channels; 32 channels at a time. The forward gives each 32
// channels a warp of their own, which scans again: 12 bytes a sample, mostly from L2, for 128 bytes of values.
//
// Bytes a sample, float32 RGB: forward 24 read and 4 written, backward 24 read and 16 written (24 with gradients to t),
// and 12 more for each but the last 128 samples of a ray, from L2 as long as the rays in flight fit there.
#pragma once

#include "volume/composite_backward.cuh"
#include "volume/composite_forward.cuh"
