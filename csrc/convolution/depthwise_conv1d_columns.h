// Depthwise convolution with channels last: a vector holds neighbouring channels at one position.
//
// Decomposition: threads take pieces of positions; backward, of a block of channels too, so that the gradients of y of
// a piece stay in the cache. Four positions that have all their taps go through together, which reads their weights
// once; for the others (the first `left`, rows with sequences) the taps that exist are listed, and the list is summed.
#pragma once

#include "convolution/depthwise_conv1d.h"

#include <vector>

namespace mpkernels {
namespace depthwise_conv1d {

constexpr int together = 4;  // positions

// weight and bias as vectors of channels read them: of each vector its K taps, then its bias (0 without one).
template <typename T>
struct ByTap {
  static constexpr int64_t L = lanes<T>;
  std::vector<T> values;
  int64_t taps;

  ByTap(const T* weight, const T* bias, int64_t taps_, int64_t channels) : taps(taps_) {
    values.resize(static_cast<size_t>((channels + L - 1) / L * L * (taps + 1)));
    for (int64_t c = 0; c < channels; ++c) {
      T* to = values.data() + c / L * L * (taps + 1) + c % L;
      for (int64_t k = 0; k < taps; ++k) to[k * L] = weight[c * taps + k];
      to[taps * L] = bias == nullptr ? T(0) : bias[c];
    }
  }
  // those of channel c on, a multiple of L
  const T* at(int64_t c) const { return values.data() + c * (taps + 1); }
};

// A tap that exists: its inputs of all channels.
template <typename S>
struct Source {
  const S* x;
  int64_t k;
};

// The taps that position t of row b has, oldest first. (count <= K)
template <typename S>
int64_t sources_of(const Problem<S>& in, int64_t b, int64_t t, int64_t first_channel, Source<S>* sources) {
  const int32_t* seq = in.sequences(b);
  int64_t count = 0;
  for (int64_t k = 0; k < in.taps; ++k) {
    const int64_t p = t - in.shift(k);
    if (p < 0 && in.state == nullptr) continue;
    if (seq != nullptr && (seq[t] < 0 || seq[std::max<int64_t>(p, 0)] != seq[t])) continue;
    const S* x = p >= 0 ? in.x + b * in.x_batch + p * in.x_line : in.state + (b * in.left + in.left + p) * in.channels;
    sources[count++] = {x + first_channel, k};
  }
  return count;
}

// y of `width` channels from c on (only the first `width` lanes count); `weights` are those of the vector.
template <typename S>
MPKERNELS_INLINE Vector<Compute<S>> sum_of(const Source<S>* sources, int64_t count, const Compute<S>* weights,
                                           int64_t taps, int64_t c, int64_t width) {
  using T = Compute<S>;
  Vector<T> sum{};
  for (int64_t i = 0; i < count; ++i) {
    sum = load<T>(weights + sources[i].k * lanes<T>) * load_first<S>(sources[i].x + c, width) + sum;
  }
  return sum + load<T>(weights + taps * lanes<T>);
}

// The outputs of one position, from a list of taps.
template <typename S>
void forward_listed(const Source<S>* sources, int64_t count, const ByTap<Compute<S>>& weights, int64_t channels,
                    bool silu, S* out) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t width = std::min(L, channels - c);
    store_first<S>(out + c, activation<T>(sum_of<S>(sources, count, weights.at(c), weights.taps, c, width), silu),
                   width);
  }
}

// y of `together` positions at the channels from x on, whose first position is at x.
template <typename S, int K>
struct Several {
  using T = Compute<S>;
  Vector<T> y[together];

  MPKERNELS_INLINE Several(const S* x, int64_t line, int64_t left, int64_t step, const T* weights, int64_t taps_,
                           int64_t width) {
    const int64_t taps = K > 0 ? K : taps_;
    for (int r = 0; r < together; ++r) y[r] = Vector<T>{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < taps; ++k) {
      const Vector<T> weight = load<T>(weights + k * lanes<T>);
      const S* from = x - left + k * step;
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) y[r] = weight * load_first<S>(from + r * line, width) + y[r];
    }
    const Vector<T> bias = load<T>(weights + taps * lanes<T>);
    for (int r = 0; r < together; ++r) y[r] += bias;
  }
};

template <typename S, int K>
void forward_several(const Problem<S>& in, const ByTap<Compute<S>>& weights, const S* x, bool streamed, S* out) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const int64_t line = in.x_line, left = in.left * line, step = in.dilation * line, channels = in.channels;
  const bool silu = in.silu;
  const auto vectors = [&](int64_t c, int64_t width) {
    const Several<S, K> found(x + c, line, left, step, weights.at(c), in.taps, width);
#pragma GCC unroll 4
    for (int r = 0; r < together; ++r) {
      S* to = out + r * channels + c;
      if (streamed) {
        stream_first<S>(to, activation<T>(found.y[r], silu), width);
      } else {
        store_first<S>(to, activation<T>(found.y[r], silu), width);
      }
    }
  };
  int64_t c = 0;
  for (; c + L <= channels; c += L) vectors(c, L);
  if (c < channels) vectors(c, channels - c);
}

