// WaveNet's layer on the CPU, in one pass over the sequence.
//
//   z = weight * xs + condition_weight condition + offset     h = tanh(z[:G]) sigmoid(z[G:])
//   residual = residual_scale (x + projection[:R] h + projection_bias[:R])     skip = projection[R:] h + bias[R:]
//
// (van den Oord et al. 2016, "WaveNet", eq. 2 and figure 4.) Shapes:
// mpkernels/convolution/gated_residual_layer/schema.py.
//
// Decomposition: a task is 64 positions of one sequence; z, h and the projections of them stay in the caches
// (time_products.h), so that x is read and the outputs are written, once. The backward reads z again (gates), and makes
//   d h = projection^T [residual_scale d residual; d skip]     d z = d h sigmoid(b) (1 - tanh^2 a), d h h (1 - sigmoid
//   b)
// with what the projection's gradient sums in the same pass; d z then goes the way of a dilated convolution's gradient.
//
// FLOPs a position: 2 (2 G (R K + A) + P G); the backward takes twice as many. With 64 channels the products are the
// limit; the exponentials of the gates are a tenth of them.
#include "common/dispatch.h"
#include "convolution/time_products.h"

#include <tuple>

namespace mpkernels {
namespace convolution {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The arguments that forward and backward share.
template <typename S, typename T = Compute<S>>
struct Layer {
  int64_t batch, length, channels, gates, taps, conditions, residuals, skips, left, dilation;
  Signal<const S> x, condition;
  Widened<S> weight, condition_weight, projection, projection_bias, offset;
  int64_t offset_stride;
  T scale;

  Layer(const Tensor& x, const Tensor& weight, const OptionalTensor& offset, const OptionalTensor& condition,
        const OptionalTensor& condition_weight, const Tensor& projection, const OptionalTensor& projection_bias,
        const OptionalTensor& state, int64_t dilation, bool residual, double residual_scale)
      : batch(x.size(0)),
        length(x.size(2)),
        channels(x.size(1)),
        gates(weight.size(0) / 2),
        taps(weight.size(2)),
        conditions(condition.has_value() ? condition->size(1) : 0),
        residuals(residual ? channels : 0),
        skips(projection.size(0) - residuals),
        left((taps - 1) * dilation),
        dilation(dilation),
        x(x, state, left),
        weight(weight),
        condition_weight(condition_weight),
        projection(projection),
        projection_bias(projection_bias),
        offset(offset),
        offset_stride(offset.has_value() && offset->size(0) > 1 ? 2 * gates : 0),
        scale(static_cast<T>(residual_scale)) {
    if (condition.has_value()) this->condition = Signal<const S>(*condition);
  }

