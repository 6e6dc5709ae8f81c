// One element of the spline coupling, as a thread of a GPU computes it: from its parameters to its bin, which is what
// spline_coupling_math.h computes with, and back. Formulas: mpkernels/flows/spline_coupling/schema.py.
//
// Widths and heights pass by twice, for their softmax and for the knots, which are summed in a loop that keeps the bin
// of x by selecting: no array is indexed by the bin, so that all of it stays in registers where K is compiled in. Where
// K is a runtime number widths and heights are read, and their exponentials computed, as often as they are needed. Of
// the slopes only the bin's two are read.
//
// From the knots on the arithmetic is float64: some 150 operations an element at K = 8. A GPU for data centres has half
// as many units for float64 as for float32, on which these fit into the time that the parameters take to arrive (92
// bytes an element at K = 8, float32); a GPU for graphics has 1/64, and is slow here.
#pragma once

#include "common/launch.h"
#include "flows/spline_coupling_math.h"

#include <cmath>

namespace mpkernels {
namespace spline_coupling {

// The sizes of bins: `least`, and their parts of what is `left`, both of an interval of length 2 tail_bound.
struct Sizes {
  double least, left;
};

struct Settings {
  double tail_bound;
  Sizes widths, heights;
  double min_derivative;
  int bins;
  bool inverse;
};

// The softmax of K of an element's parameters, raw(first), raw(first + 1), ..., in T but for its sum.
// K: their number, where it is compiled in, else 0.
template <typename T, int K, typename Raw>
struct Softmax {
  const Raw& raw;
  int first;
  T largest;
  double inverse_sum;
  T exponentials[K > 0 ? K : 1];

  __device__ __forceinline__ Softmax(const Raw& raw, int first, int bins) : raw(raw), first(first) {
    largest = raw(first);
    double sum = 0;
    if constexpr (K > 0) {
      exponentials[0] = largest;
#pragma unroll
      for (int j = 1; j < K; ++j) {
        exponentials[j] = raw(first + j);
        largest = exponentials[j] > largest ? exponentials[j] : largest;
      }
#pragma unroll
      for (int j = 0; j < K; ++j) {
        exponentials[j] = exp(exponentials[j] - largest);
        sum += static_cast<double>(exponentials[j]);
      }
    } else {
      for (int j = 1; j < bins; ++j) {
        const T value = raw(first + j);
        largest = value > largest ? value : largest;
      }
      for (int j = 0; j < bins; ++j) sum += static_cast<double>(exponential(j));
    }
    inverse_sum = 1 / sum;
  }

  // Number j, times the sum.
  __device__ __forceinline__ T exponential(int j) const {
    if constexpr (K > 0) {
      return exponentials[j];
    } else {
      return exp(raw(first + j) - largest);
    }
  }
};

// The exponential of the bin that was found, and the sums of those below and above: what backward needs.
template <typename T>
struct Shares {
  T below, own, above;

