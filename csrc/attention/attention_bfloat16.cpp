// Products of bfloat16 numbers with sums in float32: two at a time by VDPBF16PS of AVX512-BF16, which does twice the
// work of a fused multiply-add, or in tiles by the matrix unit of AMX (tiles.h). Weights and gradients of scores are
// rounded to bfloat16 before they are multiplied, as in every half-precision attention; the softmax and all sums are
// float32.
//
// Both take pairs along the dimension that a product sums over, so that
//   scores      sum over the width: rows of keys are pairs as they lie in memory; queries are packed (width / 2, 64);
//   add_columns sum over keys: keys are laid out (count / 2, width) in pairs (for tiles: its transpose), and so is the
//               tile of weights;
//   add_rows    sum over queries: rows of the tile are rounded; natural blocks are (32, width) in pairs of queries.
#include "attention/attention_bfloat16.h"

#include "attention/attention_products.h"
#include "attention/attention_run.h"

#include <cstdlib>
#include <string_view>

#if defined(__AVX512F__)

#include "attention/tiles.h"  // (x86 alone)

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512bf16")

namespace mpkernels {
namespace attention {
namespace {

template <int ROWS, int VECTORS>
MPKERNELS_INLINE void multiply_pairs_tile(const Left<Pair>& a, const Pair* b, int64_t b_row, float* c, int64_t c_row,
                                          int64_t depth, float factor, bool accumulate) {
  __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      sums[m][n] = accumulate ? _mm512_loadu_ps(c + m * c_row + n * 16) : _mm512_setzero_ps();
    }
  }
  const Pair* left = a.data;
  for (int64_t k = 0; k < depth; ++k, left += a.depth, b += b_row) {
    __m512bh right[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + n * 16);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      Pair pair;
      std::memcpy(&pair, left + m * a.row, sizeof(pair));  // (rows may start between two pairs)
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], both, right[n]);
    }
  }
  const __m512 scale = _mm512_set1_ps(factor);
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      _mm512_storeu_ps(c + m * c_row + n * 16, accumulate ? sums[m][n] : _mm512_mul_ps(sums[m][n], scale));
    }
  }
}

template <int VECTORS>
void multiply_pairs_columns(const Left<Pair>& a, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                            int64_t depth, float factor, bool accumulate) {
  int64_t m = 0;
  for (; m + tile_rows <= rows; m += tile_rows) {
    multiply_pairs_tile<tile_rows, VECTORS>(a.from_row(m), b, b_row, c + m * c_row, c_row, depth, factor, accumulate);
  }
  if (rows - m >= 4) {
    multiply_pairs_tile<4, VECTORS>(a.from_row(m), b, b_row, c + m * c_row, c_row, depth, factor, accumulate);
    m += 4;
  }
  for (; m < rows; ++m) {
    multiply_pairs_tile<1, VECTORS>(a.from_row(m), b, b_row, c + m * c_row, c_row, depth, factor, accumulate);
  }
}

// As multiply() of matmul.h, `depth` in pairs; what is not accumulated is multiplied with `factor`.
void multiply_pairs(const Left<Pair>& a, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                    int64_t vectors, int64_t depth, float factor, bool accumulate) {
  int64_t n = 0;
  for (; n + tile_vectors <= vectors; n += tile_vectors) {
    multiply_pairs_columns<tile_vectors>(a, b + n * 16, b_row, c + n * 16, c_row, rows, depth, factor, accumulate);
  }
  for (; n < vectors; ++n) {
    multiply_pairs_columns<1>(a, b + n * 16, b_row, c + n * 16, c_row, rows, depth, factor, accumulate);
  }
}

// Two vectors of numbers, rounded: pairs of their lanes.
MPKERNELS_INLINE __m512i pair_up(__m512 low, __m512 high) {
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // low in lanes 0..15, high in 16..31
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), rounded);
}

MPKERNELS_INLINE __mmask32 first_of_32(int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0u : (1u << count) - 1;
}

// Products in pairs, and, where there is a matrix unit (`Tiles`), as much of them in tiles as are whole.
template <typename Tiles>
struct PairProducts {
  using Element = BFloat16;
  using T = float;
  using Packed = Pair;
  using Natural = Pair;