  int64_t rows() const { return residuals + skips; }
};

// C (rows, 64) = A (rows, depth) B (depth, 64) for `count` columns, the depth in parts that stay in the first cache
template <typename T>
void multiply_panel(const Left<T>& a, const T* b, T* c, int64_t rows, int64_t depth, int64_t count) {
  const int64_t vectors = (count + lanes<T> - 1) / lanes<T>;
  for (int64_t k = 0; k < depth; k += panel_depth) {
    multiply<T>({a.data + k * a.depth, a.row, a.depth}, b + k * panel_columns, panel_columns, c, panel_columns, rows,
                vectors, std::min(panel_depth, depth - k), k > 0);
  }
}

template <typename T>
T sum_of_row(const T* row) {
  Vector<T> total{};
  for (int64_t j = 0; j < panel_columns; j += lanes<T>) total += load_raw(row + j);
  return sum<T>(total);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& offset,
                                           const OptionalTensor& condition, const OptionalTensor& condition_weight,
                                           const Tensor& projection, const OptionalTensor& projection_bias,
                                           const OptionalTensor& state, int64_t dilation, bool residual,
                                           double residual_scale, bool channels_last, bool keep) {
  const int64_t length = x.size(2), residuals = residual ? x.size(1) : 0;
  Tensor of_residual = empty_sequences(x, residuals, length, channels_last);
  Tensor of_skip = empty_sequences(x, projection.size(0) - residuals, length, channels_last);
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor gates = keep ? empty_sequences(x, weight.size(0), length, channels_last, wide) : empty({0}, x, wide);
  dispatch_floating("gated_residual_layer", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Layer<S> in(x, weight, offset, condition, condition_weight, projection, projection_bias, state, dilation,
                      residual, residual_scale);
    const Signal<S> to_residual(of_residual), to_skip(of_skip);
    const Signal<T> to_gates = keep ? Signal<T>(gates) : Signal<T>();
    const Sizes n(x, 2 * in.gates, in.taps, 1);
    each_panel(n, 0, length, [&](int64_t b, int64_t, int64_t t, int64_t count) {
      const int64_t z_size = Panels<T>::size(2 * in.gates), h_size = in.gates * panel_columns;
      T* memory = scratch<T>(z_size + h_size + (in.rows() + in.residuals) * panel_columns);
      const Panels<T> z(memory, 2 * in.gates);
      T* h = memory + z_size;
      T* out = h + h_size;
      T* input = out + in.rows() * panel_columns;
      convolve<S>(in.x, b, 0, in.channels, {in.taps, -in.left, in.dilation},
                  {{in.weight.get(), in.channels * in.taps, in.taps}, 1}, 2 * in.gates, t, count, z, false);
      if (in.conditions > 0) {
        convolve<S>(in.condition, b, 0, in.conditions, {1, 0, 0}, {{in.condition_weight.get(), in.conditions, 1}, 0},
                    2 * in.gates, t, count, z, true);
      }
      if (in.offset.get() != nullptr) {
        add_rows<T>(z.result, 2 * in.gates, in.offset.get() + b * in.offset_stride);
      }
      if (keep) unpack<T>(z.result, to_gates, b, 0, 2 * in.gates, t, count);
      for (int64_t g = 0; g < h_size; g += panel_columns) {
        for (int64_t i = g; i < g + count; i += lanes<T>) {
          const Vector<T> filter = load_raw(z.result + i), gate = load_raw(z.result + h_size + i);
          store<T>(h + i, hyperbolic_tangent<T>(filter) * sigmoid<T>(gate));
        }
      }
      multiply_panel<T>({in.projection.get(), in.gates, 1}, h, out, in.rows(), in.gates, count);
      if (in.projection_bias.get() != nullptr) add_rows<T>(out, in.rows(), in.projection_bias.get());
      if (in.residuals > 0) {
        pack<S>(in.x, b, 0, in.channels, t, input);
        for (int64_t i = 0; i < in.residuals * panel_columns; i += lanes<T>) {
          store<T>(out + i, (load_raw(out + i) + load_raw(input + i)) * in.scale);
        }
        unpack<S>(out, to_residual, b, 0, in.residuals, t, count);
      }
      unpack<S>(out + in.residuals * panel_columns, to_skip, b, 0, in.skips, t, count);
    });
  });
  return {of_residual, of_skip, gates};
}

// The first pass of the backward, over the positions `range` of sequence b: whole panels, but for the last of a
// sequence, where everything is 0 behind its end.
template <typename S, typename T = Compute<S>>
struct GateGradient {
  const Layer<S>& in;
  Signal<const S> residual, skip;  // gradients of the outputs; no data where they are missing
  Signal<const T> gates;
  Signal<T> z;  // what it makes
  bool needs_projection;

  int64_t row() const { return round_up(in.gates, lanes<T>); }
  int64_t sums() const { return needs_projection ? in.rows() * row() : 0; }
  // the sums of a piece: projection (rows, gates rounded up), projection_bias (rows), offset (2 gates)
  int64_t size() const { return sums() + in.rows() + 2 * in.gates; }

