// The launcher of the spline coupling: for mpkernels on CUDA tensors, or, compiled as C++, for mpkernels_fibres on the
// CPU. Arguments: mpkernels/flows/spline_coupling/schema.py.
#include "common/device.h"
#include "flows/spline_coupling.cuh"
#include "flows/spline_coupling_backward.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace spline_coupling {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Calls f with a value of the dtype's C++ type.
template <typename F>
void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
#if !defined(MPKERNELS_ON_FIBRES)
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
#endif
    default:
      STD_TORCH_CHECK(false, "spline_coupling: no CUDA kernel for this dtype");
  }
}

// Calls f with the number of bins, as a constant, where the kernels have it compiled in, else with 0; and with whether
// to go through shared memory.
template <typename F>
void dispatch_paths(int64_t bins, bool staged, const F& f) {
  const auto with_bins = [&](auto constant) {
    staged ? f(constant, std::true_type{}) : f(constant, std::false_type{});
  };
  bins == 8 ? with_bins(std::integral_constant<int, 8>{}) : with_bins(std::integral_constant<int, 0>{});
}

unsigned launched(int64_t blocks) {
  constexpr int64_t most = 1 << 20;  // further ones are taken in turn
  return static_cast<unsigned>(std::min(blocks, most));
}

constexpr int64_t most_shared_bytes = 100 * 1024;  // two blocks a multiprocessor; more parameters are read in place

