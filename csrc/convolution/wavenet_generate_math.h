// What the CPU and the CUDA kernels of WaveNet's sample loop share: where weights lie, and how a number is drawn.
// Contract: mpkernels/convolution/wavenet_generate/schema.py.
#pragma once

#include "common/launch.h"
#include "common/philox.h"

#include <cmath>
#include <cstdint>

namespace mpkernels {
namespace wavenet_generate {

constexpr int64_t block_outputs = 32;
constexpr int64_t panel_outputs = 128;

MPKERNELS_HOST_DEVICE inline int64_t padded(int64_t outputs) {
  return (outputs + block_outputs - 1) / block_outputs * block_outputs;
}

// The network's sizes, and where its matrices begin in the packed weights.
struct Shape {
  int64_t taps, residual, gates, skip, hidden, outputs, condition, layers;

  MPKERNELS_HOST_DEVICE int64_t projected(int64_t layer) const { return (layer + 1 < layers ? residual : 0) + skip; }
  MPKERNELS_HOST_DEVICE int64_t newest_size() const { return padded(2 * gates) * residual; }
  MPKERNELS_HOST_DEVICE int64_t condition_size() const { return padded(2 * gates) * condition; }
  MPKERNELS_HOST_DEVICE int64_t past_size() const { return padded(2 * gates) * (taps - 1) * residual; }
  // of a layer's newest tap; its condition weight and its projection follow
  MPKERNELS_HOST_DEVICE int64_t layer_at(int64_t layer) const {
    return layer * (newest_size() + condition_size() + padded(residual + skip) * gates);
  }
  MPKERNELS_HOST_DEVICE int64_t hidden_at() const {
    return layer_at(layers - 1) + newest_size() + condition_size() + padded(skip) * gates;
  }
  MPKERNELS_HOST_DEVICE int64_t output_at() const { return hidden_at() + padded(hidden) * skip; }
  MPKERNELS_HOST_DEVICE int64_t past_at(int64_t layer) const {
    return output_at() + padded(outputs) * hidden + layer * past_size();
  }
  // in the biases
  MPKERNELS_HOST_DEVICE int64_t projection_bias_at(int64_t layer) const { return layer * padded(residual + skip); }
  MPKERNELS_HOST_DEVICE int64_t hidden_bias_at() const { return projection_bias_at(layers - 1) + padded(skip); }
  MPKERNELS_HOST_DEVICE int64_t output_bias_at() const { return hidden_bias_at() + padded(hidden); }
};

// The number in (0, 1) of a draw of a sequence at a position.
MPKERNELS_HOST_DEVICE inline double uniform(uint64_t key, int64_t position, int64_t sequence, uint32_t draw) {
  uint32_t words[4][1] = {{static_cast<uint32_t>(position)},
                          {static_cast<uint32_t>(sequence)},
                          {draw},
                          {static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32)}};
  philox<1>(key, words);
  return (static_cast<double>(words[0][0] >> 8) + 0.5) * 0x1p-24;
}

// The first class whose running sum exceeds u times the whole, of weights that are not negative. Where they are NaN,
// the last one.
template <typename T>
MPKERNELS_HOST_DEVICE inline int64_t pick(const T* weights, int64_t count, double u) {
  T total = 0;
  for (int64_t c = 0; c < count; ++c) total += weights[c];
  const double wanted = u * static_cast<double>(total);
  T sum = 0;
  for (int64_t c = 0; c < count; ++c) {
    sum += weights[c];
    if (static_cast<double>(sum) > wanted) return c;
  }
  return count - 1;
}

template <typename T>
MPKERNELS_HOST_DEVICE inline int64_t first_largest(const T* x, int64_t count) {
  int64_t best = 0;
  for (int64_t c = 1; c < count; ++c) best = x[c] > x[best] ? c : best;
  return best;
}

// A value of a logistic, limited to [-1, 1].
template <typename T>
MPKERNELS_HOST_DEVICE inline T logistic(T mean, T log_scale, T temperature, uint64_t key, int64_t position,
                                        int64_t sequence) {
  T value = mean;
  if (temperature > 0) {
    const double u = uniform(key, position, sequence, 1);
    const T noise = static_cast<T>(log(u) - log1p(-u));
    const T scale = temperature * static_cast<T>(exp(static_cast<T>(log_scale)));
    value = mean + scale * noise;
  }
  return value < T(-1) ? T(-1) : value > T(1) ? T(1) : value;
}

}  // namespace wavenet_generate
}  // namespace mpkernels