  void operator()(int64_t b, Range range, T* projection) const {
    const int64_t h_size = in.gates * panel_columns, panels_of_h = round_up(in.gates, panel_columns) * panel_columns;
    T* bias = projection + sums();
    T* offset = bias + in.rows();
    T* out = scratch<T>((in.rows() + 3 * in.gates) * panel_columns + h_size + panels_of_h);  // (rows, 64)
    T* of_h = out + in.rows() * panel_columns;                                               // (gates, 64)
    T* z_panel = of_h + h_size;                                                              // (2 gates, 64)
    T* h = z_panel + 2 * h_size;
    T* transposed = h + h_size;  // (panels of 64 gates, 64 positions, 64)
    for (int64_t t = range.begin; t < range.end; t += panel_columns) {
      const int64_t count = std::min(panel_columns, range.end - t);
      std::fill_n(out, in.rows() * panel_columns, T(0));
      if (residual.data != nullptr) {
        pack<S>(residual, b, 0, in.residuals, t, out);
        for (int64_t i = 0; i < in.residuals * panel_columns; i += lanes<T>) {
          store<T>(out + i, load_raw(out + i) * in.scale);
        }
      }
      if (skip.data != nullptr) pack<S>(skip, b, 0, in.skips, t, out + in.residuals * panel_columns);
      multiply_panel<T>({in.projection.get(), 1, in.gates}, out, of_h, in.gates, in.rows(), panel_columns);
      pack<T>(gates, b, 0, 2 * in.gates, t, z_panel);
      for (int64_t i = 0; i < h_size; i += lanes<T>) {
        const Vector<T> filter = hyperbolic_tangent<T>(load_raw(z_panel + i));
        const Vector<T> gate = sigmoid<T>(load_raw(z_panel + h_size + i));
        const Vector<T> gradient = load_raw(of_h + i) * gate;
        store<T>(h + i, filter * gate);
        store<T>(z_panel + i, gradient * (1 - filter * filter));
        store<T>(z_panel + h_size + i, gradient * filter * (1 - gate));
      }
      unpack<T>(z_panel, z, b, 0, 2 * in.gates, t, count);
      for (int64_t g = 0; g < 2 * in.gates; ++g) offset[g] += sum_of_row(z_panel + g * panel_columns);
      for (int64_t m = 0; m < in.rows(); ++m) bias[m] += sum_of_row(out + m * panel_columns);
      if (!needs_projection) continue;
      for (int64_t g = 0; g < in.gates; g += panel_columns) {
        const int64_t width = std::min(panel_columns, in.gates - g);
        transpose_into<T>(transposed, panel_columns, width, count,
                          [&](int64_t i, int64_t j, int64_t) { return load_raw(h + (g + i) * panel_columns + j); });
        multiply<T>({out, panel_columns, 1}, transposed, panel_columns, projection + g, row(), in.rows(),
                    (width + lanes<T> - 1) / lanes<T>, count, true);
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_residual, const OptionalTensor& grad_skip, const Tensor& gates, const Tensor& x,
    const Tensor& weight, const OptionalTensor& offset, const OptionalTensor& condition,
    const OptionalTensor& condition_weight, const Tensor& projection, const OptionalTensor& projection_bias,
    const OptionalTensor& state, int64_t dilation, bool residual, double residual_scale, bool channels_last,
    int64_t needs) {
  const auto needed = [&](int i) { return (needs >> i & 1) != 0; };
  const int64_t batch = x.size(0), length = x.size(2), left = (weight.size(2) - 1) * dilation;
  const auto like = [&](bool wanted, const Tensor& of, auto... sizes) {
    return wanted ? empty({sizes...}, of) : no_gradient(of);
  };
  const bool of_condition = condition.has_value() && needed(3);
  const bool of_condition_weight = condition_weight.has_value() && needed(4);
  Tensor to_x = needed(0) ? empty_sequences(x, x.size(1), length, channels_last) : no_gradient(x);
  Tensor to_weight = like(needed(1), x, weight.size(0), weight.size(1), weight.size(2));
  Tensor to_offset = offset.has_value() && needed(2) ? empty({offset->size(0), weight.size(0)}, x) : no_gradient(x);
  Tensor to_condition = of_condition ? empty_sequences(x, condition->size(1), length, channels_last) : no_gradient(x);
  Tensor to_condition_weight = of_condition_weight ? empty({weight.size(0), condition->size(1)}, x) : no_gradient(x);
  Tensor to_projection = like(needed(5), x, projection.size(0), projection.size(1));
  Tensor to_projection_bias = like(projection_bias.has_value() && needed(6), x, projection.size(0));
  Tensor to_state = like(state.has_value() && needed(7), x, batch, x.size(1), left);
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor of_z = empty({batch, weight.size(0), length}, x, wide);

  dispatch_floating("gated_residual_layer", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Layer<S> in(x, weight, offset, condition, condition_weight, projection, projection_bias, state, dilation,
                      residual, residual_scale);
    GateGradient<S> gate{in, {}, {}, Signal<const T>(gates), Signal<T>(of_z), needed(5)};
    if (grad_residual.has_value() && residual) gate.residual = Signal<const S>(*grad_residual);
    if (grad_skip.has_value()) gate.skip = Signal<const S>(*grad_skip);

    const int64_t each = gate.size();
    const Pieces pieces(batch, length, each);
    const int64_t count = batch * pieces.of_sequence;
    const auto sums = std::make_unique<T[]>(static_cast<size_t>(count * each));  // zeros
    parallel_pieces(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        gate(i / pieces.of_sequence, pieces.of(i % pieces.of_sequence, length), sums.get() + i * each);
      }
    });
    if (needed(5)) {
      S* to = pointer<S>(to_projection);
      add_pieces(sums.get(), count, each, gate.sums(), [&](int64_t i, T total) {
        if (i % gate.row() < in.gates) to[i / gate.row() * in.gates + i % gate.row()] = S(total);
      });
    }
    if (to_projection_bias.numel() > 0) {
      S* to = pointer<S>(to_projection_bias);
      add_pieces(sums.get() + gate.sums(), count, each, in.rows(), [&](int64_t i, T total) { to[i] = S(total); });
    }
    if (offset.has_value() && needed(2)) {
      const int64_t own = offset->size(0), of_each = own > 1 ? pieces.of_sequence : count;
      for (int64_t b = 0; b < own; ++b) {
        S* to = pointer<S>(to_offset) + b * 2 * in.gates;
        add_pieces(sums.get() + b * of_each * each + gate.sums() + in.rows(), of_each, each, 2 * in.gates,
                   [&](int64_t i, T total) { to[i] = S(total); });
      }
    }

    const Signal<const T> gradient(of_z);
    const Sizes n(x, 2 * in.gates, in.taps, 1);
    const Taps taps{in.taps, -left, dilation}, mirrored{in.taps, left, -dilation};
    if (needed(0)) {
      input_gradient<S, T>(n, gradient, in.weight.get(), mirrored, Signal<S>(to_x), 0, length,
                           [&](const Panels<T>& panels, int64_t b, int64_t t) {
                             if (gate.residual.data == nullptr) return;
                             pack<S>(gate.residual, b, 0, in.residuals, t, panels.saved);
                             for (int64_t i = 0; i < in.residuals * panel_columns; i += lanes<T>) {
                               store<T>(panels.result + i,
                                        load_raw(panels.result + i) + in.scale * load_raw(panels.saved + i));
                             }
                           });
    }
    if (to_state.numel() > 0) {
      input_gradient<S, T>(n, gradient, in.weight.get(), mirrored, Signal<S>(to_state), -left, 0);
    }
    if (needed(1)) weight_gradient<S, T>(n, in.x, gradient, taps, pointer<S>(to_weight), static_cast<S*>(nullptr));
    if (!condition.has_value()) return;
    const Sizes of(*condition, 2 * in.gates, 1, 1);
    if (of_condition) {
      input_gradient<S, T>(of, gradient, in.condition_weight.get(), {1, 0, 0}, Signal<S>(to_condition), 0, length);
    }
    if (of_condition_weight) {
      weight_gradient<S, T>(of, in.condition, gradient, {1, 0, 0}, pointer<S>(to_condition_weight),
                            static_cast<S*>(nullptr));
    }
  });
  return {to_x, to_weight, to_offset, to_condition, to_condition_weight, to_projection, to_projection_bias, to_state};
}

}  // namespace
}  // namespace convolution
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("gated_residual_layer", TORCH_BOX(&mpkernels::convolution::forward));
  library.impl("gated_residual_layer_backward", TORCH_BOX(&mpkernels::convolution::backward));
}
