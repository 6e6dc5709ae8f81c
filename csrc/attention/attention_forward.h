// Forward of attention on the CPU: FlashAttention's online softmax (Dao 2023, arXiv 2307.08691, algorithm 1), a block
// of 64 queries a piece of work:
//
//     S^T = K Q^T;  m' = max(m, max_keys S);  P^T = 2^(S^T - m');  l = 2^(m - m') l + sum_keys P
//     O^T = 2^(m - m') O^T + V^T P^T;  out = O / l;  lse = ln 2 (m + log2 l)
//
// query (B, H, L, E), key (B, G, S, E), value (B, G, S, F), out (B, H, L, F), lse (B, H, L). Keys that no query of the
// block sees are never visited; keys that all see skip the mask.
//
// Work: 2 (E + F) floating-point operations a visible pair, in products that run at the rate of the multipliers; one
// exponential a pair, about a tenth of the products' time at E = F = 64. Bytes: keys and values are read once a block
// of queries, from the caches.
#pragma once

#include "attention/attention.h"
#include "common/scratch.h"

namespace mpkernels {
namespace attention {

constexpr int64_t forward_keys = 96;  // of a tile; a multiple of the 6 rows of a product

template <typename Products>
class ForwardBlock {
  using S = typename Products::Element;
  using T = typename Products::T;
  using Packed = typename Products::Packed;
  using Keys = typename Products::Keys;

 public:
  ForwardBlock(const Problem<S>& problem, int64_t b, int64_t h, int64_t block)
      : p_(problem),
        b_(b),
        h_(h),
        query_(block * block_queries),
        rows_(std::min(block_queries, problem.queries - query_)),
        vectors_(vectors_for(rows_, lanes<T>)) {
    const int64_t tile = forward_keys * block_queries;
    const int64_t keys = Products::tile_size(forward_keys, std::max(p_.width, p_.value_width));
    T* memory = scratch_numbers(p_.value_width * block_queries + 3 * tile + 2 * keys + 3 * block_queries);
    sums_ = memory;
    scores_ = sums_ + p_.value_width * block_queries;
    workspace_ = scores_ + tile;
    factor_ = workspace_ + tile;
    keys_ = factor_ + tile;
    values_ = keys_ + keys;
    highest_ = values_ + keys;
    total_ = highest_ + block_queries;
  }

  void run(const Heads<S>& out, T* lse) {
    [[maybe_unused]] const typename Products::Session session{};
    const T factor = static_cast<T>(p_.factor());
    Products::pack(p_.query.at(b_, h_, query_), p_.query.row, rows_, p_.width, factor, packed_);
    for (int64_t n = 0; n < vectors_; ++n) {
      store<T>(highest_ + n * lanes<T>, broadcast<T>(hidden<T>));
      store<T>(total_ + n * lanes<T>, Vector<T>{});
    }
    std::memset(static_cast<void*>(sums_), 0, static_cast<size_t>(p_.value_width * block_queries) * sizeof(T));
    const KeyRange range = key_range(p_, b_, h_, query_, rows_);
    tiles(range.low, range.full_low, true);
    // whole tiles without a mask; what is left of them joins the boundary
    int64_t full = range.full_high;
    if (range.full_high < range.high) full = range.full_low + (range.full_high - range.full_low) / 32 * 32;
    tiles(range.full_low, full, false);
    tiles(full, range.high, true);
    finish(out, lse);
  }

 private:
  // scratch has one piece of memory a type: packed numbers of the same type lie behind the others
  T* scratch_numbers(int64_t size) {
    if constexpr (std::is_same_v<Packed, T>) {
      const int64_t packed = Products::packed_size(p_.width);
      packed_ = scratch<T>(packed + size);
      return packed_ + packed;
    } else {
      packed_ = scratch<Packed>(Products::packed_size(p_.width));
      return scratch<T>(size);
    }
  }

  void tiles(int64_t from, int64_t to, bool checked) {
    for (int64_t key = from; key < to; key += forward_keys) {
      const Place at{b_, h_, query_, rows_, key, std::min(forward_keys, to - key)};
      const Seen seen = seen_by_mask(p_, at);
      if (seen != Seen::none) tile(at, checked || seen == Seen::some);
    }
  }

  void tile(const Place& at, bool checked) {
    const int64_t g = h_ / p_.group();
    const S* keys = p_.key.at(b_, g, at.key);
    const S* values = p_.value.at(b_, g, at.key);
    prefetch_bias(p_, at);
    const Keys tile = Keys::of(keys, p_.key.row, at.count, p_.width, KeyUse::scores, keys_);
    Products::scores(tile, packed_, at.count, rows_, p_.width, static_cast<T>(p_.factor()), scores_);
    checked = finish_scores<T>(p_, at, checked, scores_, static_cast<T*>(nullptr));
    if (checked) {
      exponentials<true>(at.count);
    } else {
      exponentials<false>(at.count);
    }
    if (p_.dropout_p > 0) drop(at);
    if (checked && !all_finite(values, p_.value.row, at.count, p_.value_width)) {
      add_visible(values, at.count);
    } else {
      const Keys transposed = Keys::of(values, p_.value.row, at.count, p_.value_width, KeyUse::columns, values_);
      Products::add_columns(transposed, scores_, at.count, rows_, p_.value_width, sums_, factor_);
    }
  }

