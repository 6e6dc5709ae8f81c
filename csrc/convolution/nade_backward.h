// The gradients of NADE's parameters, and of its input: the recurrence of nade.h run in reverse.
//
// With delta_d = g (x_d - sigmoid(logit_d)), from the last dimension to the first:
//
//   dL/dV_d += delta_d h_d       dL/da_d = dL/da_{d+1} + delta_d V_d h_d (1 - h_d)
//   dL/dW[:, d] += x_d dL/da_{d+1}      dL/dc += dL/da_1      dL/dx_d = g logit_d + W[:, d] . dL/da_{d+1}
//
// A piece of work is `tile_vectors` vectors of hidden units, whose weights and gradients (4 x D x 64 numbers) stay in
// the second cache; it takes all samples in order, a tile of them at a time, so that sums over samples need neither a
// second buffer nor an order that depends on threads. Nothing of size N D H is kept: a is noted every `block`
// dimensions on the way up, and h of one block is computed again on the way down. While x_d is 0, h stays, so that
// delta_d V_d is summed alone and multiplied by h (1 - h) once.
// For a sample and a dimension, two multiply-adds a unit; and for every x_d that is not 0 a sigmoid and four more.
#pragma once

#include "common/scratch.h"
#include "convolution/nade.h"

#include <algorithm>

namespace mpkernels {
namespace nade {

constexpr int backward_samples = 16;  // of a tile: h, dL/dh and dL/da of 16 x 64 units fill 12 KiB
constexpr int block = 32;             // dimensions between two notes of a

template <typename T>
constexpr int columns = tile_vectors * lanes<T>;  // hidden units of a piece

template <typename S>
struct Backward {
  const S* x;                // (N, D)
  const S* in_weight;        // (H, D)
  const S* in_bias;          // (H,)
  const S* out_weight;       // (D, H)
  const Compute<S>* deltas;  // (N, D)
  S* of_in_weight;           // (H, D)
  S* of_in_bias;             // (H,)
  S* of_out_weight;          // (D, H)
  Compute<S>* of_x;          // (pieces, N, D): W[:, d] . dL/da_{d+1} over the units of a piece; or null
  int64_t samples, dimensions, hidden;
};

// Rows of `columns` numbers.
template <typename T>
struct Work {
  T *in, *out, *of_in, *of_out;  // D rows each
  T* notes;                      // (blocks, backward_samples) rows: a at the start of each block
  T* found;                      // (backward_samples, block) rows: h in the block, one for each of its values
  T *a, *of_a, *of_h;            // backward_samples rows each
  T* of_in_bias;                 // one row

