// ActNorm on the CPU (Kingma and Dhariwal 2018, "Glow", table 1). Every variant is
//
//   y = (x + before) scale + after,   scale = e^+-log_scale,   log_abs_det[b] = +-S sum_c log_scale[c]
//   dL/dx = g scale,   dL/dbefore = scale sum g,   dL/dafter = sum g,
//   dL/dlog_scale = +-(scale sum g (x + before) + S sum_b h[b])
//
// with g the gradient of y and h that of log_abs_det. Shapes: mpkernels/flows/actnorm/schema.py.
//
// Decomposition: a task is some samples of some channels, a channel's row of positions at a time (lanes along the
// positions), or, for features (S = 1), lanes along the channels. Inputs whose channels lie side by side are transposed
// in registers. Backward is one pass too; each task has sums of its own (vectors of at most 4096 numbers, then
// float64), added in order. Tasks depend on the shape alone.
//
// Bytes: x read, y written; backward g and x read, dx written. Memory is the limit.
#include "common/dispatch.h"
#include "common/matmul.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>

namespace mpkernels {
namespace actnorm {
namespace {

// The parameters in terms of the formula above.
template <typename T>
struct Affine {
  std::unique_ptr<T[]> before, scale, after;
  double sign;
  bool inside;

  Affine(const Tensor& bias, const Tensor& log_scale, bool shift_first, bool inverse)
      : sign(inverse ? -1 : 1), inside(shift_first != inverse) {
    const int64_t channels = bias.size(0), padded = channels + lanes<T>;
    before = std::make_unique<T[]>(static_cast<size_t>(padded));
    scale = std::make_unique<T[]>(static_cast<size_t>(padded));
    after = std::make_unique<T[]>(static_cast<size_t>(padded));
    for (int64_t c = 0; c < channels; ++c) {
      const T shift = inverse ? -pointer<const T>(bias)[c] : pointer<const T>(bias)[c];
      (inside ? before : after)[c] = shift;
      scale[c] = std::exp(inverse ? -pointer<const T>(log_scale)[c] : pointer<const T>(log_scale)[c]);
    }
  }
};

enum class Order { rows, features, transposed, any };

// What the loops run over. The memory order is that of x; the other tensors are contiguous.
struct Sizes {
  int64_t batch, channels, positions, sample_stride, channel_stride, position_stride;
  int64_t samples_each, channels_each;  // of a task

