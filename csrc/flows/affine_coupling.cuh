// The affine coupling on a GPU. Formulas of an element: affine_coupling_math.h; shapes, scales, masks and layouts:
// mpkernels/flows/affine_coupling/schema.py.
//
//     y = kept ? x : x e^l + t            log_abs_det[b] = sum of l over the transformed elements
//
// A warp takes a piece of one sample: 32 x packs_a_lane packs, a pack being elements that fill 16 bytes, in the order
// of (C, H, W). Lane and turn of an element depend on nothing but its index, so that sums have the same bits whatever
// the strides. Where the packs of all tensors lie side by side and aligned (View::wide), a kernel reads and writes
// packs (AllWide); else one takes their elements one after another. An element is at its index where (C, H, W) lie side
// by side (View::nested); else channel, row and column are divided out of it, once a pack, as they are for a
// checkerboard. Parameters of kept elements are read with their pack at most, and selected away. The log-determinant of
// a piece is summed by shuffles and written down; a second kernel adds the pieces of a sample, both in a fixed order,
// in double.
//
// Bytes: forward reads x, raw and shift once and writes y; backward reads x, raw and the gradient of y (and shift,
// where it is added first), and writes three gradients. With CHANNEL the kept half has no parameters.
#pragma once

#include "common/launch.h"
#include "flows/affine_coupling_math.h"

#include <type_traits>

namespace mpkernels {
namespace affine_coupling {

constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warps_per_block = 8;
constexpr int threads_per_block = warps_per_block * warp_lanes;
constexpr int blocks_resident = 2;  // at least: 128 registers a thread (ptxas aims at fewer, and spills, unasked)
constexpr int packs_a_lane = 4;

template <typename S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename S>
using ComputeOf = typename ComputeType<S>::type;

template <typename S>
constexpr int pack_size = 16 / sizeof(S);
template <typename S>
constexpr int64_t piece_size = warp_lanes * packs_a_lane * pack_size<S>;

template <typename S>
struct alignas(16) Pack {
  S x[pack_size<S>];
};

// index / size, and what remains; by 32 bits where they are enough.
__device__ __forceinline__ int64_t divide(int64_t index, int64_t size, int64_t& rest) {
  if (index < (int64_t{1} << 31) && size < (int64_t{1} << 31)) {
    const uint32_t found = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
    rest = static_cast<uint32_t>(index) - found * static_cast<uint32_t>(size);
    return found;
  }
  const int64_t found = index / size;
  rest = index - found * size;
  return found;
}

// (channel, row, column) of an element.
struct Position {
  int64_t c, h, w;

  __device__ __forceinline__ void advance(int64_t height, int64_t width) {
    if (++w < width) return;
    w = 0;
    if (++h < height) return;
    h = 0;
    ++c;
  }
};

// A tensor (B, channels, H, W) of any strides.
template <typename S>
struct View {
  S* data;
  int64_t batch, channel, row, column;
  bool nested;  // (C, H, W) side by side
  bool wide;    // packs side by side, and aligned to 16 bytes

  __device__ __forceinline__ int64_t offset(const Position& p) const {
    return p.c * channel + p.h * row + p.w * column;
  }
};

template <typename S>
struct Problem {
  static constexpr int E = pack_size<S>;

  View<const S> x, raw, shift;  // data of raw is null for ADDITIVE
  View<const bool> mask;        // null but for TENSOR
  int64_t batch, height, width, size, pieces;
  int64_t first, last;  // the elements that have parameters: what is transformed with CHANNEL, else all
  int64_t first_channel;
  ComputeOf<S> clamp, epsilon;
  int scale, pattern, parity;
  bool shift_before, inverse;
  bool positions;  // whether anything depends on Position

  __device__ __forceinline__ Position position(int64_t j) const {
    Position p{0, 0, 0};
    if (positions) p.c = divide(divide(j, width, p.w), height, p.h);
    return p;
  }
  __device__ __forceinline__ void advance(Position& p) const {
    if (positions) p.advance(height, width);
  }
  __device__ __forceinline__ bool has_parameters(int64_t j) const { return j >= first && j < last; }

