// A stable radix sort of pairs on a GPU, by the bits [begin_bit, end_bit) of unsigned keys.
//
//     const size_t bytes = radix_sort_workspace_bytes<uint64_t>(count);  // aligned to 8
//     radix_sort_pairs<uint64_t>(keys, sorted_keys, nullptr, sorted_values, count, 0, 40, workspace, stream);
//
//   keys          (count,) uint32_t or uint64_t: other bits than these do not count, and are kept
//   values        (count,) int32_t, or null: 0, 1, ..., count - 1
//   sorted_keys   (count,); pairs whose bits agree stay in their order. No array may overlap another.
//   sorted_values (count,)
// Counts and offsets have 64 bits; nothing is launched for count = 0.
//
// Least significant digit first, 8 bits a pass (Satish, Harris, Garland 2009, "Designing efficient sorting algorithms
// for manycore GPUs"). A pass is three steps:
//   1. each block counts the digits of its tile of keys;                    counts (256 digits, blocks)
//   2. exclusive prefix sums over (digit, block): where each block's keys of a digit go;
//   3. each block ranks its keys, brings them into the order of their digits in shared memory, and writes them in runs.
// A key's rank is the number of keys of its digit in the warps before, in its warp's rounds before, and in the lanes
// before (match): no step depends on the order in which threads run. The one atomic counts, in integers.
//
// Bytes a pair and pass: keys are read twice and written once, values read once and written once: 8-byte keys 32,
// 4-byte keys 20; and 20 bytes for each of the 256 counts of a tile of 3,072 keys.
#pragma once

#include "splatting/prefix_sum.cuh"

namespace mpkernels {
namespace splatting {

constexpr int radix_bits = 8;
constexpr int radix_digits = 1 << radix_bits;
constexpr int radix_threads = 256;  // a digit each where a block works on digits
constexpr int radix_warps = radix_threads / 32;
static_assert(radix_threads == radix_digits, "a thread a digit");

// Rounds of 32 keys that a warp takes: what registers, and static shared memory (48 KiB) beside the counters, hold.
constexpr int radix_rounds = 12;
constexpr int radix_tile = radix_threads * radix_rounds;

template <typename Key>
__device__ __forceinline__ int radix_digit(Key key, int shift, unsigned mask) {
  return static_cast<int>(static_cast<unsigned>(key >> shift) & mask);
}

// Step 1. counts: (256, gridDim.x)
template <typename Key>
__global__ void __launch_bounds__(radix_threads)
    radix_count_kernel(const Key* __restrict__ keys, int32_t* __restrict__ counts, int64_t count, int shift,
                       unsigned mask) {
  __shared__ int32_t digits[radix_digits];
  digits[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * radix_tile + threadIdx.x;
#pragma unroll
  for (int i = 0; i < radix_rounds; ++i) {
    const int64_t at = first + i * radix_threads;
    if (at < count) atomicAdd(&digits[radix_digit(keys[at], shift, mask)], 1);
  }
  __syncthreads();
  counts[int64_t{threadIdx.x} * gridDim.x + blockIdx.x] = digits[threadIdx.x];
}

// Step 3. offsets: (256, gridDim.x), the prefix sums of step 2.
template <typename Key>
__global__ void __launch_bounds__(radix_threads)
    radix_scatter_kernel(const Key* __restrict__ keys, const int32_t* __restrict__ values,
                         const int64_t* __restrict__ offsets, Key* __restrict__ sorted_keys,
                         int32_t* __restrict__ sorted_values, int64_t count, int shift, unsigned mask) {
  constexpr int rounds = radix_rounds;
  __shared__ int32_t counters[radix_warps][radix_digits];
  __shared__ int64_t destinations[radix_digits];  // of a digit's first key, less that key's place in the tile
  __shared__ __align__(16) unsigned char exchanged[radix_tile * sizeof(Key)];
  Key* exchanged_keys = reinterpret_cast<Key*>(exchanged);
  int32_t* exchanged_values = reinterpret_cast<int32_t*>(exchanged);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t tile_begin = int64_t{blockIdx.x} * radix_tile;
  const int64_t warp_begin = tile_begin + warp * 32 * rounds;
  for (int i = 0; i < radix_warps; ++i) counters[i][thread] = 0;
  __syncthreads();

  Key own[rounds];
  int rank[rounds];  // among the warp's keys of the same digit; then in the tile
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const int64_t at = warp_begin + i * 32 + lane;
    own[i] = at < count ? keys[at] : Key{0};
  }
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const int64_t round_begin = warp_begin + i * 32;
    rank[i] = 0;
    if (round_begin < count) {  // the same for all lanes
      const bool valid = round_begin + lane < count;
      const int digit = radix_digit(own[i], shift, mask);
      const unsigned same = __match_any_sync(0xffffffffu, valid ? digit : radix_digits);
      const unsigned before = same & ((1u << lane) - 1);
      if (valid) rank[i] = counters[warp][digit] + __popc(before);
      __syncwarp();
      if (valid && before == 0) counters[warp][digit] += __popc(same);
      __syncwarp();
    }
  }
  __syncthreads();