// Whether `together` positions from t on have all their taps, in front of `end`.
template <typename S>
bool all_taps(const Problem<S>& in, int64_t t, int64_t end) {
  return in.seq_idx == nullptr && t >= in.left && t + together <= end;
}

template <typename S, int K>
void forward_columns(const Problem<S>& in, S* out) {
  using T = Compute<S>;
  const ByTap<T> weights(in.weight, in.bias, in.taps, in.channels);
  constexpr int64_t piece_elements = 1 << 15;
  const int64_t most = std::max<int64_t>(together, piece_elements / std::max<int64_t>(in.channels, 1));
  const int64_t piece = (most + together - 1) / together * together, pieces = (in.length + piece - 1) / piece;
  const bool streamed = in.batch * in.channels * in.length * static_cast<int64_t>(sizeof(S)) > streamed_bytes;
  const int64_t grain = std::max<int64_t>(1, piece / in.length);
  parallel_pieces(in.batch * pieces, grain, [&](int64_t first, int64_t last) {
    std::vector<Source<S>> sources(static_cast<size_t>(in.taps));
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / pieces, begin = task % pieces * piece, end = std::min(in.length, begin + piece);
      for (int64_t t = begin; t < end;) {
        S* to = out + (b * in.length + t) * in.channels;
        if (all_taps(in, t, end)) {
          forward_several<S, K>(in, weights, in.x + b * in.x_batch + t * in.x_line, streamed, to);
          t += together;
          continue;
        }
        if (in.seq_idx != nullptr && in.sequences(b)[t] < 0) {
          std::fill(to, to + in.channels, static_cast<S>(0.0f));
        } else {
          const int64_t count = sources_of(in, b, t, 0, sources.data());
          forward_listed<S>(sources.data(), count, weights, in.channels, in.silu, to);
        }
        ++t;
      }
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

// A block of channels of a row: gradients of y of [begin, stop) are kept in `of_y`, `line` apart, sums for weight and
// bias in `sums`, K + 1 of each vector as ByTap has them.
template <typename S, int K>
struct Block {
  using T = Compute<S>;
  static constexpr int64_t L = lanes<T>;

  const Problem<S>& in;
  const Gradients<S>& to;
  const ByTap<T>& weights;
  int64_t b, begin, end, stop, channel, channels, line;
  T* of_y;
  T* sums;
  T* parts;            // (K + 1, C) of the piece, or null
  Source<S>* sources;  // scratch, K

  // Gradients of y at `together` positions from t on, which have all their taps.
  template <bool Counted>
  void several_outputs(int64_t t) const {
    const S* x = in.x + b * in.x_batch + t * in.x_line + channel;
    const S* gradient = to.of_out + b * to.batch + t * to.line + channel;
    const int64_t left = in.left * in.x_line, step = in.dilation * in.x_line, taps = K > 0 ? K : in.taps;
    T* rows = of_y + (t - begin) * line;
    const bool silu = in.silu;
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t width = std::min(L, channels - c);
      Vector<T> u[together];
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) u[r] = load_first<S>(gradient + r * to.line + c, width);
      if (silu) {
        const Several<S, K> found(x + c, in.x_line, left, step, weights.at(channel + c), taps, width);
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) u[r] = of_activation<T>(u[r], found.y[r], true);
        if (width < L) {
          for (int r = 0; r < together; ++r) u[r] = select<T>(first_lanes<T>(width), u[r], Vector<T>{});
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) store<T>(rows + r * line + c, u[r]);
      if (!Counted) continue;
      T* own = sums + c * (taps + 1);
#pragma GCC unroll 4
      for (int64_t k = 0; k < taps; ++k) {
        Vector<T> sum = load<T>(own + k * L);
        const S* from = x - left + k * step + c;
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) sum = u[r] * load_first<S>(from + r * in.x_line, width) + sum;
        store<T>(own + k * L, sum);
      }
      store<T>(own + taps * L, load<T>(own + taps * L) + u[0] + u[1] + u[2] + u[3]);
    }
  }

  // Gradients of y at position t, from a list of taps.
  void listed_output(int64_t t, bool counted) const {
    T* row = of_y + (t - begin) * line;
    if (in.seq_idx != nullptr && in.sequences(b)[t] < 0) {
      std::fill(row, row + line, T(0));
      return;
    }
    const S* gradient = to.of_out + b * to.batch + t * to.line + channel;
    const int64_t count = sources_of(in, b, t, channel, sources);
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t width = std::min(L, channels - c);
      Vector<T> u = load_first<S>(gradient + c, width);
      if (in.silu) {
        u = of_activation<T>(u, sum_of<S>(sources, count, weights.at(channel + c), in.taps, c, width), true);
        u = select<T>(first_lanes<T>(width), u, Vector<T>{});
      }
      store<T>(row + c, u);
      if (!counted) continue;
      T* own = sums + c * (in.taps + 1);
      for (int64_t i = 0; i < count; ++i) {
        T* sum = own + sources[i].k * L;
        store<T>(sum, u * load_first<S>(sources[i].x + c, width) + load<T>(sum));
      }
      store<T>(own + in.taps * L, load<T>(own + in.taps * L) + u);
    }
  }

  void outputs() const {
    const bool counted = parts != nullptr;
    if (counted) std::fill(sums, sums + line * (in.taps + 1), T(0));
    for (int64_t t = begin; t < stop;) {
      const bool inside = t < end;
      if (all_taps(in, t, inside ? end : stop)) {
        inside&& counted ? several_outputs<true>(t) : several_outputs<false>(t);
        t += together;
      } else {
        listed_output(t, inside && counted);
        ++t;
      }
    }
    if (!counted) return;
    for (int64_t k = 0; k <= in.taps; ++k) {
      for (int64_t c = 0; c < channels; ++c) {
        parts[k * in.channels + channel + c] = sums[c / L * L * (in.taps + 1) + k * L + c % L];
      }
    }
  }

  // The gradients of the inputs of `together` positions from p on, all of whose outputs are kept.
  void several_inputs(int64_t p, S* into) const {
    const int64_t taps = K > 0 ? K : in.taps;
    const T* from = of_y + (p - begin + in.left) * line;
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t width = std::min(L, channels - c);
      const T* own = weights.at(channel + c);
      Vector<T> found[together] = {};
#pragma GCC unroll 4
      for (int64_t k = taps - 1; k >= 0; --k) {
        const Vector<T> weight = load<T>(own + k * L);
        const T* u = from - k * in.dilation * line + c;
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) found[r] = weight * load<T>(u + r * line) + found[r];
      }
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) store_first<S>(into + r * in.channels + c, found[r], width);
    }
  }

  // The gradient of the inputs at position p (below 0: of the state), outputs chosen one by one.
  void listed_input(int64_t p, S* into) const {
    const int32_t* seq = in.sequences(b);
    const int32_t own = seq == nullptr ? 0 : seq[std::max<int64_t>(p, 0)];
    for (int64_t c = 0; c < channels; c += L) {
      Vector<T> sum{};
      for (int64_t k = in.taps - 1; k >= 0 && own >= 0; --k) {
        const int64_t t = p + in.shift(k);
        if (t < 0 || t >= stop || (seq != nullptr && seq[t] != own)) continue;
        sum = load<T>(weights.at(channel + c) + k * L) * load<T>(of_y + (t - begin) * line + c) + sum;
      }
      store_first<S>(into + c, sum, std::min(L, channels - c));
    }
  }

  void inputs() const {
    if (to.of_x != nullptr) {
      for (int64_t p = begin; p < end;) {
        S* into = to.of_x + (b * in.length + p) * in.channels + channel;
        if (in.seq_idx == nullptr && p + together <= end && p + together + in.left <= stop) {
          several_inputs(p, into);
          p += together;
        } else {
          listed_input(p, into);
          ++p;
        }
      }
    }
    if (to.of_state != nullptr && begin == 0) {
      for (int64_t j = 0; j < in.left; ++j) {
        listed_input(j - in.left, to.of_state + (b * in.left + j) * in.channels + channel);
      }
    }
  }
};

