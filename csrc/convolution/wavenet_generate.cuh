// WaveNet's sample loop on a GPU: one kernel for all positions of a call.
//
//   z_i = sum_{k, c} weight_i[., c, k] x_i[c, t + (k - K + 1) d_i] + sum_a condition_weight_i[., a] condition[a] +
//   offset_i h_i = tanh(z_i[:G]) sigmoid(z_i[G:])      x_i+1 = scale (x_i + residual_i h_i + bias_i)      skip +=
//   skip_i h_i + bias_i logits = output relu(hidden relu(skip) + bias) + bias          sample ~ softmax(logits), the
//   input of the next position
//
// (van den Oord et al. 2016, "WaveNet", eq. 2 and figure 4; Paine et al. 2016, "Fast Wavenet"; persistent blocks as in
// nv-wavenet, Nvidia 2018.) Shapes and the order of weights: mpkernels/convolution/wavenet_generate/schema.py.
//
// Decomposition: a block a sequence, which stays for all positions. Activations of a position are in shared memory, the
// past in rings in global memory. In a product of a matrix and a vector, a thread takes 16 bytes of neighbouring
// outputs of every n-th depth, n as large as the block has threads; the n partial sums of an output are added in their
// order by one thread, which goes on with the activation. So the bits depend on the sizes alone. The sample is drawn by
// the block: exponentials side by side, their running sum by one thread in the order of classes.
//
// Bytes: all weights once for each position, from the second cache: 2.7 MB for nv-wavenet's Medium in float32, half of
// that in bfloat16. A multiprocessor reads some 64 bytes a cycle of it.
#pragma once

#include "convolution/wavenet_generate_math.h"

namespace mpkernels {
namespace wavenet_generate {

// Threads of a block, by the type of the weights or of the sums (which are both double, or neither).
#if defined(MPKERNELS_ON_FIBRES)
template <typename T>
constexpr int block_threads = 64;  // (fibres take their time; and products take several passes)
#else
template <typename T>
constexpr int block_threads = sizeof(T) == 8 ? 256 : 512;  // (doubles need more registers)
#endif
constexpr int warp_lanes = 32;
constexpr int most_layers = 256;

// bfloat16 as it lies in memory.
using Bits16 = uint16_t;

template <typename S>
constexpr int pack_size = 16 / static_cast<int>(sizeof(S));
template <typename S>
struct alignas(16) Pack {
  S x[pack_size<S>];
};
template <>
struct alignas(16) Pack<Bits16> {
  uint32_t x[4];  // the two outputs of a word are 16 apart
};

template <typename S, typename T>
struct Problem {
  Shape shape;
  const S* weights;
  const T* offsets;  // (L, B or 1, 2 G)
  int64_t offset_layer, offset_sequence;
  const T* biases;
  const T* embedding;  // (classes, R), or (2, R)
  T residual_scale, skip_scale, temperature;
  bool mixture;
  const int64_t* forced_classes;  // (B, forced)
  const T* forced_values;
  int64_t forced, length;
  const T* condition;  // (B, length, A)
  const int64_t* last_class;
  const T* last_value;
  const T* old_rings;  // (B, ring_rows, R)
  T* rings;
  int64_t ring_rows;
  const int64_t* seed;
  int64_t start, first_sequence;
  int64_t* classes;  // (B, length)
  T* values;
  T* logits;  // (B, length, O) or null
  int32_t dilations[most_layers];
};

// Adds factor times 16 bytes of weights to the sums of their outputs: pack outputs side by side or, in bfloat16, 4 and
// the 4 that are 16 behind.
template <typename T, typename S>
__device__ __forceinline__ void add_pack(T (&sums)[pack_size<S>], T factor, const Pack<S>& weights) {
#pragma unroll
  for (int i = 0; i < pack_size<S>; ++i) sums[i] += factor * weights.x[i];
}
__device__ __forceinline__ float of_bits(uint32_t bits) {
#if defined(MPKERNELS_ON_FIBRES)
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
#else
  return __uint_as_float(bits);
#endif
}
__device__ __forceinline__ void add_pack(float (&sums)[8], float factor, const Pack<Bits16>& weights) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[i] += factor * of_bits(weights.x[i] << 16);
    sums[i + 4] += factor * of_bits(weights.x[i] & 0xFFFF0000u);
  }
}

