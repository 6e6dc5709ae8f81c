// Covariances of Gaussians on a GPU, forward and backward. Formula and its source: quat_scale_to_covar_math.h.
//
// Shapes: quats (N, 4) wxyz, scales (N, 3), covars and their gradient (N, 6) xx, xy, xz, yy, yz, zz, or (N, 3, 3).
// Decomposition: a Gaussian a thread, all in registers; neighbours' numbers share cache lines.
// Bytes a Gaussian, float32: forward 28 read, 24 (3 x 3: 36) written; backward 52 (64) read, 28 written.
#pragma once

#include "common/launch.h"
#include "splatting/quat_scale_to_covar_math.h"

namespace mpkernels {
namespace splatting {

constexpr int covar_threads = 256;

template <typename T, bool INVERSE, int SIZE>
__global__ void __launch_bounds__(covar_threads)
    quat_scale_to_covar_kernel(const T* quats, const T* scales, T* covars, int64_t count) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < count; n += stride) {
    T quat[4], scale[3], covar[SIZE];
    for (int i = 0; i < 4; ++i) quat[i] = quats[4 * n + i];
    for (int i = 0; i < 3; ++i) scale[i] = scales[3 * n + i];
    covariance(stretched<INVERSE>(quat, scale), covar);
    for (int i = 0; i < SIZE; ++i) covars[SIZE * n + i] = covar[i];
  }
}

template <typename T, bool INVERSE, int SIZE>
__global__ void __launch_bounds__(covar_threads)
    quat_scale_to_covar_backward_kernel(const T* grad, const T* quats, const T* scales, T* of_quats, T* of_scales,
                                        int64_t count) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < count; n += stride) {
    T of[SIZE], quat[4], scale[3], of_quat[4], of_scale[3];
    for (int i = 0; i < SIZE; ++i) of[i] = grad[SIZE * n + i];
    for (int i = 0; i < 4; ++i) quat[i] = quats[4 * n + i];
    for (int i = 0; i < 3; ++i) scale[i] = scales[3 * n + i];
    covariance_gradient(stretched<INVERSE>(quat, scale), of, of_quat, of_scale);
    for (int i = 0; i < 4; ++i) of_quats[4 * n + i] = of_quat[i];
    for (int i = 0; i < 3; ++i) of_scales[3 * n + i] = of_scale[i];
  }
}

}  // namespace splatting
}  // namespace mpkernels