  explicit Sizes(const Tensor& x)
      : batch(x.size(0)),
        channels(x.size(1)),
        positions(x.size(2)),
        sample_stride(x.stride(0)),
        channel_stride(x.stride(1)),
        position_stride(x.stride(2)) {
    constexpr int64_t wanted = 1 << 15;  // numbers of a task
    const int64_t sample = std::max<int64_t>(1, channels * positions);
    samples_each = std::max<int64_t>(1, (wanted + sample - 1) / sample);
    const int64_t together = order() == Order::rows ? 1 : 16;
    channels_each = std::max(together, wanted / std::max<int64_t>(1, positions) / together * together);
  }
  Order order() const {
    if (positions == 1) return channels == 1 || channel_stride == 1 ? Order::features : Order::any;
    if (position_stride == 1) return Order::rows;
    return channel_stride == 1 ? Order::transposed : Order::any;
  }
  int64_t pieces() const { return (batch + samples_each - 1) / samples_each; }
  int64_t blocks() const { return (channels + channels_each - 1) / channels_each; }
};

struct Task {
  int64_t piece, first_sample, last_sample, first_channel, last_channel;
};

template <typename Body>
void each_task(const Sizes& n, const Body& body) {
  if (n.batch * n.channels * n.positions == 0) return;
  parallel_pieces(n.pieces() * n.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i / n.blocks(), block = i % n.blocks();
      body(Task{piece, piece * n.samples_each, std::min(n.batch, (piece + 1) * n.samples_each), block * n.channels_each,
                std::min(n.channels, (block + 1) * n.channels_each)});
    }
  });
}

// Calls take(b, c, p, x, count, lane_is_channel) for every vector of a task: `count` numbers of x from (b, c, p) on,
// along the positions, or along the channels for features. Lanes beyond them hold anything finite.
template <typename S, typename Take>
MPKERNELS_INLINE void each_vector(const Sizes& n, Order order, const Task& task, const S* x, const Take& take) {
  using T = Compute<S>;
  constexpr int L = lanes<T>;
  for (int64_t b = task.first_sample; b < task.last_sample; ++b) {
    const S* sample = x + b * n.sample_stride;
    if (order == Order::features) {
      for (int64_t c = task.first_channel; c < task.last_channel; c += L) {
        const int64_t count = std::min<int64_t>(L, task.last_channel - c);
        take(b, c, int64_t{0}, load_first<S>(sample + c, count), count, std::true_type{});
      }
    } else if (order == Order::transposed) {
      transpose_rows<T>(
          n.positions, task.last_channel - task.first_channel,
          [&](int64_t p, int64_t c, int64_t count) {
            return load_first<S>(sample + p * n.position_stride + task.first_channel + c, count);
          },
          [&](int64_t c, int64_t p, Vector<T> values) {
            take(b, task.first_channel + c, p, values, std::min<int64_t>(L, n.positions - p), std::false_type{});
          });
    } else {
      for (int64_t c = task.first_channel; c < task.last_channel; ++c) {
        const S* row = sample + c * n.channel_stride;
        int64_t p = 0;
        if (order == Order::rows) {
          for (; p + L <= n.positions; p += L) take(b, c, p, load<S>(row + p), int64_t{L}, std::false_type{});
        }
        for (; p < n.positions; p += L) {
          const int64_t count = std::min<int64_t>(L, n.positions - p);
          Vector<T> values{};
          if (order == Order::rows) {
            values = load_first<S>(row + p, count);
          } else {
            for (int64_t i = 0; i < count; ++i) values[i] = to_compute<S>(row[(p + i) * n.position_stride]);
          }
          take(b, c, p, values, count, std::false_type{});
        }
      }
    }
  }
}

// Coefficients of a vector: one of its channel, or one a lane.
template <typename T, bool LANE_IS_CHANNEL>
MPKERNELS_INLINE Vector<T> coefficient(const std::unique_ptr<T[]>& numbers, int64_t channel) {
  if constexpr (LANE_IS_CHANNEL) return load_raw(numbers.get() + channel);
  return broadcast<T>(numbers[channel]);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& bias, const Tensor& log_scale, bool shift_first,
                                   bool inverse) {
  const Sizes n(x);
  Tensor y = empty({n.batch, n.channels, n.positions}, x);
  Tensor log_abs_det = empty({n.batch}, bias);
  dispatch_floating("actnorm", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Affine<T> affine(bias, log_scale, shift_first, inverse);
    double total = 0;
    for (int64_t c = 0; c < n.channels; ++c) total += pointer<const T>(log_scale)[c];
    std::fill_n(pointer<T>(log_abs_det), n.batch,
                static_cast<T>(affine.sign * static_cast<double>(n.positions) * total));
    S* to = pointer<S>(y);
    each_task(n, [&](const Task& task) {
      each_vector<S>(n, n.order(), task, pointer<const S>(x),
                     [&](int64_t b, int64_t c, int64_t p, Vector<T> v, int64_t count, auto lane_is_channel) {
                       constexpr bool along = decltype(lane_is_channel)::value;
                       v = (v + coefficient<T, along>(affine.before, c)) * coefficient<T, along>(affine.scale, c) +
                           coefficient<T, along>(affine.after, c);
                       store_first<S>(to + (b * n.channels + c) * n.positions + p, v, count);
                     });
    });
  });
  return {y, log_abs_det};
}

// Sums of g and of g (x + before), a channel each, for the channels of a task: vectors that are emptied into float64.
template <typename T>
struct Sums {
  T* vectors;  // (channels, 2, lanes)
  double* totals;
  int64_t stride;  // from the totals of g to the others

  void clear(int64_t channels) const {
    for (int64_t c = 0; c < channels; ++c) totals[c] = totals[stride + c] = 0;
    std::fill_n(vectors, channels * 2 * lanes<T>, T(0));
  }
};

