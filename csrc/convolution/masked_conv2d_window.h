// The part of a picture that a thread works on: a copy with zeros around it, in the type that is computed in.
//
// An output (y, x) reads the picture at (y step_y + dy, x step_x + dx). A window holds what a piece of `rows` x
// `columns` outputs reads, a plane a channel, so that all outputs of a piece read a tap at one offset from each other:
// output (y, x) of the piece reads tap (dy, dx) of channel c at c plane + position(dy, dx) + y pitch + x. (With a step,
// a channel has one such plane for every phase, the remainder of a coordinate by its step.) Where a piece is as wide as
// the picture the zeros behind a row are those before the next one. A window is small: it stays in the L2 cache.
#pragma once

#include "common/tensor.h"
#include "common/vector.h"

#include <algorithm>
#include <vector>

namespace mpkernels {
namespace masked_conv2d {

// Where a tap reads, relative to its output, and its number in the weight.
struct Tap {
  int64_t dy;
  int64_t dx;
  int64_t index;
};

// A (B, C, H, W) tensor.
template <typename S>
struct Picture {
  const S* data;
  int64_t batches;
  int64_t channels;
  int64_t height;
  int64_t width;

  const S* plane(int64_t batch, int64_t channel) const { return data + (batch * channels + channel) * height * width; }
};

template <typename T>
struct Window {
  int64_t step_y, step_x;
  int64_t low_y, low_x;      // the least dy and dx, and not above 0
  int64_t extra_y, extra_x;  // rows and columns of a phase beyond one an output
  int64_t rows, columns;     // of outputs, in the largest piece
  int64_t pitch;
  int64_t plane;
  std::vector<int64_t> phases;  // those that a tap reads, of step_y x step_x

  int64_t position(int64_t dy, int64_t dx) const {
    const int64_t y = dy - low_y, x = dx - low_x;
    const int64_t phase = y % step_y * step_x + x % step_x;
    const int64_t found = std::find(phases.begin(), phases.end(), phase) - phases.begin();
    return (found * (rows + extra_y) + y / step_y) * pitch + x / step_x;
  }

  // Numbers that a window of so many channels takes: the last row is read, and copied, a little past its end.
  int64_t size(int64_t channels) const { return channels * plane + extra_x + 2 * lanes<T>; }
};

// A window for pieces of `rows` x `columns` outputs of a grid that is `all_columns` wide.
template <typename T>
Window<T> window_of(const std::vector<Tap>& taps, int64_t step_y, int64_t step_x, int64_t rows, int64_t columns,
                    int64_t all_columns) {
  Window<T> w{};
  w.step_y = step_y;
  w.step_x = step_x;
  w.rows = rows;
  w.columns = columns;
  int64_t high_y = 0, high_x = 0;
  for (const Tap& tap : taps) {
    w.low_y = std::min(w.low_y, tap.dy);
    w.low_x = std::min(w.low_x, tap.dx);
    high_y = std::max(high_y, tap.dy);
    high_x = std::max(high_x, tap.dx);
  }
  for (const Tap& tap : taps) {
    const int64_t phase = (tap.dy - w.low_y) % step_y * step_x + (tap.dx - w.low_x) % step_x;
    if (std::find(w.phases.begin(), w.phases.end(), phase) == w.phases.end()) w.phases.push_back(phase);
  }
  w.extra_y = (high_y - w.low_y) / step_y;
  w.extra_x = (high_x - w.low_x) / step_x;
  const bool shared = step_x == 1 && columns == all_columns;
  w.pitch = columns + (shared ? std::max(-w.low_x, high_x) : w.extra_x);
  // an odd number of cache lines, so that the same pixel of many channels does not fall into the same few sets
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t filled = static_cast<int64_t>(w.phases.size()) * (rows + w.extra_y) * w.pitch;
  w.plane = ((filled + line - 1) / line | 1) * line;
  return w;
}

// Fills the window of the piece that starts at output (y0, x0), with `count` channels from `channel` on.
template <typename S, typename T>
void fill(const Window<T>& w, const Picture<S>& picture, int64_t batch, int64_t channel, int64_t count, int64_t y0,
          int64_t x0, T* to) {
  const int64_t phase_rows = w.rows + w.extra_y;
  for (int64_t c = 0; c < count; ++c) {
    const S* from = picture.plane(batch, channel + c);
    T* row = to + c * w.plane;
    for (const int64_t phase : w.phases) {
      const int64_t first_x = x0 * w.step_x + w.low_x + phase % w.step_x;  // the picture's column at the row's start
      const int64_t skipped = first_x < 0 ? (-first_x + w.step_x - 1) / w.step_x : 0;
      const int64_t begin = std::min(skipped, w.pitch);
      const int64_t left = picture.width - first_x;
      const int64_t end = std::clamp<int64_t>(left > 0 ? (left + w.step_x - 1) / w.step_x : 0, begin, w.pitch);
      for (int64_t i = 0; i < phase_rows; ++i, row += w.pitch) {
        const int64_t y = (y0 + i) * w.step_y + w.low_y + phase / w.step_x;
        if (y < 0 || y >= picture.height || begin == end) {
          std::fill(row, row + w.pitch, T(0));
          continue;
        }
        const S* line = from + y * picture.width + first_x;
        std::fill(row, row + begin, T(0));
        if (w.step_x == 1) {
          // (a whole vector is stored at the end: what lies behind is written next)
          for (int64_t j = begin; j < end; j += lanes<T>) store<T>(row + j, load_first(line + j, end - j));
        } else {
          for (int64_t j = begin; j < end; ++j) row[j] = static_cast<T>(to_compute(line[j * w.step_x]));
        }
        std::fill(row + end, row + w.pitch, T(0));
      }
    }
    std::fill(row, to + (c + 1) * w.plane, T(0));
  }
  std::fill(to + count * w.plane, to + w.size(count), T(0));
}

}  // namespace masked_conv2d
}  // namespace mpkernels
