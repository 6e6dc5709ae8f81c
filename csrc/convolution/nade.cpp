// NADE on the CPU: log-likelihoods, their gradients, and samples. Formulas and decomposition: nade.h (a tile of
// samples, lanes along hidden units) and nade_backward.h (a piece of the hidden units, all samples). Shapes of the
// arguments: mpkernels/convolution/nade/schema.py. Weights are transposed and padded once a call. Bytes moved, beside
// the weights: x and the logits once (N D numbers each).
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/tensor.h"
#include "convolution/nade_backward.h"

#include <tuple>

namespace mpkernels {
namespace nade {
namespace {

ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The weights of a call in the layout of Weights, and the tensor that holds them.
template <typename S>
std::pair<Tensor, Weights<Compute<S>>> packed(const Tensor& in_weight, const Tensor& in_bias, const Tensor& out_weight,
                                              const Tensor& out_bias) {
  using T = Compute<S>;
  const int64_t hidden = in_weight.size(0), dimensions = in_weight.size(1);
  const int64_t units = (hidden + lanes<T> - 1) / lanes<T> * lanes<T>;
  Tensor memory = empty({(2 * dimensions + 1) * units + dimensions}, in_weight, wide_type(in_weight));
  T* in = pointer<T>(memory);
  T *out = in + dimensions * units, *first = out + dimensions * units, *last = first + units;
  const S *from_in = pointer<S>(in_weight), *from_out = pointer<S>(out_weight);
  parallel_pieces(dimensions, 64, [&](int64_t begin, int64_t end) {
    transpose_into<T>(in + begin * units, units, hidden, end - begin, [&](int64_t i, int64_t j, int64_t count) {
      return load_first<S>(from_in + i * dimensions + begin + j, count);
    });
    for (int64_t d = begin; d < end; ++d) {
      for (int64_t j = 0; j < units; j += lanes<T>) {
        store<T>(out + d * units + j, load_first<S>(from_out + d * hidden + j, hidden - j));
      }
    }
  });
  const S *from_first = pointer<S>(in_bias), *from_last = pointer<S>(out_bias);
  for (int64_t j = 0; j < units; ++j) first[j] = j < hidden ? to_compute(from_first[j]) : T(0);
  for (int64_t d = 0; d < dimensions; ++d) last[d] = to_compute(from_last[d]);
  return {memory, Weights<T>{in, first, out, last, dimensions, units}};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& in_weight, const Tensor& in_bias,
                                   const Tensor& out_weight, const Tensor& out_bias) {
  const int64_t samples = x.size(0), dimensions = x.size(1);
  Tensor log_prob = empty({samples}, x, wide_type(x));
  Tensor logits = empty({samples, dimensions}, x, wide_type(x));
  dispatch_floating("nade", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const auto [memory, w] = packed<S>(in_weight, in_bias, out_weight, out_bias);
    const auto& weights = w;
    parallel_pieces(samples, tile_samples, [&](int64_t first, int64_t end) {
      const S* rows = pointer<S>(x) + first * dimensions;
      T* to = pointer<T>(logits) + first * dimensions;
      // (one piece may be all samples)
      for (int64_t s = first; s < end;
           s += tile_samples, rows += tile_samples * dimensions, to += tile_samples * dimensions) {
        const int64_t count = std::min<int64_t>(tile_samples, end - s);
        run_tile<T>(
            weights, count, scratch<T>(2 * tile_samples * weights.units),
            [&](int64_t d, const T* found) {
              for (int64_t i = 0; i < count; ++i) to[i * dimensions + d] = found[i] + weights.out_bias[d];
            },
            [&](int64_t i, int64_t d) { return to_compute(rows[i * dimensions + d]); });
        for (int64_t i = 0; i < count; ++i) {
          pointer<T>(log_prob)[s + i] = log_prob_of_row<S>(rows + i * dimensions, to + i * dimensions, dimensions);
        }
      }
    });
  });
  return {log_prob, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& logits, const Tensor& x,
                                                            const Tensor& in_weight, const Tensor& in_bias,
                                                            const Tensor& out_weight, bool needs_x) {
  const int64_t samples = x.size(0), dimensions = x.size(1), hidden = in_weight.size(0);
  Tensor of_x = needs_x ? empty({samples, dimensions}, x) : no_gradient(x);
  Tensor of_in_weight = empty({hidden, dimensions}, x), of_in_bias = empty({hidden}, x);
  Tensor of_out_weight = empty({dimensions, hidden}, x), of_out_bias = empty({dimensions}, x);
  Tensor deltas = empty({samples, dimensions}, x, wide_type(x));
  dispatch_floating("nade", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const S* values = pointer<S>(x);
    const T *scores = pointer<T>(logits), *gradient = pointer<T>(grad);
    T* delta = pointer<T>(deltas);
    parallel_pieces(samples, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t d = 0; d < dimensions; d += lanes<T>) {
          const int64_t at = n * dimensions + d, count = dimensions - d;
          const Vector<T> error = load_first<S>(values + at, count) - sigmoid<T>(load_first<T>(scores + at, count));
          store_first<T>(delta + at, gradient[n] * error, count);
        }
      }
    });
    parallel_pieces(dimensions, 256, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; d += lanes<T>) {
        Vector<T> total = {};
        for (int64_t n = 0; n < samples; ++n) total += load_first<T>(delta + n * dimensions + d, end - d);
        store_first<S>(pointer<S>(of_out_bias) + d, total, end - d);
      }
    });

    const int64_t pieces = (hidden + columns<T> - 1) / columns<T>;
    Tensor partial = needs_x ? empty({pieces, samples, dimensions}, x, wide_type(x)) : no_gradient(x);
    const Backward<S> p{values,
                        pointer<S>(in_weight),
                        pointer<S>(in_bias),
                        pointer<S>(out_weight),
                        delta,
                        pointer<S>(of_in_weight),
                        pointer<S>(of_in_bias),
                        pointer<S>(of_out_weight),
                        needs_x ? pointer<T>(partial) : nullptr,
                        samples,
                        dimensions,
                        hidden};
    parallel_pieces(pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) backward_piece(p, piece);
    });
    if (!needs_x) return;
    const int64_t size = samples * dimensions;
    parallel_pieces(samples, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t d = 0; d < dimensions; d += lanes<T>) {
          const int64_t at = n * dimensions + d, count = dimensions - d;
          Vector<T> total = {};
          for (int64_t piece = 0; piece < pieces; ++piece) total += load_first<T>(p.of_x + piece * size + at, count);
          store_first<S>(pointer<S>(of_x) + at, total + gradient[n] * load_first<T>(scores + at, count), count);
        }
      }
    });
  });
  return {of_x, of_in_weight, of_in_bias, of_out_weight, of_out_bias};
}

