// The sums over taps and channels: the masked convolution itself, and, with taps turned around and the roles of input
// and output channels exchanged, the gradient of its input.
//
//     out[f, y, x] = bias[f] + sum_{k < depth(f)} A[f, k] in[channel(k), y step_y + dy(k), x step_x + dx(k)]
//
// k runs over the seen taps, and within a tap over the channels; last comes the tap that colours share, its channels in
// the order in which more and more colours see them, so that the filters of a colour differ in their depth alone. What
// a mask hides takes no part at all.
//
// Decomposition: A is packed once a call, six filters beside each other. Threads take pieces of rows of a picture; a
// piece is copied into a window (masked_conv2d_window.h), whose pixels a tile reads in vectors as they lie there: there
// is no unfolded copy. A tile is 6 filters x 4 vectors of pixels (2 with 16 registers) and keeps its sums in registers
// over the whole depth: 24 fused multiply-adds for 4 loads, 6 broadcasts and an offset. An output is summed in the
// order of k, by one thread. Vectors are cut from the rows, or, where that wastes fewer lanes, from the window as it
// lies, across the zeros between rows.
//
// 2 FLOPs a filter, seen weight and pixel. Bytes: picture and output once; the packed weights, from L2, once a tile.
#pragma once

#include "common/matmul.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "convolution/masked_conv2d_window.h"

#include <limits>

namespace mpkernels {
namespace masked_conv2d {

// What is summed.
template <typename S>
struct Sums {
  Picture<S> in;
  int64_t step_y, step_x;
  std::vector<Tap> taps;  // in the order of k; the tap that colours share last
  bool shared_tap;        // whether there is one
  bool last_first;        // whether its channels are taken from the last one down
  int64_t colors;
  bool inclusive;
  const S* weight;  // of filter f, channel c and tap t at weight[f filter_stride + c channel_stride + t.index]
  int64_t filter_stride, channel_stride;
  const S* bias;
  int64_t filters;
  S* out;  // of (batch, f, y, x) at out[batch, f and y and x times their strides]
  int64_t rows, columns;
  int64_t batch_stride, plane_stride, row_stride, column_stride;

  int64_t full_depth() const { return static_cast<int64_t>(taps.size() - shared_tap) * in.channels; }

  // How many k the filters of a colour sum over.
  int64_t depth(int64_t color) const {
    if (!shared_tap) return full_depth();
    const int64_t seen = (last_first ? colors - 1 - color : color) + (inclusive ? 1 : 0);
    return full_depth() + seen * (in.channels / colors);
  }

  const Tap& tap(int64_t k) const { return taps[static_cast<size_t>(k / in.channels)]; }
  int64_t channel(int64_t k) const {
    const int64_t c = k % in.channels;
    return last_first && k >= full_depth() ? in.channels - 1 - c : c;
  }
};

// Up to tile_rows filters of one colour.
struct Block {
  int64_t filter;
  int64_t rows;
  int64_t depth;
  int64_t packed;  // where its weights start
};

template <typename S>
std::vector<Block> blocks_of(const Sums<S>& s) {
  std::vector<Block> found;
  const int64_t groups = s.shared_tap ? s.colors : 1, size = s.filters / groups;
  int64_t packed = 0;
  for (int64_t color = 0; color < groups; ++color) {
    const int64_t count = (size + tile_rows - 1) / tile_rows, depth = s.depth(color);
    for (int64_t i = 0; i < count; ++i) {  // of nearly equal size
      const int64_t begin = i * size / count, end = (i + 1) * size / count;
      found.push_back({color * size + begin, end - begin, depth, packed});
      packed += depth * (end - begin);
    }
  }
  return found;
}

// A of one block: to[k][row].
template <typename S>
void pack_block(const Sums<S>& s, const Block& block, Compute<S>* to) {
  const int64_t channels = s.in.channels;
  for (int64_t row = 0; row < block.rows; ++row) {
    const S* of_filter = s.weight + (block.filter + row) * s.filter_stride;
    for (int64_t c = 0; c < channels; ++c) {
      const S* from = of_filter + c * s.channel_stride;
      Compute<S>* column = to + c * block.rows + row;
      for (int64_t t = 0; (t + 1) * channels <= s.full_depth(); ++t, column += channels * block.rows) {
        *column = to_compute(from[s.taps[static_cast<size_t>(t)].index]);
      }
    }
    for (int64_t k = s.full_depth(); k < block.depth; ++k) {
      to[k * block.rows + row] = to_compute(of_filter[s.channel(k) * s.channel_stride + s.taps.back().index]);
    }
  }
}

// to[row][vectors] = sum_k a[k][row] window[offset[k] + at[.]...]
template <int ROWS, typename T>
void sum_tile(const T* a, const T* window, const int64_t* at, const int32_t* offset, int64_t begin, int64_t end,
              T* to) {
  Vector<T> sums[ROWS][tile_vectors] = {};
  const T* left = a + begin * ROWS;
  int64_t from[tile_vectors];
#pragma GCC unroll 4
  for (int n = 0; n < tile_vectors; ++n) from[n] = at[n];
  for (int64_t k = begin; k < end; ++k, left += ROWS) {
    const T* b = window + offset[k];
    Vector<T> right[tile_vectors];
#pragma GCC unroll 4
    for (int n = 0; n < tile_vectors; ++n) right[n] = load_raw(b + from[n]);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const Vector<T> factor = broadcast<T>(left[m]);
#pragma GCC unroll 4
      for (int n = 0; n < tile_vectors; ++n) sums[m][n] += factor * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < tile_vectors; ++n) store<T>(to + (m * tile_vectors + n) * lanes<T>, sums[m][n]);
  }
}

template <typename T>
using SumTile = void (*)(const T*, const T*, const int64_t*, const int32_t*, int64_t, int64_t, T*);
template <typename T>
inline constexpr SumTile<T> sum_tiles[tile_rows] = {sum_tile<1, T>, sum_tile<2, T>, sum_tile<3, T>,
                                                    sum_tile<4, T>, sum_tile<5, T>, sum_tile<6, T>};

// How the pixels of a piece are cut into vectors.
struct Cut {
  int64_t rows, columns, pitch;
  int64_t width;    // lanes of a vector
  bool across;      // whether vectors run across the zeros between rows
  int64_t vectors;  // of the piece

