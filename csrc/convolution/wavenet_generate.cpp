// WaveNet's sample loop on a CPU: one position after the other, each from what the rings keep of the past.
//
//   z_i    = sum_{k, c} weight_i[., c, k] x_i[c, t + (k - K + 1) d_i]
//          + sum_a condition_weight_i[., a] condition[a] + offset_i
//
//   h_i    = tanh(z_i[:G]) sigmoid(z_i[G:])
//
//   x_i+1  = scale (x_i + residual_i h_i + bias_i),    skip += skip_i h_i + bias_i
//
//   logits = output relu(hidden relu(skip) + bias) + bias,    sample ~ softmax(logits): the input of the next position
//
// (van den Oord et al. 2016, "WaveNet", eq. 2 and figure 4; Paine et al. 2016, "Fast Wavenet".) Shapes, the order of
// weights and of sums: mpkernels/convolution/wavenet_generate/schema.py.
//
// A position is a chain of products of a matrix and a vector, and reads every weight once: nv-wavenet's Medium (R 64,
// S 128, A 256, 20 layers) 1.34 MFLOP and 2.7 MB in float32, more than the second cache holds. So what counts is bytes.
// Weights lie in the order in which they are read, depth by depth with the outputs in lanes, which is also the order of
// the sums that the slow loop has: every output is one chain of multiply-adds, and 8 registers of outputs run side by
// side. All taps but the newest look back by at least the dilation d, so up to min(d, 16) positions of them are
// multiplied at once, and their weights are read once for all of these; the chain of z begins with the oldest tap, and
// keeps its bits. Sequences of a batch go together in groups of up to 8, which read weights once; groups are the pieces
// that threads take.
#include "convolution/wavenet_generate_math.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "common/vector.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

