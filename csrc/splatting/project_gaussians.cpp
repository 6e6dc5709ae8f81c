// The projection of Gaussians on the CPU, forward and backward. Formula: project_gaussians_math.h; shapes:
// mpkernels/splatting/project_gaussians/schema.py.
//
// Decomposition: a vector takes as many Gaussians as it has lanes, a component a register, and goes through all cameras
// with them, so that the rotation is made once and gradients are summed over cameras in registers. A thread takes 1024
// Gaussians at a time; a vector that lies in front of or behind the view altogether goes no further than its depth. The
// backward makes the forward again rather than read it. Gradients of cameras: a sum in each lane over the thread's 1024
// Gaussians, then over the lanes, then over the pieces in order, in double precision; no sum depends on the number of
// threads.
//
// Bytes a Gaussian, float32, one camera: forward 40 read and 36 written; backward 76 read and 40 written.
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "common/vector.h"
#include "splatting/project_gaussians_interleaved.h"
#include "splatting/project_gaussians_math.h"

#include <memory>
#include <tuple>

namespace mpkernels {
namespace splatting {

// log x of x >= 1 by halving the exponent out and the series of 2 atanh((m - 1) / (m + 1)); double: an element at a
// time
template <typename T>
MPKERNELS_INLINE Vector<T> vector_log(Vector<T> x) {
  if constexpr (sizeof(T) == 4) {
    // x = 2^e m with m in [sqrt(1/2), sqrt(2))
    constexpr int32_t bits_of_sqrt_half = 0x3f3504f3;
    const Mask<T> bits = reinterpret_cast<Mask<T>>(x) - bits_of_sqrt_half;
    const Vector<T> e = __builtin_convertvector(bits >> 23, Vector<T>);
    const Vector<T> m = reinterpret_cast<Vector<T>>((bits & 0x7fffff) + bits_of_sqrt_half);
    const Vector<T> s = (m - 1) / (m + 1), s2 = s * s;  // |s| < 0.172
    const Vector<T> series = s2 * (T(2.0 / 3) + s2 * (T(2.0 / 5) + s2 * (T(2.0 / 7) + s2 * T(2.0 / 9))));
    return e * T(0.69314718055994530942) + (2 * s + s * series);
  } else {
    for (int i = 0; i < lanes<T>; ++i) x[i] = std::log(x[i]);
    return x;
  }
}

template <typename T>
struct VectorRounding {
  static MPKERNELS_INLINE Vector<T> ceil(Vector<T> x) {
    for (int i = 0; i < lanes<T>; ++i) x[i] = std::ceil(x[i]);
    return x;
  }
  static MPKERNELS_INLINE Vector<T> log(Vector<T> x) { return vector_log<T>(x); }
};
template <>
struct Rounding<Vector<float>> : VectorRounding<float> {};
template <>
struct Rounding<Vector<double>> : VectorRounding<double> {};

namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t gaussians_a_piece = 1024;

template <typename T>
struct Input {
  const T* means;
  const T* quats;
  const T* scales;
  const T* covars;     // null where quats and scales are given
  const T* opacities;  // may be null
  const T* viewmats;
  const T* intrinsics;
  int64_t batches, cameras, gaussians;
  ProjectionSettings<T> settings;

