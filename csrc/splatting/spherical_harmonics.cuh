// Spherical harmonics on a GPU: color = sum_k Y_k(dir / |dir|) coeffs_k, and its gradients to dirs and coeffs (formulas
// in spherical_harmonics_math.h).
//
// Shapes: dirs, colors (B, C, N, 3); coeffs (B, N, K, 3); masks (B, C, N); all contiguous; offsets have 64 bits.
//
// Decomposition: a thread takes a Gaussian, and one camera after another. A block first brings the coefficients of its
// Gaussians into shared memory, whole rows by neighbouring threads (rows that every camera masks are left out), where
// rows are an odd number of words apart: neighbouring threads then meet no bank conflict. So each coefficient is read
// once for all cameras. The backward computes the gradients to directions from them, and then the gradients to
// coefficients in their place, summed over the cameras in order, which go back as they came. No atomics.
//
// Bytes a Gaussian, float32, degree 3, one camera: forward 204 read and 12 written, backward 216 read and 204 written.
#pragma once

#include "common/launch.h"
#include "splatting/spherical_harmonics_math.h"

namespace mpkernels {
namespace spherical_harmonics {

template <typename T>
constexpr int threads_per_block = sizeof(T) == 4 ? 128 : 64;

template <typename T>
struct Problem {
  const T* dirs;      // (B, C, N, 3)
  const T* coeffs;    // (B, N, K, 3)
  const bool* masks;  // (B, C, N) or null
  int64_t batches, cameras, gaussians, coefficients;
};

// A row of coefficients in shared memory: an odd number of words.
template <int degree>
constexpr int row_stride = 3 * terms<degree> / 2 * 2 + 1;

template <typename T, int degree>
constexpr size_t shared_bytes = sizeof(T) * threads_per_block<T> * row_stride<degree>;

// The Gaussians of a block.
struct Block {
  int64_t batch, first;
  int count;
};

template <typename T>
__device__ __forceinline__ Block block_of(const Problem<T>& in, int64_t i) {
  constexpr int size = threads_per_block<T>;
  const int64_t blocks = (in.gaussians + size - 1) / size;
  const int64_t first = i % blocks * size, left = in.gaussians - first;
  return {i / blocks, first, left < size ? static_cast<int>(left) : size};
}

template <typename T>
__device__ __forceinline__ bool wanted(const Problem<T>& in, int64_t at) {
  return in.masks == nullptr || in.masks[at];
}

// Whether a thread's Gaussian is wanted by any camera.
template <typename T>
__device__ __forceinline__ bool wanted_at_all(const Problem<T>& in, const Block& block, int thread) {
  if (thread >= block.count) return false;
  for (int64_t c = 0; c < in.cameras; ++c) {
    if (wanted(in, (block.batch * in.cameras + c) * in.gaussians + block.first + thread)) return true;
  }
  return false;
}

// Brings the needed rows of coefficients into shared memory.
template <typename T, int degree>
__device__ __forceinline__ void load_rows(const Problem<T>& in, const Block& block, const bool* needed, T* rows) {
  constexpr int width = 3 * terms<degree>;
  const T* from = in.coeffs + (block.batch * in.gaussians + block.first) * 3 * in.coefficients;
#pragma unroll 8
  for (int i = threadIdx.x; i < block.count * width; i += threads_per_block<T>) {
    const int row = i / width, column = i % width;
    if (needed[row]) rows[row * row_stride<degree> + column] = from[row * 3 * in.coefficients + column];
  }
}

template <typename T>
__device__ __forceinline__ Direction<T> load_direction(const Problem<T>& in, int64_t at) {
  return direction<T>(in.dirs[3 * at], in.dirs[3 * at + 1], in.dirs[3 * at + 2]);
}

template <typename T, int degree>
__global__ void __launch_bounds__(threads_per_block<T>) forward_kernel(const Problem<T> in,
                                                                       T* colors,  // (B, C, N, 3)
                                                                       int64_t blocks) {
  constexpr int K = terms<degree>;
  MPKERNELS_DYNAMIC_SHARED(T, rows);
  __shared__ bool needed[threads_per_block<T>];
  const int thread = threadIdx.x;
  const T* coeffs = rows + thread * row_stride<degree>;
  for (int64_t i = blockIdx.x; i < blocks; i += gridDim.x) {
    const Block block = block_of(in, i);
    const bool mine = wanted_at_all(in, block, thread);
    needed[thread] = mine;
    __syncthreads();
    load_rows<T, degree>(in, block, needed, rows);
    __syncthreads();
    for (int64_t c = 0; c < in.cameras && thread < block.count; ++c) {
      const int64_t at = (block.batch * in.cameras + c) * in.gaussians + block.first + thread;
      T red = 0, green = 0, blue = 0;
      if (mine && wanted(in, at)) {
        const Direction<T> d = load_direction(in, at);
        T b[K];
        basis<degree, T>(d.x, d.y, d.z, b);
        red = b[0] * coeffs[0];
        green = b[0] * coeffs[1];
        blue = b[0] * coeffs[2];
        if (d.usable) {
#pragma unroll
          for (int k = 1; k < K; ++k) {
            red += b[k] * coeffs[3 * k];
            green += b[k] * coeffs[3 * k + 1];
            blue += b[k] * coeffs[3 * k + 2];
          }
        }
      }
      colors[3 * at] = red;
      colors[3 * at + 1] = green;
      colors[3 * at + 2] = blue;
    }
    __syncthreads();  // the next Gaussians' rows come where these are read
  }
}

// What a coefficient's basis function gains: the gradient of the colour along the coefficient.
template <typename T>
struct Weights {
  const T* coeffs;
  T red, green, blue;

