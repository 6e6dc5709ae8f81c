// The affine coupling on a GPU. Formulas of an element: affine_coupling_math.h; shapes, scales, masks and layouts:
// mpkernels/flows/affine_coupling/schema.py.
//
//     y = kept ? x : x e^l + t            log_abs_det[b] = sum of l over the transformed elements
//
// A warp takes a piece of one sample: 32 x packs_a_lane packs, a pack being elements that fill 16 bytes, in the order of
// (C, H, W). Lane and turn of an element depend on nothing but its index, so that sums have the same bits whatever the
// strides. A tensor whose packs lie side by side and aligned is read and written by packs (View::wide), any other by
// elements; where all are wide (AllWide), by a kernel that knows it. An element is at its index where (C, H, W) lie side
// by side (View::nested); else channel, row and column are divided out of the index of a pack's first element, as they
// are for a checkerboard: once a pack.
// Parameters of kept elements are read with their pack at most, and selected away. The log-determinant of a piece is
// summed by shuffles and written down; a second kernel adds the pieces of a sample, both in a fixed order, in double.
//
// Bytes: forward reads x, raw and shift once and writes y; backward reads x, raw and the gradient of y (and shift, where
// it is added first), and writes three gradients. With CHANNEL the kept half has no parameters.
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
template <bool AllWide>
constexpr int packs_at_once = AllWide ? 2 : 1;  // loads of these are in flight together

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

  __device__ __forceinline__ Position position(int64_t j) const {
    Position p;
    p.c = divide(divide(j, width, p.w), height, p.h);
    return p;
  }

  // Which elements of the pack from j on exist, a bit each.
  __device__ __forceinline__ unsigned inside(int64_t j) const {
    const int64_t left = size - j;
    return left >= E ? (1u << E) - 1 : left > 0 ? (1u << left) - 1 : 0;
  }

  // Which of those are transformed.
  __device__ __forceinline__ unsigned transformed(int64_t b, int64_t j, unsigned inside) const {
    if (pattern == pattern_none) return inside;
    unsigned bits = 0;
    if (pattern == pattern_channel) {
#pragma unroll
      for (int e = 0; e < E; ++e) bits |= static_cast<unsigned>(j + e >= first && j + e < last) << e;
    } else if (pattern == pattern_tensor) {
      const bool* kept = mask.data + b * mask.batch;
      Position p{0, 0, 0};
      if (!mask.nested) p = position(j);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if (inside >> e & 1) bits |= static_cast<unsigned>(!kept[mask.nested ? j + e : mask.offset(p)]) << e;
        if (!mask.nested) p.advance(height, width);
      }
    } else {
      const bool rows = pattern == pattern_checkerboard;
      Position p = position(j);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        bits |= static_cast<unsigned>(((rows ? p.h + p.w : p.c) & 1) == parity) << e;
        p.advance(height, width);
      }
    }
    return bits & inside;
  }

  // The elements of the pack from j on that bits name; the others are anything, or 0 where not AllWide.
  template <bool AllWide, bool parameter, typename Q>
  __device__ __forceinline__ Pack<S> load(const View<Q>& view, int64_t b, int64_t j, unsigned bits) const {
    const S* from = view.data + b * view.batch;
    const int64_t begin = parameter ? first : 0;
    Position p{0, 0, 0};
    if (!view.nested) {
      p = position(j);
      if (parameter) p.c -= first_channel;
    }
    if (AllWide || view.wide) return *reinterpret_cast<const Pack<S>*>(from + (view.nested ? j - begin : view.offset(p)));
    Pack<S> found;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      found.x[e] = bits >> e & 1 ? from[view.nested ? j - begin + e : view.offset(p)] : static_cast<S>(0.0f);
      if (!view.nested) p.advance(height, width);
    }
    return found;
  }

  template <bool AllWide, bool parameter>
  __device__ __forceinline__ void store(const View<S>& view, int64_t b, int64_t j, unsigned bits,
                                        const Pack<S>& values) const {
    S* to = view.data + b * view.batch;
    const int64_t begin = parameter ? first : 0;
    Position p{0, 0, 0};
    if (!view.nested) {
      p = position(j);
      if (parameter) p.c -= first_channel;
    }
    if (AllWide || view.wide) {
      *reinterpret_cast<Pack<S>*>(to + (view.nested ? j - begin : view.offset(p))) = values;
      return;
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (bits >> e & 1) to[view.nested ? j - begin + e : view.offset(p)] = values.x[e];
      if (!view.nested) p.advance(height, width);
    }
  }
};

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