  int64_t pieces() const { return (gaussians + gaussians_a_piece - 1) / gaussians_a_piece; }
};

template <typename T>
Input<T> input_of(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                  const OptionalTensor& covars, const Tensor& viewmats, const Tensor& Ks) {
  Input<T> in{};
  in.means = pointer<T>(means);
  in.quats = pointer<T>(quats);
  in.scales = pointer<T>(scales);
  in.covars = pointer<T>(covars);
  in.viewmats = pointer<T>(viewmats);
  in.intrinsics = pointer<T>(Ks);
  in.batches = means.size(0);
  in.gaussians = means.size(1);
  in.cameras = viewmats.size(1);
  return in;
}

// The cameras of a batch; kept by the thread.
template <typename T>
const Camera<T>* cameras_of(const Input<T>& in, int64_t batch) {
  thread_local std::unique_ptr<Camera<T>[]> memory;
  thread_local int64_t capacity = 0;
  if (in.cameras > capacity) {
    memory.reset(new Camera<T>[static_cast<size_t>(in.cameras)]);
    capacity = in.cameras;
  }
  for (int64_t c = 0; c < in.cameras; ++c) {
    const int64_t at = batch * in.cameras + c;
    memory[c] = camera_of(in.viewmats + 16 * at, in.intrinsics + 9 * at, in.settings);
  }
  return memory.get();
}

// `count` Gaussians from number `at` of all batches; their quaternions stay with the caller, for their gradient.
template <bool COVARS, typename T>
MPKERNELS_INLINE void load_gaussians(const Input<T>& in, int64_t at, int64_t count, Gaussian<Vector<T>>& g,
                                     UnitQuaternion<Vector<T>>& unit) {
  load_components(in.means + 3 * at, count, g.mean);
  if constexpr (COVARS) {
    load_components(in.covars + 6 * at, count, g.covar);
  } else {
    Vector<T> q[4];
    load_components(in.quats + 4 * at, count, q);
    load_components(in.scales + 3 * at, count, g.scale);
    unit = normalized(q);
    rotation_of(unit, g.rotation);
  }
}

template <typename T>
struct Output {
  int32_t* radii;
  T* means2d;
  T* depths;
  T* conics;
  T* compensations;
};

template <typename T>
MPKERNELS_INLINE void store_radii(int32_t* to, Vector<T> x, Vector<T> y, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    const Vector<T> whole[2] = {reinterpret_cast<Vector<T>>(__builtin_convertvector(x, Mask<T>)),
                                reinterpret_cast<Vector<T>>(__builtin_convertvector(y, Mask<T>))};
    store_components(reinterpret_cast<T*>(to), whole, count);
  } else {
    for (int64_t i = 0; i < std::min<int64_t>(count, lanes<T>); ++i) {
      to[2 * i] = static_cast<int32_t>(x[i]);
      to[2 * i + 1] = static_cast<int32_t>(y[i]);
    }
  }
}

// Lanes with a radius: those that were not culled.
template <typename T>
MPKERNELS_INLINE Mask<T> load_drawn(const int32_t* radii, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    Vector<T> whole[2];
    load_components(reinterpret_cast<const T*>(radii), count, whole);
    return (reinterpret_cast<Mask<T>>(whole[0]) | reinterpret_cast<Mask<T>>(whole[1])) != 0;
  } else {
    Mask<T> drawn{};
    for (int64_t i = 0; i < std::min<int64_t>(count, lanes<T>); ++i) {
      drawn[i] = (radii[2 * i] | radii[2 * i + 1]) != 0 ? -1 : 0;
    }
    return drawn;
  }
}

template <bool COVARS, bool OPACITY, typename T>
void project_piece(const Input<T>& in, int64_t batch, int64_t begin, int64_t end, const Output<T>& out) {
  using V = Vector<T>;
  using A = Arithmetic<V>;
  constexpr int L = lanes<T>;
  const Camera<T>* cameras = cameras_of(in, batch);
  for (int64_t n = begin; n < end; n += L) {
    const int64_t count = std::min<int64_t>(L, end - n);
    Gaussian<V> gaussian;
    UnitQuaternion<V> unit;
    load_gaussians<COVARS>(in, batch * in.gaussians + n, count, gaussian, unit);
    V opacity{};
    if constexpr (OPACITY) opacity = load_first<T>(in.opacities + batch * in.gaussians + n, count);
    for (int64_t c = 0; c < in.cameras; ++c) {
      const int64_t to = (batch * in.cameras + c) * in.gaussians + n;
      V m[3];
      to_camera(cameras[c], gaussian.mean, m);
      V radius_x{}, radius_y{}, mean2d[2] = {}, depth{}, conic[3] = {}, compensation{};
      if (any<T>((m[2] >= broadcast<T>(in.settings.near_plane)) & (m[2] <= broadcast<T>(in.settings.far_plane)))) {
        const Footprint<V> f = footprint<COVARS>(cameras[c], gaussian, m, in.settings);
        const Projection<V> p = projection<OPACITY>(cameras[c], f, m[2], opacity, in.settings);
        radius_x = A::select(p.valid, p.radius_x, radius_x);
        radius_y = A::select(p.valid, p.radius_y, radius_y);
        mean2d[0] = A::select(p.valid, p.u, mean2d[0]);
        mean2d[1] = A::select(p.valid, p.v, mean2d[1]);
        depth = A::select(p.valid, m[2], depth);
        for (int i = 0; i < 3; ++i) conic[i] = A::select(p.valid, p.conic[i], conic[i]);
        compensation = A::select(p.valid, f.compensation, compensation);
      }
      store_radii<T>(out.radii + 2 * to, radius_x, radius_y, count);
      store_components(out.means2d + 2 * to, mean2d, count);
      store_first<T>(out.depths + to, depth, count);
      store_components(out.conics + 3 * to, conic, count);
      store_first<T>(out.compensations + to, compensation, count);
    }
  }
}

