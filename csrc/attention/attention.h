// What the forward and the backward of attention on the CPU share: the arguments, which keys a block of queries sees,
// and the scores of a tile.
//
// A tile is `count` keys by one block of queries, keys down, queries in the lanes: S^T = K Q^T. A softmax over keys is
// then arithmetic between vectors, with nothing summed across lanes, and keys and values are read as they lie in memory
// (see common/matmul.h). Scores are in base 2: exp(x) = 2^(x log2 e).
#pragma once

#include "common/lane_mask.h"
#include "common/matmul.h"
#include "common/philox.h"
#include "common/vector.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace mpkernels {
namespace attention {

constexpr int64_t block_queries = 64;
constexpr double log2_e = 1.44269504088896340736;

template <typename T>
constexpr int64_t block_vectors = block_queries / lanes<T>;

constexpr int64_t vectors_for(int64_t count, int64_t lanes_of) {
  return (count + lanes_of - 1) / lanes_of;
}

// A score that stands for "hidden": far below every real one, and finite, so that no difference of two is a NaN.
template <typename T>
constexpr T hidden = T(-1e30);

// A (B, H, rows, .) tensor whose last dimension is contiguous.
template <typename S>
struct Heads {
  S* data;
  int64_t batch, head, row;

  S* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// A tensor that broadcasts to (B, H, L, S), strides 0 where it does.
template <typename S>
struct Broadcast {
  S* data;
  int64_t batch, head, row, column;

  S* at(int64_t b, int64_t h, int64_t i, int64_t j) const { return data + b * batch + h * head + i * row + j * column; }
};

template <typename S>
struct Problem {
  Heads<const S> query, key, value;
  int64_t batches, heads, key_heads, queries, keys, width, value_width;
  const int32_t *first, *last;  // or null
  int64_t interval_batch, interval_head;
  Broadcast<const bool> mask;  // or null
  Broadcast<const S> bias;     // or null
  double scale, softcap;
  double dropout_p;
  uint64_t seed;

