// Backward of attention on the CPU, from the saved lse (Dao 2023, arXiv 2307.08691, algorithm 2), transposed as the
// forward is. With P = 2^(S - lse log2 e) and delta = sum_f dO O - dlse of a query:
//
//     dV += P dO;  dP^T = V dO^T;  dS = P (dP - delta);  dK += scale dS Q;  dQ^T += scale K^T dS^T;  dbias = dS
//
// Three passes. prepare: for every block of queries, the packed Q and dO (and delta, lse, the keys that it sees).
// accumulate: a piece of work owns keys, and walks all queries that see them: the gradients of its keys and values (of
// all query heads that share them), and of the columns of the bias, are its own. Gradients of queries are sums over
// pieces: each has its own buffer. finish: those buffers are added in order. No atomics, and neither the pieces nor any
// order depends on the number of threads.
//
// A piece is a key head with every n-th tile of its keys (every n-th: a causal mask leaves early keys more work). n is
// 1 but where there are fewer than `wanted_pieces` key heads. Heads that share a bias with a gradient share a piece.
//
// Work: 10 floating-point operations a visible pair and width (5 products), one exponential a pair. Memory beside
// inputs and outputs: two to four times the queries, and the buffers, n times the queries.
#pragma once

#include "attention/attention.h"
#include "common/scratch.h"

namespace mpkernels {
namespace attention {

constexpr int64_t backward_keys = 64;  // of a tile
constexpr int64_t wanted_pieces = 8;
constexpr int64_t most_splits = 4;  // of the keys of a head: each costs a buffer of the size of the queries

// Where the gradients go; grad_bias is null if nobody asked for it.
template <typename S>
struct Gradients {
  using T = Compute<S>;

  Heads<const S> out;
  Heads<const S> grad_out;  // or null
  const T *lse, *grad_lse;  // (B, H, L); grad_lse or null
  Heads<S> query, key, value;
  T* bias;  // (.., .., L or 1, S) contiguous, or null
  int64_t bias_batch, bias_head, bias_row;
  bool bias_over_queries;  // the bias has one row for all queries
};

// What the passes hand to each other, a row a block of queries of every head.
template <typename Products>
struct Prepared {
  using T = typename Products::T;

  typename Products::Packed *query, *grad_out;         // (B, H, blocks, packed size)
  typename Products::Natural *query_rows, *grad_rows;  // (B, H, blocks, natural size), null where used in place
  T* delta;                                            // (B, H, blocks, 64)
  T* lse;                                              // the same, in base 2
  KeyRange* ranges;                                    // (B, H, blocks)
  unsigned char* finite;                               // whether the block's queries and gradients are all finite
  T* sums;                                             // (splits, B, H, blocks, E, 64) gradients of the queries
  int64_t splits;
};

template <typename Products>
void prepare_block(const Problem<typename Products::Element>& p, const Gradients<typename Products::Element>& g,
                   const Prepared<Products>& to, int64_t b, int64_t h, int64_t block) {
  using S = typename Products::Element;
  using T = typename Products::T;
  const int64_t i0 = block * block_queries, rows = std::min(block_queries, p.queries - i0);
  const int64_t index = (b * p.heads + h) * p.query_blocks() + block;
  const S* query = p.query.at(b, h, i0);
  Products::pack(query, p.query.row, rows, p.width, static_cast<T>(p.factor()),
                 to.query + index * Products::packed_size(p.width));
  if (to.query_rows != nullptr) {
    Products::copy(query, p.query.row, rows, p.width, to.query_rows + index * Products::natural_size(p.width));
  }
  bool finite = all_finite(query, p.query.row, rows, p.width);
  T* delta = to.delta + index * block_queries;
  T* lse = to.lse + index * block_queries;
  for (int64_t i = 0; i < block_queries; ++i) {
    const int64_t place = (b * p.heads + h) * p.queries + i0 + i;
    delta[i] = i < rows && g.grad_lse != nullptr ? -g.grad_lse[place] : T(0);
    // a query that sees nothing weighs nothing
    const T found = i < rows ? g.lse[place] : -std::numeric_limits<T>::infinity();
    lse[i] = found == -std::numeric_limits<T>::infinity() ? -hidden<T> : found * static_cast<T>(log2_e);
  }
  if (g.grad_out.data != nullptr) {
    const S* gradient = g.grad_out.at(b, h, i0);
    finite = finite && all_finite(gradient, g.grad_out.row, rows, p.value_width);
    Products::pack(gradient, g.grad_out.row, rows, p.value_width, T(1),
                   to.grad_out + index * Products::packed_size(p.value_width));
    if (to.grad_rows != nullptr) {
      Products::copy(gradient, g.grad_out.row, rows, p.value_width,
                     to.grad_rows + index * Products::natural_size(p.value_width));
    }
    for (int64_t i = 0; i < rows; ++i) {
      const S* out = g.out.at(b, h, i0 + i);
      Vector<T> product{};
      for (int64_t f = 0; f < p.value_width; f += lanes<T>) {
        product += load_first<S>(gradient + i * g.grad_out.row + f, p.value_width - f) *
                   load_first<S>(out + f, p.value_width - f);
      }
      delta[i] += sum<T>(product);
    }
  }
  for (int64_t i = 0; i < rows; ++i) finite = finite && std::isfinite(delta[i]) && std::isfinite(lse[i]);
  to.finite[index] = finite;
  to.ranges[index] = key_range(p, b, h, i0, rows);
  const int64_t size = p.width * block_queries;
  const int64_t heads = p.batches * p.heads * p.query_blocks();
  for (int64_t split = 0; split < to.splits; ++split) {
    std::memset(static_cast<void*>(to.sums + (split * heads + index) * size), 0, static_cast<size_t>(size) * sizeof(T));
  }
}

// One tile of keys of one key head: what it accumulates, and the products with a block of queries.
template <typename Products>
class BackwardTile {
  using S = typename Products::Element;
  using T = typename Products::T;
  using Keys = typename Products::Keys;