  // Scores become weights relative to the new maximum; what was summed so far is scaled to it.
  template <bool CHECKED>
  void exponentials(int64_t count) {
    // what is hidden weighs 0, not 2^-126
    const auto weigh = [](Vector<T> score, Vector<T> base) {
      const Vector<T> weight = power_of_two<T>(score - base);
      return CHECKED ? choose<T>(at_least<T>(broadcast<T>(hidden<T>), score), Vector<T>{}, weight) : weight;
    };
    for (int64_t n = 0; n < vectors_; ++n) {
      T* scores = scores_ + n * lanes<T>;
      const Vector<T> before = load_raw(highest_ + n * lanes<T>);
      Vector<T> highest[2] = {before, before};
      int64_t k = 0;
      for (; k + 2 <= count; k += 2) {
        for (int64_t i = 0; i < 2; ++i) {
          const Vector<T> x = load_raw(scores + (k + i) * block_queries);
          highest[i] = x > highest[i] ? x : highest[i];
        }
      }
      if (k < count) {
        const Vector<T> x = load_raw(scores + k * block_queries);
        highest[0] = x > highest[0] ? x : highest[0];
      }
      const Vector<T> after = highest[0] > highest[1] ? highest[0] : highest[1];
      // a row that has seen nothing yet: any base will do
      const Vector<T> base = after > hidden<T> ? after : Vector<T>{};
      Vector<T> totals[2] = {};
      for (k = 0; k + 2 <= count; k += 2) {
        for (int64_t i = 0; i < 2; ++i) {
          const Vector<T> weight = weigh(load_raw(scores + (k + i) * block_queries), base);
          store<T>(scores + (k + i) * block_queries, weight);
          totals[i] += weight;
        }
      }
      if (k < count) {
        const Vector<T> weight = weigh(load_raw(scores + k * block_queries), base);
        store<T>(scores + k * block_queries, weight);
        totals[0] += weight;
      }
      const Vector<T> rescale = power_of_two<T>(before - base);
      const Vector<T> total = load_raw(total_ + n * lanes<T>) * rescale + (totals[0] + totals[1]);
      store<T>(total_ + n * lanes<T>, total);
      store<T>(highest_ + n * lanes<T>, after);
      if (any<T>(after != before)) {
        for (int64_t f = 0; f < p_.value_width; ++f) {
          T* sum = sums_ + f * block_queries + n * lanes<T>;
          store<T>(sum, load_raw(sum) * rescale);
        }
      }
    }
  }

  void drop(const Place& at) {
    keep_factors<T>(p_, at, workspace_);
    for (int64_t k = 0; k < at.count; ++k) {
      for (int64_t n = 0; n < vectors_; ++n) {
        const int64_t place = k * block_queries + n * lanes<T>;
        store<T>(scores_ + place, load_raw(scores_ + place) * load_raw(workspace_ + place));
      }
    }
  }

  // The product with values that are not finite: those of hidden keys are passed over.
  void add_visible(const S* values, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t n = 0; n < vectors_; ++n) {
        const Vector<T> weight = load_raw(scores_ + k * block_queries + n * lanes<T>);
        for (int64_t f = 0; f < p_.value_width; ++f) {
          T* sum = sums_ + f * block_queries + n * lanes<T>;
          const Vector<T> x = load_raw(sum);
          const Vector<T> term = weight * to_compute(values[k * p_.value.row + f]);
          store<T>(sum, select<T>(weight != 0, x + term, x));
        }
      }
    }
  }

  void finish(const Heads<S>& out, T* lse) {
    for (int64_t n = 0; n < vectors_; ++n) {
      const Vector<T> total = load_raw(total_ + n * lanes<T>);
      const Vector<T> inverse = total == 0 ? Vector<T>{} : 1 / total;
      for (int64_t f = 0; f < p_.value_width; ++f) {
        T* sum = sums_ + f * block_queries + n * lanes<T>;
        store<T>(sum, load_raw(sum) * inverse);
      }
    }
    T* row = lse + (b_ * p_.heads + h_) * p_.queries + query_;
    for (int64_t i = 0; i < rows_; ++i) {
      row[i] = total_[i] == 0 ? -std::numeric_limits<T>::infinity()
                              : (highest_[i] + std::log2(total_[i])) * static_cast<T>(1 / log2_e);
    }
    write_transposed(sums_, rows_, p_.value_width, T(1), out.at(b_, h_, query_), out.row);
  }

  const Problem<S>& p_;
  int64_t b_, h_, query_, rows_, vectors_;
  Packed* packed_;
  T *sums_, *scores_, *workspace_, *factor_, *keys_, *values_, *highest_, *total_;
};

}  // namespace attention
}  // namespace mpkernels