// Backward of positions; `parts` of a piece are those of row b, piece i of the row: b per_row + i.
template <typename S, int K>
void backward_columns(const Problem<S>& in, const Gradients<S>& to) {
  using T = Compute<S>;
  const ByTap<T> weights(in.weight, in.bias, in.taps, in.channels);
  const ColumnPieces<S> pieces(in);
  const int64_t line = pieces.block, kept = pieces.positions + in.reach();
  parallel_pieces(in.batch * pieces.per_row * pieces.blocks, 1, [&](int64_t first, int64_t last) {
    T* of_y = scratch<T>((kept + in.taps + 1) * line);
    std::vector<Source<S>> sources(static_cast<size_t>(in.taps));
    for (int64_t task = first; task < last; ++task) {
      const int64_t channel = task % pieces.blocks * pieces.block, piece = task / pieces.blocks;
      const int64_t begin = piece % pieces.per_row * pieces.positions;
      const int64_t end = std::min(in.length, begin + pieces.positions);
      const Block<S, K> block{in,
                              to,
                              weights,
                              piece / pieces.per_row,
                              begin,
                              end,
                              std::min(in.length, end + in.reach()),
                              channel,
                              std::min(pieces.block, in.channels - channel),
                              line,
                              of_y,
                              of_y + kept * line,
                              to.parts == nullptr ? nullptr : to.parts + piece * (in.taps + 1) * in.channels,
                              sources.data()};
      block.outputs();
      block.inputs();
    }
  });
}

}  // namespace depthwise_conv1d
}  // namespace mpkernels
