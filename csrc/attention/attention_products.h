// The matrix products of attention, for numbers that are computed in T (float, or double for double inputs).
//
// Two layouts of a block of queries (or of gradients of their outputs): `packed`, (width, 64) with queries in the
// lanes, for products that sum over the width, and `natural`, (64, padded width), for products that sum over queries.
// Keys and values stay as they lie in memory; those of 16 bits are widened a tile at a time.
#pragma once

#include "attention/attention.h"

namespace mpkernels {
namespace attention {

template <typename S>
struct WideProducts {
  using Element = S;
  using T = Compute<S>;
  using Packed = T;   // numbers of packed blocks
  using Natural = T;  // numbers of natural blocks
  struct Session {};  // nothing to set up
  static constexpr bool widened = !std::is_same_v<S, T>;

  static int64_t padded(int64_t width) { return vectors_for(width, lanes<T>) * lanes<T>; }
  static int64_t packed_size(int64_t width) { return width * block_queries; }
  static int64_t natural_size(int64_t width) { return padded(width) * block_queries; }
  // whether rows of memory are natural as they are
  static bool natural_in_place(int64_t width) { return !widened && width % lanes<T> == 0; }
  // numbers of T that a tile of keys, or the factor of a product, takes where it is not used as it lies in memory
  static int64_t tile_size(int64_t count, int64_t width) { return widened ? count * padded(width) : 0; }

  // rows of memory -> packed; lanes without a query are 0
  static void pack(const S* from, int64_t stride, int64_t rows, int64_t width, T factor, Packed* to) {
    transpose_into<T>(to, block_queries, rows, width, [&](int64_t i, int64_t j, int64_t count) {
      return load_first<S>(from + i * stride + j, count) * factor;
    });
  }

  // rows of memory -> natural, padded with 0
  static void copy(const S* from, int64_t stride, int64_t rows, int64_t width, Natural* to) {
    const int64_t to_stride = padded(width);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; j += lanes<T>) {
        store<T>(to + i * to_stride + j, load_first<S>(from + i * stride + j, width - j));
      }
    }
  }

  // A tile of keys or values. `both`: for scores and for add_columns; a kind of products may lay them out by their use.
  struct Keys {
    Left<T> rows;  // A(key, d)

    static Keys of(const S* from, int64_t stride, int64_t count, int64_t width, KeyUse, T* workspace) {
      if constexpr (widened) {
        copy(from, stride, count, width, workspace);
        return {{workspace, padded(width), 1}};
      } else {
        return {{from, stride, 1}};
      }
    }
    // the keys from an even one on
    Keys from(int64_t key) const { return {rows.from_row(key)}; }
  };

  // scores (count, 64) = factor keys (count, width) packed (width, 64); the packed block has the factor already
  static void scores(const Keys& keys, const Packed* packed, int64_t count, int64_t rows, int64_t width, T, T* to) {
    multiply<T>(keys.rows, packed, block_queries, to, block_queries, count, vectors_for(rows, lanes<T>), width, false);
  }
  // sums (width, 64) += keys^T (width, count) tile (count, 64)
  static void add_columns(const Keys& keys, const T* tile, int64_t count, int64_t rows, int64_t width, T* sums, T*) {
    multiply<T>({keys.rows.data, 1, keys.rows.row}, tile, block_queries, sums, block_queries, width,
                vectors_for(rows, lanes<T>), count, true);
  }
  // sums (count, padded width) += tile (count, 64) natural (64, padded width), whose rows are `stride` apart
  static void add_rows(const T* tile, const Natural* natural, int64_t stride, int64_t count, int64_t rows,
                       int64_t width, T* sums, T*) {
    multiply<T>({tile, block_queries, 1}, natural, stride, sums, padded(width), count, vectors_for(width, lanes<T>),
                rows, true);
  }
};

}  // namespace attention
}  // namespace mpkernels
