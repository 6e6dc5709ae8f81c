// The spline coupling on the CPU: the ops of mpkernels/flows/spline_coupling/schema.py. Formula:
// spline_coupling_math.h; a vector of elements: spline_coupling_group.h; reading and writing: spline_coupling_access.h.
//
// x (B, C, S), parameters (B, C, S, P) with P = 3 K - 1, both of any strides; y, low and the gradient of x contiguous.
// A piece of work is whole samples, or a part of one that is larger; log_abs_det is added up in double, in the order of
// the elements' numbers within a vector's lane, then of the parts. Backward computes all again from x and parameters.
//
// Bytes an element, float32: forward 4 (P + 2), backward 4 (2 P + 3). Operations: about 15 P forward, 25 P backward,
// and 100 to 200 for the bin. Vectors whose elements all lie outside read no parameters.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "flows/spline_coupling_access.h"
#include "flows/spline_coupling_group.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

namespace mpkernels {
namespace spline_coupling {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t piece_elements = 2048;

// Elements cut into pieces of whole samples, or samples into parts.
struct Pieces {
  int64_t batch, row, rows, parts;

  Pieces(int64_t batch_, int64_t row_)
      : batch(batch_),
        row(row_),
        rows(std::max<int64_t>(1, piece_elements / std::max<int64_t>(1, row_))),
        parts(row_ <= piece_elements ? 1 : (row_ + piece_elements - 1) / piece_elements) {}
  int64_t count() const { return (batch + rows - 1) / rows * parts; }

  // Calls f(piece, first, last) in parallel, with the numbers of a piece's elements.
  template <typename F>
  void each(const F& f) const {
    parallel_pieces(count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t b = piece / parts * rows, from = piece % parts * piece_elements;
        const int64_t last =
            parts == 1 ? std::min(batch, b + rows) * row : b * row + std::min(row, from + piece_elements);
        f(piece, b * row + from, last);
      }
    });
  }
};

template <typename T>
double sum_in_lanes(const T* x, int64_t count) {
  if (count < 2 * lanes<T>) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += x[i];
    return total;
  }
  Double totals[halves<T>] = {};
  alignas(64) T rest[lanes<T>];
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const T* from = x + i;
    if (count - i < lanes<T>) {
      store<T>(rest, load_first<T>(from, count - i));
      from = rest;
    }
    for (int half = 0; half < halves<T>; ++half) totals[half] += widen<T>(from, half);
  }
  double total = 0;
  for (int half = 0; half < halves<T>; ++half) total += sum<double>(totals[half]);
  return total;
}

// The memory of a thread: parameters (P, lanes), exponentials (2 K, lanes), gradients (P, lanes), logarithms of a
// piece.
template <typename T>
struct Space {
  T *rows, *shares, *gradients, *logs;

  explicit Space(const Numbers& in) {
    T* memory = scratch<T>((2 * in.parameters() + 2 * in.bins) * lanes<T> + piece_elements + lanes<T>);
    rows = memory;
    shares = rows + in.parameters() * lanes<T>;
    gradients = shares + 2 * in.bins * lanes<T>;
    logs = gradients + in.parameters() * lanes<T>;
  }
};

