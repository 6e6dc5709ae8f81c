// The launcher of volume compositing's CUDA kernels: registers mpkernels::composite and mpkernels::composite_backward
// for CUDA tensors. Compiled as C++ it registers the same launcher for mpkernels_fibres, on CPU tensors, where the
// kernels run a fibre per CUDA thread. Arguments: mpkernels/volume/composite/schema.py.
#include "common/device.h"
#include "volume/composite.cuh"

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace composite {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <typename S>
Rays<S> rays_of(const Tensor& densities, const Tensor& values, const Tensor& t_starts, const OptionalTensor& t_ends,
                const OptionalTensor& packed_info, const OptionalTensor& background, double early_stop_eps) {
  Rays<S> rays;
  rays.densities = pointer<S>(densities);
  rays.values = pointer<S>(values);
  rays.t_starts = pointer<S>(t_starts);
  rays.t_ends = pointer<S>(t_ends);
  rays.background = pointer<S>(background);
  rays.packed_info = pointer<int64_t>(packed_info);
  rays.density_stride = densities.stride(0);
  rays.value_stride = values.stride(0);
  rays.start_stride = t_starts.stride(0);
  rays.end_stride = ray_stride(t_ends);
  rays.background_stride = ray_stride(background);
  rays.rays = packed_info.has_value() ? packed_info->size(0) : densities.size(0);
  rays.samples = packed_info.has_value() ? 0 : densities.size(1);
  rays.total = densities.numel();
  rays.channels = values.size(values.dim() - 1);
  rays.early_stop_eps = static_cast<Compute<S>>(early_stop_eps);
  return rays;
}

// Enough blocks to keep any GPU busy to the end; warps take further rays in turn.
unsigned blocks_for(int64_t warps) {
  constexpr int64_t most_blocks = 1 << 16;
  return static_cast<unsigned>(std::min((warps + warps_per_block - 1) / warps_per_block, most_blocks));
}

// Calls f with a value of the dtype's C++ type, the number of channels where it is compiled in, and whether densities
// are alphas.
template <typename F>
void dispatch(const Tensor& densities, int64_t channels, bool alphas, const F& f) {
  const auto with_alphas = [&](auto element, auto compiled_channels) {
    if (alphas) {
      f(element, compiled_channels, std::true_type{});
    } else {
      f(element, compiled_channels, std::false_type{});
    }
  };
  const auto with_channels = [&](auto element) {
    if (channels == 3) {
      with_alphas(element, std::integral_constant<int, 3>{});
    } else if (channels == 1) {
      with_alphas(element, std::integral_constant<int, 1>{});
    } else {
      with_alphas(element, std::integral_constant<int, 0>{});
    }
  };
  switch (densities.scalar_type()) {
    case ScalarType::Float:
      return with_channels(float{});
    case ScalarType::Double:
      return with_channels(double{});
#if !defined(MPKERNELS_ON_FIBRES)
    case ScalarType::BFloat16:
      return with_channels(__nv_bfloat16{});
    case ScalarType::Half:
      return with_channels(__half{});
#endif
    default:
      STD_TORCH_CHECK(false, "composite: no CUDA kernel for this dtype");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& densities, const Tensor& values,
                                                   const Tensor& t_starts, const OptionalTensor& t_ends,
                                                   const OptionalTensor& packed_info, const OptionalTensor& background,
                                                   double early_stop_eps, bool gaps) {
  const Device device(densities);
  const int64_t channels = values.size(values.dim() - 1);
  const int64_t rays = packed_info.has_value() ? packed_info->size(0) : densities.size(0);
  Tensor value = empty({rays, channels}, densities);
  Tensor opacity = empty({rays}, densities);
  Tensor depth = empty({rays}, densities);
  Tensor weights =
      packed_info.has_value() ? empty({densities.size(0)}, densities) : empty({rays, densities.size(1)}, densities);
  dispatch(densities, channels, !t_ends.has_value(), [&](auto element, auto compiled_channels, auto alphas) {
    using S = decltype(element);
    constexpr int C = compiled_channels;
    const Rays<S> in = rays_of<S>(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps);
    const ForwardOutput<S> out{pointer<S>(value), pointer<S>(opacity), pointer<S>(depth), pointer<S>(weights)};
    if (gaps && in.total > 0) device.zero(out.weights, in.total * sizeof(S));
    const int64_t warps = C > 0 ? rays : rays * ((channels + warp_lanes - 1) / warp_lanes);
    if (warps == 0) return;
    MPKERNELS_LAUNCH((composite_forward_kernel<S, C, alphas>), blocks_for(warps), threads_per_block, 0, device.stream(),
                     in, out);
  });
  return {value, opacity, depth, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_values, const OptionalTensor& grad_opacity, const OptionalTensor& grad_depth,
    const OptionalTensor& grad_weights, const Tensor& densities, const Tensor& values, const Tensor& t_starts,
    const OptionalTensor& t_ends, const OptionalTensor& packed_info, const OptionalTensor& background,
    double early_stop_eps, bool gaps, bool needs_values, bool needs_ts, bool needs_background) {
  const Device device(densities);
  const int64_t channels = values.size(values.dim() - 1);
  const bool packed = packed_info.has_value();
  const int64_t rays = packed ? packed_info->size(0) : densities.size(0);
  const auto like_samples = [&](bool needed) {
    if (!needed) return no_gradient(densities);
    return packed ? empty({densities.size(0)}, densities) : empty({rays, densities.size(1)}, densities);
  };
  const auto like_values = [&]() {
    return packed ? empty({densities.size(0), channels}, densities)
                  : empty({rays, densities.size(1), channels}, densities);
  };
  const bool ends = needs_ts && t_ends.has_value();
  const bool backgrounds = needs_background && background.has_value();
  Tensor of_densities = like_samples(true);
  Tensor of_values = needs_values ? like_values() : no_gradient(densities);
  Tensor of_t_starts = like_samples(needs_ts);
  Tensor of_t_ends = like_samples(ends);
  Tensor of_background = backgrounds ? empty({rays, channels}, densities) : no_gradient(densities);
  dispatch(densities, channels, !t_ends.has_value(), [&](auto element, auto compiled_channels, auto alphas) {
    using S = decltype(element);
    constexpr int C = compiled_channels;
    const Rays<S> in = rays_of<S>(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps);
    const Gradients<S> g{pointer<S>(grad_values),
                         pointer<S>(grad_opacity),
                         pointer<S>(grad_depth),
                         pointer<S>(grad_weights),
                         packed ? 0 : ray_stride(grad_weights),
                         pointer<S>(of_densities),
                         needs_values ? pointer<S>(of_values) : nullptr,
                         needs_ts ? pointer<S>(of_t_starts) : nullptr,
                         ends ? pointer<S>(of_t_ends) : nullptr,
                         backgrounds ? pointer<S>(of_background) : nullptr};
    if (gaps && in.total > 0) {
      device.zero(g.grad_densities, in.total * sizeof(S));
      if (needs_values) device.zero(g.grad_values, in.total * channels * sizeof(S));
      if (needs_ts) device.zero(g.grad_t_starts, in.total * sizeof(S));
      if (ends) device.zero(g.grad_t_ends, in.total * sizeof(S));
    }
    if (rays == 0) return;
    MPKERNELS_LAUNCH((composite_backward_kernel<S, C, alphas>), blocks_for(rays), threads_per_block, 0, device.stream(),
                     in, g);
  });
  return {of_densities, of_values, of_t_starts, of_t_ends, of_background};
}

}  // namespace
}  // namespace composite
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("composite", TORCH_BOX(&mpkernels::composite::forward));
  library.impl("composite_backward", TORCH_BOX(&mpkernels::composite::backward));
}