  // Whether element j of sample b, at position p, is transformed.
  __device__ __forceinline__ bool transforms(int64_t b, int64_t j, const Position& p) const {
    switch (pattern) {
      case pattern_none:
        return true;
      case pattern_channel:
        return has_parameters(j);
      case pattern_checkerboard:
        return ((p.h + p.w) & 1) == parity;
      case pattern_alternating:
        return (p.c & 1) == parity;
      default:
        return !mask.data[b * mask.batch + (mask.nested ? j : mask.offset(p))];
    }
  }

  // Where element j is; of a parameter (or its gradient), which may begin with another channel.
  template <typename Q>
  __device__ __forceinline__ Q* at(const View<Q>& view, int64_t b, int64_t j, const Position& p) const {
    return view.data + b * view.batch + (view.nested ? j : view.offset(p));
  }
  template <typename Q>
  __device__ __forceinline__ Q* at_parameter(const View<Q>& view, int64_t b, int64_t j, const Position& p) const {
    return at(view, b, j - first, Position{p.c - first_channel, p.h, p.w});
  }
};

template <typename S>
__device__ __forceinline__ Pack<S> read_pack(const S* from) {
  return *reinterpret_cast<const Pack<S>*>(from);
}
template <typename S>
__device__ __forceinline__ void write_pack(S* to, const Pack<S>& values) {
  *reinterpret_cast<Pack<S>*>(to) = values;
}

// Calls f with the scale, and whether it is the inverse, as constants.
template <typename S, typename F>
__device__ __forceinline__ void with_scale(const Problem<S>& in, const F& f) {
  const auto directed = [&](auto scale) {
    if (in.inverse) {
      f(scale, std::true_type{});
    } else {
      f(scale, std::false_type{});
    }
  };
  switch (in.scale) {
    case scale_exp:
      return directed(std::integral_constant<int, scale_exp>{});
    case scale_sigmoid:
      return directed(std::integral_constant<int, scale_sigmoid>{});
    case scale_sigmoid_epsilon:
      return directed(std::integral_constant<int, scale_sigmoid_epsilon>{});
    case scale_tanh:
      return directed(std::integral_constant<int, scale_tanh>{});
    case scale_softclamp:
      return directed(std::integral_constant<int, scale_softclamp>{});
    default:
      return directed(std::integral_constant<int, scale_additive>{});
  }
}

// In the order of a tree over the lanes.
__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
  for (int apart = warp_lanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(all_lanes, x, apart);
  return x;
}

// y of the pack from j on; returns its part of the sum of l.
template <typename S, bool AllWide>
__device__ __forceinline__ ComputeOf<S> forward_pack(const Problem<S>& in, const View<S>& y, int64_t b, int64_t j) {
  using T = ComputeOf<S>;
  constexpr int E = pack_size<S>;
  Position p = in.position(j);
  T sum = 0;
  if constexpr (AllWide) {
    const Position start = p;
    Pack<S> x = read_pack(in.at(in.x, b, j, start));
    unsigned transformed_bits = 0;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      transformed_bits |= static_cast<unsigned>(in.transforms(b, j + e, p)) << e;
      in.advance(p);
    }
    if (transformed_bits != 0) {
      const Pack<S> shift = read_pack(in.at_parameter(in.shift, b, j, start));
      const Pack<S> raw = in.raw.data == nullptr ? shift : read_pack(in.at_parameter(in.raw, b, j, start));
      with_scale(in, [&](auto scale, auto inverse) {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const Scaled<T> s = scaled<decltype(scale)::value, decltype(inverse)::value, log_whole, false>(
              static_cast<T>(raw.x[e]), in.clamp, in.epsilon);
          const S moved = static_cast<S>(transformed<decltype(inverse)::value>(
              static_cast<T>(x.x[e]), static_cast<T>(shift.x[e]), s.factor, in.shift_before));
          const bool moves = transformed_bits >> e & 1;
          x.x[e] = moves ? moved : x.x[e];
          sum += moves ? s.log_scale : T(0);
        }
      });
    }
    write_pack(in.at(y, b, j, start), x);
  } else {
#pragma unroll 1
    for (int64_t end = j + E < in.size ? j + E : in.size; j < end; ++j, in.advance(p)) {
      S x = *in.at(in.x, b, j, p);
      if (in.transforms(b, j, p)) {
        const T shift = static_cast<T>(*in.at_parameter(in.shift, b, j, p));
        const T raw = in.raw.data == nullptr ? T(0) : static_cast<T>(*in.at_parameter(in.raw, b, j, p));
        with_scale(in, [&](auto scale, auto inverse) {
          const Scaled<T> s =
              scaled<decltype(scale)::value, decltype(inverse)::value, log_whole, false>(raw, in.clamp, in.epsilon);
          x = static_cast<S>(
              transformed<decltype(inverse)::value>(static_cast<T>(x), shift, s.factor, in.shift_before));
          sum += s.log_scale;
        });
      }
      *in.at(y, b, j, p) = x;
    }
  }
  return sum;
}

