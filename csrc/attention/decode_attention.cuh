// Attention of few queries to many keys on a GPU.
//
//   s_ij  = softcap tanh(scale q_i . k_j / softcap) + bias_ij     without softcap: scale q_i . k_j + bias_ij
//   lse_i = log sum_j e^s_ij      out_i = sum_j e^(s_ij - lse_i) v_j      over the keys j that query i sees
//
// (Vaswani et al. 2017, "Attention is all you need", eq. 1; the running maximum: Milakov and Gimelshein 2018.) Shapes:
// mpkernels/attention/decode_attention/schema.py.
//
// Decomposition: the H / G heads that share a key head, times the L queries, are the rows of one problem. A block takes
// up to 8 rows and a piece of 256 keys, of one problem; more rows are further blocks, next to it, which find the keys
// in L2. A key is read by the lanes of a slot, 16 bytes a lane, as many slots of a warp as keys fit; every slot takes
// several keys at a time, all of whose bytes are asked for at once, and keeps the maximum, the sum and the weighted sum
// of its own keys in registers. Slots are merged by shuffles, warps through shared memory, pieces by a second kernel,
// always in the order of the keys. Pieces do not depend on the batch or the device, and neither do the bits.
//
// Bytes: keys and values once from memory, (E + F) a key; the workspace is 2 + F numbers a row for 256 keys.
#pragma once

#include "common/launch.h"

#include <cmath>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mpkernels {
namespace decode_attention {

constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warps_per_block = 4;
constexpr int threads_per_block = warps_per_block * warp_lanes;
constexpr int64_t piece_keys = 256;
template <typename T>
constexpr T hiding_bias = T(-1e30);  // and less hides a key

template <typename S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename S>
using Compute = typename ComputeType<S>::type;

// Strides of a tensor that broadcasts: 0 where it is expanded.
struct Broadcast {
  int64_t batch, head, row, key;
};

template <typename S>
struct Problem {
  const S* query;
  const S* key;
  const S* value;
  const int32_t* first;  // (B or 1, H or 1, L) or null
  const int32_t* last;
  const bool* mask;  // or null
  const S* bias;     // or null
  int64_t query_batch, query_head, query_row;
  int64_t key_batch, key_head, key_row;
  int64_t value_batch, value_head, value_row;
  int64_t interval_batch, interval_head;
  Broadcast mask_strides, bias_strides;
  int64_t batch, heads, groups, queries, keys;
  int64_t rows;                 // of a key head: H / G L
  int64_t pieces;               // of the keys
  int width, value_width;       // E and F
  bool wide_keys, wide_values;  // whether rows can be read 16 bytes at a time
  Compute<S> scale, softcap;
};

// Maximum and sum of a row over a piece of the keys; the sum is 0 where it sees none.
template <typename T>
struct Softmax {
  T maximum, sum;
};

// What a lane reads at a time.
template <typename S>
constexpr int pack_size = 16 / sizeof(S);
template <typename S>
struct alignas(16) Pack {
  S x[pack_size<S>];
};

// How the lanes of a warp share keys of at most Width elements, for R rows.
template <typename S, int Width, int R>
struct Layout {
  static constexpr int pack = pack_size<S>;
  static constexpr int lanes = Width / pack < warp_lanes ? Width / pack : warp_lanes;  // of a slot
  static constexpr int slots = warp_lanes / lanes;
  static constexpr int packs = Width / (lanes * pack);            // a lane
  static constexpr int elements = packs * pack;                   // a lane
  static constexpr int loads = R > 4 ? 2 : 4;                     // packs of keys that are asked for at once
  static constexpr int keys = loads > packs ? loads / packs : 1;  // of a slot at a time
};

// Elements [e, e + pack) of a row of `width`, zeros behind it.
template <typename S>
__device__ __forceinline__ Pack<S> load_pack(const S* row, int e, int width, bool wide) {
  Pack<S> found;
  if (wide && e < width) {
    found = *reinterpret_cast<const Pack<S>*>(row + e);
  } else {
#pragma unroll
    for (int i = 0; i < pack_size<S>; ++i) found.x[i] = e + i < width ? row[e + i] : static_cast<S>(0.0f);
  }
  return found;
}

// Where the rows of a block look.
template <typename S, int R>
struct Rows {
  int64_t mask[R], bias[R];  // offsets of key 0
  int first[R], last[R];     // counted from the start of the piece
};

template <typename S>
struct Place {
  int64_t b, g, piece, tile, begin, end;

