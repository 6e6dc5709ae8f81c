// Products of bfloat16 tiles: C (16, 16) float32 += A (16, 32) B (32, 16), the matrix unit of AMX, and the same on
// memory, so that tests on a processor without the unit run everything but its instructions.
//
// A lies in rows of pairs; B in pairs of rows: (16, 16) pairs, as attention_bfloat16.cpp packs them.
#pragma once

#include "common/vector.h"

#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mpkernels {
namespace attention {

using Pair = uint32_t;  // two bfloat16 numbers, the first in the low half

constexpr int tile_side = 16;

// No unit: nothing is done in tiles.
struct NoTiles {
  static constexpr bool exist = false;
  static void begin() {}
  static void end() {}
};

struct AmxTiles {
  static constexpr bool exist = true;

  // All eight tiles with 16 rows of 64 bytes. Other code of the thread may have left another shape.
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  }
  // (the kernel need not save what is released)
  static void end() { __asm__ volatile("tilerelease" ::: "memory"); }

  template <int TILE>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"n"(TILE));
  }
  template <int TILE>
  static void load(const void* from, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"n"(TILE), "r"(from), "r"(row_bytes) : "memory");
  }
  template <int TILE>
  static void store(void* to, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"n"(TILE), "r"(to), "r"(row_bytes) : "memory");
  }
  template <int C, int A, int B>
  static void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(C), "n"(A), "n"(B));
  }
};

struct EmulatedTiles {
  static constexpr bool exist = true;

  static void begin() {}
  static void end() {}
  template <int TILE>
  static void zero() {
    std::memset(tiles()[TILE], 0, sizeof(tiles()[TILE]));
  }
  template <int TILE>
  static void load(const void* from, int64_t row_bytes) {
    for (int i = 0; i < 16; ++i) std::memcpy(tiles()[TILE][i], static_cast<const char*>(from) + i * row_bytes, 64);
  }
  template <int TILE>
  static void store(void* to, int64_t row_bytes) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * row_bytes, tiles()[TILE][i], 64);
  }
  template <int C, int A, int B>
  static void multiply() {
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          const uint32_t a = tiles()[A][m][k], b = tiles()[B][k][n];
          float sum = number(tiles()[C][m][n]);
          sum += number(a << 16) * number(b << 16) + number(a & 0xFFFF0000) * number(b & 0xFFFF0000);
          std::memcpy(&tiles()[C][m][n], &sum, sizeof(sum));
        }
      }
    }
  }

 private:
  using Tile = uint32_t[16][16];

  static Tile* tiles() {
    thread_local Tile memory[8];
    return memory;
  }
  static float number(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
};

// A block of M x N tiles of C, in the first four tiles; two hold A, two hold B.
template <typename Tiles, int M, int N>
void multiply_tile_block(const Pair* a, int64_t a_row, const Pair* b, int64_t b_row, float* c, int64_t c_row,
                         int64_t depth, bool accumulate) {
  const int64_t a_bytes = a_row * 4, b_bytes = b_row * 4, c_bytes = c_row * 4;
  if (accumulate) {
    Tiles::template load<0>(c, c_bytes);
    if constexpr (N == 2) Tiles::template load<1>(c + 16, c_bytes);
    if constexpr (M == 2) Tiles::template load<2>(c + 16 * c_row, c_bytes);
    if constexpr (M == 2 && N == 2) Tiles::template load<3>(c + 16 * c_row + 16, c_bytes);
  } else {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    Tiles::template zero<2>();
    Tiles::template zero<3>();
  }
  for (int64_t k = 0; k < depth; k += tile_side) {
    Tiles::template load<4>(a + k, a_bytes);
    Tiles::template load<6>(b + k * b_row, b_bytes);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (N == 2) {
      Tiles::template load<7>(b + k * b_row + 16, b_bytes);
      Tiles::template multiply<1, 4, 7>();
    }
    if constexpr (M == 2) {
      Tiles::template load<5>(a + 16 * a_row + k, a_bytes);
      Tiles::template multiply<2, 5, 6>();
    }
    if constexpr (M == 2 && N == 2) Tiles::template multiply<3, 5, 7>();
  }
  Tiles::template store<0>(c, c_bytes);
  if constexpr (N == 2) Tiles::template store<1>(c + 16, c_bytes);
  if constexpr (M == 2) Tiles::template store<2>(c + 16 * c_row, c_bytes);
  if constexpr (M == 2 && N == 2) Tiles::template store<3>(c + 16 * c_row + 16, c_bytes);
}

// C (rows, columns) = or += A B in whole tiles: rows and columns are multiples of 16, so is the depth (in pairs).
// Rows of A are a_row pairs apart, those of B (pairs of rows) b_row pairs.
template <typename Tiles>
void multiply_in_tiles(const Pair* a, int64_t a_row, const Pair* b, int64_t b_row, float* c, int64_t c_row,
                       int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t n = 0; n < columns; n += 32) {
    const bool wide = columns - n >= 32;
    for (int64_t m = 0; m < rows; m += 32) {
      const Pair* left = a + m * a_row;
      const Pair* right = b + n;
      float* to = c + m * c_row + n;
      if (rows - m >= 32) {
        wide ? multiply_tile_block<Tiles, 2, 2>(left, a_row, right, b_row, to, c_row, depth, accumulate)
             : multiply_tile_block<Tiles, 2, 1>(left, a_row, right, b_row, to, c_row, depth, accumulate);
      } else {
        wide ? multiply_tile_block<Tiles, 1, 2>(left, a_row, right, b_row, to, c_row, depth, accumulate)
             : multiply_tile_block<Tiles, 1, 1>(left, a_row, right, b_row, to, c_row, depth, accumulate);
      }
    }
  }
}

// Whether the unit is there, the system lets this process use it, and it multiplies as it should.
inline bool amx_works() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bfloat16) == 0 || (d & tiles) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return false;
  Pair left[32][32], right[32][32];
  for (uint32_t i = 0; i < 32; ++i) {
    for (uint32_t j = 0; j < 32; ++j) {  // 1, 2, 3 or 4 as bfloat16, in an order of no symmetry
      const auto number = [](uint32_t x) {
        return x % 4 == 0 ? 0x3F80u : x % 4 == 1 ? 0x4000u : 0x4040u + 64 * (x & 1);
      };
      left[i][j] = number(i * 7 + j) | number(i + j * 5) << 16;
      right[i][j] = number(i * 3 + j * 11) | number(i * 5 + j * 2 + 1) << 16;
    }
  }
  float found[32][32], wanted[32][32];
  AmxTiles::begin();
  multiply_in_tiles<AmxTiles>(left[0], 32, right[0], 32, found[0], 32, 32, 32, 32, false);
  AmxTiles::end();
  multiply_in_tiles<EmulatedTiles>(left[0], 32, right[0], 32, wanted[0], 32, 32, 32, 32, false);
  return std::memcmp(found, wanted, sizeof(found)) == 0;  // small integers: exact in any order
#else
  return false;
#endif
}

}  // namespace attention
}  // namespace mpkernels