 public:
  BackwardTile(const Problem<S>& problem, const Gradients<S>& gradients, const Prepared<Products>& prepared,
               int64_t split)
      : p_(problem), g_(gradients), prepared_(prepared), split_(split) {
    const int64_t tile = backward_keys * block_queries;
    const int64_t width = Products::padded(p_.width), value_width = Products::padded(p_.value_width);
    const int64_t keys = Products::tile_size(backward_keys, p_.width);
    const int64_t values = Products::tile_size(backward_keys, p_.value_width);
    T* memory = scratch<T>(6 * tile + backward_keys * (width + value_width) + keys + values);
    weights_ = memory;
    slopes_ = weights_ + tile;
    workspace_ = slopes_ + tile;
    keep_ = workspace_ + tile;
    factor_ = keep_ + tile;
    gradients_ = factor_ + tile;
    of_keys_ = gradients_ + tile;
    of_values_ = of_keys_ + backward_keys * width;
    keys_ = of_values_ + backward_keys * value_width;
    values_ = keys_ + keys;
  }

  void run(int64_t b, int64_t kv, int64_t key) {
    const int64_t count = std::min(backward_keys, p_.keys - key);
    const int64_t width = Products::padded(p_.width), value_width = Products::padded(p_.value_width);
    const S* keys = p_.key.at(b, kv, key);
    [[maybe_unused]] const typename Products::Session session{};
    std::memset(static_cast<void*>(of_keys_), 0, static_cast<size_t>(count * width) * sizeof(T));
    std::memset(static_cast<void*>(of_values_), 0, static_cast<size_t>(count * value_width) * sizeof(T));
    const Keys tile = Keys::of(keys, p_.key.row, count, p_.width, KeyUse::both, keys_);
    const Keys values = Keys::of(p_.value.at(b, kv, key), p_.value.row, count, p_.value_width, KeyUse::scores, values_);
    finite_keys_ = all_finite(keys, p_.key.row, count, p_.width);
    for (int64_t h = kv * p_.group(); h < (kv + 1) * p_.group(); ++h) {
      for (int64_t block = 0; block < p_.query_blocks(); ++block) {
        const int64_t index = (b * p_.heads + h) * p_.query_blocks() + block;
        const KeyRange& range = prepared_.ranges[index];
        const int64_t from = key + std::max<int64_t>(range.low - key, 0) / 2 * 2;  // products take keys in pairs
        const int64_t to = std::min(key + count, key + (range.high - key + 1) / 2 * 2);
        if (std::max(from, range.low) >= std::min(to, range.high)) continue;
        const int64_t i0 = block * block_queries;
        const Place at{b, h, i0, std::min(block_queries, p_.queries - i0), from, to - from};
        const Seen seen = seen_by_mask(p_, at);
        if (seen == Seen::none) continue;
        const bool checked = seen == Seen::some || from < range.full_low || to > range.full_high;
        pair(at, index, tile.from(from - key), values.from(from - key), of_keys_ + (from - key) * width,
             of_values_ + (from - key) * value_width, checked);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      S* of_key = g_.key.at(b, kv, key + k);
      S* of_value = g_.value.at(b, kv, key + k);
      for (int64_t j = 0; j < p_.width; j += lanes<T>) {
        store_first<S>(of_key + j, load_raw(of_keys_ + k * width + j) * static_cast<T>(p_.scale), p_.width - j);
      }
      for (int64_t j = 0; j < p_.value_width; j += lanes<T>) {
        store_first<S>(of_value + j, load_raw(of_values_ + k * value_width + j), p_.value_width - j);
      }
    }
  }

 private:
  // A block of queries with the tile's keys [at.key, at.key + at.count).
  void pair(const Place& at, int64_t index, const Keys& keys, const Keys& values, T* of_keys, T* of_values,
            bool checked) {
    const int64_t vectors = vectors_for(at.rows, lanes<T>);
    const int64_t blocks = p_.batches * p_.heads * p_.query_blocks();
    T* of_queries = prepared_.sums + (split_ * blocks + index) * p_.width * block_queries;
    prefetch_bias(p_, at);
    Products::scores(keys, prepared_.query + index * Products::packed_size(p_.width), at.count, at.rows, p_.width,
                     static_cast<T>(p_.factor()), weights_);
    checked = finish_scores<T>(p_, at, checked, weights_, slopes_);
    weigh(at, prepared_.lse + index * block_queries, vectors, checked);
    const bool dropping = p_.dropout_p > 0;
    if (dropping) keep_factors<T>(p_, at, keep_);
    if (g_.bias != nullptr && !g_.bias_over_queries) {
      prefetch_rows<1>(bias_place(at), g_.bias_row, at.rows, at.count);
    }
    const bool exact = checked && !(prepared_.finite[index] && finite_keys_);
    if (g_.grad_out.data != nullptr) {
      Products::scores(values, prepared_.grad_out + index * Products::packed_size(p_.value_width), at.count, at.rows,
                       p_.value_width, T(1), gradients_);
      const T* dropped = weights_;
      if (dropping) {
        product(weights_, keep_, workspace_, at.count, vectors);
        product(gradients_, keep_, gradients_, at.count, vectors);
        dropped = workspace_;
      }
      if (exact) {
        add_rows_visible(dropped, g_.grad_out, at, p_.value_width, of_values);
      } else {
        add_rows(dropped, prepared_.grad_rows, g_.grad_out, index, at, p_.value_width, of_values);
      }
    } else {
      std::memset(static_cast<void*>(gradients_), 0, static_cast<size_t>(at.count * block_queries) * sizeof(T));
    }
    differentiate(at, prepared_.delta + index * block_queries, vectors, checked);
    if (g_.bias != nullptr) add_bias(at);
    if (p_.softcap > 0) product(gradients_, slopes_, gradients_, at.count, vectors);
    if (exact) {
      add_rows_visible(gradients_, p_.query, at, p_.width, of_keys);
      add_columns_visible(at, of_queries);
    } else {
      add_rows(gradients_, prepared_.query_rows, p_.query, index, at, p_.width, of_keys);
      Products::add_columns(keys, gradients_, at.count, at.rows, p_.width, of_queries, factor_);
    }
  }

  // sums += tile times the rows of a block of queries: the prepared ones, or those in memory
  void add_rows(const T* tile, const typename Products::Natural* prepared, const Heads<const S>& rows, int64_t index,
                const Place& at, int64_t width, T* sums) {
    if (prepared != nullptr) {
      Products::add_rows(tile, prepared + index * Products::natural_size(width), Products::padded(width), at.count,
                         at.rows, width, sums, factor_);
    } else if constexpr (std::is_same_v<S, typename Products::Natural>) {
      Products::add_rows(tile, rows.at(at.b, at.h, at.query), rows.row, at.count, at.rows, width, sums, factor_);
    }
  }

  // scores -> weights; what is hidden weighs 0, whatever lse is
  void weigh(const Place& at, const T* lse, int64_t vectors, bool checked) {
    for (int64_t n = 0; n < vectors; ++n) {
      const Vector<T> base = load_raw(lse + n * lanes<T>);
      T* x = weights_ + n * lanes<T>;
      if (checked) {
        for (int64_t k = 0; k < at.count; ++k, x += block_queries) {
          const Vector<T> score = load_raw(x);
          const LaneMask<T> unseen = at_least<T>(broadcast<T>(hidden<T>), score);
          store<T>(x, choose<T>(unseen, Vector<T>{}, power_of_two<T>(score - base)));
        }
      } else {
        for (int64_t k = 0; k < at.count; ++k, x += block_queries) {
          store<T>(x, power_of_two<T>(load_raw(x) - base));
        }
      }
    }
  }

  // gradients of weights -> gradients of scores
  void differentiate(const Place& at, const T* delta, int64_t vectors, bool checked) {
    for (int64_t n = 0; n < vectors; ++n) {
      const Vector<T> base = load_raw(delta + n * lanes<T>);
      for (int64_t k = 0; k < at.count; ++k) {
        const int64_t place = k * block_queries + n * lanes<T>;
        const Vector<T> weight = load_raw(weights_ + place);
        const Vector<T> found = weight * (load_raw(gradients_ + place) - base);
        // (what weighs nothing pulls nothing, whatever it is multiplied with; a NaN that is seen stays one)
        const LaneMask<T> nothing = at_least<T>(Vector<T>{}, weight);
        store<T>(gradients_ + place, checked ? choose<T>(nothing, Vector<T>{}, found) : found);
      }
    }
  }

  static void product(const T* a, const T* b, T* to, int64_t count, int64_t vectors) {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t n = 0; n < vectors; ++n) {
        const int64_t place = k * block_queries + n * lanes<T>;
        store<T>(to + place, load_raw(a + place) * load_raw(b + place));
      }
    }
  }