  int64_t group() const { return heads / key_heads; }
  int64_t query_blocks() const { return (queries + block_queries - 1) / block_queries; }
  // what a product of query and key is multiplied with: with a softcap the tanh comes in between
  double factor() const { return softcap > 0 ? scale / softcap : scale * log2_e; }
  double cap() const { return softcap * log2_e; }
};

// The keys that a block of queries sees: none outside [low, high), all queries see those of [full_low, full_high).
struct KeyRange {
  int64_t low, high, full_low, full_high;
};

template <typename S>
KeyRange key_range(const Problem<S>& p, int64_t b, int64_t h, int64_t i0, int64_t rows) {
  if (p.first == nullptr) return {0, p.keys, 0, p.keys};
  const int32_t* first = p.first + b * p.interval_batch + h * p.interval_head + i0;
  const int32_t* last = p.last + b * p.interval_batch + h * p.interval_head + i0;
  KeyRange range{p.keys, 0, 0, p.keys};
  bool empty_row = false;
  for (int64_t i = 0; i < rows; ++i) {
    if (first[i] >= last[i]) {
      empty_row = true;
      continue;
    }
    range.low = std::min<int64_t>(range.low, first[i]);
    range.high = std::max<int64_t>(range.high, last[i]);
    range.full_low = std::max<int64_t>(range.full_low, first[i]);
    range.full_high = std::min<int64_t>(range.full_high, last[i]);
  }
  range.high = std::max(range.high, range.low);
  if (empty_row || range.full_high <= range.full_low) range.full_low = range.full_high = range.high;
  return range;
}

// One tile: keys [key, key + count) by the queries [query, query + rows) of a head.
struct Place {
  int64_t b, h, query, rows, key, count;
};

// What products need a tile of keys for: scores, sums over keys (add_columns), or both.
enum class KeyUse { scores, columns, both };

enum class Seen { none, some, all };

// Whether the queries of a tile see its keys, as far as the dense mask goes.
template <typename S>
Seen seen_by_mask(const Problem<S>& p, const Place& at) {
  if (p.mask.data == nullptr) return Seen::all;
  unsigned char any = 0, all = 1;
  for (int64_t i = 0; i < at.rows; ++i) {
    const bool* row = p.mask.at(at.b, at.h, at.query + i, at.key);
    if (p.mask.column == 1) {
      for (int64_t j = 0; j < at.count; ++j) {
        any |= static_cast<unsigned char>(row[j]);
        all &= static_cast<unsigned char>(row[j]);
      }
    } else {
      for (int64_t j = 0; j < at.count; ++j) {
        any |= static_cast<unsigned char>(row[j * p.mask.column]);
        all &= static_cast<unsigned char>(row[j * p.mask.column]);
      }
    }
    if (any && !all) return Seen::some;
    if (p.mask.row == 0) break;
  }
  return all ? Seen::all : any ? Seen::some : Seen::none;
}

// `count` numbers of a row from memory with a stride, widened.
template <typename T, typename X>
MPKERNELS_INLINE Vector<T> load_strided(const X* from, int64_t stride, int64_t count) {
  Vector<T> x{};
  for (int64_t j = 0; j < count; ++j) x[j] = static_cast<T>(from[j * stride]);
  return x;
}

// Hides from a tile of scores what interval and mask hide.
template <typename T, typename S>
void hide(const Problem<S>& p, const Place& at, T* scores) {
  const int64_t vectors = vectors_for(at.rows, lanes<T>);
  if (p.first != nullptr) {
    alignas(64) Integer<T> first[block_queries] = {}, last[block_queries] = {};
    const int64_t offset = at.b * p.interval_batch + at.h * p.interval_head + at.query;
    for (int64_t i = 0; i < at.rows; ++i) {
      first[i] = p.first[offset + i];
      last[i] = p.last[offset + i];
    }
    for (int64_t n = 0; n < vectors; ++n) {
      Mask<T> from, to;
      std::memcpy(&from, first + n * lanes<T>, sizeof(from));
      std::memcpy(&to, last + n * lanes<T>, sizeof(to));
      for (int64_t k = 0; k < at.count; ++k) {
        const auto j = static_cast<Integer<T>>(at.key + k);
        T* score = scores + k * block_queries + n * lanes<T>;
        const Mask<T> inside = (from <= j) & (j < to);
        store<T>(score, select<T>(inside, load_raw(score), broadcast<T>(hidden<T>)));
      }
    }
  }
  if (p.mask.data != nullptr) {
    const auto row_of = [&](int64_t i, int64_t j, int64_t count) {
      const bool* row = p.mask.at(at.b, at.h, at.query + i, at.key + j);
      if (p.mask.column == 1 && count == lanes<T>) {
        typedef signed char Bytes __attribute__((vector_size(lanes<T>)));
        Bytes bytes;
        std::memcpy(&bytes, row, sizeof(bytes));
        return __builtin_convertvector(bytes, Vector<T>);
      }
      return load_strided<T>(row, p.mask.column, count);
    };
    transpose_rows<T>(at.rows, at.count, row_of, [&](int64_t k, int64_t i, Vector<T> seen) {
      T* score = scores + k * block_queries + i;
      store<T>(score, choose<T>(above<T>(seen, Vector<T>{}), load_raw(score), broadcast<T>(hidden<T>)));
    });
  }
}

// Fetches what a tile needs of a tensor of scores, a row after the other: its rows lie pages apart, and arrive while
// the tile's products are computed.
template <int WRITE, typename S>
MPKERNELS_INLINE void prefetch_rows(const S* from, int64_t stride, int64_t rows, int64_t count) {
  constexpr int64_t line = 64 / sizeof(S);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < count + line - 1; j += line) __builtin_prefetch(from + i * stride + j, WRITE);
  }
}

template <typename S>
MPKERNELS_INLINE void prefetch_bias(const Problem<S>& p, const Place& at) {
  if (p.bias.data == nullptr || p.bias.column != 1) return;
  prefetch_rows<0>(p.bias.at(at.b, at.h, at.query, at.key), p.bias.row, p.bias.row == 0 ? 1 : at.rows, at.count);
}

