// The product with a matrix at every position on the CPU: Glow's invertible 1x1 convolution (Kingma and Dhariwal 2018,
// section 3.2), with ActNorm folded into matrix and bias.
//
//   y[b, o, p] = sum_c weight[o, c] x[b, c, p] + bias[o]
//   dL/dx = weight^T g,   dL/dweight[o, c] = sum_{b, p} g[b, o, p] x[b, c, p],   dL/dbias[o] = sum_{b, p} g[b, o, p]
//
// x (B, C, S) of any strides, weight (O, C), bias (O,); y, g (B, O, S) contiguous.
//
// Decomposition: samples and positions together are columns; a panel is 64 of them, across samples where those are
// short. A panel is packed once (lanes along the columns, whatever the memory order and the dtype), multiplied with the
// weight as it lies (`multiply` of common/matmul.h), and written. The backward does all three gradients of a panel in
// one pass: g is packed once for the product with weight^T, for the sums over it, and as the left factor of g x^T,
// whose right factor is the panel of x transposed. Fixed pieces of panels have sums of their own, added in order.
//
// FLOPs: 2 O C B S, and twice that backward. Bytes: x read and y written; backward g and x read, dx written. At C = 48
// in float32 that is 12 FLOPs a byte: the products are the limit.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "flows/channel_mix_columns.h"

#include <memory>
#include <tuple>

namespace mpkernels {
namespace channel_mix {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t blocks(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

// `multiply`, with the last vectors of a row in one tile: 48 channels are 3 vectors with AVX-512, which one by one
// would leave half of the arithmetic waiting for loads.
template <typename T>
void multiply_rows(const Left<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows, int64_t vectors,
                   int64_t depth, bool accumulate) {
  const int64_t whole = vectors / tile_vectors * tile_vectors, at = whole * lanes<T>;
  multiply<T>(a, b, b_row, c, c_row, rows, whole, depth, accumulate);
  switch (vectors - whole) {
    case 3:
      return multiply_columns<3>(a, b + at, b_row, c + at, c_row, rows, depth, accumulate);
    case 2:
      return multiply_columns<2>(a, b + at, b_row, c + at, c_row, rows, depth, accumulate);
    case 1:
      return multiply_columns<1>(a, b + at, b_row, c + at, c_row, rows, depth, accumulate);
  }
}

// Columns [first, first + count) of y: left (rows, depth) times `right` (depth, 64), plus offset (rows,) or nothing.
// `work` holds (rows, 64).
template <typename S, typename T = Compute<S>>
void product(const Left<T>& left, const T* right, int64_t rows, int64_t depth, const T* offset, const Columns<S>& y,
             int64_t first, int64_t count, T* work) {
  T* to = work;
  int64_t row = panel;
  const bool in_place =
      std::is_same_v<S, T> && y.position_stride == 1 && y.run(first) >= count && count % lanes<T> == 0;
  if constexpr (std::is_same_v<S, T>) {
    if (in_place) {
      to = y.at(first);
      row = y.channel_stride;
    }
  }
  const int64_t vectors = blocks(count, lanes<T>);
  for (int64_t m = 0; offset != nullptr && m < rows; ++m) {
    const Vector<T> start = broadcast<T>(offset[m]);
    for (int64_t v = 0; v < vectors; ++v) store<T>(to + m * row + v * lanes<T>, start);
  }
  multiply_rows<T>(left, right, panel, to, row, rows, vectors, depth, offset != nullptr);
  if (!in_place) unpack<S>(work, rows, first, count, y);
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t inputs = weight.size(1), outputs = weight.size(0), columns = x.size(0) * x.size(2);
  Tensor y = empty({x.size(0), outputs, x.size(2)}, x);
  if (columns == 0 || outputs == 0) return y;
  dispatch_floating("channel_mix", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Columns<const S> from(x);
    const Columns<S> to(y);
    const Left<T> left{pointer<const T>(weight), inputs, 1};
    parallel_pieces(blocks(columns, panel), 4, [&](int64_t begin, int64_t end) {
      T* packed = scratch<T>((inputs + outputs) * panel);
      for (int64_t n = begin * panel; n < std::min(columns, end * panel); n += panel) {
        const int64_t count = std::min(panel, columns - n);
        pack<S>(from, inputs, n, count, packed);
        product<S>(left, packed, outputs, inputs, pointer<const T>(bias), to, n, count, packed + inputs * panel);
      }
    });
  });
  return y;
}

// The sums of a piece of panels: the gradient of the weight in rows of whole vectors, then a vector an output.
template <typename T>
struct Sums {
  int64_t row, weight, each;