  MPKERNELS_HOST_DEVICE inline Place(const Problem<S>& in, int64_t tiles, int64_t task) {
    tile = task % tiles;
    piece = task / tiles % in.pieces;
    g = task / tiles / in.pieces % in.groups;
    b = task / tiles / in.pieces / in.groups;
    begin = piece * piece_keys;
    end = begin + piece_keys < in.keys ? begin + piece_keys : in.keys;
  }
};

// Row `r` of a key head, by one thread. A row behind the last one sees all, and is not written.
template <typename S, int R>
__device__ __forceinline__ void place_row(const Problem<S>& in, const Place<S>& at, int j, Rows<S, R>& rows) {
  const int64_t r = at.tile * R + j;
  rows.first[j] = 0;
  rows.last[j] = static_cast<int>(at.end - at.begin);
  rows.mask[j] = rows.bias[j] = 0;
  if (r >= in.rows) return;
  const int64_t h = at.g * (in.heads / in.groups) + r / in.queries, i = r % in.queries;
  rows.mask[j] = at.b * in.mask_strides.batch + h * in.mask_strides.head + i * in.mask_strides.row;
  rows.bias[j] = at.b * in.bias_strides.batch + h * in.bias_strides.head + i * in.bias_strides.row;
  if (in.first == nullptr) return;
  const int64_t interval = at.b * in.interval_batch + h * in.interval_head + i;
  const int64_t first = in.first[interval] - at.begin, last = in.last[interval] - at.begin;
  if (first > 0) rows.first[j] = static_cast<int>(first < piece_keys ? first : piece_keys);
  if (last < rows.last[j]) rows.last[j] = static_cast<int>(last > 0 ? last : 0);
}

template <typename T>
__device__ __forceinline__ T minus_infinity() {
  return static_cast<T>(-INFINITY);
}

// What a maximum is subtracted as: a row that has seen nothing yet has none.
template <typename T>
__device__ __forceinline__ T base_of(T maximum) {
  return maximum == minus_infinity<T>() ? T(0) : maximum;
}

// The softmax and the weighted sums that a slot has in registers: of R rows, for its elements of the values.
template <typename T, int R, int Elements>
struct Sums {
  T maximum[R], sum[R], values[R][Elements];
};

// The keys of a slot, from the first of the warp's on: adds them to `sums`.
template <typename S, int Width, int R, typename T = Compute<S>>
__device__ __forceinline__ void add_keys(const Problem<S>& in, const Place<S>& at, const Rows<S, R>& rows,
                                         const S* keys, const S* values,  // of the piece
                                         int start, int end, bool plain,  // whether all rows see all of these keys
                                         const T (&query)[R][Layout<S, Width, R>::elements],
                                         Sums<T, R, Layout<S, Width, R>::elements>& sums) {
  using Shape = Layout<S, Width, R>;
  constexpr int U = Shape::keys;
  const int lane = threadIdx.x % warp_lanes, slot = lane / Shape::lanes, in_slot = lane % Shape::lanes;
  Pack<S> k[U][Shape::packs], v[U][Shape::packs];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int index = start + u * Shape::slots + slot;
    const int64_t row = index < end ? index : end - 1;
#pragma unroll
    for (int c = 0; c < Shape::packs; ++c) {
      const int e = (c * Shape::lanes + in_slot) * Shape::pack;
      k[u][c] = load_pack<S>(keys + row * in.key_row, e, in.width, in.wide_keys);
      v[u][c] = load_pack<S>(values + row * in.value_row, e, in.value_width, in.wide_values);
    }
  }

  T s[U][R];
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int j = 0; j < R; ++j) s[u][j] = 0;
#pragma unroll
    for (int e = 0; e < Shape::elements; ++e) {
      const T x = static_cast<T>(k[u][e / Shape::pack].x[e % Shape::pack]);
#pragma unroll
      for (int j = 0; j < R; ++j) s[u][j] += query[j][e] * x;
    }
  }
#pragma unroll
  for (int step = Shape::lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int j = 0; j < R; ++j) s[u][j] += __shfl_xor_sync(all_lanes, s[u][j], step);
    }
  }

  unsigned hidden = 0;  // a bit for each key and row
#pragma unroll
  for (int j = 0; j < R; ++j) {
    T highest = sums.maximum[j];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      T score = s[u][j] * in.scale;
      if (in.softcap > 0) score = in.softcap * tanh(score / in.softcap);
      if (!plain) {
        const int index = start + u * Shape::slots + slot;
        bool seen = index >= rows.first[j] && index < rows.last[j];
        const int64_t position = at.begin + index;
        if (seen && in.mask != nullptr) seen = in.mask[rows.mask[j] + position * in.mask_strides.key];
        if (seen && in.bias != nullptr) {
          const T added = static_cast<T>(in.bias[rows.bias[j] + position * in.bias_strides.key]);
          seen = !(added <= hiding_bias<T>);
          score += added;
        }
        if (!seen) score = minus_infinity<T>();
      }
      if (score == minus_infinity<T>()) hidden |= 1u << (u * R + j);
      s[u][j] = score;
      highest = score > highest ? score : highest;
    }
    const T base = base_of(highest), shrink = exp(sums.maximum[j] - base);
    T sum = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      s[u][j] = exp(s[u][j] - base);
      sum += s[u][j];
    }
    sums.maximum[j] = highest;
    sums.sum[j] = sums.sum[j] * shrink + sum;
