// The spline coupling on a GPU: formula and shapes in mpkernels/flows/spline_coupling/schema.py, an element's
// arithmetic in spline_coupling_element.cuh.
//
// A thread computes an element. Consecutive threads have consecutive elements of (B, C, S), a block either whole
// samples of few elements, or a piece of one sample: up to `threads_per_block` elements at a time, a tile.
//
// Parameters contiguous in P (a linear layer): a block brings its tile's parameters, one run of memory, into shared
// memory by 16 bytes a load; each thread finds its own there. P = 3 K - 1 is odd for even K, and the rows of a warp's
// threads lie in different banks; for odd K a number in 32 is left empty, for the same end. Gradients of the parameters
// go out the same way. Parameters of any other strides, such as contiguous in S (a convolution), are read by the thread
// of the element, where they are: neighbouring threads read neighbouring numbers.
//
// log_abs_det: a thread adds its elements of the piece, lanes those of a sample in the block, and where a sample has
// several pieces a second kernel adds those, always in the same order; all of it in float64.
//
// Bytes an element, forward: x and 3 K - 1 parameters read, y (and low) written; 100 at K = 8, float32. Backward: 12
// and twice the parameters.
#pragma once

#include "common/launch.h"
#include "flows/spline_coupling_element.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mpkernels {
namespace spline_coupling {

constexpr int threads_per_block = 128;
constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;
constexpr int64_t most_pieces = 4096;  // of a sample: more than blocks run at a time, and few to add

// Blocks of a multiprocessor at a time, which bounds a thread's registers: as many as do without spills. Six blocks
// with three loads of 16 bytes a thread have 36 KB on their way, twice what hides the latency of an H100's memory.
template <typename S>
constexpr int forward_blocks = sizeof(S) == 8   ? 3
                               : sizeof(S) == 4 ? 6
                                                : 5;
template <typename S>
constexpr int backward_blocks = sizeof(S) == 8 ? 2 : 4;

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

// 16 bytes.
template <typename S>
constexpr int pack_size = 16 / sizeof(S);
template <typename S>
struct alignas(16) Pack {
  S x[pack_size<S>];
};

// An element's place: of sample b, channel c and position s, at n in contiguous (B, C, S) memory.
struct Place {
  int64_t b, c, s, n;
};

// A (B, C, S) tensor of any strides.
template <typename S>
struct Elements {
  S* data;
  int64_t batch, channel, position;

  __device__ __forceinline__ S& at(const Place& i) const { return data[i.b * batch + i.c * channel + i.s * position]; }
};

// A (B, C, S, P) tensor of any strides.
template <typename S>
struct Parameters {
  S* data;
  int64_t batch, channel, position, number;
  bool rows;  // whether a tile's elements, with all their parameters, are one run of memory

  __device__ __forceinline__ S* of(const Place& i) const { return data + i.b * batch + i.c * channel + i.s * position; }
};

// How elements are dealt out to blocks.
struct Tiling {
  int64_t channels, positions, elements;  // elements = channels * positions, those of a sample
  int64_t samples;
  int64_t group;   // samples of a block; 1 where a sample has more elements than a block has threads
  int64_t pieces;  // of a sample
  int64_t tiles;   // of a piece
  int lanes;       // that add the elements of a sample in a block, a power of 2, not more than its elements
  bool flat;       // whether no channels and positions are needed: tensors contiguous, parameters in rows

  __host__ __device__ int64_t blocks() const { return group > 1 ? (samples + group - 1) / group : samples * pieces; }
};

// The elements of a block: `count` from number `first` of sample `sample` on.
struct Span {
  int64_t sample, first, count;
};

__device__ __forceinline__ Span span_of(const Tiling& tiling, int64_t block) {
  if (tiling.group > 1) {
    const int64_t sample = block * tiling.group, left = tiling.samples - sample;
    return {sample, 0, (left < tiling.group ? left : tiling.group) * tiling.elements};
  }
  const int64_t sample = block / tiling.pieces, size = tiling.tiles * threads_per_block;
  const int64_t first = (block - sample * tiling.pieces) * size, left = tiling.elements - first;
  return {sample, first, left < size ? left : size};
}

// index / size, and what remains; by 32 bits where they are enough.
__device__ __forceinline__ int64_t divide(int64_t index, int64_t size, int64_t& rest) {
  if (index < (int64_t{1} << 31) && size < (int64_t{1} << 31)) {
    const uint32_t found = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
    rest = static_cast<uint32_t>(index) - found * static_cast<uint32_t>(size);
    return found;
  }
  const int64_t found = index / size;
  rest = index - found * size;
  return found;
}

// `element` counts from the first one of `sample` and may lie in a later sample.
__device__ __forceinline__ Place place_of(const Tiling& tiling, int64_t sample, int64_t element) {
  Place i{sample, 0, 0, sample * tiling.elements + element};
  if (tiling.group > 1) i.b += divide(element, tiling.elements, element);
  if (!tiling.flat) i.c = divide(element, tiling.positions, i.s);
  return i;
}

template <typename T>
constexpr int skew_period = 128 / sizeof(T);

// The rows of a tile in shared memory, a thread's row of P numbers behind the one of the thread in front. Where P is
// even a number is left empty after every 32 (of 4 bytes).
template <typename T, int K>
struct Rows {
  T* data;
  int count;  // P, where K does not tell

