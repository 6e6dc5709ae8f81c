// SSIM on a GPU, and its gradients to both images. Formulas in ssim_math.h: four averages a pixel, those of p = x + y,
// d = x - y, p^2 and d^2, weighted by a separable window. The gradient, with maps G_p = grad dSSIM/dmu_p and so on:
//
//   dL/dp = w * G_p + 2 p (w * G_pp)     dL/dd = w * G_d + 2 d (w * G_dd)     dL/dx = dL/dp + dL/dd
//   dL/dy = dL/dp - dL/dd, where w * is the same convolution back: maps are zero outside.
//
// Shapes: image, target (P, H, M), contiguous, rows of neighbours `step` apart; map (P, H', M') = (P, H, M), or (P, H -
// 2 r, M - 2 r step) of windows that lie inside (mpkernels/splatting/ssim/schema.py); maps of derivatives (P, H', M',
// 4).
//
// Decomposition: a block takes a tile of 128 columns and 16 rows (8 in double precision), a thread a column of it. It
// walks down the rows that the tile's windows hold: each comes into shared memory once, with a window's reach on both
// sides, each thread weighs it along the row, and adds that, weighted by its distance, to the sums of every row of the
// tile, which it has in registers. So any window size works, and shared memory holds two rows, the one that is read and
// the one that comes. Sums of a tile, and of the tiles, have a fixed order: no atomics. The backward writes the four
// maps, and a second kernel weighs them in the same way.
//
// Bytes a number, float32: forward 8 read (and 4 written for a map), 13 instead of 8 with what neighbouring tiles
// share, mostly from L2; backward 8 read (12) and 16 written, then 24 read and 8 written.
#pragma once

#include "common/launch.h"
#include "splatting/ssim_math.h"

#include <cmath>

namespace mpkernels {
namespace ssim {

constexpr int threads_per_block = 128;

template <typename T>
constexpr int tile_rows = sizeof(T) == 4 ? 16 : 8;

template <typename T>
struct alignas(2 * sizeof(T)) Pair {  // what shared memory holds of two images
  T p, d;
};
template <typename T>
struct alignas(16) Quad {  // and of the four maps
  T p, d, pp, dd;
};

template <typename T>
__device__ __forceinline__ Moments<T> moments(const Pair<T>& x) {
  return {x.p, x.d, x.p * x.p, x.d * x.d};
}
template <typename T>
__device__ __forceinline__ Moments<T> moments(const Quad<T>& x) {
  return {x.p, x.d, x.pp, x.dd};
}

// What is weighed, of `rows` by `columns` a plane, and where a window begins in front of its place in the result.
struct Grid {
  int64_t rows, columns, before_row, before_column;
  int64_t out_rows, out_columns;  // of the result
  int64_t step, size;             // between neighbours; of the window