  // A thread a digit: from the warps' counts to where each warp's keys of the digit begin in the tile.
  int in_tile = 0;
  for (int i = 0; i < radix_warps; ++i) {
    const int in_warp = counters[i][thread];
    counters[i][thread] = in_tile;
    in_tile += in_warp;
  }
  int64_t valid_keys;
  const int64_t digit_begin = block_exclusive_sum<radix_threads>(in_tile, &valid_keys);
  for (int i = 0; i < radix_warps; ++i) counters[i][thread] += static_cast<int>(digit_begin);
  destinations[thread] = offsets[int64_t{thread} * gridDim.x + blockIdx.x] - digit_begin;
  __syncthreads();

#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    if (warp_begin + i * 32 + lane < count) {
      rank[i] += counters[warp][radix_digit(own[i], shift, mask)];
      exchanged_keys[rank[i]] = own[i];
    }
  }
  __syncthreads();
  int64_t destination[rounds];
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const int at = i * radix_threads + thread;
    if (at < valid_keys) {
      const Key key = exchanged_keys[at];
      destination[i] = destinations[radix_digit(key, shift, mask)] + at;
      sorted_keys[destination[i]] = key;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const int64_t at = warp_begin + i * 32 + lane;
    if (at < count) exchanged_values[rank[i]] = values != nullptr ? values[at] : static_cast<int32_t>(at);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const int at = i * radix_threads + thread;
    if (at < valid_keys) sorted_values[destination[i]] = exchanged_values[at];
  }
}

// No pass at all: begin_bit = end_bit.
template <typename Key>
__global__ void __launch_bounds__(radix_threads)
    radix_copy_kernel(const Key* __restrict__ keys, const int32_t* __restrict__ values, Key* __restrict__ sorted_keys,
                      int32_t* __restrict__ sorted_values, int64_t count) {
  const int64_t at = int64_t{blockIdx.x} * radix_threads + threadIdx.x;
  if (at >= count) return;
  sorted_keys[at] = keys[at];
  sorted_values[at] = values != nullptr ? values[at] : static_cast<int32_t>(at);
}

// The parts of the workspace: counters and offsets of one pass, then pairs of every other pass.
template <typename Key>
struct RadixWorkspace {
  int64_t blocks;
  size_t offsets, tile_sums, keys, values, counts, bytes;

  explicit RadixWorkspace(int64_t count) : blocks((count + radix_tile - 1) / radix_tile) {
    const auto padded = [](size_t size) { return (size + 15) / 16 * 16; };
    const size_t counters = static_cast<size_t>(blocks) * radix_digits;
    offsets = 0;
    tile_sums = offsets + padded((counters + 1) * sizeof(int64_t));
    keys = tile_sums + padded(prefix_sum_workspace_bytes(static_cast<int64_t>(counters)));
    values = keys + padded(static_cast<size_t>(count) * sizeof(Key));
    counts = values + padded(static_cast<size_t>(count) * sizeof(int32_t));
    bytes = counts + padded(counters * sizeof(int32_t));
  }
};

template <typename Key>
size_t radix_sort_workspace_bytes(int64_t count) {
  return RadixWorkspace<Key>(count).bytes;
}

template <typename Key>
void radix_sort_pairs(const Key* keys, Key* sorted_keys, const int32_t* values, int32_t* sorted_values, int64_t count,
                      int begin_bit, int end_bit, void* workspace, cudaStream_t stream) {
  static_assert(sizeof(Key) == 4 || sizeof(Key) == 8, "keys of 32 or 64 bits");
  if (count <= 0) return;
  const int passes = (end_bit - begin_bit + radix_bits - 1) / radix_bits;
  if (passes <= 0) {
    const int64_t blocks = (count + radix_threads - 1) / radix_threads;
    MPKERNELS_LAUNCH(radix_copy_kernel<Key>, static_cast<unsigned>(blocks), radix_threads, 0, stream, keys, values,
                     sorted_keys, sorted_values, count);
    return;
  }
  const RadixWorkspace<Key> parts(count);
  unsigned char* memory = static_cast<unsigned char*>(workspace);
  int64_t* offsets = reinterpret_cast<int64_t*>(memory + parts.offsets);
  int32_t* counts = reinterpret_cast<int32_t*>(memory + parts.counts);
  Key* other_keys = reinterpret_cast<Key*>(memory + parts.keys);
  int32_t* other_values = reinterpret_cast<int32_t*>(memory + parts.values);
  const unsigned blocks = static_cast<unsigned>(parts.blocks);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = begin_bit + pass * radix_bits;
    const int bits = end_bit - shift < radix_bits ? end_bit - shift : radix_bits;
    const unsigned mask = (1u << bits) - 1;
    const bool to_result = (passes - pass) % 2 == 1;  // so that the last pass writes the result
    Key* to_keys = to_result ? sorted_keys : other_keys;
    int32_t* to_values = to_result ? sorted_values : other_values;
    MPKERNELS_LAUNCH(radix_count_kernel<Key>, blocks, radix_threads, 0, stream, keys, counts, count, shift, mask);
    prefix_sum(counts, offsets, parts.blocks * radix_digits, memory + parts.tile_sums, stream);
    MPKERNELS_LAUNCH(radix_scatter_kernel<Key>, blocks, radix_threads, 0, stream, keys, values, offsets, to_keys,
                     to_values, count, shift, mask);
    keys = to_keys;
    values = to_values;
  }
}

}  // namespace splatting
}  // namespace mpkernels