namespace mpkernels {
namespace wavenet_generate {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t most_sequences = 8;   // of a group
constexpr int64_t most_positions = 16;  // whose past is multiplied at once
constexpr int64_t most_rows = most_sequences * most_positions;

template <typename T>
constexpr int block_vectors = static_cast<int>(block_outputs) / lanes<T>;

// 32 outputs of one depth.
template <typename S, typename T = Compute<S>>
MPKERNELS_INLINE void load_block(const S* from, Vector<T> (&to)[block_vectors<T>]) {
  if constexpr (sizeof(S) >= 4) {
#pragma GCC unroll 16
    for (int v = 0; v < block_vectors<T>; ++v) to[v] = load_raw<S>(from + v * lanes<T>);
  } else {  // words of output i in their low half and of output i + 16 in their high half
#pragma GCC unroll 16
    for (int v = 0; v < block_vectors<T> / 2; ++v) {
      Words words;
      std::memcpy(&words, from + 2 * v * lanes<T>, sizeof(words));
      to[v] = reinterpret_cast<Vector<float>>(words << 16);
      to[v + block_vectors<T> / 2] = reinterpret_cast<Vector<float>>(words & 0xFFFF0000u);
    }
  }
}

// Rows of inputs and of the sums that they go to.
template <typename T>
struct Rows {
  const T* x[most_rows];
  T* sums[most_rows];
};

// sums[r][outputs of the tile] (= or) += sum_k w[k][outputs] x[r][k], in the order of k.
template <int ROWS, int BLOCKS, typename S, typename T = Compute<S>>
MPKERNELS_INLINE void multiply_tile(const S* w, int64_t w_row, const T* const* x, T* const* to, int64_t offset,
                                    int64_t depth, bool accumulate) {
  constexpr int V = block_vectors<T>;
  Vector<T> sums[ROWS][BLOCKS][V];
  const T* in[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    in[r] = x[r];
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        sums[r][b][v] = accumulate ? load_raw(to[r] + offset + (b * V + v) * lanes<T>) : Vector<T>{};
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k, w += w_row) {
    Vector<T> factor[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) factor[r] = broadcast<T>(in[r][k]);
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
      Vector<T> weights[V];
      load_block<S>(w + b * block_outputs, weights);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[r][b][v] += factor[r] * weights[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store<T>(to[r] + offset + (b * V + v) * lanes<T>, sums[r][b][v]);
    }
  }
}

template <int ROWS, int BLOCKS, typename S, typename T = Compute<S>>
MPKERNELS_INLINE int64_t multiply_blocks(const S* w, int64_t width, int64_t from, const T* const* x, T* const* to,
                                         int64_t offset, int64_t depth, bool accumulate) {
  for (; from + BLOCKS * block_outputs <= width; from += BLOCKS * block_outputs) {
    multiply_tile<ROWS, BLOCKS, S>(w + from, width, x, to, offset + from, depth, accumulate);
  }
  return from;
}

// One panel; registers for the sums of 16 (8) vectors, and never more than a panel has.
template <int ROWS, typename S, typename T = Compute<S>>
void multiply_panel(const S* w, int64_t width, const T* const* x, T* const* to, int64_t offset, int64_t depth,
                    bool accumulate) {
  constexpr int registers = MPKERNELS_VECTOR_BYTES == 64 ? 16 : 8;
  constexpr int fit = registers / (ROWS * block_vectors<T>);
  constexpr int blocks = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  int64_t from = multiply_blocks<ROWS, blocks, S>(w, width, 0, x, to, offset, depth, accumulate);
  if constexpr (blocks > 2) from = multiply_blocks<ROWS, 2, S>(w, width, from, x, to, offset, depth, accumulate);
  multiply_blocks<ROWS, 1, S>(w, width, from, x, to, offset, depth, accumulate);
}

// Depths [from, from + depth) of a packed matrix that has `whole` of them, times `count` rows.
template <typename S, typename T = Compute<S>>
void multiply(const S* w, int64_t outputs, int64_t from, int64_t depth, int64_t whole, const Rows<T>& rows,
              int64_t count, bool accumulate) {
  for (int64_t offset = 0; offset < outputs; offset += panel_outputs) {
    const int64_t width = std::min(panel_outputs, padded(outputs) - offset);
    const S* panel = w + from * width;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      multiply_panel<4, S>(panel, width, rows.x + r, rows.sums + r, offset, depth, accumulate);
    }
    if (count - r >= 2) {
      multiply_panel<2, S>(panel, width, rows.x + r, rows.sums + r, offset, depth, accumulate);
      r += 2;
    }
    if (count > r) multiply_panel<1, S>(panel, width, rows.x + r, rows.sums + r, offset, depth, accumulate);
    w += width * whole;
  }
}

// Draws from `count` logits; `weights` is memory for as many numbers and a vector.
template <typename T>
int64_t categorical(const T* logits, int64_t count, T temperature, double u, T* weights) {
  if (temperature == 0) return first_largest(logits, count);
  Vector<T> highest = broadcast<T>(logits[0]);
  int64_t c = 0;
  for (; c + lanes<T> <= count; c += lanes<T>) {
    const Vector<T> x = load_raw(logits + c);
    highest = x > highest ? x : highest;
  }
  T maximum = highest[0];
  for (int i = 1; i < lanes<T>; ++i) maximum = highest[i] > maximum ? highest[i] : maximum;
  for (; c < count; ++c) maximum = logits[c] > maximum ? logits[c] : maximum;
  for (c = 0; c < count; c += lanes<T>) {
    const Vector<T> x = (load_first<T>(logits + c, count - c) - maximum) / temperature;
    store<T>(weights + c, exponential<T>(x).exp());
  }
  return pick(weights, count, u);
}

struct Draw {
  uint64_t key;
  int64_t position, sequence;
};

template <typename T>
int64_t draw_class(const T* logits, int64_t count, T temperature, const Draw& at, T* weights) {
  return categorical(logits, count, temperature, uniform(at.key, at.position, at.sequence, 0), weights);
}

template <typename T>
T draw_value(const T* logits, int64_t count, T temperature, const Draw& at, T* weights) {
  const int64_t components = count / 3, c = draw_class(logits, components, temperature, at, weights);
  return logistic(logits[components + c], logits[2 * components + c], temperature, at.key, at.position, at.sequence);
}

template <typename S>
struct Problem {
  using T = Compute<S>;
  Shape shape;
  const S* weights;
  const T* offsets;  // (L, B or 1, 2 G)
  int64_t offset_layer, offset_sequence;
  const T* biases;
  const T* embedding;
  const int64_t* dilations;
  T residual_scale, skip_scale, temperature;
  bool mixture;
  const int64_t* forced_classes;  // (B, forced)
  const T* forced_values;
  int64_t forced, length;
  const T* condition;  // (B, length, A)
  const int64_t* last_class;
  const T* last_value;
  T* rings;  // (B, ring_rows, R), those of before, and changed in place
  int64_t ring_rows;
  uint64_t key;
  int64_t start, first_sequence;
  int64_t* classes;  // (B, length)
  T* values;
  T* logits;  // (B, length, O) or null
};

// A group of sequences: what they have to remember of one position, in rows of numbers one sequence apart.
template <typename S, typename T = Compute<S>>
class Group {
 public:
  Group(const Problem<S>& in, int64_t first, int64_t count) : in_(in), first_(first), count_(count) {
    const Shape& shape = in.shape;
    constexpr int64_t slack = lanes<T>;  // whole vectors are read and written
    z_stride_ = padded(2 * shape.gates) + slack;
    x_stride_ = padded(shape.residual) + slack;
    h_stride_ = padded(shape.gates) + slack;
    y_stride_ = padded(std::max({shape.residual + shape.skip, shape.hidden, shape.outputs})) + slack;
    skip_stride_ = padded(std::max({shape.skip, shape.hidden, shape.outputs})) + slack;
    int64_t positions = 0;
    for (int64_t i = 0; i < shape.layers; ++i) positions += at_once(i);
    T* memory = scratch<T>(count * (positions * z_stride_ + x_stride_ + h_stride_ + y_stride_ + skip_stride_));
    z_ = memory;
    x_ = z_ + count * positions * z_stride_;
    h_ = x_ + count * x_stride_;
    y_ = h_ + count * h_stride_;
    skip_ = y_ + count * y_stride_;
  }