template <typename S>
Elements<S> elements_of(const Tensor& x) {
  return {static_cast<S*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename S>
Elements<S> elements_of(const OptionalTensor& x) {
  return x.has_value() ? elements_of<S>(*x) : Elements<S>{nullptr, 0, 0, 0};
}

bool contiguous(const OptionalTensor& x) {
  return !x.has_value() || x->is_contiguous();
}

// Whether the parameters of a sample, and with `across` those of all samples, are one run of memory in their order.
bool in_rows(const Tensor& parameters, bool across) {
  int64_t run = 1;
  for (int64_t d = 3; d > 0; --d) {
    if (parameters.size(d) != 1 && parameters.stride(d) != run) return false;
    run *= parameters.size(d);
  }
  return !across || parameters.size(0) == 1 || parameters.stride(0) == run;
}

template <typename S>
Parameters<S> parameters_of(const Tensor& x, bool across) {
  const bool fits = row_space<std::remove_const_t<S>>(x.size(3)) * sizeof(Compute<std::remove_const_t<S>>) <=
                    static_cast<size_t>(most_shared_bytes);
  return {static_cast<S*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3),
          fits && in_rows(x, across)};
}

// `most`: pieces of a sample.
Tiling tiling_of(const Tensor& x, int64_t most) {
  Tiling tiling;
  tiling.samples = x.size(0), tiling.channels = x.size(1), tiling.positions = x.size(2);
  tiling.elements = tiling.channels * tiling.positions;
  tiling.group = std::max(int64_t{1}, threads_per_block / tiling.elements);
  const int64_t tiles = (tiling.elements + threads_per_block - 1) / threads_per_block;
  tiling.tiles = (tiles + most - 1) / most;
  tiling.pieces = (tiles + tiling.tiles - 1) / tiling.tiles;
  tiling.lanes = 1;
  while (tiling.lanes < warp_lanes && 2 * tiling.lanes <= tiling.elements) tiling.lanes *= 2;
  tiling.flat = false;
  return tiling;
}

template <typename S>
Problem<S> problem_of(const Tensor& x, const Tensor& parameters, const OptionalTensor& low, double tail_bound,
                      double min_bin_width, double min_bin_height, double min_derivative, bool inverse, int64_t most) {
  Problem<S> in;
  in.tiling = tiling_of(x, most);
  in.x = elements_of<const S>(x);
  in.low = elements_of<const S>(low);
  in.parameters = parameters_of<const S>(parameters, in.tiling.group > 1);
  const int64_t bins = (parameters.size(3) + 1) / 3;
  const auto sizes = [&](double least) {
    return Sizes{2 * tail_bound * least, 2 * tail_bound * (1 - static_cast<double>(bins) * least)};
  };
  in.settings = {tail_bound,     sizes(min_bin_width),   sizes(min_bin_height),
                 min_derivative, static_cast<int>(bins), inverse};
  return in;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& parameters, const OptionalTensor& low,
                                           double tail_bound, double min_bin_width, double min_bin_height,
                                           double min_derivative, bool inverse, bool return_low) {
  const Device device(x);
  const int64_t batch = x.size(0);
  Tensor y = empty({batch, x.size(1), x.size(2)}, x);
  Tensor rest = return_low ? empty({batch, x.size(1), x.size(2)}, x) : no_gradient(x);
  Tensor log_abs_det =
      empty({batch}, x, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  if (x.numel() == 0) {
    if (batch > 0) device.zero(log_abs_det.data_ptr(), batch * (x.scalar_type() == ScalarType::Double ? 8 : 4));
    return {y, log_abs_det, rest};
  }
  dispatch(x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    Problem<S> in = problem_of<S>(x, parameters, low, tail_bound, min_bin_width, min_bin_height, min_derivative,
                                  inverse, most_pieces);
    const bool staged = in.parameters.rows;
    in.tiling.flat = staged && x.is_contiguous() && contiguous(low);
    const bool several = in.tiling.pieces > 1;
    Tensor parts = empty({several ? batch : 0, in.tiling.pieces}, x, ScalarType::Double);
    const Outputs<S> out{pointer<S>(y), return_low ? pointer<S>(rest) : nullptr, pointer<T>(log_abs_det),
                         several ? pointer<double>(parts) : nullptr};
    const int64_t blocks = in.tiling.blocks();
    dispatch_paths(in.settings.bins, staged, [&](auto constant, auto through_shared) {
      constexpr int K = decltype(constant)::value;
      constexpr bool staged = decltype(through_shared)::value;
      MPKERNELS_LAUNCH((forward_kernel<S, K, staged>), launched(blocks), threads_per_block,
                       staged ? row_space<S>(parameters.size(3)) * sizeof(T) : 0, device.stream(), in, out, blocks);
    });
    if (several) {
      MPKERNELS_LAUNCH((sum_parts_kernel<T>), launched(batch), threads_per_block, 0, device.stream(), out.parts, batch,
                       in.tiling.pieces, out.log_abs_det);
    }
  });
  return {y, log_abs_det, rest};
}

// A new (B, C, S, P) tensor, with positions next to each other in memory, or parameters.
Tensor new_parameters(const Tensor& like, bool positions_last) {
  const int64_t batch = like.size(0), channels = like.size(1), positions = like.size(2), number = like.size(3);
  if (!positions_last) return empty({batch, channels, positions, number}, like);
  return torch::stable::transpose(empty({batch, channels, number, positions}, like), 2, 3);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_log_abs_det, const Tensor& x,
                                    const Tensor& parameters, const OptionalTensor& low, double tail_bound,
                                    double min_bin_width, double min_bin_height, double min_derivative, bool inverse,
                                    bool parameters_first, bool needs_x, bool needs_parameters) {
  const Device device(x);
  Tensor of_x = needs_x ? empty({x.size(0), x.size(1), x.size(2)}, x) : no_gradient(x);
  Tensor of_parameters = needs_parameters ? new_parameters(parameters, parameters_first) : no_gradient(x);
  if (x.numel() == 0 || !(needs_x || needs_parameters)) return {of_x, of_parameters};
  dispatch(x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    Problem<S> in = problem_of<S>(x, parameters, low, tail_bound, min_bin_width, min_bin_height, min_derivative,
                                  inverse, std::max(int64_t{1}, x.size(1) * x.size(2)));
    Gradients<S> to;
    to.of_y = elements_of<const S>(grad_y);
    to.of_log_abs_det = pointer<T>(grad_log_abs_det);
    to.step = grad_log_abs_det.stride(0);
    to.of_x = needs_x ? pointer<S>(of_x) : nullptr;
    to.of_parameters =
        needs_parameters ? parameters_of<S>(of_parameters, true) : Parameters<S>{nullptr, 0, 0, 0, 0, false};
    const bool staged = in.parameters.rows || to.of_parameters.rows;
    in.tiling.flat = in.parameters.rows && (to.of_parameters.rows || !needs_parameters) && x.is_contiguous() &&
                     contiguous(low) && grad_y.is_contiguous();
    const int64_t blocks = in.tiling.blocks();
    dispatch_paths(in.settings.bins, staged, [&](auto constant, auto through_shared) {
      constexpr int K = decltype(constant)::value;
      constexpr bool staged = decltype(through_shared)::value;
      MPKERNELS_LAUNCH((backward_kernel<S, K, staged>), launched(blocks), threads_per_block,
                       staged ? row_space<S>(parameters.size(3)) * sizeof(T) : 0, device.stream(), in, to, blocks);
    });
  });
  return {of_x, of_parameters};
}

}  // namespace
}  // namespace spline_coupling
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("spline_coupling", TORCH_BOX(&mpkernels::spline_coupling::forward));
  library.impl("spline_coupling_backward", TORCH_BOX(&mpkernels::spline_coupling::backward));
}
