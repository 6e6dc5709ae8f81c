// The forward kernel of rasterize. Formulas, shapes and decomposition: rasterize.cuh.
#pragma once

#include "splatting/rasterize_tile.cuh"

namespace mpkernels {
namespace rasterize {

template <typename T>
struct Image {
  T* colors;          // (I, H, W, D)
  T* alphas;          // (I, H, W)
  T* transmittances;  // (I, H, W)
  int32_t* last;      // (I, H, W)
};

// Blocks of a multiprocessor at a time, which bounds a thread's registers: to 48 for 1 and 3 channels in float32.
template <typename T, int C>
constexpr int forward_blocks = sizeof(T) == 8 ? (C == 0 ? 2 : 3) : (C == 1 || C == 3 ? 5 : 4);

// C: the number of channels where it is compiled in; 0 for any number, of which a block draws general_channels.
template <typename T, int C>
__global__ void __launch_bounds__(most_threads, forward_blocks<T, C>)
    rasterize_forward_kernel(const Gaussians<T> gaussians,  // M of them, see Gaussians
                             const Tiles tiles,             // I images of tiles, see Tiles
                             const T* backgrounds,          // (I, D) or null
                             const Image<T> out,            // (I, H, W, ...), see Image
                             int64_t first_task) {          // (tile, part, group of channels) of block 0
  constexpr int K = C > 0 ? C : general_channels<T>;
  __shared__ Staged<T, K, most_threads> staged;
  const int threads = blockDim.x;
  const int warp = threadIdx.x / warp_lanes;
  const int lane = threadIdx.x % warp_lanes;

  const int64_t groups = C > 0 ? 1 : max(int64_t(1), (gaussians.channels + K - 1) / K);
  const int64_t task = first_task + blockIdx.x;
  const int64_t first_channel = task % groups * K;
  const int64_t tile_part = task / groups;
  const Part part(tiles, tile_part / tiles.parts, static_cast<int>(tile_part % tiles.parts));
  const T x = T(part.x) + T(0.5), y = T(part.y) + T(0.5);

  T color[K] = {};
  T transmittance = 1;
  int32_t last = 0;
  bool done = !part.inside;
  for (int first = 0; first < part.length; first += threads) {
    if (__syncthreads_count(done) == threads) break;  // and everybody has read the batch before
    const int count = min(threads, part.length - first);
    if (int(threadIdx.x) < count) {
      staged.stage(threadIdx.x, gaussians, tiles, part, part.begin + first + threadIdx.x, first_channel);
    }
    __syncthreads();
    for (int group = 0; group < count; group += warp_lanes) {
      if (__all_sync(all_lanes, done)) break;
      const bool reaches = group + lane < count && (staged.touched[group + lane] >> warp & 1);
      unsigned left = __ballot_sync(all_lanes, reaches);
      while (left != 0 && !done) {
        const int i = group + __ffs(left) - 1;
        left &= left - 1;
        const Center<T> center = staged.centers[i];
        T opacity;
        if (!is_seen(staged.shapes[i], center.x - x, center.y - y, opacity)) continue;
        const T alpha = min(opacity, alpha_max<T>);
        const T behind = transmittance * (1 - alpha);
        if (behind <= transmittance_min<T>) {
          done = true;
          break;
        }
        const T weight = alpha * transmittance;
        const Color<T, K> seen = staged.colors[i];
#pragma unroll
        for (int c = 0; c < K; ++c) color[c] += seen.channel[c] * weight;
        transmittance = behind;
        last = first + i + 1;
      }
    }
  }

  if (!part.inside) return;
  const int64_t channels = C > 0 ? C : gaussians.channels;
  T* out_color = out.colors + part.pixel * channels + first_channel;
  const T* background = backgrounds == nullptr ? nullptr : backgrounds + part.image * channels + first_channel;
#pragma unroll
  for (int c = 0; c < K; ++c) {
    if (C == 0 && first_channel + c >= channels) break;
    out_color[c] = background == nullptr ? color[c] : color[c] + transmittance * background[c];
  }
  if (first_channel > 0) return;
  out.alphas[part.pixel] = 1 - transmittance;
  out.transmittances[part.pixel] = transmittance;
  out.last[part.pixel] = last;
}

}  // namespace rasterize
}  // namespace mpkernels
