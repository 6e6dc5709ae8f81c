// A vector of splines on the CPU: as many elements at a time as a vector of T has lanes, T being float (for float32 and
// the half types) or double. Formula of a bin: spline_coupling_math.h; numerics: schema.py.
//
// The parameters of the group lie in rows, one parameter of all lanes in each. Exponentials, softplus and logarithm are
// computed in T; from the sums of exponentials on, everything in double, a half of the lanes after the other where T is
// float. The bin is found while its knots are added up, by replacing the bin so far wherever the input is not below the
// next one's edge: no table of knots is written, and nothing is gathered.
#pragma once

#include "common/lane_mask.h"
#include "common/vector.h"
#include "flows/spline_coupling_math.h"

namespace mpkernels {
namespace spline_coupling {

using Double = Vector<double>;

template <typename T>
inline constexpr int halves = lanes<T> / lanes<double>;

// What an op is called with, as the kernels use it.
struct Numbers {
  double tail_bound;
  double least_x, least_y;  // what every bin has of the interval
  double scale_x, scale_y;  // what softmax distributes
  double min_derivative;
  int64_t bins;
  bool inverse;

  Numbers(double tail_bound_, double min_bin_width, double min_bin_height, double min_derivative_, bool inverse_,
          int64_t parameters)
      : tail_bound(tail_bound_),
        least_x(2 * tail_bound_ * min_bin_width),
        least_y(2 * tail_bound_ * min_bin_height),
        scale_x(2 * tail_bound_ * (1 - min_bin_width * static_cast<double>((parameters + 1) / 3))),
        scale_y(2 * tail_bound_ * (1 - min_bin_height * static_cast<double>((parameters + 1) / 3))),
        min_derivative(min_derivative_),
        bins((parameters + 1) / 3),
        inverse(inverse_) {}
  int64_t parameters() const { return 3 * bins - 1; }
};

// Lanes half * lanes<double> and up of numbers in memory, as doubles; and the way back. (GCC 12 converts half a
// register at a time where it is asked for a whole one.)
template <typename T>
MPKERNELS_INLINE Double widen(const T* from, int half) {
  from += half * lanes<double>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return reinterpret_cast<Double>(_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(from)));
#endif
  typedef T Part __attribute__((vector_size(sizeof(T) * lanes<double>)));
  Part part;
  std::memcpy(&part, from, sizeof(part));
  return __builtin_convertvector(part, Double);
}
template <typename T>
MPKERNELS_INLINE void narrow(Double x, int half, T* to) {
  to += half * lanes<double>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm256_storeu_ps(to, _mm512_maskz_cvtpd_ps(0xFF, reinterpret_cast<__m512d>(x)));
    return;
  }
#endif
  typedef T Part __attribute__((vector_size(sizeof(T) * lanes<double>)));
  const Part part = __builtin_convertvector(x, Part);
  std::memcpy(to, &part, sizeof(part));
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), where log1p(u) = 2 artanh(u / (2 + u)) by its series: the argument is at
// most 1/3 (truncated below 1e-8 of it, 1e-17 in double). NaN stays NaN.
template <typename T>
MPKERNELS_INLINE Vector<T> softplus(Vector<T> x) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  const Vector<T> positive = x > 0 ? x : Vector<T>{};
  const Vector<T> u = exponential<T>(x - (positive + positive)).exp();
  const Vector<T> z = u / (2 + u), square = z * z;
  Vector<T> series = broadcast<T>(T(1) / (2 * terms - 1));
#pragma GCC unroll 17
  for (int k = terms - 2; k >= 0; --k) series = series * square + T(1) / (2 * k + 1);
  return positive + 2 * z * series;
}

