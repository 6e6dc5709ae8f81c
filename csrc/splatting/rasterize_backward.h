// The backward of the CPU rasterizer (header comment: rasterize.cpp): every tile writes what each entry of its list
// gains, then the entries of every Gaussian are added in the order of the lists.
#pragma once

#include "splatting/rasterize_tile.h"

namespace mpkernels {
namespace rasterize {

// Sums of many vectors at once. joined<K>(a, b): in every 2 K lanes, the lower K hold halves of a added, the upper K
// those of b.
template <typename T, int K>
struct LowerHalves {
  static constexpr int at(int i) { return i % (2 * K) < K ? i : lanes<T> + i - K; }
};
template <typename T, int K>
struct UpperHalves {
  static constexpr int at(int i) { return i % (2 * K) < K ? i + K : lanes<T> + i; }
};
template <int K, typename T>
MPKERNELS_INLINE Vector<T> joined(Vector<T> a, Vector<T> b) {
  return shuffle<LowerHalves<T, K>, T>(a, b) + shuffle<UpperHalves<T, K>, T>(a, b);
}

// x[0] := the sums of x[0], ..., x[count - 1], a lane each; count <= 2 K <= lanes. Log2(lanes) steps, each with half as
// many vectors as the one before. What stands behind x[count - 1] is not read.
template <typename T, int K, int Count>
MPKERNELS_INLINE void sums_in_lanes(Vector<T>* x) {
  if constexpr (K >= 1) {
    for (int j = 0; j < std::min(K, Count); ++j) x[j] = joined<K, T>(x[j], j + K < Count ? x[j + K] : x[j]);
    sums_in_lanes<T, K / 2, std::min(K, Count)>(x);
  }
}

// What an entry gains: sums over the tile's pixels, v being dL/d(-sigma), d = mean - centre.
enum Gain { of_v, of_v_dx, of_v_dy, of_v_dxx, of_v_dxy, of_v_dyy, gains };  // then the colors, then absgrad's two

template <typename T>
struct Gradients {
  // of the outputs, null where there is none; and the outputs
  const T* colors;          // (I, H, W, D)
  const T* alphas;          // (I, H, W)
  const T* transmittances;  // (I, H, W)
  const int32_t* last;      // (I, H, W)
  // of the entries
  T* entries;      // (n, per_entry)
  int64_t* used;   // (tiles) entries that were written
  T* backgrounds;  // (tiles, D) or null
  int64_t per_entry;
};

// C: the number of channels where it is compiled in, 0 for any number.
template <typename T, int C, bool Absolute>
void differentiate_tile(const Scene<T>& s, int64_t index, const Gradients<T>& g) {
  constexpr int L = lanes<T>;
  const Tile<T> tile(s, index);
  const int64_t channels = C > 0 ? C : s.channels;
  const int64_t vectors = tile.vectors();
  // of every pixel: transmittance behind the entry at hand, what lies behind it weighted by the gradient, the place in
  // the list from which on nothing is drawn, gradient of its colors
  const int64_t held = (3 + channels) * vectors + channels + (vectors * 8 + sizeof(Vector<T>)) / sizeof(Vector<T>);
  auto* transmittance = reinterpret_cast<Vector<T>*>(scratch<T>(held * lanes<T>));
  Vector<T>* behind = transmittance + vectors;
  auto* last = reinterpret_cast<Mask<T>*>(behind + vectors);
  Vector<T>* grads = behind + 2 * vectors;                             // (D, columns, rows)
  Vector<T>* color_gains = grads + channels * vectors;                 // (D)
  auto* last_of = reinterpret_cast<int64_t*>(color_gains + channels);  // (columns, rows) the largest of each vector

  const T* background = s.backgrounds == nullptr ? nullptr : s.backgrounds + tile.image * channels;
  for (int64_t c = 0; c < channels; ++c) color_gains[c] = Vector<T>{};
  int64_t used = 0;
  for (int64_t v = 0; v < tile.columns; ++v) {
    const int64_t count = tile.lanes_in(v);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t i = v * tile.rows + row;
      const int64_t pixel = (tile.image * s.height + tile.y + row) * s.width + tile.x + v * L;
      const Vector<T> left = load_first<T>(g.transmittances + pixel, count);
      transmittance[i] = left;
      Vector<T> lost = g.alphas == nullptr ? Vector<T>{} : -load_first<T>(g.alphas + pixel, count);
      for (int64_t c = 0; c < channels; ++c) {
        Vector<T> grad{};
        if (g.colors != nullptr) {
          for (int64_t lane = 0; lane < count; ++lane) grad[lane] = g.colors[(pixel + lane) * channels + c];
        }
        grads[c * vectors + i] = grad;
        if (background != nullptr) lost += grad * background[c];
        color_gains[c] += left * grad;
      }
      behind[i] = lost * left;
      int64_t largest = 0;
      for (int64_t lane = 0; lane < L; ++lane) {
        const int32_t place = lane < count ? g.last[pixel + lane] : 0;
        last[i][lane] = place;
        largest = std::max<int64_t>(largest, place);
      }
      last_of[i] = std::min(largest, tile.end - tile.first);
      used = std::max(used, last_of[i]);
    }
  }
  if (g.backgrounds != nullptr) {
    for (int64_t c = 0; c < channels; ++c) g.backgrounds[index * channels + c] = sum<T>(color_gains[c]);
  }
  g.used[index] = used;

