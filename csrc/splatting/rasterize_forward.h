// The forward of the CPU rasterizer, a tile at a time (header comment: rasterize.cpp).
#pragma once

#include "splatting/rasterize_tile.h"

namespace mpkernels {
namespace rasterize {

template <typename T>
struct Images {
  T* colors;          // (I, H, W, D)
  T* alphas;          // (I, H, W)
  T* transmittances;  // (I, H, W)
  int32_t* last;      // (I, H, W)
};

// C: the number of channels where it is compiled in, 0 for any number.
template <typename T, int C>
void draw_tile(const Scene<T>& s, const Tile<T>& tile, const Images<T>& out) {
  const int64_t channels = C > 0 ? C : s.channels;
  const int64_t vectors = tile.vectors();
  // of every pixel: transmittance (0 once the pixel has ended), and, where it has ended, the transmittance and the
  // place in the list in front of which it did; colors
  const int64_t held = (3 + channels) * vectors + (vectors + 7) / 8;
  auto* transmittance = reinterpret_cast<Vector<T>*>(scratch<T>(held * lanes<T>));
  Vector<T>* ended_at = transmittance + vectors;
  auto* last = reinterpret_cast<Mask<T>*>(ended_at + vectors);
  Vector<T>* colors = ended_at + 2 * vectors;                                   // (D, columns, rows)
  auto* alive = reinterpret_cast<unsigned char*>(colors + channels * vectors);  // whether a pixel of the vector goes on
  for (int64_t v = 0; v < tile.columns; ++v) {
    const Vector<T> inside = select<T>(first_lanes<T>(tile.lanes_in(v)), broadcast<T>(1),
                                       Vector<T>{});  // pixels beyond the image have ended
    for (int64_t row = 0; row < tile.rows; ++row) transmittance[v * tile.rows + row] = inside;
  }
  for (int64_t i = 0; i < vectors; ++i) {
    ended_at[i] = Vector<T>{};
    last[i] = Mask<T>{} + static_cast<Integer<T>>(tile.end - tile.first);
    alive[i] = 1;
  }
  for (int64_t i = 0; i < channels * vectors; ++i) colors[i] = Vector<T>{};

  int64_t vectors_alive = vectors;
  for (int64_t k = tile.first; k < tile.end && vectors_alive > 0; ++k) {
    if (k + entries_ahead < tile.end) {
      __builtin_prefetch(s.gaussians + static_cast<uint32_t>(s.ids[k + entries_ahead]));
    }
    const int64_t id = static_cast<uint32_t>(s.ids[k]);
    if (id >= s.count) continue;  // only under torch.compile, where ids cannot be checked
    const Record<T>& g = s.gaussians[id];
    const Rows<T> rows = rows_of(g, tile);
    if (rows.first == rows.end) continue;
    const T* color = C > 0 ? g.color : s.color(id);
    const auto place = static_cast<Integer<T>>(k - tile.first);
    for (int64_t v = 0; v < tile.columns; ++v) {
      const Column<T> column = column_of(g, tile, v);
      for (int64_t row = rows.first; row < rows.end; ++row) {
        const int64_t i = v * tile.rows + row;
        if (!alive[i]) continue;
        const Coverage<T> covered = coverage(g, column, tile, row);
        if (none<T>(covered.drawn)) continue;
        const Vector<T> in_front = transmittance[i];
        const Vector<T> alpha = cut<T>(covered.uncut);
        const Vector<T> weight = alpha * in_front;
        const Vector<T> behind = (1 - alpha) * in_front;  // in_front - weight would lose what an opaque one lets pass
        const LaneMask<T> drawn = both<T>(covered.drawn, above<T>(behind, broadcast<T>(transmittance_min<T>)));
        // a pixel ends here, unless it has ended before
        const LaneMask<T> ends = both<T>(but_not<T>(covered.drawn, drawn), above<T>(in_front, Vector<T>{}));
        Vector<T> next = choose<T>(drawn, behind, in_front);
        if constexpr (C > 0) {
          for (int c = 0; c < C; ++c) {
            Vector<T>& sum = colors[c * vectors + i];
            sum = choose<T>(drawn, sum + weight * color[c], sum);
          }
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            Vector<T>& sum = colors[c * vectors + i];
            sum = choose<T>(drawn, sum + weight * color[c], sum);
          }
        }
        if (!none<T>(ends)) {
          ended_at[i] = choose<T>(ends, in_front, ended_at[i]);
          last[i] = choose_integer<T>(ends, Mask<T>{} + place, last[i]);
          next = choose<T>(ends, Vector<T>{}, next);
          if (none<T>(above<T>(next, Vector<T>{}))) {
            alive[i] = 0;
            --vectors_alive;
          }
        }
        transmittance[i] = next;
      }
    }
  }

  const T* background = s.backgrounds == nullptr ? nullptr : s.backgrounds + tile.image * channels;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t v = 0; v < tile.columns; ++v) {
      const int64_t i = v * tile.rows + row;
      const int64_t pixel = (tile.image * s.height + tile.y + row) * s.width + tile.x + v * lanes<T>;
      const Vector<T> left = transmittance[i] > 0 ? transmittance[i] : ended_at[i];
      const int64_t count = tile.lanes_in(v);
      store_first<T>(out.alphas + pixel, 1 - left, count);
      store_first<T>(out.transmittances + pixel, left, count);
      for (int64_t lane = 0; lane < count; ++lane) out.last[pixel + lane] = static_cast<int32_t>(last[i][lane]);
      T* to = out.colors + pixel * channels;
      for (int64_t c = 0; c < channels; ++c) {
        Vector<T> color = colors[c * vectors + i];
        if (background != nullptr) color += left * background[c];
        for (int64_t lane = 0; lane < count; ++lane) to[lane * channels + c] = color[lane];
      }
    }
  }
}

}  // namespace rasterize
}  // namespace mpkernels
