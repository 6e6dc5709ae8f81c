// The affine coupling of elements that lie side by side, a vector at a time. Formulas: affine_coupling_math.h.
//
// An element that is transformed reads x, raw and shift and writes y: 16 bytes and about 35 operations in float32 with
// the sigmoid (25 with exp); backward reads grad_y, x and raw, and writes three gradients: 24 bytes.
#pragma once

#include "common/lane_mask.h"
#include "common/vector.h"
#include "flows/affine_coupling_math.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace mpkernels {
namespace affine_coupling {

template <typename T>
struct VectorFunctions {
  using V = Vector<T>;
  static MPKERNELS_INLINE V exp(V x) { return limited_exponential<T>(x); }
  static MPKERNELS_INLINE V log(V x) { return natural_logarithm<T>(x); }
  static MPKERNELS_INLINE V tanh(V x) { return hyperbolic_tangent<T>(x); }
  static MPKERNELS_INLINE V atan(V x) { return arctangent<T>(x); }
  // log(1 + e) = 2 artanh(e / (2 + e)), with one division for both
  static MPKERNELS_INLINE V inverse_and_log1p(V e, V& log1p) {
    const V a = 1 + e, b = 2 + e;
    const V over = 1 / (a * b);
    log1p = twice_artanh<T>(e * (a * over));
    return b * over;
  }
};
template <>
struct Functions<Vector<float>> : VectorFunctions<float> {};
template <>
struct Functions<Vector<double>> : VectorFunctions<double> {};

// What is the same for all elements of a call.
template <typename T>
struct Settings {
  T clamp, epsilon;
  bool shift_before;  // shift_first != inverse
  bool streamed;      // outputs are beyond the caches
};

// Where bytes are not 0, in the first `count` lanes. (GCC converts a vector of bytes a byte at a time.)
template <typename T>
MPKERNELS_INLINE LaneMask<T> truths(const uint8_t* from, int64_t count) {
  alignas(16) uint8_t bytes[16] = {};
  std::memcpy(bytes, from, static_cast<size_t>(count < lanes<T> ? count : lanes<T>));
#if defined(__AVX512F__)
  const __m128i all = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
  return static_cast<LaneMask<T>>(_mm_test_epi8_mask(all, all));
#elif defined(__AVX2__)
  const __m128i all = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m256i wide = sizeof(T) == 4 ? _mm256_cvtepu8_epi32(all) : _mm256_cvtepu8_epi64(all);
  return reinterpret_cast<Mask<T>>(wide) != Mask<T>{};
#else
  Mask<T> mask;
  for (int i = 0; i < lanes<T>; ++i) mask[i] = bytes[i] != 0 ? -1 : 0;
  return mask;
#endif
}

template <typename T>
MPKERNELS_INLINE void write(bool streamed, T* to, Vector<T> x, int64_t count) {
  if (streamed) {
    stream_first<T>(to, x, count);
  } else {
    store_first<T>(to, x, count);
  }
}

// Calls step(i, count) for vectors of n elements.
template <typename T, typename Step>
MPKERNELS_INLINE void for_vectors(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) step(i, int64_t{lanes<T>});
  if (i < n) step(i, n - i);
}

template <typename T>
struct ForwardRun {
  const T* x;
  const T* raw;  // null where the scale has none
  const T* shift;
  const uint8_t* kept;  // or null where no element is kept
  T* y;
  T* log_each;  // += +-l of each element; or null, to get their sum
};

// log(1 + x) for 0 <= x, within 3 ulp: what 1 + x rounds off is given back.
template <typename T>
MPKERNELS_INLINE Vector<T> log1p(Vector<T> x) {
  const Vector<T> above = 1 + x;
  return natural_logarithm<T>(above) + (x - (above - 1)) / above;
}

