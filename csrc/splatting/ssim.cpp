// SSIM on the CPU, and its gradients to both images. Formulas in ssim_math.h: four averages a pixel, those of p = x +
// y, d = x - y, p^2 and d^2, weighted by a separable window.
//
// Shapes: image, target (P, H, M), contiguous, rows of neighbours `step` apart; map (P, H, M), or (P, H - 2 r, M - 2 r
// step) of windows that lie inside (mpkernels/splatting/ssim/schema.py).
//
// The gradient: with G_p = grad dSSIM/dmu_p and so on, four maps of the size of the output,
//
//   dL/dp = w * G_p + 2 p (w * G_pp)     dL/dd = w * G_d + 2 d (w * G_dd)     dL/dx = dL/dp + dL/dd
//   dL/dy = dL/dp - dL/dd, where w * is the same convolution back: maps are zero outside.
//
// Decomposition: threads take tiles of 64 rows by 512 numbers of a plane; vectors lie along a row. For a row of
// averages the window's rows of both images are weighted and summed (they come from the first- and second-level
// caches), into four row buffers, and those are then weighted along the row: nothing of the size of the image is
// stored. The backward computes the maps row by row, weights each along the row into a ring of as many rows as the
// window has, and sums the ring's rows for each row of gradients. Tiles share nothing (the backward recomputes the maps
// around a tile: a fifth more), and the mean is summed tile by tile in a fixed order, so that results do not depend on
// the number of threads.
//
// Bytes a number, float32: forward 8 read (and 4 written for a map), backward 8 read (12) and 8 written.
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "common/vector.h"
#include "splatting/ssim_math.h"
#include "splatting/ssim_window.h"

#include <algorithm>
#include <tuple>

namespace mpkernels {
namespace ssim {
namespace {

constexpr int64_t tile_rows = 64;
constexpr int64_t tile_columns = 512;
constexpr int most_compiled = 11;  // the window size that is compiled in

template <typename T>
struct Problem {
  const T* image;
  const T* target;
  int64_t planes, rows, columns;      // of the images
  int64_t step, size, reach;          // between neighbours; of the window; from its first to its last number in a row
  int64_t before_row, before_column;  // how far a window begins in front of its place in the map
  int64_t map_rows, map_columns;
  T c1, c2;
  std::vector<T> weights;

  Problem(const Tensor& image, const Tensor& target, int64_t step, int64_t size, double sigma, double data_range,
          bool valid)
      : image(pointer<T>(image)),
        target(pointer<T>(target)),
        planes(image.size(0)),
        rows(image.size(1)),
        columns(image.size(2)),
        step(step),
        size(size),
        reach((size - 1) * step),
        before_row(valid ? 0 : size / 2),
        before_column(valid ? 0 : size / 2 * step),
        map_rows(valid ? rows - (size - 1) : rows),
        map_columns(valid ? columns - reach : columns),
        c1(static_cast<T>(0.01 * data_range * (0.01 * data_range))),
        c2(static_cast<T>(0.03 * data_range * (0.03 * data_range))),
        weights(window<T>(size, sigma)) {}

  int64_t pixels() const { return planes * map_rows * map_columns; }
};

// A piece of a plane.
struct Tile {
  int64_t plane, first_row, last_row, first_column, last_column;  // behind the last
};

// Tiles of planes of `rows` by `columns`.
struct Tiling {
  int64_t planes, rows, columns;

  int64_t down() const { return (rows + tile_rows - 1) / tile_rows; }
  int64_t across() const { return (columns + tile_columns - 1) / tile_columns; }
  int64_t count() const { return planes * down() * across(); }
  Tile tile(int64_t i) const {
    const int64_t row = i / across() % down() * tile_rows, column = i % across() * tile_columns;
    return {i / across() / down(), row, std::min(row + tile_rows, rows), column,
            std::min(column + tile_columns, columns)};
  }
};

// Four rows side by side, one a moment.
template <typename T>
struct Rows {
  T* first;
  int64_t length;

