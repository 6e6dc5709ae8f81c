// Convolutions over time as products of small tiles, for the CPU kernels of dilated_conv1d and gated_residual_layer.
//
// Lanes run along time. A panel is 64 positions of some channels, packed from wherever they lie (either memory order,
// any dtype, the state before the sequence, zeros outside), so that nothing is ever padded or unfolded in memory. The
// product of a tap is then (outputs x channels) times (channels x 64): `multiply` of common/matmul.h with the weights
// read as they lie. Packing costs a load and a store of a vector that `outputs` multiply-adds then read.
//
// The sums of an output run over the taps from the first on, and within a tap over the channels, one after another from
// zero: the bits of an output depend on nothing but its own receptive field.
#pragma once

#include "common/matmul.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "common/vector.h"

#include <algorithm>
#include <memory>

namespace mpkernels {
namespace convolution {

constexpr int64_t panel_columns = 64;
constexpr int64_t panel_depth = 64;  // channels that are packed at a time: 16 KiB of float32

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// (B, C, T) numbers, and what came before them: (B, C, left), contiguous, or nothing.
template <typename S>
struct Signal {
  S* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, position_stride = 0;
  int64_t channels = 0, length = 0;
  S* state = nullptr;
  int64_t left = 0;

  Signal() = default;
  explicit Signal(const Tensor& x)
      : data(pointer<S>(x)),
        batch_stride(x.stride(0)),
        channel_stride(x.stride(1)),
        position_stride(x.stride(2)),
        channels(x.size(1)),
        length(x.size(2)) {
    // (a dimension of one element has any stride)
    if (length == 1) position_stride = 1;
    if (channels == 1 && position_stride != 1) channel_stride = 1;
  }
  Signal(const Tensor& x, const std::optional<Tensor>& before, int64_t left) : Signal(x) {
    state = pointer<S>(before);
    this->left = before.has_value() ? left : 0;
  }

  S* at(int64_t b, int64_t c, int64_t t) const {
    return data + b * batch_stride + c * channel_stride + t * position_stride;
  }
  S* before(int64_t b, int64_t c, int64_t t) const { return state + (b * channels + c) * left + left + t; }  // t < 0
  // Which of the positions [first, first + count) exist, counted from `first`.
  Range inside(int64_t first, int64_t count) const {
    return {std::max<int64_t>(0, -left - first), std::min(count, length - first)};
  }
};

// panel[c][j] = x(channel + c, first + j) for c < channels and j < 64; 0 where there is no such position.
template <typename S, typename T = Compute<S>>
void pack(const Signal<const S>& x, int64_t b, int64_t channel, int64_t channels, int64_t first, T* panel) {
  const bool whole = first >= 0 && first + panel_columns <= x.length;
  if (whole && x.position_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* from = x.at(b, channel + c, first);
#pragma GCC unroll 4
      for (int64_t j = 0; j < panel_columns; j += lanes<T>) store<T>(panel + c * panel_columns + j, load<S>(from + j));
    }
    return;
  }
  if (whole && x.channel_stride == 1) {
    const S* from = x.at(b, channel, first);
    transpose_into<T>(panel, panel_columns, panel_columns, channels, [&](int64_t j, int64_t c, int64_t count) {
      return load_first<S>(from + j * x.position_stride + c, count);
    });
    return;
  }
  const int64_t begin = std::clamp<int64_t>(-first, 0, panel_columns);
  const int64_t end = std::clamp<int64_t>(x.length - first, begin, panel_columns);
  const int64_t state_begin = std::clamp<int64_t>(-x.left - first, 0, begin);
  for (int64_t c = 0; c < channels; ++c) {
    T* to = panel + c * panel_columns;
    std::fill_n(to, panel_columns, T(0));
    for (int64_t j = state_begin; x.left > 0 && j < begin; ++j) {
      to[j] = to_compute<S>(*x.before(b, channel + c, first + j));
    }
    if (begin == end) continue;
    const S* from = x.at(b, channel + c, first);
    for (int64_t j = begin; j < end; ++j) to[j] = to_compute<S>(from[j * x.position_stride]);
  }
}

// x(channel + c, first + j) = panel[c][j] for c < channels and j < count.
template <typename S, typename T = Compute<S>>
void unpack(const T* panel, const Signal<S>& x, int64_t b, int64_t channel, int64_t channels, int64_t first,
            int64_t count) {
  if (x.position_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      S* to = x.at(b, channel + c, first);
      for (int64_t j = 0; j < count; j += lanes<T>) {
        store_first<S>(to + j, load_raw(panel + c * panel_columns + j), count - j);
      }
    }
    return;
  }
  S* to = x.at(b, channel, first);
  transpose_rows<T>(
      channels, count, [&](int64_t c, int64_t j, int64_t) { return load_raw(panel + c * panel_columns + j); },
      [&](int64_t j, int64_t c, Vector<T> values) {
        store_first<S>(to + j * x.position_stride + c, values, channels - c);
      });
}

