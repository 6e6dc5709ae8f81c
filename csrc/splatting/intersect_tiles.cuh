// Lists of the Gaussians in every tile, on a GPU. Geometry and the shapes of ProjectedGaussians:
// intersect_tiles_math.h.
//
// For M Gaussians of I images with L = I x rows x columns tiles, and n intersections:
//   1. count: a Gaussian's number of tiles, and its depth as a key            tiles_per_gauss, depth_keys (M,)
//   2. sort of the Gaussians by depth, of all images together                 order (M,)
//   3. prefix sum of the counts in that order, whose end is n                 begins (M + 1,)
//   4. emit: (tile of all images, Gaussian) at each Gaussian's place          tiles, gaussians (n,)
//   5. stable sort of these by tile, which keeps the depths in order          sorted_tiles, flatten_ids (n,)
//   6. keys of gsplat, and where each tile begins                             isect_ids (n,), isect_offsets (L,)
//
// Sorting depths first (Faster-GS) instead of image | tile | depth at once: n is a few times M, and its sort is then of
// 4-byte keys with as many bits as there are tiles (11 bits, 2 passes, for 648 x 420 pixels) instead of 8-byte keys
// with 32 bits more (6 passes). Bytes: 28 (M) and 8 (M) read twice, 80 (M) in 4 passes of the sort, 20 (n) a pass, 24
// (n).
//
// Steps 1 and 4: a thread a Gaussian. One that covers many rows of tiles is shared by its warp, a lane a row, so that a
// Gaussian over the whole image does not hold up 31 others.
#pragma once

#include "splatting/intersect_tiles_math.h"
#include "splatting/radix_sort.cuh"