// Which output the i-th sum of a chunk belongs to.
template <typename S>
__device__ __forceinline__ int output_of(int chunk, int i) {
  if constexpr (sizeof(S) == 2) {
    return chunk / 4 * static_cast<int>(block_outputs) + chunk % 4 * 4 + i % 4 + i / 4 * 16;
  } else {
    return chunk * pack_size<S> + i;
  }
}

// How the threads of a block share a packed matrix.
template <typename S>
struct Share {
  static constexpr int most_width = static_cast<int>(panel_outputs);
  int outputs, chunks, chunk, panel, width;
  int slices, slice;

  // chunks from `first` on
  __device__ __forceinline__ Share(int all_outputs, int first) {
    outputs = static_cast<int>(padded(all_outputs));
    chunks = outputs / pack_size<S> - first;
    if (chunks > block_threads<S>) chunks = block_threads<S>;
    slices = block_threads<S> / static_cast<int>(chunks);
    slice = static_cast<int>(threadIdx.x / chunks);
    chunk = first + threadIdx.x % chunks;
    panel = chunk * pack_size<S> / most_width;
    width = outputs - panel * most_width < most_width ? outputs - panel * most_width : most_width;
  }

  // Adds the products of depths [0, depth) of a matrix that has `whole` depths, from depth `skipped` on.
  template <typename T, typename Input>
  __device__ __forceinline__ void add(T (&sums)[pack_size<S>], const S* weights, int skipped, int depth, int whole,
                                      const Input& input) const {
    const S* from =
        weights + int64_t{panel} * most_width * whole + skipped * width + (chunk * pack_size<S> - panel * most_width);
#pragma unroll 4
    for (int k = slice; k < depth; k += slices) {
      add_pack(sums, static_cast<T>(input(k)), *reinterpret_cast<const Pack<S>*>(from + k * width));
    }
  }

  // The partial sums of a thread, where `product` finds them.
  template <typename T>
  __device__ __forceinline__ void leave(const T (&sums)[pack_size<S>], int first, T* partial) const {
    if (slice >= slices) return;
    const int base = output_of<S>(first, 0);
#pragma unroll
    for (int i = 0; i < pack_size<S>; ++i) {
      partial[slice * chunks * pack_size<S> + output_of<S>(chunk, i) - base] = sums[i];
    }
  }
};

// All outputs of a product: `accumulate(share, sums)` adds what a thread has, `finish(output, sum)` gets each sum. A
// barrier before the sums are added and one behind.
template <typename S, typename T, typename Accumulate, typename Finish>
__device__ __forceinline__ void product(int outputs, T* partial, const Accumulate& accumulate, const Finish& finish) {
  for (int first = 0; first < static_cast<int>(padded(outputs)) / pack_size<S>; first += block_threads<S>) {
    const Share<S> share(outputs, first);
    T sums[pack_size<S>] = {};
    if (share.slice < share.slices) accumulate(share, sums);
    share.leave(sums, first, partial);
    __syncthreads();
    const int base = first * pack_size<S>, count = share.chunks * pack_size<S>;
    for (int o = threadIdx.x; o < count && base + o < outputs; o += block_threads<S>) {
      T sum = 0;
      for (int s = 0; s < share.slices; ++s) sum += partial[s * count + o];
      finish(base + o, sum);
    }
    __syncthreads();
  }
}

// Numbers of shared memory, and how many there are.
template <typename T>
struct Memory {
  T *x, *gates, *skip, *hidden, *logits, *weights, *partial;

  static MPKERNELS_HOST_DEVICE int64_t size(const Shape& shape, int pack) {
    return shape.residual + 2 * shape.gates + shape.skip + shape.hidden + 2 * shape.outputs + block_threads<T> * pack;
  }

  __device__ __forceinline__ Memory(T* memory, const Shape& shape) {
    x = memory;
    gates = x + shape.residual;
    skip = gates + 2 * shape.gates;
    hidden = skip + shape.skip;
    logits = hidden + shape.hidden;
    weights = logits + shape.outputs;
    partial = weights + shape.outputs;
  }
};