  MPKERNELS_HOST_DEVICE inline T operator()(int k) const {
    return red * coeffs[3 * k] + green * coeffs[3 * k + 1] + blue * coeffs[3 * k + 2];
  }
};

template <typename T, int degree>
__global__ void __launch_bounds__(threads_per_block<T>, 1) backward_kernel(const Problem<T> in,
                                                                           const T* grad,  // (B, C, N, 3)
                                                                           T* of_dirs,     // (B, C, N, 3) or null
                                                                           T* of_coeffs,   // (B, N, K, 3) or null
                                                                           int64_t blocks) {
  constexpr int K = terms<degree>;
  MPKERNELS_DYNAMIC_SHARED(T, rows);
  __shared__ bool needed[threads_per_block<T>];
  const int thread = threadIdx.x;
  T* row = rows + thread * row_stride<degree>;
  for (int64_t i = blockIdx.x; i < blocks; i += gridDim.x) {
    const Block block = block_of(in, i);
    const bool mine = wanted_at_all(in, block, thread);
    const int64_t first = block.batch * in.cameras * in.gaussians + block.first + thread;
    if (of_dirs != nullptr) {
      needed[thread] = mine;
      __syncthreads();
      load_rows<T, degree>(in, block, needed, rows);
      __syncthreads();
      for (int64_t c = 0; c < in.cameras && thread < block.count; ++c) {
        const int64_t at = first + c * in.gaussians;
        Gradient<T> g{0, 0, 0};
        if (mine && wanted(in, at)) {
          const Direction<T> d = load_direction(in, at);
          const Weights<T> weights{row, grad[3 * at], grad[3 * at + 1], grad[3 * at + 2]};
          g = through_length<T>(d, basis_gradient<degree, T>(d.x, d.y, d.z, weights));
        }
        of_dirs[3 * at] = g.x;
        of_dirs[3 * at + 1] = g.y;
        of_dirs[3 * at + 2] = g.z;
      }
    }
    if (of_coeffs != nullptr) {
      // a thread's own row: no barrier since it was read
      for (int e = 0; e < 3 * K; ++e) row[e] = 0;
      for (int64_t c = 0; c < in.cameras && mine; ++c) {
        const int64_t at = first + c * in.gaussians;
        if (!wanted(in, at)) continue;
        const Direction<T> d = load_direction(in, at);
        const T red = grad[3 * at], green = grad[3 * at + 1], blue = grad[3 * at + 2];
        T b[K];
        basis<degree, T>(d.x, d.y, d.z, b);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (k > 0 && !d.usable) break;
          row[3 * k] += b[k] * red;
          row[3 * k + 1] += b[k] * green;
          row[3 * k + 2] += b[k] * blue;
        }
      }
      __syncthreads();
      const int width = static_cast<int>(3 * in.coefficients);
      T* to = of_coeffs + (block.batch * in.gaussians + block.first) * width;
      for (int64_t e = thread; e < int64_t{block.count} * width; e += threads_per_block<T>) {
        const int column = static_cast<int>(e % width), at = static_cast<int>(e / width);
        to[e] = column < 3 * K ? rows[at * row_stride<degree> + column] : T(0);
      }
    }
    __syncthreads();  // the next Gaussians' rows come where these are read
  }
}

}  // namespace spherical_harmonics
}  // namespace mpkernels
