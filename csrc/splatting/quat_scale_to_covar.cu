// The launcher of the CUDA kernels for covariances of Gaussians: registers mpkernels::quat_scale_to_covar and its
// backward for CUDA tensors. Compiled as C++ it registers the same launcher for mpkernels_fibres, on CPU tensors.
// Arguments: mpkernels/splatting/quat_scale_to_covar/schema.py.
#include "common/device.h"
#include "splatting/quat_scale_to_covar.cuh"

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace splatting {
namespace {

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
      STD_TORCH_CHECK(false, "quat_scale_to_covar: no CUDA kernel for this dtype");
  }
}

// Threads take further Gaussians in turn.
unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(std::min<int64_t>((count + covar_threads - 1) / covar_threads, 1 << 16));
}

Tensor forward(const Tensor& quats, const Tensor& scales, bool inverse, bool triu) {
  const Device device(quats);
  const int64_t N = quats.size(0);
  Tensor covars = triu ? empty({N, 6}, quats) : empty({N, 3, 3}, quats);
  if (N == 0) return covars;
  dispatch(quats, inverse, triu, [&](auto element, auto with_inverse, auto size) {
    using T = decltype(element);
    MPKERNELS_LAUNCH((quat_scale_to_covar_kernel<T, with_inverse, size>), blocks_for(N), covar_threads, 0,
                     device.stream(), pointer<T>(quats), pointer<T>(scales), pointer<T>(covars), N);
  });
  return covars;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& quats, const Tensor& scales, bool inverse,
                                    bool triu) {
  const Device device(quats);
  const int64_t N = quats.size(0);
  Tensor of_quats = empty({N, 4}, quats);
  Tensor of_scales = empty({N, 3}, quats);
  if (N == 0) return {of_quats, of_scales};
  dispatch(quats, inverse, triu, [&](auto element, auto with_inverse, auto size) {
    using T = decltype(element);
    MPKERNELS_LAUNCH((quat_scale_to_covar_backward_kernel<T, with_inverse, size>), blocks_for(N), covar_threads, 0,
                     device.stream(), pointer<T>(grad), pointer<T>(quats), pointer<T>(scales), pointer<T>(of_quats),
                     pointer<T>(of_scales), N);
  });
  return {of_quats, of_scales};
}

}  // namespace
}  // namespace splatting
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("quat_scale_to_covar", TORCH_BOX(&mpkernels::splatting::forward));
  library.impl("quat_scale_to_covar_backward", TORCH_BOX(&mpkernels::splatting::backward));
}
