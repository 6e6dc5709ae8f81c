// Covariances of Gaussians on the CPU, forward and backward. Formula: quat_scale_to_covar_math.h; shapes:
// mpkernels/splatting/quat_scale_to_covar/schema.py.
//
// Decomposition: a vector takes as many Gaussians as it has lanes, a component a register; a thread takes 4096 at a
// time. Gaussians are independent, so results do not depend on the number of threads.
//
// Bytes a Gaussian, float32: forward 28 read, 24 (3 x 3: 36) written; backward 52 (64) read, 28 written.
#include "common/parallel.h"
#include "common/tensor.h"
#include "common/vector.h"
#include "splatting/project_gaussians_interleaved.h"
#include "splatting/quat_scale_to_covar_math.h"

#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace splatting {
namespace {

constexpr int64_t gaussians_a_piece = 4096;

// Calls f with a value of the dtype's C++ type, whether the inverse is asked for, and the numbers of a covariance.
template <typename F>
void dispatch(const Tensor& quats, bool inverse, bool triu, const F& f) {
  const auto with_size = [&](auto element, auto with_inverse) {
    if (triu) {
      f(element, with_inverse, std::integral_constant<int, 6>{});
    } else {
      f(element, with_inverse, std::integral_constant<int, 9>{});
    }
  };
  const auto with_element = [&](auto element) {
    if (inverse) {
      with_size(element, std::true_type{});
    } else {
      with_size(element, std::false_type{});
    }
  };
  switch (quats.scalar_type()) {
    case ScalarType::Float:
      return with_element(float{});
    case ScalarType::Double:
      return with_element(double{});
    default:
      STD_TORCH_CHECK(false, "quat_scale_to_covar: no CPU kernel for this dtype");
  }
}

Tensor forward(const Tensor& quats, const Tensor& scales, bool inverse, bool triu) {
  const int64_t N = quats.size(0);
  Tensor covars = triu ? empty({N, 6}, quats) : empty({N, 3, 3}, quats);
  dispatch(quats, inverse, triu, [&](auto element, auto with_inverse, auto size) {
    using T = decltype(element);
    const T *q = pointer<T>(quats), *s = pointer<T>(scales);
    T* out = pointer<T>(covars);
    parallel_pieces(N, gaussians_a_piece, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n += lanes<T>) {
        Vector<T> quat[4], scale[3], covar[size];
        load_components(q + 4 * n, end - n, quat);
        load_components(s + 3 * n, end - n, scale);
        covariance(stretched<with_inverse>(quat, scale), covar);
        store_components(out + size * n, covar, end - n);
      }
    });
  });
  return covars;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& quats, const Tensor& scales, bool inverse,
                                    bool triu) {
  const int64_t N = quats.size(0);
  Tensor of_quats = empty({N, 4}, quats);
  Tensor of_scales = empty({N, 3}, quats);
  dispatch(quats, inverse, triu, [&](auto element, auto with_inverse, auto size) {
    using T = decltype(element);
    const T *g = pointer<T>(grad), *q = pointer<T>(quats), *s = pointer<T>(scales);
    T *to_quats = pointer<T>(of_quats), *to_scales = pointer<T>(of_scales);
    parallel_pieces(N, gaussians_a_piece, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n += lanes<T>) {
        Vector<T> of[size], quat[4], scale[3], of_quat[4], of_scale[3];
        load_components(g + size * n, end - n, of);
        load_components(q + 4 * n, end - n, quat);
        load_components(s + 3 * n, end - n, scale);
        covariance_gradient(stretched<with_inverse>(quat, scale), of, of_quat, of_scale);
        store_components(to_quats + 4 * n, of_quat, end - n);
        store_components(to_scales + 3 * n, of_scale, end - n);
      }
    });
  });
  return {of_quats, of_scales};
}

}  // namespace
}  // namespace splatting
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("quat_scale_to_covar", TORCH_BOX(&mpkernels::splatting::forward));
  library.impl("quat_scale_to_covar_backward", TORCH_BOX(&mpkernels::splatting::backward));
}
