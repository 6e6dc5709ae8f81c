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
// All in double precision, whatever the input: a few operations a row, and the same tiles on every backend.
#pragma once

#include "common/launch.h"
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

  MPKERNELS_HOST_DEVICE int64_t tiles() const { return columns * rows; }
};

// Columns [begin, end) of a row of tiles.
struct TileSpan {
  int32_t begin, end;
};

// NaN gives 0
MPKERNELS_HOST_DEVICE inline int32_t limited(double tile, int64_t most) {
  if (!(tile > 0)) return 0;
  return static_cast<int32_t>(tile < static_cast<double>(most) ? static_cast<int64_t>(tile) : most);
}

// The range of tiles whose pixel centres, first + 0.5 ... last + 0.5, meet the interval [low, high].
MPKERNELS_HOST_DEVICE inline TileSpan tiles_between(double low, double high, int64_t pixels, int64_t tiles,
                                                    double inverse_size) {
  if (!(low <= static_cast<double>(pixels) - 0.5) || !(high >= 0.5)) return {0, 0};
  const int32_t begin = limited(::ceil((low + 0.5) * inverse_size) - 1, tiles - 1);
  const int32_t end = limited(::floor((high - 0.5) * inverse_size) + 1, tiles);
  return {begin, end};
}

// What a Gaussian covers: rows [begin, end) of tiles; in each, the columns of a box, or those of columns_of_row.
struct Footprint {
  TileSpan rows, columns;
  bool is_box;
  // of an ellipse |dy| <= height, at most `level` = 2 (ln(255 o) + slack)
  double x, y, level, slope, det_over_a, inverse_a, height, dy_at_right, inverse_size;
};

MPKERNELS_HOST_DEVICE inline bool finite(double x) {
  return x - x == 0;
}

// Of radii both above 0. opacity: null without conics.
template <typename T>
MPKERNELS_HOST_DEVICE inline Footprint footprint_of(const TileGrid& grid, const T* mean, const int32_t* radii,
                                                    const T* conic, const T* opacity) {
  Footprint f;
  f.rows = {0, 0};
  f.columns = {0, 0};
  f.is_box = true;
  f.x = mean[0];
  f.y = mean[1];
  if (radii[0] <= 0 || radii[1] <= 0 || !finite(f.x) || !finite(f.y)) return f;
  const double size = static_cast<double>(grid.tile_size);
  if (conic != nullptr) {
    const double a = conic[0], b = conic[1], c = conic[2], o = *opacity;
    if (!(a > 0) || !(c > 0) || !(o >= alpha_min<double>) || !finite(a) || !finite(b) || !finite(c) || !finite(o)) {
      return f;
    }
    const double det = a * c - b * b;
    f.is_box = !(det * thinnest_ellipse > a * c);
    if (!f.is_box) {
      const double slack = tile_slack + tile_slack_of_cancellation * (a * c / det);
      f.level = 2 * (::log(255 * o) * (1 + slack) + slack);
      f.inverse_a = 1 / a;
      f.slope = b * f.inverse_a;
      f.det_over_a = det * f.inverse_a;
      f.height = ::sqrt(f.level / f.det_over_a);
      f.dy_at_right = -b * ::sqrt(f.level / (c * det));
      f.inverse_size = 1 / size;
      f.rows = tiles_between(f.y - f.height, f.y + f.height, grid.height, grid.rows, f.inverse_size);
      return f;
    }
  }
  f.columns = {limited(::floor((f.x - radii[0]) / size), grid.columns),
               limited(::ceil((f.x + radii[0]) / size), grid.columns)};
  f.rows = {limited(::floor((f.y - radii[1]) / size), grid.rows), limited(::ceil((f.y + radii[1]) / size), grid.rows)};
  return f;
}

// Of an ellipse, in a row of f.rows.
MPKERNELS_HOST_DEVICE inline TileSpan columns_of_row(const TileGrid& grid, const Footprint& f, int32_t row) {
  const int64_t first = row * grid.tile_size;
  const int64_t end = first + grid.tile_size < grid.height ? first + grid.tile_size : grid.height;
  double top = static_cast<double>(first) + 0.5 - f.y, bottom = static_cast<double>(end) - 0.5 - f.y;
  top = top > -f.height ? top : -f.height;
  bottom = bottom < f.height ? bottom : f.height;
  const auto within = [&](double dy) {
    dy = dy > top ? dy : top;
    return dy < bottom ? dy : bottom;
  };
  const auto half_width = [&](double dy) {
    const double square = (f.level - f.det_over_a * dy * dy) * f.inverse_a;
    return square > 0 ? ::sqrt(square) : 0;
  };
  const double dy_right = within(f.dy_at_right), dy_left = within(-f.dy_at_right);
  const double right = f.x - f.slope * dy_right + half_width(dy_right);
  const double left = f.x - f.slope * dy_left - half_width(dy_left);
  return tiles_between(left, right, grid.width, grid.columns, f.inverse_size);
}

MPKERNELS_HOST_DEVICE inline int64_t tiles_of_row(const TileGrid& grid, const Footprint& f, int32_t row) {
  const TileSpan columns = f.is_box ? f.columns : columns_of_row(grid, f, row);
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