// Where the taps of a convolution read: tap k of the output at t reads t + first + k step.
struct Taps {
  int64_t count, first, step;
};

// The weights of all taps: those of tap k begin k tap_stride behind the first's.
template <typename T>
struct Weights {
  Left<T> first;
  int64_t tap_stride;

  Left<T> from(int64_t tap, int64_t depth) const {
    return {first.data + tap * tap_stride + depth * first.depth, first.row, first.depth};
  }
};

// What convolve works in, and its result: 64 positions of `rows` outputs.
template <typename T>
struct Panels {
  T* result;  // (rows, 64)
  T* input;   // (64, 64)
  T* saved;   // (rows, 64)

  static int64_t size(int64_t rows) { return (2 * rows + panel_depth) * panel_columns; }
  Panels(T* memory, int64_t rows)
      : result(memory), input(memory + rows * panel_columns), saved(input + panel_depth * panel_columns) {}
};

// Columns of (rows, 64) outside `range` get those of `from`, or 0.
template <typename T>
void restore(T* result, const T* from, int64_t rows, Range range) {
  const auto columns = [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t j = m * panel_columns + begin; j < m * panel_columns + end; ++j) {
        result[j] = from == nullptr ? T(0) : from[j];
      }
    }
  };
  columns(0, range.begin);
  columns(range.end, panel_columns);
}

// panels.result (rows, 64) = or += the products of all taps, for outputs [t, t + count). A tap that reads outside the
// signal takes no part in the sum, whatever its weights are.
template <typename S, typename T = Compute<S>>
void convolve(const Signal<const S>& x, int64_t b, int64_t channel, int64_t channels, const Taps& taps,
              const Weights<T>& weights, int64_t rows, int64_t t, int64_t count, const Panels<T>& panels,
              bool accumulate) {
  const int64_t vectors = (count + lanes<T> - 1) / lanes<T>;
  for (int64_t k = 0; k < taps.count; ++k) {
    const int64_t first = t + taps.first + k * taps.step;
    const Range inside = x.inside(first, count);
    if (inside.empty() || channels == 0) continue;
    const bool partly = inside.begin > 0 || inside.end < count;
    if (partly && accumulate) std::copy_n(panels.result, rows * panel_columns, panels.saved);
    for (int64_t c = 0; c < channels; c += panel_depth) {
      const int64_t depth = std::min(panel_depth, channels - c);
      pack<S>(x, b, channel + c, depth, first, panels.input);
      multiply<T>(weights.from(k, c), panels.input, panel_columns, panels.result, panel_columns, rows, vectors, depth,
                  accumulate || c > 0);
    }
    if (partly) restore<T>(panels.result, accumulate ? panels.saved : nullptr, rows, inside);
    accumulate = true;
  }
  if (!accumulate) std::fill_n(panels.result, rows * panel_columns, T(0));
}

// Positions of a gradient that are transposed at a time, so that lanes run along its channels.
template <typename S>
constexpr int64_t gradient_block = sizeof(S) < 4 ? panel_columns : 2 * panel_columns;

