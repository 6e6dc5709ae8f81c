// One bin of a monotone rational-quadratic spline, for host and device; V is a number, or a vector of numbers.
//
// Durkan et al. 2019, "Neural Spline Flows", eqs. 4 to 8 and appendix A.3. With w, h the bin's width and height, d_0
// and d_1 the slopes at its ends, a = (x - x_0) / w in [0, 1], b = a (1 - a), s = h / w, t = d_0 + d_1 - 2 s:
//
//     q = s + t b,   n = s a^2 + d_0 b,   m = d_1 a^2 + 2 s b + d_0 (1 - a)^2
//     y = y_0 + h n / q,   f' = s^2 m / q^2
//
// V is float64 wherever the numerics of mpkernels/flows/spline_coupling/schema.py ask for it: everywhere.
#pragma once

#include "common/arithmetic.h"

namespace mpkernels {
namespace spline_coupling {

template <typename V>
struct Bin {
  V x, w;      // its left end, and its width
  V y, h;      // its lower end, and its height
  V d_0, d_1;  // the slopes at its ends
};

// Where in the bin an input lies, 0 to 1.
template <typename V>
MPKERNELS_HOST_DEVICE inline V place_of_x(const Bin<V>& bin, V x) {
  return (x - bin.x) / bin.w;
}

// The same for a y: the root of A a^2 + B a - C in [0, 1]. C >= 0, and A + B = h s > 0; of the two ways to write the
// root, the one that adds numbers of one sign. Rounding may make the discriminant negative, by as little as that.
template <typename V>
MPKERNELS_HOST_DEVICE inline V place_of_y(const Bin<V>& bin, V y) {
  using A = Arithmetic<V>;
  const V s = bin.h / bin.w, rest = y - bin.y;
  const V of_a = bin.h * bin.d_0 - rest * (bin.d_0 + bin.d_1 - 2 * s);
  const V of_a2 = bin.h * s - of_a;
  const V constant = s * rest;
  const V discriminant = of_a * of_a + 4 * of_a2 * constant;
  const V root = A::sqrt(A::select(discriminant < 0, V{}, discriminant));  // (NaN stays NaN)
  const V above = A::select(of_a >= 0, 2 * constant, root - of_a);
  const V below = A::select(of_a >= 0, of_a + root, 2 * of_a2);
  return above / below;
}

// y at a place, and the slope f' there.
template <typename V>
MPKERNELS_HOST_DEVICE inline V value_and_slope(const Bin<V>& bin, V a, V* slope) {
  const V s = bin.h / bin.w;
  const V b = a * (1 - a), c = 1 - a;
  const V q = s + (bin.d_0 + bin.d_1 - 2 * s) * b;
  const V m = bin.d_1 * a * a + 2 * s * b + bin.d_0 * c * c;
  const V over_q = 1 / q, s_over_q = s * over_q;
  *slope = s_over_q * s_over_q * m;
  return bin.y + bin.h * (s * a * a + bin.d_0 * b) * over_q;
}

// Gradients of the input, and of what makes the bin.
template <typename V>
struct BinGradients {
  V input;
  V x, w, y, h, d_0, d_1;
};

// From the gradient of the output (y, or x for the inverse) and that of log f' (for the inverse: of -log f'), at place
// a. The inverse is differentiated implicitly: with r = (g - l d(log f')/dx) / f' the input's gradient is r, and the
// others are those of the forward for -r and -l.
template <typename V>
MPKERNELS_HOST_DEVICE inline BinGradients<V> bin_gradients(const Bin<V>& bin, V a, V of_output, V of_log,
                                                           bool inverse) {
  const V over_w = 1 / bin.w, s = bin.h * over_w;
  const V b = a * (1 - a), c = 1 - a, e = 1 - 2 * a;
  const V t = bin.d_0 + bin.d_1 - 2 * s;
  const V over_q = 1 / (s + t * b);
  const V m = bin.d_1 * a * a + 2 * s * b + bin.d_0 * c * c;
  const V over_m = 1 / m;
  const V s_over_q = s * over_q;
  const V slope = s_over_q * s_over_q * m;
  const V ratio = (s * a * a + bin.d_0 * b) * over_q;  // n / q
  const V log_by_a = 2 * ((bin.d_1 * a + s * e - bin.d_0 * c) * over_m - t * e * over_q);

  BinGradients<V> found;
  V g = of_output, l = of_log;
  if (inverse) {
    found.input = (g - l * log_by_a * over_w) / slope;
    g = -found.input;
    l = -l;
  }
  const V of_a = g * slope * bin.w + l * log_by_a;
  if (!inverse) found.input = of_a * over_w;
  const V gh = g * bin.h * over_q;
  const V of_s = gh * (a * a - ratio * (1 - 2 * b)) + 2 * l * (bin.w / bin.h + b * over_m - (1 - 2 * b) * over_q);
  found.x = -of_a * over_w;
  found.w = -(of_a * a + of_s * s) * over_w;
  found.y = g;
  found.h = g * ratio + of_s * over_w;
  found.d_0 = gh * b * (1 - ratio) + l * (c * c * over_m - 2 * b * over_q);
  found.d_1 = l * (a * a * over_m - 2 * b * over_q) - gh * b * ratio;
  return found;
}

// The gradient of the numbers z before softmax, of which the widths are sizes_j = (a constant) + scale p_j, and the
// bin's left end is (a constant) + the sum of those before it. dL/dz_j = p_j times one of three numbers: for bins below
// this one, for this one, and for those above. `before` is the sum of p below the bin, `share` the bin's own p.
template <typename V>
struct SoftmaxGradients {
  V below, here, above;
};
template <typename V>
MPKERNELS_HOST_DEVICE inline SoftmaxGradients<V> softmax_gradients(V of_start, V of_size, V before, V share, V scale) {
  const V mean = of_start * before + of_size * share;
  return {scale * (of_start - mean), scale * (of_size - mean), -scale * mean};
}

}  // namespace spline_coupling
}  // namespace mpkernels
