// Which tiles a projected Gaussian meets: the geometry of intersect_tiles, for the CPU and the CUDA kernels.
//
// The test is exact (Speedy-Splat, Hanson et al. 2025, "AccuTile"; here with the band of each tile row in closed form).
// A Gaussian of conic (a, b, c) and opacity o reaches 1/255 where
//
//   q(d) = (a dx^2 + c dy^2) / 2 + b dx dy <= ln(255 o),   d = pixel centre - mean.
//
// A tile is kept if some point, not only a pixel centre, of the rectangle that its pixel centres span has
// q <= ln(255 o) (1 + slack) + slack. On a horizontal line this ellipse reaches from -(b/a) dy - w to -(b/a) dy + w,
// with w^2 = (2 ln.. - (det/a) dy^2) / a, and its rightmost point lies at dy = -b sqrt(2 ln.. / (c det)). So the
// columns of a tile row follow from two square roots, and a Gaussian costs O(rows), however many tiles it covers.
//
// Slack: 1e-4 + 2^-21 ac/det. The second term is 8 roundings of float32 of the terms of q, which cancel in a thin,
// tilted ellipse: a rasterizer that sums them in float32 draws no pixel outside of the kept tiles. Thinner than ac/det
// = 2^18 (or det <= 0, by rounding), float32 cannot tell where the ellipse ends, and its bounding box counts.
//
// Without conics, the bounding box of the radii: tiles floor((x - rx) / size) to ceil((x + rx) / size), as in gsplat.
//
// All in double precision, whatever the input: a few operations a row, and the same tiles on every backend. V is double
// on CUDA, Vector<double> on the CPU.
#pragma once

#include "common/arithmetic.h"
#include "splatting/constants.h"

#include <cmath>
#include <cstring>

namespace mpkernels {
namespace splatting {

constexpr double tile_slack = 1e-4;
constexpr double tile_slack_of_cancellation = 1.0 / (1 << 21);
constexpr double thinnest_ellipse = 1 << 18;  // ac/det

// The image in tiles; fewer than 2^31 of them.
struct TileGrid {
  int64_t width, height, tile_size;  // pixels
  int64_t columns, rows;             // tiles
  double inverse_size;               // 1 / tile_size

  MPKERNELS_HOST_DEVICE int64_t tiles() const { return columns * rows; }
};

// Tiles [begin, end) along an axis; none if end <= begin.
struct TileSpan {
  int32_t begin, end;
};

// The largest integer up to x, |x| < 2^51.
template <typename V>
MPKERNELS_HOST_DEVICE inline V whole(V x) {
  constexpr double integers = 0x1.8p52;  // doubles of this size have no fraction: adding rounds
  const V rounded = (x + integers) - integers;
  return Arithmetic<V>::select(rounded > x, rounded - 1, rounded);
}

// x within [low, high]; NaN gives low.
template <typename V>
MPKERNELS_HOST_DEVICE inline V within(V x, V low, V high) {
  return Arithmetic<V>::minimum(Arithmetic<V>::maximum(x, low), high);
}

// Tiles [begin, end), as whole numbers of V; none if end <= begin.
template <typename V>
struct TileRange {
  V begin, end;
};

// The tiles whose pixel centres, first + 0.5 ... last + 0.5, meet the interval [low, high].
template <typename V>
MPKERNELS_HOST_DEVICE inline TileRange<V> tiles_between(V low, V high, double pixels, double tiles,
                                                        double inverse_size) {
  using A = Arithmetic<V>;
  const V from = within<V>((low + 0.5) * inverse_size, V{}, V{} + tiles);
  const V to = within<V>((high - 0.5) * inverse_size, V{}, V{} + (tiles - 1));
  const auto meets = (low <= pixels - 0.5) & (high >= V{} + 0.5);
  return {whole<V>(from), A::select(meets, whole<V>(to) + 1, V{})};
}

// |dy| <= height, q <= level / 2.
template <typename V>
struct Ellipse {
  V x, y, level, slope, det_over_a, inverse_a, height, dy_at_right;
};

template <typename V>
MPKERNELS_HOST_DEVICE inline Ellipse<V> ellipse_of(V x, V y, V a, V b, V c, V log_255_opacity) {
  using A = Arithmetic<V>;
  const V det = a * c - b * b, inverse_a = 1 / a, inverse_det = 1 / det;
  const V slack = tile_slack + tile_slack_of_cancellation * (a * c * inverse_det);
  const V level = 2 * (log_255_opacity * (1 + slack) + slack);
  const V height = A::sqrt(level * a * inverse_det);
  return {x, y, level, b * inverse_a, det * inverse_a, inverse_a, height, -b * A::sqrt(level * inverse_det / c)};
}

template <typename V>
MPKERNELS_HOST_DEVICE inline TileRange<V> rows_of_ellipse(const TileGrid& grid, const Ellipse<V>& e) {
  return tiles_between<V>(e.y - e.height, e.y + e.height, static_cast<double>(grid.height),
                          static_cast<double>(grid.rows), grid.inverse_size);
}

// In a row of rows_of_ellipse.
template <typename V>
MPKERNELS_HOST_DEVICE inline TileRange<V> columns_of_row(const TileGrid& grid, const Ellipse<V>& e, V row) {
  using A = Arithmetic<V>;
  const V first = row * static_cast<double>(grid.tile_size);
  const V end = A::minimum(first + static_cast<double>(grid.tile_size), V{} + static_cast<double>(grid.height));
  const V top = A::maximum(first + 0.5 - e.y, -e.height), bottom = A::minimum(end - 0.5 - e.y, e.height);
  const V dy_right = within<V>(e.dy_at_right, top, bottom), dy_left = within<V>(-e.dy_at_right, top, bottom);
  const auto half_width = [&](V dy) {
    return A::sqrt(A::maximum((e.level - e.det_over_a * dy * dy) * e.inverse_a, V{}));
  };
  const V right = e.x - e.slope * dy_right + half_width(dy_right);
  const V left = e.x - e.slope * dy_left - half_width(dy_left);
  return tiles_between<V>(left, right, static_cast<double>(grid.width), static_cast<double>(grid.columns),
                          grid.inverse_size);
}

MPKERNELS_HOST_DEVICE inline bool finite(double x) {
  return x - x == 0;
}

enum class Shape { nothing, box, ellipse };

// conic, opacity: null for boxes. (A mean that is NaN or infinite meets no tile: see `within` and `tiles_between`.)
template <typename T>
MPKERNELS_HOST_DEVICE inline Shape shape_of(const int32_t* radii, const T* conic, const T* opacity) {
  if (radii[0] <= 0 || radii[1] <= 0) return Shape::nothing;
  if (conic == nullptr) return Shape::box;
  const double a = conic[0], b = conic[1], c = conic[2], o = *opacity;
  const bool drawn = a > 0 && c > 0 && o >= alpha_min<double> && finite(a) && finite(b) && finite(c) && finite(o);
  if (!drawn) return Shape::nothing;
  return (a * c - b * b) * thinnest_ellipse > a * c ? Shape::ellipse : Shape::box;
}

// Of the box mean -+ radius along one axis.
MPKERNELS_HOST_DEVICE inline TileSpan span_of_box(double mean, double radius, int64_t tile_size, int64_t tiles) {
  const double size = static_cast<double>(tile_size), most = static_cast<double>(tiles);
  return {static_cast<int32_t>(within(::floor((mean - radius) / size), 0.0, most)),
          static_cast<int32_t>(within(::ceil((mean + radius) / size), 0.0, most))};
}

// What a Gaussian covers: rows of tiles; in each, the columns of a box, or those of an ellipse.
struct Footprint {
  TileSpan rows, columns;
  bool is_box;
  Ellipse<double> ellipse;

