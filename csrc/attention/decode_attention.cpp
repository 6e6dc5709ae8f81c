// Attention of few queries to many keys on the CPU.
//
//   s_ij  = softcap tanh(scale q_i . k_j / softcap) + bias_ij     without softcap: scale q_i . k_j + bias_ij
//   lse_i = log sum_j e^s_ij      out_i = sum_j e^(s_ij - lse_i) v_j      over the keys j that query i sees
//
// (Vaswani et al. 2017, "Attention is all you need", eq. 1.) Shapes: mpkernels/attention/decode_attention/schema.py.
//
// Decomposition: the H / G heads that share a key head, times the L queries, are the rows of one problem, so that keys
// and values are read from memory once. The keys are split into pieces of 512, and a thread takes whole pieces: scores
// of all rows (every key is a contiguous row, a vector takes part of it; tiles of rows and keys hold as many sums as a
// vector has lanes, which a butterfly then adds up into one vector of scores), their softmax, and the weighted sum of
// the values. Maximum, sum and weighted sum of each piece go to a workspace, and are merged in the order of the keys.
// Pieces are the same for any number of threads and any batch, and so are the bits.
//
// Hidden keys have the score -inf, and then the weight -0: its sign tells them from visible ones that vanish, and
// their values are selected away. Runs of keys that no row sees are not read.
//
// Bytes: keys and values once, (E + F) a key; the workspace is 2 + F numbers a row for 512 keys.
// Instructions, AVX-512, for 16 numbers of a key and of its value, 4 rows: 8 multiply-adds, and 4 (float32: 2,
// bfloat16: 1 load and 2 bit operations a pair of vectors, both halves of the words) to load them. A core that starts
// one multiply-add a clock then takes 128 bytes of float32, or 64 of bfloat16, in some 8 clocks: 48 and 24 GB/s at 3
// GHz.
#include "attention/decode_attention_tile.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "common/vector.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace mpkernels {
namespace decode_attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t runs_of_piece = piece_keys / run_keys;
constexpr int64_t most_rows = 32;  // rows whose scores are kept at a time
template <typename T>
constexpr T hiding_bias = T(-1e30);  // and less hides a key

// Where a (1 or B, 1 or H, 1 or L, 1 or S) tensor keeps its elements; strides are 0 where it is expanded.
struct Broadcast {
  int64_t batch = 0, head = 0, row = 0, key = 0;

  Broadcast() = default;
  explicit Broadcast(const OptionalTensor& x) {
    if (!x.has_value()) return;
    const auto stride = [&](int64_t d) { return x->size(d) == 1 ? int64_t{0} : x->stride(d); };
    batch = stride(0), head = stride(1), row = stride(2), key = stride(3);
  }
};

template <typename S>
struct Problem {
  const S* query;
  const S* key;
  const S* value;
  const int32_t* first;  // (B or 1, H or 1, L) or null
  const int32_t* last;
  const bool* mask;
  const S* bias;
  int64_t query_batch, query_head, query_row;
  int64_t key_batch, key_head, key_row;
  int64_t value_batch, value_head, value_row;
  int64_t interval_batch, interval_head;
  Broadcast mask_strides, bias_strides;
  int64_t batch, heads, groups, queries, keys, width, value_width;
  int64_t rows;    // of a key head: H / G L
  int64_t pieces;  // of the keys
  Compute<S> scale, softcap;

  Problem(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& first,
          const OptionalTensor& last, const OptionalTensor& mask, const OptionalTensor& bias, double scale,
          double softcap)
      : query(pointer<S>(query)),
        key(pointer<S>(key)),
        value(pointer<S>(value)),
        first(pointer<int32_t>(first)),
        last(pointer<int32_t>(last)),
        mask(pointer<bool>(mask)),
        bias(pointer<S>(bias)),
        query_batch(query.stride(0)),
        query_head(query.stride(1)),
        query_row(query.stride(2)),
        key_batch(key.stride(0)),
        key_head(key.stride(1)),
        key_row(key.stride(2)),
        value_batch(value.stride(0)),
        value_head(value.stride(1)),
        value_row(value.stride(2)),
        interval_batch(first.has_value() && first->size(0) > 1 ? first->size(1) * first->size(2) : 0),
        interval_head(first.has_value() && first->size(1) > 1 ? first->size(2) : 0),
        mask_strides(mask),
        bias_strides(bias),
        batch(query.size(0)),
        heads(query.size(1)),
        groups(key.size(1)),
        queries(query.size(2)),
        keys(key.size(2)),
        width(query.size(3)),
        value_width(value.size(3)),
        rows(groups > 0 ? heads / groups * queries : 0),
        pieces((keys + piece_keys - 1) / piece_keys),
        scale(static_cast<Compute<S>>(scale)),
        softcap(static_cast<Compute<S>>(softcap)) {}
};