// Gradients of the outputs (null where there is none), and of the inputs (null where not needed).
template <typename T>
struct Gradients {
  const T* means2d;
  const T* depths;
  const T* conics;
  const T* compensations;
  const int32_t* radii;
  T* of_means;
  T* of_quats;
  T* of_scales;
  T* of_covars;
  T* of_cameras;  // (B, pieces, C, 16), or null
};

template <bool COVARS, bool CAMERA, typename T>
void differentiate_piece(const Input<T>& in, int64_t batch, int64_t piece, int64_t begin, int64_t end,
                         const Gradients<T>& g) {
  using V = Vector<T>;
  using A = Arithmetic<V>;
  constexpr int L = lanes<T>;
  const Camera<T>* cameras = cameras_of(in, batch);
  T* sums = nullptr;  // (C, 16, L)
  if constexpr (CAMERA) {
    sums = scratch<T>(in.cameras * camera_gradients * L);
    std::memset(sums, 0, sizeof(T) * static_cast<size_t>(in.cameras * camera_gradients * L));
  }
  for (int64_t n = begin; n < end; n += L) {
    const int64_t count = std::min<int64_t>(L, end - n);
    const int64_t at = batch * in.gaussians + n;
    Gaussian<V> gaussian;
    UnitQuaternion<V> unit;
    load_gaussians<COVARS>(in, at, count, gaussian, unit);
    GaussianGradient<V> sum{};
    Mask<T> ever{};
    for (int64_t c = 0; c < in.cameras; ++c) {
      const int64_t from = (batch * in.cameras + c) * in.gaussians + n;
      const Mask<T> drawn = load_drawn<T>(g.radii + 2 * from, count);
      if (!any<T>(drawn)) continue;
      ever |= drawn;
      V m[3];
      to_camera(cameras[c], gaussian.mean, m);
      ProjectionGradient<V> of{};
      if (g.means2d != nullptr) {
        V of_mean2d[2];
        load_components(g.means2d + 2 * from, count, of_mean2d);
        of.u = of_mean2d[0];
        of.v = of_mean2d[1];
      }
      if (g.depths != nullptr) of.depth = load_first<T>(g.depths + from, count);
      if (g.conics != nullptr) load_components(g.conics + 3 * from, count, of.conic);
      if (g.compensations != nullptr) of.compensation = load_first<T>(g.compensations + from, count);
      V of_camera[camera_gradients];
      const auto add = [&](const Gaussian<V>& these) {
        const Footprint<V> f = footprint<COVARS>(cameras[c], these, m, in.settings);
        projection_gradient<COVARS, CAMERA>(cameras[c], these, f, of, in.settings, sum, of_camera);
      };
      if (__builtin_expect(any<T>(~drawn), 0)) {
        // culled lanes go on as a point in front of the camera that nothing depends on
        Gaussian<V> safe = gaussian;
        const auto keep = [&](V& x, T otherwise) { x = A::select(drawn, x, broadcast<T>(otherwise)); };
        for (V& x : safe.mean) keep(x, 0);
        for (V& x : safe.rotation) keep(x, 0);
        for (V& x : safe.scale) keep(x, 0);
        for (V& x : safe.covar) keep(x, 0);
        for (int i = 0; i < 3; ++i) keep(m[i], i == 2 ? 1 : 0);
        for (V& x : of.conic) keep(x, 0);
        keep(of.u, 0);
        keep(of.v, 0);
        keep(of.depth, 0);
        keep(of.compensation, 0);
        add(safe);
      } else {
        add(gaussian);
      }
      if constexpr (CAMERA) {
        T* these = sums + c * camera_gradients * L;
        for (int i = 0; i < camera_gradients; ++i) store<T>(these + i * L, load<T>(these + i * L) + of_camera[i]);
      }
    }
    if (g.of_means == nullptr) continue;
    V of_quat[4] = {};
    if constexpr (!COVARS) rotation_gradient(unit, sum.rotation, of_quat);
    if (any<T>(~ever)) {
      for (V& x : of_quat) x = A::select(ever, x, V{});  // the rest is 0 already
    }
    store_components(g.of_means + 3 * at, sum.mean, count);
    if constexpr (COVARS) {
      store_components(g.of_covars + 6 * at, sum.covar, count);
    } else {
      store_components(g.of_quats + 4 * at, of_quat, count);
      store_components(g.of_scales + 3 * at, sum.scale, count);
    }
  }
  if constexpr (CAMERA) {
    T* to = g.of_cameras + (batch * in.pieces() + piece) * in.cameras * camera_gradients;
    for (int64_t i = 0; i < in.cameras * camera_gradients; ++i) to[i] = mpkernels::sum<T>(load<T>(sums + i * L));
  }
}

