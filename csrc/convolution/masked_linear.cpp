// MADE's layer on the CPU: y[n, o] = bias[o] + sum of weight[o, i] x[n, i] over the inputs i that output o sees
// (Germain et al. 2015, eq. 8 and 9), and its gradients. Shapes: mpkernels/convolution/masked_linear/schema.py.
//
// In the order of degrees output r sees the inputs [0, count[r]), and count never falls: the mask is a staircase. Only
// what lies under it is read and multiplied, so that a layer with degrees spread evenly does half of N I O fused
// multiply-adds a product. Lanes run along the rows of the batch, which leaves every weight a factor of its own: sums
// end exactly where the staircase does, whatever the neighbours hold.
//
// Forward: threads take blocks of 48 outputs for all rows. x is transposed and sorted once (for at most 512 rows at a
//   time), weights are sorted on their way into a block of 48 x 2048 in the caches; each weight that counts is read
//   once for 512 rows.
// Gradient of x: the same with the transposed staircase, where output r is seen by the inputs below count[r]. Blocks of
//   256 rows of the weight are sorted into memory that stays in the caches, then threads take blocks of 96 inputs.
// Gradient of weight: threads take blocks of 48 outputs; lanes run along the sorted inputs, the contraction along the
//   batch. What lies beyond count[r] in the last vector is computed and dropped; rows are then written in the order of
//   the caller, zeros included.
//
// Sums have an order that depends on the staircase and the number of rows alone, never on threads.
#include "common/dispatch.h"
#include "common/tensor.h"
#include "convolution/masked_linear_products.h"

#include <tuple>

namespace mpkernels {
namespace masked_linear {
namespace {

constexpr int64_t input_block = 96;    // inputs whose gradient a thread forms at a time
constexpr int64_t output_block = 256;  // rows of the weight that are sorted at a time, for the gradient of x

int64_t blocks(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

// Rows of the batch that are handled at once: few enough that their copies stay in the caches, whole panels.
template <typename T>
int64_t chunk_rows(int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t most = (int64_t{1} << 20) / std::max<int64_t>({inputs, outputs, 1});
  const int64_t whole = std::clamp<int64_t>(most / panel<T> * panel<T>, panel<T>, 512);
  return std::max<int64_t>(1, std::min(rows, whole));
}

// The problem in the types of one dtype.
template <typename S>
struct Layer {
  using T = Compute<S>;
  const S* weight;  // (O, I)
  Order in, out;
  const int32_t* count;  // (O,)

  const S* weights_of(int64_t place) const { return weight + out.at[place] * in.size; }
  int64_t seen(int64_t place) const { return count[place]; }

  // Weights under the staircase: multiplications of a product, a row of the batch.
  int64_t visible() const {
    int64_t sum = 0;
    for (int64_t r = 0; r < out.size; ++r) sum += count[r];
    return sum;
  }
};

template <typename S>
Layer<S> layer_of(const Tensor& weight, const Tensor& order_in, const Tensor& order_out, const Tensor& count) {
  return {pointer<const S>(weight), order_of<0>(pointer<const int32_t>(order_in), weight.size(1)),
          order_of<1>(pointer<const int32_t>(order_out), weight.size(0)), pointer<const int32_t>(count)};
}

// y (rows, O) of rows of x that are packed transposed.
template <typename S>
void forward_chunk(const Layer<S>& layer, const Compute<S>* packed, int64_t rows, const S* bias, S* y) {
  using T = Compute<S>;
  const int64_t inputs = layer.in.size, outputs = layer.out.size;
  const int64_t panels = blocks(rows, panel<T>), c_row = panels * panel<T>, pieces = blocks(outputs, unit_block);
  parallel_pieces(pieces, grain_of(pieces, rows * layer.visible()), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = (pieces - 1 - piece) * unit_block;  // those that see most come first
      const int64_t units = std::min(unit_block, outputs - first);
      const int64_t depth = layer.seen(first + units - 1);
      const int64_t a_row = std::min(depth_most, blocks(depth, depth_block) * depth_block);
      T* c = scratch<T>(unit_block * (c_row + a_row + 1));
      T* a = c + unit_block * c_row;
      T* offset = a + unit_block * a_row;
      std::memset(c, 0, sizeof(T) * units * c_row);
      for (int64_t k = 0; k < depth; k += depth_block) {
        const auto to = [&](int64_t m) { return std::clamp<int64_t>(layer.seen(first + m) - k, 0, depth_block); };
        if (k % depth_most == 0) {
          for (int64_t m = 0; m < units; ++m) {
            const int64_t count = std::clamp<int64_t>(layer.seen(first + m) - k, 0, depth_most);
            const int64_t next = std::min(first + m + 1, outputs - 1);
            take_ordered(layer.weights_of(first + m), layer.weights_of(next), layer.in, k, count, a + m * a_row);
          }
        }
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t vectors = blocks(std::min(panel<T>, rows - p * panel<T>), lanes<T>);
          multiply_stairs(
              Left<T>{a + k % depth_most, a_row, 1}, packed + (p * inputs + k) * panel<T>, c + p * panel<T>, c_row,
              units, vectors, [](int64_t) { return int64_t{0}; }, to);
        }
      }
      if (bias != nullptr) {
        for (int64_t m = 0; m < units; ++m) offset[m] = to_compute(bias[layer.out.at[first + m]]);
      }
      write_transposed(c, c_row, units, bias == nullptr ? nullptr : offset, layer.out, first, rows, y);
    }
  });
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& order_in,
               const Tensor& order_out, const Tensor& count) {
  const int64_t rows = x.size(0), inputs = weight.size(1), outputs = weight.size(0);
  Tensor y = empty({rows, outputs}, x);
  if (rows == 0 || outputs == 0) return y;
  dispatch_floating("masked_linear", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const auto layer = layer_of<S>(weight, order_in, order_out, count);
    const int64_t chunk = chunk_rows<T>(rows, inputs, outputs);
    T* packed = shared_scratch<T, 0>(blocks(chunk, panel<T>) * panel<T> * inputs);
    for (int64_t n = 0; n < rows; n += chunk) {
      const int64_t these = std::min(chunk, rows - n);
      pack_transposed(pointer<const S>(x) + n * inputs, these, layer.in, packed);
      forward_chunk(layer, packed, these, pointer<const S>(bias), pointer<S>(y) + n * outputs);
    }
  });
  return y;
}

