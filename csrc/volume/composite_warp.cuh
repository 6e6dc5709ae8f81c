// What the forward and the backward kernel of volume compositing share: how a warp reads and writes a chunk of a ray's
// samples, what the samples absorb, and the transmittance in front of each. Formulas and shapes: composite.cuh.
#pragma once

#include "common/launch.h"
#include "volume/composite_math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mpkernels {
namespace composite {

constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// A block keeps its registers until its longest ray ends: few warps a block waste little of them on ragged rays, and
// four are enough to fill a multiprocessor's 64 warps within its limit of 32 blocks.
constexpr int warps_per_block = 4;
constexpr int threads_per_block = warps_per_block * warp_lanes;

// Blocks of a multiprocessor at a time, which bounds a thread's registers: 28 warps of 72 registers forward, 20 warps
// of 96 backward for float32 and 16-bit types, each with 3 KB (RGB, float32) in flight. 30 KB hide the latency of an
// H100's memory.
template <typename S>
constexpr int forward_blocks = sizeof(S) == 8 ? 4 : 7;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int narrow_backward_blocks = 4;  // ptxas needs a few more registers here, or it spills
#else
constexpr int narrow_backward_blocks = 5;
#endif
template <typename S>
constexpr int backward_blocks = sizeof(S) == 8 ? 3 : narrow_backward_blocks;

// Consecutive samples of a ray which a lane takes at a time: 16 bytes of a tensor (8 of a 16-bit type).
template <typename S>
constexpr int samples_per_lane = sizeof(S) == 8 ? 2 : 4;
template <typename S>
constexpr int chunk_samples = warp_lanes * samples_per_lane<S>;

// How many of the samples left belong to this chunk.
template <typename S>
__device__ __forceinline__ int samples_of_chunk(int64_t left) {
  return left < chunk_samples<S> ? static_cast<int>(left) : chunk_samples<S>;
}

// Storage types, and the type that they are computed in.

template <typename S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename S>
using Compute = typename ComputeType<S>::type;

__device__ __forceinline__ float to_compute(float x) {
  return x;
}
__device__ __forceinline__ double to_compute(double x) {
  return x;
}

template <typename S>
__device__ __forceinline__ S to_storage(Compute<S> x) {
  return x;
}

template <typename T>
constexpr T largest_finite = sizeof(T) == 8 ? T(0x1.fffffffffffffp1023) : T(0x1.fffffep127);

#if defined(__CUDACC__)
__device__ __forceinline__ float to_compute(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_compute(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ __half to_storage<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 to_storage<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
#endif

// Memory accesses of 2, 4, 8 or 16 bytes, whatever the type.

template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <typename V>
__device__ __forceinline__ V load(const V* address) {
  const auto word = __ldg(reinterpret_cast<const typename Word<sizeof(V)>::type*>(address));
  V value;
  memcpy(&value, &word, sizeof(V));
  return value;
}

// Results are not read again by the kernel: they need not displace in L2 what other warps are about to read.
template <typename V>
__device__ __forceinline__ void store_streaming(V* address, const V& value) {
  typename Word<sizeof(V)>::type word;
  memcpy(&word, &value, sizeof(V));
  __stcs(reinterpret_cast<typename Word<sizeof(V)>::type*>(address), word);
}

// What a lane reads and writes at once.
template <typename S>
struct alignas(sizeof(S) * samples_per_lane<S>) Pack {
  S element[samples_per_lane<S>];
};

// Whether all of these addresses are multiples of a pack's size. (Null ones are.)
template <typename S, typename... Pointers>
__device__ __forceinline__ bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % sizeof(Pack<S>)) == 0;
}

// A chunk of a tensor with C elements a sample passes between memory and registers in memory order, which is coalesced:
// as packs, pack k * 32 + lane, where alignment allows (`vector`), else as elements, element k * 32 + lane. A lane
// computes with its own samples: packs lane * C + k. Shared memory (`tile`, chunk_samples * C elements of this warp)
// changes one order into the other; for odd C neither side has bank conflicts.

template <int C, bool vector, typename S>
__device__ __forceinline__ void load_chunk(
    const S* chunk,  // (samples, C)
    int elements, int lane,
    S (&x)[C * samples_per_lane<S>]) {  // in memory order; zeros behind `elements`
  constexpr int P = samples_per_lane<S>;
  if constexpr (vector) {
    const Pack<S>* mine = reinterpret_cast<const Pack<S>*>(chunk) + lane;
    const int left = elements - lane * P;
#pragma unroll
    for (int k = 0; k < C; ++k) {
      Pack<S> read{};
      if (k * warp_lanes * P < left) read = load(mine + k * warp_lanes);
#pragma unroll
      for (int j = 0; j < P; ++j) x[k * P + j] = read.element[j];
    }
  } else {
    const S* mine = chunk + lane;
    const int left = elements - lane;
#pragma unroll
    for (int k = 0; k < C * P; ++k) x[k] = k * warp_lanes < left ? load(mine + k * warp_lanes) : to_storage<S>(0);
  }
}

// Memory order into shared memory. After the last use of the tile and before the next, all lanes are waited for.
template <int C, bool vector, typename S>
__device__ __forceinline__ void write_tile(S* tile, int lane, const S (&x)[C * samples_per_lane<S>]) {
  constexpr int P = samples_per_lane<S>;
  __syncwarp();
  if constexpr (vector) {
    Pack<S>* mine = reinterpret_cast<Pack<S>*>(tile) + lane;
#pragma unroll
    for (int k = 0; k < C; ++k) {
      Pack<S> pack;
#pragma unroll
      for (int j = 0; j < P; ++j) pack.element[j] = x[k * P + j];
      mine[k * warp_lanes] = pack;
    }
  } else {
    S* mine = tile + lane;
#pragma unroll
    for (int k = 0; k < C * P; ++k) mine[k * warp_lanes] = x[k];
  }
  __syncwarp();
}

// The lane's own samples out of shared memory.
template <int C, typename S>
__device__ __forceinline__ void read_tile(const S* tile, int lane, S (&x)[C * samples_per_lane<S>]) {
  constexpr int P = samples_per_lane<S>;
  const Pack<S>* mine = reinterpret_cast<const Pack<S>*>(tile) + lane * C;
#pragma unroll
  for (int k = 0; k < C; ++k) {
    const Pack<S> pack = mine[k];
#pragma unroll
    for (int j = 0; j < P; ++j) x[k * P + j] = pack.element[j];
  }
}

// Both, for a tensor of one element a sample.
template <bool vector, typename S>
__device__ __forceinline__ void to_lane_order(S* tile, int lane, S (&x)[samples_per_lane<S>]) {
  if constexpr (!vector) {
    write_tile<1, vector>(tile, lane, x);
    read_tile<1>(tile, lane, x);
  }
}

// The lane's own samples to memory.
template <int C, bool vector, typename S>
__device__ __forceinline__ void store_chunk(S* chunk,  // (samples, C)
                                            int elements, int lane, S* tile,
                                            const Compute<S> (&x)[C * samples_per_lane<S>]) {
  constexpr int P = samples_per_lane<S>;
  constexpr bool through_tile = C > 1 || !vector;
  Pack<S>* packs = reinterpret_cast<Pack<S>*>(tile);
  if constexpr (through_tile) __syncwarp();  // the tile has been read by all lanes
  Pack<S> pack;
#pragma unroll
  for (int k = 0; k < C; ++k) {
#pragma unroll
    for (int j = 0; j < P; ++j) pack.element[j] = to_storage<S>(x[k * P + j]);
    if constexpr (through_tile) packs[lane * C + k] = pack;
  }
  if constexpr (through_tile) __syncwarp();
  if constexpr (vector) {
    Pack<S>* mine = reinterpret_cast<Pack<S>*>(chunk) + lane;
    const int left = elements - lane * P;
#pragma unroll
    for (int k = 0; k < C; ++k) {
      if constexpr (through_tile) pack = packs[lane + k * warp_lanes];
      if (k * warp_lanes * P < left) store_streaming(mine + k * warp_lanes, pack);
    }
  } else {
    S* mine = chunk + lane;
    const int left = elements - lane;
#pragma unroll
    for (int k = 0; k < C * P; ++k) {
      if (k * warp_lanes < left) store_streaming(mine + k * warp_lanes, (tile + lane)[k * warp_lanes]);
    }
  }
}

// Writes zeros to elements begin to end - 1.
template <typename S>
__device__ __forceinline__ void store_zeros(S* to, int64_t begin, int64_t end, int lane) {
#pragma unroll 1
  for (int64_t i = begin + lane; i < end; i += warp_lanes) store_streaming(to + i, to_storage<S>(0));
}

template <typename T>
__device__ __forceinline__ T sum_over_lanes(T x) {
#pragma unroll
  for (int step = warp_lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(all_lanes, x, step);
  return x;
}

// Of the path for any number of channels: the lanes that share a sample, the smallest power of two with room for the
// channels, at most a warp.
__device__ __forceinline__ int lanes_per_sample(int64_t channels) {
  int lanes = 1;
  while (lanes < warp_lanes && lanes < channels) lanes *= 2;
  return lanes;
}

// One ray's samples; t_ends is null where the densities are alphas.
template <typename S>
struct Ray {
  const S* densities;  // (count,)
  const S* values;     // (count, C)
  const S* t_starts;   // (count,)
  const S* t_ends;     // (count,) or null
  int64_t first;       // index of its first sample among all, where weights and gradients are written
  int64_t count;
};

// The inputs of all rays: R rays of S samples, or of N in all where they are packed.
template <typename S>
struct Rays {
  const S* densities;          // (R, S) or packed (N,)
  const S* values;             // (R, S, C) or (N, C)
  const S* t_starts;           // (R, S) or (N,)
  const S* t_ends;             // (R, S) or (N,); null: the densities are alphas
  const S* background;         // (R, C) or null
  const int64_t* packed_info;  // (R, 2) [start, count], or null: dense
  int64_t density_stride, value_stride, start_stride, end_stride, background_stride;  // elements between rays
  int64_t rays, samples, total;  // samples: of a dense ray; total: of all rays
  int64_t channels;              // C
  Compute<S> early_stop_eps;

  __device__ __forceinline__ Ray<S> ray(int64_t r) const {
    if (packed_info == nullptr) {
      return {densities + r * density_stride,
              values + r * value_stride,
              t_starts + r * start_stride,
              t_ends == nullptr ? nullptr : t_ends + r * end_stride,
              r * samples,
              samples};
    }
    // values of packed_info are checked by the caller where it can; under torch.compile it cannot
    const int64_t start = clamp(load_index(packed_info + 2 * r), total);
    const int64_t count = clamp(load_index(packed_info + 2 * r + 1), total - start);
    return {densities + start,
            values + start * channels,
            t_starts + start,
            t_ends == nullptr ? nullptr : t_ends + start,
            start,
            count};
  }

  __device__ __forceinline__ const S* ray_background(int64_t r) const {
    return background == nullptr ? nullptr : background + r * background_stride;
  }

 private:
  static __device__ __forceinline__ int64_t load_index(const int64_t* address) { return load(address); }
  static __device__ __forceinline__ int64_t clamp(int64_t x, int64_t largest) {
    return x < 0 ? 0 : (x > largest ? largest : x);
  }
};

// What a lane's samples absorb. Samples behind the end of the ray, read as zeros, absorb nothing.
template <typename S, typename T = Compute<S>, int P = samples_per_lane<S>>
struct Absorption {
  T alpha[P];
  T passed[P];    // 1 - alpha, without its rounding
  T position[P];  // where the sample lies
  T density[P];   // sigma, an infinite one as the largest finite one
  T delta[P];

  template <bool alphas>
  __device__ __forceinline__ void set(const S (&densities)[P], const S (&t_starts)[P], const S (&t_ends)[P]) {
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const T start = to_compute(t_starts[j]);
      density[j] = to_compute(densities[j]);
      if (alphas) {
        alpha[j] = density[j];
        passed[j] = 1 - density[j];
        position[j] = start;
      } else {
        const T end = to_compute(t_ends[j]);
        if (density[j] > largest_finite<T>) density[j] = largest_finite<T>;
        delta[j] = end - start;
        const Exponential<T> e = exponential(-(density[j] * delta[j]));
        alpha[j] = -e.expm1;
        passed[j] = e.exp;
        position[j] = (start + end) * T(0.5);
      }
    }
  }
};

// The transmittance in front of each of the lane's samples and behind the last of them, given that in front of the
// chunk. Returns the transmittance behind the chunk.
//
// Thin chunks are scanned by what is absorbed, thick ones (and NaN) by what passes: each form where it keeps its
// digits. (The product of many factors just below 1 is biased: what each multiplication rounds away has the same sign.)
// Only one multiplication for each of the lane's samples follows the scan.
template <typename T, int P>
__device__ __forceinline__ T transmit(const T (&alpha)[P], const T (&passed)[P], T carry, int lane,
                                      T (&transmittance)[P + 1]) {
  T absorbed = alpha[0];
#pragma unroll
  for (int j = 1; j < P; ++j) absorbed = absorbed_by_both(absorbed, alpha[j]);
#pragma unroll
  for (int step = 1; step < warp_lanes; step *= 2) {
    const T before = __shfl_up_sync(all_lanes, absorbed, step);
    if (lane >= step) absorbed = absorbed_by_both(before, absorbed);
  }
  const T all_absorbed = __shfl_sync(all_lanes, absorbed, warp_lanes - 1);
  T behind;
  if (all_absorbed <= T(0.5)) {
    const T before = __shfl_up_sync(all_lanes, absorbed, 1);
    transmittance[0] = (lane == 0 ? T(1) : 1 - before) * carry;
    behind = (1 - all_absorbed) * carry;
  } else {
    T product = passed[0];
#pragma unroll
    for (int j = 1; j < P; ++j) product *= passed[j];
#pragma unroll
    for (int step = 1; step < warp_lanes; step *= 2) {
      const T before = __shfl_up_sync(all_lanes, product, step);
      if (lane >= step) product = before * product;
    }
    const T before = __shfl_up_sync(all_lanes, product, 1);
    transmittance[0] = (lane == 0 ? T(1) : before) * carry;
    behind = __shfl_sync(all_lanes, product, warp_lanes - 1) * carry;
  }
#pragma unroll
  for (int j = 0; j < P; ++j) transmittance[j + 1] = transmittance[j] * passed[j];
  return behind;
}

// The samples in front of the early stop: the first sample with not (T >= eps) is dead, and all behind it.
struct Alive {
  int here;      // of this lane's samples
  int in_chunk;  // of the chunk's
  bool stopped;  // nothing behind this chunk is alive
};

template <typename T, int P>
__device__ __forceinline__ Alive find_alive(const T (&transmittance)[P + 1], T behind, T early_stop_eps, int samples,
                                            int lane) {
  if (!(early_stop_eps > 0)) return {P, samples, false};
  int here = P;
#pragma unroll
  for (int j = P - 1; j >= 0; --j) {
    if (!(transmittance[j] >= early_stop_eps)) here = j;  // NaN too
  }
  const unsigned with_stop = __ballot_sync(all_lanes, here < P);
  if (with_stop == 0) return {P, samples, !(behind >= early_stop_eps)};
  const int stop_lane = __ffs(static_cast<int>(with_stop)) - 1;
  const int in_chunk = stop_lane * P + __shfl_sync(all_lanes, here, stop_lane);
  if (lane != stop_lane) here = lane < stop_lane ? P : 0;
  return {here, in_chunk < samples ? in_chunk : samples, true};
}

}  // namespace composite
}  // namespace mpkernels
