// The depthwise convolution over time on a GPU: formula and shapes in mpkernels/convolution/depthwise_conv1d/schema.py.
//
//     y[b, c, t] = sum_k weight[c, k] xs[b, c, t - (K - 1 - k) dilation] + bias[c],   out = y or silu(y)
//
// Forward, where K is 2, 3 or 4, dilation 1, and rows are aligned: 16 bytes a load, and a thread keeps what its taps
// share in registers. Channels first (forward_rows_kernel), it has a pack of positions and reads the pack in front
// again, from the L1 cache; channels last (forward_columns_kernel), a pack of channels at 8 positions one after
// another. Else (any K, dilation, sequences) forward_kernel: a thread an output, in the order of memory.
//
// Backward (depthwise_conv1d_backward.cuh): blocks of positions and channels. Update: a thread a channel of a row.
//
// Bytes: forward reads x and writes out once; backward reads x and grad_out, and writes the gradient of x once.
#pragma once

#include "common/launch.h"
#include "convolution/depthwise_conv1d_math.h"

#include <cmath>

namespace mpkernels {
namespace depthwise_conv1d {

constexpr int threads_per_block = 256;
constexpr int positions_a_thread = 8;  // channels last

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

// 16 bytes of a row.
template <typename S>
constexpr int pack_size = 16 / sizeof(S);
template <typename S>
struct alignas(16) Pack {
  S x[pack_size<S>];
};

// A (B, C, n) tensor of any strides.
template <typename S>
struct Sequences {
  S* data;
  int64_t batch, channel, time;

  __device__ __forceinline__ S& at(int64_t b, int64_t c, int64_t t) const {
    return data[b * batch + c * channel + t * time];
  }
};

template <typename S>
struct Problem {
  using T = Compute<S>;

  Sequences<const S> x;
  Sequences<const S> state;  // (B, C, left), or null
  const T* weight;           // (C, K)
  const T* bias;             // (C,), or null
  const int32_t* seq_idx;    // (B, T), or null
  int64_t batch, channels, length, taps, dilation, left;
  bool silu, channels_last;

  // Whether the tap of output t that reads position p exists.
  __device__ __forceinline__ bool exists(int64_t b, int64_t t, int64_t p) const {
    if (p < 0 && state.data == nullptr) return false;
    if (seq_idx == nullptr) return true;
    const int32_t* seq = seq_idx + b * length;
    return seq[t] >= 0 && seq[t] == seq[p < 0 ? 0 : p];
  }
  __device__ __forceinline__ T value(int64_t b, int64_t c, int64_t p) const {
    return static_cast<T>(p < 0 ? state.at(b, c, left + p) : x.at(b, c, p));
  }
  __device__ __forceinline__ bool padding(int64_t b, int64_t t) const {
    return seq_idx != nullptr && seq_idx[b * length + t] < 0;
  }
  __device__ __forceinline__ T offset(int64_t c) const { return bias == nullptr ? T(0) : bias[c]; }

  // Before the activation. K: the taps, where they are compiled in, else 0.
  template <int K>
  __device__ __forceinline__ T y(int64_t b, int64_t c, int64_t t) const {
    const int n = K > 0 ? K : static_cast<int>(taps);
    T sum = T(0);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int64_t p = t - (n - 1 - k) * dilation;
      if (exists(b, t, p)) sum = weight[c * n + k] * value(b, c, p) + sum;
    }
    return sum + offset(c);
  }
};

template <typename T>
__device__ __forceinline__ T activation(T y, bool silu) {
  return silu ? y / (1 + exp(-y)) : y;
}

// The gradient of y from that of out.
template <typename T>
__device__ __forceinline__ T of_activation(T gradient, T y) {
  return gradient * silu_derivative(y, 1 / (1 + exp(-y)));
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

template <typename S>
__global__ void forward_kernel(Problem<S> in,
                               S* out,  // (B, C, T) in the memory order of x
                               int64_t size) {
  using T = Compute<S>;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    int64_t inner, middle;
    const int64_t b = divide(divide(i, in.channels_last ? in.channels : in.length, inner),
                             in.channels_last ? in.length : in.channels, middle);
    const int64_t c = in.channels_last ? inner : middle, t = in.channels_last ? middle : inner;
    const T found = in.padding(b, t) ? T(0) : activation(in.template y<0>(b, c, t), in.silu);
    out[i] = static_cast<S>(found);
  }
}

// K of 2, 3 or 4, dilation 1, T a multiple of a pack, no sequences.
template <typename S, int K>
__global__ void forward_rows_kernel(Problem<S> in,
                                    S* out,  // (B, C, T)
                                    int64_t packs) {
  using T = Compute<S>;
  constexpr int E = pack_size<S>, before = (K - 1 + E - 1) / E;  // packs in front
  const int64_t step = int64_t(gridDim.x) * blockDim.x, packs_a_row = in.length / E;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < packs; index += step) {
    int64_t pack, c;
    const int64_t b = divide(divide(index, packs_a_row, pack), in.channels, c);
    const int64_t t = pack * E;
    T window[(before + 1) * E];
#pragma unroll
    for (int w = 0; w <= before; ++w) {
      const int64_t first = t + (w - before) * E;
      if (first >= 0) {
        const Pack<S> found = *reinterpret_cast<const Pack<S>*>(&in.x.at(b, c, first));
#pragma unroll
        for (int e = 0; e < E; ++e) window[w * E + e] = static_cast<T>(found.x[e]);
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const bool known = in.state.data != nullptr && first + e >= 1 - K;
          window[w * E + e] = known ? in.value(b, c, first + e) : T(0);
        }
      }
    }
    T weight[K];
#pragma unroll
    for (int k = 0; k < K; ++k) weight[k] = in.weight[c * K + k];
    const T bias = in.offset(c);
    Pack<S> result;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      T sum = T(0);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int back = K - 1 - k;
        if (t + e >= back || in.state.data != nullptr) sum = weight[k] * window[before * E + e - back] + sum;
      }
      result.x[e] = static_cast<S>(activation(sum + bias, in.silu));
    }
    *reinterpret_cast<Pack<S>*>(out + index * E) = result;
  }
}