// Writes y, and returns the sum of +-l (- for the inverse). Of the sigmoid's l the logarithms are taken together, of
// prod (1 + e_i) = 1 + p: p grows by e + e p, so that it keeps the digits of small e. Of 64 factors of at most 2 it is
// below 2^64.
template <typename T, int scale, bool inverse>
double forward_run(const ForwardRun<T> run, int64_t n, const Settings<T>& settings) {
  using V = Vector<T>;
  constexpr int64_t L = lanes<T>, together = 64 * L;
  const T clamp = settings.clamp, epsilon = settings.epsilon;
  const bool shift_before = settings.shift_before, streamed = settings.streamed;
  V total{};
  const auto pass = [&](auto each, int64_t from, int64_t to) __attribute__((always_inline)) {
    constexpr int log = scale == scale_sigmoid && !decltype(each)::value ? log_apart : log_whole;
    V product{};
    for_vectors<T>(to - from, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      const int64_t i = from + at;
      const V x = load_first<T>(run.x + i, count), shift = load_first<T>(run.shift + i, count);
      const V raw = scale == scale_additive ? V{} : load_first<T>(run.raw + i, count);
      const auto s = scaled<scale, inverse, log, false, V>(raw, clamp, epsilon);
      V y = transformed<inverse, V>(x, shift, s.factor, shift_before), l = s.log_scale, e = s.e;
      if (run.kept != nullptr) {
        const LaneMask<T> kept = truths<T>(run.kept + i, count);
        y = choose<T>(kept, x, y);
        l = choose<T>(kept, V{}, l);
        if constexpr (log == log_apart) e = choose<T>(kept, V{}, e);
      }
      write<T>(streamed, run.y + i, y, count);
      if constexpr (scale != scale_additive) {
        if constexpr (decltype(each)::value) {
          const V before = load_first<T>(run.log_each + i, count);
          store_first<T>(run.log_each + i, inverse ? before - l : before + l, count);
        } else {
          if (count < L) {
            l = select<T>(first_lanes<T>(count), l, V{});
            if constexpr (log == log_apart) e = select<T>(first_lanes<T>(count), e, V{});
          }
          total += l;
          if constexpr (log == log_apart) product = product * e + (product + e);
        }
      }
    });
    if constexpr (log == log_apart) total -= log1p<T>(product);
  };
  if (run.log_each != nullptr) {
    pass(std::true_type{}, 0, n);
  } else {
    for (int64_t i = 0; i < n; i += together) pass(std::false_type{}, i, std::min(i + together, n));
  }
  const double found = sum<T>(total);
  return inverse ? -found : found;
}

template <typename T>
struct BackwardRun {
  const T* grad;
  const T* x;      // null where the gradient of raw is not wanted
  const T* raw;    // null where the scale has none
  const T* shift;  // null where it is not in front, or the gradient of raw is not wanted
  const uint8_t* kept;
  T* of_x;  // null where they are not wanted
  T* of_raw;
  T* of_shift;
  const T* of_log_each;  // gradient of log_abs_det of each element; or null, and one for all
  T of_log;
};

template <typename T, int scale, bool inverse>
void backward_run(const BackwardRun<T> run, int64_t n, const Settings<T>& settings) {
  using V = Vector<T>;
  const T clamp = settings.clamp, epsilon = settings.epsilon;
  const bool shift_before = settings.shift_before, streamed = settings.streamed;
  for_vectors<T>(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const V g = load_first<T>(run.grad + i, count);
    const V x = run.x != nullptr ? load_first<T>(run.x + i, count) : V{};
    const V shift = run.shift != nullptr ? load_first<T>(run.shift + i, count) : V{};
    const V raw = scale == scale_additive ? V{} : load_first<T>(run.raw + i, count);
    const V of_log = run.of_log_each != nullptr ? load_first<T>(run.of_log_each + i, count) : V{} + run.of_log;
    const auto s = scaled<scale, inverse, no_log, true, V>(raw, clamp, epsilon);
    auto found = gradients<inverse, V>(g, of_log, x, shift, s, shift_before);
    if (run.kept != nullptr) {
      const LaneMask<T> kept = truths<T>(run.kept + i, count);
      found = {choose<T>(kept, g, found.x), choose<T>(kept, V{}, found.raw), choose<T>(kept, V{}, found.shift)};
    }
    if (run.of_x != nullptr) write<T>(streamed, run.of_x + i, found.x, count);
    if (run.of_raw != nullptr) write<T>(streamed, run.of_raw + i, found.raw, count);
    if (run.of_shift != nullptr) write<T>(streamed, run.of_shift + i, found.shift, count);
  });
}

template <typename S>
void copy_run(const S* from, S* to, int64_t n, bool streamed) {
  constexpr bool raw_copy = sizeof(S) >= 4;
  if (!streamed || !raw_copy) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(S));
    return;
  }
  for_vectors<Compute<S>>(
      n, [&](int64_t i, int64_t count) { stream_first<S>(to + i, load_first<S>(from + i, count), count); });
}

}  // namespace affine_coupling
}  // namespace mpkernels