  __device__ __forceinline__ void pass(T exponential, bool here) {
    below = here ? below + own + above : below;
    above = here ? T(0) : above + exponential;
    own = here ? exponential : own;
  }
};

template <typename T>
struct Found {
  Bin<double> bin;
  int index;
  Shares<T> of_width, of_height;
  T raw_left, raw_right;  // the parameters of the slopes at its ends, where those are not the interval's
};

template <typename T>
__device__ __forceinline__ double slope_at_knot(const Settings& in, T raw) {
  return in.min_derivative + static_cast<double>((raw > 0 ? raw : T(0)) + log1p(exp(-fabs(raw))));
}

// The bin of `value`, an x, or where the spline is inverted a y.
template <typename T, int K, typename Raw>
__device__ __forceinline__ Found<T> find_bin(const Settings& in, double value, const Raw& raw,
                                             const Softmax<T, K, Raw>& widths, const Softmax<T, K, Raw>& heights) {
  const int bins = K > 0 ? K : in.bins;
  const double scale_x = in.widths.left * widths.inverse_sum, scale_y = in.heights.left * heights.inverse_sum;
  Found<T> found{};
  double x = -in.tail_bound, y = -in.tail_bound;
  const auto pass = [&](int j) {
    const T share_x = widths.exponential(j), share_y = heights.exponential(j);
    const bool last = j == bins - 1;
    const double next_x = last ? in.tail_bound : x + (scale_x * static_cast<double>(share_x) + in.widths.least);
    const double next_y = last ? in.tail_bound : y + (scale_y * static_cast<double>(share_y) + in.heights.least);
    const bool here = j == 0 || value >= (in.inverse ? y : x);  // a later bin takes the place of an earlier one
    if (here) {
      found.bin.x = x, found.bin.w = next_x - x;
      found.bin.y = y, found.bin.h = next_y - y;
      found.index = j;
    }
    found.of_width.pass(share_x, here);
    found.of_height.pass(share_y, here);
    x = next_x, y = next_y;
  };
  if constexpr (K > 0) {
#pragma unroll
    for (int j = 0; j < K; ++j) pass(j);
  } else {
    for (int j = 0; j < bins; ++j) pass(j);
  }
  found.bin.d_0 = found.bin.d_1 = 1;
  if (found.index > 0) {
    found.raw_left = raw(2 * bins + found.index - 1);
    found.bin.d_0 = slope_at_knot(in, found.raw_left);
  }
  if (found.index < bins - 1) {
    found.raw_right = raw(2 * bins + found.index);
    found.bin.d_1 = slope_at_knot(in, found.raw_right);
  }
  return found;
}

// Where in its bin a value lies.
template <typename T>
__device__ __forceinline__ double place_of(const Settings& in, const Found<T>& found, double value) {
  return in.inverse ? place_of_y(found.bin, value) : place_of_x(found.bin, value);
}

// Whether the spline applies to a value; not to NaN.
__device__ __forceinline__ bool inside(const Settings& in, double value) {
  return value >= -in.tail_bound && value <= in.tail_bound;
}

// The image of a value inside; the logarithm of the derivative is added to log_abs_det.
template <typename T, int K, typename Raw>
__device__ __forceinline__ double transformed(const Settings& in, double value, const Raw& raw, double& log_abs_det) {
  const int bins = K > 0 ? K : in.bins;
  const Softmax<T, K, Raw> widths(raw, 0, bins), heights(raw, bins, bins);
  const Found<T> found = find_bin<T, K>(in, value, raw, widths, heights);
  const double a = place_of(in, found, value);
  double slope;
  const double y = value_and_slope(found.bin, a, &slope);
  log_abs_det += in.inverse ? -log(slope) : log(slope);
  return in.inverse ? found.bin.x + found.bin.w * a : y;
}

// The gradients of a value inside (returned), and of its parameters, by store(number, gradient), from that of its image
// and that of log_abs_det.
template <typename T, int K, typename Raw, typename Store>
__device__ __forceinline__ double gradients(const Settings& in, double value, double of_image, double of_log,
                                            const Raw& raw, const Store& store) {
  const int bins = K > 0 ? K : in.bins;
  const Softmax<T, K, Raw> widths(raw, 0, bins), heights(raw, bins, bins);
  const Found<T> found = find_bin<T, K>(in, value, raw, widths, heights);
  const BinGradients<double> of = bin_gradients(found.bin, place_of(in, found, value), of_image, of_log, in.inverse);

  // dL/dz_j = share_j (dL/dshare_j - their mean): three factors, for bins below, for this one, and for those above.
  // Written with the sums of both sides, since 1 minus one of them would cancel.
  const auto write = [&](const Softmax<T, K, Raw>& softmax, const Shares<T>& sums, double left, double of_start,
                         double of_size) {
    const double norm = softmax.inverse_sum, scale = left * norm;  // (scale: exponentials by norm are the shares)
    const double below = static_cast<double>(sums.below) * norm, own = static_cast<double>(sums.own) * norm;
    const double above = static_cast<double>(sums.above) * norm;
    const T of_below = static_cast<T>(scale * (of_start * (own + above) - of_size * own));
    const T of_own = static_cast<T>(scale * (of_size * (below + above) - of_start * below));
    const T of_above = static_cast<T>(-scale * (of_start * below + of_size * own));
    const auto pass = [&](int j) {
      const T factor = j < found.index ? of_below : j == found.index ? of_own : of_above;
      store(softmax.first + j, softmax.exponential(j) * factor);
    };
    if constexpr (K > 0) {
#pragma unroll
      for (int j = 0; j < K; ++j) pass(j);
    } else {
      for (int j = 0; j < bins; ++j) pass(j);
    }
  };
  write(widths, found.of_width, in.widths.left, of.x, of.w);
  write(heights, found.of_height, in.heights.left, of.y, of.h);

  const T of_left = static_cast<T>(of.d_0) / (1 + exp(-found.raw_left));  // (times the derivative of softplus)
  const T of_right = static_cast<T>(of.d_1) / (1 + exp(-found.raw_right));
  const auto pass = [&](int j) {
    store(2 * bins + j, j == found.index - 1 ? of_left : j == found.index ? of_right : T(0));
  };
  if constexpr (K > 0) {
#pragma unroll
    for (int j = 0; j < K - 1; ++j) pass(j);
  } else {
    for (int j = 0; j < bins - 1; ++j) pass(j);
  }
  return of.input;
}

}  // namespace spline_coupling
}  // namespace mpkernels
