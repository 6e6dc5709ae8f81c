// What the forward and the backward of the CPU rasterizer share: the Gaussians packed for reading, a tile's geometry,
// and what a Gaussian covers of a row of pixels (the same instructions in both passes, so that both draw the same).
#pragma once

#include "common/lane_mask.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "splatting/constants.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mpkernels {
namespace rasterize {

using namespace splatting;
using OptionalTensor = std::optional<Tensor>;

// One Gaussian, in one cache line (float). -sigma / ln 2 = A dx^2 + B dx dy + C dy^2.
template <typename T>
struct alignas(64) Record {
  T x, y;
  T A, B, C;
  T opacity;  // 0 where any number is not finite: such a Gaussian draws nothing
  T reach;    // rows above and below y that alpha >= 1/255 can reach; negative: none
  T color[9];
};
constexpr int most_packed_channels = 9;

template <typename T>
struct Scene {
  const T* means2d;            // (M, 2)
  const T* conics;             // (M, 3)
  const T* colors;             // (M, D)
  const T* opacities;          // (M)
  const T* backgrounds;        // (I, D) or null
  const bool* masks;           // (I, th, tw) or null
  const int64_t* offsets;      // (I, th, tw)
  const int32_t* ids;          // (n)
  const Record<T>* gaussians;  // (M)
  int64_t count, channels, images, tiles_high, tiles_wide, intersections;
  int64_t width, height, tile_size;

  Scene(const Tensor& means2d, const Tensor& conics, const Tensor& colors, const Tensor& opacities,
        const OptionalTensor& backgrounds, const OptionalTensor& masks, const Tensor& isect_offsets,
        const Tensor& flatten_ids, int64_t width, int64_t height, int64_t tile_size)
      : means2d(pointer<T>(means2d)),
        conics(pointer<T>(conics)),
        colors(pointer<T>(colors)),
        opacities(pointer<T>(opacities)),
        backgrounds(pointer<T>(backgrounds)),
        masks(pointer<bool>(masks)),
        offsets(pointer<int64_t>(isect_offsets)),
        ids(pointer<int32_t>(flatten_ids)),
        gaussians(nullptr),
        count(opacities.numel()),
        channels(colors.size(1)),
        images(isect_offsets.size(0)),
        tiles_high(isect_offsets.size(1)),
        tiles_wide(isect_offsets.size(2)),
        intersections(flatten_ids.numel()),
        width(width),
        height(height),
        tile_size(tile_size) {}

  int64_t tiles() const { return images * tiles_high * tiles_wide; }
  const T* color(int64_t id) const { return colors + id * channels; }
};

// -1/2 log2 e, what turns a conic's quadratic form into an exponent of 2
template <typename T>
constexpr T exponent_factor = T(-0.72134752044448170368L);

template <typename T>
Record<T> packed(const Scene<T>& s, int64_t id) {
  Record<T> g;
  g.x = s.means2d[2 * id];
  g.y = s.means2d[2 * id + 1];
  const T a = s.conics[3 * id], b = s.conics[3 * id + 1], c = s.conics[3 * id + 2];
  g.A = exponent_factor<T> * a;
  g.B = 2 * exponent_factor<T> * b;
  g.C = exponent_factor<T> * c;
  const T opacity = s.opacities[id];
  const bool finite = (g.x - g.x) + (g.y - g.y) + (a - a) + (b - b) + (c - c) + (opacity - opacity) == 0;
  g.opacity = finite ? opacity : T(0);
  g.reach = -1;
  if (g.opacity >= alpha_min<T>) {
    // where a dx^2 + 2 b dx dy + c dy^2 = 2 ln(255 o) is highest; rounded up
    const T determinant = a * c - b * b;
    const T square = 2 * std::log(g.opacity / alpha_min<T>) * a / determinant;
    g.reach =
        determinant > 0 && square >= 0 ? std::sqrt(square) * T(1.001) + T(0.01) : std::numeric_limits<T>::infinity();
  }
  if (s.channels <= most_packed_channels) {
    for (int64_t k = 0; k < s.channels; ++k) g.color[k] = s.color(id)[k];
  }
  return g;
}

// Packs every Gaussian into `memory`, (M) records that start at a multiple of 64 bytes.
template <typename T>
void pack(Scene<T>& s, const Tensor& memory) {
  const auto address = (reinterpret_cast<uintptr_t>(memory.data_ptr()) + 63) / 64 * 64;
  auto* records = reinterpret_cast<Record<T>*>(address);
  parallel_pieces(s.count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t id = begin; id < end; ++id) records[id] = packed(s, id);
  });
  s.gaussians = records;
}