#pragma unroll
    for (int e = 0; e < Shape::elements; ++e) sums.values[j][e] *= shrink;
  }

  if (hidden == 0) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int e = 0; e < Shape::elements; ++e) {
        const T x = static_cast<T>(v[u][e / Shape::pack].x[e % Shape::pack]);
#pragma unroll
        for (int j = 0; j < R; ++j) sums.values[j][e] += s[u][j] * x;
      }
    }
  } else {  // the value of a hidden key may hold anything: it is not multiplied
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        if ((hidden >> (u * R + j)) & 1u) continue;
#pragma unroll
        for (int e = 0; e < Shape::elements; ++e) {
          sums.values[j][e] += s[u][j] * static_cast<T>(v[u][e / Shape::pack].x[e % Shape::pack]);
        }
      }
    }
  }
}

// What slots of a warp found, together, in all of them.
template <typename S, int Width, int R, typename T = Compute<S>>
__device__ __forceinline__ void merge_slots(Sums<T, R, Layout<S, Width, R>::elements>& sums) {
  using Shape = Layout<S, Width, R>;
#pragma unroll
  for (int step = Shape::lanes; step < warp_lanes; step *= 2) {
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const T other = __shfl_xor_sync(all_lanes, sums.maximum[j], step);
      const T highest = other > sums.maximum[j] ? other : sums.maximum[j], base = base_of(highest);
      const T mine = exp(sums.maximum[j] - base), others = exp(other - base);
      sums.maximum[j] = highest;
      sums.sum[j] = sums.sum[j] * mine + __shfl_xor_sync(all_lanes, sums.sum[j], step) * others;
#pragma unroll
      for (int e = 0; e < Shape::elements; ++e) {
        const T x = __shfl_xor_sync(all_lanes, sums.values[j][e], step);
        sums.values[j][e] = sums.values[j][e] * mine + x * others;
      }
    }
  }
}

// Width: a multiple of 64 that E and F do not exceed. R: rows of a block. (Two or three blocks of a multiprocessor are
// named, or ptxas takes fewer registers on sm_80, and spills.)
template <typename S, int Width, int R>
__global__ void __launch_bounds__(threads_per_block, R == 1 ? 3 : 2)
    piece_kernel(const Problem<S> in,
                 Softmax<Compute<S>>* softmax,  // (B, G, pieces, rows)
                 Compute<S>* partial,           // (B, G, pieces, rows, F), unwritten where no row of a block sees a key
                 int64_t tiles) {               // of R rows
  using T = Compute<S>;
  using Shape = Layout<S, Width, R>;
  __shared__ Rows<S, R> rows;
  __shared__ Softmax<T> of_warps[warps_per_block][R];
  __shared__ __align__(16) T values_of_warps[warps_per_block][R][Width];
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes, in_slot = lane % Shape::lanes;

  const int64_t tasks = in.batch * in.groups * in.pieces * tiles;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const Place<S> at(in, tiles, task);
    if (threadIdx.x < R) place_row<S, R>(in, at, threadIdx.x, rows);
    __syncthreads();
    int begin = static_cast<int>(piece_keys), end = 0;          // keys that some row sees
    int all_begin = 0, all_end = static_cast<int>(piece_keys);  // and that all rows see
    for (int j = 0; j < R; ++j) {
      if (rows.first[j] > all_begin) all_begin = rows.first[j];
      if (rows.last[j] < all_end) all_end = rows.last[j];
      if (at.tile * R + j >= in.rows || rows.first[j] >= rows.last[j]) continue;
      if (rows.first[j] < begin) begin = rows.first[j];
      if (rows.last[j] > end) end = rows.last[j];
    }

    T query[R][Shape::elements];
    Sums<T, R, Shape::elements> sums;
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int64_t r = at.tile * R + j;
      const int64_t h = at.g * (in.heads / in.groups) + r / in.queries, i = r % in.queries;
      const S* row = in.query + at.b * in.query_batch + h * in.query_head + i * in.query_row;
      sums.maximum[j] = minus_infinity<T>();
      sums.sum[j] = 0;
#pragma unroll
      for (int e = 0; e < Shape::elements; ++e) {
        const int element = (e / Shape::pack * Shape::lanes + in_slot) * Shape::pack + e % Shape::pack;
        query[j][e] = r < in.rows && element < in.width ? static_cast<T>(row[element]) : T(0);
        sums.values[j][e] = 0;
      }
    }

    const S* keys = in.key + at.b * in.key_batch + at.g * in.key_head + at.begin * in.key_row;
    const S* values = in.value + at.b * in.value_batch + at.g * in.value_head + at.begin * in.value_row;
    constexpr int warp_keys = Shape::slots * Shape::keys;
    for (int start = begin + warp * warp_keys; start < end; start += warps_per_block * warp_keys) {
      const bool plain = in.mask == nullptr && in.bias == nullptr && start >= all_begin && start + warp_keys <= all_end;
      add_keys<S, Width, R>(in, at, rows, keys, values, start, end, plain, query, sums);
    }

    merge_slots<S, Width, R>(sums);
    if (lane < Shape::lanes) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        if (lane == 0) of_warps[warp][j] = {sums.maximum[j], sums.sum[j]};
