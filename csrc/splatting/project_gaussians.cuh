// The projection of Gaussians on a GPU, forward and backward. Formula and its source: project_gaussians_math.h.
//
// Shapes, with B batches, C cameras, N Gaussians:
//   means (B, N, 3), quats (B, N, 4) and scales (B, N, 3), or covars (B, N, 6); opacities (B, N)
//   viewmats (B, C, 4, 4), intrinsics (B, C, 3, 3)
//   radii (B, C, N, 2) int32, means2d (B, C, N, 2), depths (B, C, N), conics (B, C, N, 3), compensations (B, C, N)
//   partial sums of the gradients of cameras (B, tiles, C, 16)
//
// Decomposition: a thread a Gaussian, all in registers; a block a tile of 256 Gaussians of a batch. Forward: of one
// camera. Backward: a thread goes through all cameras, so that sums over cameras stay in registers, in order; where
// cameras want gradients, a block sums its Gaussians (shuffles, then the warps in order) and a second kernel sums the
// tiles, 32 strided sums a number, in double precision, joined in order. No atomics: every order is fixed.
//
// Bytes a Gaussian and camera, float32: forward 40 read (of the Gaussian, by each camera, from L2) and 36 written;
// backward 36 read, and 40 read and written for each Gaussian.
#pragma once

#include "common/launch.h"
#include "splatting/project_gaussians_math.h"