template <typename S, typename T = Compute<S>>
struct WeightSums {
  static int64_t row(int64_t outputs) { return round_up(outputs, lanes<T>); }
  static int64_t size(int64_t taps, int64_t channels, int64_t outputs) { return taps * channels * row(outputs); }
  // of the scratch memory: the transposed gradient, in panels of 64 outputs, and packed channels
  static int64_t work(int64_t outputs, int64_t channels) {
    const int64_t packed = std::is_same_v<S, T> ? 0 : channels * panel_columns;
    return gradient_block<S> * round_up(outputs, panel_columns) + packed;
  }
};

// sums[k][c][o] += sum_t x(channel + c, t + first + k step) gradient(output + o, t), t in [begin, begin + count);
// bias[o] += sum_t gradient(output + o, t) unless null. Lanes run along the outputs: the gradient is transposed once
// for all taps, and x is read in place, which costs no packing wherever a tap points.
template <typename S, typename G, typename T = Compute<S>>
void add_weight_sums(const Signal<const S>& x, const Signal<const G>& gradient, int64_t b, int64_t channel,
                     int64_t channels, int64_t output, int64_t outputs, const Taps& taps, int64_t begin, int64_t count,
                     T* sums, T* bias, T* work) {
  constexpr int64_t L = lanes<T>;
  const int64_t row = WeightSums<S>::row(outputs);
  T* transposed = work;  // (panels of 64 outputs, gradient_block, 64)
  T* packed = work + gradient_block<S> * round_up(outputs, panel_columns);
  for (int64_t t = begin; t < begin + count; t += gradient_block<S>) {
    const int64_t positions = std::min(gradient_block<S>, begin + count - t);
    for (int64_t o = 0; o < outputs; o += panel_columns) {
      const int64_t width = std::min(panel_columns, outputs - o), vectors = (width + L - 1) / L;
      T* to = transposed + o * gradient_block<S>;
      const G* from = gradient.at(b, output + o, t);
      if (gradient.position_stride == 1) {
        transpose_into<T>(to, panel_columns, width, positions, [&](int64_t i, int64_t j, int64_t n) {
          return load_first<G>(from + i * gradient.channel_stride + j, n);
        });
      } else {
        for (int64_t j = 0; j < positions; ++j) {
          for (int64_t v = 0; v < width; v += L) {
            store<T>(to + j * panel_columns + v, load_first<G>(from + j * gradient.position_stride + v, width - v));
          }
        }
      }
      if (bias == nullptr) continue;
      for (int64_t v = 0; v < vectors; ++v) {
        Vector<T> total{};
        for (int64_t j = 0; j < positions; ++j) total += load_raw(to + j * panel_columns + v * L);
        T* add = bias + o + v * L;  // (padded to whole vectors)
        store<T>(add, load_raw(add) + total);
      }
    }
    for (int64_t k = 0; k < taps.count; ++k) {
      const int64_t first = t + taps.first + k * taps.step;
      const Range inside = x.inside(first, positions);
      if (inside.empty()) continue;
      const auto add = [&](const Left<T>& left, Range range) {
        if (range.empty()) return;
        for (int64_t o = 0; o < outputs; o += panel_columns) {
          const int64_t vectors = (std::min(panel_columns, outputs - o) + L - 1) / L;
          multiply<T>(left, transposed + o * gradient_block<S> + range.begin * panel_columns, panel_columns,
                      sums + k * channels * row + o, row, channels, vectors, range.end - range.begin, true);
        }
      };
      if constexpr (std::is_same_v<S, T>) {
        const int64_t before = std::clamp<int64_t>(-first, inside.begin, inside.end);
        if (before > inside.begin) {
          add({x.before(b, channel, first + inside.begin), x.left, 1}, {inside.begin, before});
        }
        add({x.at(b, channel, first + before), x.channel_stride, x.position_stride}, {before, inside.end});
      } else {
        pack<S>(x, b, channel, channels, first, packed);
        add({packed + inside.begin, panel_columns, 1}, inside);
      }
    }
  }
}