// The part of log_abs_det of each piece goes to parts (B, pieces), or is log_abs_det itself where there is one piece.
template <typename S, bool AllWide>
__global__ void __launch_bounds__(threads_per_block, blocks_resident)
    forward_kernel(Problem<S> in,
                   View<S> y,                    // (B, C, H, W)
                   double* parts,                // (B, pieces), or null
                   ComputeOf<S>* log_abs_det) {  // (B,), or null
  const int lane = threadIdx.x % warp_lanes;
  const int64_t step = int64_t(gridDim.x) * warps_per_block, tasks = in.batch * in.pieces;
  for (int64_t task = int64_t(blockIdx.x) * warps_per_block + threadIdx.x / warp_lanes; task < tasks; task += step) {
    int64_t piece;
    const int64_t b = divide(task, in.pieces, piece);
    double sum = 0;
#pragma unroll 1
    for (int k = 0; k < packs_a_lane; ++k) {
      const int64_t j = piece * piece_size<S> + (k * warp_lanes + lane) * pack_size<S>;
      if (j < in.size) sum += forward_pack<S, AllWide>(in, y, b, j);
    }
    if (parts == nullptr && log_abs_det == nullptr) continue;
    sum = sum_of_warp(in.inverse ? -sum : sum);
    if (lane != 0) continue;
    if (parts != nullptr) {
      parts[task] = sum;
    } else {
      log_abs_det[b] = static_cast<ComputeOf<S>>(sum);
    }
  }
}

// A warp a sample.
template <typename T>
__global__ void __launch_bounds__(threads_per_block) sum_kernel(const double* parts,  // (B, pieces)
                                                                int64_t batch, int64_t pieces,
                                                                T* log_abs_det) {  // (B,)
  const int lane = threadIdx.x % warp_lanes;
  const int64_t step = int64_t(gridDim.x) * warps_per_block;
  for (int64_t b = int64_t(blockIdx.x) * warps_per_block + threadIdx.x / warp_lanes; b < batch; b += step) {
    double sum = 0;
    for (int64_t piece = lane; piece < pieces; piece += warp_lanes) sum += parts[b * pieces + piece];
    sum = sum_of_warp(sum);
    if (lane == 0) log_abs_det[b] = static_cast<T>(sum);
  }
}

// What the backward reads and writes; the data of a gradient that is not needed is null.
template <typename S>
struct Gradients {
  View<const S> of_y;
  const ComputeOf<S>* of_log_abs_det;  // (B,)
  int64_t log_stride;
  View<S> of_x, of_raw, of_shift;
};

