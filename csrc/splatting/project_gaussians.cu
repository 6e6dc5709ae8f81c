// The launcher of the CUDA kernels for the projection of Gaussians: registers mpkernels::project_gaussians and its
// backward for CUDA tensors. Compiled as C++ it registers the same launcher for mpkernels_fibres, on CPU tensors.
// Arguments: mpkernels/splatting/project_gaussians/schema.py.
#include "common/device.h"
#include "splatting/project_gaussians.cuh"

#include <limits>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace splatting {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <typename T>
ProjectionInput<T> input_of(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                            const OptionalTensor& covars, const Tensor& viewmats, const Tensor& Ks) {
  ProjectionInput<T> in{};
  in.means = pointer<T>(means);
  in.quats = pointer<T>(quats);
  in.scales = pointer<T>(scales);
  in.covars = pointer<T>(covars);
  in.viewmats = pointer<T>(viewmats);
  in.intrinsics = pointer<T>(Ks);
  in.cameras = viewmats.size(1);
  in.gaussians = means.size(1);
  in.tiles = (in.gaussians + projection_threads - 1) / projection_threads;
  return in;
}

unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "project_gaussians: too many Gaussians and cameras");
  return static_cast<unsigned>(blocks);
}

// Calls f with a value of the dtype's C++ type and two truths as constants.
template <typename F>
void dispatch(const Tensor& means, bool first, bool second, const F& f) {
  const auto with_truths = [&](auto element) {
    if (first) {
      second ? f(element, std::true_type{}, std::true_type{}) : f(element, std::true_type{}, std::false_type{});
    } else {
      second ? f(element, std::false_type{}, std::true_type{}) : f(element, std::false_type{}, std::false_type{});
    }
  };
  switch (means.scalar_type()) {
    case ScalarType::Float:
      return with_truths(float{});
    case ScalarType::Double:
      return with_truths(double{});
    default:
      STD_TORCH_CHECK(false, "project_gaussians: no CUDA kernel for this dtype");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& means, const OptionalTensor& quats,
                                                           const OptionalTensor& scales, const OptionalTensor& covars,
                                                           const OptionalTensor& opacities, const Tensor& viewmats,
                                                           const Tensor& Ks, int64_t width, int64_t height,
                                                           double near_plane, double far_plane, double radius_clip,
                                                           double eps2d, bool ortho, bool antialiased) {
  const Device device(means);
  const int64_t B = means.size(0), N = means.size(1), C = viewmats.size(1);
  Tensor radii = empty({B, C, N, 2}, means, ScalarType::Int);
  Tensor means2d = empty({B, C, N, 2}, means);
  Tensor depths = empty({B, C, N}, means);
  Tensor conics = empty({B, C, N, 3}, means);
  Tensor compensations = empty({B, C, N}, means);
  dispatch(means, covars.has_value(), opacities.has_value(), [&](auto element, auto with_covars, auto with_opacity) {
    using T = decltype(element);
    ProjectionInput<T> in = input_of<T>(means, quats, scales, covars, viewmats, Ks);
    in.opacities = pointer<T>(opacities);
    in.settings = {static_cast<T>(width),
                   static_cast<T>(height),
                   static_cast<T>(near_plane),
                   static_cast<T>(far_plane),
                   static_cast<T>(radius_clip),
                   static_cast<T>(eps2d),
                   ortho,
                   antialiased};
    const ProjectionOutput<T> out{pointer<int32_t>(radii), pointer<T>(means2d), pointer<T>(depths), pointer<T>(conics),
                                  pointer<T>(compensations)};
    if (B * C * N == 0) return;
    MPKERNELS_LAUNCH((project_gaussians_kernel<T, with_covars, with_opacity>), grid_of(B * C * in.tiles),
                     projection_threads, 0, device.stream(), in, out);
  });
  return {radii, means2d, depths, conics, compensations};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_means2d, const OptionalTensor& grad_depths, const OptionalTensor& grad_conics,
    const OptionalTensor& grad_compensations, const Tensor& radii, const Tensor& means, const OptionalTensor& quats,
    const OptionalTensor& scales, const OptionalTensor& covars, const Tensor& viewmats, const Tensor& Ks, int64_t width,
    int64_t height, double eps2d, bool ortho, bool needs_gaussians, bool needs_cameras) {
  const Device device(means);
  const int64_t B = means.size(0), N = means.size(1), C = viewmats.size(1);
  const auto rows = [&](bool needed, int64_t size) { return needed ? empty({B, N, size}, means) : no_gradient(means); };
  const bool has_covars = covars.has_value();
  Tensor of_means = rows(needs_gaussians, 3);
  Tensor of_quats = rows(needs_gaussians && !has_covars, 4);
  Tensor of_scales = rows(needs_gaussians && !has_covars, 3);
  Tensor of_covars = rows(needs_gaussians && has_covars, 6);
  Tensor of_viewmats = needs_cameras ? empty({B, C, 4, 4}, means) : no_gradient(means);
  Tensor of_Ks = needs_cameras ? empty({B, C, 3, 3}, means) : no_gradient(means);
  dispatch(means, has_covars, needs_cameras, [&](auto element, auto with_covars, auto with_cameras) {
    using T = decltype(element);
    ProjectionInput<T> in = input_of<T>(means, quats, scales, covars, viewmats, Ks);
    in.settings.width = static_cast<T>(width);
    in.settings.height = static_cast<T>(height);
    in.settings.eps2d = static_cast<T>(eps2d);
    in.settings.ortho = ortho;
    std::optional<Tensor> of_tiles;
    if (needs_cameras) of_tiles = empty({B, in.tiles, C, camera_gradients}, means);
    const ProjectionGradients<T> g{pointer<T>(grad_means2d), pointer<T>(grad_depths),
                                   pointer<T>(grad_conics),  pointer<T>(grad_compensations),
                                   pointer<int32_t>(radii),  needs_gaussians ? pointer<T>(of_means) : nullptr,
                                   pointer<T>(of_quats),     pointer<T>(of_scales),
                                   pointer<T>(of_covars),    pointer<T>(of_tiles)};
    if (B * N > 0) {
      MPKERNELS_LAUNCH((project_gaussians_backward_kernel<T, with_covars, with_cameras>), grid_of(B * in.tiles),
                       projection_threads, 0, device.stream(), in, g);
    }
    if (needs_cameras && B * C > 0) {
      MPKERNELS_LAUNCH((sum_cameras_kernel<T>), grid_of(B * C), camera_gradients * camera_strides, 0, device.stream(),
                       g.of_cameras, pointer<T>(of_viewmats), pointer<T>(of_Ks), C, in.tiles);
    }
  });
  return {of_means, of_quats, of_scales, of_covars, of_viewmats, of_Ks};
}

}  // namespace
}  // namespace splatting
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("project_gaussians", TORCH_BOX(&mpkernels::splatting::forward));
  library.impl("project_gaussians_backward", TORCH_BOX(&mpkernels::splatting::backward));
}
