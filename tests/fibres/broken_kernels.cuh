// Kernels with a mistake each, which the executor or a sanitizer must find.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "common/launch.h"

// Each thread takes over its left neighbour's value, but nobody waits until that is written. In forward order the
// left neighbour has been there before, and the result is right.
__global__ void missing_barrier_kernel(const int* values, int* results) {
  __shared__ int tile[256];
  tile[threadIdx.x] = values[threadIdx.x];
  results[threadIdx.x] = threadIdx.x == 0 ? 0 : tile[threadIdx.x - 1];
}

// The same within a warp, from the right neighbour: right in reverse order.
__global__ void missing_syncwarp_kernel(const int* values, int* results) {
  __shared__ int tile[32];
  tile[threadIdx.x] = values[threadIdx.x];
  results[threadIdx.x] = threadIdx.x == 31 ? 0 : tile[threadIdx.x + 1];
}

// A result that depends on which block comes last.
__global__ void block_race_kernel(int* results) {
  results[0] = blockIdx.x;
}

__global__ void exited_before_barrier_kernel(int size) {
  if (int(threadIdx.x) >= size) return;
  __syncthreads();
}

__global__ void two_barriers_kernel(int* sink) {
  if (threadIdx.x < 32) {
    __syncthreads();
    sink[0] = 1;
  } else {
    __syncthreads();
    sink[0] = 2;
  }
}

__global__ void two_kinds_of_barrier_kernel(int* sink) {
  if (threadIdx.y == 0) {
    __syncthreads();
  } else {
    sink[0] = __syncthreads_count(1);
  }
}

__global__ void shuffle_from_exited_kernel(int* sink) {
  if (threadIdx.x == 37) return;
  sink[threadIdx.x] = __shfl_xor_sync(0xffffffffu, int(threadIdx.x), 1);
}

__global__ void ballot_meets_barrier_kernel(unsigned* sink) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    sink[threadIdx.x] = __ballot_sync(0xffffffffu, 1);
    __syncthreads();
  }
}

__global__ void different_masks_kernel() {
  __syncwarp(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u);
}

__global__ void not_in_own_mask_kernel(int* sink) {
  sink[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0);
}

__global__ void reads_outside_mask_kernel(int* sink) {
  if (threadIdx.x < 16) sink[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, threadIdx.x == 3 ? 20 : 0);
}

__global__ void reads_missing_lane_kernel(int* sink) {
  sink[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 8);
}

__global__ void bad_width_kernel(int* sink, int width) {
  sink[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0, width);
}

__global__ void trap_kernel() {
  if (blockIdx.y == 1 && threadIdx.x == 3) __trap();
  __syncthreads();
}

__global__ void assertion_kernel(int limit) {
  __syncthreads();
  assert(int(threadIdx.x) < limit);
}

__global__ void empty_kernel() {}

// Sizes and offsets come as arguments, so that no compiler sees the overrun.

__global__ void global_overrun_kernel(float* values, int size) {
  values[blockIdx.x * blockDim.x + threadIdx.x] = size;
}

__global__ void dynamic_shared_overrun_kernel(int offset) {
  MPKERNELS_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + offset] = 1.0f;
  __syncthreads();
}

__global__ void static_shared_overrun_kernel(float* sink, int offset) {
  __shared__ float tile[32];
  tile[threadIdx.x + offset] = 1.0f;
  __syncthreads();
  sink[threadIdx.x] = tile[threadIdx.x];
}

__global__ void stack_overrun_kernel(float* sink, int offset) {
  float values[8] = {};
  float* volatile first = values;
  __syncthreads();
  first[threadIdx.x + offset] = 1.0f;
  sink[threadIdx.x] = values[threadIdx.x % 8];
}

__global__ void signed_overflow_kernel(int* sink, int large) {
  __syncthreads();
  sink[threadIdx.x] = large + int(threadIdx.x);
}

#if defined(MPKERNELS_ON_FIBRES)

// Counts its living objects, to show that stacks are unwound.
struct Counted {
  static inline std::atomic<int> alive{0};  // some tests run several OS threads
  Counted() { ++alive; }
  Counted(const Counted&) = delete;
  ~Counted() { --alive; }
};

__global__ void throws_kernel(bool standard) {
  const Counted counted;
  if (blockIdx.x == 1 && threadIdx.x == 2) {
    if (standard) throw std::runtime_error("no such thing");
    throw 42;
  }
  __syncthreads();
}

// Its destructors wait, and must not while the stack is unwound.
struct WaitsInDestructor {
  ~WaitsInDestructor() { __syncwarp(); }
};

__global__ void unwinds_into_wait_kernel() {
  const Counted counted;
  const WaitsInDestructor waits;
  if (threadIdx.x == 40) __trap();
  __syncthreads();
}

__global__ void nested_launch_kernel() {
  MPKERNELS_LAUNCH(empty_kernel, 1, 1, 0, nullptr);
}

#endif