// K of 2, 3 or 4, dilation 1, C a multiple of a pack, no sequences.
template <typename S, int K>
__global__ void forward_columns_kernel(Problem<S> in,
                                       S* out,           // (B, T, C)
                                       int64_t tasks) {  // B ceil(T / positions_a_thread) C / E
  using T = Compute<S>;
  constexpr int E = pack_size<S>;
  const int64_t step = int64_t(gridDim.x) * blockDim.x, packs_a_row = in.channels / E;
  const int64_t groups = (in.length + positions_a_thread - 1) / positions_a_thread;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < tasks; index += step) {
    int64_t pack, group;
    const int64_t b = divide(divide(index, packs_a_row, pack), groups, group);
    const int64_t c = pack * E, start = group * positions_a_thread;
    T weight[K][E], bias[E], window[K][E];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      bias[e] = in.offset(c + e);
#pragma unroll
      for (int k = 0; k < K; ++k) weight[k][e] = in.weight[(c + e) * K + k];
    }
#pragma unroll
    for (int r = 1 - K; r < positions_a_thread; ++r) {
      const int64_t t = start + r;
      if (t >= in.length) break;
      T* newest = window[(r + K) % K];
      if (t >= 0) {
        const Pack<S> found = *reinterpret_cast<const Pack<S>*>(&in.x.at(b, c, t));
#pragma unroll
        for (int e = 0; e < E; ++e) newest[e] = static_cast<T>(found.x[e]);
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) newest[e] = in.state.data != nullptr ? in.value(b, c + e, t) : T(0);
      }
      if (r < 0) continue;
      Pack<S> result;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        T sum = T(0);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int back = K - 1 - k;
          if (t >= back || in.state.data != nullptr) sum = weight[k][e] * window[(r - back + K) % K][e] + sum;
        }
        result.x[e] = static_cast<S>(activation(sum + bias[e], in.silu));
      }
      *reinterpret_cast<Pack<S>*>(out + (b * in.length + t) * in.channels + c) = result;
    }
  }
}

// A step of generation, a thread a channel of a row.
template <typename S>
__global__ void update_kernel(Problem<S> in,                 // x (B, C, T); its state is not used
                              Sequences<S> state,            // (rows, C, size)
                              const int32_t* cache_seqlens,  // (B,), or null
                              const int32_t* state_indices,  // (B,), or null
                              int64_t rows, int64_t size,
                              S* out) {  // (B, C, T)
  using T = Compute<S>;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < in.batch * in.channels; i += step) {
    int64_t c;
    const int64_t b = divide(i, in.channels, c);
    const int64_t row = state_indices == nullptr ? b : state_indices[b];
    if (row < 0 || row >= rows) {
      for (int64_t t = 0; t < in.length; ++t) out[i * in.length + t] = static_cast<S>(0.0f);
      continue;
    }
    const bool circular = cache_seqlens != nullptr;
    const int64_t start = circular && size > 0 ? cache_seqlens[b] % size : 0;
    S* line = size > 0 ? &state.at(row, c, 0) : nullptr;  // (without a state there is nothing to point to)
    // where position p, counted from x, is kept
    const auto slot = [&](int64_t p) {
      if (!circular) return size + p;
      const int64_t at = (start + p) % size;
      return at < 0 ? at + size : at;
    };
    for (int64_t t = 0; t < in.length; ++t) {
      T sum = T(0);
      for (int64_t k = 0; k < in.taps; ++k) {
        const int64_t p = t - (in.taps - 1 - k) * in.dilation;
        const T value = static_cast<T>(p < 0 ? line[slot(p) * state.time] : in.x.at(b, c, p));
        sum = in.weight[c * in.taps + k] * value + sum;
      }
      out[i * in.length + t] = static_cast<S>(activation(sum + in.offset(c), in.silu));
    }
    if (!circular) {
      for (int64_t j = 0; j + in.length < size; ++j) line[j * state.time] = line[(j + in.length) * state.time];
    }
    for (int64_t t = in.length > size ? in.length - size : 0; t < in.length; ++t) {
      line[(circular ? slot(t) : size - in.length + t) * state.time] = in.x.at(b, c, t);
    }
  }
}

}  // namespace depthwise_conv1d
}  // namespace mpkernels
