// The rotation of a quaternion that need not have length 1, the covariance of a Gaussian, and their gradients; for host
// and device.
//
//   Sigma = M M^T, M = R S, or M = R S^-1 for the inverse      (Kerbl et al. 2023, "3D Gaussian splatting", eq. 6)
//
//   R = [ 1 - 2 (y^2 + z^2)   2 (x y - w z)       2 (x z + w y)     ]
//       [ 2 (x y + w z)       1 - 2 (x^2 + z^2)   2 (y z - w x)     ]     (w, x, y, z) = q / |q|
//       [ 2 (x z - w y)       2 (y z + w x)       1 - 2 (x^2 + y^2) ]
//
// The quaternion is first divided by its largest component, so that no square overflows or vanishes. A zero quaternion
// counts as the identity, with gradient 0; one with NaN or infinity gives NaN.
#pragma once

#include "common/arithmetic.h"

namespace mpkernels {
namespace splatting {

template <typename V>
struct UnitQuaternion {
  V w, x, y, z;
  V norm;                              // of the quaternion given; 1 where it was zero
  typename Arithmetic<V>::Truth zero;  // whether it was
};

template <typename V>
MPKERNELS_HOST_DEVICE inline V magnitude(V x) {
  return Arithmetic<V>::maximum(x, -x);
}

template <typename V>
MPKERNELS_HOST_DEVICE inline UnitQuaternion<V> normalized(const V (&q)[4]) {
  using A = Arithmetic<V>;
  const V one = V{} + 1;
  UnitQuaternion<V> unit;
  unit.zero = (q[0] == V{}) & (q[1] == V{}) & (q[2] == V{}) & (q[3] == V{});
  const V largest =
      A::maximum(A::maximum(magnitude(q[0]), magnitude(q[1])), A::maximum(magnitude(q[2]), magnitude(q[3])));
  const V divisor = A::select(unit.zero, one, largest);
  const V w = A::select(unit.zero, one, q[0] / divisor);
  const V x = q[1] / divisor, y = q[2] / divisor, z = q[3] / divisor;
  const V length = A::sqrt(w * w + x * x + y * y + z * z);
  const V inverse = 1 / length;
  unit.w = w * inverse;
  unit.x = x * inverse;
  unit.y = y * inverse;
  unit.z = z * inverse;
  unit.norm = length * divisor;
  return unit;
}

// Row by row.
template <typename V>
MPKERNELS_HOST_DEVICE inline void rotation_of(const UnitQuaternion<V>& q, V (&r)[9]) {
  const V x2 = q.x + q.x, y2 = q.y + q.y, z2 = q.z + q.z;
  const V xx = q.x * x2, yy = q.y * y2, zz = q.z * z2;
  const V xy = q.x * y2, xz = q.x * z2, yz = q.y * z2;
  const V wx = q.w * x2, wy = q.w * y2, wz = q.w * z2;
  r[0] = 1 - (yy + zz);
  r[1] = xy - wz;
  r[2] = xz + wy;
  r[3] = xy + wz;
  r[4] = 1 - (xx + zz);
  r[5] = yz - wx;
  r[6] = xz - wy;
  r[7] = yz + wx;
  r[8] = 1 - (xx + yy);
}

// dL/dq of the quaternion given, from g = dL/dR.
template <typename V>
MPKERNELS_HOST_DEVICE inline void rotation_gradient(const UnitQuaternion<V>& q, const V (&g)[9], V (&grad)[4]) {
  using A = Arithmetic<V>;
  const V gw = 2 * (q.x * (g[7] - g[5]) + q.y * (g[2] - g[6]) + q.z * (g[3] - g[1]));
  const V gx = 2 * (q.y * (g[1] + g[3]) + q.z * (g[2] + g[6]) + q.w * (g[7] - g[5]) - 2 * q.x * (g[4] + g[8]));
  const V gy = 2 * (q.x * (g[1] + g[3]) + q.z * (g[5] + g[7]) + q.w * (g[2] - g[6]) - 2 * q.y * (g[0] + g[8]));
  const V gz = 2 * (q.x * (g[2] + g[6]) + q.y * (g[5] + g[7]) + q.w * (g[3] - g[1]) - 2 * q.z * (g[0] + g[4]));
  const V along = q.w * gw + q.x * gx + q.y * gy + q.z * gz;  // moving along q only changes its length
  grad[0] = A::select(q.zero, V{}, (gw - q.w * along) / q.norm);
  grad[1] = A::select(q.zero, V{}, (gx - q.x * along) / q.norm);
  grad[2] = A::select(q.zero, V{}, (gy - q.y * along) / q.norm);
  grad[3] = A::select(q.zero, V{}, (gz - q.z * along) / q.norm);
}

// M = R S or R S^-1, and R; row by row.
template <bool INVERSE, typename V>
struct Stretched {
  UnitQuaternion<V> unit;
  V factor[3];  // s or 1/s
  V rotation[9];
  V m[9];
};

template <bool INVERSE, typename V>
MPKERNELS_HOST_DEVICE inline Stretched<INVERSE, V> stretched(const V (&quat)[4], const V (&scale)[3]) {
  Stretched<INVERSE, V> x;
  x.unit = normalized(quat);
  rotation_of(x.unit, x.rotation);
  for (int j = 0; j < 3; ++j) {
    x.factor[j] = INVERSE ? 1 / scale[j] : scale[j];
    for (int i = 0; i < 3; ++i) x.m[3 * i + j] = x.rotation[3 * i + j] * x.factor[j];
  }
  return x;
}

// SIZE 6: xx, xy, xz, yy, yz, zz; SIZE 9: row by row.
template <bool INVERSE, int SIZE, typename V>
MPKERNELS_HOST_DEVICE inline void covariance(const Stretched<INVERSE, V>& x, V (&covar)[SIZE]) {
  const V* m = x.m;
  V s[6];
  int k = 0;
  for (int i = 0; i < 3; ++i) {
    for (int j = i; j < 3; ++j) {
      s[k++] = m[3 * i] * m[3 * j] + m[3 * i + 1] * m[3 * j + 1] + m[3 * i + 2] * m[3 * j + 2];
    }
  }
  const int triangle[9] = {0, 1, 2, 1, 3, 4, 2, 4, 5};
  for (int i = 0; i < SIZE; ++i) covar[i] = s[SIZE == 6 ? i : triangle[i]];
}

// From g = dL/dSigma, of SIZE 6 or 9: dL/dM = (G + G^T) M.
template <bool INVERSE, int SIZE, typename V>
MPKERNELS_HOST_DEVICE inline void covariance_gradient(const Stretched<INVERSE, V>& x, const V (&g)[SIZE],
                                                      V (&of_quat)[4], V (&of_scale)[3]) {
  V both[6];  // the upper triangle of G + G^T
  if (SIZE == 6) {
    for (int i = 0; i < 6; ++i) both[i] = i == 0 || i == 3 || i == 5 ? 2 * g[i] : g[i];
  } else {
    both[0] = 2 * g[0];
    both[1] = g[1] + g[3];
    both[2] = g[2] + g[6 % SIZE];
    both[3] = 2 * g[4];
    both[4] = g[5] + g[7 % SIZE];
    both[5] = 2 * g[8 % SIZE];
  }
  const int triangle[9] = {0, 1, 2, 1, 3, 4, 2, 4, 5};
  V of_rotation[9];
  for (int j = 0; j < 3; ++j) {
    V sum = V{};
    for (int i = 0; i < 3; ++i) {
      const V of_m = both[triangle[3 * i]] * x.m[j] + both[triangle[3 * i + 1]] * x.m[3 + j] +
                     both[triangle[3 * i + 2]] * x.m[6 + j];
      of_rotation[3 * i + j] = of_m * x.factor[j];
      sum = sum + of_m * x.rotation[3 * i + j];
    }
    of_scale[j] = INVERSE ? -sum * x.factor[j] * x.factor[j] : sum;
  }
  rotation_gradient(x.unit, of_rotation, of_quat);
}

}  // namespace splatting
}  // namespace mpkernels