  void run() {
    for (int64_t step = 0; step < in_.length; ++step) {
      enter(step);
      const Shape& shape = in_.shape;
      T* z = z_;
      int64_t ring = 0;
      for (int64_t i = 0; i < shape.layers; ++i) {
        const int64_t left = (shape.taps - 1) * in_.dilations[i], slot = step % at_once(i);
        if (left > 0 && slot == 0) multiply_past(i, step, ring, z);
        layer(i, step, ring, left, z + slot * count_ * z_stride_);
        z += at_once(i) * count_ * z_stride_;
        ring += left;
      }
      const bool drawn = step >= in_.forced;
      if (drawn || in_.logits != nullptr) logits(step);
      leave(step, drawn);
    }
  }

 private:
  // How many positions a layer's past is multiplied for at once.
  int64_t at_once(int64_t i) const {
    return in_.shape.taps == 1 ? 1 : std::min<int64_t>(most_positions, in_.dilations[i]);
  }

  T* ring_row(int64_t sequence, int64_t ring, int64_t left, int64_t position) const {
    return in_.rings + ((first_ + sequence) * in_.ring_rows + ring + position % left) * in_.shape.residual;
  }

  // The inputs of layer 0: of the sample before.
  void enter(int64_t step) {
    const int64_t channels = in_.shape.residual;
    for (int64_t b = 0; b < count_; ++b) {
      const int64_t sequence = first_ + b, before = sequence * in_.length + step - 1;
      T* x = x_ + b * x_stride_;
      if (in_.mixture) {
        const T value = step > 0 ? in_.values[before] : in_.last_value[sequence];
        for (int64_t c = 0; c < channels; c += lanes<T>) {
          // (a sum from zero, as a convolution has it: then the bias)
          Vector<T> product{};
          product += value * load_first<T>(in_.embedding + c, channels - c);
          store<T>(x + c, product + load_first<T>(in_.embedding + channels + c, channels - c));
        }
      } else {
        const int64_t index = step > 0 ? in_.classes[before] : in_.last_class[sequence];
        std::memcpy(x, in_.embedding + index * channels, static_cast<size_t>(channels) * sizeof(T));
      }
    }
  }

