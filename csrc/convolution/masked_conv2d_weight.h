// The gradients of the masked convolution's weight and bias:
//
//     dW[o, c, t] = sum_{b, y, x} g[o, y, x] in[c, y step_y + dy(t), x step_x + dx(t)]        db[o] = sum g[o, y, x]
//
// for the seen (t, c, o) alone; all others are exactly 0. Lanes run along the output channels, so that pictures of one
// channel fill them too: a tile is 6 pairs (t, c) x 4 vectors of outputs (2 with 16 registers), summed over pixels.
//
// Decomposition: a piece of work is a block of output channels, a chunk of input channels with all their taps, and a
// share of the pixels; there are enough of them, in number fixed by the shapes, for many threads. A thread walks over
// groups of rows: g is turned to [pixel][output], the chunk is copied into a window (masked_conv2d_window.h), and sums
// over a group are added to those before, which stay in its cache. Shares of the pixels, where a weight is so small
// that there are any, are added in their order: any number of threads gives the same bits.
#pragma once

#include "common/matmul.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "convolution/masked_conv2d_window.h"

namespace mpkernels {
namespace masked_conv2d {

template <typename S>
struct WeightGradient {
  Picture<S> in;
  Picture<S> grad;
  int64_t step_y, step_x;
  std::vector<Tap> taps;  // the tap that colours share last
  bool shared_tap;
  int64_t colors;
  bool inclusive;
  int64_t all_taps;  // of the weight
  S* out;            // (D, C, all_taps), filled with 0

