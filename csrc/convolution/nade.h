// What the kernels of NADE share: the recurrence over a tile of samples, forwards.
//
//   a_1 = c,  a_{d+1} = a_d + W[:, d] x_d,  h_d = sigmoid(a_d),  logit_d = b_d + V_d . h_d
//   (Larochelle & Murray 2011, "The neural autoregressive distribution estimator", eqs. 3-4 and algorithm 1)
//
// Lanes run along the hidden units: a logit is then a sum of H / lanes vectors and one sum across lanes, and the sums
// across lanes of a tile of samples are taken together (lanes along samples would need none here, but one for every
// number of the weights' gradients). Where x_d is 0, as most pixels of a drawing are, a and h do not change, and their
// H sigmoids, which would be nearly all of the work, are not computed again.
#pragma once

#include "common/matmul.h"

namespace mpkernels {
namespace nade {

constexpr int tile_samples = 8;  // their hidden units stay in the first cache (16 KiB at H = 512), sums in registers

// Weights as the recurrence reads them: rows of `units` numbers, a multiple of the lanes, zeros behind the H-th.
template <typename T>
struct Weights {
  const T* in;        // (D, units): W transposed
  const T* in_bias;   // (units,)
  const T* out;       // (D, units)
  const T* out_bias;  // (D,)
  int64_t dimensions;
  int64_t units;
};

// 1 / (1 + e^-x), by an error of about 2e-7 (1e-16 in double), fewer instructions than `sigmoid`, and NaN of NaN alone.
template <typename T>
MPKERNELS_INLINE Vector<T> logistic(Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    Vector<T> power = x * -1.44269504088896340736f;
    power = power > 126.0f ? broadcast<T>(126.0f) : power;
    power = power < -126.0f ? broadcast<T>(-126.0f) : power;
    return 1 / (1 + power_of_two<T>(power));
  } else {
    return sigmoid<T>(x);
  }
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|): finite wherever x is. log1p(u) = 2 artanh(u / (2 + u)), where the argument
// is at most 1/3, by its series (truncated below 1e-8 of it, 1e-17 in double).
template <typename T>
MPKERNELS_INLINE Vector<T> softplus(Vector<T> x) {
  constexpr int terms = std::is_same_v<T, float> ? 8 : 17;
  const Vector<T> positive = x > 0 ? x : Vector<T>{};
  const Vector<T> u = exponential<T>(x - (positive + positive)).exp();  // NaN stays NaN
  const Vector<T> z = u / (2 + u), square = z * z;
  Vector<T> series = broadcast<T>(T(1) / (2 * terms - 1));
#pragma GCC unroll 17
  for (int k = terms - 2; k >= 0; --k) series = series * square + T(1) / (2 * k + 1);
  return positive + 2 * z * series;
}

// Lane r of the result is the sum over the lanes of x[r], for r < COUNT <= lanes: neighbours are added and interleaved,
// so that every step halves the number of vectors.
template <typename T, int COUNT, int K = 1>
MPKERNELS_INLINE Vector<T> sums_of_rows(const Vector<T>* x) {
  if constexpr (COUNT > 1) {
    Vector<T> pairs[COUNT / 2];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT / 2; ++i) {
      pairs[i] = shuffle<ExchangeLow<T, K>, T>(x[2 * i], x[2 * i + 1]) +
                 shuffle<ExchangeHigh<T, K>, T>(x[2 * i], x[2 * i + 1]);
    }
    return sums_of_rows<T, COUNT / 2, 2 * K>(pairs);
  } else if constexpr (K < lanes<T>) {
    const Vector<T> once = x[0] + move_down<K, T>(x[0], Vector<T>{});
    return sums_of_rows<T, 1, 2 * K>(&once);
  } else {
    return x[0];
  }
}

// logits[s] = weight . hidden[s] for the samples of a tile.
template <typename T>
MPKERNELS_INLINE void dot_products(const T* weight, const T* hidden, int64_t units, T* logits) {
  constexpr int group = lanes<T> < tile_samples ? lanes<T> : tile_samples;
  Vector<T> sums[tile_samples] = {};
  for (int64_t j = 0; j < units; j += lanes<T>) {
    const Vector<T> factor = load_raw(weight + j);
#pragma GCC unroll 8
    for (int s = 0; s < tile_samples; ++s) sums[s] += factor * load_raw(hidden + s * units + j);
  }
  for (int s = 0; s < tile_samples; s += group) {
    store_first<T>(logits + s, sums_of_rows<T, group>(sums + s), group);
  }
}

// Runs the recurrence for the first `count` samples of a tile; `state` has room for 2 tile_samples rows of units.
// `decide(d, logits)` takes the logits (tile_samples,) of dimension d, which lack the bias; `value(s, d)` then gives x.
template <typename T, typename Decide, typename Value>
void run_tile(const Weights<T>& w, int64_t count, T* state, const Decide& decide, const Value& value) {
  const int64_t units = w.units;
  T *hidden = state, *activation = state + tile_samples * units;
  for (int64_t j = 0; j < units; j += lanes<T>) {
    const Vector<T> a = load_raw(w.in_bias + j), h = logistic<T>(a);
    for (int s = 0; s < tile_samples; ++s) {
      store<T>(activation + s * units + j, a);
      store<T>(hidden + s * units + j, h);
    }
  }
  for (int64_t d = 0; d < w.dimensions; ++d) {
    T logits[tile_samples];
    dot_products<T>(w.out + d * units, hidden, units, logits);
    decide(d, logits);
    if (d + 1 == w.dimensions) break;  // no unit depends on the last one
    const T* column = w.in + d * units;
    for (int64_t s = 0; s < count; ++s) {
      const T x = value(s, d);
      if (x == 0) continue;
      T *a_row = activation + s * units, *h_row = hidden + s * units;
      for (int64_t j = 0; j < units; j += lanes<T>) {
        const Vector<T> a = load_raw(a_row + j) + x * load_raw(column + j);
        store<T>(a_row + j, a);
        store<T>(h_row + j, logistic<T>(a));
      }
    }
  }
}

// sum_d x_d logit_d - log(1 + e^logit_d), lane by lane and then across lanes.
template <typename S>
Compute<S> log_prob_of_row(const S* x, const Compute<S>* logits, int64_t dimensions) {
  using T = Compute<S>;
  Vector<T> total = {};
  for (int64_t d = 0; d < dimensions; d += lanes<T>) {
    const Vector<T> logit = load_first<T>(logits + d, dimensions - d);
    const Vector<T> term = load_first<S>(x + d, dimensions - d) * logit - softplus<T>(logit);
    total += select<T>(first_lanes<T>(dimensions - d), term, Vector<T>{});
  }
  return sum<T>(total);
}

}  // namespace nade
}  // namespace mpkernels