// What a thread works on: rows [row, row + count) of a key head, and the keys of a piece.
struct Place {
  int64_t batch, group, row, count, begin, end;
};

// A row's own pointers. Keys of mask and bias are counted from the start of the tensor.
template <typename S>
struct Row {
  const S* query;
  const bool* mask;
  const S* bias;
  int64_t first, last;  // the keys of the piece that its interval holds

  Row() = default;
  Row(const Problem<S>& in, const Place& at, int64_t r) {
    const int64_t h = at.group * (in.heads / in.groups) + r / in.queries, i = r % in.queries;
    query = in.query + at.batch * in.query_batch + h * in.query_head + i * in.query_row;
    const auto offset = [&](const Broadcast& x) { return at.batch * x.batch + h * x.head + i * x.row; };
    mask = in.mask == nullptr ? nullptr : in.mask + offset(in.mask_strides);
    bias = in.bias == nullptr ? nullptr : in.bias + offset(in.bias_strides);
    first = at.begin;
    last = at.end;
    if (in.first != nullptr) {
      const int64_t interval = at.batch * in.interval_batch + h * in.interval_head + i;
      first = std::max<int64_t>(first, in.first[interval]);
      last = std::min<int64_t>(last, in.last[interval]);
    }
  }
};

// Which keys of a piece rows see, by runs counted from the first key that is looked at.
struct Runs {
  bool some_hidden[runs_of_piece] = {};
  bool all_hidden[runs_of_piece];

  Runs() { std::fill_n(all_hidden, runs_of_piece, true); }
};

template <typename T>
struct Softmax {
  T maximum, sum;
};

// From products to weights e^(s - maximum), in place, for one row and the keys [begin, end) of a piece.
template <typename S, typename T = Compute<S>>
Softmax<T> soften(const Problem<S>& in, const Row<S>& row, int64_t begin, int64_t end, T* scores, Runs& runs) {
  constexpr int L = lanes<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  Vector<T> highest = broadcast<T>(-infinity);
  for (int64_t k = 0; k < end - begin; k += L) {
    const int64_t count = std::min<int64_t>(L, end - begin - k);
    Vector<T> s = load_raw<T>(scores + k) * in.scale;
    if (in.softcap > 0) s = in.softcap * hyperbolic_tangent<T>(s / in.softcap);
    if (row.bias != nullptr) {
      const S* bias = row.bias + (begin + k) * in.bias_strides.key;
      Vector<T> added{};
      if (in.bias_strides.key == 1) {
        added = load_first<S>(bias, count);
      } else {
        for (int64_t j = 0; j < count; ++j) added[j] = to_compute<S>(bias[j * in.bias_strides.key]);
      }
      s = select<T>(added <= hiding_bias<T>, broadcast<T>(-infinity), s + added);
    }
    const Mask<T> position = lane_indices<T>() + static_cast<Integer<T>>(k);
    Mask<T> seen = (position >= static_cast<Integer<T>>(row.first - begin)) &
                   (position < static_cast<Integer<T>>(row.last - begin));
    if (row.mask != nullptr) {
      const bool* mask = row.mask + (begin + k) * in.mask_strides.key;
      alignas(64) Integer<T> each[L] = {};
      for (int64_t j = 0; j < count; ++j) each[j] = -static_cast<Integer<T>>(mask[j * in.mask_strides.key]);
      seen &= load_raw<Integer<T>>(each);
    }
    s = select<T>(seen, s, broadcast<T>(-infinity));
    highest = s > highest ? s : highest;
    store<T>(scores + k, s);
  }
  T maximum = -infinity;
  for (int l = 0; l < L; ++l) maximum = std::max(maximum, static_cast<T>(highest[l]));

  const T base = maximum == -infinity ? T(0) : maximum;
  Vector<T> total{};
  for (int64_t k = 0; k < end - begin; k += L) {
    const Vector<T> s = load_raw<T>(scores + k);
    const Mask<T> hidden = s == broadcast<T>(-infinity);
    const Vector<T> weight = exponential<T>(s - base).exp();
    total += select<T>(hidden, Vector<T>{}, weight);
    store<T>(scores + k, select<T>(hidden, constant<T>(T(-0.0)), weight));
    const int64_t run = k / run_keys;
    if (any<T>(hidden & first_lanes<T>(end - begin - k))) runs.some_hidden[run] = true;
    if (any<T>(~hidden)) runs.all_hidden[run] = false;
  }
  return {maximum, sum<T>(total)};
}