  __device__ __forceinline__ int number() const { return K > 0 ? 3 * K - 1 : count; }
  __device__ __forceinline__ bool skewed() const { return number() % 2 == 0; }
  // Where number `i` of the tile lies.
  __device__ __forceinline__ T& at(int i) const { return data[skewed() ? i + i / skew_period<T> : i]; }
  __device__ __forceinline__ T& at(int row, int i) const { return at(row * number() + i); }
};

// Numbers of shared memory that a tile needs, with some in front so that 16 bytes of device memory are 16 here.
template <typename S>
MPKERNELS_HOST_DEVICE inline int64_t row_space(int64_t number) {
  const int64_t size = threads_per_block * number;
  return size + (number % 2 == 0 ? size / skew_period<Compute<S>> : 0) + pack_size<S>;
}

// How far an address is behind a multiple of 16 bytes, in numbers.
template <typename S>
__device__ __forceinline__ int lead_of(const S* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(S));
}

// Puts 16 bytes of device memory where the tile's numbers from `i` on lie: 16 bytes of shared memory, if the types are
// the same.
template <typename S, typename T, int K>
__device__ __forceinline__ void put(const Pack<S>& found, const Rows<T, K>& rows, int i) {
  if (rows.skewed()) {
#pragma unroll
    for (int e = 0; e < pack_size<S>; ++e) rows.at(i + e) = static_cast<T>(found.x[e]);
    return;
  }
  constexpr int parts = sizeof(T) / sizeof(S), part = pack_size<T>;
#pragma unroll
  for (int k = 0; k < parts; ++k) {
    Pack<T> wide;
#pragma unroll
    for (int e = 0; e < part; ++e) wide.x[e] = static_cast<T>(found.x[k * part + e]);
    *reinterpret_cast<Pack<T>*>(rows.data + i + k * part) = wide;
  }
}

// Brings `size` numbers into shared memory, by all threads of the block, each with `batch` loads on their way at a
// time. `lead` must be lead_of(from).
template <int batch, typename S, typename T, int K>
__device__ __forceinline__ void load_rows(const S* from, int size, const Rows<T, K>& rows, int lead) {
  constexpr int E = pack_size<S>;
  const int thread = static_cast<int>(threadIdx.x);
  const int head = lead == 0 ? 0 : (E - lead < size ? E - lead : size), packs = (size - head) / E;
  if (thread < head) rows.at(thread) = static_cast<T>(from[thread]);
  for (int first = thread; first < packs; first += batch * threads_per_block) {
    Pack<S> found[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const int p = first + k * threads_per_block;
      if (p < packs) found[k] = *reinterpret_cast<const Pack<S>*>(from + head + p * E);
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const int p = first + k * threads_per_block;
      if (p < packs) put(found[k], rows, head + p * E);
    }
  }
  for (int i = head + packs * E + thread; i < size; i += threads_per_block) rows.at(i) = static_cast<T>(from[i]);
}