// log x = e ln 2 + log m, m in [sqrt(1/2), sqrt(2)): the exponent e and z = (m - 1) / (m + 1), of positive normal x.
// The exponent is taken in double, where no slope overflows; the series of log m = 2 artanh z in T keeps the digits
// near 1.
MPKERNELS_INLINE void split_logarithm(Double x, Double* e, Double* z) {
  constexpr int64_t bits_of_sqrt_half = 0x3fe6a09e667f3bcd;
  const Mask<double> bits = reinterpret_cast<Mask<double>>(x) - bits_of_sqrt_half;
  // (the exponent as a double: its bits, moved into the mantissa of 1.5 2^52)
  const Mask<double> shifted = reinterpret_cast<Mask<double>>(broadcast<double>(0x1.8p52)) + (bits >> 52);
  *e = reinterpret_cast<Double>(shifted) - 0x1.8p52 + (x - x);  // (NaN and infinity give NaN)
  const Double m = reinterpret_cast<Double>((bits & 0xfffffffffffff) + bits_of_sqrt_half);
  *z = (m - 1) / (m + 1);
}
template <typename T>
MPKERNELS_INLINE Vector<T> logarithm(Vector<T> e, Vector<T> z) {
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;  // |z| < 0.172
  const Vector<T> square = z * z;
  Vector<T> series = broadcast<T>(T(2) / (2 * terms - 1));
#pragma GCC unroll 11
  for (int k = terms - 2; k >= 0; --k) series = series * square + T(2) / (2 * k + 1);
  return e * T(0.693147180559945309417L) + z * series;
}

// e^(x - max), row by row.
template <typename T>
MPKERNELS_INLINE void exponentials(const T* rows, int64_t stride, int64_t bins, T* to) {
  Vector<T> most = load_raw<T>(rows);
  for (int64_t j = 1; j < bins; ++j) {
    const Vector<T> row = load_raw<T>(rows + j * stride);
    most = row > most ? row : most;
  }
  for (int64_t j = 0; j < bins; ++j) {
    Vector<T> x = (load_raw<T>(rows + j * stride) - most) * T(1.44269504088896340736L);
    x = x < T(-126) ? broadcast<T>(T(-126)) : x;  // (also minus infinity; NaN stays NaN)
    store<T>(to + j * lanes<T>, power_of_two<T>(x));
  }
}

template <typename T>
struct Group {
  Double value[halves<T>];  // the inputs
  LaneMask<double> inside[halves<T>];
  Bin<Double> bin[halves<T>];
  Double k[halves<T>];                                  // the bin's number
  Double over_sum_x[halves<T>], over_sum_y[halves<T>];  // 1 / the sum of exponentials
  Vector<T> raw_0, raw_1;                               // what the slopes d_0 and d_1 come from
  alignas(64) T number[lanes<T>];                       // k, in T

  // Whether any lane is inside. `low` may be null.
  MPKERNELS_INLINE bool set_inputs(const T* x, const T* low, double tail_bound) {
    bool found = false;
    for (int half = 0; half < halves<T>; ++half) {
      Double v = widen<T>(x, half);
      if (low != nullptr) v += widen<T>(low, half);
      value[half] = v;
      const Double magnitude = v < 0 ? -v : v;
      inside[half] = at_least<double>(broadcast<double>(tail_bound), magnitude);  // false for NaN
      found |= !none<double>(inside[half]);
    }
    return found;
  }