// Gradient of x (rows, I), from that of y packed transposed. first[s] is the first output that sees input s.
template <typename S>
void of_x_chunk(const Layer<S>& layer, const int32_t* first_of, const Compute<S>* packed, int64_t rows, S* of_x) {
  using T = Compute<S>;
  const int64_t inputs = layer.in.size, outputs = layer.out.size;
  const int64_t panels = blocks(rows, panel<T>), c_row = panels * panel<T>, pieces = blocks(inputs, input_block);
  const int64_t grain = grain_of(pieces, rows * layer.visible());
  const bool sorted = std::is_same_v<S, T> && layer.in.identity && layer.out.identity;
  T* sums = shared_scratch<T, 2>(inputs * c_row);
  T* ordered = sorted ? nullptr : shared_scratch<T, 3>(std::min(output_block, outputs) * inputs);
  for (int64_t r = 0; r == 0 || r < outputs; r += output_block) {
    const int64_t these = std::min(output_block, outputs - r);
    const bool last = r + output_block >= outputs;
    const T* weights = ordered;
    if constexpr (std::is_same_v<S, T>) {
      if (sorted) weights = layer.weight + r * inputs;
    }
    if (!sorted) {
      parallel_pieces(these, std::max<int64_t>(grain_of(these, these * inputs), 16), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t next = std::min(r + i + 1, outputs - 1);
          take_ordered(layer.weights_of(r + i), layer.weights_of(next), layer.in, 0, layer.seen(r + i),
                       ordered + i * inputs);
        }
      });
    }
    parallel_pieces(pieces, grain, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t s = piece * input_block, units = std::min(input_block, inputs - s);
        T* c = sums + s * c_row;
        if (r == 0) std::memset(c, 0, sizeof(T) * units * c_row);
        T* a = scratch<T>(input_block * depth_block);
        for (int64_t k = 0; k < these; k += depth_block) {
          const int64_t depth = std::min(depth_block, these - k);
          if (layer.seen(r + k + depth - 1) <= s) continue;  // nobody sees any of these inputs
          for (int64_t i = 0; i < depth; ++i) {
            const int64_t count = std::clamp<int64_t>(layer.seen(r + k + i) - s, 0, units);
            std::memcpy(a + i * input_block, weights + (k + i) * inputs + s, sizeof(T) * count);
          }
          for (int64_t p = 0; p < panels; ++p) {
            const int64_t vectors = blocks(std::min(panel<T>, rows - p * panel<T>), lanes<T>);
            multiply_stairs(
                Left<T>{a, 1, input_block}, packed + (p * outputs + r + k) * panel<T>, c + p * panel<T>, c_row, units,
                vectors, [&](int64_t m) { return std::clamp<int64_t>(first_of[s + m] - r - k, 0, depth); },
                [&](int64_t) { return depth; });
          }
        }
        if (last) {
          write_transposed(c, c_row, units, static_cast<const T*>(nullptr), layer.in, s, rows, of_x);
        }
      }
    });
  }
}

