// Depthwise convolution with channels last: a vector holds neighbouring channels at one position.
//
// Decomposition: threads take pieces of positions; backward, of a block of channels too, so that the gradients of y of a
// piece stay in the cache. Which taps exist is settled once for all channels of a position: a list of them is summed.
#pragma once

#include "convolution/depthwise_conv1d.h"

#include <vector>

namespace mpkernels {
namespace depthwise_conv1d {

// weight (K, C) and bias (C,), zeros without one: what vectors of channels read.
template <typename T>
struct ByTap {
  std::vector<T> values;
  int64_t channels;

  ByTap(const T* weight, const T* bias, int64_t taps, int64_t channels_) : channels(channels_) {
    values.resize(static_cast<size_t>((taps + 1) * channels + lanes<T>));
    for (int64_t k = 0; k < taps; ++k) {
      for (int64_t c = 0; c < channels; ++c) values[k * channels + c] = weight[c * taps + k];
    }
    if (bias != nullptr) std::copy(bias, bias + channels, values.begin() + taps * channels);
  }
  const T* weight(int64_t k) const { return values.data() + k * channels; }
};

// A tap that exists: its inputs and its weights of all channels.
template <typename S>
struct Source {
  const S* x;
  const Compute<S>* weight;
  int64_t k;
};

// The taps that position t of row b has, oldest first. (count <= K)
template <typename S>
int64_t sources_of(const Problem<S>& in, const ByTap<Compute<S>>& weights, int64_t b, int64_t t, Source<S>* sources) {
  const int32_t* seq = in.sequences(b);
  int64_t count = 0;
  for (int64_t k = 0; k < in.taps; ++k) {
    const int64_t p = t - in.shift(k);
    if (p < 0 && in.state == nullptr) continue;
    if (seq != nullptr && (seq[t] < 0 || seq[std::max<int64_t>(p, 0)] != seq[t])) continue;
    const S* x = p >= 0 ? in.x + b * in.x_batch + p * in.x_line : in.state + (b * in.left + in.left + p) * in.channels;
    sources[count++] = {x, weights.weight(k), k};
  }
  return count;
}

// y of `width` channels from c on (only the first `width` lanes count). N: the sources, where compiled in, else 0.
template <typename S, int N>
MPKERNELS_INLINE Vector<Compute<S>> sum_of(const Source<S>* sources, int64_t count, const Compute<S>* bias, int64_t c,
                                           int64_t width) {
  using T = Compute<S>;
  Vector<T> sum{};
  const int64_t n = N > 0 ? N : count;
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i) {
    sum = load_first<T>(sources[i].weight + c, width) * load_first<S>(sources[i].x + c, width) + sum;
  }
  return sum + load_first<T>(bias + c, width);
}

template <typename S, int N>
void forward_position(const Source<S>* given, int64_t count, const Compute<S>* bias, int64_t channels, bool silu,
                      bool streamed, S* out) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  Source<S> local[N > 0 ? N : 1];
  if constexpr (N > 0) std::copy(given, given + N, local);
  const Source<S>* sources = N > 0 ? local : given;
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    const Vector<T> y = activation<T>(sum_of<S, N>(sources, count, bias, c, L), silu);
    if (streamed) {
      stream_first<S>(out + c, y, L);
    } else {
      store<S>(out + c, y);
    }
  }
  if (c < channels) {
    store_first<S>(out + c, activation<T>(sum_of<S, N>(sources, count, bias, c, channels - c), silu), channels - c);
  }
}

template <typename S>
void forward_any(const Source<S>* sources, int64_t count, const Compute<S>* bias, int64_t channels, bool silu,
                 bool streamed, S* out) {
  switch (count) {
    case 2:
      return forward_position<S, 2>(sources, count, bias, channels, silu, streamed, out);
    case 3:
      return forward_position<S, 3>(sources, count, bias, channels, silu, streamed, out);
    case 4:
      return forward_position<S, 4>(sources, count, bias, channels, silu, streamed, out);
    default:
      return forward_position<S, 0>(sources, count, bias, channels, silu, streamed, out);
  }
}