  // Finds the bins; leaves the exponentials of widths and heights in `shares` (2 K, lanes).
  MPKERNELS_INLINE void locate(const Numbers& in, const T* rows, int64_t stride, T* shares) {
    const int64_t bins = in.bins;
    T* shares_y = shares + bins * lanes<T>;
    exponentials<T>(rows, stride, bins, shares);
    exponentials<T>(rows + bins * stride, stride, bins, shares_y);
#pragma GCC unroll 2
    for (int half = 0; half < halves<T>; ++half) {
      Double sum_x = {}, sum_y = {};
      for (int64_t j = 0; j < bins; ++j) {
        sum_x += widen<T>(shares + j * lanes<T>, half);
        sum_y += widen<T>(shares_y + j * lanes<T>, half);
      }
      over_sum_x[half] = 1 / sum_x;
      over_sum_y[half] = 1 / sum_y;
      const Double factor_x = in.scale_x * over_sum_x[half], factor_y = in.scale_y * over_sum_y[half];
      Double next_x = {}, next_y = {};  // sums of exponentials, then the edge that they make
      Double left_x = broadcast<double>(-in.tail_bound), left_y = left_x;
      Double x_0 = left_x, x_1 = left_x, y_0 = left_x, y_1 = left_x, at = {};
      for (int64_t j = 0; j < bins; ++j) {
        next_x += widen<T>(shares + j * lanes<T>, half);
        next_y += widen<T>(shares_y + j * lanes<T>, half);
        Double right_x = next_x * factor_x + (static_cast<double>(j + 1) * in.least_x - in.tail_bound);
        Double right_y = next_y * factor_y + (static_cast<double>(j + 1) * in.least_y - in.tail_bound);
        if (j + 1 == bins) {  // exactly the bound; a NaN stays one
          right_x = in.tail_bound + (right_x - right_x);
          right_y = in.tail_bound + (right_y - right_y);
        }
        if (j == 0) {
          x_1 = right_x;
          y_1 = right_y;
        } else {
          const LaneMask<double> reached = at_least<double>(value[half], in.inverse ? left_y : left_x);
          x_0 = choose<double>(reached, left_x, x_0);
          x_1 = choose<double>(reached, right_x, x_1);
          y_0 = choose<double>(reached, left_y, y_0);
          y_1 = choose<double>(reached, right_y, y_1);
          at = choose<double>(reached, broadcast<double>(static_cast<double>(j)), at);
        }
        left_x = right_x;
        left_y = right_y;
      }
      bin[half].x = x_0;
      bin[half].w = x_1 - x_0;
      bin[half].y = y_0;
      bin[half].h = y_1 - y_0;
      k[half] = at;
      narrow<T>(at, half, number);
    }
    set_slopes(in, rows + 2 * bins * stride, stride);
  }

  // Value and slope, in the direction asked for.
  MPKERNELS_INLINE Double evaluate(const Numbers& in, int half, Double* place, Double* slope) const {
    const Bin<Double>& b = bin[half];
    *place = in.inverse ? place_of_y<Double>(b, value[half]) : place_of_x<Double>(b, value[half]);
    const Double y = value_and_slope<Double>(b, *place, slope);
    return in.inverse ? b.x + b.w * *place : y;
  }

 private:
  MPKERNELS_INLINE void set_slopes(const Numbers& in, const T* rows, int64_t stride) {
    const Vector<T> bin_number = load_raw<T>(number);
    Vector<T> before = {}, behind = {};
    for (int64_t j = 0; j + 1 < in.bins; ++j) {  // the knot between bins j and j + 1
      const Vector<T> row = load_raw<T>(rows + j * stride);
      behind = bin_number == static_cast<T>(j) ? row : behind;
      before = bin_number == static_cast<T>(j + 1) ? row : before;
    }
    raw_0 = before;
    raw_1 = behind;
    alignas(64) T d[2][lanes<T>];
    store<T>(d[0], softplus<T>(before));
    store<T>(d[1], softplus<T>(behind));
    const double last = static_cast<double>(in.bins - 1);
    for (int half = 0; half < halves<T>; ++half) {
      const Double one = broadcast<double>(1);
      bin[half].d_0 = k[half] == 0 ? one : in.min_derivative + widen<T>(d[0], half);
      bin[half].d_1 = k[half] == last ? one : in.min_derivative + widen<T>(d[1], half);
    }
  }
};

// All ones in lanes that are inside, as numbers of T.
template <typename T>
MPKERNELS_INLINE Mask<T> lanes_inside(const Group<T>& group) {
  alignas(64) T flags[lanes<T>];
  for (int half = 0; half < halves<T>; ++half) {
    narrow<T>(choose<double>(group.inside[half], broadcast<double>(1), Double{}), half, flags);
  }
  return load_raw<T>(flags) > 0;
}

// Values (lanes, in double) and log f' (in T, of the direction asked for), of lanes inside; others hold anything.
template <typename T>
MPKERNELS_INLINE Vector<T> forward_group(const Numbers& in, Group<T>& group, const T* rows, int64_t stride, T* shares,
                                         double* values) {
  group.locate(in, rows, stride, shares);
  alignas(64) T e[lanes<T>], z[lanes<T>];
#pragma GCC unroll 2
  for (int half = 0; half < halves<T>; ++half) {
    Double place, slope, exponent, rest;
    store<double>(values + half * lanes<double>, group.evaluate(in, half, &place, &slope));
    split_logarithm(slope, &exponent, &rest);
    narrow<T>(exponent, half, e);
    narrow<T>(rest, half, z);
  }
  const Vector<T> log_slope = logarithm<T>(load_raw<T>(e), load_raw<T>(z));
  return in.inverse ? -log_slope : log_slope;
}