// Adds the gradient of the weight (O, I) by these rows. `grad` is that of y packed transposed, x is packed in order.
// Sums over more than one chunk are kept in `total` where S is too narrow for them.
template <typename S>
void of_weight_chunk(const Layer<S>& layer, const Compute<S>* grad, const Compute<S>* x, int64_t rows, bool is_first,
                     bool is_last, Compute<S>* total, S* of_weight) {
  using T = Compute<S>;
  const int64_t inputs = layer.in.size, outputs = layer.out.size, pieces = blocks(outputs, unit_block);
  const int64_t c_row = blocks(inputs, panel<T>) * panel<T>;
  parallel_pieces(pieces, grain_of(pieces, rows * layer.visible()), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = (pieces - 1 - piece) * unit_block, units = std::min(unit_block, outputs - first);
      T* c = scratch<T>(unit_block * c_row);
      const int64_t most = layer.seen(first + units - 1);
      for (int64_t s = 0; s < most; s += panel<T>) {
        for (int64_t n = 0; n < rows; n += panel<T>) {
          const int64_t depth = std::min(panel<T>, rows - n);
          for (int64_t m = 0; m < units; m += tile_rows) {
            const int64_t tile = std::min<int64_t>(tile_rows, units - m);
            const int64_t vectors =
                blocks(std::clamp<int64_t>(layer.seen(first + m + tile - 1) - s, 0, panel<T>), lanes<T>);
            multiply(Left<T>{grad + (n / panel<T> * outputs + first + m) * panel<T>, panel<T>, 1},
                     x + (s / panel<T> * rows + n) * panel<T>, panel<T>, c + m * c_row + s, c_row, tile, vectors, depth,
                     n > 0);
          }
        }
      }
      for (int64_t m = 0; m < units; ++m) {
        const int64_t row = layer.out.at[first + m] * inputs, seen = layer.seen(first + m);
        const T* from = c + m * c_row;
        for (int64_t i = 0; i < inputs; i += lanes<T>) {
          const int64_t count = std::min<int64_t>(lanes<T>, inputs - i);
          Vector<T> v{};
          if (layer.in.identity) {
            v = load_first<T>(from + i, std::min(count, seen - i));
          } else {
            const int32_t* rank = layer.in.rank + i;
            alignas(64) T numbers[lanes<T>] = {};
            for (int64_t l = 0; l < count; ++l) numbers[l] = rank[l] < seen ? from[rank[l]] : T(0);
            v = load_raw(numbers);
          }
          if (!is_first) v += load_first<T>(total + row + i, count);
          if constexpr (!std::is_same_v<S, T>) {
            if (!is_last) store_first<T>(total + row + i, v, count);
          }
          if (is_last || std::is_same_v<S, T>) stream_first<S>(of_weight + row + i, v, count);
        }
      }
    }
    finish_streams();
  });
}