  Cut(int64_t rows, int64_t columns, int64_t pitch, int64_t width)
      : rows(rows), columns(columns), pitch(pitch), width(width) {
    const int64_t by_rows = rows * ((columns + width - 1) / width);
    vectors = ((rows - 1) * pitch + columns + width - 1) / width;
    across = vectors < by_rows;
    if (!across) vectors = by_rows;
  }

  int64_t tiles() const { return (vectors + tile_vectors - 1) / tile_vectors; }

  // Where in the window vector n starts.
  int64_t start(int64_t n) const {
    if (across) return n * width;
    const int64_t in_row = (columns + width - 1) / width;
    return n / in_row * pitch + n % in_row * width;
  }
};

// Lanes of a tile that are neighbours in the output.
struct Run {
  int64_t lane, count, y, x;
};

// The runs of one tile; returns how many.
template <typename T>
int64_t runs_of(const Cut& cut, int64_t tile, Run* runs) {
  int64_t found = 0;
  for (int64_t n = 0; n < tile_vectors && tile * tile_vectors + n < cut.vectors; ++n) {
    const int64_t start = cut.start(tile * tile_vectors + n);
    int64_t y = start / cut.pitch, x = start % cut.pitch;
    for (int64_t lane = 0; lane < lanes<T> && y < cut.rows; ++y, x = 0) {
      const int64_t count = std::min(cut.columns - x, lanes<T> - lane);
      if (count > 0) runs[found++] = {n * lanes<T> + lane, count, y, x};
      if (!cut.across) break;
      lane += cut.pitch - x;
    }
  }
  return found;
}

// Pieces whose tiles waste few lanes, and whose window is small.
template <typename T, typename S>
Window<T> choose_window(const Sums<S>& s) {
  constexpr int64_t most_numbers = (192 << 10) / sizeof(T), most_pixels = 16 * tile_vectors * lanes<T>;
  int64_t columns = s.columns;
  const auto numbers = [&](const Window<T>& w) { return w.plane * s.in.channels; };
  while (columns > 2 * tile_vectors * lanes<T> &&
         (columns > most_pixels ||
          numbers(window_of<T>(s.taps, s.step_y, s.step_x, 1, columns, s.columns, s.in.width)) > most_numbers)) {
    columns = ((columns + 1) / 2 + lanes<T> - 1) / lanes<T> * lanes<T>;
  }
  Window<T> best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  const auto count = static_cast<int64_t>(s.taps.size());
  for (int64_t rows = 1; rows <= s.rows; ++rows) {
    const Window<T> w = window_of<T>(s.taps, s.step_y, s.step_x, rows, columns, s.columns, s.in.width);
    if (rows > 1 && (rows * w.pitch > most_pixels || numbers(w) > most_numbers)) break;
    const int64_t whole = s.rows / rows, rest = s.rows % rows;
    int64_t tiles = whole * Cut(rows, columns, w.pitch, lanes<T>).tiles();
    if (rest > 0) tiles += Cut(rest, columns, w.pitch, lanes<T>).tiles();
    const int64_t pieces = whole + (rest > 0);
    const int64_t cost = tiles * tile_vectors * lanes<T> * s.filters * count + pieces * w.plane * 4;
    if (cost < least) {
      least = cost;
      best = w;
    }
  }
  return best;
}

template <typename S>
void run(const Sums<S>& s) {
  using T = Compute<S>;
  if (s.in.batches == 0 || s.filters == 0 || s.rows == 0 || s.columns == 0) return;
  const Window<T> window = choose_window<T>(s);
  STD_TORCH_CHECK(window.size(s.in.channels) < (int64_t{1} << 31), "masked_conv2d: a row reads more than 2^31 numbers");
  const std::vector<Block> blocks = blocks_of(s);
  const int64_t depth = s.shared_tap ? s.depth(s.last_first ? 0 : s.colors - 1) : s.full_depth();
  std::vector<int32_t> offset(static_cast<size_t>(depth));
  for (int64_t k = 0; k < depth; ++k) {
    const Tap& tap = s.tap(k);
    offset[static_cast<size_t>(k)] =
        static_cast<int32_t>(s.channel(k) * window.plane + window.position(tap.dy, tap.dx));
  }
  const std::unique_ptr<T[]> packed(new T[static_cast<size_t>(blocks.back().packed + blocks.back().depth * tile_rows)]);
  parallel_pieces(static_cast<int64_t>(blocks.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks[static_cast<size_t>(i)];
      pack_block(s, block, packed.get() + block.packed);
    }
  });