template <typename T>
Tensor memory_for_records(const Tensor& like, int64_t count) {
  return empty({static_cast<int64_t>(count * sizeof(Record<T>)) + 64}, like, ScalarType::Byte);
}

// A tile's place in its image, and its list. Its pixels are held as columns of vectors, `lanes` pixels of a row each:
// the vector of column v and row y stands at v * rows + y.
template <typename T>
struct Tile {
  int64_t image, x, y;    // first pixel
  int64_t columns, rows;  // vectors across (the last may be part of the tile alone), pixels down
  int64_t wide;           // pixels across
  int64_t first, end;     // its list
  bool drawn;             // by the mask

  Tile(const Scene<T>& s, int64_t index) {
    const int64_t tiles = s.tiles_high * s.tiles_wide;
    image = index / tiles;
    y = index % tiles / s.tiles_wide * s.tile_size;
    x = index % s.tiles_wide * s.tile_size;
    wide = std::min(s.tile_size, s.width - x);
    rows = std::min(s.tile_size, s.height - y);
    columns = (wide + lanes<T> - 1) / lanes<T>;
    // offsets are the caller's: keep to the list whatever they hold
    first = std::clamp<int64_t>(s.offsets[index], 0, s.intersections);
    end = index + 1 < s.tiles() ? std::clamp<int64_t>(s.offsets[index + 1], first, s.intersections) : s.intersections;
    drawn = s.masks == nullptr || s.masks[index];
    if (!drawn) end = first;
  }

  int64_t vectors() const { return columns * rows; }
  int64_t lanes_in(int64_t column) const { return std::min<int64_t>(lanes<T>, wide - column * lanes<T>); }
};

// The rows [first, end) of a tile that a Gaussian may reach.
template <typename T>
struct Rows {
  int64_t first, end;
};
template <typename T>
MPKERNELS_INLINE Rows<T> rows_of(const Record<T>& g, const Tile<T>& tile) {
  // row r has its centre at tile.y + r + 1/2
  const T middle = g.y - static_cast<T>(tile.y) - T(0.5);
  const T low = middle - g.reach, high = middle + g.reach, rows = static_cast<T>(tile.rows);
  if (!(low < rows) || !(high >= 0) || g.reach < 0) return {0, 0};
  return {low > 0 ? static_cast<int64_t>(std::ceil(low)) : 0,
          high < rows - 1 ? static_cast<int64_t>(high) + 1 : tile.rows};
}

// A Gaussian on a column of vectors: what does not depend on the row.
template <typename T>
struct Column {
  Vector<T> dx;         // mean - centre
  Vector<T> quadratic;  // A dx^2
  Vector<T> linear;     // B dx
};

// Keeps the compiler from fusing what made x into what x is used for: both passes must round alike.
template <typename V>
MPKERNELS_INLINE void rounded(V& x) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 64) {
    __asm__("" : "+v"(x));
  } else {
    __asm__("" : "+x"(x));
  }
#else
  __asm__("" : "+w"(x));
#endif
}

template <typename T>
MPKERNELS_INLINE Column<T> column_of(const Record<T>& g, const Tile<T>& tile, int64_t v) {
  Column<T> c;
  const auto index = __builtin_convertvector(lane_indices<T>(), Vector<T>);
  c.dx = (g.x - static_cast<T>(tile.x + v * lanes<T>) - T(0.5)) - index;
  c.linear = g.B * c.dx;
  c.quadratic = g.A * c.dx * c.dx;
  rounded(c.linear);
  rounded(c.quadratic);
  return c;
}

template <typename T>
struct Coverage {
  T dy;
  Vector<T> falloff;  // exp(-sigma)
  Vector<T> uncut;    // opacity times falloff
  LaneMask<T> drawn;  // whether it is at least 1/255
};
template <typename T>
MPKERNELS_INLINE Coverage<T> coverage(const Record<T>& g, const Column<T>& c, const Tile<T>& tile, int64_t row) {
  Coverage<T> r;
  r.dy = g.y - static_cast<T>(tile.y + row) - T(0.5);
  T slope = g.C * r.dy;
  rounded(slope);
  const Vector<T> power = (c.linear + slope) * r.dy + c.quadratic;
  r.uncut = power_of_two<T>(power) * g.opacity;
  r.drawn = both<T>(at_least<T>(r.uncut, broadcast<T>(alpha_min<T>)), at_least<T>(Vector<T>{}, power));
  return r;
}
template <typename T>
MPKERNELS_INLINE Vector<T> cut(Vector<T> alpha) {
  return alpha > alpha_max<T> ? broadcast<T>(alpha_max<T>) : alpha;
}

// How far ahead of its use a Gaussian is fetched: they lie in no order.
constexpr int64_t entries_ahead = 6;

}  // namespace rasterize
}  // namespace mpkernels