// The gradients of the pack from j on.
template <typename S, bool AllWide>
__device__ __forceinline__ void backward_pack(const Problem<S>& in, const Gradients<S>& to, int64_t b, int64_t j,
                                              ComputeOf<S> of_log) {
  using T = ComputeOf<S>;
  constexpr int E = pack_size<S>;
  const bool wants_raw = to.of_raw.data != nullptr, reads_shift = wants_raw && in.shift_before;
  const bool wants_shift = to.of_shift.data != nullptr;
  Position p = in.position(j);
  if constexpr (AllWide) {
    const Position start = p;
    Pack<S> of_x = read_pack(in.at(to.of_y, b, j, start));
    unsigned transformed_bits = 0;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      transformed_bits |= static_cast<unsigned>(in.transforms(b, j + e, p)) << e;
      in.advance(p);
    }
    Pack<S> of_raw, of_shift;
#pragma unroll
    for (int e = 0; e < E; ++e) of_raw.x[e] = of_shift.x[e] = static_cast<S>(0.0f);
    if (transformed_bits != 0) {
      const Pack<S> raw = in.raw.data == nullptr ? of_x : read_pack(in.at_parameter(in.raw, b, j, start));
      const Pack<S> x = wants_raw ? read_pack(in.at(in.x, b, j, start)) : of_x;
      const Pack<S> shift = reads_shift ? read_pack(in.at_parameter(in.shift, b, j, start)) : of_x;
      with_scale(in, [&](auto scale, auto inverse) {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const Scaled<T> s = scaled<decltype(scale)::value, decltype(inverse)::value, no_log, true>(
              static_cast<T>(raw.x[e]), in.clamp, in.epsilon);
          const OfElement<T> of =
              gradients<decltype(inverse)::value>(static_cast<T>(of_x.x[e]), of_log, static_cast<T>(x.x[e]),
                                                  static_cast<T>(shift.x[e]), s, in.shift_before);
          if (!(transformed_bits >> e & 1)) continue;
          of_x.x[e] = static_cast<S>(of.x);
          of_raw.x[e] = static_cast<S>(of.raw);
          of_shift.x[e] = static_cast<S>(of.shift);
        }
      });
    }
    if (to.of_x.data != nullptr) write_pack(in.at(to.of_x, b, j, start), of_x);
    if (!in.has_parameters(j)) return;
    if (wants_raw) write_pack(in.at_parameter(to.of_raw, b, j, start), of_raw);
    if (wants_shift) write_pack(in.at_parameter(to.of_shift, b, j, start), of_shift);
  } else {
#pragma unroll 1
    for (int64_t end = j + E < in.size ? j + E : in.size; j < end; ++j, in.advance(p)) {
      const S of_y = *in.at(to.of_y, b, j, p);
      S of_x = of_y, of_raw = static_cast<S>(0.0f), of_shift = static_cast<S>(0.0f);
      if (in.transforms(b, j, p)) {
        const T raw = in.raw.data == nullptr ? T(0) : static_cast<T>(*in.at_parameter(in.raw, b, j, p));
        const T x = wants_raw ? static_cast<T>(*in.at(in.x, b, j, p)) : T(0);
        const T shift = reads_shift ? static_cast<T>(*in.at_parameter(in.shift, b, j, p)) : T(0);
        with_scale(in, [&](auto scale, auto inverse) {
          const Scaled<T> s =
              scaled<decltype(scale)::value, decltype(inverse)::value, no_log, true>(raw, in.clamp, in.epsilon);
          const OfElement<T> of =
              gradients<decltype(inverse)::value>(static_cast<T>(of_y), of_log, x, shift, s, in.shift_before);
          of_x = static_cast<S>(of.x);
          of_raw = static_cast<S>(of.raw);
          of_shift = static_cast<S>(of.shift);
        });
      }
      if (to.of_x.data != nullptr) *in.at(to.of_x, b, j, p) = of_x;
      if (!in.has_parameters(j)) continue;
      if (wants_raw) *in.at_parameter(to.of_raw, b, j, p) = of_raw;
      if (wants_shift) *in.at_parameter(to.of_shift, b, j, p) = of_shift;
    }
  }
}

template <typename S, bool AllWide>
__global__ void __launch_bounds__(threads_per_block, blocks_resident) backward_kernel(Problem<S> in, Gradients<S> to) {
  const int lane = threadIdx.x % warp_lanes;
  const int64_t step = int64_t(gridDim.x) * warps_per_block, tasks = in.batch * in.pieces;
  for (int64_t task = int64_t(blockIdx.x) * warps_per_block + threadIdx.x / warp_lanes; task < tasks; task += step) {
    int64_t piece;
    const int64_t b = divide(task, in.pieces, piece);
    const ComputeOf<S> of_log = to.of_log_abs_det[b * to.log_stride];
#pragma unroll 1
    for (int k = 0; k < packs_a_lane; ++k) {
      const int64_t j = piece * piece_size<S> + (k * warp_lanes + lane) * pack_size<S>;
      if (j < in.size) backward_pack<S, AllWide>(in, to, b, j, of_log);
    }
  }
}

}  // namespace affine_coupling
}  // namespace mpkernels
