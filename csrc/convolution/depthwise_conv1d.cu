// The launcher of the depthwise convolution: for mpkernels on CUDA tensors, or, compiled as C++, for mpkernels_fibres
// on the CPU. Arguments: mpkernels/convolution/depthwise_conv1d/schema.py.
#include "common/device.h"
#include "convolution/depthwise_conv1d.cuh"
#include "convolution/depthwise_conv1d_backward.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace depthwise_conv1d {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <typename S>
Sequences<S> sequences_of(const Tensor& x) {
  return {static_cast<S*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename S>
Problem<S> problem_of(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state,
                      const OptionalTensor& seq_idx, int64_t dilation, bool silu, bool channels_last) {
  Problem<S> in;
  in.x = sequences_of<const S>(x);
  in.state = state.has_value() ? sequences_of<const S>(*state) : Sequences<const S>{nullptr, 0, 0, 0};
  in.weight = pointer<Compute<S>>(weight);
  in.bias = pointer<Compute<S>>(bias);
  in.seq_idx = pointer<int32_t>(seq_idx);
  in.batch = x.size(0), in.channels = x.size(1), in.length = x.size(2);
  in.taps = weight.size(1), in.dilation = dilation, in.left = (in.taps - 1) * dilation;
  in.silu = silu;
  in.channels_last = channels_last;
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
      STD_TORCH_CHECK(false, "depthwise_conv1d: no CUDA kernel for this dtype");
  }
}

// Calls f with the number of taps, as a constant, where the kernels have it compiled in, else with 0.
template <typename F>
void dispatch_taps(int64_t taps, const F& f) {
  switch (taps) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

unsigned launched(int64_t blocks) {
  constexpr int64_t most = 1 << 20;  // further ones are taken in turn
  return static_cast<unsigned>(std::min(blocks, most));
}

unsigned blocks_for(int64_t threads) {
  return launched((threads + threads_per_block - 1) / threads_per_block);
}

// Whether every row of a (B, C, T) tensor starts at, and has, a multiple of 16 bytes.
template <typename S>
bool wide_rows(const Tensor& x, bool channels_last) {
  bool wide = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  const int64_t side = channels_last ? 1 : 2, line = 3 - side;
  for (const int64_t d : {int64_t{0}, line}) wide = wide && (x.size(d) <= 1 || x.stride(d) % pack_size<S> == 0);
  return wide && x.size(side) % pack_size<S> == 0;
}

Tensor new_sequences(const Tensor& like, int64_t batch, int64_t channels, int64_t length, bool channels_last) {
  return channels_last ? torch::stable::transpose(empty({batch, length, channels}, like), 1, 2)
                       : empty({batch, channels, length}, like);
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state,
               const OptionalTensor& seq_idx, int64_t dilation, bool silu, bool channels_last) {
  const Device device(x);
  Tensor out = new_sequences(x, x.size(0), x.size(1), x.size(2), channels_last);
  if (out.numel() == 0) return out;
  dispatch(x, [&](auto element) {
    using S = decltype(element);
    const Problem<S> in = problem_of<S>(x, weight, bias, state, seq_idx, dilation, silu, channels_last);
    const bool wide = dilation == 1 && !seq_idx.has_value() && wide_rows<S>(x, channels_last);
    dispatch_taps(wide ? in.taps : 0, [&](auto constant) {
      constexpr int K = decltype(constant)::value;
      if constexpr (K == 0) {
        MPKERNELS_LAUNCH((forward_kernel<S>), blocks_for(out.numel()), threads_per_block, 0, device.stream(), in,
                         pointer<S>(out), out.numel());
      } else if (channels_last) {
        const int64_t groups = (in.length + positions_a_thread - 1) / positions_a_thread;
        const int64_t tasks = in.batch * groups * (in.channels / pack_size<S>);
        MPKERNELS_LAUNCH((forward_columns_kernel<S, K>), blocks_for(tasks), threads_per_block, 0, device.stream(), in,
                         pointer<S>(out), tasks);
      } else {
        const int64_t packs = out.numel() / pack_size<S>;
        MPKERNELS_LAUNCH((forward_rows_kernel<S, K>), blocks_for(packs), threads_per_block, 0, device.stream(), in,
                         pointer<S>(out), packs);
      }
    });
  });
  return out;
}

template <typename S, int K, int Width>
void launch_backward(const Device& device, const Problem<S>& in, const Gradients<S>& to) {
  const int64_t tiles = in.batch * to.pieces * ((in.channels + Width - 1) / Width);
  const size_t numbers = static_cast<size_t>(tile_elements<Width> + to.reach * Width + threads_per_block);
  MPKERNELS_LAUNCH((backward_kernel<S, K, Width>), launched(tiles), threads_per_block, numbers * sizeof(Compute<S>),
                   device.stream(), in, to, tiles);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& state,
                                                    const OptionalTensor& seq_idx, int64_t dilation, bool silu,
                                                    bool channels_last, bool needs_x, bool needs_weight,
                                                    bool needs_bias, bool needs_state) {
  const Device device(x);
  const int64_t batch = x.size(0), channels = x.size(1), length = x.size(2), taps = weight.size(1);
  const int64_t left = (taps - 1) * dilation;
  Tensor of_x = needs_x ? new_sequences(x, batch, channels, length, channels_last) : no_gradient(x);
  Tensor of_weight = needs_weight ? empty({channels, taps}, weight) : no_gradient(weight);
  Tensor of_bias = needs_bias ? empty({channels}, weight) : no_gradient(weight);
  Tensor of_state = needs_state ? new_sequences(x, batch, channels, left, channels_last) : no_gradient(x);
  dispatch(x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Problem<S> in = problem_of<S>(x, weight, bias, state, seq_idx, dilation, silu, channels_last);
    const int64_t width = channels_last ? last_width : 1;
    const int64_t positions = (channels_last ? tile_elements<last_width> : tile_elements<1>) / width;
    Gradients<S> to;
    to.of_out = sequences_of<const S>(grad_out);
    to.of_x = needs_x ? sequences_of<S>(of_x) : Sequences<S>{nullptr, 0, 0, 0};
    to.of_state = needs_state ? sequences_of<S>(of_state) : Sequences<S>{nullptr, 0, 0, 0};
    to.pieces = (length + positions - 1) / positions;
    to.reach = std::min(left, length) * width <= most_reach_elements ? std::min(left, length) : 0;
    const bool sums = needs_weight || needs_bias;
    Tensor parts = empty({sums ? batch * to.pieces : 0, taps + 1, channels}, weight);
    to.parts = sums ? pointer<T>(parts) : nullptr;
    if (x.numel() > 0) {
      dispatch_taps(taps, [&](auto constant) {
        constexpr int K = decltype(constant)::value;
        channels_last ? launch_backward<S, K, last_width>(device, in, to) : launch_backward<S, K, 1>(device, in, to);
      });
    }
    if (sums && channels > 0) {
      const int64_t blocks = (taps + 1) * ((channels + last_width - 1) / last_width);
      MPKERNELS_LAUNCH((sum_parts_kernel<T>), static_cast<unsigned>(blocks), threads_per_block, 0, device.stream(),
                       to.parts, batch * to.pieces, taps, channels, needs_weight ? pointer<T>(of_weight) : nullptr,
                       needs_bias ? pointer<T>(of_bias) : nullptr);
    }
    if (needs_state && of_state.numel() > 0) {
      MPKERNELS_LAUNCH((state_gradient_kernel<S>), blocks_for(of_state.numel()), threads_per_block, 0, device.stream(),
                       in, to, of_state.numel());
    }
  });
  return {of_x, of_weight, of_bias, of_state};
}

Tensor update(const Tensor& x, const Tensor& state, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& cache_seqlens, const OptionalTensor& state_indices, int64_t dilation, bool silu) {
  const Device device(x);
  Tensor out = empty({x.size(0), x.size(1), x.size(2)}, x);
  if (out.numel() == 0) return out;
  dispatch(x, [&](auto element) {
    using S = decltype(element);
    const Problem<S> in = problem_of<S>(x, weight, bias, std::nullopt, std::nullopt, dilation, silu, false);
    MPKERNELS_LAUNCH((update_kernel<S>), blocks_for(in.batch * in.channels), threads_per_block, 0, device.stream(), in,
                     sequences_of<S>(state), pointer<int32_t>(cache_seqlens), pointer<int32_t>(state_indices),
                     state.size(0), state.size(2), pointer<S>(out));
  });
  return out;
}

}  // namespace
}  // namespace depthwise_conv1d
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("depthwise_conv1d", TORCH_BOX(&mpkernels::depthwise_conv1d::forward));
  library.impl("depthwise_conv1d_backward", TORCH_BOX(&mpkernels::depthwise_conv1d::backward));
  library.impl("depthwise_conv1d_update", TORCH_BOX(&mpkernels::depthwise_conv1d::update));
}
