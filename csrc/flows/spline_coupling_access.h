// How the CPU kernel of the spline coupling reads strided tensors, a vector of elements at a time, and writes
// gradients.
//
// Elements are numbered as they lie in a contiguous (B, C, S) tensor. A group is `count` of them, from number n on: a
// vector's lanes, fewer at the end of a piece of work.
#pragma once

#include "common/matmul.h"
#include "common/tensor.h"
#include "common/vector.h"

#include <algorithm>

namespace mpkernels {
namespace spline_coupling {

struct Shape {
  int64_t channels, positions;

  int64_t row() const { return channels * positions; }
};

struct Elements {
  Shape shape;
  int64_t n, count;
  int64_t b, c, s;  // of the first

  Elements(Shape shape_, int64_t n_, int64_t count_)
      : shape(shape_),
        n(n_),
        count(count_),
        b(n_ / shape_.row()),
        c(n_ / shape_.positions % shape_.channels),
        s(n_ % shape_.positions) {}
  bool in_one_channel() const { return s + count <= shape.positions; }

  // Calls f(i, b, c, s) for each element.
  template <typename F>
  MPKERNELS_INLINE void each(const F& f) const {
    int64_t b_i = b, c_i = c, s_i = s;
    for (int64_t i = 0; i < count; ++i) {
      f(i, b_i, c_i, s_i);
      if (++s_i == shape.positions) {
        s_i = 0;
        if (++c_i == shape.channels) {
          c_i = 0;
          ++b_i;
        }
      }
    }
  }
};

// A (B, C, S, ...) tensor of any strides.
template <typename S>
struct View {
  using T = Compute<S>;

  S* data;
  int64_t of_b, of_c, of_s;
  bool linear;  // whether elements lie of_s apart, whatever their channel

  View(const Tensor& tensor, Shape shape)
      : data(pointer<S>(tensor)), of_b(tensor.stride(0)), of_c(tensor.stride(1)), of_s(tensor.stride(2)) {
    if (shape.positions == 1) of_s = of_c;
    if (shape.row() == 1) of_s = of_b;
    const bool channels_follow = shape.positions == 1 || shape.channels == 1 || of_c == shape.positions * of_s;
    linear = channels_follow && (tensor.size(0) == 1 || shape.row() == 1 || of_b == shape.row() * of_s);
  }
  int64_t offset(int64_t b, int64_t c, int64_t s) const { return b * of_b + c * of_c + s * of_s; }

  // The elements, in T, into lanes<T> numbers; those beyond the group are 0.
  MPKERNELS_INLINE void load_into(const Elements& at, T* to) const {
    if (of_s == 1 && (linear || at.in_one_channel())) {
      store<T>(to, load_first<S>(data + offset(at.b, at.c, at.s), at.count));
      return;
    }
    store<T>(to, Vector<T>{});
    at.each([&](int64_t i, int64_t b, int64_t c, int64_t s) { to[i] = to_compute(data[offset(b, c, s)]); });
  }
};

// Where the rows of parameters of a group are: one parameter of all elements in each.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

template <typename S>
struct ParameterView {
  using T = Compute<S>;

  View<S> view;
  int64_t of_p, number;

  ParameterView(const Tensor& parameters, Shape shape)
      : view(parameters, shape), of_p(parameters.stride(3)), number(parameters.size(3)) {}

  // In place where the elements lie side by side, else transposed or gathered into `space` (P, lanes).
  MPKERNELS_INLINE Rows<T> load(const Elements& at, T* space) const {
    const bool side_by_side = view.of_s == 1 && (view.linear || at.in_one_channel());
    const S* first = view.data + view.offset(at.b, at.c, at.s);
    if (side_by_side && of_p != 1) {
      if constexpr (std::is_same_v<S, T>) {
        if (at.count == lanes<T>) return {first, of_p};
      }
      for (int64_t p = 0; p < number; ++p) store<T>(space + p * lanes<T>, load_first<S>(first + p * of_p, at.count));
    } else if (of_p == 1) {
      const S* elements[lanes<T>];
      if (view.linear) {
        for (int64_t i = 0; i < lanes<T>; ++i) elements[i] = first + i * view.of_s;
        for (int64_t i = at.count; i < lanes<T>; ++i) elements[i] = first;
      } else {
        at.each([&](int64_t i, int64_t b, int64_t c, int64_t s) { elements[i] = view.data + view.offset(b, c, s); });
        for (int64_t i = at.count; i < lanes<T>; ++i) elements[i] = first;
      }
      transpose_into<T>(space, lanes<T>, lanes<T>, number,
                        [&](int64_t i, int64_t p, int64_t count) { return load_first<S>(elements[i] + p, count); });
    } else {
      std::fill_n(space, number * lanes<T>, T(0));
      at.each([&](int64_t i, int64_t b, int64_t c, int64_t s) {
        const S* from = view.data + view.offset(b, c, s);
        for (int64_t p = 0; p < number; ++p) space[p * lanes<T> + i] = to_compute(from[p * of_p]);
      });
    }
    return {space, lanes<T>};
  }
};

// Rows (P, lanes) of gradients to a contiguous (B, C, S, P), or (B, C, P, S) tensor.
template <typename S>
MPKERNELS_INLINE void store_gradients(const Compute<S>* rows, int64_t number, const Elements& at, bool parameters_first,
                                      S* to) {
  using T = Compute<S>;
  if (parameters_first) {
    const int64_t positions = at.shape.positions, channel = at.b * at.shape.channels + at.c;
    if (at.in_one_channel()) {
      S* first = to + channel * number * positions + at.s;
      for (int64_t p = 0; p < number; ++p)
        store_first<S>(first + p * positions, load_raw<T>(rows + p * lanes<T>), at.count);
    } else {
      at.each([&](int64_t i, int64_t b, int64_t c, int64_t s) {
        S* first = to + (b * at.shape.channels + c) * number * positions + s;
        for (int64_t p = 0; p < number; ++p) first[p * positions] = static_cast<S>(rows[p * lanes<T> + i]);
      });
    }
    return;
  }
  S* first = to + at.n * number;
  transpose_rows<T>(
      number, lanes<T>, [&](int64_t p, int64_t i, int64_t) { return load_raw<T>(rows + p * lanes<T> + i); },
      [&](int64_t i, int64_t p, Vector<T> x) {
        if (i < at.count) store_first<S>(first + i * number + p, x, number - p);
      });
}

}  // namespace spline_coupling
}  // namespace mpkernels