// Whether a mask lets any of the rows see any of the keys [begin, end).
template <typename S>
bool any_seen(const Problem<S>& in, const Row<S>* rows, int64_t count, int64_t begin, int64_t end) {
  const int64_t step = in.mask_strides.key;
  for (int64_t r = 0; r < count; ++r) {
    if (r > 0 && rows[r].mask == rows[r - 1].mask) continue;
    for (int64_t k = begin; k < end; ++k) {
      if (rows[r].mask[k * step]) return true;
    }
  }
  return false;
}

// The rows of a place over its keys: `softmax` and `sums` (count, F) of them.
template <typename S, typename T = Compute<S>>
void attend(const Problem<S>& in, const Place& at, Softmax<T>* softmax, T* sums) {
  constexpr int64_t L = lanes<T>;
  Row<S> rows[most_rows];
  int64_t begin = at.end, end = at.begin;
  for (int64_t r = 0; r < at.count; ++r) {
    rows[r] = Row<S>(in, at, at.row + r);
    if (rows[r].first >= rows[r].last) continue;
    begin = std::min(begin, rows[r].first);
    end = std::max(end, rows[r].last);
  }
  if (begin >= end) {  // the merge passes over it, and its sums stay unwritten
    std::fill_n(softmax, at.count, Softmax<T>{-std::numeric_limits<T>::infinity(), 0});
    return;
  }

  const int64_t padded_rows = (at.count + tile_rows<T> - 1) / tile_rows<T> * tile_rows<T>;
  const int64_t query_stride = (in.width + 2 * L - 1) / L * L, sum_stride = (in.value_width + 2 * L - 1) / L * L;
  T* queries = scratch<T>(padded_rows * (query_stride + score_stride<T> + sum_stride));
  T* scores = queries + padded_rows * query_stride;
  T* totals = scores + padded_rows * score_stride<T>;
  std::fill_n(queries, padded_rows * query_stride, T(0));
  std::fill_n(totals, padded_rows * sum_stride, T(0));
  for (int64_t r = 0; r < at.count; ++r) {
    T* to = queries + r * query_stride;
    for (int64_t e = 0; e < in.width; ++e) to[place_of<S>(e, in.width)] = to_compute<S>(rows[r].query[e]);
  }

  const S* keys = in.key + at.batch * in.key_batch + at.group * in.key_head;
  const S* values = in.value + at.batch * in.value_batch + at.group * in.value_head;
  const int64_t ahead = keys_ahead<S>(in.width), values_ahead = keys_ahead<S>(in.value_width);
  const int64_t first_value = begin + (end - begin + run_keys - 1) / run_keys * run_keys;  // values follow the keys
  const auto next_key = [&](int64_t k) -> Next<S> {
    if (k + ahead < end) return {keys + (k + ahead) * in.key_row, in.key_row};
    const int64_t value = begin + k + ahead - first_value;
    return {k + ahead >= first_value && value < end ? values + value * in.value_row : nullptr, in.value_row};
  };
  for (int64_t k = begin; k < std::min(end, begin + ahead); ++k) {
    fetch(keys + k * in.key_row, in.width * static_cast<int64_t>(sizeof(S)));
  }
  for (int64_t k = begin; k < end; k += run_keys) {
    const int64_t count = std::min(run_keys, end - k);
    if (in.mask != nullptr && !any_seen(in, rows, at.count, k, k + count)) continue;
    each_tile<T>(at.count, [&](int64_t r, auto tile) {
      score_tile<S, decltype(tile)::value>(queries + r * query_stride, query_stride, keys + k * in.key_row, in.key_row,
                                           count, in.width, r == 0 ? next_key(k) : Next<S>{nullptr, 0},
                                           scores + r * score_stride<T> + (k - begin));
    });
  }

  Runs runs;
  for (int64_t r = 0; r < at.count; ++r) {
    softmax[r] = soften<S>(in, rows[r], begin, end, scores + r * score_stride<T>, runs);
  }

  for (int64_t k = begin; k < end; k += run_keys) {
    const int64_t run = (k - begin) / run_keys, count = std::min(run_keys, end - k);
    if (runs.all_hidden[run]) continue;
    each_tile<T>(at.count, [&](int64_t r, auto tile) {
      const auto call = [&](auto hidden) {
        weigh_tile<S, decltype(tile)::value, decltype(hidden)::value>(
            values + k * in.value_row, in.value_row, count, scores + r * score_stride<T> + (k - begin),
            r == 0 && k + values_ahead < end ? Next<S>{values + (k + values_ahead) * in.value_row, in.value_row}
                                             : Next<S>{nullptr, 0},
            totals + r * sum_stride, sum_stride, in.value_width);
      };
      if (runs.some_hidden[run]) {
        call(std::true_type{});
      } else {
        call(std::false_type{});
      }
    });
  }
  for (int64_t r = 0; r < at.count; ++r) {
    for (int64_t f = 0; f < in.value_width; ++f) {
      sums[r * in.value_width + f] = totals[r * sum_stride + place_of<S>(f, in.value_width)];
    }
  }
}

