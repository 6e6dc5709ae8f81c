// The formulas of one sample of volume compositing, for host and device.
#pragma once

#include "common/launch.h"

namespace mpkernels {
namespace composite {

template <typename T>
struct Exponential {
  T exp;
  T expm1;
};

// exp(x) and expm1(x), each within 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, p = e^r - 1 by its Taylor polynomial;
// exp(x) = 2^n p + 2^n and expm1(x) = 2^n p + (2^n - 1), so that one polynomial serves both. The bounds choose n = -127
// and 128, where the bits of 2^n are those of 0 and of infinity: below the smallest normal number exp is 0, above 88.37
// infinity. NaN stays NaN.
MPKERNELS_HOST_DEVICE inline Exponential<float> exponential(float x) {
  const float inside = x > 88.37f ? 89.0f : (x < -88.0f ? -88.0f : x);
  const float shifted = fmaf(inside, 1.44269504088896340736f, 0x1.8p23f);  // the nearest integer n, in the low bits
  const float n = shifted - 0x1.8p23f;
  const float r = fmaf(n, 2.12194440054690583e-4f, fmaf(n, -0.693359375f, inside));
  float p = 1.0f / 5040;
  p = fmaf(p, r, 1.0f / 720);
  p = fmaf(p, r, 1.0f / 120);
  p = fmaf(p, r, 1.0f / 24);
  p = fmaf(p, r, 1.0f / 6);
  p = fmaf(p, r, 1.0f / 2);
  p = fmaf(p * r, r, r);
  unsigned bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;  // the exponent n; the bits of 1.5 2^23 are shifted out
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  return {fmaf(p, scale, scale), fmaf(p, scale, scale - 1.0f)};
}

MPKERNELS_HOST_DEVICE inline Exponential<double> exponential(double x) {
  return {exp(x), expm1(x)};
}

// What two things in a row absorb, from what each absorbs: 1 - (1 - a) (1 - b), with the digits of small a and b.
template <typename T>
MPKERNELS_HOST_DEVICE inline T absorbed_by_both(T a, T b) {
  return a + fma(-a, b, b);
}

}  // namespace composite
}  // namespace mpkernels