// The class that a block draws from `count` logits; all threads return it. A barrier must lie before.
template <typename T>
__device__ __forceinline__ int64_t draw_class(const T* logits, int count, T temperature, uint64_t key, int64_t position,
                                              int64_t sequence, T* weights) {
  __shared__ int64_t chosen;
  __shared__ T maximum;
  if (threadIdx.x < warp_lanes) {
    T highest = logits[static_cast<int>(threadIdx.x) < count ? threadIdx.x : 0];
    for (int c = threadIdx.x; c < count; c += warp_lanes) highest = logits[c] > highest ? logits[c] : highest;
#pragma unroll
    for (int step = warp_lanes / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, highest, step);
      highest = other > highest ? other : highest;
    }
    if (threadIdx.x == 0) maximum = highest;
  }
  __syncthreads();
  if (temperature > 0) {
    for (int c = threadIdx.x; c < count; c += block_threads<T>) {
      weights[c] = exp((logits[c] - maximum) / temperature);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    chosen = count - 1;
    if (temperature > 0) {
      T sum = 0;
      for (int c = 0; c < count; ++c) {
        sum += weights[c];
        weights[c] = sum;
      }
    } else {
      chosen = first_largest(logits, count);
    }
  }
  __syncthreads();
  if (temperature > 0) {
    const double wanted = uniform(key, position, sequence, 0) * static_cast<double>(weights[count - 1]);
    for (int c = threadIdx.x; c < count; c += block_threads<T>) {
      const bool first = c == 0 || !(static_cast<double>(weights[c - 1]) > wanted);
      if (first && static_cast<double>(weights[c]) > wanted) chosen = c;
    }
  }
  __syncthreads();
  return chosen;
}

