// The projection of one Gaussian by one camera, and its gradient; for host and device. Formula of 3D Gaussian splatting
// (Kerbl et al. 2023; EWA splatting, Zwicker et al. 2001) with the clamp, the blur and the extents of gsplat 1.5.3:
//
//   m = W mean + t       J = [fx/z 0 -fx tx/z^2; 0 fy/z -fy ty/z^2], tx = z clamp(x/z)      (ortho: [fx 0 0; 0 fy 0])
//   A = J W (2 x 3)      cov0 = A Sigma A^T     cov = cov0 + eps2d I     conic = cov^-1     u = fx x/z + cx
//   compensation = sqrt(max(0, det cov0 / det cov))      radius_x = ceil(k sqrt(cov_xx))
//
// (gsplat takes the smaller of k sqrt(cov_xx) and k sqrt(largest eigenvalue); the first never is the larger one.)
// With Sigma = (R S)(R S)^T: T = A R S, cov0 = T T^T and det cov0 = |T_0 x T_1|^2, where nothing cancels; nor does it
// in det cov = det cov0 + eps2d (cov0_xx + cov0_yy) + eps2d^2.
//
// Clamped, -fx tx/z^2 is (cx + margin)/z on the left and (cx - width - margin)/z on the right: fx drops out.
#pragma once

#include "common/arithmetic.h"
#include "splatting/constants.h"
#include "splatting/quat_scale_to_covar_math.h"

#include <cmath>

namespace mpkernels {
namespace splatting {

// What the formula needs beside Arithmetic<V>; project_gaussians.cpp adds vectors.
template <typename V>
struct Rounding {
  static MPKERNELS_HOST_DEVICE inline V ceil(V x) { return ::ceil(x); }
  static MPKERNELS_HOST_DEVICE inline V log(V x) { return ::log(x); }
};

template <typename S>
struct ProjectionSettings {
  S width, height, near_plane, far_plane, radius_clip, eps2d;
  bool ortho, antialiased;
};

template <typename S>
struct Camera {
  S w[9];  // rotation, row by row
  S t[3];
  S fx, fy, cx, cy;
  S low_x, high_x, low_y, high_y;  // where x/z and y/z are clamped
};

// viewmat (4, 4), intrinsics (3, 3)
template <typename S>
MPKERNELS_HOST_DEVICE inline Camera<S> camera_of(const S* viewmat, const S* intrinsics,
                                                 const ProjectionSettings<S>& settings) {
  Camera<S> camera;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) camera.w[3 * i + j] = viewmat[4 * i + j];
    camera.t[i] = viewmat[4 * i + 3];
  }
  camera.fx = intrinsics[0];
  camera.fy = intrinsics[4];
  camera.cx = intrinsics[2];
  camera.cy = intrinsics[5];
  const S margin_x = clamp_margin<S> * settings.width / 2, margin_y = clamp_margin<S> * settings.height / 2;
  camera.low_x = -(camera.cx + margin_x) / camera.fx;
  camera.high_x = (settings.width - camera.cx + margin_x) / camera.fx;
  camera.low_y = -(camera.cy + margin_y) / camera.fy;
  camera.high_y = (settings.height - camera.cy + margin_y) / camera.fy;
  return camera;
}

// Rotation and scale, or (COVARS) the covariance xx, xy, xz, yy, yz, zz.
template <typename V>
struct Gaussian {
  V mean[3];
  V rotation[9];
  V scale[3];
  V covar[6];
};

