// The depthwise convolution over time on the CPU: the ops of mpkernels/convolution/depthwise_conv1d/schema.py. Formula,
// bytes and FLOPs: depthwise_conv1d.h.
#include "convolution/depthwise_conv1d.h"
#include "common/dispatch.h"
#include "convolution/depthwise_conv1d_columns.h"
#include "convolution/depthwise_conv1d_rows.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace depthwise_conv1d {
namespace {

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

Tensor new_sequences(const Tensor& like, int64_t batch, int64_t channels, int64_t length, bool channels_last) {
  return channels_last ? torch::stable::transpose(empty({batch, length, channels}, like), 1, 2)
                       : empty({batch, channels, length}, like);
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state,
               const OptionalTensor& seq_idx, int64_t dilation, bool silu, bool channels_last) {
  Tensor out = new_sequences(x, x.size(0), x.size(1), x.size(2), channels_last);
  if (out.numel() == 0) return out;
  dispatch_floating("depthwise_conv1d", x, [&](auto element) {
    using S = decltype(element);
    const Problem<S> in(x, weight, bias, state, seq_idx, dilation, silu, channels_last);
    dispatch_taps(in.taps, [&](auto constant) {
      constexpr int K = decltype(constant)::value;
      channels_last ? forward_columns<S, K>(in, pointer<S>(out)) : forward_rows<S, K>(in, pointer<S>(out));
    });
  });
  return out;
}

// The sums of all pieces, in their order, in double: of weight (C, K) and bias (C,).
template <typename T>
void add_parts(const T* parts, int64_t pieces, int64_t taps, int64_t channels, T* of_weight, T* of_bias) {
  constexpr int64_t grain = 512;
  parallel_pieces((taps + 1) * channels, grain, [&](int64_t first, int64_t last) {
    double totals[grain] = {};
    for (int64_t begin = first; begin < last; begin += grain) {
      const int64_t end = std::min(last, begin + grain);
      std::fill(totals, totals + grain, 0.0);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const T* from = parts + piece * (taps + 1) * channels;
        for (int64_t i = begin; i < end; ++i) totals[i - begin] += from[i];
      }
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i / channels, c = i % channels;
        const T total = static_cast<T>(totals[i - begin]);
        if (k < taps && of_weight != nullptr) of_weight[c * taps + k] = total;
        if (k == taps && of_bias != nullptr) of_bias[c] = total;
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& state,
                                                    const OptionalTensor& seq_idx, int64_t dilation, bool silu,
                                                    bool channels_last, bool needs_x, bool needs_weight,
                                                    bool needs_bias, bool needs_state) {
  const int64_t batch = x.size(0), channels = x.size(1), length = x.size(2), taps = weight.size(1);
  const int64_t left = (taps - 1) * dilation;
  Tensor of_x = needs_x ? new_sequences(x, batch, channels, length, channels_last) : no_gradient(x);
  Tensor of_weight = needs_weight ? empty({channels, taps}, weight) : no_gradient(weight);
  Tensor of_bias = needs_bias ? empty({channels}, weight) : no_gradient(weight);
  Tensor of_state = needs_state ? new_sequences(x, batch, channels, left, channels_last) : no_gradient(x);
  dispatch_floating("depthwise_conv1d", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Problem<S> in(x, weight, bias, state, seq_idx, dilation, silu, channels_last);
    if (x.numel() == 0) {
      std::fill_n(pointer<S>(of_state), of_state.numel(), S(0));
      std::fill_n(pointer<T>(of_weight), of_weight.numel(), T(0));
      std::fill_n(pointer<T>(of_bias), of_bias.numel(), T(0));
      return;
    }
    const int64_t piece = channels_last ? ColumnPieces<S>(in).positions : backward_row_piece(in);
    const int64_t pieces = batch * ((length + piece - 1) / piece);
    const bool sums = needs_weight || needs_bias;
    Tensor parts = empty({sums ? pieces : 0, taps + 1, channels}, weight);
    const Gradients<S> to{pointer<S>(grad_out),
                          grad_out.stride(0),
                          grad_out.stride(channels_last ? 2 : 1),
                          needs_x ? pointer<S>(of_x) : nullptr,
                          needs_state ? pointer<S>(of_state) : nullptr,
                          sums ? pointer<T>(parts) : nullptr};
    dispatch_taps(taps, [&](auto constant) {
      constexpr int K = decltype(constant)::value;
      channels_last ? backward_columns<S, K>(in, to) : backward_rows<S, K>(in, to);
    });
    if (sums) {
      add_parts<T>(pointer<T>(parts), pieces, taps, channels, needs_weight ? pointer<T>(of_weight) : nullptr,
                   needs_bias ? pointer<T>(of_bias) : nullptr);
    }
  });
  return {of_x, of_weight, of_bias, of_state};
}

// `count` elements `stride` apart, side by side.
template <typename S>
void gather(const S* from, int64_t stride, int64_t count, S* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

// One row of the update: the sums of all positions, then the state.
template <typename S>
struct Step {
  using T = Compute<S>;

  const ByTap<T>& weights;
  const S* x;
  S* state;
  S* out;  // (C, T)
  int64_t channels, length, size, taps, dilation;
  int64_t x_channel, x_time, state_channel, state_time;
  int64_t start;  // where position 0 of x goes in a circular state, or -1
  bool silu;

  // Where position p, counted from x, is in the state: p < 0, or it has been written.
  int64_t slot(int64_t p) const { return start < 0 ? size + p : (((start + p) % size) + size) % size; }

  void run(S* rows) const {  // (K + 1, C) scratch
    std::vector<Source<S>> sources(static_cast<size_t>(taps));
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t p = t - (taps - 1 - k) * dilation;
        const S* from = p >= 0 ? x + p * x_time : state + slot(p) * state_time;
        const int64_t stride = p >= 0 ? x_channel : state_channel;
        if (stride != 1) {
          gather(from, stride, channels, rows + k * channels);
          from = rows + k * channels;
        }
        sources[k] = {from, k};
      }
      S* to = length == 1 ? out : rows + taps * channels;
      forward_listed<S>(sources.data(), taps, weights, channels, silu, to);
      if (length > 1) {
        for (int64_t c = 0; c < channels; ++c) out[c * length + t] = to[c];
      }
    }
    if (state_time == 1 || state_channel != 1) {
      for (int64_t c = 0; c < channels; ++c) {
        move_on(state + c * state_channel, state_time, [&](int64_t to, int64_t t) {
          state[c * state_channel + to * state_time] = x[c * x_channel + t * x_time];
        });
      }
    } else {
      if (start < 0) {
        for (int64_t j = 0; j + length < size; ++j) {
          std::copy_n(state + (j + length) * state_time, channels, state + j * state_time);
        }
      }
      for (int64_t t = std::max<int64_t>(0, length - size); t < length; ++t) {
        const int64_t to = start < 0 ? size - length + t : slot(t);
        gather(x + t * x_time, x_channel, channels, state + to * state_time);
      }
    }
  }

  // Shifts one channel's state, and writes the positions of x that stay.
  template <typename Write>
  void move_on(S* line, int64_t stride, const Write& write) const {
    if (start < 0) {
      for (int64_t j = 0; j + length < size; ++j) line[j * stride] = line[(j + length) * stride];
    }
    for (int64_t t = std::max<int64_t>(0, length - size); t < length; ++t) {
      write(start < 0 ? size - length + t : slot(t), t);
    }
  }
};

Tensor update(const Tensor& x, const Tensor& state, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& cache_seqlens, const OptionalTensor& state_indices, int64_t dilation, bool silu) {
  const int64_t batch = x.size(0), channels = x.size(1), length = x.size(2), taps = weight.size(1);
  Tensor out = empty({batch, channels, length}, x);
  if (out.numel() == 0) return out;
  dispatch_floating("depthwise_conv1d", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const ByTap<T> weights(pointer<T>(weight), pointer<T>(bias), taps, channels);
    const int32_t* starts = pointer<int32_t>(cache_seqlens);
    const int32_t* indices = pointer<int32_t>(state_indices);
    constexpr int64_t piece_elements = 1 << 14;
    const int64_t grain = std::max<int64_t>(1, piece_elements / (channels * length));
    parallel_pieces(batch, grain, [&](int64_t first, int64_t last) {
      std::vector<S> rows(static_cast<size_t>((taps + 1) * channels));
      for (int64_t b = first; b < last; ++b) {
        S* to = pointer<S>(out) + b * channels * length;
        const int64_t row = indices == nullptr ? b : indices[b];
        if (row < 0) {
          std::fill_n(to, channels * length, S(0));
          continue;
        }
        STD_TORCH_CHECK(row < state.size(0), "depthwise_conv1d_update: state_indices reach behind the state");
        const Step<S> step{weights,
                           pointer<S>(x) + b * x.stride(0),
                           pointer<S>(state) + row * state.stride(0),
                           to,
                           channels,
                           length,
                           state.size(2),
                           taps,
                           dilation,
                           x.stride(1),
                           x.stride(2),
                           state.stride(1),
                           state.stride(2),
                           starts == nullptr ? -1 : starts[b],
                           silu};
        step.run(rows.data());
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace depthwise_conv1d
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("depthwise_conv1d", TORCH_BOX(&mpkernels::depthwise_conv1d::forward));
  library.impl("depthwise_conv1d_backward", TORCH_BOX(&mpkernels::depthwise_conv1d::backward));
  library.impl("depthwise_conv1d_update", TORCH_BOX(&mpkernels::depthwise_conv1d::update));
}