// From the gradients of y and of log_abs_det those of the inputs, and of the parameters, row by row into `gradients`
// (3 K - 1, lanes) where asked for: 0 in lanes outside.
template <typename T>
MPKERNELS_INLINE Vector<T> backward_group(const Numbers& in, Group<T>& group, const T* rows, int64_t stride, T* shares,
                                          const T* of_y, const T* of_log, Mask<T> inside, T* gradients) {
  group.locate(in, rows, stride, shares);
  alignas(64) T of_x[lanes<T>], softmaxes[6][lanes<T>], over_sum[2][lanes<T>], of_slopes[2][lanes<T>];
  const double over_scale_x = 1 / in.scale_x, over_scale_y = 1 / in.scale_y;
#pragma GCC unroll 2
  for (int half = 0; half < halves<T>; ++half) {
    Bin<Double>& bin = group.bin[half];
    const Double value = group.value[half];
    const Double place = in.inverse ? place_of_y<Double>(bin, value) : place_of_x<Double>(bin, value);
    const BinGradients<Double> found =
        bin_gradients<Double>(bin, place, widen<T>(of_y, half), widen<T>(of_log, half), in.inverse);
    narrow<T>(found.input, half, of_x);
    if (gradients == nullptr) continue;
    const Double before_x = (bin.x + in.tail_bound - group.k[half] * in.least_x) * over_scale_x;
    const Double before_y = (bin.y + in.tail_bound - group.k[half] * in.least_y) * over_scale_y;
    const auto x = softmax_gradients<Double>(found.x, found.w, before_x, (bin.w - in.least_x) * over_scale_x,
                                             broadcast<double>(in.scale_x));
    const auto y = softmax_gradients<Double>(found.y, found.h, before_y, (bin.h - in.least_y) * over_scale_y,
                                             broadcast<double>(in.scale_y));
    const Double all[6] = {x.below, x.here, x.above, y.below, y.here, y.above};
    for (int i = 0; i < 6; ++i) narrow<T>(all[i], half, softmaxes[i]);
    narrow<T>(group.over_sum_x[half], half, over_sum[0]);
    narrow<T>(group.over_sum_y[half], half, over_sum[1]);
    narrow<T>(found.d_0, half, of_slopes[0]);
    narrow<T>(found.d_1, half, of_slopes[1]);
  }
  if (gradients == nullptr) return load_raw<T>(of_x);

  const Vector<T> number = load_raw<T>(group.number), zero = {};
  for (int axis = 0; axis < 2; ++axis) {
    const Vector<T> below = load_raw<T>(softmaxes[3 * axis]), here = load_raw<T>(softmaxes[3 * axis + 1]),
                    above = load_raw<T>(softmaxes[3 * axis + 2]), over = load_raw<T>(over_sum[axis]);
    for (int64_t j = 0; j < in.bins; ++j) {
      const int64_t row = axis * in.bins + j;
      Vector<T> chosen = number > static_cast<T>(j) ? below : above;
      chosen = number == static_cast<T>(j) ? here : chosen;
      const Vector<T> share = load_raw<T>(shares + row * lanes<T>) * over;
      store<T>(gradients + row * lanes<T>, inside ? share * chosen : zero);
    }
  }
  const Vector<T> of_0 = load_raw<T>(of_slopes[0]) * sigmoid<T>(group.raw_0);
  const Vector<T> of_1 = load_raw<T>(of_slopes[1]) * sigmoid<T>(group.raw_1);
  T* of_raw = gradients + 2 * in.bins * lanes<T>;
  for (int64_t j = 0; j + 1 < in.bins; ++j) {
    Vector<T> chosen = number == static_cast<T>(j) ? of_1 : zero;
    chosen = number == static_cast<T>(j + 1) ? of_0 : chosen;
    store<T>(of_raw + j * lanes<T>, inside ? chosen : zero);
  }
  return load_raw<T>(of_x);
}

}  // namespace spline_coupling
}  // namespace mpkernels
