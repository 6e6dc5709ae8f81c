// Correct kernels, each with a closed form that program.cpp compares it with. Compiled by nvcc as well.
#pragma once

#include <cstdint>

#include "common/launch.h"

// Where each thread is: indices and sizes, in 3-D.

struct Place {
  unsigned thread[3], block[3], block_size[3], grid_size[3];
};

__global__ void places_kernel(Place* places) {
  const int64_t block = blockIdx.x + int64_t(gridDim.x) * (blockIdx.y + int64_t(gridDim.y) * blockIdx.z);
  const int64_t thread = threadIdx.x + int64_t(blockDim.x) * (threadIdx.y + int64_t(blockDim.y) * threadIdx.z);
  Place& place = places[block * (int64_t(blockDim.x) * blockDim.y * blockDim.z) + thread];
  place = {{threadIdx.x, threadIdx.y, threadIdx.z},
           {blockIdx.x, blockIdx.y, blockIdx.z},
           {blockDim.x, blockDim.y, blockDim.z},
           {gridDim.x, gridDim.y, gridDim.z}};
}

// Every shuffle of one value: rows of `results` are index, up, down and xor.

template <typename T>
__global__ void shuffles_kernel(T* results, int operand, int width) {
  const int lane = threadIdx.x % warpSize;
  const T value = static_cast<T>(100 + lane);
  const int count = blockDim.x;
  results[0 * count + threadIdx.x] = __shfl_sync(0xffffffffu, value, operand, width);
  results[1 * count + threadIdx.x] = __shfl_up_sync(0xffffffffu, value, operand, width);
  results[2 * count + threadIdx.x] = __shfl_down_sync(0xffffffffu, value, operand, width);
  results[3 * count + threadIdx.x] = __shfl_xor_sync(0xffffffffu, value, operand, width);
}

// Votes, matches and reductions of one warp: a row of `results` each.

__global__ void votes_kernel(unsigned* results) {
  const int lane = threadIdx.x;
  const unsigned all = 0xffffffffu;
  int same;
  results[0 * 32 + lane] = __ballot_sync(all, lane % 3 == 0);
  results[1 * 32 + lane] = __any_sync(all, lane == 7) + 2 * __any_sync(all, lane == 32);
  results[2 * 32 + lane] = __all_sync(all, lane < 32) + 2 * __all_sync(all, lane < 31);
  results[3 * 32 + lane] = __match_any_sync(all, lane % 5);
  results[4 * 32 + lane] = __match_any_sync(all, 1ull << (lane % 2 + 40));
  results[5 * 32 + lane] = __match_all_sync(all, 2.5f, &same);
  if (!same) results[5 * 32 + lane] = 0;
  results[6 * 32 + lane] = __match_all_sync(all, lane / 31, &same);
  if (same) results[6 * 32 + lane] = 1;
  results[7 * 32 + lane] = __reduce_add_sync(all, lane - 16);
  results[8 * 32 + lane] = __reduce_min_sync(all, lane - 16);
  results[9 * 32 + lane] = __reduce_max_sync(all, unsigned(lane - 16));
  results[10 * 32 + lane] = __reduce_and_sync(all, 0xf0u | lane);
  results[11 * 32 + lane] = __reduce_or_sync(all, 1u << lane / 2);
  results[12 * 32 + lane] = __reduce_xor_sync(all, 1u << lane);
}

// Warp operations of half warps, in the arms of a branch, and of the lanes in pairs.

__global__ void sub_masks_kernel(int* results) {
  const int lane = threadIdx.x;
  int value = lane;
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(0x0000ffffu, value, offset);
    __syncwarp(0x0000ffffu);
  } else {
    value = __reduce_max_sync(0xffff0000u, value);
    value += __popc(__ballot_sync(0xffff0000u, lane % 2));
  }
  const unsigned pair = 3u << (lane & ~1);
  value += 1000 * __shfl_xor_sync(pair, lane, 1);
  value += 100000 * __all_sync(pair, lane / 2 != 5) + 200000 * __any_sync(pair, lane == 9);
  __syncwarp();
  results[lane] = value;
}

// Lanes exchange values through shared memory, which __syncwarp makes safe, half a warp at a time.

__global__ void exchange_kernel(int* results) {
  __shared__ int values[32];
  const int lane = threadIdx.x;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  values[lane] = lane;
  for (int round = 0; round < 3; ++round) {
    __syncwarp(mask);
    const int neighbour = values[(lane & 16) | ((lane + 1) & 15)];
    __syncwarp(mask);
    values[lane] = neighbour + 100;
  }
  results[lane] = values[lane];
}

// The counting barriers; a row of `results` each.

__global__ void counting_barriers_kernel(int* results) {
  const int thread = threadIdx.x, count = blockDim.x;
  results[0 * count + thread] = __syncthreads_count(thread % 3 == 0 ? 5 : 0);
  results[1 * count + thread] = (__syncthreads_and(thread < count) != 0) + 2 * (__syncthreads_and(thread > 0) != 0);
  results[2 * count + thread] = (__syncthreads_or(thread == 3) != 0) + 2 * (__syncthreads_or(thread < 0) != 0);
}

// The sum of each block's values: by warps, then by the first warp. Block size a multiple of 32.

template <typename T, int block_size>
__global__ void block_sum_kernel(const T* values, T* sums, int64_t size) {
  __shared__ T warp_sums[block_size / 32];
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = i < size ? values[i] : T(0);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < block_size / 32 ? warp_sums[lane] : T(0);
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (lane == 0) sums[blockIdx.x] = sum;
  }
}

// The running sum of each warp's values.