// Adds the sums of the gradient of y over these rows, in the sorted order of outputs.
template <typename T>
void of_bias_chunk(const T* grad, int64_t outputs, int64_t rows, bool is_first, T* sums) {
  for (int64_t r = 0; r < outputs; ++r) {
    Vector<T> v{};
    for (int64_t n = 0; n < rows; n += lanes<T>) {
      v += load_raw(grad + (n / panel<T> * outputs + r) * panel<T> + n % panel<T>);
    }
    sums[r] = (is_first ? T(0) : sums[r]) + sum<T>(v);
  }
}

template <typename S>
void backward_in(const Layer<S>& layer, const S* grad, const S* x, int64_t rows, S* of_x, S* of_weight, S* of_bias,
                 Compute<S>* total) {
  using T = Compute<S>;
  const int64_t inputs = layer.in.size, outputs = layer.out.size, chunk = chunk_rows<T>(rows, inputs, outputs);
  const int64_t padded = blocks(chunk, panel<T>) * panel<T>;
  T* packed_grad = shared_scratch<T, 0>(padded * outputs);
  T* packed_x = of_weight == nullptr ? nullptr : shared_scratch<T, 1>(chunk * blocks(inputs, panel<T>) * panel<T>);
  T* sums = of_bias == nullptr ? nullptr : shared_scratch<T, 4>(outputs);
  int32_t* first_of = shared_scratch<int32_t, 2>(std::max<int64_t>(inputs, 1));
  for (int64_t s = 0, r = 0; s < inputs; ++s) {
    while (r < outputs && layer.seen(r) <= s) ++r;
    first_of[s] = static_cast<int32_t>(r);
  }
  for (int64_t n = 0; n < rows; n += chunk) {
    const int64_t these = std::min(chunk, rows - n);
    const bool is_first = n == 0, is_last = n + these == rows;
    pack_transposed(grad + n * outputs, these, layer.out, packed_grad);
    if (of_x != nullptr) of_x_chunk(layer, first_of, packed_grad, these, of_x + n * inputs);
    if (of_weight != nullptr) {
      pack_ordered(x + n * inputs, these, layer.in, packed_x);
      of_weight_chunk(layer, packed_grad, packed_x, these, is_first, is_last, total, of_weight);
    }
    if (of_bias != nullptr) of_bias_chunk(packed_grad, outputs, these, is_first, sums);
  }
  if (of_bias != nullptr) {
    for (int64_t r = 0; r < outputs; ++r) of_bias[layer.out.at[r]] = static_cast<S>(sums[r]);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                            const Tensor& order_in, const Tensor& order_out, const Tensor& count,
                                            int64_t needs) {
  const int64_t rows = x.size(0), inputs = weight.size(1), outputs = weight.size(0);
  Tensor of_x = (needs & 1) != 0 ? empty({rows, inputs}, x) : no_gradient(x);
  Tensor of_weight = (needs & 2) != 0 ? empty({outputs, inputs}, x) : no_gradient(x);
  Tensor of_bias = (needs & 4) != 0 ? empty({outputs}, x) : no_gradient(x);
  if (rows == 0) {
    torch::stable::zero_(of_weight);
    torch::stable::zero_(of_bias);
    return {of_x, of_weight, of_bias};
  }
  dispatch_floating("masked_linear", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const auto layer = layer_of<S>(weight, order_in, order_out, count);
    Tensor total = of_weight;
    const bool narrow = !std::is_same_v<S, T> && rows > chunk_rows<T>(rows, inputs, outputs);
    if (narrow && (needs & 2) != 0) total = empty({outputs, inputs}, x, ScalarType::Float);
    const auto wanted = [&](const Tensor& of, int64_t bit) { return (needs & bit) != 0 ? pointer<S>(of) : nullptr; };
    backward_in(layer, pointer<const S>(grad), pointer<const S>(x), rows, wanted(of_x, 1), wanted(of_weight, 2),
                wanted(of_bias, 4), pointer<T>(total));
  });
  return {of_x, of_weight, of_bias};
}

}  // namespace
}  // namespace masked_linear
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("masked_linear", TORCH_BOX(&mpkernels::masked_linear::forward));
  library.impl("masked_linear_backward", TORCH_BOX(&mpkernels::masked_linear::backward));
}
