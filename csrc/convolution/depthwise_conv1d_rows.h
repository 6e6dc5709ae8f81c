// Depthwise convolution with channels first: a vector holds consecutive positions of a channel.
//
// Decomposition: threads take pieces of a channel's row. Most vectors of a piece have all taps inside the row, and run
// the short loop; the first `left` positions, the last few and rows with sequences go through `Edge`, which chooses in
// each lane which taps exist.
#pragma once

#include "convolution/depthwise_conv1d.h"

namespace mpkernels {
namespace depthwise_conv1d {

// A row of one channel.
template <typename S>
struct Row {
  using T = Compute<S>;
  static constexpr int64_t L = lanes<T>;

  const Problem<S>& in;
  const S* x;
  const S* state;  // (left,), or null
  const int32_t* seq;
  const T* weight;
  T bias;

  Row(const Problem<S>& in_, int64_t b, int64_t c)
      : in(in_),
        x(in_.x + b * in_.x_batch + c * in_.x_line),
        state(in_.state == nullptr ? nullptr : in_.state + (b * in_.channels + c) * in_.left),
        seq(in_.sequences(b)),
        weight(in_.weight + c * in_.taps),
        bias(in_.bias == nullptr ? T(0) : in_.bias[c]) {}

  // The sequences of positions [p, p + count); those in front of x count as position 0, further lanes as padding.
  Mask<T> sequences(int64_t p, int64_t count) const {
    Mask<T> found;
    if (sizeof(T) == 4 && p >= 0 && count >= L) {
      std::memcpy(&found, seq + p, sizeof(found));
      return found;
    }
    for (int64_t i = 0; i < L; ++i) found[i] = i < count ? seq[std::max<int64_t>(p + i, 0)] : -1;
    return found;
  }

  // What tap k of positions [t, t + count) reads, 0 where it reads nothing; `exists` says where.
  Vector<T> tap(int64_t k, int64_t t, int64_t count, Mask<T> now, Mask<T>& exists) const {
    const int64_t p = t - in.shift(k);
    exists = first_lanes<T>(count);
    if (seq != nullptr) {
      const Mask<T> zero{};
      exists = exists & (sequences(p, count) == now) & (now >= zero);
    }
    Vector<T> value{};
    if (p >= 0) {
      value = load_first<S>(x + p, count);
    } else if (p + count <= 0) {
      if (state == nullptr) {
        exists = Mask<T>{};
        return value;
      }
      value = load_first<S>(state + in.left + p, count);
    } else {
      const int64_t inside = -p;  // the lane of position 0
      if (state == nullptr) exists = exists & ~first_lanes<T>(inside);
      for (int64_t i = 0; i < count; ++i) {
        if (i >= inside) {
          value[i] = to_compute(x[p + i]);
        } else if (state != nullptr) {
          value[i] = to_compute(state[in.left + p + i]);
        }
      }
    }
    return select<T>(exists, value, Vector<T>{});
  }

  // y at [t, t + count), taps chosen lane by lane.
  __attribute__((noinline)) Vector<T> edge(int64_t t, int64_t count, Mask<T> now) const {
    Vector<T> sum{};
    for (int64_t k = 0; k < in.taps; ++k) {
      Mask<T> exists;
      const Vector<T> value = tap(k, t, count, now, exists);
      sum = select<T>(exists, broadcast<T>(weight[k]) * value + sum, sum);
    }
    return sum + bias;
  }

  // y at [t, t + L), where all taps of all lanes are in x. K: the taps, where they are compiled in, else 0.
  template <int K>
  MPKERNELS_INLINE Vector<T> inner(int64_t t) const {
    Vector<T> sum{};
    const int64_t taps = K > 0 ? K : in.taps;
    const S* from = x + t - in.left;
#pragma GCC unroll 4
    for (int64_t k = 0; k < taps; ++k) sum = broadcast<T>(weight[k]) * load<S>(from + k * in.dilation) + sum;
    return sum + bias;
  }

