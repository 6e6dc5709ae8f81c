// Sums of the backward of rasterize in a fixed order: the rows of each Gaussian, and gradients of backgrounds.
#pragma once

#include "splatting/rasterize_backward.cuh"

namespace mpkernels {
namespace rasterize {

// Where the rows of each Gaussian begin and end among the sorted keys; keys of 0 belong to none.
__global__ void __launch_bounds__(most_threads)
    find_rows_kernel(const uint32_t* __restrict__ sorted_keys,  // (count,) 1 + the Gaussian, or 0
                     int64_t count,
                     int32_t* __restrict__ begins,  // (M,) zeros
                     int32_t* __restrict__ ends) {  // (M,) zeros
  const int64_t at = int64_t(blockIdx.x) * most_threads + threadIdx.x;
  if (at >= count) return;
  const uint32_t key = sorted_keys[at];
  if (key == 0) return;
  if (at == 0 || sorted_keys[at - 1] != key) begins[key - 1] = static_cast<int32_t>(at);
  if (at + 1 == count || sorted_keys[at + 1] != key) ends[key - 1] = static_cast<int32_t>(at + 1);
}

template <typename T>
struct GaussianGradients {
  T* means2d;    // (M, 2)
  T* conics;     // (M, 3)
  T* colors;     // (M, D)
  T* opacities;  // (M,)
  T* absolute;   // (M, 2)
};

// A warp a Gaussian: a lane a value of a row, and as many rows side by side as fit.
template <typename T>
__global__ void __launch_bounds__(most_threads, 1)
    sum_rows_kernel(const Gaussians<T> gaussians,        // M of them
                    const Rows<T> in,                    // (rows, values)
                    const int32_t* __restrict__ order,   // (rows,) sorted by Gaussian
                    const int32_t* __restrict__ begins,  // (M,) of each Gaussian's rows in `order`
                    const int32_t* __restrict__ ends,    // (M,)
                    const GaussianGradients<T> out) {
  const int lane = threadIdx.x % warp_lanes;
  const int values = in.values();
  const int side_by_side = warp_lanes / values;
  const int place = lane / values, value = lane % values;
  const int first_color = values - in.channels;
  const int64_t warps = int64_t(gridDim.x) * most_warps;
  for (int64_t id = int64_t(blockIdx.x) * most_warps + threadIdx.x / warp_lanes; id < gaussians.count; id += warps) {
    const int64_t begin = begins[id], end = ends[id];
    T sum = 0;
    if (place < side_by_side) {
#pragma unroll 4
      for (int64_t at = begin + place; at < end; at += side_by_side)
        sum += in.rows[int64_t(order[at]) * values + value];
    }
    T total = sum;
    for (int other = 1; other < side_by_side; ++other) {
      total += __shfl_sync(all_lanes, sum, (lane + other * values) % warp_lanes);
    }
    const T v_dx = __shfl_sync(all_lanes, total, of_v_dx), v_dy = __shfl_sync(all_lanes, total, of_v_dy);
    if (lane >= values) continue;
    if (lane >= first_color) {
      out.colors[id * gaussians.channels + in.first_channel + lane - first_color] = total;
      continue;
    }
    const T* conic = gaussians.conics + 3 * id;
    T* to;
    T gradient;
    if (lane == of_v) {
      to = out.opacities + id;
      gradient = total / gaussians.opacities[id];
    } else if (lane == of_v_dx || lane == of_v_dy) {
      to = out.means2d + 2 * id + (lane - of_v_dx);
      gradient = lane == of_v_dx ? -(conic[0] * v_dx + conic[1] * v_dy) : -(conic[1] * v_dx + conic[2] * v_dy);
    } else if (lane < geometric_sums) {
      to = out.conics + 3 * id + (lane - of_v_dxx);
      gradient = lane == of_v_dxy ? -total : T(-0.5) * total;
    } else {
      to = out.absolute + 2 * id + (lane - geometric_sums);
      gradient = total * ln_2<T>;  // the scale of a staged conic
    }
    *to = end > begin ? gradient : T(0);  // what is not drawn may be anything
  }
}

constexpr int pixels_of_piece = 8 * most_threads;

// dL/dbackgrounds = sum over pixels of T dL/dcolors. First the pieces of an image, a block each.
template <typename T>
__global__ void __launch_bounds__(most_threads)
    sum_background_pieces_kernel(const T* __restrict__ grad_colors,     // (I, pixels, D)
                                 const T* __restrict__ transmittances,  // (I, pixels)
                                 T* __restrict__ sums,                  // (I, pieces, D)
                                 int64_t images, int64_t pixels, int64_t pieces, int64_t channels) {
  __shared__ T of_warps[most_warps];
  for (int64_t piece = blockIdx.x; piece < images * pieces; piece += gridDim.x) {
    const int64_t image = piece / pieces;
    const int64_t begin = image * pixels + piece % pieces * pixels_of_piece;
    const int64_t end = min(begin + pixels_of_piece, (image + 1) * pixels);
    for (int64_t c = 0; c < channels; ++c) {
      T sum = 0;
      for (int64_t at = begin + threadIdx.x; at < end; at += most_threads) {
        sum += transmittances[at] * grad_colors[at * channels + c];
      }
#pragma unroll
      for (int step = warp_lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(all_lanes, sum, step);
      if (threadIdx.x % warp_lanes == 0) of_warps[threadIdx.x / warp_lanes] = sum;
      __syncthreads();
      if (threadIdx.x == 0) {
        T total = 0;
#pragma unroll
        for (int w = 0; w < most_warps; ++w) total += of_warps[w];
        sums[piece * channels + c] = total;
      }
      __syncthreads();
    }
  }
}

// Then a thread a channel of an image.
template <typename T>
__global__ void __launch_bounds__(most_threads)
    sum_backgrounds_kernel(const T* __restrict__ sums,  // (I, pieces, D)
                           T* __restrict__ gradients,   // (I, D)
                           int64_t images, int64_t pieces, int64_t channels) {
  const int64_t threads = int64_t(gridDim.x) * most_threads;
  for (int64_t at = int64_t(blockIdx.x) * most_threads + threadIdx.x; at < images * channels; at += threads) {
    const T* mine = sums + at / channels * pieces * channels + at % channels;
    T sum = 0;
#pragma unroll 8
    for (int64_t piece = 0; piece < pieces; ++piece) sum += mine[piece * channels];
    gradients[at] = sum;
  }
}

}  // namespace rasterize
}  // namespace mpkernels