// A contiguous tensor in the type it is computed in: itself, or a copy.
template <typename S, typename T = Compute<S>>
class Widened {
 public:
  Widened() = default;
  explicit Widened(const Tensor& x) : Widened(pointer<const S>(x), x.numel()) {}
  explicit Widened(const std::optional<Tensor>& x) : Widened(pointer<const S>(x), x.has_value() ? x->numel() : 0) {}

  const T* get() const { return data_; }

 private:
  Widened(const S* from, int64_t count) {
    if constexpr (std::is_same_v<S, T>) {
      data_ = from;
    } else if (from != nullptr) {
      copy_ = std::make_unique<T[]>(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) copy_[i] = to_compute<S>(from[i]);
      data_ = copy_.get();
    }
  }

  const T* data_ = nullptr;
  std::unique_ptr<T[]> copy_;
};

// (rows, 64) += one number a row
template <typename S, typename T = Compute<S>>
void add_rows(T* panel, int64_t rows, const S* numbers) {
  for (int64_t m = 0; m < rows; ++m) {
    const T number = to_compute<S>(numbers[m]);
#pragma GCC unroll 4
    for (int64_t j = m * panel_columns; j < (m + 1) * panel_columns; j += lanes<T>) {
      store<T>(panel + j, load_raw(panel + j) + number);
    }
  }
}

// How the positions of B sequences are dealt to partial sums: pieces are the same for any number of threads, and none
// crosses a sequence. At most 64 of them, at most 32 MiB for all, and 512 positions or more each.
struct Pieces {
  int64_t of_sequence, positions;

  Pieces(int64_t batch, int64_t length, int64_t numbers_each) {
    const int64_t most = std::clamp<int64_t>((int64_t{1} << 23) / std::max<int64_t>(numbers_each, 1), 2, 64);
    const int64_t wanted = std::max<int64_t>(1, most / std::max<int64_t>(batch, 1));
    positions = std::max<int64_t>(512, round_up((length + wanted - 1) / wanted, 2 * panel_columns));
    of_sequence = (length + positions - 1) / positions;
  }
  Range of(int64_t piece, int64_t length) const {
    return {piece * positions, std::min(length, (piece + 1) * positions)};
  }
};

// to[i] = sum of from[piece][i] over the pieces, in their order, as S
template <typename T, typename Store>
void add_pieces(const T* from, int64_t pieces, int64_t stride, int64_t count, const Store& keep) {
  parallel_pieces(count, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T total = 0;
      for (int64_t p = 0; p < pieces; ++p) total += from[p * stride + i];
      keep(i, total);
    }
  });
}

// weight[o][c][k] = the sums[k][c][o] of all pieces
template <typename S, typename T = Compute<S>>
void add_weight_pieces(const T* sums, int64_t pieces, int64_t stride, int64_t taps, int64_t channels, int64_t outputs,
                       S* weight) {
  const int64_t row = WeightSums<S>::row(outputs);
  add_pieces(sums, pieces, stride, taps * channels * row, [&](int64_t i, T total) {
    const int64_t o = i % row, c = i / row % channels, k = i / row / channels;
    if (o < outputs) weight[(o * channels + c) * taps + k] = S(total);
  });
}

// (B, channels, T), in the memory order (B, T, channels) where `channels_last`
inline Tensor empty_sequences(const Tensor& like, int64_t channels, int64_t length, bool channels_last,
                              std::optional<ScalarType> dtype = std::nullopt) {
  if (!channels_last) return empty({like.size(0), channels, length}, like, dtype);
  return torch::stable::transpose(empty({like.size(0), length, channels}, like, dtype), 1, 2);
}

// Of a convolution of (B, channels, T) to (B, outputs, T).
struct Sizes {
  int64_t batch, channels, length, outputs, taps, groups;
  int64_t group_channels, group_outputs;

  Sizes(const Tensor& x, int64_t outputs, int64_t taps, int64_t groups)
      : batch(x.size(0)),
        channels(x.size(1)),
        length(x.size(2)),
        outputs(outputs),
        taps(taps),
        groups(groups),
        group_channels(channels / groups),
        group_outputs(outputs / groups) {}
};