  T* of(int moment) const { return first + moment * length; }
};

// How long a buffer of `columns` numbers is that full vectors are read and written in.
template <typename T>
int64_t padded(int64_t columns) {
  return (columns + lanes<T> - 1) / lanes<T> * lanes<T> + lanes<T>;
}

// Weighs four rows along the row: the vector of outputs i, which sees numbers i, i + step, ... of the buffers.
template <typename T, int Size>
MPKERNELS_INLINE Moments<Vector<T>> along(const Rows<T>& rows, int64_t i, const T* weights, int64_t size,
                                          int64_t step) {
  Moments<Vector<T>> m{};
  const int64_t taps = Size > 0 ? Size : size;
#pragma GCC unroll 11
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t at = i + k * step;
    m.p += weights[k] * load<T>(rows.of(0) + at);
    m.d += weights[k] * load<T>(rows.of(1) + at);
    m.pp += weights[k] * load<T>(rows.of(2) + at);
    m.dd += weights[k] * load<T>(rows.of(3) + at);
  }
  return m;
}

// The averages of one row of the map, columns [first, last): emit(column, count, moments) for each vector. Of the
// buffers, numbers that stand for pixels outside the image must be 0, and stay so.
template <typename T, int Size, typename Emit>
MPKERNELS_INLINE void average_row(const Problem<T>& in, int64_t plane, int64_t row, int64_t first, int64_t last,
                                  const Rows<T>& buffers, const Emit& emit) {
  constexpr int L = lanes<T>;
  const int64_t origin = first - in.before_column;  // the column of the buffers' first number
  const int64_t begin = std::max<int64_t>(origin, 0), end = std::min(last - in.before_column + in.reach, in.columns);
  const int64_t top = row - in.before_row;
  const int64_t first_tap = std::max<int64_t>(0, -top), last_tap = std::min(in.size, in.rows - top);
  const int64_t at = plane * in.rows * in.columns + top * in.columns;
  for (int64_t column = begin; column < end; column += L) {
    const int64_t count = end - column;
    Moments<Vector<T>> m{};
    for (int64_t k = first_tap; k < last_tap; ++k) {
      const Vector<T> x = load_first<T>(in.image + at + k * in.columns + column, count);
      const Vector<T> y = load_first<T>(in.target + at + k * in.columns + column, count);
      const Vector<T> p = x + y, d = x - y;
      const T weight = in.weights[k];
      m.p += weight * p;
      m.d += weight * d;
      m.pp += weight * (p * p);
      m.dd += weight * (d * d);
    }
    const int64_t to = column - origin;
    store<T>(buffers.of(0) + to, m.p);
    store<T>(buffers.of(1) + to, m.d);
    store<T>(buffers.of(2) + to, m.pp);
    store<T>(buffers.of(3) + to, m.dd);
  }
  for (int64_t column = first; column < last; column += L) {
    emit(column, last - column, along<T, Size>(buffers, column - first, in.weights.data(), in.size, in.step));
  }
}

// Returns the sum over the tile, where there is no map to write.
template <typename T, int Size>
double forward_tile(const Problem<T>& in, const Tile& tile, T* map) {
  const int64_t length = padded<T>(tile.last_column - tile.first_column + in.reach) + lanes<T>;
  const Rows<T> buffers{scratch<T>(4 * length), length};
  std::fill_n(buffers.first, 4 * length, T(0));
  double total = 0;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
    T* out = map == nullptr ? nullptr : map + (tile.plane * in.map_rows + row) * in.map_columns;
    Vector<T> sums{};
    average_row<T, Size>(in, tile.plane, row, tile.first_column, tile.last_column, buffers,
                         [&](int64_t column, int64_t count, const Moments<Vector<T>>& m) {
                           const Vector<T> value = similarity<Vector<T>>(m, in.c1, in.c2);
                           if (out != nullptr) {
                             store_first<T>(out + column, value, count);
                           } else {
                             sums += count >= lanes<T> ? value : select<T>(first_lanes<T>(count), value, Vector<T>{});
                           }
                         });
    total += static_cast<double>(sum<T>(sums));
  }
  return total;
}

// The gradients of one tile of the images; `grad` has the map's shape, or is one number where `mean`.
template <typename T, int Size>
void backward_tile(const Problem<T>& in, const Tile& tile, const T* grad, bool mean, T* of_image, T* of_target) {
  constexpr int L = lanes<T>;
  const int64_t width = tile.last_column - tile.first_column;
  // the maps' columns that these columns saw, the first of them perhaps outside; a pixel sees map column i at number
  // i - origin of the buffers
  const int64_t origin = tile.first_column + in.before_column - in.reach;
  const int64_t first = std::max<int64_t>(origin, 0), last = std::min(origin + width + in.reach, in.map_columns);
  const int64_t averages_length = padded<T>(width + 2 * in.reach) + L, maps_length = padded<T>(width + in.reach) + L;
  const int64_t ring_length = padded<T>(width);
  T* memory = scratch<T>(4 * (averages_length + maps_length + in.size * ring_length));
  const Rows<T> averages{memory, averages_length};
  const Rows<T> maps{memory + 4 * averages_length, maps_length};
  T* ring = memory + 4 * (averages_length + maps_length);
  std::fill_n(memory, 4 * (averages_length + maps_length), T(0));
  const T alike = mean ? static_cast<T>(static_cast<double>(*grad) / static_cast<double>(in.pixels())) : T(0);

  for (int64_t row = tile.first_row + in.before_row - (in.size - 1); row < tile.last_row + in.before_row; ++row) {
    const bool exists = row >= 0 && row < in.map_rows && first < last;
    if (exists) {
      const T* seeds = mean ? nullptr : grad + (tile.plane * in.map_rows + row) * in.map_columns;
      average_row<T, Size>(in, tile.plane, row, first, last, averages,
                           [&](int64_t column, int64_t count, const Moments<Vector<T>>& m) {
                             const Moments<Vector<T>> g = derivatives<Vector<T>>(m, in.c1, in.c2);
                             const Vector<T> seed = mean ? broadcast<T>(alike) : load_first<T>(seeds + column, count);
                             const int64_t to = column - origin;
                             store_first<T>(maps.of(0) + to, seed * g.p, count);
                             store_first<T>(maps.of(1) + to, seed * g.d, count);
                             store_first<T>(maps.of(2) + to, seed * g.pp, count);
                             store_first<T>(maps.of(3) + to, seed * g.dd, count);
                           });
      const Rows<T> kept{ring + (row % in.size) * 4 * ring_length, ring_length};
      for (int64_t i = 0; i < width; i += L) {
        const Moments<Vector<T>> m = along<T, Size>(maps, i, in.weights.data(), in.size, in.step);
        store<T>(kept.of(0) + i, m.p);
        store<T>(kept.of(1) + i, m.d);
        store<T>(kept.of(2) + i, m.pp);
        store<T>(kept.of(3) + i, m.dd);
      }
    }
    const int64_t image_row = row - in.before_row;
    if (image_row < tile.first_row) continue;

    const int64_t top = row - (in.size - 1);  // the first row of the maps that this row saw
    int64_t first_tap = std::max<int64_t>(0, -top), last_tap = std::min(in.size, in.map_rows - top);
    if (first >= last) last_tap = first_tap;
    const int64_t at = (tile.plane * in.rows + image_row) * in.columns + tile.first_column;
    for (int64_t i = 0; i < width; i += L) {
      Moments<Vector<T>> m{};
      for (int64_t k = first_tap; k < last_tap; ++k) {
        const T* kept = ring + ((top + k) % in.size) * 4 * ring_length + i;
        const T weight = in.weights[k];
        m.p += weight * load<T>(kept);
        m.d += weight * load<T>(kept + ring_length);
        m.pp += weight * load<T>(kept + 2 * ring_length);
        m.dd += weight * load<T>(kept + 3 * ring_length);
      }
      const Vector<T> x = load_first<T>(in.image + at + i, width - i);
      const Vector<T> y = load_first<T>(in.target + at + i, width - i);
      const Vector<T> of_p = m.p + 2 * (x + y) * m.pp, of_d = m.d + 2 * (x - y) * m.dd;
      if (of_image != nullptr) store_first<T>(of_image + at + i, of_p + of_d, width - i);
      if (of_target != nullptr) store_first<T>(of_target + at + i, of_p - of_d, width - i);
    }
  }
}

// Calls f with a value of the dtype's C++ type, and the window's size where it is compiled in, else 0.
template <typename F>
void dispatch(const Tensor& image, int64_t window_size, const F& f) {
  const auto with_size = [&](auto element) {
    if (window_size == most_compiled) {
      f(element, std::integral_constant<int, most_compiled>{});
    } else {
      f(element, std::integral_constant<int, 0>{});
    }
  };
  switch (image.scalar_type()) {
    case ScalarType::Float:
      return with_size(float{});
    case ScalarType::Double:
      return with_size(double{});
    default:
      STD_TORCH_CHECK(false, "ssim: no CPU kernel for this dtype");
  }
}

Tensor forward(const Tensor& image, const Tensor& target, int64_t step, int64_t window_size, double sigma,
               double data_range, bool valid, bool mean) {
  const int64_t around = valid ? window_size - 1 : 0;
  Tensor out =
      mean ? empty({}, image) : empty({image.size(0), image.size(1) - around, image.size(2) - around * step}, image);
  dispatch(image, window_size, [&](auto element, auto compiled_size) {
    using T = decltype(element);
    const Problem<T> in(image, target, step, window_size, sigma, data_range, valid);
    const Tiling tiling{in.planes, in.map_rows, in.map_columns};
    std::vector<double> sums(mean ? static_cast<size_t>(tiling.count()) : 0);
    parallel_pieces(tiling.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double total = forward_tile<T, compiled_size>(in, tiling.tile(i), mean ? nullptr : pointer<T>(out));
        if (mean) sums[i] = total;
      }
    });
    if (mean) {
      double total = 0;
      for (const double part : sums) total += part;
      *pointer<T>(out) = static_cast<T>(total / static_cast<double>(std::max<int64_t>(in.pixels(), 1)));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& image, const Tensor& target, int64_t step,
                                    int64_t window_size, double sigma, double data_range, bool valid, bool mean,
                                    bool needs_image, bool needs_target) {
  const auto gradient = [&](bool needed) {
    return needed ? empty({image.size(0), image.size(1), image.size(2)}, image) : no_gradient(image);
  };
  Tensor of_image = gradient(needs_image);
  Tensor of_target = gradient(needs_target);
  dispatch(image, window_size, [&](auto element, auto compiled_size) {
    using T = decltype(element);
    const Problem<T> in(image, target, step, window_size, sigma, data_range, valid);
    const Tiling tiling{in.planes, in.rows, in.columns};
    parallel_pieces(tiling.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        backward_tile<T, compiled_size>(in, tiling.tile(i), pointer<T>(grad), mean,
                                        needs_image ? pointer<T>(of_image) : nullptr,
                                        needs_target ? pointer<T>(of_target) : nullptr);
      }
    });
  });
  return {of_image, of_target};
}

}  // namespace
}  // namespace ssim
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("ssim", TORCH_BOX(&mpkernels::ssim::forward));
  library.impl("ssim_backward", TORCH_BOX(&mpkernels::ssim::backward));
}