  MPKERNELS_HOST_DEVICE TileSpan columns_of(const TileGrid& grid, int32_t row) const {
    if (is_box) return columns;
    const TileRange<double> range = columns_of_row<double>(grid, ellipse, row);
    return {static_cast<int32_t>(range.begin), static_cast<int32_t>(range.end)};
  }
};

template <typename T>
MPKERNELS_HOST_DEVICE inline Footprint footprint_of(const TileGrid& grid, const T* mean, const int32_t* radii,
                                                    const T* conic, const T* opacity) {
  Footprint f;
  const Shape shape = shape_of(radii, conic, opacity);
  f.is_box = shape != Shape::ellipse;
  f.rows = f.columns = {0, 0};
  if (shape == Shape::ellipse) {
    f.ellipse = ellipse_of<double>(mean[0], mean[1], conic[0], conic[1], conic[2], ::log(255 * double(*opacity)));
    const TileRange<double> rows = rows_of_ellipse<double>(grid, f.ellipse);
    f.rows = {static_cast<int32_t>(rows.begin), static_cast<int32_t>(rows.end)};
  } else if (shape == Shape::box) {
    f.columns = span_of_box(mean[0], radii[0], grid.tile_size, grid.columns);
    f.rows = span_of_box(mean[1], radii[1], grid.tile_size, grid.rows);
  }
  return f;
}

MPKERNELS_HOST_DEVICE inline int64_t tiles_in(TileSpan columns) {
  return columns.end > columns.begin ? columns.end - columns.begin : 0;
}

// The arguments of the op.
template <typename T>
struct ProjectedGaussians {
  const T* means2d;          // (M, 2)
  const int32_t* radii;      // (M, 2)
  const T* depths;           // (M,)
  const T* conics;           // (M, 3) or null
  const T* opacities;        // (M,) with conics
  const int64_t* image_ids;  // (M,) or null: per_image each
  int64_t count, images, per_image;
  TileGrid grid;

  MPKERNELS_HOST_DEVICE int64_t image_of(int64_t gaussian) const {
    return image_ids != nullptr ? image_ids[gaussian] : gaussian / per_image;
  }
  // No rows if it is in no image.
  MPKERNELS_HOST_DEVICE Footprint footprint(int64_t gaussian) const {
    const int64_t image = image_of(gaussian);
    Footprint f = footprint_of(grid, means2d + 2 * gaussian, radii + 2 * gaussian,
                               conics != nullptr ? conics + 3 * gaussian : nullptr,
                               conics != nullptr ? opacities + gaussian : nullptr);
    if (image < 0 || image >= images) f.rows = {0, 0};
    return f;
  }
  MPKERNELS_HOST_DEVICE uint32_t depth_bits(int64_t gaussian) const {
    const float depth = static_cast<float>(depths[gaussian]);
    uint32_t bits;
    memcpy(&bits, &depth, sizeof(bits));
    return bits;
  }
};

// Bits of gsplat's key for the tile: image << (32 + bits) | tile << 32 | depth.
inline int tile_bits(int64_t tiles) {
  int bits = 0;
  for (; tiles > 0; tiles >>= 1) ++bits;
  return bits;
}

}  // namespace splatting
}  // namespace mpkernels