  bool is_inner(int64_t t, int64_t end) const { return seq == nullptr && t >= in.left && t + L <= end; }
};

template <typename S, int K>
void forward_row(const Row<S>& row, S* out, int64_t begin, int64_t end, bool streamed) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const bool silu = row.in.silu;
  for (int64_t t = begin; t < end;) {
    if (row.is_inner(t, end)) {
      for (; t + L <= end; t += L) {
        const Vector<T> y = activation<T>(row.template inner<K>(t), silu);
        if (streamed) {
          stream_first<S>(out + t, y, L);
        } else {
          store<S>(out + t, y);
        }
      }
      continue;
    }
    const int64_t count = std::min(L, end - t);
    const Mask<T> now = row.seq == nullptr ? Mask<T>{} : row.sequences(t, count);
    Vector<T> y = activation<T>(row.edge(t, count, now), silu);
    if (row.seq != nullptr) y = select<T>(now >= Mask<T>{}, y, Vector<T>{});
    store_first<S>(out + t, y, count);
    t += L;
  }
}

template <typename S, int K>
void forward_rows(const Problem<S>& in, S* out) {
  constexpr int64_t piece = 16384;  // positions
  const int64_t pieces = (in.length + piece - 1) / piece;
  const int64_t rows = in.batch * in.channels;
  const bool streamed = rows * in.length * static_cast<int64_t>(sizeof(S)) > streamed_bytes;
  const int64_t grain = std::max<int64_t>(1, piece / std::max<int64_t>(in.length, 1));
  parallel_pieces(rows * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t index = task / pieces, begin = task % pieces * piece;
      const Row<S> row(in, index / in.channels, index % in.channels);
      forward_row<S, K>(row, out + index * in.length, begin, std::min(in.length, begin + piece), streamed);
    }
    if (streamed) finish_streams();
  });
}

// Positions of a piece of the backward. Gradients of y are recomputed for the reach behind a piece.
template <typename S>
int64_t backward_row_piece(const Problem<S>& in) {
  constexpr int64_t least = 8192, L = lanes<Compute<S>>;
  return (std::max(least, 4 * in.reach()) + L - 1) / L * L;
}

// Gradients of y at [begin, stop) into `of_y`, and the sums for weight and bias over [begin, end) into `sums`, K + 1
// vectors. Lanes behind the row get 0.
template <typename S, int K>
void of_outputs(const Row<S>& row, const S* gradient, int64_t begin, int64_t end, int64_t stop, Compute<S>* of_y,
                Compute<S>* sums) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const Problem<S>& in = row.in;
  const bool silu = in.silu;
  const int64_t taps = K > 0 ? K : in.taps;
  for (int64_t i = 0; i < (taps + 1) * L; ++i) sums[i] = T(0);
  Vector<T> total{};
  for (int64_t t = begin; t < stop;) {
    if (row.is_inner(t, end)) {
      Vector<T> kept_sums[K > 0 ? K : 1];
      if constexpr (K > 0) {
        for (int k = 0; k < K; ++k) kept_sums[k] = load<T>(sums + k * L);
      }
      for (; t + L <= end; t += L) {
        const Vector<T> u = of_activation<T>(load<S>(gradient + t), silu ? row.template inner<K>(t) : Vector<T>{}, silu);
        store<T>(of_y + t - begin, u);
        total += u;
        const S* from = row.x + t - in.left;
        if constexpr (K > 0) {
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) kept_sums[k] = u * load<S>(from + k * in.dilation) + kept_sums[k];
        } else {
          for (int64_t k = 0; k < taps; ++k) {
            store<T>(sums + k * L, u * load<S>(from + k * in.dilation) + load<T>(sums + k * L));
          }
        }
      }
      if constexpr (K > 0) {
        for (int k = 0; k < K; ++k) store<T>(sums + k * L, kept_sums[k]);
      }
      continue;
    }
    if (row.is_inner(t, stop) && t >= end) {  // behind the piece
      store<T>(of_y + t - begin, of_activation<T>(load<S>(gradient + t), silu ? row.template inner<K>(t) : Vector<T>{}, silu));
      t += L;
      continue;
    }
    const int64_t count = std::min(L, stop - t);
    const Mask<T> now = row.seq == nullptr ? Mask<T>{} : row.sequences(t, count);
    Mask<T> known = first_lanes<T>(count);
    if (row.seq != nullptr) known = known & (now >= Mask<T>{});
    Vector<T> u = load_first<S>(gradient + t, count);
    if (silu) u = of_activation<T>(u, row.edge(t, count, now), true);
    u = select<T>(known, u, Vector<T>{});
    store<T>(of_y + t - begin, u);
    if (t < end) {
      total += u;
      for (int64_t k = 0; k < taps; ++k) {
        Mask<T> exists;
        const Vector<T> value = row.tap(k, t, count, now, exists);
        const Vector<T> sum = load<T>(sums + k * L);
        store<T>(sums + k * L, select<T>(exists, u * value + sum, sum));
      }
    }
    t += L;
  }
  store<T>(sums + taps * L, total);
}