  // The state of the matrix unit belongs to a thread: it is set up while a block is worked on.
  struct Session {
    Session() { Tiles::begin(); }
    ~Session() { Tiles::end(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  static int64_t pairs(int64_t count) { return (count + 1) / 2; }
  static int64_t padded(int64_t width) { return vectors_for(width, 16) * 16; }
  static int64_t packed_size(int64_t width) { return pairs(width) * block_queries; }
  static int64_t natural_size(int64_t width) { return padded(width) * block_queries / 2; }
  static bool natural_in_place(int64_t) { return false; }
  // pairs of keys, twice for tiles, and rows of an odd width
  static int64_t tile_size(int64_t count, int64_t width) { return 3 * padded(pairs(count)) * padded(width); }

  // Rows of pairs, transposed: 32-bit numbers like any other.
  static void pack(const BFloat16* from, int64_t stride, int64_t rows, int64_t width, float, Pair* to) {
    transpose_into<float>(reinterpret_cast<float*>(to), block_queries, rows, pairs(width),
                          [&](int64_t i, int64_t j, int64_t) {
                            const __mmask32 mask = first_of_32(width - 2 * j);
                            return (Vector<float>)_mm512_maskz_loadu_epi16(mask, from + i * stride + 2 * j);
                          });
  }

  // to[i / 2][d] = (row i, row i + 1) at d
  static void copy(const BFloat16* from, int64_t stride, int64_t rows, int64_t width, Pair* to) {
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < width; j += 16) {
        const auto mask = static_cast<__mmask16>(first_of_32(std::min<int64_t>(width - j, 16)));
        const BFloat16* row = from + i * stride + j;
        const __m512i low = _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(mask, row));
        const __m512i high = i + 1 < rows
                                 ? _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(mask, row + stride))
                                 : _mm512_setzero_si512();
        _mm512_storeu_si512(to + i / 2 * padded(width) + j,
                            _mm512_or_si512(low, _mm512_maskz_slli_epi32(0xFFFF, high, 16)));
      }
    }
  }

  struct Keys {
    const BFloat16* rows;  // for scores
    int64_t row;
    Left<Pair> columns;  // A(d, pair of keys)

    static Keys of(const BFloat16* from, int64_t stride, int64_t count, int64_t width, KeyUse use, float* workspace) {
      auto* memory = reinterpret_cast<Pair*>(workspace);
      const int64_t size = padded(pairs(count)) * padded(width);
      Keys keys{from, stride, {memory, 1, padded(width)}};
      if (use != KeyUse::scores) {
        copy(from, stride, count, width, memory);
        if constexpr (Tiles::exist) {  // tiles take the pairs of a column one behind the other
          Pair* transposed = memory + size;
          const int64_t to_row = padded(pairs(count));
          transpose_into<float>(reinterpret_cast<float*>(transposed), to_row, pairs(count), padded(width),
                                [&](int64_t i, int64_t j, int64_t) {
                                  return load_raw(reinterpret_cast<const float*>(memory) + i * padded(width) + j);
                                });
          keys.columns = {transposed, to_row, 1};
        }
      }
      // the last pair of an odd row would hold a number of the next, and rows start on pairs of an even distance alone
      if (use != KeyUse::columns && (width % 2 != 0 || stride % 2 != 0)) {
        auto* copied = reinterpret_cast<BFloat16*>(memory + 2 * size);
        for (int64_t i = 0; i < count; ++i) {
          std::memcpy(static_cast<void*>(copied + i * padded(width)), from + i * stride,
                      static_cast<size_t>(width) * sizeof(BFloat16));
          std::memset(static_cast<void*>(copied + i * padded(width) + width), 0,
                      static_cast<size_t>(padded(width) - width) * sizeof(BFloat16));
        }
        keys.rows = copied;
        keys.row = padded(width);
      }
      return keys;
    }
    Keys from(int64_t key) const {
      return {rows + key * row, row, {columns.data + key / 2 * columns.depth, columns.row, columns.depth}};
    }
  };

  static void scores(const Keys& keys, const Pair* packed, int64_t count, int64_t rows, int64_t width, float factor,
                     float* to) {
    multiply({reinterpret_cast<const Pair*>(keys.rows), keys.row / 2, 1}, packed, block_queries, to, block_queries,
             count, vectors_for(rows, 16), pairs(width), factor, false);
  }

  static void add_columns(const Keys& keys, const float* tile, int64_t count, int64_t rows, int64_t width, float* sums,
                          float* workspace) {
    auto* pairs_of_tile = reinterpret_cast<Pair*>(workspace);
    const int64_t vectors = vectors_for(rows, 16);
    for (int64_t k = 0; k < count; k += 2) {
      for (int64_t n = 0; n < vectors; ++n) {
        const float* low = tile + k * block_queries + n * 16;
        const __m512 high = k + 1 < count ? _mm512_loadu_ps(low + block_queries) : _mm512_setzero_ps();
        _mm512_storeu_si512(pairs_of_tile + k / 2 * block_queries + n * 16, pair_up(_mm512_loadu_ps(low), high));
      }
    }
    multiply(keys.columns, pairs_of_tile, block_queries, sums, block_queries, width, vectors, pairs(count), 1.0f, true);
  }

  static void add_rows(const float* tile, const Pair* natural, int64_t stride, int64_t count, int64_t rows,
                       int64_t width, float* sums, float* workspace) {
    auto* rounded = reinterpret_cast<Pair*>(workspace);
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t i = 0; i < rows; i += 32) {
        const float* from = tile + k * block_queries + i;
        // (lanes past the last query hold 0, or are not looked at)
        const __m512bh numbers = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
        _mm512_storeu_si512(rounded + (k * block_queries + i) / 2, (__m512i)numbers);
      }
    }
    multiply({rounded, block_queries / 2, 1}, natural, stride, sums, padded(width), count, vectors_for(width, 16),
             pairs(rows), 1.0f, true);
  }

 private:
  // Whole tiles, then what is left of the depth, then of the rows.
  static void multiply(const Left<Pair>& a, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                       int64_t vectors, int64_t depth, float factor, bool accumulate) {
    if constexpr (Tiles::exist) {
      const int64_t whole_rows = rows / tile_side * tile_side, whole_depth = depth / tile_side * tile_side;
      if (whole_rows > 0 && whole_depth > 0) {
        multiply_in_tiles<Tiles>(a.data, a.row, b, b_row, c, c_row, whole_rows, vectors * 16, whole_depth, accumulate);
        if (whole_depth < depth) {
          multiply_pairs({a.data + whole_depth, a.row, 1}, b + whole_depth * b_row, b_row, c, c_row, whole_rows,
                         vectors, depth - whole_depth, 1.0f, true);
        }
        if (!accumulate && factor != 1) {
          for (int64_t m = 0; m < whole_rows; ++m) {
            for (int64_t n = 0; n < vectors * 16; n += 16) {
              store<float>(c + m * c_row + n, load_raw(c + m * c_row + n) * factor);
            }
          }
        }
        multiply_pairs(a.from_row(whole_rows), b, b_row, c + whole_rows * c_row, c_row, rows - whole_rows, vectors,
                       depth, factor, accumulate);
        return;
      }
    }
    multiply_pairs(a, b, b_row, c, c_row, rows, vectors, depth, factor, accumulate);
  }
};

}  // namespace