// One row of the result from its pieces, in the order of the keys.
template <typename S, typename T = Compute<S>>
void merge(int64_t pieces, int64_t stride, int64_t width,
           const Softmax<T>* softmax,  // (pieces), `stride` apart
           const T* sums,              // (pieces, width), `stride` rows apart
           S* out, T* lse) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  T maximum = -infinity;
  for (int64_t p = 0; p < pieces; ++p) maximum = std::max(maximum, softmax[p * stride].maximum);
  const T base = maximum == -infinity ? T(0) : maximum;
  T* factors = scratch<T>(pieces);
  T total = 0;
  for (int64_t p = 0; p < pieces; ++p) {
    factors[p] = std::exp(softmax[p * stride].maximum - base);
    total += factors[p] * softmax[p * stride].sum;
  }
  *lse = total == 0 ? -infinity : base + std::log(total);
  const T inverse = total == 0 ? T(0) : 1 / total;
  for (int64_t f = 0; f < width; f += lanes<T>) {
    Vector<T> x{};
    for (int64_t p = 0; p < pieces; ++p) {
      if (softmax[p * stride].sum == 0) continue;  // sees no key: its sums are not written
      x += factors[p] * load_first<T>(sums + p * stride * width + f, width - f);
    }
    store_first<S>(out + f, x * inverse, width - f);
  }
}

template <typename S>
void run(const Problem<S>& in, const Tensor& like, S* out, int64_t out_batch, int64_t out_head, int64_t out_row,
         Compute<S>* lse) {
  using T = Compute<S>;
  const ScalarType wide = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t problems = in.batch * in.groups, parts = problems * in.pieces * in.rows;
  Tensor statistics = empty({parts, 2}, like, wide), partial = empty({parts, in.value_width}, like, wide);
  auto* softmax = reinterpret_cast<Softmax<T>*>(pointer<T>(statistics));
  T* sums = pointer<T>(partial);

  const int64_t grain = std::max<int64_t>(1, piece_keys / std::max<int64_t>(1, in.keys));
  parallel_pieces(problems * in.pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      // the key heads of a piece one after another: in the layout (B, S, G, E) they share pages
      const int64_t b = unit / (in.pieces * in.groups), piece = unit / in.groups % in.pieces, g = unit % in.groups;
      Place at{b, g, 0, 0, piece * piece_keys, std::min(in.keys, (piece + 1) * piece_keys)};
      for (at.row = 0; at.row < in.rows; at.row += most_rows) {
        at.count = std::min(most_rows, in.rows - at.row);
        const int64_t part = ((b * in.groups + g) * in.pieces + piece) * in.rows + at.row;
        attend<S>(in, at, softmax + part, sums + part * in.value_width);
      }
    }
  });

  const int64_t merged = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, in.pieces * in.value_width));
  parallel_pieces(problems * in.rows, merged, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t problem = i / in.rows, r = i % in.rows, part = problem * in.pieces * in.rows + r;
      const int64_t b = problem / in.groups, query = r % in.queries;
      const int64_t h = problem % in.groups * (in.heads / in.groups) + r / in.queries;
      merge<S>(in.pieces, in.rows, in.value_width, softmax + part, sums + part * in.value_width,
               out + b * out_batch + h * out_head + query * out_row, lse + (b * in.heads + h) * in.queries + query);
    }
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& first, const OptionalTensor& last, const OptionalTensor& mask,
                                   const OptionalTensor& bias, double scale, double softcap, bool heads_last) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), width = value.size(3);
  Tensor out = heads_last ? torch::stable::transpose(empty({batch, queries, heads, width}, query), 1, 2)
                          : empty({batch, heads, queries, width}, query);
  const bool wide = query.scalar_type() == ScalarType::Double;
  Tensor lse = empty({batch, heads, queries}, query, wide ? ScalarType::Double : ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  dispatch_floating("decode_attention", query, [&](auto element) {
    using S = decltype(element);
    const Problem<S> in(query, key, value, first, last, mask, bias, scale, softcap);
    run<S>(in, query, pointer<S>(out), out.stride(0), out.stride(1), out.stride(2), pointer<Compute<S>>(lse));
  });
  return {out, lse};
}

}  // namespace
}  // namespace decode_attention
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("decode_attention", TORCH_BOX(&mpkernels::decode_attention::forward));
}
