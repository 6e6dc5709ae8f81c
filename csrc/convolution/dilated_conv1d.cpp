// The dilated convolution over time on the CPU.
//
//   out[b, o, t] = bias[o] + sum_{k, c} weight[o, c, k] xs[b, c, t + k dilation - left]
//
// Shapes, and what xs is: mpkernels/convolution/dilated_conv1d/schema.py.
//
// Decomposition: a task is 64 positions of one sequence and group, for all of its outputs (time_products.h). The
// gradient of x is the same with the taps mirrored and the weights read along their other dimension. The gradient of
// the weight contracts over time, in fixed pieces that are added in order.
//
// 2 B T C D K / groups FLOPs, forward and for each gradient; x, weight and out are the bytes. With 64 channels and more
// the products are the limit.
#include "convolution/time_products.h"

#include <tuple>

namespace mpkernels {
namespace convolution {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <typename F>
void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, "dilated_conv1d: no CPU kernel for this dtype");
  }
}

// (B, channels, T), in the memory order (B, T, channels) where `channels_last`
Tensor empty_sequences(const Tensor& like, int64_t channels, int64_t length, bool channels_last) {
  if (!channels_last) return empty({like.size(0), channels, length}, like);
  return torch::stable::transpose(empty({like.size(0), length, channels}, like), 1, 2);
}

struct Sizes {
  int64_t batch, channels, length, outputs, taps, groups;
  int64_t group_channels, group_outputs;

  Sizes(const Tensor& x, const Tensor& weight, int64_t groups)
      : batch(x.size(0)),
        channels(x.size(1)),
        length(x.size(2)),
        outputs(weight.size(0)),
        taps(weight.size(2)),
        groups(groups),
        group_channels(channels / groups),
        group_outputs(outputs / groups) {}
};

// Calls body(b, group, t, count) for every 64 positions of [begin, end) of every sequence and group, in parallel.
template <typename Body>
void each_panel(const Sizes& n, int64_t begin, int64_t end, const Body& body) {
  const int64_t panels = (end - begin + panel_columns - 1) / panel_columns;
  const int64_t grain = std::clamp<int64_t>(panels / 64, 1, 4);
  parallel_pieces(n.batch * n.groups * panels, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = begin + i % panels * panel_columns, sequence = i / panels;
      body(sequence / n.groups, sequence % n.groups, t, std::min(panel_columns, end - t));
    }
  });
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state,
               int64_t dilation, int64_t groups, int64_t left, bool channels_last) {
  const Sizes n(x, weight, groups);
  Tensor out = empty_sequences(x, n.outputs, n.length, channels_last);
  dispatch(x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Signal<const S> from(x, state, left);
    const Signal<S> to(out);
    const Widened<S> weights(weight);
    const S* add = pointer<const S>(bias);
    const Taps taps{n.taps, -left, dilation};
    each_panel(n, 0, n.length, [&](int64_t b, int64_t group, int64_t t, int64_t count) {
      const int64_t first = group * n.group_outputs;
      const T* of_group = weights.get() + first * n.group_channels * n.taps;
      const Panels<T> panels(scratch<T>(Panels<T>::size(n.group_outputs)), n.group_outputs);
      convolve<S>(from, b, group * n.group_channels, n.group_channels, taps,
                  {{of_group, n.group_channels * n.taps, n.taps}, 1}, n.group_outputs, t, count, panels, false);
      if (add != nullptr) add_rows<S>(panels.result, n.group_outputs, add + first);
      unpack<S>(panels.result, to, b, first, n.group_outputs, t, count);
    });
  });
  return out;
}

// The gradient of x, or of the state before it: `to` for the positions [begin, end).
template <typename S, typename T = Compute<S>>
void input_gradient(const Sizes& n, const Signal<const S>& gradient, const T* weights, int64_t dilation, int64_t left,
                    const Signal<S>& to, int64_t begin, int64_t end) {
  const Taps taps{n.taps, left, -dilation};
  each_panel(n, begin, end, [&](int64_t b, int64_t group, int64_t t, int64_t count) {
    const T* of_group = weights + group * n.group_outputs * n.group_channels * n.taps;
    const Panels<T> panels(scratch<T>(Panels<T>::size(n.group_channels)), n.group_channels);
    convolve<S>(gradient, b, group * n.group_outputs, n.group_outputs, taps,
                {{of_group, n.taps, n.group_channels * n.taps}, 1}, n.group_channels, t, count, panels, false);
    unpack<S>(panels.result, to, b, group * n.group_channels, n.group_channels, t - begin, count);
  });
}

