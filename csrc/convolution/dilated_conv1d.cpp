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
#include "common/dispatch.h"
#include "convolution/time_products.h"

#include <tuple>

namespace mpkernels {
namespace convolution {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state,
               int64_t dilation, int64_t groups, int64_t left, bool channels_last) {
  const Sizes n(x, weight.size(0), weight.size(2), groups);
  Tensor out = empty_sequences(x, n.outputs, n.length, channels_last);
  dispatch_floating("dilated_conv1d", x, [&](auto element) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& state, int64_t dilation, int64_t groups,
                                                    int64_t left, bool channels_last, bool needs_x, bool needs_weight,
                                                    bool needs_bias, bool needs_state) {
  const Sizes n(x, weight.size(0), weight.size(2), groups);
  Tensor of_x = needs_x ? empty_sequences(x, n.channels, n.length, channels_last) : no_gradient(x);
  Tensor of_weight = needs_weight ? empty({n.outputs, n.group_channels, n.taps}, x) : no_gradient(x);
  Tensor of_bias = needs_bias ? empty({n.outputs}, x) : no_gradient(x);
  Tensor of_state = needs_state ? empty({n.batch, n.channels, left}, x) : no_gradient(x);
  dispatch_floating("dilated_conv1d", x, [&](auto element) {
    using S = decltype(element);
    const Signal<const S> gradient(grad_out);
    const Widened<S> weights(weight);
    const Taps mirrored{n.taps, left, -dilation};
    if (needs_x) input_gradient<S, S>(n, gradient, weights.get(), mirrored, Signal<S>(of_x), 0, n.length);
    if (needs_state) input_gradient<S, S>(n, gradient, weights.get(), mirrored, Signal<S>(of_state), -left, 0);
    if (needs_weight || needs_bias) {
      weight_gradient<S, S>(n, Signal<const S>(x, state, left), gradient, {n.taps, -left, dilation},
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