template <typename S, typename T>
__global__ void __launch_bounds__(block_threads<T>, 1) generate_kernel(const Problem<S, T> in) {
  MPKERNELS_DYNAMIC_SHARED(T, dynamic);
  const Shape& shape = in.shape;
  const Memory<T> at(dynamic, shape);
  const int64_t sequence = blockIdx.x;
  const int channels = static_cast<int>(shape.residual), taps = static_cast<int>(shape.taps);
  const int gates = static_cast<int>(shape.gates), skips = static_cast<int>(shape.skip);
  const int hidden = static_cast<int>(shape.hidden), outputs = static_cast<int>(shape.outputs);
  const int conditions = static_cast<int>(shape.condition), layers = static_cast<int>(shape.layers);
  const uint64_t key = static_cast<uint64_t>(*in.seed);
  T* rings = in.rings + sequence * in.ring_rows * channels;
  const T* old = in.old_rings + sequence * in.ring_rows * channels;
  for (int64_t i = threadIdx.x; i < in.ring_rows * channels; i += block_threads<T>) rings[i] = old[i];
  int64_t last_class = in.mixture ? 0 : in.last_class[sequence];
  T last_value = in.mixture ? in.last_value[sequence] : T(0);
  __syncthreads();

  for (int64_t step = 0; step < in.length; ++step) {
    for (int c = threadIdx.x; c < channels; c += block_threads<T>) {
      at.x[c] = in.mixture ? in.embedding[c] * last_value + in.embedding[channels + c]
                           : in.embedding[last_class * channels + c];
    }
    __syncthreads();

    int64_t ring = 0;
    for (int i = 0; i < layers; ++i) {
      const int64_t dilation = in.dilations[i], left = (taps - 1) * dilation;
      const int64_t slot = left > 0 ? (in.start + step) % left : 0;  // of this position
      const T* layer_ring = rings + ring * channels;
      const S* newest = in.weights + shape.layer_at(i);
      const T* offset = in.offsets + i * in.offset_layer + sequence * in.offset_sequence;
      product<S, T>(
          2 * gates, at.partial,
          [&](const Share<S>& share, T(&sums)[pack_size<S>]) {
            for (int k = 0; k < taps - 1; ++k) {
              const int64_t row = slot + k * dilation;
              const T* past = layer_ring + (row < left ? row : row - left) * channels;
              share.add(sums, in.weights + shape.past_at(i), k * channels, channels, (taps - 1) * channels,
                        [&](int c) { return past[c]; });
            }
            share.add(sums, newest, 0, channels, channels, [&](int c) { return at.x[c]; });
            if (conditions > 0) {
              const T* condition = in.condition + (sequence * in.length + step) * conditions;
              share.add(sums, newest + shape.newest_size(), 0, conditions, conditions,
                        [&](int a) { return condition[a]; });
            }
          },
          [&](int o, T sum) {
            const T z = sum + offset[o];
            at.gates[o] = o < gates ? tanh(z) : 1 / (1 + exp(-z));
          });

      const int rows = i + 1 < layers ? channels : 0;
      const T* bias = in.biases + shape.projection_bias_at(i);
      if (left > 0) {
        T* to = rings + (ring + slot) * channels;
        for (int c = threadIdx.x; c < channels; c += block_threads<T>) to[c] = at.x[c];
      }
      product<S, T>(
          rows + skips, at.partial,
          [&](const Share<S>& share, T(&sums)[pack_size<S>]) {
            share.add(sums, newest + shape.newest_size() + shape.condition_size(), 0, gates, gates,
                      [&](int g) { return at.gates[g] * at.gates[gates + g]; });
          },
          [&](int o, T sum) {
            sum += bias[o];
            if (o < rows) {
              at.x[o] = in.residual_scale * (sum + at.x[o]);
            } else {
              at.skip[o - rows] = i == 0 ? sum : at.skip[o - rows] + sum;
            }
          });
      ring += left;
    }

    const bool drawn = step >= in.forced;
    const int64_t to = sequence * in.length + step, position = in.start + step;
    if (drawn || in.logits != nullptr) {
      product<S, T>(
          hidden, at.partial,
          [&](const Share<S>& share, T(&sums)[pack_size<S>]) {
            share.add(sums, in.weights + shape.hidden_at(), 0, skips, skips, [&](int c) {
              const T x = in.skip_scale * at.skip[c];
              return x < 0 ? T(0) : x;
            });
          },
          [&](int o, T sum) {
            sum += in.biases[shape.hidden_bias_at() + o];
            at.hidden[o] = sum < 0 ? T(0) : sum;
          });
      product<S, T>(
          outputs, at.partial,
          [&](const Share<S>& share, T(&sums)[pack_size<S>]) {
            share.add(sums, in.weights + shape.output_at(), 0, hidden, hidden, [&](int c) { return at.hidden[c]; });
          },
          [&](int o, T sum) {
            sum += in.biases[shape.output_bias_at() + o];
            at.logits[o] = sum;
            if (in.logits != nullptr) in.logits[to * outputs + o] = sum;
          });
    }

    if (drawn) {
      const int64_t numbered = in.first_sequence + sequence;
      const int among = in.mixture ? outputs / 3 : outputs;
      last_class = draw_class(at.logits, among, in.temperature, key, position, numbered, at.weights);
      if (in.mixture) {
        last_value = logistic(at.logits[among + last_class], at.logits[2 * among + last_class], in.temperature, key,
                              position, numbered);
      }
    } else if (in.mixture) {
      last_value = in.forced_values[sequence * in.forced + step];
    } else {
      last_class = in.forced_classes[sequence * in.forced + step];
    }
    if (threadIdx.x == 0) {
      if (in.mixture) {
        in.values[to] = last_value;
      } else {
        in.classes[to] = last_class;
      }
    }
  }
}

// A block a row.
template <typename T>
__global__ void __launch_bounds__(block_threads<T>)
    sample_kernel(const T* logits,  // (B, O)
                  const int64_t* seed, int64_t outputs, int64_t position, int64_t first_sequence, T temperature,
                  bool mixture,
                  int64_t* classes,  // (B,) or null
                  T* values) {
  MPKERNELS_DYNAMIC_SHARED(T, weights);
  const T* row = logits + blockIdx.x * outputs;
  const uint64_t key = static_cast<uint64_t>(*seed);
  const int among = static_cast<int>(mixture ? outputs / 3 : outputs);
  const int64_t sequence = first_sequence + blockIdx.x;
  const int64_t c = draw_class(row, among, temperature, key, position, sequence, weights);
  if (threadIdx.x != 0) return;
  if (mixture) {
    values[blockIdx.x] = logistic(row[among + c], row[2 * among + c], temperature, key, position, sequence);
  } else {
    classes[blockIdx.x] = c;
  }
}

}  // namespace wavenet_generate
}  // namespace mpkernels