template <typename V>
MPKERNELS_HOST_DEVICE inline V dot3(const V* a, const V* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}
// c = S a, for S given by its upper triangle
template <typename V>
MPKERNELS_HOST_DEVICE inline void times_symmetric(const V (&s)[6], const V* a, V* c) {
  c[0] = s[0] * a[0] + s[1] * a[1] + s[2] * a[2];
  c[1] = s[1] * a[0] + s[3] * a[1] + s[4] * a[2];
  c[2] = s[2] * a[0] + s[4] * a[1] + s[5] * a[2];
}
template <typename V>
MPKERNELS_HOST_DEVICE inline void cross(const V* a, const V* b, V* c) {
  c[0] = a[1] * b[2] - a[2] * b[1];
  c[1] = a[2] * b[0] - a[0] * b[2];
  c[2] = a[0] * b[1] - a[1] * b[0];
}

template <typename V, typename S>
MPKERNELS_HOST_DEVICE inline void to_camera(const Camera<S>& camera, const V (&mean)[3], V (&m)[3]) {
  for (int i = 0; i < 3; ++i) {
    m[i] = camera.w[3 * i] * mean[0] + camera.w[3 * i + 1] * mean[1] + camera.w[3 * i + 2] * mean[2] + camera.t[i];
  }
}

template <typename V>
struct Footprint {
  V inverse_z, ratio_x, ratio_y;                     // 1/z, x/z, y/z; ortho: 1, x, y
  typename Arithmetic<V>::Truth inside_x, inside_y;  // whether x/z and y/z are not clamped
  V j00, j02, j11, j12;
  V a[6];          // A
  V b[6];          // A R
  V t[6];          // A R S, or (COVARS) A Sigma
  V normal[3];     // T_0 x T_1
  V xx0, xy, yy0;  // cov0
  V xx, yy;        // cov
  V det0, det, compensation;
};

template <bool COVARS, typename V, typename S>
MPKERNELS_HOST_DEVICE inline Footprint<V> footprint(const Camera<S>& camera, const Gaussian<V>& gaussian,
                                                    const V (&m)[3], const ProjectionSettings<S>& settings) {
  using A = Arithmetic<V>;
  Footprint<V> f;
  if (settings.ortho) {
    f.inverse_z = V{} + 1;
    f.ratio_x = m[0];
    f.ratio_y = m[1];
    f.inside_x = f.inside_y = m[0] == m[0];
    f.j00 = V{} + camera.fx;
    f.j11 = V{} + camera.fy;
    f.j02 = f.j12 = V{};
    for (int j = 0; j < 3; ++j) {
      f.a[j] = V{} + camera.fx * camera.w[j];
      f.a[3 + j] = V{} + camera.fy * camera.w[3 + j];
    }
  } else {
    f.inverse_z = 1 / m[2];
    f.ratio_x = m[0] * f.inverse_z;
    f.ratio_y = m[1] * f.inverse_z;
    const V low_x = V{} + camera.low_x, high_x = V{} + camera.high_x;
    const V low_y = V{} + camera.low_y, high_y = V{} + camera.high_y;
    f.inside_x = (f.ratio_x >= low_x) & (f.ratio_x <= high_x);
    f.inside_y = (f.ratio_y >= low_y) & (f.ratio_y <= high_y);
    f.j00 = camera.fx * f.inverse_z;
    f.j11 = camera.fy * f.inverse_z;
    f.j02 = -f.j00 * A::minimum(A::maximum(f.ratio_x, low_x), high_x);
    f.j12 = -f.j11 * A::minimum(A::maximum(f.ratio_y, low_y), high_y);
    for (int j = 0; j < 3; ++j) {
      f.a[j] = f.j00 * camera.w[j] + f.j02 * camera.w[6 + j];
      f.a[3 + j] = f.j11 * camera.w[3 + j] + f.j12 * camera.w[6 + j];
    }
  }
  if (COVARS) {
    times_symmetric(gaussian.covar, f.a, f.t);
    times_symmetric(gaussian.covar, f.a + 3, f.t + 3);
    f.xx0 = dot3(f.a, f.t);
    f.xy = dot3(f.a, f.t + 3);
    f.yy0 = dot3(f.a + 3, f.t + 3);
    f.det0 = f.xx0 * f.yy0 - f.xy * f.xy;
  } else {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 3; ++j) {
        f.b[3 * i + j] = f.a[3 * i] * gaussian.rotation[j] + f.a[3 * i + 1] * gaussian.rotation[3 + j] +
                         f.a[3 * i + 2] * gaussian.rotation[6 + j];
        f.t[3 * i + j] = f.b[3 * i + j] * gaussian.scale[j];
      }
    }
    f.xx0 = dot3(f.t, f.t);
    f.xy = dot3(f.t, f.t + 3);
    f.yy0 = dot3(f.t + 3, f.t + 3);
    cross(f.t, f.t + 3, f.normal);
    f.det0 = dot3(f.normal, f.normal);
  }
  f.xx = f.xx0 + settings.eps2d;
  f.yy = f.yy0 + settings.eps2d;
  f.det = f.det0 + settings.eps2d * (f.xx0 + f.yy0 + settings.eps2d);
  f.compensation = A::select((f.det0 > V{}) & (f.det > V{}), A::sqrt(f.det0 / f.det), V{});
  return f;
}

