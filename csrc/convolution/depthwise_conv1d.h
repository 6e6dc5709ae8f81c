// What the CPU kernels of the depthwise convolution share: the problem, and its pieces.
//
//     y[b, c, t] = sum_k weight[c, k] xs[b, c, t - (K - 1 - k) dilation] + bias[c],   out = y or silu(y)
//
// (shapes and meaning: mpkernels/convolution/depthwise_conv1d/schema.py). Two memory orders, two decompositions:
// channels first, a vector is consecutive positions of one channel (depthwise_conv1d_rows.h); channels last, it is
// neighbouring channels at one position (depthwise_conv1d_columns.h). An element goes through the same operations in
// both, and in the update, so that its bits are the same.
//
// Bytes: forward reads x and writes out once; backward reads x and grad_out and writes the gradient of x once, and
// recomputes y, with nothing kept between the passes. FLOPs an element: 2 K, and about 30 for silu; three times that
// backward.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "common/vector.h"
#include "convolution/depthwise_conv1d_math.h"

#include <algorithm>
#include <optional>

namespace mpkernels {
namespace depthwise_conv1d {

using OptionalTensor = std::optional<Tensor>;

template <typename S>
struct Problem {
  using T = Compute<S>;

  const S* x;
  const T* weight;         // (C, K)
  const T* bias;           // (C,), or null
  const S* state;          // (B, C, left) in the memory order of x, or null
  const int32_t* seq_idx;  // (B, T), or null
  int64_t batch, channels, length, taps, dilation, left;
  int64_t x_batch, x_line;  // strides: of rows, and of channels (channels first) or positions (channels last)
  bool silu;

  Problem(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const OptionalTensor& state_,
          const OptionalTensor& seq_idx_, int64_t dilation_, bool silu_, bool channels_last)
      : x(pointer<S>(x_)),
        weight(pointer<T>(weight_)),
        bias(pointer<T>(bias_)),
        state(pointer<S>(state_)),
        seq_idx(pointer<int32_t>(seq_idx_)),
        batch(x_.size(0)),
        channels(x_.size(1)),
        length(x_.size(2)),
        taps(weight_.size(1)),
        dilation(dilation_),
        left((taps - 1) * dilation_),
        x_batch(x_.stride(0)),
        x_line(x_.stride(channels_last ? 2 : 1)),
        silu(silu_) {}

  // how far in front of an output tap k reads
  int64_t shift(int64_t k) const { return (taps - 1 - k) * dilation; }
  const int32_t* sequences(int64_t b) const { return seq_idx == nullptr ? nullptr : seq_idx + b * length; }
  // the reach of a tap that ends inside the row
  int64_t reach() const { return std::min(left, length); }
};

// The gradient of out, and where the gradients go; null for those that are not needed.
template <typename S>
struct Gradients {
  using T = Compute<S>;

  const S* of_out;
  int64_t batch, line;  // strides, as of x
  S* of_x;              // contiguous in its memory order
  S* of_state;
  T* parts;  // (pieces, K + 1, C): of weight, and last of bias; each piece writes its own
};

template <typename T>
MPKERNELS_INLINE Vector<T> activation(Vector<T> y, bool silu) {
  if (!silu) return y;
  return y / one_plus_exp_minus<T>(y);
}

// The gradient of y from that of out.
template <typename T>
MPKERNELS_INLINE Vector<T> of_activation(Vector<T> gradient, Vector<T> y, bool silu) {
  if (!silu) return gradient;
  return gradient * silu_derivative<Vector<T>>(y, sigmoid<T>(y));
}

// Outputs larger than this are written past the caches.
constexpr int64_t streamed_bytes = int64_t{4} << 20;

}  // namespace depthwise_conv1d
}  // namespace mpkernels