std::tuple<Tensor, Tensor> sample(int64_t samples, const Tensor& in_weight, const Tensor& in_bias,
                                  const Tensor& out_weight, const Tensor& out_bias, int64_t seed, double temperature) {
  const int64_t dimensions = in_weight.size(1);
  Tensor drawn = empty({samples, dimensions}, in_weight);
  Tensor log_prob = empty({samples}, in_weight, wide_type(in_weight));
  dispatch_floating("nade", in_weight, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const auto [memory, w] = packed<S>(in_weight, in_bias, out_weight, out_bias);
    const auto& weights = w;
    parallel_pieces(samples, tile_samples, [&](int64_t first, int64_t end) {
      for (int64_t s = first; s < end; s += tile_samples) {
        const int64_t count = std::min<int64_t>(tile_samples, end - s);
        S* rows = pointer<S>(drawn) + s * dimensions;
        T* state = scratch<T>(tile_samples * (2 * weights.units + dimensions));
        T* logits = state + 2 * tile_samples * weights.units;
        run_tile<T>(
            weights, count, state,
            [&](int64_t d, const T* found) {
              uint32_t words[4][tile_samples] = {};
              for (int i = 0; i < tile_samples; ++i) {
                words[0][i] = static_cast<uint32_t>(d);
                words[1][i] = static_cast<uint32_t>(s + i);
              }
              philox(static_cast<uint64_t>(seed), words);
              T scores[tile_samples], shares[tile_samples];
              for (int i = 0; i < tile_samples; ++i) {
                scores[i] = (found[i] + weights.out_bias[d]) / static_cast<T>(temperature);
              }
              for (int i = 0; i < tile_samples; i += lanes<T>) {
                store_first<T>(shares + i, sigmoid<T>(load_first<T>(scores + i, tile_samples - i)), tile_samples - i);
              }
              for (int64_t i = 0; i < count; ++i) {
                const double uniform = ((words[0][i] >> 8) + 0.5) * 0x1p-24;
                logits[i * dimensions + d] = scores[i];
                rows[i * dimensions + d] = static_cast<S>(uniform < shares[i] ? 1.0f : 0.0f);
              }
            },
            [&](int64_t i, int64_t d) { return to_compute(rows[i * dimensions + d]); });
        for (int64_t i = 0; i < count; ++i) {
          pointer<T>(log_prob)[s + i] = log_prob_of_row<S>(rows + i * dimensions, logits + i * dimensions, dimensions);
        }
      }
    });
  });
  return {drawn, log_prob};
}

}  // namespace
}  // namespace nade
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("nade_log_prob", TORCH_BOX(&mpkernels::nade::forward));
  library.impl("nade_log_prob_backward", TORCH_BOX(&mpkernels::nade::backward));
  library.impl("nade_sample", TORCH_BOX(&mpkernels::nade::sample));
}