template <typename V>
struct Projection {
  typename Arithmetic<V>::Truth valid;
  V radius_x, radius_y;  // whole numbers, at most 1e9
  V u, v;
  V conic[3];
};

// OPACITY: whether there is one (else `opacity` is not read).
template <bool OPACITY, typename V, typename S>
MPKERNELS_HOST_DEVICE inline Projection<V> projection(const Camera<S>& camera, const Footprint<V>& f, V depth,
                                                      V opacity, const ProjectionSettings<S>& settings) {
  using A = Arithmetic<V>;
  Projection<V> p;
  p.u = camera.fx * f.ratio_x + camera.cx;
  p.v = camera.fy * f.ratio_y + camera.cy;
  const V inverse_det = 1 / f.det;
  p.conic[0] = f.yy * inverse_det;
  p.conic[1] = -f.xy * inverse_det;
  p.conic[2] = f.xx * inverse_det;
  // 0 times a number is 0, times NaN or infinity NaN
  V finite = p.u * 0 + p.v * 0 + depth * 0 + f.xx * 0 + f.xy * 0 + f.yy * 0;
  finite = finite + p.conic[0] * 0 + p.conic[1] * 0 + p.conic[2] * 0 + f.det * 0;
  V k = V{} + extent<S>;
  p.valid = (f.det > V{}) & (V{} + camera.fx != V{}) & (V{} + camera.fy != V{});
  if (OPACITY) {
    const V drawn = settings.antialiased ? opacity * f.compensation : opacity;
    finite = finite + drawn * 0;
    const V times_least = A::maximum(V{} + 1, drawn * 255);
    k = A::minimum(A::sqrt(2 * Rounding<V>::log(times_least)), k);
    p.valid = p.valid & (drawn >= V{} + alpha_min<S>);
  }
  const V x = Rounding<V>::ceil(k * A::sqrt(f.xx)), y = Rounding<V>::ceil(k * A::sqrt(f.yy));
  p.valid = p.valid & (finite == V{}) & (depth >= V{} + settings.near_plane) & (depth <= V{} + settings.far_plane);
  p.valid = p.valid & ((x > V{} + settings.radius_clip) | (y > V{} + settings.radius_clip));
  p.valid = p.valid & (p.u + x > V{}) & (p.u - x < V{} + settings.width);
  p.valid = p.valid & (p.v + y > V{}) & (p.v - y < V{} + settings.height);
  const V most = V{} + S(1e9);
  p.radius_x = A::minimum(x, most);
  p.radius_y = A::minimum(y, most);
  return p;
}

// Gradients of what was projected.
template <typename V>
struct ProjectionGradient {
  V u, v, depth, conic[3], compensation;
};

// Sums over cameras: of the mean, and of rotation and scale, or (COVARS) of the covariance.
template <typename V>
struct GaussianGradient {
  V mean[3];
  V rotation[9];
  V scale[3];
  V covar[6];
};