// body(batch, piece, begin, end) for pieces of Gaussians, by all threads.
template <typename T, typename Body>
void for_pieces(const Input<T>& in, const Body& body) {
  const int64_t pieces = in.pieces();
  parallel_pieces(in.batches * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % pieces * gaussians_a_piece;
      body(i / pieces, i % pieces, begin, std::min(in.gaussians, begin + gaussians_a_piece));
    }
  });
}

// Sums the pieces, in order, into gradients of viewmats (B, C, 4, 4) and Ks (B, C, 3, 3).
template <typename T>
void sum_cameras(const Input<T>& in, const T* pieces, T* of_viewmats, T* of_intrinsics) {
  for (int64_t batch = 0; batch < in.batches; ++batch) {
    for (int64_t c = 0; c < in.cameras; ++c) {
      double total[camera_gradients] = {};
      for (int64_t piece = 0; piece < in.pieces(); ++piece) {
        const T* these = pieces + ((batch * in.pieces() + piece) * in.cameras + c) * camera_gradients;
        for (int i = 0; i < camera_gradients; ++i) total[i] += these[i];
      }
      T* view = of_viewmats + 16 * (batch * in.cameras + c);
      T* k = of_intrinsics + 9 * (batch * in.cameras + c);
      std::memset(view, 0, 16 * sizeof(T));
      std::memset(k, 0, 9 * sizeof(T));
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) view[4 * i + j] = static_cast<T>(total[3 * i + j]);
        view[4 * i + 3] = static_cast<T>(total[9 + i]);
      }
      k[0] = static_cast<T>(total[12]);
      k[4] = static_cast<T>(total[13]);
      k[2] = static_cast<T>(total[14]);
      k[5] = static_cast<T>(total[15]);
    }
  }
}