// A pack on its way: what has been read for it.
template <typename S>
struct Read {
  int64_t j;
  unsigned inside, transformed;
  Pack<S> x, raw, shift, grad;
};

// The part of log_abs_det of each piece goes to parts (B, pieces), or is log_abs_det itself where there is one piece.
template <typename S, bool AllWide>
__global__ void __launch_bounds__(threads_per_block, blocks_resident)
    forward_kernel(Problem<S> in,
                   View<S> y,        // (B, C, H, W)
                   double* parts,    // (B, pieces), or null
                   ComputeOf<S>* log_abs_det) {  // (B,), or null
  using T = ComputeOf<S>;
  constexpr int E = pack_size<S>;
  const int lane = threadIdx.x % warp_lanes;
  const int64_t step = int64_t(gridDim.x) * warps_per_block, tasks = in.batch * in.pieces;
  for (int64_t task = int64_t(blockIdx.x) * warps_per_block + threadIdx.x / warp_lanes; task < tasks; task += step) {
    int64_t piece;
    const int64_t b = divide(task, in.pieces, piece);
    double sum = 0;
    for (int k = 0; k < packs_a_lane; k += packs_at_once<AllWide>) {
      Read<S> read[packs_at_once<AllWide>];
#pragma unroll
      for (int u = 0; u < packs_at_once<AllWide>; ++u) {
        Read<S>& r = read[u];
        r.j = piece * piece_size<S> + ((k + u) * warp_lanes + lane) * E;
        r.inside = in.inside(r.j);
        r.transformed = 0;
        if (r.inside == 0) continue;
        r.transformed = in.transformed(b, r.j, r.inside);
        r.x = in.template load<AllWide, false>(in.x, b, r.j, r.inside);
        if (r.transformed == 0) continue;
        if (in.raw.data != nullptr) r.raw = in.template load<AllWide, true>(in.raw, b, r.j, r.transformed);
        r.shift = in.template load<AllWide, true>(in.shift, b, r.j, r.transformed);
      }
#pragma unroll
      for (int u = 0; u < packs_at_once<AllWide>; ++u) {
        Read<S>& r = read[u];
        if (r.inside == 0) continue;
        if (r.transformed != 0) {
          T of_pack = 0;
          with_scale(in, [&](auto scale, auto inverse) {
            constexpr int kind = decltype(scale)::value;
            constexpr bool back = decltype(inverse)::value;
#pragma unroll
            for (int e = 0; e < E; ++e) {
              if (!(r.transformed >> e & 1)) continue;
              const T raw = kind == scale_additive ? T(0) : static_cast<T>(r.raw.x[e]);
              const Scaled<T> s = scaled<kind, back, true, false>(raw, in.clamp, in.epsilon);
              of_pack += s.log_scale;
              r.x.x[e] = static_cast<S>(transformed<back>(static_cast<T>(r.x.x[e]), static_cast<T>(r.shift.x[e]),
                                                          s.factor, in.shift_before));
            }
          });
          sum += of_pack;
        }
        in.template store<AllWide, false>(y, b, r.j, r.inside, r.x);
      }
    }
    if (parts == nullptr && log_abs_det == nullptr) continue;
    sum = sum_of_warp(in.inverse ? -sum : sum);
    if (lane != 0) continue;
    if (parts != nullptr) {
      parts[task] = sum;
    } else {
      log_abs_det[b] = static_cast<T>(sum);
    }
  }
}