namespace {

enum class Unit { none, pairs, tiles, emulated_tiles };

Unit best_unit() {
  static const Unit found = !__builtin_cpu_supports("avx512bf16") ? Unit::none
                            : amx_works()                         ? Unit::tiles
                                                                  : Unit::pairs;
  return found;
}

// What multiplies bfloat16 numbers here. Tests ask for another by MPKERNELS_BFLOAT16.
Unit unit() {
  const char* asked = std::getenv("MPKERNELS_BFLOAT16");
  const Unit best = best_unit();
  if (asked == nullptr || best == Unit::none) return best;
  const std::string_view name(asked);
  if (name == "wide") return Unit::none;
  if (name == "pairs") return Unit::pairs;
  if (name == "emulated_tiles") return Unit::emulated_tiles;
  return best;
}

template <typename F>
void with_products(const F& f) {
  switch (unit()) {
    case Unit::tiles:
      return f(PairProducts<AmxTiles>{});
    case Unit::emulated_tiles:
      return f(PairProducts<EmulatedTiles>{});
    default:
      return f(PairProducts<NoTiles>{});
  }
}

}  // namespace

bool multiplies_bfloat16() {
  return unit() != Unit::none;
}

void run_forward_bfloat16(const Problem<BFloat16>& p, const Heads<BFloat16>& out, float* lse) {
  with_products([&](auto products) { run_forward<decltype(products)>(p, out, lse); });
}

void run_backward_bfloat16(const Problem<BFloat16>& p, const Gradients<BFloat16>& g) {
  with_products([&](auto products) { run_backward<decltype(products)>(p, g); });
}

}  // namespace attention
}  // namespace mpkernels

#pragma GCC pop_options

#else

namespace mpkernels {
namespace attention {

bool multiplies_bfloat16() {
  return false;
}
void run_forward_bfloat16(const Problem<BFloat16>&, const Heads<BFloat16>&, float*) {}
void run_backward_bfloat16(const Problem<BFloat16>&, const Gradients<BFloat16>&) {}

}  // namespace attention
}  // namespace mpkernels

#endif