  // z of all taps but the newest, for the positions from `step` on.
  void multiply_past(int64_t i, int64_t step, int64_t ring, T* z) {
    const Shape& shape = in_.shape;
    const int64_t dilation = in_.dilations[i], left = (shape.taps - 1) * dilation;
    const int64_t positions = std::min(at_once(i), in_.length - step), channels = shape.residual;
    for (int64_t k = 0; k < shape.taps - 1; ++k) {
      int64_t count = 0;
      for (int64_t s = 0; s < positions; ++s) {
        for (int64_t b = 0; b < count_; ++b, ++count) {
          rows_.x[count] = ring_row(b, ring, left, in_.start + step + s + k * dilation);  // (that is modulo left)
          rows_.sums[count] = z + count * z_stride_;
        }
      }
      multiply<S>(in_.weights + shape.past_at(i), 2 * shape.gates, k * channels, channels, (shape.taps - 1) * channels,
                  rows_, count, k > 0);
    }
  }

  void each(const T* x, int64_t x_stride, T* sums, int64_t stride) {
    for (int64_t b = 0; b < count_; ++b) {
      rows_.x[b] = x + b * x_stride;
      rows_.sums[b] = sums + b * stride;
    }
  }

  void layer(int64_t i, int64_t step, int64_t ring, int64_t left, T* z) {
    const Shape& shape = in_.shape;
    const S* weights = in_.weights + shape.layer_at(i);
    each(x_, x_stride_, z, z_stride_);
    multiply<S>(weights, 2 * shape.gates, 0, shape.residual, shape.residual, rows_, count_, left > 0);
    weights += shape.newest_size();
    if (shape.condition > 0) {
      const T* condition = in_.condition + (first_ * in_.length + step) * shape.condition;
      each(condition, in_.length * shape.condition, z, z_stride_);
      multiply<S>(weights, 2 * shape.gates, 0, shape.condition, shape.condition, rows_, count_, true);
      weights += shape.condition_size();
    }
    for (int64_t b = 0; b < count_; ++b) {
      const T* offset = in_.offsets + i * in_.offset_layer + (first_ + b) * in_.offset_sequence;
      const T* filter = z + b * z_stride_;
      for (int64_t g = 0; g < shape.gates; g += lanes<T>) {
        const int64_t rest = shape.gates - g;
        const Vector<T> f = load_raw(filter + g) + load_first<T>(offset + g, rest);
        const Vector<T> e = load_raw(filter + shape.gates + g) + load_first<T>(offset + shape.gates + g, rest);
        store<T>(h_ + b * h_stride_ + g, hyperbolic_tangent<T>(f) * sigmoid<T>(e));
      }
    }
    each(h_, h_stride_, y_, y_stride_);
    multiply<S>(weights, shape.projected(i), 0, shape.gates, shape.gates, rows_, count_, false);

    const T* bias = in_.biases + shape.projection_bias_at(i);
    const int64_t channels = i + 1 < shape.layers ? shape.residual : 0;
    for (int64_t b = 0; b < count_; ++b) {
      const T* y = y_ + b * y_stride_;
      T* x = x_ + b * x_stride_;
      T* skip = skip_ + b * skip_stride_;
      if (left > 0) {
        std::memcpy(ring_row(b, ring, left, in_.start + step), x, static_cast<size_t>(shape.residual) * sizeof(T));
      }
      for (int64_t c = 0; c < channels; c += lanes<T>) {
        const Vector<T> sum = load_raw(y + c) + load_first<T>(bias + c, channels - c);
        store<T>(x + c, in_.residual_scale * (sum + load_raw(x + c)));
      }
      for (int64_t c = 0; c < shape.skip; c += lanes<T>) {
        const Vector<T> sum = load_raw(y + channels + c) + load_first<T>(bias + channels + c, shape.skip - c);
        store<T>(skip + c, i == 0 ? sum : load_raw(skip + c) + sum);
      }
    }
  }