template <typename S>
void forward_elements(const Numbers& in, Shape shape, const Pieces& pieces, const View<S>& x,
                      const ParameterView<S>& parameters, const View<S>* low, S* y, S* lost, Compute<S>* log_abs_det) {
  using T = Compute<S>;
  std::vector<double> parts(pieces.parts > 1 ? static_cast<size_t>(pieces.count()) : 0);
  pieces.each([&](int64_t piece, int64_t first, int64_t last) {
    const Space<T> space(in);
    Group<T> group;
    alignas(64) T inputs[lanes<T>], rests[lanes<T>] = {};
    alignas(64) double values[lanes<T>];
    for (int64_t n = first; n < last; n += lanes<T>) {
      const Elements at(shape, n, std::min<int64_t>(lanes<T>, last - n));
      x.load_into(at, inputs);
      if (low != nullptr) low->load_into(at, rests);
      Vector<T> out = load_raw<T>(inputs), rest = load_raw<T>(rests), log_slope = {};
      if (group.set_inputs(inputs, low == nullptr ? nullptr : rests, in.tail_bound)) {
        const Rows<T> rows = parameters.load(at, space.rows);
        log_slope = forward_group<T>(in, group, rows.data, rows.stride, space.shares, values);
        const Mask<T> inside = lanes_inside<T>(group);
        alignas(64) T rounded[lanes<T>], differences[lanes<T>];
        alignas(64) S narrowed[lanes<T>];
        for (int half = 0; half < halves<T>; ++half) {
          narrow<T>(load_raw<double>(values + half * lanes<double>), half, rounded);
        }
        store<S>(narrowed, load_raw<T>(rounded));
        store<T>(rounded, load<S>(narrowed));
        for (int half = 0; half < halves<T>; ++half) {
          narrow<T>(load_raw<double>(values + half * lanes<double>) - widen<T>(rounded, half), half, differences);
        }
        out = inside ? load_raw<T>(rounded) : out;
        rest = inside ? load_raw<T>(differences) : rest;
        log_slope = inside ? log_slope : Vector<T>{};
      }
      store_first<S>(y + n, out, at.count);
      if (lost != nullptr) store_first<S>(lost + n, rest, at.count);
      store<T>(space.logs + (n - first), log_slope);
    }
    if (pieces.parts > 1) {
      parts[piece] = sum_in_lanes<T>(space.logs, last - first);
    } else {
      for (int64_t b = first / pieces.row; b * pieces.row < last; ++b) {
        log_abs_det[b] = static_cast<T>(sum_in_lanes<T>(space.logs + b * pieces.row - first, pieces.row));
      }
    }
  });
  if (pieces.parts > 1) {
    for (int64_t b = 0; b < pieces.batch; ++b) {
      double total = 0;
      for (int64_t part = 0; part < pieces.parts; ++part) total += parts[b * pieces.parts + part];
      log_abs_det[b] = static_cast<T>(total);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& parameters, const OptionalTensor& low,
                                           double tail_bound, double min_bin_width, double min_bin_height,
                                           double min_derivative, bool inverse, bool return_low) {
  const int64_t batch = x.size(0);
  const Shape shape{x.size(1), x.size(2)};
  const bool is_double = x.scalar_type() == ScalarType::Double;
  Tensor y = empty({batch, shape.channels, shape.positions}, x);
  Tensor log_abs_det = empty({batch}, x, is_double ? ScalarType::Double : ScalarType::Float);
  Tensor lost = return_low ? empty({batch, shape.channels, shape.positions}, x) : empty({0}, x);
  dispatch_floating("spline_coupling", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    if (x.numel() == 0) {
      std::fill_n(pointer<T>(log_abs_det), batch, T(0));
      return;
    }
    const Numbers in(tail_bound, min_bin_width, min_bin_height, min_derivative, inverse, parameters.size(3));
    const View<S> lows(low.has_value() ? *low : x, shape);
    forward_elements<S>(in, shape, Pieces(batch, shape.row()), View<S>(x, shape), ParameterView<S>(parameters, shape),
                        low.has_value() ? &lows : nullptr, pointer<S>(y), return_low ? pointer<S>(lost) : nullptr,
                        pointer<T>(log_abs_det));
  });
  return {y, log_abs_det, lost};
}

template <typename S>
void backward_elements(const Numbers& in, Shape shape, const Pieces& pieces, const View<S>& grad_y,
                       const Compute<S>* grad_log, int64_t grad_log_stride, const View<S>& x,
                       const ParameterView<S>& parameters, const View<S>* low, bool parameters_first, S* of_x,
                       S* of_parameters) {
  using T = Compute<S>;
  pieces.each([&](int64_t, int64_t first, int64_t last) {
    const Space<T> space(in);
    Group<T> group;
    alignas(64) T inputs[lanes<T>], rests[lanes<T>], of_y[lanes<T>], of_log[lanes<T>] = {};
    for (int64_t n = first; n < last; n += lanes<T>) {
      const Elements at(shape, n, std::min<int64_t>(lanes<T>, last - n));
      x.load_into(at, inputs);
      if (low != nullptr) low->load_into(at, rests);
      grad_y.load_into(at, of_y);
      Vector<T> of_input = load_raw<T>(of_y);
      T* gradients = of_parameters == nullptr ? nullptr : space.gradients;
      if (group.set_inputs(inputs, low == nullptr ? nullptr : rests, in.tail_bound)) {
        if (at.c * shape.positions + at.s + at.count <= shape.row()) {
          store<T>(of_log, broadcast<T>(grad_log[at.b * grad_log_stride]));
        } else {
          at.each([&](int64_t i, int64_t b, int64_t, int64_t) { of_log[i] = grad_log[b * grad_log_stride]; });
        }
        const Rows<T> rows = parameters.load(at, space.rows);
        const Mask<T> inside = lanes_inside<T>(group);
        const Vector<T> found =
            backward_group<T>(in, group, rows.data, rows.stride, space.shares, of_y, of_log, inside, gradients);
        of_input = inside ? found : of_input;
      } else if (gradients != nullptr) {
        std::fill_n(gradients, in.parameters() * lanes<T>, T(0));
      }
      if (of_x != nullptr) store_first<S>(of_x + n, of_input, at.count);
      if (gradients != nullptr) store_gradients<S>(gradients, in.parameters(), at, parameters_first, of_parameters);
    }
  });
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_log_abs_det, const Tensor& x,
                                    const Tensor& parameters, const OptionalTensor& low, double tail_bound,
                                    double min_bin_width, double min_bin_height, double min_derivative, bool inverse,
                                    bool parameters_first, bool needs_x, bool needs_parameters) {
  const int64_t batch = x.size(0), number = parameters.size(3);
  const Shape shape{x.size(1), x.size(2)};
  Tensor of_x = needs_x ? empty({batch, shape.channels, shape.positions}, x) : no_gradient(x);
  Tensor of_parameters = no_gradient(x);
  if (needs_parameters && parameters_first) {
    of_parameters = torch::stable::transpose(empty({batch, shape.channels, number, shape.positions}, x), 2, 3);
  } else if (needs_parameters) {
    of_parameters = empty({batch, shape.channels, shape.positions, number}, x);
  }
  if (x.numel() == 0) return {of_x, of_parameters};
  dispatch_floating("spline_coupling", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Numbers in(tail_bound, min_bin_width, min_bin_height, min_derivative, inverse, number);
    const View<S> lows(low.has_value() ? *low : x, shape);
    backward_elements<S>(in, shape, Pieces(batch, shape.row()), View<S>(grad_y, shape), pointer<T>(grad_log_abs_det),
                         grad_log_abs_det.stride(0), View<S>(x, shape), ParameterView<S>(parameters, shape),
                         low.has_value() ? &lows : nullptr, parameters_first, needs_x ? pointer<S>(of_x) : nullptr,
                         needs_parameters ? pointer<S>(of_parameters) : nullptr);
  });
  return {of_x, of_parameters};
}

}  // namespace
}  // namespace spline_coupling
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("spline_coupling", TORCH_BOX(&mpkernels::spline_coupling::forward));
  library.impl("spline_coupling_backward", TORCH_BOX(&mpkernels::spline_coupling::backward));
}