  const int64_t down = (s.rows + window.rows - 1) / window.rows;
  const int64_t across = (s.columns + window.columns - 1) / window.columns;
  parallel_pieces(s.in.batches * down * across, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t tile_size = tile_rows * tile_vectors * lanes<T>;
    T* to = scratch<T>(window.size(s.in.channels));
    alignas(64) T sums[tile_size + lanes<T>] = {};
    Run runs[tile_vectors * lanes<T>];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t batch = piece / (down * across);
      const int64_t y0 = piece / across % down * window.rows, x0 = piece % across * window.columns;
      const int64_t rows = std::min(window.rows, s.rows - y0), columns = std::min(window.columns, s.columns - x0);
      // rows that follow each other in the window and in the output are one
      const bool joined = window.pitch == columns && s.row_stride == columns && s.column_stride == 1;
      const Cut cut =
          joined ? Cut(1, rows * columns, rows * columns, lanes<T>) : Cut(rows, columns, window.pitch, lanes<T>);
      fill(window, s.in, batch, 0, s.in.channels, y0, x0, to);
      for (int64_t tile = 0; tile < cut.tiles(); ++tile) {
        int64_t at[tile_vectors];
        for (int64_t n = 0; n < tile_vectors; ++n) {
          at[n] = cut.start(std::min(tile * tile_vectors + n, cut.vectors - 1));
        }
        const int64_t run_count = runs_of<T>(cut, tile, runs);
        // taps that read above or below the picture in every row of the tile (the first ones reach farthest)
        const Run &first = runs[0], &last = runs[run_count - 1];
        const int64_t first_y = (y0 + (joined ? first.x / columns : first.y)) * s.step_y;
        const int64_t last_y = (y0 + (joined ? (last.x + last.count - 1) / columns : last.y)) * s.step_y;
        int64_t skipped = 0;
        for (const Tap& tap : s.taps) {
          if (last_y + tap.dy >= 0 && first_y + tap.dy < s.in.height) break;
          skipped += s.in.channels;
        }
        for (const Block& block : blocks) {
          const int64_t k0 = std::min(skipped, block.depth);
          sum_tiles<T>[block.rows - 1](packed.get() + block.packed, to, at, offset.data(), k0, block.depth, sums);
          for (int64_t row = 0; row < block.rows; ++row) {
            const T* from = sums + row * tile_vectors * lanes<T>;
            const T bias = s.bias == nullptr ? T(0) : static_cast<T>(to_compute(s.bias[block.filter + row]));
            S* plane = s.out + batch * s.batch_stride + (block.filter + row) * s.plane_stride;
            for (int64_t i = 0; i < run_count; ++i) {
              const Run& r = runs[i];
              S* out = plane + (y0 + r.y) * s.row_stride + (x0 + r.x) * s.column_stride;
              if (s.column_stride == 1) {
                store_first<S>(out, load_raw(from + r.lane) + bias, r.count);
              } else {
                for (int64_t j = 0; j < r.count; ++j)
                  out[j * s.column_stride] = static_cast<S>(from[r.lane + j] + bias);
              }
            }
          }
        }
      }
    }
  });
}

}  // namespace masked_conv2d
}  // namespace mpkernels