#pragma unroll
        for (int e = 0; e < Shape::elements; ++e) {
          values_of_warps[warp][j][(e / Shape::pack * Shape::lanes + lane) * Shape::pack + e % Shape::pack] =
              sums.values[j][e];
        }
      }
    }
    __syncthreads();

    const int64_t left = in.rows - at.tile * R;
    const int count = left < R ? static_cast<int>(left) : R;
    const int64_t row = ((at.b * in.groups + at.g) * in.pieces + at.piece) * in.rows + at.tile * R;
    for (int i = threadIdx.x; i < count * in.value_width; i += threads_per_block) {
      const int j = i / in.value_width, f = i % in.value_width;
      T highest = of_warps[0][j].maximum;
      for (int w = 1; w < warps_per_block; ++w) {
        if (of_warps[w][j].maximum > highest) highest = of_warps[w][j].maximum;
      }
      T sum = 0, value = 0;
      for (int w = 0; w < warps_per_block; ++w) {
        const T factor = exp(of_warps[w][j].maximum - base_of(highest));
        sum += factor * of_warps[w][j].sum;
        value += factor * values_of_warps[w][j][f];
      }
      if (f == 0) softmax[row + j] = {highest, sum};
      if (begin < end) partial[(row + j) * in.value_width + f] = value;
    }
    __syncthreads();  // the next rows come where these are read
  }
}

// The pieces of a row, in the order of the keys; a block takes a row.
template <typename S, typename T = Compute<S>>
__global__ void __launch_bounds__(threads_per_block, 8)
    merge_kernel(const Problem<S> in,
                 const Softmax<T>* softmax,  // (B, G, pieces, rows)
                 const T* partial,           // (B, G, pieces, rows, F)
                 S* out,                     // (B, H, L, F), or (B, L, H, F) with heads_last
                 T* lse,                     // (B, H, L)
                 bool heads_last) {
  const int64_t all = in.batch * in.heads * in.queries;
  for (int64_t index = blockIdx.x; index < all; index += gridDim.x) {
    const int64_t i = index % in.queries, h = index / in.queries % in.heads, b = index / in.queries / in.heads;
    const int64_t group = in.heads / in.groups, g = h / group, r = h % group * in.queries + i;
    const int64_t start = (b * in.groups + g) * in.pieces * in.rows + r;
    T highest = minus_infinity<T>(), sum = 0;
    for (int64_t p = 0; p < in.pieces; ++p) {
      const T maximum = softmax[start + p * in.rows].maximum;
      if (maximum > highest) highest = maximum;
    }
    const T base = base_of(highest);
    for (int64_t p = 0; p < in.pieces; ++p) {
      const Softmax<T> piece = softmax[start + p * in.rows];
      sum += exp(piece.maximum - base) * piece.sum;
    }
    if (threadIdx.x == 0) lse[index] = sum == 0 ? minus_infinity<T>() : base + log(sum);
    S* row = out + (heads_last ? (b * in.queries + i) * in.heads + h : index) * in.value_width;
    for (int f = threadIdx.x; f < in.value_width; f += threads_per_block) {
      T value = 0;
      for (int64_t p = 0; p < in.pieces; ++p) {
        const int64_t at = start + p * in.rows;
        if (softmax[at].sum == 0) continue;  // it sees no key, and its values may not be written
        value += exp(softmax[at].maximum - base) * partial[at * in.value_width + f];
      }
      row[f] = static_cast<S>(sum == 0 ? T(0) : value / sum);
    }
  }
}

}  // namespace decode_attention
}  // namespace mpkernels
