// The launcher of the affine coupling: for mpkernels on CUDA tensors, or, compiled as C++, for mpkernels_fibres on the
// CPU. Arguments: mpkernels/flows/affine_coupling/schema.py.
#include "common/device.h"
#include "flows/affine_coupling.cuh"

#include <algorithm>
#include <tuple>

namespace mpkernels {
namespace affine_coupling {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Sizes of x, and the settings of a call.
struct Call {
  int64_t batch, channels, height, width;
  int64_t first_channel, last_channel;  // the channels that have parameters
  double clamp, epsilon;
  int64_t scale, layout, pattern, parity;
  bool shift_before, inverse;

  Call(const Tensor& x, int64_t scale, double clamp, double epsilon, int64_t layout, int64_t pattern, int64_t parity,
       bool shift_first, bool inverse)
      : batch(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        first_channel(0),
        last_channel(channels),
        clamp(clamp),
        epsilon(epsilon),
        scale(scale == scale_sigmoid && epsilon != 0 ? static_cast<int64_t>(scale_sigmoid_epsilon) : scale),
        layout(layout),
        pattern(pattern),
        parity(parity),
        shift_before(shift_first != inverse),
        inverse(inverse) {
    if (pattern != pattern_channel) return;
    const int64_t half = (channels + 1) / 2;
    (parity == 0 ? first_channel : last_channel) = half;
  }
  int64_t plane() const { return height * width; }
  int64_t size() const { return channels * plane(); }
};

// Where one of the parameters is in a tensor: from channel `start` on, every `step` channels.
struct Part {
  int64_t start, step;
};

Part part_of(const Call& call, const Tensor& both, bool shift) {
  const int64_t half = both.size(1) / 2;
  switch (call.layout) {
    case shift_scale:
      return {shift ? 0 : half, 1};
    case scale_shift:
      return {shift ? half : 0, 1};
    case shift_scale_interleaved:
      return {shift ? 0 : 1, 2};
    default:
      return {shift ? 1 : 0, 2};
  }
}

// A tensor with the H and W of x, and the channels of x or those [first_channel, last_channel).
template <typename S>
View<S> view_of(const Call& call, const Tensor& x, bool parameter, Part part = {0, 1}) {
  using Element = std::remove_const_t<S>;
  View<S> view{static_cast<Element*>(x.data_ptr()),
               x.stride(0),
               x.stride(1) * part.step,
               x.stride(2),
               x.stride(3),
               false,
               false};
  if (part.start != 0) view.data += part.start * x.stride(1);
  const int64_t channels = parameter ? call.last_channel - call.first_channel : call.channels;
  const bool in_plane = (call.width == 1 || view.column == 1) && (call.height == 1 || view.row == call.width);
  view.nested = in_plane && (channels <= 1 || view.channel == call.plane());
  if constexpr (!std::is_same_v<Element, bool>) {
    constexpr int64_t E = pack_size<Element>;
    const bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (call.batch == 1 || view.batch % E == 0);
    const bool whole = call.plane() % E == 0;
    if (view.nested) {
      // (with CHANNEL a pack is of one kind, and starts with a pack of parameters)
      const bool halves = call.first_channel * call.plane() % E == 0 && call.last_channel * call.plane() % E == 0;
      view.wide = aligned && call.size() % E == 0 && (!parameter || halves);
    } else {
      view.wide = aligned && in_plane && whole && view.channel % E == 0;
    }
  }
  return view;
}

// The view of raw or shift in their own tensors, or in the one that has both.
template <typename S, typename T>
View<S> parameter_of(const Call& call, const T& raw, const T& shift, bool is_shift) {
  if (call.layout == separate) return view_of<S>(call, is_shift ? *shift : *raw, true);
  return view_of<S>(call, *raw, true, part_of(call, *raw, is_shift));
}

template <typename S>
Problem<S> problem_of(const Call& call, const Tensor& x, const OptionalTensor& raw, const OptionalTensor& shift,
                      const OptionalTensor& mask) {
  Problem<S> in{};
  in.batch = call.batch, in.height = call.height, in.width = call.width, in.size = call.size();
  in.pieces = (in.size + piece_size<S> - 1) / piece_size<S>;
  in.first_channel = call.first_channel;
  in.first = call.first_channel * call.plane(), in.last = call.last_channel * call.plane();
  in.clamp = static_cast<ComputeOf<S>>(call.clamp), in.epsilon = static_cast<ComputeOf<S>>(call.epsilon);
  in.scale = static_cast<int>(call.scale), in.pattern = static_cast<int>(call.pattern);
  in.parity = static_cast<int>(call.parity);
  in.shift_before = call.shift_before, in.inverse = call.inverse;
  in.x = view_of<const S>(call, x, false);
  if (call.scale != scale_additive) {
    in.raw = parameter_of<const S>(call, raw, shift, false);
  }
  in.shift = parameter_of<const S>(call, raw, shift, true);
  if (call.pattern == pattern_tensor) {
    in.mask = view_of<const bool>(call, *mask, false);
  }
  const bool nested = in.x.nested && (in.raw.data == nullptr || in.raw.nested) && in.shift.nested &&
                      (in.mask.data == nullptr || in.mask.nested);
  in.positions = !nested || call.pattern == pattern_checkerboard || call.pattern == pattern_alternating;
  return in;
}

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
      STD_TORCH_CHECK(false, "affine_coupling: no CUDA kernel for this dtype");
  }
}

template <typename S>
bool all_wide(const Problem<S>& in) {
  return in.x.wide && (in.raw.data == nullptr || in.raw.wide) && in.shift.wide;
}

// Calls f with the truth as a constant.
template <typename F>
void dispatch_wide(bool wide, const F& f) {
  wide ? f(std::true_type{}) : f(std::false_type{});
}

unsigned blocks_for(int64_t warps) {
  constexpr int64_t most = 1 << 20;  // further ones are taken in turn
  return static_cast<unsigned>(std::min((warps + warps_per_block - 1) / warps_per_block, most));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& raw, const OptionalTensor& shift,
                                   const OptionalTensor& mask, int64_t scale, double clamp, double epsilon,
                                   int64_t layout, int64_t pattern, int64_t parity, bool shift_first, bool inverse) {
  const Device device(x);
  const Call call(x, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor y = empty({call.batch, call.channels, call.height, call.width}, x);
  Tensor log_abs_det = empty({call.batch}, x, wide);
  if (call.batch == 0) return {y, log_abs_det};
  dispatch(x, [&](auto element) {
    using S = decltype(element);
    using T = ComputeOf<S>;
    const bool none = call.scale == scale_additive || call.size() == 0;
    if (none) device.zero(log_abs_det.data_ptr(), static_cast<size_t>(call.batch) * sizeof(T));
    if (call.size() == 0) return;
    const Problem<S> in = problem_of<S>(call, x, raw, shift, mask);
    const View<S> to = view_of<S>(call, y, false);
    const bool several = !none && in.pieces > 1;
    Tensor parts = empty({several ? call.batch : 0, in.pieces}, x, ScalarType::Double);
    dispatch_wide(all_wide(in) && to.wide, [&](auto wide_views) {
      MPKERNELS_LAUNCH((forward_kernel<S, decltype(wide_views)::value>), blocks_for(call.batch * in.pieces),
                       threads_per_block, 0, device.stream(), in, to, several ? pointer<double>(parts) : nullptr,
                       none || several ? nullptr : pointer<T>(log_abs_det));
    });
    if (several) {
      MPKERNELS_LAUNCH((sum_kernel<T>), blocks_for(call.batch), threads_per_block, 0, device.stream(),
                       pointer<double>(parts), call.batch, in.pieces, pointer<T>(log_abs_det));
    }
  });
  return {y, log_abs_det};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_log_abs_det, const Tensor& x,
                                            const OptionalTensor& raw, const OptionalTensor& shift,
                                            const OptionalTensor& mask, int64_t scale, double clamp, double epsilon,
                                            int64_t layout, int64_t pattern, int64_t parity, bool shift_first,
                                            bool inverse, bool needs_x, bool needs_raw, bool needs_shift) {
  const Device device(x);
  const Call call(x, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse);
  const auto like = [&](const OptionalTensor& p, bool needed) {
    if (!needed || !p.has_value()) return no_gradient(x);
    return empty({p->size(0), p->size(1), p->size(2), p->size(3)}, x);
  };
  Tensor of_x = like(x, needs_x);
  OptionalTensor of_raw = like(raw, needs_raw), of_shift = like(shift, needs_shift);
  needs_raw = needs_raw && raw.has_value();
  needs_shift = layout == separate ? needs_shift && shift.has_value() : needs_raw;
  if (x.numel() > 0 && (needs_x || needs_raw || needs_shift)) {
    dispatch(x, [&](auto element) {
      using S = decltype(element);
      Problem<S> in = problem_of<S>(call, x, raw, shift, mask);
      Gradients<S> to{};
      to.of_y = view_of<const S>(call, grad_y, false);
      to.of_log_abs_det = pointer<ComputeOf<S>>(grad_log_abs_det);
      to.log_stride = grad_log_abs_det.stride(0);
      if (needs_x) to.of_x = view_of<S>(call, of_x, false);
      if (needs_raw) to.of_raw = parameter_of<S>(call, of_raw, of_shift, false);
      if (needs_shift) to.of_shift = parameter_of<S>(call, of_raw, of_shift, true);
      const bool nested = to.of_y.nested && (!needs_raw || to.of_raw.nested) && (!needs_shift || to.of_shift.nested);
      in.positions = in.positions || !nested;
      const bool wide = all_wide(in) && to.of_y.wide && (!needs_x || to.of_x.wide) && (!needs_raw || to.of_raw.wide) &&
                        (!needs_shift || to.of_shift.wide);
      dispatch_wide(wide, [&](auto wide_views) {
        MPKERNELS_LAUNCH((backward_kernel<S, decltype(wide_views)::value>), blocks_for(call.batch * in.pieces),
                         threads_per_block, 0, device.stream(), in, to);
      });
    });
  }
  return {of_x, *of_raw, *of_shift};
}

}  // namespace
}  // namespace affine_coupling
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("affine_coupling", TORCH_BOX(&mpkernels::affine_coupling::forward));
  library.impl("affine_coupling_backward", TORCH_BOX(&mpkernels::affine_coupling::backward));
}
