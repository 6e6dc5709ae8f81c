// PixelCNN's masked convolution on the CPU, and its gradients (formula, shapes and the meaning of the arguments:
// mpkernels/convolution/masked_conv2d/schema.py; source: van den Oord et al. 2016, "Pixel Recurrent Neural Networks").
//
// The forward and the gradient of x are the same sums (masked_conv2d_pixels.h): an input pixel collects from the
// outputs that saw it, through the taps turned around. With a stride, the input pixels of each phase are a convolution
// of their own, with the taps that reach them. The gradient of the weight: masked_conv2d_weight.h.
#include "common/dispatch.h"
#include "common/tensor.h"
#include "convolution/masked_conv2d_pixels.h"
#include "convolution/masked_conv2d_weight.h"

#include <tuple>

namespace mpkernels {
namespace masked_conv2d {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Settings {
  int64_t taps, colors;
  bool inclusive;
  int64_t stride_y, stride_x, dilation_y, dilation_x;
};

template <typename S>
Picture<S> picture_of(const Tensor& x) {
  return {pointer<const S>(x), x.size(0), x.size(1), x.size(2), x.size(3)};
}

// Whether an output 0 <= i < count reads inside of `size`, i step + d.
bool reads(int64_t d, int64_t count, int64_t step, int64_t size) {
  const int64_t first = d >= 0 ? 0 : (-d + step - 1) / step;
  return first < count && first * step + d < size;
}

// The seen taps that reach the picture from some output; the one that colours share, if any, is last.
std::vector<Tap> seen_taps(const Tensor& x, const Tensor& weight, const Tensor& out, const Settings& s) {
  const int64_t kw = weight.size(3);
  std::vector<Tap> found;
  for (int64_t t = 0; t < s.taps + (s.colors > 1 ? 1 : 0); ++t) {
    const Tap tap{(t / kw - weight.size(2) / 2) * s.dilation_y, (t % kw - kw / 2) * s.dilation_x, t};
    if (reads(tap.dy, out.size(2), s.stride_y, x.size(2)) && reads(tap.dx, out.size(3), s.stride_x, x.size(3))) {
      found.push_back(tap);
    }
  }
  return found;
}

bool shares_last(const std::vector<Tap>& taps, const Settings& s) {
  return s.colors > 1 && !taps.empty() && taps.back().index == s.taps;
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t taps, int64_t colors,
               bool inclusive, int64_t stride_y, int64_t stride_x, int64_t dilation_y, int64_t dilation_x) {
  const Settings s{taps, colors, inclusive, stride_y, stride_x, dilation_y, dilation_x};
  const int64_t rows = (x.size(2) + stride_y - 1) / stride_y, columns = (x.size(3) + stride_x - 1) / stride_x;
  Tensor out = empty({x.size(0), weight.size(0), rows, columns}, x);
  if (out.numel() == 0) return out;
  dispatch_floating("masked_conv2d", x, [&](auto element) {
    using S = decltype(element);
    Sums<S> sums{};
    sums.in = picture_of<S>(x);
    sums.step_y = stride_y;
    sums.step_x = stride_x;
    sums.taps = seen_taps(x, weight, out, s);
    sums.shared_tap = shares_last(sums.taps, s);
    sums.colors = colors;
    sums.inclusive = inclusive;
    sums.weight = pointer<const S>(weight);
    sums.channel_stride = weight.size(2) * weight.size(3);
    sums.filter_stride = weight.size(1) * sums.channel_stride;
    sums.bias = pointer<const S>(bias);
    sums.filters = weight.size(0);
    sums.out = pointer<S>(out);
    sums.rows = rows;
    sums.columns = columns;
    sums.column_stride = 1;
    sums.row_stride = columns;
    sums.plane_stride = rows * columns;
    sums.batch_stride = weight.size(0) * sums.plane_stride;
    run(sums);
  });
  return out;
}

// dx: for each phase of the stride, the input pixels (y stride_y + phase_y, x stride_x + phase_x).
template <typename S>
void run_input(const Tensor& grad, const Tensor& weight, const std::vector<Tap>& taps, const Settings& s,
               Tensor& of_x) {
  Sums<S> sums{};
  sums.in = picture_of<S>(grad);
  sums.step_y = sums.step_x = 1;
  sums.last_first = true;
  sums.colors = s.colors;
  sums.inclusive = s.inclusive;
  sums.weight = pointer<const S>(weight);
  sums.filter_stride = weight.size(2) * weight.size(3);
  sums.channel_stride = weight.size(1) * sums.filter_stride;
  sums.filters = of_x.size(1);
  sums.row_stride = of_x.size(3) * s.stride_y;
  sums.column_stride = s.stride_x;
  sums.plane_stride = of_x.size(2) * of_x.size(3);
  sums.batch_stride = of_x.size(1) * sums.plane_stride;
  for (int64_t phase_y = 0; phase_y < std::min(s.stride_y, of_x.size(2)); ++phase_y) {
    for (int64_t phase_x = 0; phase_x < std::min(s.stride_x, of_x.size(3)); ++phase_x) {
      sums.taps.clear();
      for (const Tap& tap : taps) {
        const int64_t dy = phase_y - tap.dy, dx = phase_x - tap.dx;
        if (dy % s.stride_y == 0 && dx % s.stride_x == 0) {
          sums.taps.push_back({dy / s.stride_y, dx / s.stride_x, tap.index});
        }
      }
      sums.shared_tap = shares_last(sums.taps, s);
      sums.rows = (of_x.size(2) - phase_y + s.stride_y - 1) / s.stride_y;
      sums.columns = (of_x.size(3) - phase_x + s.stride_x - 1) / s.stride_x;
      sums.out = pointer<S>(of_x) + phase_y * of_x.size(3) + phase_x;
      run(sums);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t taps,
                                            int64_t colors, bool inclusive, int64_t stride_y, int64_t stride_x,
                                            int64_t dilation_y, int64_t dilation_x, bool needs_x, bool needs_weight,
                                            bool needs_bias) {
  const Settings s{taps, colors, inclusive, stride_y, stride_x, dilation_y, dilation_x};
  Tensor of_x = needs_x ? empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x) : no_gradient(x);
  Tensor of_weight =
      needs_weight ? empty({weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, x) : no_gradient(x);
  Tensor of_bias = needs_bias ? empty({weight.size(0)}, x) : no_gradient(x);
  const std::vector<Tap> seen = seen_taps(x, weight, grad, s);
  dispatch_floating("masked_conv2d", x, [&](auto element) {
    using S = decltype(element);
    if (needs_x && x.numel() > 0) run_input<S>(grad, weight, seen, s, of_x);
    if (needs_weight && weight.numel() > 0) {
      torch::stable::zero_(of_weight);
      WeightGradient<S> g{};
      g.in = picture_of<S>(x);
      g.grad = picture_of<S>(grad);
      g.step_y = stride_y;
      g.step_x = stride_x;
      g.taps = seen;
      g.shared_tap = shares_last(seen, s);
      g.colors = colors;
      g.inclusive = inclusive;
      g.all_taps = weight.size(2) * weight.size(3);
      g.out = pointer<S>(of_weight);
      run_weight(g);
    }
    if (needs_bias) run_bias(picture_of<S>(grad), pointer<S>(of_bias));
  });
  return {of_x, of_weight, of_bias};
}

}  // namespace
}  // namespace masked_conv2d
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("masked_conv2d", TORCH_BOX(&mpkernels::masked_conv2d::forward));
  library.impl("masked_conv2d_backward", TORCH_BOX(&mpkernels::masked_conv2d::backward));
}