  MPKERNELS_HOST_DEVICE inline int64_t reach() const { return (size - 1) * step; }
  template <typename T>
  MPKERNELS_HOST_DEVICE inline int64_t tiles_down() const {
    return (out_rows + tile_rows<T> - 1) / tile_rows<T>;
  }
  MPKERNELS_HOST_DEVICE inline int64_t tiles_across() const {
    return (out_columns + threads_per_block - 1) / threads_per_block;
  }
};

struct Tile {
  int64_t plane, row, column;
};

template <typename T>
__device__ __forceinline__ Tile tile_of(const Grid& grid, int64_t i) {
  const int64_t across = grid.tiles_across(), down = grid.tiles_down<T>();
  return {i / across / down, i / across % down * tile_rows<T>, i % across * threads_per_block};
}

// The averages of a thread's column of the tile. `read(i)` gives element i of the planes; the buffers hold two rows of
// threads_per_block + reach entries. Size: that of the window where it is compiled in, else 0.
template <typename T, int Size, typename Entry, typename Read>
__device__ __forceinline__ void average(const Grid& grid, const Tile& tile, const T* weights, Entry* buffers,
                                        const Read& read, Moments<T> (&sums)[tile_rows<T>]) {
  const int thread = threadIdx.x;
  const int size = Size > 0 ? Size : static_cast<int>(grid.size), step = static_cast<int>(grid.step);
  const int length = threads_per_block + static_cast<int>(grid.reach());
#pragma unroll
  for (int j = 0; j < tile_rows<T>; ++j) sums[j] = {0, 0, 0, 0};

  const int64_t top = tile.row - grid.before_row, left = tile.column - grid.before_column;
  const int64_t rows_left = grid.out_rows - tile.row;
  const int64_t bottom = top + (rows_left < tile_rows<T> ? rows_left : tile_rows<T>)+grid.size - 1;
  const int64_t first = top < 0 ? 0 : top, last = bottom < grid.rows ? bottom : grid.rows;
  for (int64_t row = first; row < last; ++row) {
    Entry* buffer = buffers + ((row - first) & 1) * length;
    for (int i = thread; i < length; i += threads_per_block) {
      const int64_t column = left + i;
      buffer[i] =
          column >= 0 && column < grid.columns ? read((tile.plane * grid.rows + row) * grid.columns + column) : Entry{};
    }
    __syncthreads();  // one a row: the other buffer is free once all have passed it
    Moments<T> along{0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const Moments<T> m = moments(buffer[thread + k * step]);
      const T weight = weights[k];
      along.p += weight * m.p;
      along.d += weight * m.d;
      along.pp += weight * m.pp;
      along.dd += weight * m.dd;
    }
    const int tap = static_cast<int>(row - top);
#pragma unroll
    for (int j = 0; j < tile_rows<T>; ++j) {
      if (tap - j < 0 || tap - j >= size) continue;
      const T weight = weights[tap - j];
      sums[j].p += weight * along.p;
      sums[j].d += weight * along.d;
      sums[j].pp += weight * along.pp;
      sums[j].dd += weight * along.dd;
    }
  }
}

// The sum over the block, in a fixed order, for thread 0.
__device__ __forceinline__ double block_sum(double x, double* memory) {
  const int thread = threadIdx.x;
  memory[thread] = x;
  __syncthreads();
  for (int half = threads_per_block / 2; half > 0; half /= 2) {
    if (thread < half) memory[thread] += memory[thread + half];
    __syncthreads();
  }
  return memory[0];
}

template <typename T>
struct Images {
  const T* image;
  const T* target;

  MPKERNELS_HOST_DEVICE inline Pair<T> operator()(int64_t i) const {
    return {image[i] + target[i], image[i] - target[i]};
  }
};

template <typename T>
struct Maps {
  const Quad<T>* maps;

  MPKERNELS_HOST_DEVICE inline Quad<T> operator()(int64_t i) const { return maps[i]; }
};

// Dynamic shared memory: two rows of entries, then the weights.
template <typename T, typename Entry>
__device__ __forceinline__ const T* load_weights(const Grid& grid, const T* weights, Entry* buffers) {
  T* shared = reinterpret_cast<T*>(buffers + 2 * (threads_per_block + grid.reach()));
  for (int64_t k = threadIdx.x; k < grid.size; k += threads_per_block) shared[k] = weights[k];
  __syncthreads();
  return shared;
}

// The window, a Gaussian that sums to 1.
template <typename T>
__global__ void window_kernel(T* weights, int64_t size, double sigma) {
  const auto value = [=](int64_t i) {
    const double distance = static_cast<double>(i - size / 2) / sigma;
    return exp(-0.5 * distance * distance);
  };
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += value(i);
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) weights[i] = static_cast<T>(value(i) / sum);
}

template <typename T, int Size>
__global__ void __launch_bounds__(threads_per_block) forward_kernel(const Grid grid, const Images<T> images,
                                                                    const T* window,  // (size)
                                                                    T c1, T c2,
                                                                    T* map,        // (P, H', M') or null
                                                                    double* sums,  // (tiles) or null
                                                                    int64_t tiles) {
  MPKERNELS_DYNAMIC_SHARED(Pair<T>, buffers);
  __shared__ double totals[threads_per_block];
  const T* weights = load_weights(grid, window, buffers);
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_of<T>(grid, i);
    Moments<T> averages[tile_rows<T>];
    average<T, Size>(grid, tile, weights, buffers, images, averages);
    const int64_t column = tile.column + threadIdx.x;
    double total = 0;
    if (column < grid.out_columns) {
#pragma unroll
      for (int j = 0; j < tile_rows<T>; ++j) {
        if (tile.row + j >= grid.out_rows) break;
        const T value = similarity<T>(averages[j], c1, c2);
        if (map != nullptr) map[(tile.plane * grid.out_rows + tile.row + j) * grid.out_columns + column] = value;
        total += static_cast<double>(value);
      }
    }
    if (sums != nullptr) {
      total = block_sum(total, totals);
      if (threadIdx.x == 0) sums[i] = total;
    }
    __syncthreads();  // the next tile's rows come where these are read
  }
}