  for (int64_t k = tile.first + used - 1; k >= tile.first; --k) {
    if (k - entries_ahead >= tile.first) {
      __builtin_prefetch(s.gaussians + static_cast<uint32_t>(s.ids[k - entries_ahead]));
    }
    T* entry = g.entries + k * g.per_entry;
    const int64_t id = static_cast<uint32_t>(s.ids[k]);
    const int64_t place = k - tile.first;
    const Rows<T> rows = id < s.count ? rows_of(s.gaussians[id], tile) : Rows<T>{0, 0};
    if (rows.first == rows.end) {
      for (int64_t j = 0; j < g.per_entry; ++j) entry[j] = 0;
      continue;
    }
    const Record<T>& gaussian = s.gaussians[id];
    const T* color = C > 0 ? gaussian.color : s.color(id);
    constexpr int compiled = gains + C + (Absolute ? 2 : 0);
    Vector<T> gained[compiled] = {};
    if constexpr (C == 0) {
      for (int64_t c = 0; c < channels; ++c) color_gains[c] = Vector<T>{};
    }
    for (int64_t v = 0; v < tile.columns; ++v) {
      const Column<T> column = column_of(gaussian, tile, v);
      Vector<T> v_sum{}, v_dy{}, v_dyy{};
      for (int64_t row = rows.first; row < rows.end; ++row) {
        const int64_t i = v * tile.rows + row;
        if (place >= last_of[i]) continue;
        const Coverage<T> covered = coverage(gaussian, column, tile, row);
        const LaneMask<T> drawn = both<T>(covered.drawn, above<T>(last[i], Mask<T>{} + static_cast<Integer<T>>(place)));
        if (none<T>(drawn)) continue;
        const Vector<T> alpha = cut<T>(covered.uncut);
        const Vector<T> lets_pass = 1 / (1 - alpha);
        const Vector<T> in_front = transmittance[i] * lets_pass;
        const Vector<T> weight = alpha * in_front;
        Vector<T> seen{};
        if constexpr (C > 0) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            const Vector<T> grad = grads[c * vectors + i];
            seen += grad * color[c];
            // (chosen, not multiplied by 0: a gradient that is NaN stays with what its pixel shows)
            gained[gains + c] = choose<T>(drawn, gained[gains + c] + weight * grad, gained[gains + c]);
          }
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            const Vector<T> grad = grads[c * vectors + i];
            seen += grad * color[c];
            color_gains[c] = choose<T>(drawn, color_gains[c] + weight * grad, color_gains[c]);
          }
        }
        const Vector<T> of_alpha = in_front * seen - behind[i] * lets_pass;
        // an alpha that was cut has no gradient to what it was computed from
        const LaneMask<T> moves = but_not<T>(drawn, above<T>(covered.uncut, broadcast<T>(alpha_max<T>)));
        const Vector<T> of_exponent = choose<T>(moves, covered.uncut * of_alpha, Vector<T>{});
        behind[i] = choose<T>(drawn, behind[i] + weight * seen, behind[i]);
        transmittance[i] = choose<T>(drawn, in_front, transmittance[i]);
        v_sum += of_exponent;
        const Vector<T> times_dy = of_exponent * covered.dy;
        v_dy += times_dy;
        v_dyy += times_dy * covered.dy;
        if constexpr (Absolute) {
          const T a = -gaussian.A, b = T(-0.5) * gaussian.B, c = -gaussian.C;
          const Vector<T> of_x = of_exponent * (a * column.dx + b * covered.dy);
          const Vector<T> of_y = of_exponent * (b * column.dx + c * covered.dy);
          gained[gains + C] += of_x < 0 ? -of_x : of_x;
          gained[gains + C + 1] += of_y < 0 ? -of_y : of_y;
        }
      }
      gained[of_v] += v_sum;
      gained[of_v_dx] += v_sum * column.dx;
      gained[of_v_dy] += v_dy;
      gained[of_v_dxx] += v_sum * column.dx * column.dx;
      gained[of_v_dxy] += v_dy * column.dx;
      gained[of_v_dyy] += v_dyy;
    }
    // a group of as many sums as a vector has lanes
    constexpr int first_group = std::min(compiled, L);
    sums_in_lanes<T, L / 2, first_group>(gained);
    store_first<T>(entry, gained[0], first_group);
    if constexpr (compiled > L) {
      constexpr int second_group = std::min(compiled - L, L);
      sums_in_lanes<T, L / 2, second_group>(gained + L);
      store_first<T>(entry + L, gained[L], second_group);
    }
    if constexpr (compiled > 2 * L) {
      constexpr int third_group = std::min(compiled - 2 * L, L);
      sums_in_lanes<T, L / 2, third_group>(gained + 2 * L);
      store_first<T>(entry + 2 * L, gained[2 * L], third_group);
    }
    if constexpr (C == 0) {
      for (int64_t c = 0; c < channels; ++c) entry[compiled + c] = sum<T>(color_gains[c]);
    }
  }
}

}  // namespace rasterize
}  // namespace mpkernels
