// The launcher of spherical harmonics: for mpkernels on CUDA tensors, or, compiled as C++, for mpkernels_fibres on the
// CPU. Arguments: mpkernels/splatting/spherical_harmonics/schema.py.
#include "common/device.h"
#include "splatting/spherical_harmonics.cuh"

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace spherical_harmonics {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <typename T>
Problem<T> problem_of(const Tensor& dirs, const Tensor& coeffs, const OptionalTensor& masks) {
  return {pointer<T>(dirs), pointer<T>(coeffs), pointer<bool>(masks), dirs.size(0),
          dirs.size(1),     dirs.size(2),       coeffs.size(2)};
}

// Blocks of Gaussians; and how many are launched, which take further ones in turn.
template <typename T>
int64_t blocks_of(const Problem<T>& in) {
  return in.batches * ((in.gaussians + threads_per_block<T> - 1) / threads_per_block<T>);
}
unsigned launched(int64_t blocks) {
  constexpr int64_t most = 1 << 16;
  return static_cast<unsigned>(std::min(blocks, most));
}

// Calls f with a value of the dtype's C++ type and the degree as a constant.
template <typename F>
void dispatch(const Tensor& dirs, int64_t degree, const F& f) {
  const auto with_degree = [&](auto element) {
    switch (degree) {
      case 0:
        return f(element, std::integral_constant<int, 0>{});
      case 1:
        return f(element, std::integral_constant<int, 1>{});
      case 2:
        return f(element, std::integral_constant<int, 2>{});
      case 3:
        return f(element, std::integral_constant<int, 3>{});
      case 4:
        return f(element, std::integral_constant<int, 4>{});
      default:
        STD_TORCH_CHECK(false, "spherical_harmonics: no CUDA kernel for this degree");
    }
  };
  switch (dirs.scalar_type()) {
    case ScalarType::Float:
      return with_degree(float{});
    case ScalarType::Double:
      return with_degree(double{});
    default:
      STD_TORCH_CHECK(false, "spherical_harmonics: no CUDA kernel for this dtype");
  }
}

Tensor forward(int64_t degree, const Tensor& dirs, const Tensor& coeffs, const OptionalTensor& masks) {
  const Device device(dirs);
  Tensor colors = empty({dirs.size(0), dirs.size(1), dirs.size(2), 3}, dirs);
  dispatch(dirs, degree, [&](auto element, auto compiled_degree) {
    using T = decltype(element);
    constexpr int D = compiled_degree;
    const Problem<T> in = problem_of<T>(dirs, coeffs, masks);
    const int64_t blocks = in.cameras == 0 ? 0 : blocks_of(in);
    if (blocks == 0) return;
    MPKERNELS_LAUNCH((forward_kernel<T, D>), launched(blocks), threads_per_block<T>, (shared_bytes<T, D>),
                     device.stream(), in, pointer<T>(colors), blocks);
  });
  return colors;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, int64_t degree, const Tensor& dirs, const Tensor& coeffs,
                                    const OptionalTensor& masks, bool needs_dirs, bool needs_coeffs) {
  const Device device(dirs);
  Tensor of_dirs = needs_dirs ? empty({dirs.size(0), dirs.size(1), dirs.size(2), 3}, dirs) : no_gradient(dirs);
  Tensor of_coeffs =
      needs_coeffs ? empty({coeffs.size(0), coeffs.size(1), coeffs.size(2), 3}, coeffs) : no_gradient(coeffs);
  dispatch(dirs, degree, [&](auto element, auto compiled_degree) {
    using T = decltype(element);
    constexpr int D = compiled_degree;
    const Problem<T> in = problem_of<T>(dirs, coeffs, masks);
    const int64_t blocks = blocks_of(in);
    if (blocks == 0) return;
    MPKERNELS_LAUNCH((backward_kernel<T, D>), launched(blocks), threads_per_block<T>, (shared_bytes<T, D>),
                     device.stream(), in, pointer<T>(grad), needs_dirs ? pointer<T>(of_dirs) : nullptr,
                     needs_coeffs ? pointer<T>(of_coeffs) : nullptr, blocks);
  });
  return {of_dirs, of_coeffs};
}

}  // namespace
}  // namespace spherical_harmonics
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("spherical_harmonics", TORCH_BOX(&mpkernels::spherical_harmonics::forward));
  library.impl("spherical_harmonics_backward", TORCH_BOX(&mpkernels::spherical_harmonics::backward));
}