template <typename S>
void forward_columns(const Problem<S>& in, S* out) {
  using T = Compute<S>;
  const ByTap<T> weights(in.weight, in.bias, in.taps, in.channels);
  constexpr int64_t piece_elements = 1 << 15;
  const int64_t piece = std::max<int64_t>(1, piece_elements / std::max<int64_t>(in.channels, 1));
  const bool streamed = in.batch * in.channels * in.length * static_cast<int64_t>(sizeof(S)) > streamed_bytes;
  parallel_pieces(in.batch * in.length, piece, [&](int64_t first, int64_t last) {
    std::vector<Source<S>> sources(static_cast<size_t>(in.taps));
    for (int64_t index = first; index < last; ++index) {
      const int64_t b = index / in.length, t = index % in.length;
      S* to = out + index * in.channels;
      if (in.seq_idx != nullptr && in.sequences(b)[t] < 0) {
        std::fill(to, to + in.channels, static_cast<S>(0.0f));
        continue;
      }
      const int64_t count = sources_of(in, weights, b, t, sources.data());
      forward_any<S>(sources.data(), count, weights.weight(in.taps), in.channels, in.silu, streamed, to);
    }
    if (streamed) finish_streams();
  });
}

// Positions and channels of a piece of the backward: a quarter MiB of gradients of y, the reach included.
template <typename S>
struct ColumnPieces {
  int64_t positions, block, per_row, blocks;

  explicit ColumnPieces(const Problem<S>& in) {
    using T = Compute<S>;
    constexpr int64_t least = 64, most_channels = 256, L = lanes<T>, elements = (1 << 18) / sizeof(T);
    positions = std::max(least, 4 * in.reach());
    block = std::clamp(elements / (positions + in.reach()) / L * L, L, most_channels);
    per_row = (in.length + positions - 1) / positions;
    blocks = (in.channels + block - 1) / block;
  }
};

// An output that an input goes into: its gradient, and the weight between them.
template <typename T>
struct Target {
  const T* of_y;
  const T* weight;
};

template <typename S, int N>
MPKERNELS_INLINE void of_position(const Target<Compute<S>>* given, int64_t count, int64_t channels, S* to) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  Target<T> local[N > 0 ? N : 1];
  if constexpr (N > 0) std::copy(given, given + N, local);
  const Target<T>* targets = N > 0 ? local : given;
  const int64_t n = N > 0 ? N : count;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t width = std::min(L, channels - c);
    Vector<T> sum{};
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      sum = load_first<T>(targets[i].weight + c, width) * load<T>(targets[i].of_y + c) + sum;
    }
    store_first<S>(to + c, sum, width);
  }
}

// The gradient of the inputs at position p (below 0: of the state), from gradients of y of [begin, stop).
template <typename S>
void of_input(const Problem<S>& in, const ByTap<Compute<S>>& weights, int64_t b, int64_t p,
              const Compute<S>* of_y, int64_t of_y_line, int64_t begin, int64_t stop, int64_t first_channel,
              int64_t channels, Target<Compute<S>>* targets, S* to) {
  const int32_t* seq = in.sequences(b);
  const int32_t own = seq == nullptr ? 0 : seq[std::max<int64_t>(p, 0)];
  int64_t count = 0;
  for (int64_t k = in.taps - 1; k >= 0 && own >= 0; --k) {
    const int64_t t = p + in.shift(k);
    if (t < 0 || t >= stop || (seq != nullptr && seq[t] != own)) continue;
    targets[count++] = {of_y + (t - begin) * of_y_line, weights.weight(k) + first_channel};
  }
  if (count == 4) return of_position<S, 4>(targets, count, channels, to);
  of_position<S, 0>(targets, count, channels, to);
}

