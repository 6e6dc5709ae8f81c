// What the passes of masked_linear.cpp share: products under a staircase, and operands in the order of degrees.
#pragma once

#include "common/matmul.h"
#include "common/parallel.h"
#include "common/scratch.h"

#include <algorithm>
#include <cstring>

namespace mpkernels {
namespace masked_linear {

template <typename T>
constexpr int64_t panel = tile_vectors * lanes<T>;  // columns of an operand that lie together
constexpr int64_t unit_block = 48;                  // units whose sums a thread forms at a time
constexpr int64_t depth_block = 128;                // of a panel: 32 KB
constexpr int64_t depth_most = 2048;                // of the weights that a thread sorts at a time: 384 KB

// Memory of the calling thread that all threads read, apart from the scratch<T> of each; USE tells pieces apart.
template <typename T, int USE>
T* shared_scratch(int64_t size) {
  struct Number {
    T value;
  };
  return reinterpret_cast<T*>(scratch<Number>(size));
}

// Pieces a thread takes at a time: all of them where the work is too little for threads to meet.
inline int64_t grain_of(int64_t pieces, int64_t multiplications) {
  return multiplications < 200000 ? std::max<int64_t>(pieces, 1) : 1;
}

// A permutation of units, its inverse, and whether it changes nothing.
struct Order {
  const int32_t* at;    // place -> unit
  const int32_t* rank;  // unit -> place
  int64_t size;
  bool identity;

  // Whether the `count` units from this place on are neighbours.
  bool neighbours(int64_t place, int64_t count) const {
    if (identity) return true;
    for (int64_t i = 1; i < count; ++i) {
      if (at[place + i] != at[place] + i) return false;
    }
    return true;
  }
};

template <int USE>
Order order_of(const int32_t* at, int64_t size) {
  int32_t* rank = shared_scratch<int32_t, USE>(std::max<int64_t>(size, 1));
  bool identity = true;
  for (int64_t i = 0; i < size; ++i) {
    rank[at[i]] = static_cast<int32_t>(i);
    identity &= at[i] == i;
  }
  return {at, rank, size, identity};
}

// C (units, vectors lanes) += A B, of which unit m takes the depths [from(m), to(m)) alone. The units of a tile share a
// product over the depths that all of them take; what is left of each is a product of one row. A(m, k) as in
// multiply(); the rows of B are panels.
template <typename T, typename From, typename To>
void multiply_stairs(const Left<T>& a, const T* b, T* c, int64_t c_row, int64_t units, int64_t vectors,
                     const From& from, const To& to) {
  for (int64_t m = 0; m < units; m += tile_rows) {
    const int64_t rows = std::min<int64_t>(tile_rows, units - m);
    int64_t low = from(m), high = to(m);
    for (int64_t i = 1; i < rows; ++i) {
      low = std::max<int64_t>(low, from(m + i));
      high = std::min<int64_t>(high, to(m + i));
    }
    const auto product = [&](int64_t first, int64_t count, int64_t begin, int64_t end) {
      if (begin >= end) return;
      const Left<T> left{a.data + first * a.row + begin * a.depth, a.row, a.depth};
      multiply(left, b + begin * panel<T>, panel<T>, c + first * c_row, c_row, count, vectors, end - begin, true);
    };
    if (low >= high) low = high = INT64_MAX;  // they share none
    product(m, rows, low, high);
    for (int64_t i = m; i < m + rows; ++i) {
      product(i, 1, from(i), std::min<int64_t>(low, to(i)));
      product(i, 1, std::max<int64_t>(high, from(i)), to(i));
    }
  }
}

// Rows [0, rows) of x (rows, units), transposed and in order: number (n, s) at
// to[(n / panel * units + s) * panel + n % panel]. Columns beyond the rows, up to a whole vector, are 0.
template <typename T, typename S>
void pack_transposed(const S* x, int64_t rows, const Order& order, T* to) {
  constexpr int64_t width = 256;
  const int64_t across = (order.size + width - 1) / width, panels = (rows + panel<T> - 1) / panel<T>;
  parallel_pieces(panels * across, grain_of(panels * across, rows * order.size), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t n = piece / across * panel<T>, j0 = piece % across * width;
      T* into = to + n * order.size;
      const S* from = x + n * order.size + j0;
      transpose_rows<T>(
          std::min(panel<T>, rows - n), std::min(width, order.size - j0),
          [&](int64_t i, int64_t j, int64_t count) { return load_first<S>(from + i * order.size + j, count); },
          [&](int64_t j, int64_t i, Vector<T> v) { store<T>(into + order.rank[j0 + j] * panel<T> + i, v); });
    }
  });
}