  // The two last products, in place of the skips.
  void logits(int64_t step) {
    const Shape& shape = in_.shape;
    for (int64_t b = 0; b < count_; ++b) {
      T* skip = skip_ + b * skip_stride_;
      for (int64_t c = 0; c < shape.skip; c += lanes<T>) {
        const Vector<T> x = load_raw(skip + c) * in_.skip_scale;
        store<T>(skip + c, x < 0 ? Vector<T>{} : x);
      }
    }
    each(skip_, skip_stride_, y_, y_stride_);
    multiply<S>(in_.weights + shape.hidden_at(), shape.hidden, 0, shape.skip, shape.skip, rows_, count_, false);
    for (int64_t b = 0; b < count_; ++b) {
      for (int64_t c = 0; c < shape.hidden; c += lanes<T>) {
        const Vector<T> x =
            load_raw(y_ + b * y_stride_ + c) + load_first<T>(in_.biases + shape.hidden_bias_at() + c, shape.hidden - c);
        store<T>(y_ + b * y_stride_ + c, x < 0 ? Vector<T>{} : x);
      }
    }
    each(y_, y_stride_, skip_, skip_stride_);
    multiply<S>(in_.weights + shape.output_at(), shape.outputs, 0, shape.hidden, shape.hidden, rows_, count_, false);
    for (int64_t b = 0; b < count_; ++b) {
      T* out = skip_ + b * skip_stride_;
      for (int64_t c = 0; c < shape.outputs; c += lanes<T>) {
        store<T>(out + c,
                 load_raw(out + c) + load_first<T>(in_.biases + shape.output_bias_at() + c, shape.outputs - c));
      }
      if (in_.logits != nullptr) {
        std::memcpy(in_.logits + ((first_ + b) * in_.length + step) * shape.outputs, out,
                    static_cast<size_t>(shape.outputs) * sizeof(T));
      }
    }
  }

  // The samples of a position: drawn, or forced.
  void leave(int64_t step, bool drawn) {
    for (int64_t b = 0; b < count_; ++b) {
      const int64_t sequence = first_ + b, to = sequence * in_.length + step, from = sequence * in_.forced + step;
      const T* logits = skip_ + b * skip_stride_;
      T* weights = y_ + b * y_stride_;
      const Draw at{in_.key, in_.start + step, in_.first_sequence + sequence};
      if (in_.mixture) {
        in_.values[to] =
            drawn ? draw_value(logits, in_.shape.outputs, in_.temperature, at, weights) : in_.forced_values[from];
      } else {
        in_.classes[to] =
            drawn ? draw_class(logits, in_.shape.outputs, in_.temperature, at, weights) : in_.forced_classes[from];
      }
    }
  }

  const Problem<S>& in_;
  const int64_t first_, count_;
  int64_t z_stride_, x_stride_, h_stride_, y_stride_, skip_stride_;
  T *z_, *x_, *h_, *y_, *skip_;
  Rows<T> rows_;
};

// Calls f with a value of the C++ type of the weights.
template <typename F>
void dispatch(const Tensor& weights, const F& f) {
  switch (weights.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "wavenet_generate: no CPU kernel for this dtype");
  }
}