// Of one camera: rotation, translation, fx, fy, cx, cy.
constexpr int camera_gradients = 16;

// Adds to `grad`; where CAMERA, also returns what this Gaussian gives to the camera. Wants finite input.
template <bool COVARS, bool CAMERA, typename V, typename S>
MPKERNELS_HOST_DEVICE inline void projection_gradient(const Camera<S>& camera, const Gaussian<V>& gaussian,
                                                      const Footprint<V>& f, const ProjectionGradient<V>& g,
                                                      const ProjectionSettings<S>& settings, GaussianGradient<V>& grad,
                                                      V (&of_camera)[camera_gradients]) {
  using A = Arithmetic<V>;
  // dL/dcov = -conic G conic, G the symmetric gradient of the conic
  const V inverse_det = 1 / A::select(f.det > V{}, f.det, V{} + 1);
  const V ka = f.yy * inverse_det, kb = -f.xy * inverse_det, kc = f.xx * inverse_det;
  const V half = g.conic[1] * S(0.5);
  const V l00 = g.conic[0] * ka + half * kb, l01 = g.conic[0] * kb + half * kc;  // G conic
  const V l10 = half * ka + g.conic[2] * kb, l11 = half * kb + g.conic[2] * kc;
  V of_xx = -(ka * l00 + kb * l10);
  V of_xy = -(ka * l01 + kb * l11);
  V of_yy = -(kb * l01 + kc * l11);
  // d compensation = compensation / 2 (cov0^-1 - cov^-1) = compensation / 2 eps2d cov^-1 cov0^-1: multiplied out,
  // nothing cancels where the blur is small. Not differentiable at det cov0 = 0; 0 there and below
  const V gain = A::select(f.compensation > V{}, settings.eps2d * g.compensation * inverse_det / f.compensation, V{});
  V of_a[6];
  if (COVARS) {
    const V gain_half = gain * inverse_det * S(0.5);
    const V both = f.xx0 + f.yy0 + settings.eps2d;
    of_xx = of_xx + gain_half * (f.yy * f.yy0 + f.xy * f.xy);
    of_xy = of_xy - gain_half * (f.xy * both);
    of_yy = of_yy + gain_half * (f.xx * f.xx0 + f.xy * f.xy);
    const V* a = f.a;
    V ga[6];  // dL/dcov A
    for (int j = 0; j < 3; ++j) {
      ga[j] = of_xx * a[j] + of_xy * a[3 + j];
      ga[3 + j] = of_xy * a[j] + of_yy * a[3 + j];
      of_a[j] = 2 * (of_xx * f.t[j] + of_xy * f.t[3 + j]);
      of_a[3 + j] = 2 * (of_xy * f.t[j] + of_yy * f.t[3 + j]);
    }
    grad.covar[0] = grad.covar[0] + a[0] * ga[0] + a[3] * ga[3];
    grad.covar[1] = grad.covar[1] + 2 * (a[0] * ga[1] + a[3] * ga[4]);
    grad.covar[2] = grad.covar[2] + 2 * (a[0] * ga[2] + a[3] * ga[5]);
    grad.covar[3] = grad.covar[3] + a[1] * ga[1] + a[4] * ga[4];
    grad.covar[4] = grad.covar[4] + 2 * (a[1] * ga[2] + a[4] * ga[5]);
    grad.covar[5] = grad.covar[5] + a[2] * ga[2] + a[5] * ga[5];
  } else {
    V turned[6];  // cov0^-1 T det cov0 = [T_1 x normal; normal x T_0]
    cross(f.t + 3, f.normal, turned);
    cross(f.normal, f.t, turned + 3);
    V of_b[6];
    for (int j = 0; j < 3; ++j) {
      const V of_t0 = 2 * (of_xx * f.t[j] + of_xy * f.t[3 + j]) + gain * (ka * turned[j] + kb * turned[3 + j]);
      const V of_t1 = 2 * (of_xy * f.t[j] + of_yy * f.t[3 + j]) + gain * (kb * turned[j] + kc * turned[3 + j]);
      grad.scale[j] = grad.scale[j] + of_t0 * f.b[j] + of_t1 * f.b[3 + j];
      of_b[j] = of_t0 * gaussian.scale[j];
      of_b[3 + j] = of_t1 * gaussian.scale[j];
    }
    for (int i = 0; i < 3; ++i) {
      of_a[i] = dot3(of_b, gaussian.rotation + 3 * i);
      of_a[3 + i] = dot3(of_b + 3, gaussian.rotation + 3 * i);
      for (int j = 0; j < 3; ++j) {
        grad.rotation[3 * i + j] = grad.rotation[3 * i + j] + f.a[i] * of_b[j] + f.a[3 + i] * of_b[3 + j];
      }
    }
  }

  V of_m[3], of_fx, of_fy, of_cx, of_cy;
  V of_j00 = V{}, of_j02 = V{}, of_j11 = V{}, of_j12 = V{};
  for (int j = 0; j < 3; ++j) {
    of_j00 = of_j00 + of_a[j] * camera.w[j];
    of_j02 = of_j02 + of_a[j] * camera.w[6 + j];
    of_j11 = of_j11 + of_a[3 + j] * camera.w[3 + j];
    of_j12 = of_j12 + of_a[3 + j] * camera.w[6 + j];
  }
  of_cx = g.u;
  of_cy = g.v;
  of_fx = g.u * f.ratio_x;
  of_fy = g.v * f.ratio_y;
  if (settings.ortho) {
    of_m[0] = g.u * camera.fx;
    of_m[1] = g.v * camera.fy;
    of_m[2] = g.depth;
    of_fx = of_fx + of_j00;
    of_fy = of_fy + of_j11;
  } else {
    // -fx x/z^2 has gradients to x, z and fx; clamped, it is (cx + constant)/z
    const V scaled_x = of_j02 * f.inverse_z, scaled_y = of_j12 * f.inverse_z;
    const V free_x = A::select(f.inside_x, scaled_x, V{}), free_y = A::select(f.inside_y, scaled_y, V{});
    of_cx = of_cx + (scaled_x - free_x);
    of_cy = of_cy + (scaled_y - free_y);
    of_fx = of_fx + of_j00 * f.inverse_z - free_x * f.ratio_x;
    of_fy = of_fy + of_j11 * f.inverse_z - free_y * f.ratio_y;
    of_m[0] = f.j00 * (g.u - free_x);
    of_m[1] = f.j11 * (g.v - free_y);
    of_m[2] = g.depth - f.ratio_x * of_m[0] - f.ratio_y * of_m[1] -
              f.inverse_z * (f.j00 * of_j00 + f.j11 * of_j11 + f.j02 * of_j02 + f.j12 * of_j12);
  }
  for (int j = 0; j < 3; ++j) {
    grad.mean[j] = grad.mean[j] + of_m[0] * camera.w[j] + of_m[1] * camera.w[3 + j] + of_m[2] * camera.w[6 + j];
  }
  if (CAMERA) {
    for (int j = 0; j < 3; ++j) {
      of_camera[j] = of_m[0] * gaussian.mean[j] + f.j00 * of_a[j];
      of_camera[3 + j] = of_m[1] * gaussian.mean[j] + f.j11 * of_a[3 + j];
      of_camera[6 + j] = of_m[2] * gaussian.mean[j] + f.j02 * of_a[j] + f.j12 * of_a[3 + j];
      of_camera[9 + j] = of_m[j];
    }
    of_camera[12] = of_fx;
    of_camera[13] = of_fy;
    of_camera[14] = of_cx;
    of_camera[15] = of_cy;
  }
}

}  // namespace splatting
}  // namespace mpkernels