// Rows [0, rows) of x (rows, units) in order: number (n, s) at to[(s / panel * rows + n) * panel + s % panel]. Columns
// beyond the units, up to a whole panel, are 0.
template <typename T, typename S>
void pack_ordered(const S* x, int64_t rows, const Order& order, T* to) {
  const int64_t panels = (order.size + panel<T> - 1) / panel<T>;
  parallel_pieces(rows, std::max<int64_t>(grain_of(rows, rows * order.size), 16), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const S* from = x + n * order.size;
      for (int64_t q = 0; q < panels; ++q) {
        T* into = to + (q * rows + n) * panel<T>;
        const int64_t count = std::min(panel<T>, order.size - q * panel<T>);
        const int32_t* at = order.at + q * panel<T>;
        for (int64_t s = 0; s < count; ++s) into[s] = to_compute(from[at[s]]);
        for (int64_t s = count; s < panel<T>; ++s) into[s] = 0;
      }
    }
  });
}

// The numbers of a row at `count` places from `at` on. Where places jump, lines of the row are wanted in an order that
// no prefetcher foresees: `next`, the row that will be asked for after this one, is fetched meanwhile.
template <typename T, typename S>
MPKERNELS_INLINE void take_ordered(const S* row, const S* next, const Order& order, int64_t at, int64_t count, T* to) {
  if (order.identity) {
    int64_t k = 0;
    for (; k + lanes<T> <= count; k += lanes<T>) store<T>(to + k, load<S>(row + at + k));
    for (; k < count; ++k) to[k] = to_compute(row[at + k]);
    return;
  }
  constexpr int64_t line = 64 / sizeof(S);
  const int32_t* from = order.at + at;
  int64_t k = 0;
  for (; k + line <= count; k += line) {
    __builtin_prefetch(next + at + k);
#pragma GCC unroll 32
    for (int64_t i = 0; i < line; ++i) to[k + i] = to_compute(row[from[k + i]]);
  }
  for (; k < count; ++k) to[k] = to_compute(row[from[k]]);
}

// y[n][unit at place first + m] = c[m][n] + offset[m] for n < rows and m < units; `offset` may be null.
template <typename T, typename S>
void write_transposed(const T* c, int64_t c_row, int64_t units, const T* offset, const Order& order, int64_t first,
                      int64_t rows, S* y) {
  for (int64_t m = 0; m < units; m += lanes<T>) {
    const int64_t count = std::min<int64_t>(lanes<T>, units - m);
    const bool together = order.neighbours(first + m, count);
    const int32_t* at = order.at + first + m;
    const Vector<T> plus = offset == nullptr ? Vector<T>{} : load_first<T>(offset + m, count);
    transpose_rows<T>(
        count, rows,
        [&](int64_t i, int64_t j, int64_t columns) { return load_first<T>(c + (m + i) * c_row + j, columns); },
        [&](int64_t j, int64_t, Vector<T> v) {
          v += plus;
          S* row = y + j * order.size;
          if (together) {
            store_first<S>(row + at[0], v, count);
          } else {
            for (int64_t i = 0; i < count; ++i) row[at[i]] = static_cast<S>(v[i]);
          }
        });
  }
}

}  // namespace masked_linear
}  // namespace mpkernels