  T* bias_place(const Place& at) const {
    return g_.bias + at.b * g_.bias_batch + at.h * g_.bias_head + at.query * g_.bias_row + at.key;
  }

  void add_bias(const Place& at) {
    T* to = bias_place(at);
    if (g_.bias_over_queries) {
      for (int64_t k = 0; k < at.count; ++k) {
        Vector<T> total{};
        for (int64_t i = 0; i < at.rows; i += lanes<T>) {
          total += select<T>(first_lanes<T>(at.rows - i), load_raw(gradients_ + k * block_queries + i), Vector<T>{});
        }
        to[k] += sum<T>(total);
      }
      return;
    }
    const auto row_of = [&](int64_t k, int64_t i, int64_t) { return load_raw(gradients_ + k * block_queries + i); };
    const int64_t rows = at.rows;
    transpose_rows<T>(at.count, rows, row_of, [&](int64_t i, int64_t k, Vector<T> x) {
      T* place = to + i * g_.bias_row + k;
      store_first<T>(place, load_first<T>(place, at.count - k) + x, at.count - k);
    });
  }

  // The products where a number is not finite: pairs without weight are passed over.
  void add_rows_visible(const T* tile, const Heads<const S>& rows, const Place& at, int64_t width, T* sums) {
    for (int64_t k = 0; k < at.count; ++k) {
      for (int64_t i = 0; i < at.rows; ++i) {
        if (weights_[k * block_queries + i] == 0) continue;
        const T weight = tile[k * block_queries + i];
        const S* row = rows.at(at.b, at.h, at.query + i);
        for (int64_t d = 0; d < width; ++d) sums[k * Products::padded(width) + d] += weight * to_compute(row[d]);
      }
    }
  }
  void add_columns_visible(const Place& at, T* sums) {
    for (int64_t k = 0; k < at.count; ++k) {
      const S* key = p_.key.at(at.b, at.h / p_.group(), at.key + k);
      for (int64_t i = 0; i < at.rows; ++i) {
        if (weights_[k * block_queries + i] == 0) continue;
        for (int64_t d = 0; d < p_.width; ++d) {
          sums[d * block_queries + i] += gradients_[k * block_queries + i] * to_compute(key[d]);
        }
      }
    }
  }

