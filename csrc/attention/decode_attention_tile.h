// Products of a few queries with a run of keys, and weighted sums of a run of values: the inner loops of
// decode_attention.cpp, which describes them.
#pragma once

#include "common/vector.h"

#include <algorithm>

namespace mpkernels {
namespace decode_attention {
namespace {

constexpr int64_t piece_keys = 512;  // keys whose scores are kept at a time
constexpr int64_t run_keys = 32;  // keys whose values stay in the first-level cache; a multiple of any vector's lanes

template <typename T>
constexpr int tile_rows = lanes<T> < 4 ? lanes<T> : 4;
template <typename T>
constexpr int64_t score_stride = piece_keys + lanes<T>;

// x in all lanes, -0 as well (which broadcast() turns into 0).
template <typename T>
MPKERNELS_INLINE Vector<T> constant(T x) {
  return x - Vector<T>{};
}

// A full vector of half numbers by the processor's own conversion, where it has one.
MPKERNELS_INLINE Vector<float> load_half(const Half* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(
      _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  return load<Half>(from);
#endif
}

// Two vectors of a row. Those of bfloat16 are the low and the high halves of 32-bit words, elements 0, 2, 4, ... and
// 1, 3, 5, ...: so each takes one bit operation, and no shuffle.
template <typename S>
MPKERNELS_INLINE void load_pair(const S* from, Vector<Compute<S>>& a, Vector<Compute<S>>& b) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    Words words;
    std::memcpy(&words, from, sizeof(words));
    a = reinterpret_cast<Vector<float>>(words << 16);
    b = reinterpret_cast<Vector<float>>(words & 0xFFFF0000);
  } else if constexpr (std::is_same_v<S, Half>) {
    a = load_half(from);
    b = load_half(from + lanes<float>);
  } else {
    a = load<S>(from);
    b = load<S>(from + lanes<S>);
  }
}

// The place of element e of a row of `width` in the order that vectors of load_pair, then of load_first, have them.
template <typename S>
MPKERNELS_INLINE int64_t place_of(int64_t e, int64_t width) {
  constexpr int64_t L = lanes<Compute<S>>;
  if (!std::is_same_v<S, BFloat16> || e >= width / (2 * L) * (2 * L)) return e;
  return e / (2 * L) * (2 * L) + e % 2 * L + e % (2 * L) / 2;
}

// Lane l of the result is the sum of x[l], of as many vectors as a vector has lanes. In each step lanes with bit M go
// on with one half of the vectors, and the others with the other half.
template <typename T, int M>
struct OwnLane {
  static constexpr int at(int l) { return (l & M) != 0 ? lanes<T> + l : l; }
};
template <typename T, int M>
struct OtherLane {
  static constexpr int at(int l) { return (l & M) != 0 ? lanes<T> + (l ^ M) : l ^ M; }
};
template <typename T, int M = lanes<T> / 2>
MPKERNELS_INLINE Vector<T> sum_each(const Vector<T> (&x)[2 * M]) {
  Vector<T> half[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    half[i] = shuffle<OwnLane<T, M>, T>(x[i], x[i + M]) + shuffle<OtherLane<T, M>, T>(x[i], x[i + M]);
  }
  if constexpr (M > 1) {
    return sum_each<T, M / 2>(half);
  } else {
    return half[0];
  }
}

// Asks for the `bytes` that begin at an address, which may lie anywhere, into the second-level cache: what the first
// can wait for at a time is less than memory takes to answer. (Rows of several keys are read in turn, which the
// processor does not foresee: without this a core reads half as fast.)
template <typename S>
MPKERNELS_INLINE void fetch(const S* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 0, 2);
  }
}

// How many keys ahead of those that are worked on to fetch: 16 KiB, in whole runs.
template <typename S>
int64_t keys_ahead(int64_t width) {
  return std::clamp<int64_t>(16384 / (width * static_cast<int64_t>(sizeof(S))), run_keys, 4 * run_keys) / run_keys *
         run_keys;
}

// Rows of keys or values to fetch while a run is worked on, a row a key; none where `from` is null.
template <typename S>
struct Next {
  const S* from;
  int64_t row;
};

