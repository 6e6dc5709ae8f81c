// The formulas of one Gaussian on one pixel, for CUDA threads. Forward and backward must take the same decisions, so
// both call these, and the quadratic form is spelled out in fma: there is no sum of products left for the compiler to
// contract one way here and another way there.
#pragma once

#include <cmath>

#include "common/launch.h"
#include "splatting/constants.h"

namespace mpkernels {
namespace rasterize {

using namespace splatting;

template <typename T>
struct alignas(2 * sizeof(T)) Center {
  T x, y;
};

// A Gaussian's conic, scaled so that a power of two takes the place of exp, and its opacity:
// log2(e) sigma = a dx^2 + b dx dy + c dy^2.
template <typename T>
struct alignas(16) Shape {
  T a, b, c, opacity;
};

template <typename T>
constexpr T log2_e = T(1.44269504088896340736);
template <typename T>
constexpr T ln_2 = T(0.69314718055994530942);

template <typename T>
MPKERNELS_HOST_DEVICE inline Shape<T> scaled_shape(T a, T b, T c, T opacity) {
  return {a * (log2_e<T> / 2), b * log2_e<T>, c * (log2_e<T> / 2), opacity};
}

// 2^x for x <= 0. On a GPU the float version is one instruction, with an error of 2 ulp, and 0 below 2^-126.
MPKERNELS_HOST_DEVICE inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
MPKERNELS_HOST_DEVICE inline double power_of_two(double x) {
  return exp2(x);
}

// 1 / x for x in [0.001, 1): a transmittance is divided by hundreds of these, so the hardware's approximation gets one
// step of Newton's iteration.
MPKERNELS_HOST_DEVICE inline float inverse(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.0f), y);
#else
  return 1 / x;
#endif
}
MPKERNELS_HOST_DEVICE inline double inverse(double x) {
  return 1 / x;
}

MPKERNELS_HOST_DEVICE inline float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}
MPKERNELS_HOST_DEVICE inline double fused(double a, double b, double c) {
  return fma(a, b, c);
}

// o exp(-sigma) of a pixel at `center` - (dx, dy), and whether it is drawn there: not if sigma is negative or NaN, nor
// if the result is below 1/255 or NaN.
template <typename T>
MPKERNELS_HOST_DEVICE inline bool is_seen(const Shape<T>& shape, T dx, T dy, T& opacity) {
  const T along = fused(shape.a, dx, shape.b * dy);
  const T across = shape.c * dy;
  const T exponent = fused(dx, along, across * dy);
  opacity = shape.opacity * power_of_two(-exponent);
  return exponent >= 0 && opacity >= alpha_min<T>;
}

}  // namespace rasterize
}  // namespace mpkernels