// Calls body(b, group, t, count) for every 64 positions of [begin, end) of every sequence and group, in parallel.
template <typename Body>
void each_panel(const Sizes& n, int64_t begin, int64_t end, const Body& body) {
  const int64_t panels = (end - begin + panel_columns - 1) / panel_columns;
  const int64_t grain = std::clamp<int64_t>(panels / 64, 1, 4);
  parallel_pieces(n.batch * n.groups * panels, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = begin + i % panels * panel_columns, sequence = i / panels;
      body(sequence / n.groups, sequence % n.groups, t, std::min(panel_columns, end - t));
    }
  });
}

// What the convolution makes of `gradient`, returned to its inputs: `to` for the positions [begin, end), whose memory
// begins with the first of them. Calls finish(panel, b, channel, t) before 64 positions of a group are written.
template <typename S, typename G, typename T = Compute<S>, typename Finish>
void input_gradient(const Sizes& n, const Signal<const G>& gradient, const T* weights, const Taps& mirrored,
                    const Signal<S>& to, int64_t begin, int64_t end, const Finish& finish) {
  each_panel(n, begin, end, [&](int64_t b, int64_t group, int64_t t, int64_t count) {
    const T* of_group = weights + group * n.group_outputs * n.group_channels * n.taps;
    const Panels<T> panels(scratch<T>(Panels<T>::size(n.group_channels)), n.group_channels);
    convolve<G>(gradient, b, group * n.group_outputs, n.group_outputs, mirrored,
                {{of_group, n.taps, n.group_channels * n.taps}, 1}, n.group_channels, t, count, panels, false);
    finish(panels, b, t);
    unpack<S>(panels.result, to, b, group * n.group_channels, n.group_channels, t - begin, count);
  });
}
template <typename S, typename G, typename T = Compute<S>>
void input_gradient(const Sizes& n, const Signal<const G>& gradient, const T* weights, const Taps& mirrored,
                    const Signal<S>& to, int64_t begin, int64_t end) {
  input_gradient<S, G>(n, gradient, weights, mirrored, to, begin, end, [](const Panels<T>&, int64_t, int64_t) {});
}

// The gradients of a convolution's weight and bias (either may be null).
template <typename S, typename G, typename T = Compute<S>>
void weight_gradient(const Sizes& n, const Signal<const S>& x, const Signal<const G>& gradient, const Taps& taps,
                     S* weight, S* bias) {
  const int64_t row = WeightSums<S>::row(n.group_outputs);
  const int64_t products = weight == nullptr ? 0 : WeightSums<S>::size(n.taps, n.group_channels, n.group_outputs);
  const int64_t each = products + row;
  const Pieces pieces(n.batch, n.length, each * n.groups);
  const int64_t count = n.batch * pieces.of_sequence;
  const auto sums = std::make_unique<T[]>(static_cast<size_t>(count * n.groups * each));  // zeros
  parallel_pieces(count * n.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / count, piece = i % count;
      const Range at = pieces.of(piece % pieces.of_sequence, n.length);
      T* of_piece = sums.get() + i * each;
      const Taps wanted{weight == nullptr ? 0 : taps.count, taps.first, taps.step};
      add_weight_sums<S, G>(x, gradient, piece / pieces.of_sequence, group * n.group_channels, n.group_channels,
                            group * n.group_outputs, n.group_outputs, wanted, at.begin, at.end - at.begin, of_piece,
                            bias == nullptr ? nullptr : of_piece + products,
                            scratch<T>(WeightSums<S>::work(n.group_outputs, n.group_channels)));
    }
  });
  for (int64_t group = 0; group < n.groups; ++group) {
    const T* from = sums.get() + group * count * each;
    const int64_t first = group * n.group_outputs;
    if (weight != nullptr) {
      S* to = weight + first * n.group_channels * n.taps;
      add_weight_pieces<S>(from, count, each, n.taps, n.group_channels, n.group_outputs, to);
    }
    if (bias != nullptr) {
      add_pieces(from + products, count, each, n.group_outputs, [&](int64_t i, T x) { bias[first + i] = S(x); });
    }
  }
}

}  // namespace convolution
}  // namespace mpkernels
