// The formulas of one element of the affine coupling, for a CUDA thread (V = float or double) and for a vector of the
// CPU kernel alike: the log-scale l, the factor m = e^l (or e^-l for the inverse), and the slope l'(raw). Conventions,
// limits and what NaN does: mpkernels/flows/affine_coupling/schema.py.
//
//     v = x, or with the shift in front (shift_first != inverse) x +- t        y = v m, or v m +- t
//     dv = g m,   dl = +-(where limited 0, else g v m, + dL/dlog_abs_det),   draw = dl l'(raw),   dt = +-g or +-dv
//
// (upper signs forward, lower ones inverse)
#pragma once

#include "common/arithmetic.h"
#include "common/launch.h"

#include <cmath>

namespace mpkernels {
namespace affine_coupling {

// `scale` of the schema; a sigmoid with an epsilon has formulas of its own.
enum Scale : int { scale_exp, scale_sigmoid, scale_tanh, scale_softclamp, scale_additive, scale_sigmoid_epsilon };
// `layout` and `pattern` of the schema.
enum Layout : int { separate, shift_scale, scale_shift, shift_scale_interleaved, scale_shift_interleaved };
enum Pattern : int { pattern_none, pattern_checkerboard, pattern_channel, pattern_tensor, pattern_alternating };

// The functions of one variable that the formulas need. log1p is of arguments in [0, 1], log of positive normal
// numbers.
template <typename V>
struct Functions {
  static MPKERNELS_HOST_DEVICE inline V exp(V x) { return ::exp(x); }
  static MPKERNELS_HOST_DEVICE inline V log(V x) { return ::log(x); }
  static MPKERNELS_HOST_DEVICE inline V tanh(V x) { return ::tanh(x); }
  static MPKERNELS_HOST_DEVICE inline V atan(V x) { return ::atan(x); }
  // 1 / (1 + e) and log(1 + e), for e in [0, 1]
  static MPKERNELS_HOST_DEVICE inline V inverse_and_log1p(V e, V& log1p) {
    log1p = ::log1p(e);
    return 1 / (1 + e);
  }
};

template <typename V>
struct Scaled {
  V log_scale;  // l, if asked for
  V e;          // with log_apart and the sigmoid, l = log_scale - log(1 + e), e in [0, 1]
  V factor;     // m
  V slope;      // l'(raw), if asked for
  typename Arithmetic<V>::Truth limited;
};

// What is asked of l: nothing, l, or the sigmoid's in two parts, so that sum log(1 + e_i) can become one logarithm of
// the product.
enum Log : int { no_log, log_whole, log_apart };

template <int scale, bool inverse, int wants_log, bool wants_slope, typename V>
MPKERNELS_HOST_DEVICE inline Scaled<V> scaled(V raw, typename Arithmetic<V>::Scalar clamp,
                                              typename Arithmetic<V>::Scalar epsilon) {
  using A = Arithmetic<V>;
  using F = Functions<V>;
  using T = typename A::Scalar;
  constexpr T limit = sizeof(T) == 8 ? T(708) : T(87);
  Scaled<V> out;
  out.log_scale = V{};
  out.e = V{};
  out.slope = V{};
  if constexpr (scale == scale_additive) {
    out.factor = V{} + 1;
    out.limited = V{} > V{};
  } else if constexpr (scale == scale_sigmoid || scale == scale_sigmoid_epsilon) {
    const V u = raw + 2;
    const auto positive = u >= V{};
    const V below = A::select(positive, -u, u);  // -|u|
    out.limited = below < -limit;
    const V e = F::exp(A::select(out.limited, V{} - limit, below));
    V log1p = V{}, r;
    if constexpr (scale == scale_sigmoid && wants_log == log_whole) {
      r = F::inverse_and_log1p(e, log1p);
    } else {
      r = 1 / (1 + e);
    }
    const V er = e * r;
    const V sigma = A::select(positive, r, er);
    const V other = A::select(positive, er, r);  // 1 - sigma, with the digits of small ones
    if constexpr (scale == scale_sigmoid) {
      if constexpr (wants_log != no_log) out.log_scale = A::select(positive, V{}, u) - log1p;
      out.e = e;
      out.factor = inverse ? (1 + e) * A::select(positive, V{} + 1, 1 / e) : sigma;
      out.slope = other;
    } else {
      const V s = sigma + epsilon;
      if constexpr (wants_log != no_log) out.log_scale = F::log(s);
      const V over = inverse || wants_slope ? 1 / s : V{};
      out.factor = inverse ? over : s;
      if constexpr (wants_slope) out.slope = sigma * other * over;
    }
  } else {
    V l = raw;
    if constexpr (scale == scale_exp) {
      out.slope = V{} + 1;
    } else if constexpr (scale == scale_tanh) {
      const V tanh = F::tanh(raw);
      l = clamp * tanh;
      out.slope = clamp * (1 - tanh * tanh);
    } else {
      const T factor = clamp * T(0.636);
      l = factor * F::atan(raw);
      if constexpr (wants_slope) out.slope = factor / (1 + raw * raw);
    }
    out.log_scale = l;
    const V sign = inverse ? -l : l;
    V k = A::select(sign > limit, V{} + limit, sign);
    k = A::select(sign < -limit, V{} - limit, k);
    out.limited = (sign > limit) | (sign < -limit);
    out.factor = F::exp(k);
  }
  return out;
}

// y of an element that is transformed.
template <bool inverse, typename V>
MPKERNELS_HOST_DEVICE inline V transformed(V x, V shift, V factor, bool shift_before) {
  const V t = inverse ? -shift : shift;
  return shift_before ? (x + t) * factor : x * factor + t;
}

template <typename V>
struct OfElement {
  V x, raw, shift;
};

// Its gradients, of g (of y) and of_log (of log_abs_det).
template <bool inverse, typename V>
MPKERNELS_HOST_DEVICE inline OfElement<V> gradients(V g, V of_log, V x, V shift, const Scaled<V>& s,
                                                    bool shift_before) {
  using A = Arithmetic<V>;
  const V v = shift_before ? x + (inverse ? -shift : shift) : x;
  OfElement<V> out;
  out.x = g * s.factor;
  const V of_l = A::select(s.limited, V{}, out.x * v) + of_log;
  out.raw = (inverse ? -of_l : of_l) * s.slope;
  const V of_t = shift_before ? out.x : g;
  out.shift = inverse ? -of_t : of_t;
  return out;
}

}  // namespace affine_coupling
}  // namespace mpkernels