// The gradient of y at one position, and what it adds to the sums; N: the sources, where compiled in.
template <typename S, int N>
void of_output(const Source<S>* given, int64_t count, const Compute<S>* bias, const S* gradient, int64_t channels,
               bool silu, Compute<S>* of_y, Compute<S>* sums, int64_t line, int64_t taps) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  Source<S> local[N > 0 ? N : 1];
  if constexpr (N > 0) std::copy(given, given + N, local);
  const Source<S>* sources = N > 0 ? local : given;
  const int64_t n = N > 0 ? N : count;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t width = std::min(L, channels - c);
    Vector<T> u = load_first<S>(gradient + c, width);
    if (silu) {
      u = of_activation<T>(u, sum_of<S, N>(sources, count, bias, c, width), true);
      if (width < L) u = select<T>(first_lanes<T>(width), u, Vector<T>{});
    }
    store<T>(of_y + c, u);
    if (sums == nullptr) continue;
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      T* sum = sums + sources[i].k * line + c;
      store<T>(sum, u * load_first<S>(sources[i].x + c, width) + load<T>(sum));
    }
    T* total = sums + taps * line + c;
    store<T>(total, load<T>(total) + u);
  }
}

// Backward of positions; `parts` of a piece are those of row b, piece i of the row: b per_row + i.
template <typename S>
void backward_columns(const Problem<S>& in, const Gradients<S>& to) {
  using T = Compute<S>;
  const ByTap<T> weights(in.weight, in.bias, in.taps, in.channels);
  const ColumnPieces<S> pieces(in);
  const int64_t line = pieces.block, kept = pieces.positions + in.reach();
  parallel_pieces(in.batch * pieces.per_row * pieces.blocks, 1, [&](int64_t first, int64_t last) {
    T* of_y = scratch<T>((kept + in.taps + 1) * line);
    T* sums = of_y + kept * line;
    std::vector<Source<S>> sources(static_cast<size_t>(in.taps));
    std::vector<Target<T>> targets(static_cast<size_t>(in.taps));
    for (int64_t task = first; task < last; ++task) {
      const int64_t channel = task % pieces.blocks * pieces.block, piece = task / pieces.blocks;
      const int64_t b = piece / pieces.per_row, begin = piece % pieces.per_row * pieces.positions;
      const int64_t end = std::min(in.length, begin + pieces.positions);
      const int64_t stop = std::min(in.length, end + in.reach());
      const int64_t channels = std::min(pieces.block, in.channels - channel);
      std::fill(sums, sums + (in.taps + 1) * line, T(0));
      for (int64_t t = begin; t < stop; ++t) {
        T* row = of_y + (t - begin) * line;
        if (in.seq_idx != nullptr && in.sequences(b)[t] < 0) {
          std::fill(row, row + line, T(0));
          continue;
        }
        const int64_t count = sources_of(in, weights, b, t, sources.data());
        for (int64_t i = 0; i < count; ++i) sources[i].x += channel, sources[i].weight += channel;
        const S* gradient = to.of_out + b * to.batch + t * to.line + channel;
        const T* bias = weights.weight(in.taps) + channel;
        T* into = t < end && to.parts != nullptr ? sums : nullptr;
        if (count == 4) {
          of_output<S, 4>(sources.data(), count, bias, gradient, channels, in.silu, row, into, line, in.taps);
        } else {
          of_output<S, 0>(sources.data(), count, bias, gradient, channels, in.silu, row, into, line, in.taps);
        }
      }
      if (to.parts != nullptr) {
        T* parts = to.parts + piece * (in.taps + 1) * in.channels + channel;
        for (int64_t k = 0; k <= in.taps; ++k) std::copy_n(sums + k * line, channels, parts + k * in.channels);
      }
      const auto input = [&](int64_t p, S* into) {
        of_input<S>(in, weights, b, p, of_y, line, begin, stop, channel, channels, targets.data(), into);
      };
      if (to.of_x != nullptr) {
        for (int64_t p = begin; p < end; ++p) input(p, to.of_x + (b * in.length + p) * in.channels + channel);
      }
      if (to.of_state != nullptr && begin == 0) {
        for (int64_t j = 0; j < in.left; ++j) {
          input(j - in.left, to.of_state + (b * in.left + j) * in.channels + channel);
        }
      }
    }
  });
}

}  // namespace depthwise_conv1d
}  // namespace mpkernels