// The mean from the tiles' sums, by one block.
template <typename T>
__global__ void mean_kernel(const double* sums, int64_t tiles, int64_t pixels, T* mean) {
  __shared__ double totals[threads_per_block];
  double total = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += threads_per_block) total += sums[i];
  total = block_sum(total, totals);
  if (threadIdx.x == 0) *mean = static_cast<T>(total / static_cast<double>(pixels > 0 ? pixels : 1));
}

// The gradients of the map's averages.
template <typename T, int Size>
__global__ void __launch_bounds__(threads_per_block)
    derivatives_kernel(const Grid grid, const Images<T> images,
                       const T* window,  // (size)
                       T c1, T c2,
                       const T* grad,        // (P, H', M'), or one number where it is that of the mean
                       int64_t mean_pixels,  // the number of pixels of the mean, 0 for a map
                       Quad<T>* maps,        // (P, H', M')
                       int64_t tiles) {
  MPKERNELS_DYNAMIC_SHARED(Pair<T>, buffers);
  const T* weights = load_weights(grid, window, buffers);
  const T alike =
      mean_pixels > 0 ? static_cast<T>(static_cast<double>(grad[0]) / static_cast<double>(mean_pixels)) : T(0);
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_of<T>(grid, i);
    Moments<T> averages[tile_rows<T>];
    average<T, Size>(grid, tile, weights, buffers, images, averages);
    const int64_t column = tile.column + threadIdx.x;
    if (column < grid.out_columns) {
#pragma unroll
      for (int j = 0; j < tile_rows<T>; ++j) {
        if (tile.row + j >= grid.out_rows) break;
        const int64_t at = (tile.plane * grid.out_rows + tile.row + j) * grid.out_columns + column;
        const Moments<T> g = derivatives<T>(averages[j], c1, c2);
        const T seed = mean_pixels > 0 ? alike : grad[at];
        maps[at] = {seed * g.p, seed * g.d, seed * g.pp, seed * g.dd};
      }
    }
    __syncthreads();
  }
}

// The gradients of the images.
template <typename T, int Size>
__global__ void __launch_bounds__(threads_per_block)
    backward_kernel(const Grid grid, const Maps<T> maps, const Images<T> images,
                    const T* window,  // (size)
                    T* of_image,      // (P, H, M) or null
                    T* of_target,     // (P, H, M) or null
                    int64_t tiles) {
  MPKERNELS_DYNAMIC_SHARED(Quad<T>, buffers);
  const T* weights = load_weights(grid, window, buffers);
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_of<T>(grid, i);
    Moments<T> averages[tile_rows<T>];
    average<T, Size>(grid, tile, weights, buffers, maps, averages);
    const int64_t column = tile.column + threadIdx.x;
    if (column < grid.out_columns) {
#pragma unroll
      for (int j = 0; j < tile_rows<T>; ++j) {
        if (tile.row + j >= grid.out_rows) break;
        const int64_t at = (tile.plane * grid.out_rows + tile.row + j) * grid.out_columns + column;
        const Pair<T> pixel = images(at);
        const T of_p = averages[j].p + 2 * pixel.p * averages[j].pp;
        const T of_d = averages[j].d + 2 * pixel.d * averages[j].dd;
        if (of_image != nullptr) of_image[at] = of_p + of_d;
        if (of_target != nullptr) of_target[at] = of_p - of_d;
      }
    }
    __syncthreads();
  }
}

}  // namespace ssim
}  // namespace mpkernels
