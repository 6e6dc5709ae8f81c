// Small matrix products of tiles that lie in the caches: C[m][n] += sum_k A(m, k) B[k][n].
//
// Lanes run along n. B is read a vector at a time, A a number at a time (broadcast), so A may be read along either of
// its dimensions as it lies in memory: attention multiplies with keys and values, and with their transposes, and copies
// neither; convolutions do the same with their weights. A tile of C stays in registers over the whole depth: 6 rows x 4
// vectors where there are 32 registers (24 fused multiply-adds for 4 + 6 loads), 6 x 2 where there are 16. One core of
// Zen 4 reaches 112 of 118 GFLOP/s.
#pragma once

#include "common/vector.h"

namespace mpkernels {

#if defined(__AVX512F__)
constexpr int tile_vectors = 4;
#else
constexpr int tile_vectors = 2;
#endif
constexpr int tile_rows = 6;

// A(m, k) is at data[m * row + k * depth].
template <typename T>
struct Left {
  const T* data;
  int64_t row;
  int64_t depth;

  MPKERNELS_INLINE Left from_row(int64_t m) const { return {data + m * row, row, depth}; }
};

template <int ROWS, int VECTORS, typename T>
MPKERNELS_INLINE void multiply_tile(const Left<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t depth,
                                    bool accumulate) {
  Vector<T> sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      sums[m][n] = accumulate ? load_raw(c + m * c_row + n * lanes<T>) : Vector<T>{};
    }
  }
  const T* left = a.data;
  for (int64_t k = 0; k < depth; ++k, left += a.depth, b += b_row) {
    Vector<T> right[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) right[n] = load_raw(b + n * lanes<T>);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const Vector<T> factor = broadcast<T>(left[m * a.row]);
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) sums[m][n] += factor * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) store<T>(c + m * c_row + n * lanes<T>, sums[m][n]);
  }
}

template <int VECTORS, typename T>
void multiply_columns(const Left<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows, int64_t depth,
                      bool accumulate) {
  int64_t m = 0;
  for (; m + tile_rows <= rows; m += tile_rows) {
    multiply_tile<tile_rows, VECTORS>(a.from_row(m), b, b_row, c + m * c_row, c_row, depth, accumulate);
  }
  if (rows - m >= 4) {
    multiply_tile<4, VECTORS>(a.from_row(m), b, b_row, c + m * c_row, c_row, depth, accumulate);
    m += 4;
  }
  for (; m < rows; ++m) {
    multiply_tile<1, VECTORS>(a.from_row(m), b, b_row, c + m * c_row, c_row, depth, accumulate);
  }
}

// C (rows, vectors lanes) = or += A (rows, depth) B (depth, vectors lanes); C is written in whole vectors.
template <typename T>
void multiply(const Left<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows, int64_t vectors,
              int64_t depth, bool accumulate) {
  int64_t n = 0;
  for (; n + tile_vectors <= vectors; n += tile_vectors) {
    multiply_columns<tile_vectors>(a, b + n * lanes<T>, b_row, c + n * lanes<T>, c_row, rows, depth, accumulate);
  }
  for (; n < vectors; ++n) {
    multiply_columns<1>(a, b + n * lanes<T>, b_row, c + n * lanes<T>, c_row, rows, depth, accumulate);
  }
}

// x[i] becomes the vector of all x[.][i]: log2(lanes) rounds of exchanges between pairs of vectors.
template <typename T, int K>
struct ExchangeLow {
  static constexpr int at(int i) { return (i & K) == 0 ? i : lanes<T> + i - K; }
};
template <typename T, int K>
struct ExchangeHigh {
  static constexpr int at(int i) { return (i & K) == 0 ? i + K : lanes<T> + i; }
};
template <typename T, int K = 1>
MPKERNELS_INLINE void transpose(Vector<T> (&x)[lanes<T>]) {
  if constexpr (K < lanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) {
      if ((i & K) == 0) {
        const Vector<T> low = shuffle<ExchangeLow<T, K>, T>(x[i], x[i + K]);
        const Vector<T> high = shuffle<ExchangeHigh<T, K>, T>(x[i], x[i + K]);
        x[i] = low;
        x[i + K] = high;
      }
    }
    transpose<T, 2 * K>(x);
  }
}

// Calls take(j, i, x) with the vector of row(i...i + lanes, j), for i < rows in steps of lanes and all j < columns:
// `row(i, j, count)` gives `count` numbers of row i from column j on. Lanes beyond the rows are 0.
template <typename T, typename Row, typename Take>
MPKERNELS_INLINE void transpose_rows(int64_t rows, int64_t columns, const Row& row, const Take& take) {
  for (int64_t i = 0; i < rows; i += lanes<T>) {
    for (int64_t j = 0; j < columns; j += lanes<T>) {
      const int64_t count = columns - j < lanes<T> ? columns - j : lanes<T>;
      Vector<T> block[lanes<T>];
      if (rows - i >= lanes<T>) {
#pragma GCC unroll 16
        for (int k = 0; k < lanes<T>; ++k) block[k] = row(i + k, j, count);
      } else {
        for (int k = 0; k < lanes<T>; ++k) block[k] = i + k < rows ? row(i + k, j, count) : Vector<T>{};
      }
      transpose<T>(block);
      if (count == lanes<T>) {
#pragma GCC unroll 16
        for (int k = 0; k < lanes<T>; ++k) take(j + k, i, block[k]);
      } else {
        for (int64_t k = 0; k < count; ++k) take(j + k, i, block[k]);
      }
    }
  }
}

// to[j][i] = row(i, j...), with rows of `to` to_row apart.
template <typename T, typename Row>
MPKERNELS_INLINE void transpose_into(T* to, int64_t to_row, int64_t rows, int64_t columns, const Row& row) {
  transpose_rows<T>(rows, columns, row, [&](int64_t j, int64_t i, Vector<T> x) { store<T>(to + j * to_row + i, x); });
}

}  // namespace mpkernels
