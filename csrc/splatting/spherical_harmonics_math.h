// The formulas of one direction of spherical harmonics, for host and device: V is a number, or a vector of them.
//
// Y_l^m(x, y, z) = Q_l^m(z) Re (x + i y)^m for m >= 0, and Q_l^|m|(z) Im (x + i y)^|m| for m < 0, with polynomials Q
// that hold the normalisation sqrt((2 l + 1) / (4 pi) (l - m)! / (l + m)!), the sqrt(2) of m != 0, and the sign (-1)^m
// (Sloan 2013, "Efficient spherical harmonic evaluation"). Term k = l^2 + l + m. With weights w_k the derivative of
// sum_k w_k Y_k follows from d Re (x + i y)^m = m (Re (x + i y)^(m - 1) dx - Im (x + i y)^(m - 1) dy), and Im alike.
#pragma once

#include "common/arithmetic.h"

namespace mpkernels {
namespace spherical_harmonics {

constexpr int degree_max = 4;

template <int degree>
constexpr int terms = (degree + 1) * (degree + 1);

// A direction and its unit vector, which is 0 where the direction is zero or not finite.
template <typename V>
struct Direction {
  V x, y, z;
  V scale;   // the largest component: dividing by it first, no square overflows or vanishes
  V length;  // of the direction over its scale
  typename Arithmetic<V>::Truth usable;
};

template <typename V>
MPKERNELS_HOST_DEVICE inline Direction<V> direction(V x, V y, V z) {
  using A = Arithmetic<V>;
  const V zero{};
  const V one = zero + typename A::Scalar(1);
  Direction<V> d;
  d.scale = A::maximum(A::maximum(A::maximum(x, -x), A::maximum(y, -y)), A::maximum(z, -z));
  d.usable = A::finite(x) & A::finite(y) & A::finite(z) & (d.scale > zero);
  d.scale = A::select(d.usable, d.scale, one);
  x = A::select(d.usable, x, zero) / d.scale;
  y = A::select(d.usable, y, zero) / d.scale;
  z = A::select(d.usable, z, zero) / d.scale;
  d.length = A::select(d.usable, A::sqrt(x * x + y * y + z * z), one);
  d.x = x / d.length;
  d.y = y / d.length;
  d.z = z / d.length;
  return d;
}

// The polynomials Q_l^m, and their derivatives.
template <typename V>
struct Zonal {
  using S = typename Arithmetic<V>::Scalar;
  static constexpr S q00 = S(0.28209479177387814347);
  static constexpr S q10 = S(0.48860251190291992159), q11 = -q10;
  static constexpr S q20 = S(-0.31539156525252000603), q20zz = S(0.94617469575756001809);
  static constexpr S q21z = S(-1.09254843059207907054), q22 = S(0.54627421529603953527);
  static constexpr S q30z = S(-1.11952899777034617423), q30zzz = S(1.86588166295057695707);
  static constexpr S q31 = S(0.45704579946446573615), q31zz = S(-2.28522899732232868075);
  static constexpr S q32z = S(1.44530572132027702769), q33 = S(-0.59004358992664351034);
  static constexpr S q40 = S(0.31735664074561291140), q40zz = S(-3.17356640745612911400);
  static constexpr S q40zzzz = S(3.70249414203215063309);
  static constexpr S q41z = S(2.00713963067186750385), q41zzz = S(-4.68332580490102417566);
  static constexpr S q42 = S(-0.47308734787878000905), q42zz = S(3.31161143515146006332);
  static constexpr S q43z = S(-1.77013076977993053104), q44 = S(0.62583573544917613459);
};

// Y_k of a unit direction, into b[0 .. terms).
template <int degree, typename V>
MPKERNELS_HOST_DEVICE inline void basis(V x, V y, V z, V* b) {
  using Z = Zonal<V>;
  b[0] = V{} + Z::q00;
  if constexpr (degree >= 1) {
    b[1] = y * Z::q11;
    b[2] = z * Z::q10;
    b[3] = x * Z::q11;
  }
  if constexpr (degree >= 2) {
    const V zz = z * z;
    const V re2 = x * x - y * y, im2 = 2 * x * y;
    const V q21 = z * Z::q21z;
    b[4] = im2 * Z::q22;
    b[5] = y * q21;
    b[6] = zz * Z::q20zz + Z::q20;
    b[7] = x * q21;
    b[8] = re2 * Z::q22;
    if constexpr (degree >= 3) {
      const V re3 = x * re2 - y * im2, im3 = y * re2 + x * im2;
      const V q31 = zz * Z::q31zz + Z::q31, q32 = z * Z::q32z;
      b[9] = im3 * Z::q33;
      b[10] = im2 * q32;
      b[11] = y * q31;
      b[12] = z * (zz * Z::q30zzz + Z::q30z);
      b[13] = x * q31;
      b[14] = re2 * q32;
      b[15] = re3 * Z::q33;
      if constexpr (degree >= 4) {
        const V re4 = x * re3 - y * im3, im4 = y * re3 + x * im3;
        const V q41 = z * (zz * Z::q41zzz + Z::q41z), q42 = zz * Z::q42zz + Z::q42, q43 = z * Z::q43z;
        b[16] = im4 * Z::q44;
        b[17] = im3 * q43;
        b[18] = im2 * q42;
        b[19] = y * q41;
        b[20] = zz * (zz * Z::q40zzzz + Z::q40zz) + Z::q40;
        b[21] = x * q41;
        b[22] = re2 * q42;
        b[23] = re3 * q43;
        b[24] = re4 * Z::q44;
      }
    }
  }
}

template <typename V>
struct Gradient {
  V x, y, z;
};

// The derivative of sum_k w(k) Y_k at a unit direction, as that of a polynomial of x, y and z.
template <int degree, typename V, typename W>
MPKERNELS_HOST_DEVICE inline Gradient<V> basis_gradient(V x, V y, V z, const W& w) {
  using Z = Zonal<V>;
  Gradient<V> g{V{}, V{}, V{}};
  if constexpr (degree >= 1) {
    // by order: `re` and `im` are the weights of Re and Im (x + i y)^m, re_z and im_z their derivatives to z
    V re1 = w(3) * Z::q11, im1 = w(1) * Z::q11;
    g.z = w(2) * Z::q10;
    if constexpr (degree >= 2) {
      const V zz = z * z;
      const V x2 = x * x - y * y, y2 = 2 * x * y;  // Re and Im (x + i y)^2
      const V w5 = w(5), w7 = w(7);
      re1 += w7 * (z * Z::q21z);
      im1 += w5 * (z * Z::q21z);
      V re1_z = w7 * Z::q21z, im1_z = w5 * Z::q21z;
      V re2 = w(8) * Z::q22, im2 = w(4) * Z::q22;
      g.z += w(6) * (z * (2 * Z::q20zz));
      if constexpr (degree >= 3) {
        const V x3 = x * x2 - y * y2, y3 = y * x2 + x * y2;
        const V w10 = w(10), w11 = w(11), w13 = w(13), w14 = w(14);
        g.z += w(12) * (zz * (3 * Z::q30zzz) + Z::q30z);
        const V q31 = zz * Z::q31zz + Z::q31, q31_z = z * (2 * Z::q31zz);
        re1 += w13 * q31;
        im1 += w11 * q31;
        re1_z += w13 * q31_z;
        im1_z += w11 * q31_z;
        re2 += w14 * (z * Z::q32z);
        im2 += w10 * (z * Z::q32z);
        V re2_z = w14 * Z::q32z, im2_z = w10 * Z::q32z;
        V re3 = w(15) * Z::q33, im3 = w(9) * Z::q33;
        if constexpr (degree >= 4) {
          const V w17 = w(17), w18 = w(18), w19 = w(19), w21 = w(21), w22 = w(22), w23 = w(23);
          g.z += w(20) * (z * (zz * (4 * Z::q40zzzz) + 2 * Z::q40zz));
          const V q41 = z * (zz * Z::q41zzz + Z::q41z), q41_z = zz * (3 * Z::q41zzz) + Z::q41z;
          re1 += w21 * q41;
          im1 += w19 * q41;
          re1_z += w21 * q41_z;
          im1_z += w19 * q41_z;
          const V q42 = zz * Z::q42zz + Z::q42, q42_z = z * (2 * Z::q42zz);
          re2 += w22 * q42;
          im2 += w18 * q42;
          re2_z += w22 * q42_z;
          im2_z += w18 * q42_z;
          re3 += w23 * (z * Z::q43z);
          im3 += w17 * (z * Z::q43z);
          g.z += x3 * (w23 * Z::q43z) + y3 * (w17 * Z::q43z);
          const V re4 = w(24) * Z::q44, im4 = w(16) * Z::q44;
          g.x += 4 * (x3 * re4 + y3 * im4);
          g.y += 4 * (x3 * im4 - y3 * re4);
        }
        g.x += 3 * (x2 * re3 + y2 * im3);
        g.y += 3 * (x2 * im3 - y2 * re3);
        g.z += x2 * re2_z + y2 * im2_z;
      }
      g.x += 2 * (x * re2 + y * im2);
      g.y += 2 * (x * im2 - y * re2);
      g.z += x * re1_z + y * im1_z;
    }
    g.x += re1;
    g.y += im1;
  }
  return g;
}

// From the gradient to a unit direction, that to the direction it was made of: without its part along the direction,
// which changes the length alone.
template <typename V>
MPKERNELS_HOST_DEVICE inline Gradient<V> through_length(const Direction<V>& d, const Gradient<V>& g) {
  using A = Arithmetic<V>;
  const V along = g.x * d.x + g.y * d.y + g.z * d.z;
  return {A::select(d.usable, (g.x - along * d.x) / d.length / d.scale, V{}),
          A::select(d.usable, (g.y - along * d.y) / d.length / d.scale, V{}),
          A::select(d.usable, (g.z - along * d.z) / d.length / d.scale, V{})};
}

}  // namespace spherical_harmonics
}  // namespace mpkernels
