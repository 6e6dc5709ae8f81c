// The few operations that a formula in `<op>_math.h` needs beside + - * / and comparisons, so that one template serves
// a CUDA thread (V = float or double) and a vector of a CPU kernel (V = Vector<float> or Vector<double>, which
// common/vector.h adds): choosing without a branch, minimum, maximum, square root.
//
//     template <typename V>
//     MPKERNELS_HOST_DEVICE inline V inverse_norm(V square) {
//       using A = Arithmetic<V>;
//       return A::select(square > 0, 1 / A::sqrt(square), V{});
//     }
//
// A comparison of V gives Arithmetic<V>::Truth; combine truths with & | and !, never && or ||.
#pragma once

#include "common/launch.h"

#include <cmath>

namespace mpkernels {

template <typename V>
struct Arithmetic {
  using Scalar = V;
  using Truth = bool;

  static MPKERNELS_HOST_DEVICE inline V select(bool truth, V yes, V no) { return truth ? yes : no; }
  // NaN in `a` gives b
  static MPKERNELS_HOST_DEVICE inline V minimum(V a, V b) { return a < b ? a : b; }
  static MPKERNELS_HOST_DEVICE inline V maximum(V a, V b) { return a > b ? a : b; }
  static MPKERNELS_HOST_DEVICE inline V sqrt(V x) { return ::sqrt(x); }
  // false for NaN and both infinities
  static MPKERNELS_HOST_DEVICE inline bool finite(V x) { return x - x == 0; }
};

}  // namespace mpkernels