  static int64_t size(int64_t dimensions) {
    const int64_t blocks = (dimensions + block - 1) / block;
    return columns<T> * (4 * dimensions + backward_samples * (blocks + block + 3) + 1);
  }
  Work(T* memory, int64_t dimensions) {
    const int64_t blocks = (dimensions + block - 1) / block;
    const auto take = [&](int64_t rows) {
      T* taken = memory;
      memory += rows * columns<T>;
      return taken;
    };
    in = take(dimensions);
    out = take(dimensions);
    of_in = take(dimensions);
    of_out = take(dimensions);
    notes = take(blocks * backward_samples);
    found = take(int64_t{backward_samples} * block);
    a = take(backward_samples);
    of_a = take(backward_samples);
    of_h = take(backward_samples);
    of_in_bias = take(1);
  }
};

// Calls body(j) for the vectors of a row.
template <typename T, typename Body>
MPKERNELS_INLINE void each_vector(const Body& body) {
#pragma GCC unroll 4
  for (int j = 0; j < columns<T>; j += lanes<T>) body(j);
}

// of_a += of_h h (1 - h), of_h = 0
template <typename T>
MPKERNELS_INLINE void through_sigmoid(T* of_a, T* of_h, const T* h_row) {
  each_vector<T>([&](int j) {
    const Vector<T> h = load_raw(h_row + j);
    store<T>(of_a + j, load_raw(of_a + j) + load_raw(of_h + j) * (h * (1 - h)));
    store<T>(of_h + j, Vector<T>{});
  });
}

template <typename S>
void backward_tile(const Backward<S>& p, const Work<Compute<S>>& w, int64_t first, int64_t count,
                   Compute<S>* of_x_piece) {
  using T = Compute<S>;
  constexpr int width = columns<T>;
  const int64_t dimensions = p.dimensions;
  const auto value = [&](int64_t s, int64_t d) { return to_compute(p.x[(first + s) * dimensions + d]); };
  const auto step = [&](int64_t s, int64_t d, T x) {
    each_vector<T>([&](int j) {
      store<T>(w.a + s * width + j, load_raw(w.a + s * width + j) + x * load_raw(w.in + d * width + j));
    });
  };
  for (int64_t s = 1; s < count; ++s) std::copy_n(w.a, width, w.a + s * width);  // the caller wrote row 0
  for (int64_t d = 0; d < dimensions; ++d) {
    if (d % block == 0) std::copy_n(w.a, count * width, w.notes + d / block * backward_samples * width);
    for (int64_t s = 0; s < count; ++s) {
      if (const T x = value(s, d); x != 0) step(s, d, x);
    }
  }
  std::fill_n(w.of_a, count * width, T(0));
  std::fill_n(w.of_h, count * width, T(0));

  for (int64_t start = (dimensions - 1) / block * block; start >= 0; start -= block) {
    const int64_t end = std::min<int64_t>(start + block, dimensions);
    unsigned char place[block][backward_samples];  // which of the rows found for the sample has h_d
    std::copy_n(w.notes + start / block * backward_samples * width, count * width, w.a);
    for (int64_t s = 0; s < count; ++s) {
      T* rows = w.found + s * block * width;
      int last = -1;
      for (int64_t d = start; d < end; ++d) {
        const T x = d == start ? T(1) : value(s, d - 1);
        if (x != 0) {
          if (d > start) step(s, d - 1, x);
          ++last;
          each_vector<T>([&](int j) { store<T>(rows + last * width + j, logistic<T>(load_raw(w.a + s * width + j))); });
        }
        place[d - start][s] = static_cast<unsigned char>(last);
      }
    }
    const auto hidden = [&](int64_t s, int64_t d) { return w.found + (s * block + place[d - start][s]) * width; };
    for (int64_t d = end - 1; d >= start; --d) {
      const bool last = d + 1 == dimensions;  // no unit depends on it
      for (int64_t s = 0; s < count && !last; ++s) {
        const T x = value(s, d);
        if (x == 0 && of_x_piece == nullptr) continue;
        T *of_a = w.of_a + s * width, *of_h = w.of_h + s * width;
        // (at the end of a block of_h is 0 already)
        if (d + 1 < end) through_sigmoid<T>(of_a, of_h, hidden(s, d + 1));
        if (of_x_piece != nullptr) {
          Vector<T> dot = {};
          each_vector<T>([&](int j) { dot += load_raw(w.in + d * width + j) * load_raw(of_a + j); });
          of_x_piece[(first + s) * dimensions + d] = sum<T>(dot);
        }
        if (x == 0) continue;
        each_vector<T>([&](int j) {
          T* to = w.of_in + d * width + j;
          store<T>(to, load_raw(to) + x * load_raw(of_a + j));
        });
      }
      if (last && of_x_piece != nullptr) {
        for (int64_t s = 0; s < count; ++s) of_x_piece[(first + s) * dimensions + d] = 0;
      }
      Vector<T> weight[tile_vectors], of_weight[tile_vectors];
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) {
        weight[v] = load_raw(w.out + d * width + v * lanes<T>);
        of_weight[v] = load_raw(w.of_out + d * width + v * lanes<T>);
      }
      for (int64_t s = 0; s < count; ++s) {
        const T delta = p.deltas[(first + s) * dimensions + d];
        const T* h = hidden(s, d);
        T* of_h = w.of_h + s * width;
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v) {
          const int j = v * lanes<T>;
          of_weight[v] += delta * load_raw(h + j);
          store<T>(of_h + j, load_raw(of_h + j) + delta * weight[v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) store<T>(w.of_out + d * width + v * lanes<T>, of_weight[v]);
    }
    for (int64_t s = 0; s < count; ++s) through_sigmoid<T>(w.of_a + s * width, w.of_h + s * width, hidden(s, start));
  }
  for (int64_t s = 0; s < count; ++s) {
    each_vector<T>(
        [&](int j) { store<T>(w.of_in_bias + j, load_raw(w.of_in_bias + j) + load_raw(w.of_a + s * width + j)); });
  }
}

// All samples, for the hidden units from `piece` times columns on.
template <typename S>
void backward_piece(const Backward<S>& p, int64_t piece) {
  using T = Compute<S>;
  constexpr int width = columns<T>;
  const int64_t dimensions = p.dimensions, unit = piece * width;
  const int64_t count = std::min<int64_t>(width, p.hidden - unit);
  const Work<T> w(scratch<T>(Work<T>::size(dimensions)), dimensions);
  std::fill_n(w.in, dimensions * width, T(0));  // (units behind the last are 0)
  transpose_into<T>(w.in, width, count, dimensions, [&](int64_t i, int64_t j, int64_t some) {
    return load_first<S>(p.in_weight + (unit + i) * dimensions + j, some);
  });
  for (int64_t d = 0; d < dimensions; ++d) {
    const S* row = p.out_weight + d * p.hidden + unit;
    for (int64_t i = 0; i < width; ++i) w.out[d * width + i] = i < count ? to_compute(row[i]) : T(0);
  }
  std::fill_n(w.of_in, 2 * dimensions * width, T(0));  // and of_out behind it
  std::fill_n(w.of_in_bias, width, T(0));
  T* of_x_piece = p.of_x == nullptr ? nullptr : p.of_x + piece * p.samples * dimensions;
  for (int64_t first = 0; first < p.samples && dimensions > 0; first += backward_samples) {
    for (int64_t i = 0; i < width; ++i) w.a[i] = i < count ? to_compute(p.in_bias[unit + i]) : T(0);
    backward_tile(p, w, first, std::min<int64_t>(backward_samples, p.samples - first), of_x_piece);
  }
  for (int64_t d = 0; d < dimensions; ++d) {
    each_vector<T>([&](int j) {
      store_first<S>(p.of_out_weight + d * p.hidden + unit + j, load_raw(w.of_out + d * width + j), count - j);
    });
  }
  transpose_rows<T>(
      dimensions, count,
      [&](int64_t i, int64_t j, int64_t some) { return load_first<T>(w.of_in + i * width + j, some); },
      [&](int64_t j, int64_t i, Vector<T> x) {
        store_first<S>(p.of_in_weight + (unit + j) * dimensions + i, x, dimensions - i);
      });
  each_vector<T>([&](int j) { store_first<S>(p.of_in_bias + unit + j, load_raw(w.of_in_bias + j), count - j); });
}

}  // namespace nade
}  // namespace mpkernels
