// Backward of the depthwise convolution on a GPU.
//
// A block takes `Width` neighbouring channels (1 with channels first, 32 with channels last) at Tile / Width positions.
// It computes the gradients of y there, and of the `reach` positions behind that its inputs go into, once, in shared
// memory; from them the gradients of its inputs, and its parts of the sums for weight and bias, which a second kernel
// adds in their order. Where the reach is too long for shared memory the gradients of y behind are computed as they are
// needed. Neighbouring threads read neighbouring numbers in both memory orders.
#pragma once

#include "convolution/depthwise_conv1d.cuh"

namespace mpkernels {
namespace depthwise_conv1d {

template <int Width>
constexpr int tile_elements = Width == 1 ? 1024 : 2048;
constexpr int last_width = 32;                 // channels of a block, channels last
constexpr int64_t most_reach_elements = 4096;  // in shared memory

template <typename S>
struct Gradients {
  using T = Compute<S>;

  Sequences<const S> of_out;
  Sequences<S> of_x, of_state;  // null where not needed
  T* parts;                     // (B, pieces, K + 1, C), or null
  int64_t pieces;               // of the positions
  int64_t reach;                // positions behind a tile whose gradients of y are kept
};

// The gradient of y.
template <typename S, int K>
__device__ __forceinline__ Compute<S> of_y_at(const Problem<S>& in, const Gradients<S>& to, int64_t b, int64_t c,
                                              int64_t t) {
  using T = Compute<S>;
  if (in.padding(b, t)) return T(0);
  const T gradient = static_cast<T>(to.of_out.at(b, c, t));
  return in.silu ? of_activation(gradient, in.template y<K>(b, c, t)) : gradient;
}

template <typename S, int K, int Width>
__global__ void __launch_bounds__(threads_per_block, 2) backward_kernel(Problem<S> in, Gradients<S> to, int64_t tiles) {
  using T = Compute<S>;
  constexpr int positions = tile_elements<Width> / Width;
  const int taps = K > 0 ? K : static_cast<int>(in.taps), thread = static_cast<int>(threadIdx.x);
  MPKERNELS_DYNAMIC_SHARED(T, of_y);  // (positions + reach, Width), then a number a thread
  T* sums = of_y + (positions + to.reach) * Width;
  const int64_t blocks_of_channels = (in.channels + Width - 1) / Width;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int64_t block, piece;
    const int64_t b = divide(divide(tile, blocks_of_channels, block), to.pieces, piece);
    const int64_t begin = piece * positions, c = block * Width + thread % Width;
    const int64_t end = begin + positions < in.length ? begin + positions : in.length;
    const int64_t stop = end + to.reach < in.length ? end + to.reach : in.length;
    const bool inside = c < in.channels;
    for (int64_t i = thread; i < (stop - begin) * Width; i += threads_per_block) {
      of_y[i] = inside ? of_y_at<S, K>(in, to, b, c, begin + i / Width) : T(0);
    }
    __syncthreads();

    if (to.of_x.data != nullptr && inside) {
      for (int64_t i = thread; i < (end - begin) * Width; i += threads_per_block) {
        const int64_t p = begin + i / Width;
        T sum = T(0);
#pragma unroll
        for (int k = taps - 1; k >= 0; --k) {
          const int64_t t = p + (taps - 1 - k) * in.dilation;
          if (t >= in.length || !in.exists(b, t, p)) continue;
          const T u = t < stop ? of_y[(t - begin) * Width + thread % Width] : of_y_at<S, K>(in, to, b, c, t);
          sum = in.weight[c * taps + k] * u + sum;
        }
        to.of_x.at(b, c, p) = static_cast<S>(sum);
      }
    }

    for (int k = 0; to.parts != nullptr && k <= taps; ++k) {
      T own = T(0);
      for (int64_t i = thread; inside && i < (end - begin) * Width; i += threads_per_block) {
        const int64_t t = begin + i / Width, p = t - (taps - 1 - k) * in.dilation;
        if (k == taps) {
          own += of_y[i];
        } else if (in.exists(b, t, p)) {
          own = of_y[i] * in.value(b, c, p) + own;
        }
      }
      sums[thread] = own;
      __syncthreads();
      for (int half = threads_per_block / 2; half >= Width; half /= 2) {
        if (thread < half) sums[thread] += sums[thread + half];
        __syncthreads();
      }
      if (thread < Width && inside) {
        to.parts[((b * to.pieces + piece) * (taps + 1) + k) * in.channels + c] = sums[thread];
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

// The gradient of the state, a thread an element (B, C, left).
template <typename S>
__global__ void state_gradient_kernel(Problem<S> in, Gradients<S> to, int64_t size) {
  using T = Compute<S>;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    int64_t j, c;
    const int64_t b = divide(divide(i, in.left, j), in.channels, c);
    T sum = T(0);
    for (int64_t k = in.taps - 1; k >= 0; --k) {
      const int64_t t = j - in.left + (in.taps - 1 - k) * in.dilation;
      if (t < 0 || t >= in.length || !in.exists(b, t, j - in.left)) continue;
      sum = in.weight[c * in.taps + k] * of_y_at<S, 0>(in, to, b, c, t) + sum;
    }
    to.of_state.at(b, c, j) = static_cast<S>(sum);
  }
}

// Adds the parts of all pieces in double, in an order that is always the same: a block for 32 channels of a tap, whose
// eight warps take every eighth piece.
template <typename T>
__global__ void sum_parts_kernel(const T* parts,  // (pieces, K + 1, C)
                                 int64_t pieces, int64_t taps, int64_t channels,
                                 T* of_weight,  // (C, K), or null
                                 T* of_bias) {  // (C,), or null
  constexpr int groups = threads_per_block / last_width;
  __shared__ double totals[groups][last_width];
  const int lane = threadIdx.x % last_width, group = threadIdx.x / last_width;
  const int64_t k = blockIdx.x % (taps + 1), c = blockIdx.x / (taps + 1) * last_width + lane;
  double total = 0;
  for (int64_t piece = group; c < channels && piece < pieces; piece += groups) {
    total += static_cast<double>(parts[(piece * (taps + 1) + k) * channels + c]);
  }
  totals[group][lane] = total;
  __syncthreads();
  if (group > 0 || c >= channels) return;
  for (int g = 1; g < groups; ++g) total += totals[g][lane];
  if (k < taps && of_weight != nullptr) of_weight[c * taps + k] = static_cast<T>(total);
  if (k == taps && of_bias != nullptr) of_bias[c] = static_cast<T>(total);
}

}  // namespace depthwise_conv1d
}  // namespace mpkernels
