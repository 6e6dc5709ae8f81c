// In which order the CPU kernels of the affine coupling walk through tensors of any strides: lines of elements, as long
// as all tensors allow, in pieces that do not depend on the number of threads.
#pragma once

#include "common/parallel.h"
#include "flows/affine_coupling_math.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mpkernels {
namespace affine_coupling {

// The tensors of a call (their strides are counted in elements), and the numbers of the elements of a sample.
enum Operand : int { in_x, in_raw, in_shift, in_mask, in_grad, numbers, out_x, out_raw, out_shift, operands };

struct Strides {
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

constexpr int64_t piece_elements = 16384;
constexpr int64_t line_elements = 1024;  // what is worked on at a time: its copies stay in the L1 cache
constexpr int64_t few_elements = 16;     // a sample of no more is a column of lines through all samples

// A part of all samples: sizes[0] x sizes[1] x sizes[2] lines of sizes[3] elements. The outer size is the batch, or,
// with few elements a sample, the inner one is.
struct Walk {
  bool along_batch;
  int64_t sizes[4];
  int64_t strides[operands][4];
  int64_t pieces;  // of a sample; along the batch of all of them
  int64_t lines;   // a piece has; 0 where a line has several pieces

  int64_t items() const { return along_batch ? pieces : sizes[0] * pieces; }
  int64_t item_elements() const {
    return std::max<int64_t>(1, along_batch ? sizes[0] * sizes[1] * sizes[2] * std::min(sizes[3], line_elements)
                                            : std::min(piece_elements, sizes[1] * sizes[2] * sizes[3]));
  }

  int64_t offset(int operand, int64_t a, int64_t b, int64_t c, int64_t i) const {
    const int64_t* s = strides[operand];
    return a * s[0] + b * s[1] + c * s[2] + i * s[3];
  }

  // Calls line(a, b, c, begin, end) for every line of a piece.
  template <typename Line>
  void run(int64_t item, const Line& line) const {
    if (along_batch) {
      const int64_t begin = item * line_elements, end = std::min(sizes[3], begin + line_elements);
      for (int64_t a = 0; a < sizes[0]; ++a) {
        for (int64_t b = 0; b < sizes[1]; ++b) {
          for (int64_t c = 0; c < sizes[2]; ++c) line(a, b, c, begin, end);
        }
      }
      return;
    }
    const int64_t a = item / pieces, piece = item % pieces;
    if (lines == 0) {
      const int64_t in_line = (sizes[3] + piece_elements - 1) / piece_elements;
      const int64_t row = piece / in_line, begin = piece % in_line * piece_elements;
      line(a, row / sizes[2], row % sizes[2], begin, std::min(sizes[3], begin + piece_elements));
      return;
    }
    const int64_t last = std::min(sizes[1] * sizes[2], (piece + 1) * lines);
    for (int64_t row = piece * lines; row < last; ++row) {
      line(a, row / sizes[2], row % sizes[2], int64_t{0}, sizes[3]);
    }
  }
};

// `given` are the strides of the operands that `present` says are there. Channels are not joined with what is inside
// them where `planes_apart`.
inline Walk plan(int64_t batch, int64_t channels, int64_t height, int64_t width, const Strides* given,
                 const bool* present, bool along_batch, bool planes_apart) {
  Walk walk{};
  walk.along_batch = along_batch;
  if (along_batch) {
    const int64_t sizes[4] = {channels, height, width, batch};
    std::copy_n(sizes, 4, walk.sizes);
    for (int o = 0; o < operands; ++o) {
      const int64_t strides[4] = {given[o].channel, given[o].row, given[o].column, given[o].batch};
      std::copy_n(strides, 4, walk.strides[o]);
    }
    walk.pieces = (batch + line_elements - 1) / line_elements;
  } else {
    // from the inside: each dimension joins the one inside it where that is a whole line in all tensors
    const int64_t sizes[3] = {width, height, channels};
    int at = 3;
    walk.sizes[0] = batch;
    walk.sizes[1] = walk.sizes[2] = walk.sizes[3] = 1;
    bool empty = true;
    for (int d = 0; d < 3; ++d) {
      if (sizes[d] == 1) continue;
      const auto stride = [&](int o) { return d == 0 ? given[o].column : d == 1 ? given[o].row : given[o].channel; };
      bool joins = !empty && !(d == 2 && planes_apart);
      for (int o = 0; o < operands && joins; ++o) {
        joins = !present[o] || stride(o) == walk.strides[o][at] * walk.sizes[at];
      }
      if (joins) {
        walk.sizes[at] *= sizes[d];
        continue;
      }
      if (!empty) --at;
      empty = false;
      walk.sizes[at] = sizes[d];
      for (int o = 0; o < operands; ++o) walk.strides[o][at] = stride(o);
    }
    for (int o = 0; o < operands; ++o) walk.strides[o][0] = given[o].batch;
    const int64_t rows = walk.sizes[1] * walk.sizes[2], inner = walk.sizes[3];
    if (inner > piece_elements) {
      walk.lines = 0;
      walk.pieces = rows * ((inner + piece_elements - 1) / piece_elements);
    } else {
      walk.lines = std::max<int64_t>(1, piece_elements / std::max<int64_t>(1, inner));
      walk.pieces = (rows + walk.lines - 1) / walk.lines;
    }
  }
  for (int o = 0; o < operands && walk.sizes[3] == 1; ++o) walk.strides[o][3] = 1;
  return walk;
}

// Which elements a pattern of indices keeps, as bytes along the elements of a sample: the first ones of what repeats.
struct Kept {
  std::vector<uint8_t> bytes;
  int64_t restart = 1;  // elements after which they begin again

  int64_t size() const { return static_cast<int64_t>(bytes.size()); }
  // Where the byte of an element is; those of the next elements follow, up to the end of bytes.
  int64_t place(int64_t element) const { return element % restart % size(); }
};

inline Kept kept_elements(int64_t pattern, int64_t parity, int64_t channels, int64_t height, int64_t width) {
  const int64_t plane = height * width, all = channels * plane;
  Kept kept;
  if (all == 0) return kept;
  const bool board = pattern == pattern_checkerboard;
  const bool constant = board && plane == 1;  // every plane is its element (0, 0)
  const int64_t unit = board ? width : plane, period = 2 * unit;
  // an even number of rows is a whole number of periods, and the next plane goes on where this one ends
  kept.restart = board && height % 2 == 1 && !constant ? plane : all;
  kept.bytes.resize(static_cast<size_t>((2 * line_elements + period - 1) / period * period));
  for (int64_t i = 0; i < kept.size(); ++i) {
    const int64_t number = constant ? 0 : i / unit + (board ? i % unit : 0);
    kept.bytes[static_cast<size_t>(i)] = number % 2 != parity;
  }
  return kept;
}

}  // namespace affine_coupling
}  // namespace mpkernels