namespace mpkernels {
namespace splatting {

constexpr int intersect_threads = 256;
constexpr int rows_of_a_lane = 8;    // more are shared by the warp
constexpr int intersect_blocks = 2;  // of a multiprocessor: leaves enough registers for a footprint in double precision
constexpr unsigned intersect_lanes = 0xffffffffu;
constexpr uint32_t last_depth_key = 0xffffffffu;  // of Gaussians without tiles

__device__ __forceinline__ int32_t rows_of(const Footprint& f) {
  return f.rows.end > f.rows.begin ? f.rows.end - f.rows.begin : 0;
}

// Calls lane(footprint) in lanes whose Gaussian has few rows. For each other one warp(source, footprint) is called by
// all lanes, `source` being the lane that has it. All lanes of the warp must come here; gaussian < 0: none.
template <typename T, typename Lane, typename Warp>
__device__ __forceinline__ void for_each_footprint(const ProjectedGaussians<T>& in, int64_t gaussian, const Lane& lane,
                                                   const Warp& warp) {
  bool has_many = false;
  if (gaussian >= 0) {
    const Footprint f = in.footprint(gaussian);
    has_many = !f.is_box && rows_of(f) > rows_of_a_lane;
    if (!has_many) lane(f);
  }
  for (unsigned many = __ballot_sync(intersect_lanes, has_many); many != 0; many &= many - 1) {
    const int source = __ffs(many) - 1;
    warp(source, in.footprint(__shfl_sync(intersect_lanes, gaussian, source)));
  }
}

// Step 1.
template <typename T>
__global__ void __launch_bounds__(intersect_threads, intersect_blocks)
    count_tiles_kernel(ProjectedGaussians<T> in, int32_t* __restrict__ tiles_per_gauss,
                       uint32_t* __restrict__ depth_keys) {
  const int64_t gaussian = int64_t{blockIdx.x} * intersect_threads + threadIdx.x;
  const bool exists = gaussian < in.count;
  const int own_lane = threadIdx.x % 32;
  int64_t tiles = 0;
  for_each_footprint(
      in, exists ? gaussian : -1,
      [&](const Footprint& f) {
        if (f.is_box) {
          tiles = rows_of(f) * tiles_of_row(in.grid, f, 0);
        } else {
          for (int32_t row = f.rows.begin; row < f.rows.end; ++row) tiles += tiles_of_row(in.grid, f, row);
        }
      },
      [&](int source, const Footprint& f) {
        int64_t sum = 0;
        for (int64_t row = f.rows.begin + own_lane; row < f.rows.end; row += 32) {
          sum += tiles_of_row(in.grid, f, static_cast<int32_t>(row));
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(intersect_lanes, sum, offset);
        if (own_lane == source) tiles = sum;
      });
  if (!exists) return;
  tiles_per_gauss[gaussian] = static_cast<int32_t>(tiles);
  depth_keys[gaussian] = tiles > 0 ? in.depth_bits(gaussian) : last_depth_key;
}

// Step 3: counts[k] = tiles_per_gauss[order[k]].
template <typename Count>
__global__ void __launch_bounds__(intersect_threads)
    counts_in_order_kernel(const Count* __restrict__ tiles_per_gauss, const int32_t* __restrict__ order,
                           Count* __restrict__ counts, int64_t count) {
  const int64_t k = int64_t{blockIdx.x} * intersect_threads + threadIdx.x;
  if (k < count) counts[k] = tiles_per_gauss[order[k]];
}

// Step 4. Tiles of all images are numbered through: image x tiles + tile.
template <typename T>
__global__ void __launch_bounds__(intersect_threads, intersect_blocks)
    emit_tiles_kernel(ProjectedGaussians<T> in, const int32_t* __restrict__ order, const int64_t* __restrict__ begins,
                      uint32_t* __restrict__ tiles, int32_t* __restrict__ gaussians) {
  const int64_t k = int64_t{blockIdx.x} * intersect_threads + threadIdx.x;
  const int own_lane = threadIdx.x % 32;
  int64_t gaussian = -1, begin = 0;
  if (k < in.count) {
    begin = begins[k];
    if (begins[k + 1] > begin) gaussian = order[k];
  }
  const auto write_row = [&](int64_t of_gaussian, int64_t row, TileSpan columns, int64_t at) {
    const int64_t first = in.image_of(of_gaussian) * in.grid.tiles() + row * in.grid.columns;
    for (int32_t column = columns.begin; column < columns.end; ++column, ++at) {
      tiles[at] = static_cast<uint32_t>(first + column);
      gaussians[at] = static_cast<int32_t>(of_gaussian);
    }
    return at;
  };
  for_each_footprint(
      in, gaussian,
      [&](const Footprint& f) {
        int64_t at = begin;
        for (int32_t row = f.rows.begin; row < f.rows.end; ++row) {
          at = write_row(gaussian, row, f.is_box ? f.columns : columns_of_row(in.grid, f, row), at);
        }
      },
      [&](int source, const Footprint& f) {
        const int64_t shared = __shfl_sync(intersect_lanes, gaussian, source);
        int64_t at = __shfl_sync(intersect_lanes, begin, source);
        for (int64_t first = f.rows.begin; first < f.rows.end; first += 32) {
          const int64_t row = first + own_lane;
          TileSpan columns{0, 0};
          if (row < f.rows.end) columns = columns_of_row(in.grid, f, static_cast<int32_t>(row));
          const int64_t own = columns.end > columns.begin ? columns.end - columns.begin : 0;
          int64_t sum = own;  // of the lanes up to this one
#pragma unroll
          for (int offset = 1; offset < 32; offset *= 2) {
            const int64_t before = __shfl_up_sync(intersect_lanes, sum, offset);
            if (own_lane >= offset) sum += before;
          }
          write_row(shared, row, columns, at + sum - own);
          at += __shfl_sync(intersect_lanes, sum, 31);
        }
      });
}

// Step 6: image << (32 + bits) | tile << 32 | depth.
template <typename T>
__global__ void __launch_bounds__(intersect_threads)
    write_keys_kernel(ProjectedGaussians<T> in, const uint32_t* __restrict__ sorted_tiles,
                      const int32_t* __restrict__ flatten_ids, int64_t* __restrict__ isect_ids, int64_t total,
                      int bits) {
  const int64_t i = int64_t{blockIdx.x} * intersect_threads + threadIdx.x;
  if (i >= total) return;
  const uint32_t tiles = static_cast<uint32_t>(in.grid.tiles());
  const int64_t image = sorted_tiles[i] / tiles, tile = sorted_tiles[i] % tiles;
  isect_ids[i] = image << (32 + bits) | tile << 32 | in.depth_bits(flatten_ids[i]);
}

// Step 6: the number of entries of smaller tiles, by bisection: lists may be empty.
template <typename Tile>
__global__ void __launch_bounds__(intersect_threads)
    tile_begins_kernel(const Tile* __restrict__ sorted_tiles, int64_t total, int64_t* __restrict__ isect_offsets,
                       int64_t lists) {
  const int64_t list = int64_t{blockIdx.x} * intersect_threads + threadIdx.x;
  if (list >= lists) return;
  int64_t low = 0, high = total;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sorted_tiles[middle] < static_cast<Tile>(list)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  isect_offsets[list] = low;
}

}  // namespace splatting
}  // namespace mpkernels