// Products q . k of R rows with `count` keys of a run.
template <typename S, int R, typename T = Compute<S>>
void score_tile(const T* queries,  // (R, stride), in the order of place_of, zeros behind
                int64_t query_stride,
                const S* keys,  // (count, key_stride)
                int64_t key_stride, int64_t count, int64_t width, Next<S> next,
                T* scores) {  // (R, score_stride), written up to the next multiple of the block
  constexpr int L = lanes<T>;
  constexpr int block = L / R;
  for (int64_t k = 0; k < count; k += block) {
    const S* at[block];
    for (int j = 0; j < block; ++j) at[j] = keys + std::min<int64_t>(k + j, count - 1) * key_stride;
    Vector<T> sums[L] = {};
    int64_t d = 0;
    for (; d + 2 * L <= width; d += 2 * L) {
      if (next.from != nullptr) {
#pragma GCC unroll 16
        for (int j = 0; j < block; ++j) fetch(next.from + (k + j) * next.row + d, 2 * L * sizeof(S));
      }
      Vector<T> qa[R], qb[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        qa[r] = load_raw<T>(queries + r * query_stride + d);
        qb[r] = load_raw<T>(queries + r * query_stride + d + L);
      }
#pragma GCC unroll 16
      for (int j = 0; j < block; ++j) {
        Vector<T> a, b;
        load_pair<S>(at[j] + d, a, b);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sums[r * block + j] += qa[r] * a;
          sums[r * block + j] += qb[r] * b;
        }
      }
    }
    for (; d < width; d += L) {
#pragma GCC unroll 16
      for (int j = 0; j < block; ++j) {
        const Vector<T> x = load_first<S>(at[j] + d, width - d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r * block + j] += load_raw<T>(queries + r * query_stride + d) * x;
      }
    }
    T each[L];
    const Vector<T> total = sum_each<T>(sums);
    std::memcpy(each, &total, sizeof(each));
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * score_stride<T> + k, each + r * block, block * sizeof(T));
  }
}

// Adds weight times value to `Vectors` vectors of the sums of R rows. `Hidden`: some weights are -0, their values
// may hold anything. `Whole`: the vectors are whole pairs; else there is one, of `left` elements.
template <typename S, int R, int Vectors, bool Hidden, bool Whole, typename T = Compute<S>>
MPKERNELS_INLINE void weigh(const S* values,  // (count, value_stride)
                            int64_t value_stride, int64_t count,
                            const T* weights,  // (R, score_stride)
                            Next<S> next,
                            T* sums,  // (R, sum_stride)
                            int64_t sum_stride, int64_t left) {
  constexpr int L = lanes<T>;
  Vector<T> total[R][Vectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < Vectors; ++v) total[r][v] = load_raw<T>(sums + r * sum_stride + v * L);
  }
  for (int64_t k = 0; k < count; ++k) {
    const S* row = values + k * value_stride;
    Vector<T> x[Vectors];
    if constexpr (Whole) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v += 2) load_pair<S>(row + v * L, x[v], x[v + 1]);
      if (next.from != nullptr) fetch(next.from + k * next.row, Vectors * L * sizeof(S));
    } else {
      x[0] = load_first<S>(row, left);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vector<T> weight = constant<T>(weights[r * score_stride<T> + k]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        if constexpr (Hidden) {
          total[r][v] += weight * select<T>(reinterpret_cast<Mask<T>>(weight) < 0, Vector<T>{}, x[v]);
        } else {
          total[r][v] += weight * x[v];
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < Vectors; ++v) store<T>(sums + r * sum_stride + v * L, total[r][v]);
  }
}

template <typename S, int R, bool Hidden, typename T = Compute<S>>
void weigh_tile(const S* values, int64_t value_stride, int64_t count, const T* weights, Next<S> next, T* sums,
                int64_t sum_stride, int64_t width) {
  constexpr int L = lanes<T>;
  constexpr int registers = MPKERNELS_VECTOR_BYTES == 64 ? 16 : 8;  // for the sums
  constexpr int most = std::min(8, std::max(2, registers / R));
  int64_t d = 0;
  for (; d + most * L <= width; d += most * L) {
    weigh<S, R, most, Hidden, true>(values + d, value_stride, count, weights,
                                    {next.from == nullptr ? nullptr : next.from + d, next.row}, sums + d, sum_stride,
                                    0);
  }
  if constexpr (most > 4) {
    for (; d + 4 * L <= width; d += 4 * L) {
      weigh<S, R, 4, Hidden, true>(values + d, value_stride, count, weights,
                                   {next.from == nullptr ? nullptr : next.from + d, next.row}, sums + d, sum_stride, 0);
    }
  }
  for (; d + 2 * L <= width; d += 2 * L) {
    weigh<S, R, 2, Hidden, true>(values + d, value_stride, count, weights,
                                 {next.from == nullptr ? nullptr : next.from + d, next.row}, sums + d, sum_stride, 0);
  }
  for (; d < width; d += L) {
    weigh<S, R, 1, Hidden, false>(values + d, value_stride, count, weights,
                                  {next.from == nullptr ? nullptr : next.from + d, next.row}, sums + d, sum_stride,
                                  width - d);
  }
}

// Calls f(rows' start, their number as a constant) for tiles that cover `count` rows; the last may reach behind.
template <typename T, typename F>
MPKERNELS_INLINE void each_tile(int64_t count, const F& f) {
  for (int64_t r = 0; r < count; r += tile_rows<T>) {
    const int64_t left = count - r;
    if (left == 1) {
      f(r, std::integral_constant<int, 1>{});
    } else if (left == 2 || tile_rows<T> == 2) {
      f(r, std::integral_constant<int, 2>{});
    } else {
      f(r, std::integral_constant<int, tile_rows<T>>{});
    }
  }
}

}  // namespace
}  // namespace decode_attention
}  // namespace mpkernels
