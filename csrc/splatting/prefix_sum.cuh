// Exclusive prefix sums of a whole array on a GPU: sums[i] = counts[0] + ... + counts[i - 1], and the total behind
// them.
//
//     void* workspace = ...;  // prefix_sum_workspace_bytes(count) bytes, aligned to 8
//     prefix_sum(counts, sums, count, workspace, stream);
//
//   counts   (count,)      int32, not negative
//   sums     (count + 1,)  int64; may not overlap `counts`
//
// Decomposition: the sum of each tile of 2,048 counts, one block that scans these sums, and a scan of each tile that
// starts from what lies before it (Blelloch 1990, "Prefix sums and their applications"). Reads 8 bytes a count and
// writes 8. Integers, so that no order of additions matters.
#pragma once

#include "common/launch.h"

namespace mpkernels {
namespace splatting {

constexpr int prefix_sum_threads = 256;
constexpr int prefix_sum_items = 8;  // consecutive counts of a thread
constexpr int64_t prefix_sum_tile = int64_t{prefix_sum_threads} * prefix_sum_items;

// The sum over the threads in front of this one in the block, and the sum of all. Every thread of the block must call
// it, with blockDim.x = threads; two calls in a row need no barrier between them.
template <int threads>
__device__ __forceinline__ int64_t block_exclusive_sum(int64_t value, int64_t* total) {
  constexpr int warps = threads / 32;
  __shared__ int64_t warp_sums[warps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t before = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += before;
  }
  __syncthreads();  // the sums of the call before have been read
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int64_t before_warp = 0, all = 0;
#pragma unroll
  for (int i = 0; i < warps; ++i) {
    if (i < warp) before_warp += warp_sums[i];
    all += warp_sums[i];
  }
  *total = all;
  return before_warp + sum - value;
}

template <typename Count>
__global__ void __launch_bounds__(prefix_sum_threads)
    tile_sums_kernel(const Count* __restrict__ counts, int64_t* __restrict__ tile_sums, int64_t count) {
  const int64_t first = blockIdx.x * prefix_sum_tile + threadIdx.x;
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < prefix_sum_items; ++i) {
    const int64_t at = first + i * prefix_sum_threads;
    if (at < count) sum += counts[at];
  }
  int64_t total;
  block_exclusive_sum<prefix_sum_threads>(sum, &total);
  if (threadIdx.x == 0) tile_sums[blockIdx.x] = total;
}

// One block: what lies before each tile, in place of the tile's own sum; and the sum of all.
template <typename Sum>
__global__ void __launch_bounds__(prefix_sum_threads)
    scan_tile_sums_kernel(Sum* tile_sums, int64_t tiles, Sum* __restrict__ total) {
  Sum before = 0;
  for (int64_t base = 0; base < tiles; base += prefix_sum_threads) {
    const int64_t tile = base + threadIdx.x;
    Sum all;
    const Sum before_thread = block_exclusive_sum<prefix_sum_threads>(tile < tiles ? tile_sums[tile] : 0, &all);
    if (tile < tiles) tile_sums[tile] = before + before_thread;
    before += all;
  }
  if (threadIdx.x == 0) *total = before;
}

template <typename Count>
__global__ void __launch_bounds__(prefix_sum_threads)
    scan_tiles_kernel(const Count* __restrict__ counts, const int64_t* __restrict__ before_tiles,
                      int64_t* __restrict__ sums, int64_t count) {
  const int64_t first = blockIdx.x * prefix_sum_tile + int64_t{threadIdx.x} * prefix_sum_items;
  Count own[prefix_sum_items];
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < prefix_sum_items; ++i) {
    own[i] = first + i < count ? counts[first + i] : Count{0};
    sum += own[i];
  }
  int64_t total;
  int64_t before = before_tiles[blockIdx.x] + block_exclusive_sum<prefix_sum_threads>(sum, &total);
#pragma unroll
  for (int i = 0; i < prefix_sum_items; ++i) {
    if (first + i < count) sums[first + i] = before;
    before += own[i];
  }
}

inline int64_t prefix_sum_tiles(int64_t count) {
  return (count + prefix_sum_tile - 1) / prefix_sum_tile;
}

inline size_t prefix_sum_workspace_bytes(int64_t count) {
  return static_cast<size_t>(prefix_sum_tiles(count)) * sizeof(int64_t);
}

inline void prefix_sum(const int32_t* counts, int64_t* sums, int64_t count, void* workspace, cudaStream_t stream) {
  const int64_t tiles = prefix_sum_tiles(count);
  int64_t* tile_sums = static_cast<int64_t*>(workspace);
  if (tiles > 0) {
    MPKERNELS_LAUNCH(tile_sums_kernel<int32_t>, static_cast<unsigned>(tiles), prefix_sum_threads, 0, stream, counts,
                     tile_sums, count);
  }
  MPKERNELS_LAUNCH(scan_tile_sums_kernel<int64_t>, 1, prefix_sum_threads, 0, stream, tile_sums, tiles, sums + count);
  if (tiles > 0) {
    MPKERNELS_LAUNCH(scan_tiles_kernel<int32_t>, static_cast<unsigned>(tiles), prefix_sum_threads, 0, stream, counts,
                     tile_sums, sums, count);
  }
}

}  // namespace splatting
}  // namespace mpkernels