template <typename F>
void dispatch(const Tensor& means, const F& f) {
  switch (means.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, "project_gaussians: no CPU kernel for this dtype");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& means, const OptionalTensor& quats,
                                                           const OptionalTensor& scales, const OptionalTensor& covars,
                                                           const OptionalTensor& opacities, const Tensor& viewmats,
                                                           const Tensor& Ks, int64_t width, int64_t height,
                                                           double near_plane, double far_plane, double radius_clip,
                                                           double eps2d, bool ortho, bool antialiased) {
  const int64_t B = means.size(0), N = means.size(1), C = viewmats.size(1);
  Tensor radii = empty({B, C, N, 2}, means, ScalarType::Int);
  Tensor means2d = empty({B, C, N, 2}, means);
  Tensor depths = empty({B, C, N}, means);
  Tensor conics = empty({B, C, N, 3}, means);
  Tensor compensations = empty({B, C, N}, means);
  dispatch(means, [&](auto element) {
    using T = decltype(element);
    Input<T> in = input_of<T>(means, quats, scales, covars, viewmats, Ks);
    in.opacities = pointer<T>(opacities);
    in.settings = {static_cast<T>(width),
                   static_cast<T>(height),
                   static_cast<T>(near_plane),
                   static_cast<T>(far_plane),
                   static_cast<T>(radius_clip),
                   static_cast<T>(eps2d),
                   ortho,
                   antialiased};
    const Output<T> out{pointer<int32_t>(radii), pointer<T>(means2d), pointer<T>(depths), pointer<T>(conics),
                        pointer<T>(compensations)};
    for_pieces(in, [&](int64_t batch, int64_t, int64_t begin, int64_t end) {
      if (in.covars != nullptr) {
        if (in.opacities != nullptr) {
          project_piece<true, true>(in, batch, begin, end, out);
        } else {
          project_piece<true, false>(in, batch, begin, end, out);
        }
      } else if (in.opacities != nullptr) {
        project_piece<false, true>(in, batch, begin, end, out);
      } else {
        project_piece<false, false>(in, batch, begin, end, out);
      }
    });
  });
  return {radii, means2d, depths, conics, compensations};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_means2d, const OptionalTensor& grad_depths, const OptionalTensor& grad_conics,
    const OptionalTensor& grad_compensations, const Tensor& radii, const Tensor& means, const OptionalTensor& quats,
    const OptionalTensor& scales, const OptionalTensor& covars, const Tensor& viewmats, const Tensor& Ks, int64_t width,
    int64_t height, double eps2d, bool ortho, bool needs_gaussians, bool needs_cameras) {
  const int64_t B = means.size(0), N = means.size(1), C = viewmats.size(1);
  const bool with_covars = covars.has_value();
  const auto rows = [&](bool needed, int64_t size) { return needed ? empty({B, N, size}, means) : no_gradient(means); };
  Tensor of_means = rows(needs_gaussians, 3);
  Tensor of_quats = rows(needs_gaussians && !with_covars, 4);
  Tensor of_scales = rows(needs_gaussians && !with_covars, 3);
  Tensor of_covars = rows(needs_gaussians && with_covars, 6);
  Tensor of_viewmats = needs_cameras ? empty({B, C, 4, 4}, means) : no_gradient(means);
  Tensor of_Ks = needs_cameras ? empty({B, C, 3, 3}, means) : no_gradient(means);
  dispatch(means, [&](auto element) {
    using T = decltype(element);
    Input<T> in = input_of<T>(means, quats, scales, covars, viewmats, Ks);
    in.settings.width = static_cast<T>(width);
    in.settings.height = static_cast<T>(height);
    in.settings.eps2d = static_cast<T>(eps2d);
    in.settings.ortho = ortho;
    std::optional<Tensor> pieces;
    if (needs_cameras) pieces = empty({B, in.pieces(), C, camera_gradients}, means);
    const Gradients<T> g{pointer<T>(grad_means2d), pointer<T>(grad_depths),
                         pointer<T>(grad_conics),  pointer<T>(grad_compensations),
                         pointer<int32_t>(radii),  needs_gaussians ? pointer<T>(of_means) : nullptr,
                         pointer<T>(of_quats),     pointer<T>(of_scales),
                         pointer<T>(of_covars),    pointer<T>(pieces)};
    for_pieces(in, [&](int64_t batch, int64_t piece, int64_t begin, int64_t end) {
      if (with_covars) {
        if (needs_cameras) {
          differentiate_piece<true, true>(in, batch, piece, begin, end, g);
        } else {
          differentiate_piece<true, false>(in, batch, piece, begin, end, g);
        }
      } else if (needs_cameras) {
        differentiate_piece<false, true>(in, batch, piece, begin, end, g);
      } else {
        differentiate_piece<false, false>(in, batch, piece, begin, end, g);
      }
    });
    if (needs_cameras) sum_cameras(in, g.of_cameras, pointer<T>(of_viewmats), pointer<T>(of_Ks));
  });
  return {of_means, of_quats, of_scales, of_covars, of_viewmats, of_Ks};
}

}  // namespace
}  // namespace splatting
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("project_gaussians", TORCH_BOX(&mpkernels::splatting::forward));
  library.impl("project_gaussians_backward", TORCH_BOX(&mpkernels::splatting::backward));
}