// Along the positions: the sums of a channel.
template <typename T>
MPKERNELS_INLINE void empty_sums(const Sums<T>& sums, int64_t c) {
  for (int64_t k = 0; k < 2; ++k) {
    T* at = sums.vectors + (2 * c + k) * lanes<T>;
    sums.totals[k * sums.stride + c] += static_cast<double>(sum<T>(load_raw(at)));
    store<T>(at, Vector<T>{});
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_log_abs_det, const Tensor& x,
                                            const Tensor& bias, const Tensor& log_scale, bool shift_first, bool inverse,
                                            bool needs_x, bool needs_bias, bool needs_log_scale) {
  const Sizes n(x);
  Tensor of_x = needs_x ? empty({n.batch, n.channels, n.positions}, x) : no_gradient(x);
  Tensor of_bias = needs_bias ? empty({n.channels}, bias) : no_gradient(bias);
  Tensor of_log_scale = needs_log_scale ? empty({n.channels}, bias) : no_gradient(bias);
  dispatch_floating("actnorm", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    constexpr int L = lanes<T>;
    const Affine<T> affine(bias, log_scale, shift_first, inverse);
    const S* gradient = pointer<const S>(grad_y);
    S* to = needs_x ? pointer<S>(of_x) : nullptr;
    const bool needs_sums = needs_bias || needs_log_scale;
    const int64_t pieces = n.pieces();
    const std::unique_ptr<double[]> totals(
        needs_sums ? new double[static_cast<size_t>(std::max<int64_t>(1, 2 * pieces * n.channels))]() : nullptr);
    each_task(n, [&](const Task& task) {
      const int64_t channels = task.last_channel - task.first_channel;
      // (for features a vector is of several channels: room for the last one)
      Sums<T> sums{scratch<T>(2 * (channels + L) * L), nullptr, n.channels};
      if (needs_sums) {
        sums.totals = totals.get() + task.piece * 2 * n.channels + task.first_channel;
        sums.clear(channels);
      }
      const auto take = [&](int64_t b, int64_t c, int64_t p, Vector<T> v, int64_t count, auto lane_is_channel) {
        constexpr bool along = decltype(lane_is_channel)::value;
        const int64_t at = (b * n.channels + c) * n.positions + p, own = c - task.first_channel;
        const Vector<T> g = load_first<S>(gradient + at, count);
        if (needs_x) store_first<S>(to + at, g * coefficient<T, along>(affine.scale, c), count);
        if (!needs_sums) return;
        Vector<T> product = g * (v + coefficient<T, along>(affine.before, c));
        if (count < L) product = select<T>(first_lanes<T>(count), product, Vector<T>{});  // (0 times an infinite shift)
        T* vectors = sums.vectors + own * 2 * L;
        if constexpr (along) {
          for (int64_t i = 0; i < count; ++i) {
            sums.totals[own + i] += static_cast<double>(g[i]);
            sums.totals[n.channels + own + i] += static_cast<double>(product[i]);
          }
        } else {
          store<T>(vectors, load_raw(vectors) + g);
          store<T>(vectors + L, load_raw(vectors + L) + product);
          if (count < L || p + L == n.positions || p % 4096 == 4096 - L) empty_sums(sums, own);
        }
      };
      each_vector<S>(n, n.order(), task, pointer<const S>(x), take);
    });
    if (!needs_sums) return;
    double of_determinants = 0;
    for (int64_t b = 0; b < n.batch; ++b) of_determinants += static_cast<double>(pointer<const T>(grad_log_abs_det)[b]);
    for (int64_t c = 0; c < n.channels; ++c) {
      double shift = 0, product = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        shift += totals[piece * 2 * n.channels + c];
        product += totals[(piece * 2 + 1) * n.channels + c];
      }
      const double scale = static_cast<double>(affine.scale[c]);
      if (needs_bias) pointer<T>(of_bias)[c] = static_cast<T>(affine.sign * (affine.inside ? scale * shift : shift));
      if (needs_log_scale) {
        const double of_sum = static_cast<double>(n.positions) * of_determinants;
        pointer<T>(of_log_scale)[c] = static_cast<T>(affine.sign * (scale * product + of_sum));
      }
    }
  });
  return {of_x, of_bias, of_log_scale};
}

}  // namespace
}  // namespace actnorm
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("actnorm", TORCH_BOX(&mpkernels::actnorm::forward));
  library.impl("actnorm_backward", TORCH_BOX(&mpkernels::actnorm::backward));
}
