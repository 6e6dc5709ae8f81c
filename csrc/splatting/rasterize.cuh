// Rasterization of projected Gaussians on a GPU, forward and backward.
//
//   on a pixel, with d = mean - centre:
//     sigma_i = (a dx^2 + c dy^2) / 2 + b dx dy        alpha_i = min(0.999, o exp(-sigma_i))
//     color = sum_i T_i alpha_i c_i + T background      T_i = prod_{j<i} (1 - alpha_j)
//
// (Kerbl et al. 2023, "3D Gaussian Splatting", eq. 3), over the list of the pixel's tile, without Gaussians of
// o exp(-sigma) < 1/255, up to the first that would leave T <= 1e-4. With g = dL/dcolor, T the final transmittance and
// B_i = sum_{j>i} T_j alpha_j (g . c_j) + T (g . background - dL/dalpha_out), the backward walks from the end of the
// list:
//
//     T_i = T_{i+1} / (1 - alpha_i)
//     dL/dalpha_i = T_i (g . c_i) - B_i / (1 - alpha_i)
//     v_i = alpha_i dL/dalpha_i, and 0 where alpha was cut
//
//   with sums over pixels:  color: sum T_i alpha_i g      o: sum v / o      mean: -(a, b; b, c) sum v d
//                           (a, b, c): -sum v (dx^2 / 2, dx dy, dy^2 / 2)
//
// Sums behind a Gaussian grow from the small end: a total of the pixel minus what lies in front would leave the
// rounding of the total in the gradients of the faint ones at the end of a list.
//
// Shapes: M Gaussians (of all images), D channels, I images of H x W pixels, lists of n entries.
//   means2d (M, 2)    conics (M, 3)    colors (M, D)    opacities (M,)    backgrounds (I, D)
//   masks, isect_offsets (I, tile_rows, tile_columns)    flatten_ids (n,)
//   image (I, H, W, D)    alphas, transmittances, last (I, H, W)
//
// Decomposition: a warp takes a patch of 8 x 4 pixels, a lane a pixel; a block takes 8 patches, which is a tile of 16 x
// 16. Smaller tiles are smaller blocks, larger ones several blocks (parts). Gaussians are staged in shared memory,
// together with a bit for each patch that their ellipse may reach: a warp evaluates only those that reach its own
// patch. A forward block ends when all of its pixels have, and a backward block begins at its pixels' last Gaussian.
//
// Backward: sums over pixels are what costs. A warp evaluates 16 entries (8 in double precision), a lane a pixel, and
// leaves v and the weight T alpha of each pair in shared memory. Then the lanes change sides: a lane takes an entry,
// and sums its pairs over half (a quarter) of the patch in registers: 6 + D sums without a shuffle, but for one (two)
// to join the shares. After 32 entries the block adds its warps' sums in order and writes one row for each entry that
// was drawn. The rows of a Gaussian are found by a stable sort of the entries' Gaussians and added in the order of the
// lists. No atomics, and all sums in a fixed order. (Mallick et al. 2024, "Taming 3DGS", sum over pixels with a lane an
// entry too, but evaluate each pair a second time while pixels travel through the lanes; a lane a pixel throughout, as
// in gsplat, takes 5 shuffles for each of 6 + D sums of each entry and warp.)
//
// 1, 3 and 4 channels are compiled in. Any other number: forward, a block draws 16 (8) of them; backward, g . c is
// taken over all channels, 4 at a time, and colors are summed 16 (8) a launch, the first of which sums the rest.
//
// Bytes, float32: forward an entry 4 + 4 (6 + D) from L2 mostly, a pixel 4 (3 + D) written. Backward the same an entry
// and 4 (3 + D) a pixel read; an entry drawn writes and reads a row of 4 (6 + D), or 4 (8 + D) with absgrad; an entry,
// drawn or not, 4 for its key, and the sort. Memory: rows, keys and sort, 4 (6 + D) + 12 + 8 bytes an entry (for RGB
// 56), times the parts of a tile; D counts no more than 16 (8) here.
#pragma once

#include "splatting/rasterize_backward.cuh"
#include "splatting/rasterize_forward.cuh"
#include "splatting/rasterize_sums.cuh"