std::tuple<Tensor, Tensor, Tensor> generate(const Tensor& weights, const Tensor& offsets, const Tensor& biases,
                                            const Tensor& embedding, std::vector<int64_t> dilations,
                                            std::vector<int64_t> sizes, double residual_scale, double skip_scale,
                                            bool mixture, const OptionalTensor& forced, const OptionalTensor& condition,
                                            const Tensor& last, const Tensor& rings, const Tensor& seed, int64_t start,
                                            int64_t first_sequence, int64_t steps, double temperature,
                                            bool keep_logits) {
  const int64_t batch = rings.size(0), given = forced.has_value() ? forced->size(1) : 0, length = given + steps;
  Tensor samples = empty({batch, length}, last);
  Tensor logits = keep_logits ? empty({batch, length, sizes[5]}, rings) : empty({0}, rings);
  Tensor new_rings = empty({batch, rings.size(1), rings.size(2)}, rings);
  dispatch(weights, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    if (rings.numel() > 0) {
      std::memcpy(new_rings.data_ptr(), rings.data_ptr(), static_cast<size_t>(rings.numel()) * sizeof(T));
    }
    Problem<S> in;
    in.shape = {sizes[0], sizes[1], sizes[2], sizes[3],
                sizes[4], sizes[5], sizes[6], static_cast<int64_t>(dilations.size())};
    in.weights = pointer<S>(weights);
    in.offsets = pointer<T>(offsets);
    in.offset_layer = offsets.size(1) * offsets.size(2);
    in.offset_sequence = offsets.size(1) > 1 ? offsets.size(2) : 0;
    in.biases = pointer<T>(biases);
    in.embedding = pointer<T>(embedding);
    in.dilations = dilations.data();
    in.residual_scale = static_cast<T>(residual_scale);
    in.skip_scale = static_cast<T>(skip_scale);
    in.temperature = static_cast<T>(temperature);
    in.mixture = mixture;
    in.forced_classes = mixture ? nullptr : pointer<int64_t>(forced);
    in.forced_values = mixture ? pointer<T>(forced) : nullptr;
    in.forced = given;
    in.length = length;
    in.condition = pointer<T>(condition);
    in.last_class = mixture ? nullptr : pointer<int64_t>(last);
    in.last_value = mixture ? pointer<T>(last) : nullptr;
    in.rings = pointer<T>(new_rings);
    in.ring_rows = rings.size(1);
    in.key = static_cast<uint64_t>(*pointer<int64_t>(seed));
    in.start = start;
    in.first_sequence = first_sequence;
    in.classes = mixture ? nullptr : pointer<int64_t>(samples);
    in.values = mixture ? pointer<T>(samples) : nullptr;
    in.logits = keep_logits ? pointer<T>(logits) : nullptr;
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t grain = std::min(most_sequences, std::max<int64_t>(1, (batch + threads - 1) / threads));
    parallel_pieces(batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += most_sequences) {
        Group<S>(in, first, std::min(most_sequences, end - first)).run();
      }
    });
  });
  return {samples, logits, new_rings};
}

Tensor sample(const Tensor& logits, const Tensor& seed, int64_t step, int64_t first_sequence, double temperature,
              bool mixture) {
  const int64_t batch = logits.size(0), outputs = logits.size(1);
  Tensor samples = mixture ? empty({batch}, logits) : empty({batch}, logits, ScalarType::Long);
  const auto key = static_cast<uint64_t>(*pointer<int64_t>(seed));
  dispatch(logits, [&](auto element) {
    using T = Compute<decltype(element)>;
    constexpr int64_t grain = 64;
    parallel_pieces(batch, grain, [&](int64_t begin, int64_t end) {
      T* weights = scratch<T>(outputs + lanes<T>);
      for (int64_t b = begin; b < end; ++b) {
        const T* row = pointer<T>(logits) + b * outputs;
        const Draw at{key, step, first_sequence + b};
        if (mixture) {
          pointer<T>(samples)[b] = draw_value(row, outputs, static_cast<T>(temperature), at, weights);
        } else {
          pointer<int64_t>(samples)[b] = draw_class(row, outputs, static_cast<T>(temperature), at, weights);
        }
      }
    });
  });
  return samples;
}

}  // namespace
}  // namespace wavenet_generate
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("wavenet_generate", TORCH_BOX(&mpkernels::wavenet_generate::generate));
  library.impl("wavenet_sample", TORCH_BOX(&mpkernels::wavenet_generate::sample));
}