namespace mpkernels {
namespace splatting {

constexpr int projection_threads = 256;
constexpr int projection_warps = projection_threads / 32;
constexpr int camera_strides = 32;  // sums of tiles side by side, for one number of one camera

template <typename T>
struct ProjectionInput {
  const T* means;
  const T* quats;
  const T* scales;
  const T* covars;
  const T* opacities;  // may be null
  const T* viewmats;
  const T* intrinsics;
  int64_t cameras, gaussians, tiles;
  ProjectionSettings<T> settings;
};

template <typename T>
struct ProjectionOutput {
  int32_t* radii;
  T* means2d;
  T* depths;
  T* conics;
  T* compensations;
};

// Gradients of outputs (null where there is none), and of inputs (null where not needed).
template <typename T>
struct ProjectionGradients {
  const T* means2d;
  const T* depths;
  const T* conics;
  const T* compensations;
  const int32_t* radii;
  T* of_means;
  T* of_quats;
  T* of_scales;
  T* of_covars;
  T* of_cameras;  // (B, tiles, C, 16), or null
};

template <bool COVARS, typename T>
__device__ inline void load_gaussian(const ProjectionInput<T>& in, int64_t at, Gaussian<T>& g,
                                     UnitQuaternion<T>& unit) {
  for (int i = 0; i < 3; ++i) g.mean[i] = in.means[3 * at + i];
  if (COVARS) {
    for (int i = 0; i < 6; ++i) g.covar[i] = in.covars[6 * at + i];
  } else {
    T q[4];
    for (int i = 0; i < 4; ++i) q[i] = in.quats[4 * at + i];
    for (int i = 0; i < 3; ++i) g.scale[i] = in.scales[3 * at + i];
    unit = normalized(q);
    rotation_of(unit, g.rotation);
  }
}

// grid: (B C tiles), tiles fastest
template <typename T, bool COVARS, bool OPACITY>
__global__ void __launch_bounds__(projection_threads)
    project_gaussians_kernel(ProjectionInput<T> in, ProjectionOutput<T> out) {
  const int64_t view = blockIdx.x / in.tiles;  // batch and camera
  const int64_t n = (blockIdx.x - view * in.tiles) * projection_threads + threadIdx.x;
  if (n >= in.gaussians) return;
  const int64_t from = view / in.cameras * in.gaussians + n;
  const int64_t to = view * in.gaussians + n;
  const Camera<T> camera = camera_of(in.viewmats + 16 * view, in.intrinsics + 9 * view, in.settings);
  Gaussian<T> gaussian;
  UnitQuaternion<T> unit;
  load_gaussian<COVARS>(in, from, gaussian, unit);
  T m[3];
  to_camera(camera, gaussian.mean, m);
  const Footprint<T> f = footprint<COVARS>(camera, gaussian, m, in.settings);
  const T opacity = OPACITY ? in.opacities[from] : T(1);
  const Projection<T> p = projection<OPACITY>(camera, f, m[2], opacity, in.settings);
  out.radii[2 * to] = p.valid ? static_cast<int32_t>(p.radius_x) : 0;
  out.radii[2 * to + 1] = p.valid ? static_cast<int32_t>(p.radius_y) : 0;
  out.means2d[2 * to] = p.valid ? p.u : T(0);
  out.means2d[2 * to + 1] = p.valid ? p.v : T(0);
  out.depths[to] = p.valid ? m[2] : T(0);
  for (int i = 0; i < 3; ++i) out.conics[3 * to + i] = p.valid ? p.conic[i] : T(0);
  out.compensations[to] = p.valid ? f.compensation : T(0);
}

// Writes the block's sums of 16 numbers to `to`; all threads of the block call it.
template <typename T>
__device__ inline void sum_of_block(T (&x)[camera_gradients], T* to) {
  __shared__ T of_warps[projection_warps][camera_gradients];
#pragma unroll
  for (int i = 0; i < camera_gradients; ++i) {
#pragma unroll
    for (int step = 16; step >= 1; step /= 2) x[i] += __shfl_down_sync(0xffffffffu, x[i], step);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32][i] = x[i];
  }
  __syncthreads();
  if (threadIdx.x < camera_gradients) {
    T total = of_warps[0][threadIdx.x];
    for (int warp = 1; warp < projection_warps; ++warp) total += of_warps[warp][threadIdx.x];
    to[threadIdx.x] = total;
  }
  __syncthreads();  // the next camera writes there again
}

// grid: (B tiles), tiles fastest
template <typename T, bool COVARS, bool CAMERA>
__global__ void __launch_bounds__(projection_threads)
    project_gaussians_backward_kernel(ProjectionInput<T> in, ProjectionGradients<T> g) {
  const int64_t batch = blockIdx.x / in.tiles;
  const int64_t n = (blockIdx.x - batch * in.tiles) * projection_threads + threadIdx.x;
  const bool exists = n < in.gaussians;
  if (!CAMERA && !exists) return;
  const int64_t at = batch * in.gaussians + n;
  Gaussian<T> gaussian;
  UnitQuaternion<T> unit;
  if (exists) load_gaussian<COVARS>(in, at, gaussian, unit);
  GaussianGradient<T> sum{};
  bool ever = false;
  for (int64_t c = 0; c < in.cameras; ++c) {
    const int64_t view = batch * in.cameras + c;
    const int64_t from = view * in.gaussians + n;
    T of_camera[camera_gradients] = {};
    if (exists && (g.radii[2 * from] | g.radii[2 * from + 1]) != 0) {
      ever = true;
      ProjectionGradient<T> of{};
      if (g.means2d != nullptr) {
        of.u = g.means2d[2 * from];
        of.v = g.means2d[2 * from + 1];
      }
      if (g.depths != nullptr) of.depth = g.depths[from];
      if (g.conics != nullptr) {
        for (int i = 0; i < 3; ++i) of.conic[i] = g.conics[3 * from + i];
      }
      if (g.compensations != nullptr) of.compensation = g.compensations[from];
      const Camera<T> camera = camera_of(in.viewmats + 16 * view, in.intrinsics + 9 * view, in.settings);
      T m[3];
      to_camera(camera, gaussian.mean, m);
      const Footprint<T> f = footprint<COVARS>(camera, gaussian, m, in.settings);
      projection_gradient<COVARS, CAMERA>(camera, gaussian, f, of, in.settings, sum, of_camera);
    }
    if (CAMERA) sum_of_block(of_camera, g.of_cameras + (blockIdx.x * in.cameras + c) * camera_gradients);
  }
  if (g.of_means == nullptr || !exists) return;
  for (int i = 0; i < 3; ++i) g.of_means[3 * at + i] = sum.mean[i];
  if (COVARS) {
    for (int i = 0; i < 6; ++i) g.of_covars[6 * at + i] = sum.covar[i];
  } else {
    T of_quat[4];
    rotation_gradient(unit, sum.rotation, of_quat);
    for (int i = 0; i < 4; ++i) g.of_quats[4 * at + i] = ever ? of_quat[i] : T(0);
    for (int i = 0; i < 3; ++i) g.of_scales[3 * at + i] = sum.scale[i];
  }
}

// Sums the tiles of a camera, a block a camera: grid (B C), 16 x 32 threads.
template <typename T>
__global__ void __launch_bounds__(camera_gradients* camera_strides)
    sum_cameras_kernel(const T* of_tiles, T* of_viewmats, T* of_intrinsics, int64_t cameras, int64_t tiles) {
  __shared__ double sums[camera_strides][camera_gradients];
  const int64_t batch = blockIdx.x / cameras, c = blockIdx.x - batch * cameras;
  const int which = threadIdx.x % camera_gradients, stride = threadIdx.x / camera_gradients;
  double total = 0;
  for (int64_t tile = stride; tile < tiles; tile += camera_strides) {
    total += of_tiles[((batch * tiles + tile) * cameras + c) * camera_gradients + which];
  }
  sums[stride][which] = total;
  __syncthreads();
  if (stride == 0) {
    for (int i = 1; i < camera_strides; ++i) total += sums[i][which];
    sums[0][which] = total;
  }
  __syncthreads();
  const int t = threadIdx.x;
  if (t < 16) {  // rows of rotation and translation; the last row has no gradient
    const int row = t / 4, column = t % 4;
    const double value = row == 3 ? 0 : sums[0][column == 3 ? 9 + row : 3 * row + column];
    of_viewmats[blockIdx.x * int64_t{16} + t] = static_cast<T>(value);
  } else if (t < 25) {
    const int entry = t - 16;
    const int from = entry == 0 ? 12 : entry == 4 ? 13 : entry == 2 ? 14 : entry == 5 ? 15 : -1;
    of_intrinsics[blockIdx.x * int64_t{9} + entry] = from < 0 ? T(0) : static_cast<T>(sums[0][from]);
  }
}

}  // namespace splatting
}  // namespace mpkernels