  const Problem<S>& p_;
  const Gradients<S>& g_;
  const Prepared<Products>& prepared_;
  int64_t split_;
  bool finite_keys_ = true;
  T *weights_, *slopes_, *workspace_, *keep_, *factor_, *gradients_, *of_keys_, *of_values_, *keys_, *values_;
};

template <typename Products>
void finish_block(const Problem<typename Products::Element>& p, const Gradients<typename Products::Element>& g,
                  const Prepared<Products>& from, int64_t b, int64_t h, int64_t block) {
  using T = typename Products::T;
  const int64_t i0 = block * block_queries, rows = std::min(block_queries, p.queries - i0);
  const int64_t blocks = p.batches * p.heads * p.query_blocks();
  const int64_t index = (b * p.heads + h) * p.query_blocks() + block;
  const int64_t size = p.width * block_queries;
  T* sums = from.sums + index * size;
  for (int64_t split = 1; split < from.splits; ++split) {
    const T* more = from.sums + (split * blocks + index) * size;
    for (int64_t n = 0; n < size; n += lanes<T>) store<T>(sums + n, load_raw(sums + n) + load_raw(more + n));
  }
  write_transposed(sums, rows, p.width, static_cast<T>(p.scale), g.query.at(b, h, i0), g.query.row);
}

}  // namespace attention
}  // namespace mpkernels