  // The first output that sees a channel through tap number t.
  int64_t first_output(size_t t, int64_t channel) const {
    if (!shared_tap || t + 1 < taps.size()) return 0;
    const int64_t color = channel / (in.channels / colors);
    return std::min((color + (inclusive ? 0 : 1)) * (grad.channels / colors), grad.channels);
  }
};

// sums[row][vectors] += sum_k rows[row][at[k]] outputs[k][vectors]
template <int VECTORS, typename T>
void accumulate_tile(const T* const* rows, const int32_t* at, const T* outputs, int64_t pixels, T* const* sums) {
  Vector<T> found[tile_rows][VECTORS] = {};
  const T* from[tile_rows];
#pragma GCC unroll 8
  for (int m = 0; m < tile_rows; ++m) from[m] = rows[m];
  for (int64_t k = 0; k < pixels; ++k, outputs += VECTORS * lanes<T>) {
    Vector<T> right[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) right[n] = load_raw(outputs + n * lanes<T>);
    const int64_t pixel = at[k];
#pragma GCC unroll 8
    for (int m = 0; m < tile_rows; ++m) {
      const Vector<T> factor = broadcast<T>(from[m][pixel]);
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) found[m][n] += factor * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < tile_rows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      T* to = sums[m] + n * lanes<T>;
      store<T>(to, load_raw(to) + found[m][n]);
    }
  }
}

template <typename T>
void accumulate(int64_t vectors, const T* const* rows, const int32_t* at, const T* outputs, int64_t pixels,
                T* const* sums) {
  switch (vectors) {
    case 1:
      return accumulate_tile<1>(rows, at, outputs, pixels, sums);
    case 2:
      return accumulate_tile<2>(rows, at, outputs, pixels, sums);
#if defined(__AVX512F__)
    case 3:
      return accumulate_tile<3>(rows, at, outputs, pixels, sums);
    default:
      return accumulate_tile<4>(rows, at, outputs, pixels, sums);
#endif
  }
}

// A tap of a channel, in the order in which the sums stand.
struct Pair {
  size_t tap;
  int64_t channel;
  int64_t first_output;
};

template <typename S>
void run_weight(const WeightGradient<S>& g) {
  using T = Compute<S>;
  constexpr int64_t block_size = tile_vectors * lanes<T>, most_pixels = 256, rows_of_chunk = 16 * tile_rows;
  constexpr int64_t pieces_wanted = 32;
  const int64_t outputs = g.grad.channels, channels = g.in.channels, height = g.grad.height, width = g.grad.width;
  const auto count = static_cast<int64_t>(g.taps.size());
  const int64_t pixels_in_all = g.in.batches * height * width;
  if (pixels_in_all == 0 || outputs == 0 || channels == 0 || count == 0) return;

  const int64_t columns = std::min(width, most_pixels);
  const int64_t rows = std::clamp<int64_t>(most_pixels / columns, 1, height);
  const Window<T> window = window_of<T>(g.taps, g.step_y, g.step_x, rows, columns, width);
  const int64_t down = (height + rows - 1) / rows, across = (width + columns - 1) / columns;
  const int64_t groups = g.in.batches * down * across;
  const int64_t chunk = std::min(channels, std::max<int64_t>(1, rows_of_chunk / count));
  const int64_t chunks = (channels + chunk - 1) / chunk, blocks = (outputs + block_size - 1) / block_size;
  const int64_t shares = std::clamp<int64_t>(pieces_wanted / (chunks * blocks), 1, groups);
  const int64_t weight_size = outputs * channels * g.all_taps;
  STD_TORCH_CHECK(window.size(chunk) < (int64_t{1} << 31), "masked_conv2d: a row reads more than 2^31 numbers");
  std::vector<T> partial(static_cast<size_t>(shares > 1 ? shares * weight_size : 0));

  parallel_pieces(chunks * blocks * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t share = piece % shares, block = piece / shares % blocks, c0 = piece / shares / blocks * chunk;
      const int64_t o0 = block * block_size, block_outputs = std::min(block_size, outputs - o0);
      const int64_t vectors = (block_outputs + lanes<T> - 1) / lanes<T>, padded = vectors * lanes<T>;
      const int64_t chunk_channels = std::min(chunk, channels - c0);
      std::vector<Pair> pairs;
      for (int64_t c = c0; c < c0 + chunk_channels; ++c) {
        for (size_t t = 0; t < g.taps.size(); ++t) {
          const int64_t first = g.first_output(t, c);
          if (first < o0 + block_outputs) pairs.push_back({t, c, first});
        }
      }
      const auto pair_count = static_cast<int64_t>(pairs.size());
      const int64_t tiles = (pair_count + tile_rows - 1) / tile_rows;

      const int64_t turned_size = most_pixels * padded + block_size * lanes<T>;
      const int64_t sums_size = (tiles * tile_rows + 1) * padded;
      T* sums = scratch<T>(sums_size + turned_size + window.size(chunk_channels));
      T* turned = sums + sums_size;
      T* seen = turned + turned_size;
      std::fill(sums, sums + sums_size, T(0));
      int32_t at[most_pixels];

      for (int64_t group = share * groups / shares; group < (share + 1) * groups / shares; ++group) {
        const int64_t batch = group / (down * across);
        const int64_t y0 = group / across % down * rows, x0 = group % across * columns;
        const int64_t group_rows = std::min(rows, height - y0), group_columns = std::min(columns, width - x0);
        const int64_t pixels = group_rows * group_columns;
        for (int64_t i = 0; i < pixels; ++i) {
          at[i] = static_cast<int32_t>(i / group_columns * window.pitch + i % group_columns);
        }
        fill(window, g.in, batch, c0, chunk_channels, y0, x0, seen);
        for (int64_t y = 0; y < group_rows; ++y) {
          // (whole vectors of outputs; a row's pixels are neighbours)
          const int64_t in_row = (y0 + y) * width + x0;
          T* to = turned + y * group_columns * padded;
          transpose_rows<T>(
              block_outputs, group_columns,
              [&](int64_t o, int64_t x, int64_t n) { return load_first(g.grad.plane(batch, o0 + o) + in_row + x, n); },
              [&](int64_t x, int64_t o, Vector<T> v) { store<T>(to + x * padded + o, v); });
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const T* rows_of_tile[tile_rows];
          T* sums_of_tile[tile_rows];
          for (int64_t m = 0; m < tile_rows; ++m) {
            // (behind the last pair the first one is summed once more, to where nobody looks)
            const int64_t i = tile * tile_rows + m;
            const Pair& pair = pairs[static_cast<size_t>(i < pair_count ? i : 0)];
            const Tap& tap = g.taps[pair.tap];
            rows_of_tile[m] = seen + (pair.channel - c0) * window.plane + window.position(tap.dy, tap.dx);
            sums_of_tile[m] = sums + i * padded;
          }
          accumulate<T>(vectors, rows_of_tile, at, turned, pixels, sums_of_tile);
        }
      }

      for (int64_t i = 0; i < pair_count; ++i) {
        const Pair& pair = pairs[static_cast<size_t>(i)];
        for (int64_t o = std::max(pair.first_output, o0); o < o0 + block_outputs; ++o) {
          const T found = sums[i * padded + o - o0];
          const int64_t to = (o * channels + pair.channel) * g.all_taps + g.taps[pair.tap].index;
          if (shares > 1) {
            partial[static_cast<size_t>(share * weight_size + to)] = found;
          } else {
            g.out[to] = static_cast<S>(found);
          }
        }
      }
    }
  });
  if (shares == 1) return;
  parallel_pieces(weight_size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T found = 0;
      for (int64_t share = 0; share < shares; ++share) {
        found += partial[static_cast<size_t>(share * weight_size + i)];
      }
      g.out[i] = static_cast<S>(found);
    }
  });
}

// Sums over a picture, then over pictures.
template <typename S>
void run_bias(const Picture<S>& grad, S* out) {
  using T = Compute<S>;
  const int64_t pixels = grad.height * grad.width;
  parallel_pieces(grad.channels, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, grad.batches * pixels)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t o = begin; o < end; ++o) {
                      T total = 0;
                      for (int64_t batch = 0; batch < grad.batches; ++batch) {
                        const S* from = grad.plane(batch, o);
                        Vector<T> of_picture{};
                        for (int64_t i = 0; i < pixels; i += lanes<T>) of_picture += load_first(from + i, pixels - i);
                        total += sum<T>(of_picture);
                      }
                      out[o] = static_cast<S>(total);
                    }
                  });
}

}  // namespace masked_conv2d
}  // namespace mpkernels