// The opposite; `lead` is that of the rows, whatever that of `to`.
template <typename S, typename T, int K>
__device__ __forceinline__ void store_rows(S* to, int size, const Rows<T, K>& rows, int lead) {
  constexpr int E = pack_size<S>;
  const int thread = static_cast<int>(threadIdx.x);
  const int target = lead_of(to);
  const int head = target == 0 ? 0 : (E - target < size ? E - target : size), packs = (size - head) / E;
  const bool whole = !rows.skewed() && target == lead;
  if (thread < head) to[thread] = static_cast<S>(rows.at(thread));
#pragma unroll 2
  for (int p = thread; p < packs; p += threads_per_block) {
    const int i = head + p * E;
    Pack<S> result;
    if (whole) {
      constexpr int parts = sizeof(T) / sizeof(S), part = pack_size<T>;
#pragma unroll
      for (int k = 0; k < parts; ++k) {
        const Pack<T> wide = *reinterpret_cast<const Pack<T>*>(rows.data + i + k * part);
#pragma unroll
        for (int e = 0; e < part; ++e) result.x[k * part + e] = static_cast<S>(wide.x[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e) result.x[e] = static_cast<S>(rows.at(i + e));
    }
    *reinterpret_cast<Pack<S>*>(to + i) = result;
  }
  for (int i = head + packs * E + thread; i < size; i += threads_per_block) to[i] = static_cast<S>(rows.at(i));
}

template <typename S>
struct Problem {
  Elements<const S> x;
  Elements<const S> low;  // or null
  Parameters<const S> parameters;
  Settings settings;
  Tiling tiling;

  // What is transformed is the sum of both.
  __device__ __forceinline__ S x_at(const Place& i) const { return tiling.flat ? x.data[i.n] : x.at(i); }
  __device__ __forceinline__ S low_at(const Place& i) const {
    if (low.data == nullptr) return static_cast<S>(0.0f);
    return tiling.flat ? low.data[i.n] : low.at(i);
  }
  __device__ __forceinline__ int number() const { return 3 * settings.bins - 1; }
};

template <typename S>
__device__ __forceinline__ double widened(S x) {
  return static_cast<double>(static_cast<Compute<S>>(x));
}

// A result rounded, and what that lost.
template <typename S>
__device__ __forceinline__ void split(double result, S& high, S& low) {
  high = static_cast<S>(result);
  low = static_cast<S>(result - widened(high));
}

template <typename S>
struct Outputs {
  S* y;                     // (B, C, S)
  S* low;                   // (B, C, S), or null
  Compute<S>* log_abs_det;  // (B,)
  double* parts;            // (B, pieces), where a sample has several
};

// Adds the numbers of a block's threads, `count` of a sample each, and writes the sums.
template <typename S>
__device__ __forceinline__ void write_sums(const Tiling& tiling, const Outputs<S>& out, const double* sums,
                                           const Span& span) {
  const int lanes = tiling.lanes, thread = static_cast<int>(threadIdx.x);
  const int count = static_cast<int>(tiling.group > 1 ? tiling.elements : threads_per_block);
  const int group = thread / lanes, lane = thread % lanes;
  const int64_t sample = span.sample + group;
  const bool mine = group < tiling.group && sample < tiling.samples;
  double sum = 0;
  for (int i = lane; mine && i < count; i += lanes) sum += sums[group * count + i];
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_down_sync(all_lanes, sum, step, lanes);
  if (!mine || lane > 0) return;
  if (out.parts != nullptr) {
    out.parts[sample * tiling.pieces + span.first / (tiling.tiles * threads_per_block)] = sum;
  } else {
    out.log_abs_det[sample] = static_cast<Compute<S>>(sum);
  }
}

// K: the bins, where they are compiled in, else 0. Staged: through shared memory, for parameters in rows.
template <typename S, int K, bool Staged>
__global__ void __launch_bounds__(threads_per_block, forward_blocks<S>)
    forward_kernel(Problem<S> in, Outputs<S> out, int64_t blocks) {
  using T = Compute<S>;
  MPKERNELS_DYNAMIC_SHARED(T, space);
  __shared__ double sums[threads_per_block];
  const int thread = static_cast<int>(threadIdx.x), number = in.number();
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Span span = span_of(in.tiling, block);
    double sum = 0;
    for (int64_t start = 0; start < span.count; start += threads_per_block) {
      const int64_t left = span.count - start;
      const int count = left < threads_per_block ? static_cast<int>(left) : threads_per_block;
      Rows<T, K> rows{};
      if constexpr (Staged) {
        const S* from = in.parameters.data + span.sample * in.parameters.batch + (span.first + start) * number;
        const int lead = lead_of(from);
        rows = {space + lead, number};
        load_rows<sizeof(S) == 2 ? 2 : 3>(from, count * number, rows, lead);
        __syncthreads();
      }
      if (thread < count) {
        const Place i = place_of(in.tiling, span.sample, span.first + start + thread);
        S high = in.x_at(i), low = in.low_at(i);
        const double value = widened(high) + widened(low);
        if (inside(in.settings, value)) {
          if constexpr (Staged) {
            const auto raw = [&](int p) { return rows.at(thread, p); };
            split(transformed<T, K>(in.settings, value, raw, sum), high, low);
          } else {
            const S* own = in.parameters.of(i);
            const auto raw = [&](int p) { return static_cast<T>(own[p * in.parameters.number]); };
            split(transformed<T, K>(in.settings, value, raw, sum), high, low);
          }
        }
        out.y[i.n] = high;
        if (out.low != nullptr) out.low[i.n] = low;
      }
      if constexpr (Staged) __syncthreads();
    }
    sums[thread] = sum;
    __syncthreads();
    write_sums(in.tiling, out, sums, span);
    __syncthreads();
  }
}

// log_abs_det from the parts of each sample's pieces; a block a sample.
template <typename T>
__global__ void __launch_bounds__(threads_per_block) sum_parts_kernel(const double* parts,  // (B, pieces)
                                                                      int64_t samples, int64_t pieces,
                                                                      T* log_abs_det) {  // (B,)
  __shared__ double sums[threads_per_block];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    double sum = 0;
    for (int64_t i = thread; i < pieces; i += threads_per_block) sum += parts[sample * pieces + i];
    sums[thread] = sum;
    for (int step = threads_per_block / 2; step > 0; step /= 2) {
      __syncthreads();
      if (thread < step) sums[thread] += sums[thread + step];
    }
    if (thread == 0) log_abs_det[sample] = static_cast<T>(sums[0]);
    __syncthreads();
  }
}

}  // namespace spline_coupling
}  // namespace mpkernels