  Sums(int64_t outputs, int64_t inputs, bool needs_weight)
      : row(blocks(inputs, lanes<T>) * lanes<T>),
        weight(needs_weight ? outputs * row : 0),
        each(weight + outputs * lanes<T>) {}

  // Panels in a piece: at least 16 of them, at most 64 pieces, and no more than 32 MiB of float32 for two or more.
  int64_t panels(int64_t all) const {
    const int64_t most = std::clamp<int64_t>((int64_t{1} << 23) / each, 2, 64);
    return std::max<int64_t>(16, blocks(all, most));
  }
};

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool needs_x,
                                            bool needs_weight, bool needs_bias) {
  const int64_t inputs = weight.size(1), outputs = weight.size(0), columns = x.size(0) * x.size(2);
  Tensor of_x = needs_x ? empty({x.size(0), inputs, x.size(2)}, x) : no_gradient(x);
  Tensor of_weight = needs_weight ? empty({outputs, inputs}, weight) : no_gradient(weight);
  Tensor of_bias = needs_bias ? empty({outputs}, weight) : no_gradient(weight);
  if (columns == 0 || outputs == 0 || inputs == 0) {
    torch::stable::zero_(of_x);
    torch::stable::zero_(of_weight);
    torch::stable::zero_(of_bias);
    if (columns == 0 || outputs == 0 || !needs_bias) return {of_x, of_weight, of_bias};
  }
  dispatch_floating("channel_mix", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    constexpr int L = lanes<T>;
    const Columns<const S> gradient(grad), from(x);
    const Columns<S> to(needs_x ? of_x : x);
    const Left<T> transposed{pointer<const T>(weight), 1, inputs};
    const Sums<T> size(outputs, inputs, needs_weight);
    const bool needs_sums = needs_weight || needs_bias;
    const int64_t all = blocks(columns, panel), panels = needs_sums ? size.panels(all) : 4;
    const int64_t pieces = blocks(all, panels);
    const std::unique_ptr<T[]> sums(needs_sums ? new T[static_cast<size_t>(pieces * size.each)] : nullptr);
    parallel_pieces(pieces, 1, [&](int64_t begin, int64_t end) {
      T* packed = scratch<T>((outputs + inputs + size.row) * panel);  // g, of work, and x transposed
      T* work = packed + outputs * panel;
      T* right = work + inputs * panel;
      for (int64_t piece = begin; piece < end; ++piece) {
        T* of_piece = needs_sums ? sums.get() + piece * size.each : nullptr;
        T* totals = needs_sums ? of_piece + size.weight : nullptr;
        if (needs_sums) std::fill_n(totals, outputs * L, T(0));
        const int64_t stop = std::min(columns, (piece + 1) * panels * panel);
        for (int64_t n = piece * panels * panel; n < stop; n += panel) {
          const int64_t count = std::min(panel, columns - n);
          pack<S>(gradient, outputs, n, count, packed);
          if (needs_x)
            product<S>(transposed, packed, inputs, outputs, static_cast<const T*>(nullptr), to, n, count, work);
          if (needs_weight) {
            pack_transposed<S>(from, inputs, n, count, right, size.row, work);
            multiply_rows<T>(Left<T>{packed, panel, 1}, right, size.row, of_piece, size.row, outputs, size.row / L,
                             panel, n > piece * panels * panel);
          }
          for (int64_t o = 0; needs_bias && o < outputs; ++o) {
            Vector<T> total = load_raw(totals + o * L);
#pragma GCC unroll 4
            for (int64_t j = 0; j < panel; j += L) total += load_raw(packed + o * panel + j);
            store<T>(totals + o * L, total);
          }
        }
      }
    });
    if (needs_weight) {
      T* result = pointer<T>(of_weight);
      parallel_pieces(outputs, blocks(1 << 14, std::max<int64_t>(inputs, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o) {
          for (int64_t c = 0; c < inputs; c += L) {
            Vector<T> total{};
            for (int64_t p = 0; p < pieces; ++p) total += load_raw(sums.get() + p * size.each + o * size.row + c);
            store_first<T>(result + o * inputs + c, total, inputs - c);
          }
        }
      });
    }
    for (int64_t o = 0; needs_bias && o < outputs; ++o) {
      Vector<T> total{};
      for (int64_t p = 0; p < pieces; ++p) total += load_raw(sums.get() + p * size.each + size.weight + o * L);
      pointer<T>(of_bias)[o] = sum<T>(total);
    }
  });
  return {of_x, of_weight, of_bias};
}

}  // namespace
}  // namespace channel_mix
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("channel_mix", TORCH_BOX(&mpkernels::channel_mix::forward));
  library.impl("channel_mix_backward", TORCH_BOX(&mpkernels::channel_mix::backward));
}