template <typename T>
__global__ void warp_scan_kernel(const T* values, T* sums) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int lane = threadIdx.x % 32;
  T sum = __ldg(&values[i]);
  for (int offset = 1; offset < 32; offset *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += before;
  }
  sums[i] = sum;
}

// Reverses each block's values in dynamic shared memory.

template <typename T>
__global__ void __launch_bounds__(1024) reverse_kernel(const T* __restrict__ values, T* __restrict__ reversed) {
  MPKERNELS_DYNAMIC_SHARED(T, tile);
  const int64_t first = int64_t(blockIdx.x) * blockDim.x;
  tile[threadIdx.x] = values[first + threadIdx.x];
  __syncthreads();
  reversed[first + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// What a block finds in shared memory that it has not written, and then leaves there for the next.

template <typename T>
__global__ void unwritten_kernel(T* found_static, T* found_dynamic) {
  __shared__ T values[2][3];
  __shared__ T value;
  MPKERNELS_DYNAMIC_SHARED(T, more);
  found_static[2 * blockIdx.x] = values[1][2];
  found_static[2 * blockIdx.x + 1] = value;
  found_dynamic[blockIdx.x] = more[3];
  values[1][2] = value = more[3] = T(7);
}

// Every atomic, by all threads on the same words.

struct Atomics {
  int add, subtract, minimum, maximum, bits_and, bits_or, bits_xor, compare_and_swap, lock, locked_count;
  unsigned increment, decrement;
  unsigned long long wide_add, wide_maximum;
  float float_add;
  double double_add;
  int exchanged[2];
};

__global__ void atomics_kernel(Atomics* words, int* tickets) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  tickets[atomicAdd(&words->add, 1)] = i;
  atomicSub(&words->subtract, 2);
  atomicMin(&words->minimum, -i);
  atomicMax(&words->maximum, i);
  atomicAnd(&words->bits_and, ~(1 << i % 31));
  atomicOr(&words->bits_or, 1 << i % 31);
  atomicXor(&words->bits_xor, i);
  atomicInc(&words->increment, 4);
  atomicDec(&words->decrement, 4);
  atomicAdd(&words->wide_add, 1ull << 32);
  atomicMax(&words->wide_maximum, static_cast<unsigned long long>(i) << 40);
  atomicAdd(&words->float_add, 0.5f);
  atomicAdd(&words->double_add, 0.25);
  if (atomicExch(&words->exchanged[0], i + 1) == 0) words->exchanged[1] = i + 1;
  int expected = words->compare_and_swap, seen;
  while ((seen = atomicCAS(&words->compare_and_swap, expected, expected + 3)) != expected) expected = seen;
  __threadfence();
}

// A lock that is held across a wait: others spin until its owner has its turn.

__global__ void lock_kernel(Atomics* words) {
  while (atomicCAS(&words->lock, 0, 1) != 0) __nanosleep(20);
  const int count = words->locked_count;
  __nanosleep(20);
  words->locked_count = count + 1;
  __threadfence();
  atomicExch(&words->lock, 0);
}

// The last block to finish adds up what the others have left.

__global__ void last_block_kernel(const int* values, int* partial, unsigned* finished, int* total) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = values[blockIdx.x];
    __threadfence();
    is_last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    int sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
    *total = sum;
  }
}

// Vector types, streaming loads and stores, and the functions of one thread.

__global__ void copy4_kernel(const float4* input, float4* output, int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) {
    const float4 v = __ldcs(&input[i]);
    __stcs(&output[i], make_float4(v.w, v.z, v.y, v.x));
  }
}

__constant__ const float constant_factors[2] = {3.0f, 4.0f};

__device__ __forceinline__ float device_norm(float x, float y) {
  return sqrtf(__fmaf_rn(x, x, y * y));
}

MPKERNELS_HOST_DEVICE inline float host_device_square(float x) {
  return x * x;
}

__global__ void functions_kernel(int* integers, float* floats) {
  assert(blockDim.x == 1);
  integers[0] = __popc(0xf0f0u);
  integers[1] = __popcll(0xf0f0f0f000000000ull);
  integers[2] = __ffs(8) * 100 + __ffs(0);
  integers[3] = __clz(1) * 100 + __clz(0);
  integers[4] = static_cast<int>(__brev(1u) >> 31) + static_cast<int>(__brev(0x80000000u)) * 10;
  integers[5] = __clzll(1) * 100 + __ffsll(1ll << 40);
  integers[6] = __float_as_int(1.0f);
  integers[7] = min(3, 4) + 10 * max(3, 4) + 100 * int(max(3u, 4u)) + 1000 * int(min(3ll, 4ll));
  integers[8] = __float2int_rn(2.5f) + 10 * __float2int_rz(-2.5f) + 100 * __float2int_ru(2.5f);
  integers[8] += 1000 * __float2int_rd(2.5f);
  integers[9] = __umulhi(0x80000000u, 6u) + 10 * __mulhi(-0x40000000, 8);
  integers[10] = __popc(__activemask()) >= 1;
  floats[0] = __int_as_float(0x40000000);
  floats[1] = rsqrtf(0.25f);
  floats[2] = __fdividef(1.0f, 8.0f);
  floats[3] = __saturatef(1.5f) + 10.0f * __saturatef(-1.5f);
  floats[4] = __expf(0.0f) + __logf(1.0f);
  floats[5] = device_norm(constant_factors[0], constant_factors[1]);
  floats[6] = fminf(max(1.0f, 2.0f), min(4.0f, 3.0f));
  floats[7] = host_device_square(3.0f);
}

// Barriers and nothing else, to measure them.

__global__ void barriers_kernel(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}