template <typename S, typename T = Compute<S>>
void weight_gradient(const Sizes& n, const Signal<const S>& x, const Signal<const S>& gradient, const Taps& taps,
                     S* weight, S* bias) {
  const int64_t row = WeightSums<S>::row(n.group_outputs);
  const int64_t products = weight == nullptr ? 0 : WeightSums<S>::size(n.taps, n.group_channels, n.group_outputs);
  const int64_t each = products + row;
  const Pieces pieces(n.batch, n.length, each * n.groups);
  const int64_t count = n.batch * pieces.of_sequence;
  const auto sums = std::make_unique<T[]>(static_cast<size_t>(count * n.groups * each));  // zeros
  parallel_pieces(count * n.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / count, piece = i % count;
      const Range at = pieces.of(piece % pieces.of_sequence, n.length);
      T* of_piece = sums.get() + i * each;
      const Taps wanted{weight == nullptr ? 0 : taps.count, taps.first, taps.step};
      add_weight_sums<S, S>(x, gradient, piece / pieces.of_sequence, group * n.group_channels, n.group_channels,
                            group * n.group_outputs, n.group_outputs, wanted, at.begin, at.end - at.begin, of_piece,
                            bias == nullptr ? nullptr : of_piece + products,
                            scratch<T>(WeightSums<S>::work(n.group_outputs, n.group_channels)));
    }
  });
  for (int64_t group = 0; group < n.groups; ++group) {
    const T* from = sums.get() + group * count * each;
    const int64_t first = group * n.group_outputs;
    if (weight != nullptr) {
      S* to = weight + first * n.group_channels * n.taps;
      add_weight_pieces<S>(from, count, each, n.taps, n.group_channels, n.group_outputs, to);
    }
    if (bias != nullptr) {
      add_pieces(from + products, count, each, n.group_outputs, [&](int64_t i, T x) { bias[first + i] = S(x); });
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& state, int64_t dilation, int64_t groups,
                                                    int64_t left, bool channels_last, bool needs_x, bool needs_weight,
                                                    bool needs_bias, bool needs_state) {
  const Sizes n(x, weight, groups);
  Tensor of_x = needs_x ? empty_sequences(x, n.channels, n.length, channels_last) : no_gradient(x);
  Tensor of_weight = needs_weight ? empty({n.outputs, n.group_channels, n.taps}, x) : no_gradient(x);
  Tensor of_bias = needs_bias ? empty({n.outputs}, x) : no_gradient(x);
  Tensor of_state = needs_state ? empty({n.batch, n.channels, left}, x) : no_gradient(x);
  dispatch(x, [&](auto element) {
    using S = decltype(element);
    const Signal<const S> gradient(grad_out);
    const Widened<S> weights(weight);
    if (needs_x) input_gradient<S>(n, gradient, weights.get(), dilation, left, Signal<S>(of_x), 0, n.length);
    if (needs_state) input_gradient<S>(n, gradient, weights.get(), dilation, left, Signal<S>(of_state), -left, 0);
    if (needs_weight || needs_bias) {
      weight_gradient<S>(n, Signal<const S>(x, state, left), gradient, {n.taps, -left, dilation},
                         needs_weight ? pointer<S>(of_weight) : nullptr, needs_bias ? pointer<S>(of_bias) : nullptr);
    }
  });
  return {of_x, of_weight, of_bias, of_state};
}

}  // namespace
}  // namespace convolution
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("dilated_conv1d", TORCH_BOX(&mpkernels::convolution::forward));
  library.impl("dilated_conv1d_backward", TORCH_BOX(&mpkernels::convolution::backward));
}
