// The forward kernel of volume compositing. Formulas, shapes and decomposition: composite.cuh.
#pragma once

#include "volume/composite_warp.cuh"

namespace mpkernels {
namespace composite {

template <typename S>
struct ForwardOutput {
  S* values;   // (R, C)
  S* opacity;  // (R,)
  S* depth;    // (R,)
  S* weights;  // (R, S) or (N,)
};

// One ray; in the general path (C = 0) the weights, and 32 of its channels.
template <typename S, int C, bool alphas, bool vector, typename T = Compute<S>>
__device__ __forceinline__ void forward_ray(const Rays<S>& in, const ForwardOutput<S>& out, const Ray<S>& ray,
                                            int64_t r, int64_t part, int lane,
                                            S* tile,           // (chunk_samples, C) shared memory
                                            T* weight_tile) {  // (chunk_samples,) shared memory, of the general path
  constexpr int P = samples_per_lane<S>;
  constexpr int chunk = chunk_samples<S>;
  constexpr int tile_channels = C > 0 ? C : 1;
  S* weights = out.weights + ray.first;
  // the general path: this lane's channel; `width` lanes share a sample
  const int width = C > 0 ? 1 : lanes_per_sample(in.channels);
  const int64_t channel = part * warp_lanes + lane % width;

  // lane c writes channel c; its background is read before anything waits
  const int64_t written = C > 0 ? lane : channel;
  const bool writes = C > 0 ? lane < C : lane < width && channel < in.channels;
  const S* background = in.ray_background(r);
  const S seen_behind = background != nullptr && writes ? load(background + written) : to_storage<S>(0);

  T carry = 1, opacity = 0, depth = 0;
  T value[tile_channels] = {};
  bool stopped = false;
  int64_t i = 0;
  for (; i < ray.count && !stopped; i += chunk) {
    const int samples = samples_of_chunk<S>(ray.count - i);
    S densities[P], t_starts[P], t_ends[P] = {}, colors[P * tile_channels];
    load_chunk<1, vector>(ray.densities + i, samples, lane, densities);
    load_chunk<1, vector>(ray.t_starts + i, samples, lane, t_starts);
    if (!alphas) load_chunk<1, vector>(ray.t_ends + i, samples, lane, t_ends);
    if (C > 0) load_chunk<tile_channels, vector>(ray.values + i * C, samples * C, lane, colors);
    to_lane_order<vector>(tile, lane, densities);
    to_lane_order<vector>(tile, lane, t_starts);
    if (!alphas) to_lane_order<vector>(tile, lane, t_ends);
    if (C > 0) write_tile<tile_channels, vector>(tile, lane, colors);  // read back when the scan is done

    Absorption<S> a;
    a.template set<alphas>(densities, t_starts, t_ends);
    T transmittance[P + 1];
    const T behind = transmit(a.alpha, a.passed, carry, lane, transmittance);
    const Alive alive = find_alive<T, P>(transmittance, behind, in.early_stop_eps, samples, lane);
    carry = behind;
    stopped = alive.stopped;
    if (C > 0) read_tile<tile_channels>(tile, lane, colors);

    T weight[P];
#pragma unroll
    for (int j = 0; j < P; ++j) weight[j] = transmittance[j] * a.alpha[j];
    if (alive.here < P) {  // dead samples may hold anything: nothing of theirs is multiplied
#pragma unroll
      for (int j = 0; j < P; ++j) {
        if (j < alive.here) continue;
        weight[j] = 0;
        a.position[j] = 0;
#pragma unroll
        for (int c = 0; c < C; ++c) colors[j * C + c] = to_storage<S>(0);
      }
    }
#pragma unroll
    for (int j = 0; j < P; ++j) {
      opacity += weight[j];
      depth += weight[j] * a.position[j];
#pragma unroll
      for (int c = 0; c < C; ++c) value[c] += weight[j] * to_compute(colors[j * C + c]);
    }

    if constexpr (C == 0) {
      __syncwarp();  // the tile has been read by all lanes
#pragma unroll
      for (int j = 0; j < P; ++j) weight_tile[lane * P + j] = weight[j];
      __syncwarp();
      if (channel < in.channels) {
        const S* column = ray.values + i * in.channels + channel;
#pragma unroll 8
        for (int s = lane / width; s < alive.in_chunk; s += warp_lanes / width) {
          value[0] += weight_tile[s] * to_compute(load(column + s * in.channels));
        }
      }
    }
    if (part == 0) store_chunk<1, vector>(weights + i, samples, lane, tile, weight);
  }
  if (part == 0) store_zeros(weights, i, ray.count, lane);

  opacity = sum_over_lanes(opacity);
  depth = sum_over_lanes(depth);
  T mine = value[0];
  if constexpr (C > 0) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const T sum = sum_over_lanes(value[c]);
      if (lane == c) mine = sum;
    }
  } else {
    for (int step = width; step < warp_lanes; step *= 2) mine += __shfl_xor_sync(all_lanes, mine, step);
  }
  if (background != nullptr) mine += (1 - opacity) * to_compute(seen_behind);
  if (writes) out.values[r * in.channels + written] = to_storage<S>(mine);
  if (part == 0 && lane == 0) {
    out.opacity[r] = to_storage<S>(opacity);
    out.depth[r] = to_storage<S>(depth);
  }
}

// C: the number of channels where it is compiled in, 0 for any number.
template <typename S, int C, bool alphas>
__global__ void __launch_bounds__(threads_per_block, forward_blocks<S>)
    composite_forward_kernel(const Rays<S> in,              // (R, S) or (N,), see Rays
                             const ForwardOutput<S> out) {  // (R, C), (R,), (R,), (R, S) or (N,)
  using T = Compute<S>;
  constexpr int chunk = chunk_samples<S>;
  __shared__ __align__(16) unsigned char tiles[warps_per_block][chunk * (C > 0 ? C : 1) * sizeof(S)];
  __shared__ T weight_tiles[C > 0 ? 1 : warps_per_block][C > 0 ? 1 : chunk];
  const int warp = threadIdx.x / warp_lanes;
  const int lane = threadIdx.x % warp_lanes;
  S* tile = reinterpret_cast<S*>(tiles[warp]);
  T* weight_tile = weight_tiles[C > 0 ? 0 : warp];

  const int64_t parts = C > 0 ? 1 : (in.channels + warp_lanes - 1) / warp_lanes;
  for (int64_t task = int64_t(blockIdx.x) * warps_per_block + warp; task < in.rays * parts;
       task += int64_t(gridDim.x) * warps_per_block) {
    const int64_t r = C > 0 ? task : task / parts;
    const int64_t part = C > 0 ? 0 : task % parts;
    const Ray<S> ray = in.ray(r);
    const bool vector =
        ray.count % samples_per_lane<S> == 0 &&
        aligned<S>(ray.densities, C > 0 ? ray.values : nullptr, ray.t_starts, ray.t_ends, out.weights + ray.first);
    if (vector) {
      forward_ray<S, C, alphas, true>(in, out, ray, r, part, lane, tile, weight_tile);
    } else {
      forward_ray<S, C, alphas, false>(in, out, ray, r, part, lane, tile, weight_tile);
    }
  }
}

}  // namespace composite
}  // namespace mpkernels