// A warp a sample.
template <typename T>
__global__ void __launch_bounds__(threads_per_block)
    sum_kernel(const double* parts,  // (B, pieces)
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

template <typename S, bool AllWide>
__global__ void __launch_bounds__(threads_per_block, blocks_resident) backward_kernel(Problem<S> in, Gradients<S> to) {
  using T = ComputeOf<S>;
  constexpr int E = pack_size<S>;
  const int lane = threadIdx.x % warp_lanes;
  const int64_t step = int64_t(gridDim.x) * warps_per_block, tasks = in.batch * in.pieces;
  const bool wants_raw = to.of_raw.data != nullptr;
  for (int64_t task = int64_t(blockIdx.x) * warps_per_block + threadIdx.x / warp_lanes; task < tasks; task += step) {
    int64_t piece;
    const int64_t b = divide(task, in.pieces, piece);
    const T of_log = wants_raw ? to.of_log_abs_det[b * to.log_stride] : T(0);
    for (int k = 0; k < packs_a_lane; k += packs_at_once<AllWide>) {
      Read<S> read[packs_at_once<AllWide>];
#pragma unroll
      for (int u = 0; u < packs_at_once<AllWide>; ++u) {
        Read<S>& r = read[u];
        r.j = piece * piece_size<S> + ((k + u) * warp_lanes + lane) * E;
        r.inside = in.inside(r.j);
        r.transformed = 0;
        if (r.inside == 0) continue;
        r.transformed = in.transformed(b, r.j, r.inside);
        r.grad = in.template load<AllWide, false>(to.of_y, b, r.j, r.inside);
        if (r.transformed == 0) continue;
        if (in.raw.data != nullptr) r.raw = in.template load<AllWide, true>(in.raw, b, r.j, r.transformed);
        if (!wants_raw) continue;
        r.x = in.template load<AllWide, false>(in.x, b, r.j, r.transformed);
        if (in.shift_before) r.shift = in.template load<AllWide, true>(in.shift, b, r.j, r.transformed);
      }
#pragma unroll
      for (int u = 0; u < packs_at_once<AllWide>; ++u) {
        Read<S>& r = read[u];
        if (r.inside == 0) continue;
        Pack<S> of_raw, of_shift;
#pragma unroll
        for (int e = 0; e < E; ++e) of_raw.x[e] = of_shift.x[e] = static_cast<S>(0.0f);
        if (r.transformed != 0) {
          with_scale(in, [&](auto scale, auto inverse) {
            constexpr int kind = decltype(scale)::value;
            constexpr bool back = decltype(inverse)::value;
#pragma unroll
            for (int e = 0; e < E; ++e) {
              if (!(r.transformed >> e & 1)) continue;
              const T raw = kind == scale_additive ? T(0) : static_cast<T>(r.raw.x[e]);
              const Scaled<T> s = scaled<kind, back, false, true>(raw, in.clamp, in.epsilon);
              const T x = wants_raw ? static_cast<T>(r.x.x[e]) : T(0);
              const T shift = wants_raw && in.shift_before ? static_cast<T>(r.shift.x[e]) : T(0);
              const OfElement<T> of =
                  gradients<back>(static_cast<T>(r.grad.x[e]), of_log, x, shift, s, in.shift_before);
              r.grad.x[e] = static_cast<S>(of.x);
              of_raw.x[e] = static_cast<S>(of.raw);
              of_shift.x[e] = static_cast<S>(of.shift);
            }
          });
        }
        if (to.of_x.data != nullptr) in.template store<AllWide, false>(to.of_x, b, r.j, r.inside, r.grad);
        const unsigned owned = in.pattern == pattern_channel ? r.transformed : r.inside;  // that have parameters
        if (owned == 0) continue;
        if (wants_raw) in.template store<AllWide, true>(to.of_raw, b, r.j, owned, of_raw);
        if (to.of_shift.data != nullptr) in.template store<AllWide, true>(to.of_shift, b, r.j, owned, of_shift);
      }
    }
  }
}

}  // namespace affine_coupling
}  // namespace mpkernels