// Products of keys and (scaled) queries become scores in base 2. With a softcap `slopes` (a tile, or null) receives
// d score / d product, 1 - tanh^2. Returns whether pairs may be hidden or vanish in the tile (`checked`, or a bias).
template <typename T, typename S>
bool finish_scores(const Problem<S>& p, const Place& at, bool checked, T* scores, T* slopes) {
  const int64_t vectors = vectors_for(at.rows, lanes<T>);
  if (p.softcap > 0) {
    const T cap = static_cast<T>(p.cap());
    for (int64_t k = 0; k < at.count; ++k) {
      for (int64_t n = 0; n < vectors; ++n) {
        const int64_t place = k * block_queries + n * lanes<T>;
        const Vector<T> t = hyperbolic_tangent<T>(load_raw(scores + place));
        store<T>(scores + place, t * cap);
        if (slopes != nullptr) store<T>(slopes + place, 1 - t * t);
      }
    }
  }
  if (p.bias.data != nullptr) {
    const auto row_of = [&](int64_t i, int64_t j, int64_t count) {
      const S* row = p.bias.at(at.b, at.h, at.query + i, at.key + j);
      return p.bias.column == 1 ? load_first<S>(row, count) : load_strided<T>(row, p.bias.column, count);
    };
    transpose_rows<T>(at.rows, at.count, row_of, [&](int64_t k, int64_t i, Vector<T> x) {
      // a bias of -inf, or so low that it is meant for one, hides, whatever the key holds
      T* score = scores + k * block_queries + i;
      const Vector<T> bias = x * static_cast<T>(log2_e);
      const Vector<T> low = broadcast<T>(hidden<T>);
      store<T>(score, choose<T>(above<T>(low, bias), low, load_raw(score) + bias));
    });
  }
  if (checked) hide<T>(p, at, scores);
  return checked || p.bias.data != nullptr;
}

// What dropout multiplies the weights of a tile with: 0, or 1 / (1 - p).
template <typename T, typename S>
void keep_factors(const Problem<S>& p, const Place& at, T* factors) {
  const T kept = p.dropout_p < 1 ? static_cast<T>(1 / (1 - p.dropout_p)) : T(0);
  const auto threshold = static_cast<uint64_t>(std::nearbyint(p.dropout_p * 4294967296.0));
  const auto row = static_cast<uint32_t>(at.b * p.heads + at.h);
  alignas(64) uint32_t words[4][block_queries];
  for (int64_t j = at.key / 4 * 4; j < at.key + at.count; j += 4) {
    for (int64_t i = 0; i < block_queries; ++i) {
      words[0][i] = static_cast<uint32_t>(j / 4);
      words[1][i] = static_cast<uint32_t>(at.query + i);
      words[2][i] = row;
      words[3][i] = 0;
    }
    philox<block_queries>(p.seed, words);
    for (int64_t word = std::max<int64_t>(at.key - j, 0); word < std::min<int64_t>(at.key + at.count - j, 4); ++word) {
      T* to = factors + (j + word - at.key) * block_queries;
      for (int64_t i = 0; i < block_queries; ++i) to[i] = words[word][i] < threshold ? T(0) : kept;
    }
  }
}

// (width, 64) -> rows of memory, times a factor
template <typename S, typename T>
void write_transposed(const T* from, int64_t rows, int64_t width, T factor, S* to, int64_t stride) {
  for (int64_t i = 0; i < rows; i += lanes<T>) {
    for (int64_t j = 0; j < width; j += lanes<T>) {
      Vector<T> block[lanes<T>];
      for (int k = 0; k < lanes<T>; ++k) {
        block[k] = j + k < width ? load_raw(from + (j + k) * block_queries + i) * factor : Vector<T>{};
      }
      transpose<T>(block);
      for (int64_t k = 0; k < std::min<int64_t>(lanes<T>, rows - i); ++k) {
        store_first<S>(to + (i + k) * stride + j, block[k], width - j);
      }
    }
  }
}

template <typename T>
bool all_finite(const T* x, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    Vector<Compute<T>> zero{};
    for (int64_t j = 0; j < width; j += lanes<Compute<T>>) zero += load_first<T>(x + i * stride + j, width - j) * 0;
    for (int n = 0; n < lanes<Compute<T>>; ++n) {
      if (zero[n] != 0) return false;  // a NaN, or an infinity times 0
    }
  }
  return true;
}

}  // namespace attention
}  // namespace mpkernels