// The gradient of the inputs at [p, p + count), p >= -left, from gradients of y of [begin, stop), lane by lane.
template <typename S>
__attribute__((noinline)) Vector<Compute<S>> of_inputs_edge(const Row<S>& row, const Compute<S>* of_y, int64_t begin,
                                                            int64_t stop, int64_t p, int64_t count) {
  using T = Compute<S>;
  const Problem<S>& in = row.in;
  const Mask<T> now = row.seq == nullptr ? Mask<T>{} : row.sequences(p, count);
  Vector<T> sum{};
  for (int64_t k = in.taps - 1; k >= 0; --k) {
    const int64_t t = p + in.shift(k);
    const int64_t present = std::min(count, stop - t);
    if (present <= 0 || t + count <= 0) continue;
    Mask<T> exists = first_lanes<T>(present);
    Vector<T> value{};
    if (t < begin) {  // inputs of the state, whose first outputs lie in front of x: begin is 0
      exists = exists & ~first_lanes<T>(begin - t);
      for (int64_t i = begin - t; i < present; ++i) value[i] = of_y[t + i - begin];
    } else {
      value = load_first<T>(of_y + t - begin, present);
    }
    if (row.seq != nullptr) exists = exists & (row.sequences(t, present) == now) & (now >= Mask<T>{});
    sum = select<T>(exists, broadcast<T>(row.weight[k]) * value + sum, sum);
  }
  return sum;
}

template <typename S, int K>
void of_inputs(const Row<S>& row, const Compute<S>* of_y, int64_t begin, int64_t end, int64_t stop, S* of_x,
               bool streamed) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const Problem<S>& in = row.in;
  const int64_t taps = K > 0 ? K : in.taps, left = in.left, dilation = in.dilation;
  for (int64_t p = begin; p < end;) {
    if (row.seq == nullptr) {
      const T* weight = row.weight;
      for (; p + L <= end && p + L + left <= stop; p += L) {
        Vector<T> sum{};
        const T* from = of_y + p - begin + left;
#pragma GCC unroll 4
        for (int64_t k = taps - 1; k >= 0; --k) sum = broadcast<T>(weight[k]) * load<T>(from - k * dilation) + sum;
        if (streamed) {
          stream_first<S>(of_x + p, sum, L);
        } else {
          store<S>(of_x + p, sum);
        }
      }
      if (p >= end) break;
    }
    const int64_t count = std::min(L, end - p);
    store_first<S>(of_x + p, of_inputs_edge<S>(row, of_y, begin, stop, p, count), count);
    p += L;
  }
}

// Backward of rows; `parts` of a piece are those of row b, piece i of the row: b pieces + i.
template <typename S, int K>
void backward_rows(const Problem<S>& in, const Gradients<S>& to) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const int64_t piece = backward_row_piece(in), pieces = (in.length + piece - 1) / piece;
  const int64_t rows = in.batch * in.channels;
  const bool streamed = rows * in.length * static_cast<int64_t>(sizeof(S)) > streamed_bytes;
  const int64_t grain = std::max<int64_t>(1, piece / std::max<int64_t>(in.length, 1));
  parallel_pieces(rows * pieces, grain, [&](int64_t first, int64_t last) {
    T* of_y = scratch<T>(piece + in.reach() + 2 * L + (in.taps + 1) * L);
    T* sums = of_y + (piece + in.reach() + L) / L * L + L;
    for (int64_t task = first; task < last; ++task) {
      const int64_t index = task / pieces, i = task % pieces, begin = i * piece;
      const int64_t b = index / in.channels, c = index % in.channels;
      const int64_t end = std::min(in.length, begin + piece), stop = std::min(in.length, end + in.reach());
      const Row<S> row(in, b, c);
      of_outputs<S, K>(row, to.of_out + b * to.batch + c * to.line, begin, end, stop, of_y, sums);
      if (to.parts != nullptr) {
        T* parts = to.parts + (b * pieces + i) * (in.taps + 1) * in.channels + c;
        for (int64_t k = 0; k <= in.taps; ++k) parts[k * in.channels] = sum<T>(load<T>(sums + k * L));
      }
      if (to.of_x != nullptr) of_inputs<S, K>(row, of_y, begin, end, stop, to.of_x + index * in.length, streamed);
      if (to.of_state != nullptr && begin == 0) {
        S* of_state = to.of_state + index * in.left;
        for (int64_t j = 0; j < in.left; j += L) {
          const int64_t count = std::min(L, in.left - j);
          store_first<S>(of_state + j, of_inputs_edge<S>(row, of_y, 0, stop, j - in.left, count), count);
        }
      }
    }
    if (streamed) finish_streams();
  });
}

}  // namespace depthwise_conv1d
}  // namespace mpkernels
