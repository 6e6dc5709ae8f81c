// The formulas of one pixel of SSIM, for host and device: V is a number, or a vector of them.
//
// SSIM = (2 mu_x mu_y + C1) (2 sigma_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (sigma_x^2 + sigma_y^2 + C2)) (Wang et al.
// 2004, eq. 13) in terms of the sum p = x + y and the difference d = x - y of the images, with one convolution less:
//
//     A = (mu_p^2 + mu_d^2) / 2 + C1           B = (var_p + var_d) / 2 + C2         var = E[.^2] - mu^2
//     SSIM = (1 - mu_d^2 / A) (1 - var_d / B)
//
// since 4 x y = p^2 - d^2 and 2 (x^2 + y^2) = p^2 + d^2. Equal images give 1, and similar ones keep the digits of what
// they differ in.
#pragma once

#include "common/arithmetic.h"

namespace mpkernels {
namespace ssim {

// The window's averages of p, d, p^2 and d^2; or what SSIM gains by each of them.
template <typename V>
struct Moments {
  V p, d, pp, dd;
};

template <typename V>
struct Terms {
  V a, b;        // 1 / A, 1 / B
  V variance_d;  // var_d
  V luminance;   // 1 - mu_d^2 / A
  V contrast;    // 1 - var_d / B: contrast and structure
};

template <typename V, typename S = typename Arithmetic<V>::Scalar>
MPKERNELS_HOST_DEVICE inline Terms<V> terms(const Moments<V>& m, S c1, S c2) {
  Terms<V> t;
  const V square_d = m.d * m.d, square_p = m.p * m.p;
  t.variance_d = m.dd - square_d;
  t.a = 1 / ((square_p + square_d) * S(0.5) + c1);
  t.b = 1 / ((m.pp - square_p + t.variance_d) * S(0.5) + c2);
  t.luminance = 1 - square_d * t.a;
  t.contrast = 1 - t.variance_d * t.b;
  return t;
}

template <typename V, typename S = typename Arithmetic<V>::Scalar>
MPKERNELS_HOST_DEVICE inline V similarity(const Moments<V>& m, S c1, S c2) {
  const Terms<V> t = terms<V>(m, c1, c2);
  return t.luminance * t.contrast;
}

// The derivatives of SSIM to the four averages.
template <typename V, typename S = typename Arithmetic<V>::Scalar>
MPKERNELS_HOST_DEVICE inline Moments<V> derivatives(const Moments<V>& m, S c1, S c2) {
  const Terms<V> t = terms<V>(m, c1, c2);
  Moments<V> g;
  const V through_a = t.contrast * m.d * t.a;  // contrast mu_d / A
  const V through_b = t.luminance * t.b;       // luminance / B
  g.pp = through_b * t.variance_d * t.b * S(0.5);
  g.dd = g.pp - through_b;
  g.p = through_a * m.d * t.a * m.p - 2 * g.pp * m.p;
  g.d = through_a * (m.d * m.d * t.a - 2) - 2 * g.dd * m.d;
  return g;
}

}  // namespace ssim
}  // namespace mpkernels
