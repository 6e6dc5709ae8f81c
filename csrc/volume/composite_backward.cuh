// The backward kernel of volume compositing. Formulas, shapes and decomposition: composite.cuh.
#pragma once

#include <type_traits>

#include "volume/composite_warp.cuh"

namespace mpkernels {
namespace composite {

template <typename S>
struct Gradients {
  // of the outputs; null where there is none
  const S* values;         // (R, C)
  const S* opacity;        // (R,)
  const S* depth;          // (R,)
  const S* weights;        // (R, S) or (N,)
  int64_t weights_stride;  // elements between dense rays
  // of the inputs; null where not needed
  S* grad_densities;   // (R, S) or (N,), always
  S* grad_values;      // (R, S, C) or (N, C)
  S* grad_t_starts;    // (R, S) or (N,)
  S* grad_t_ends;      // (R, S) or (N,)
  S* grad_background;  // (R, C)
};

// The transmittance in front of a full chunk waits in the first elements of the chunk's grad_densities.
template <typename S, typename T = Compute<S>>
struct Stash {
  S part[sizeof(T) / sizeof(S)];

  static __device__ __forceinline__ void write(S* chunk, T transmittance) {
    Stash stash;
    memcpy(&stash, &transmittance, sizeof(T));
#pragma unroll
    for (int k = 0; k < int(sizeof(T) / sizeof(S)); ++k) chunk[k] = stash.part[k];
  }
  static __device__ __forceinline__ T read(const S* chunk) {
    Stash stash;
#pragma unroll
    for (int k = 0; k < int(sizeof(T) / sizeof(S)); ++k) stash.part[k] = chunk[k];
    T transmittance;
    memcpy(&transmittance, &stash, sizeof(T));
    return transmittance;
  }
};

// Walks forwards over all chunks of a ray in front of the last one that is alive, and notes the transmittance in front
// of each. Returns where that last chunk begins; `carry` becomes the transmittance in front of it.
template <typename S, bool alphas, bool vector, typename T = Compute<S>>
__device__ __forceinline__ int64_t walk_to_last_chunk(const Ray<S>& ray, T early_stop_eps, int lane,
                                                      S* tile,            // (chunk_samples,)
                                                      S* grad_densities,  // (count,)
                                                      T& carry) {
  constexpr int P = samples_per_lane<S>;
  constexpr int chunk = chunk_samples<S>;
  int64_t i = 0;
  for (; i + chunk < ray.count; i += chunk) {
    S densities[P], t_starts[P] = {}, t_ends[P] = {};
    load_chunk<1, vector>(ray.densities + i, chunk, lane, densities);
    if (!alphas) {
      load_chunk<1, vector>(ray.t_starts + i, chunk, lane, t_starts);
      load_chunk<1, vector>(ray.t_ends + i, chunk, lane, t_ends);
    }
    to_lane_order<vector>(tile, lane, densities);
    if (!alphas) {
      to_lane_order<vector>(tile, lane, t_starts);
      to_lane_order<vector>(tile, lane, t_ends);
    }
    Absorption<S> a;
    a.template set<alphas>(densities, t_starts, t_ends);
    T transmittance[P + 1];
    const T behind = transmit(a.alpha, a.passed, carry, lane, transmittance);
    if (find_alive<T, P>(transmittance, behind, early_stop_eps, chunk, lane).stopped) break;
    if (lane == 0) Stash<S>::write(grad_densities + i, carry);
    carry = behind;
  }
  return i;
}

// Any number of channels: adds g_value . c to the gains of a chunk's samples, and writes the gradients of its values.
template <typename S, typename T = Compute<S>>
__device__ __forceinline__ void any_channels(const S* values,        // (samples, C)
                                             const S* ray_gradient,  // (C,)
                                             S* grad_values,         // (samples, C) or null
                                             const T* weights,       // (samples,) shared memory
                                             T* gains,               // (samples,) shared memory
                                             int samples, int64_t channels, int lane) {
  constexpr int unrolled = 4;  // reads in flight
  const int width = lanes_per_sample(channels);
  const int step = warp_lanes / width;
  for (int64_t first_channel = 0; first_channel < channels; first_channel += warp_lanes) {
    const int64_t channel = first_channel + lane % width;
    const bool has_channel = channel < channels;
    const T gradient = has_channel ? to_compute(load(ray_gradient + channel)) : T(0);
    for (int first = 0; first < samples; first += unrolled * step) {
      T product[unrolled];
#pragma unroll
      for (int u = 0; u < unrolled; ++u) {
        const int s = first + u * step + lane / width;
        product[u] = has_channel && s < samples ? gradient * to_compute(load(values + s * channels + channel)) : T(0);
      }
#pragma unroll
      for (int u = 0; u < unrolled; ++u) {
        const int s = first + u * step + lane / width;
        for (int other = width / 2; other > 0; other /= 2) product[u] += __shfl_xor_sync(all_lanes, product[u], other);
        if (s >= samples) continue;
        if (lane % width == 0) gains[s] += product[u];
        if (has_channel && grad_values != nullptr) {
          store_streaming(grad_values + s * channels + channel, to_storage<S>(weights[s] * gradient));
        }
      }
    }
  }
}

// dL/dalpha_i = T_i (G_i - B_i) of the lane's samples. B -> alpha G + passed B of each sample is composed from the far
// end, over the lane and then over the lanes behind it. `far` is B of the chunk's last sample, then of the one in
// front.
template <typename T, int P>
__device__ __forceinline__ void alpha_gradients(const T (&alpha)[P], const T (&passed)[P],
                                                const T (&transmittance)[P + 1], const T (&gains)[P], int lane, T& far,
                                                T (&gradients)[P]) {
  T offset = 0, factor = 1;
#pragma unroll
  for (int j = P - 1; j >= 0; --j) {
    offset = alpha[j] * gains[j] + passed[j] * offset;
    factor *= passed[j];
  }
#pragma unroll
  for (int step = 1; step < warp_lanes; step *= 2) {
    const T offset_behind = __shfl_down_sync(all_lanes, offset, step);
    const T factor_behind = __shfl_down_sync(all_lanes, factor, step);
    if (lane + step < warp_lanes) {
      offset += factor * offset_behind;
      factor *= factor_behind;
    }
  }
  const T in_front = offset + factor * far;  // B in front of the lane
  const T next_lane = __shfl_down_sync(all_lanes, in_front, 1);
  T b = lane == warp_lanes - 1 ? far : next_lane;
  far = __shfl_sync(all_lanes, in_front, 0);
#pragma unroll
  for (int j = P - 1; j >= 0; --j) {
    gradients[j] = transmittance[j] * (gains[j] - b);
    b = alpha[j] * gains[j] + passed[j] * b;
  }
}

// dL/d(sigma_i delta_i) = T_{i+1} G_i - sum_{j>i} w_j G_j of the lane's samples. `far` is the sum behind the chunk,
// then the sum of the chunk too.
template <typename T, int P>
__device__ __forceinline__ void optical_depth_gradients(const T (&weight)[P], const T (&transmittance)[P + 1],
                                                        const T (&gains)[P], int lane, T& far, T (&gradients)[P]) {
  T sum = 0;
#pragma unroll
  for (int j = P - 1; j >= 0; --j) sum += weight[j] * gains[j];
#pragma unroll
  for (int step = 1; step < warp_lanes; step *= 2) {
    const T sum_behind = __shfl_down_sync(all_lanes, sum, step);
    if (lane + step < warp_lanes) sum += sum_behind;
  }
  const T next_lane = __shfl_down_sync(all_lanes, sum, 1);
  T behind = lane == warp_lanes - 1 ? far : far + next_lane;
  far += __shfl_sync(all_lanes, sum, 0);
#pragma unroll
  for (int j = P - 1; j >= 0; --j) {
    gradients[j] = transmittance[j + 1] * gains[j] - behind;
    behind += weight[j] * gains[j];
  }
}

// What every weight of a ray gains through opacity and background, the factor of its position, and the gradient of the
// ray's C values. They are read before the chunks, lane by lane, and spread by shuffles inside the loop over the
// chunks: reads of the first chunk do not wait for these.
template <typename S, int C, typename T = Compute<S>>
struct RayConstants {
  S gradient = to_storage<S>(0);    // lane c: of channel c; lane C: of opacity; lane C + 1: of depth
  S background = to_storage<S>(0);  // lane c: of channel c
  T through_background = 0;         // of the general path

  __device__ __forceinline__ RayConstants(const Rays<S>& in, const Gradients<S>& g,
                                          const S* ray_gradient,  // (C,) or null
                                          int64_t r, int lane) {
    const S* mine = nullptr;
    if (lane < C && ray_gradient != nullptr) mine = ray_gradient + lane;
    if (lane == C && g.opacity != nullptr) mine = g.opacity + r;
    if (lane == C + 1 && g.depth != nullptr) mine = g.depth + r;
    if (mine != nullptr) gradient = load(mine);
    const S* ray_background = in.ray_background(r);
    if (ray_background == nullptr || ray_gradient == nullptr) return;
    if (lane < C) background = load(ray_background + lane);
    if constexpr (C == 0) {
      for (int64_t c = lane; c < in.channels; c += warp_lanes) {
        through_background += to_compute(load(ray_gradient + c)) * to_compute(load(ray_background + c));
      }
      through_background = sum_over_lanes(through_background);
    }
  }

  __device__ __forceinline__ void get(T& gain, T& gain_depth, T (&gradients)[C > 0 ? C : 1]) const {
    gain = of_lane(gradient, C) - through_background;
    gain_depth = of_lane(gradient, C + 1);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      gradients[c] = of_lane(gradient, c);
      gain -= gradients[c] * of_lane(background, c);
    }
  }

 private:
  static __device__ __forceinline__ T of_lane(S x, int lane) {
    if constexpr (sizeof(S) == 2) {
      unsigned short bits;
      memcpy(&bits, &x, sizeof(S));
      bits = static_cast<unsigned short>(__shfl_sync(all_lanes, static_cast<unsigned>(bits), lane));
      memcpy(&x, &bits, sizeof(S));
      return to_compute(x);
    } else {
      return to_compute(__shfl_sync(all_lanes, x, lane));
    }
  }
};

template <typename S, int C, bool alphas, bool vector, typename T = Compute<S>>
__device__ __forceinline__ void backward_ray(const Rays<S>& in, const Gradients<S>& g, const Ray<S>& ray,
                                             const S* ray_grad_weights,  // (count,) or null
                                             int64_t r, int lane,
                                             S* tile,         // (chunk_samples, C) shared memory
                                             T* weight_tile,  // (chunk_samples,) shared memory, of the general path
                                             T* gain_tile) {  // likewise
  constexpr int P = samples_per_lane<S>;
  constexpr int chunk = chunk_samples<S>;
  constexpr int tile_channels = C > 0 ? C : 1;
  const int64_t channels = C > 0 ? C : in.channels;

  const S* ray_gradient = g.values == nullptr ? nullptr : g.values + r * channels;  // (C,)
  const RayConstants<S, C> constants(in, g, ray_gradient, r, lane);

  T carry = 1;
  int64_t i =
      walk_to_last_chunk<S, alphas, vector>(ray, in.early_stop_eps, lane, tile, g.grad_densities + ray.first, carry);
  // the chunks behind an early stop
  const int64_t dead = ray.first + min(i + chunk, ray.count);
  const int64_t end = ray.first + ray.count;
  if (dead < end) {
    store_zeros(g.grad_densities, dead, end, lane);
    if (g.grad_values != nullptr) store_zeros(g.grad_values, dead * channels, end * channels, lane);
    if (g.grad_t_starts != nullptr) store_zeros(g.grad_t_starts, dead, end, lane);
    if (g.grad_t_ends != nullptr) store_zeros(g.grad_t_ends, dead, end, lane);
  }

  T opacity = 0;
  T far = 0;  // behind the chunk: the sum of w G, or B
  bool is_last = true;
  for (i = ray.count > 0 ? i : -1; i >= 0; i -= chunk) {
    const int64_t at = ray.first + i;
    const int samples = samples_of_chunk<S>(ray.count - i);
    S densities[P], t_starts[P], t_ends[P] = {}, grad_weights[P] = {}, colors[P * tile_channels];
    load_chunk<1, vector>(ray.densities + i, samples, lane, densities);
    load_chunk<1, vector>(ray.t_starts + i, samples, lane, t_starts);
    if (!alphas) load_chunk<1, vector>(ray.t_ends + i, samples, lane, t_ends);
    if (C > 0) load_chunk<tile_channels, vector>(ray.values + i * C, samples * C, lane, colors);
    if (ray_grad_weights != nullptr) load_chunk<1, vector>(ray_grad_weights + i, samples, lane, grad_weights);
    if (!is_last) carry = __shfl_sync(all_lanes, lane == 0 ? Stash<S>::read(g.grad_densities + at) : T(0), 0);
    is_last = false;
    to_lane_order<vector>(tile, lane, densities);
    to_lane_order<vector>(tile, lane, t_starts);
    if (!alphas) to_lane_order<vector>(tile, lane, t_ends);
    if (ray_grad_weights != nullptr) to_lane_order<vector>(tile, lane, grad_weights);
    if (C > 0) write_tile<tile_channels, vector>(tile, lane, colors);  // read back when the scan is done

    Absorption<S> a;
    a.template set<alphas>(densities, t_starts, t_ends);
    T gain, gain_depth, gradient[tile_channels];
    constants.get(gain, gain_depth, gradient);
    T transmittance[P + 1], weight[P], gains[P];
    const T behind = transmit(a.alpha, a.passed, carry, lane, transmittance);
    const Alive alive = find_alive<T, P>(transmittance, behind, in.early_stop_eps, samples, lane);
    const int here = min(alive.here, max(0, samples - lane * P));
    if (C > 0) read_tile<tile_channels>(tile, lane, colors);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      weight[j] = transmittance[j] * a.alpha[j];
      gains[j] = gain + gain_depth * a.position[j] + to_compute(grad_weights[j]);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (g.values != nullptr) gains[j] += gradient[c] * to_compute(colors[j * C + c]);
      }
    }
    if (here < P) {  // dead samples may hold anything: nothing of theirs is multiplied
#pragma unroll
      for (int j = 0; j < P; ++j) {
        if (j < here) continue;
        a.alpha[j] = 0;
        a.passed[j] = 1;
        weight[j] = 0;
        gains[j] = 0;
      }
    }
#pragma unroll
    for (int j = 0; j < P; ++j) opacity += weight[j];

    if constexpr (C > 0) {
      if (g.grad_values != nullptr) {
        T grad_values[P * C];
#pragma unroll
        for (int j = 0; j < P; ++j) {
#pragma unroll
          for (int c = 0; c < C; ++c) grad_values[j * C + c] = j < here ? weight[j] * gradient[c] : T(0);
        }
        store_chunk<C, vector>(g.grad_values + at * C, samples * C, lane, tile, grad_values);
      }
    } else {
      S* grad_values = g.grad_values == nullptr ? nullptr : g.grad_values + at * channels;
      int written = 0;
      if (ray_gradient != nullptr) {
        written = alive.in_chunk;
        __syncwarp();  // the tiles have been read by all lanes
#pragma unroll
        for (int j = 0; j < P; ++j) {
          weight_tile[lane * P + j] = weight[j];
          gain_tile[lane * P + j] = gains[j];
        }
        __syncwarp();
        any_channels(ray.values + i * channels, ray_gradient, grad_values, weight_tile, gain_tile, written, channels,
                     lane);
        __syncwarp();
#pragma unroll
        for (int j = 0; j < P; ++j) gains[j] = gain_tile[lane * P + j];
      }
      if (grad_values != nullptr) store_zeros(grad_values, written * channels, samples * channels, lane);
    }

    T gradients[P];  // to alphas or optical depths
    if constexpr (alphas) {
      alpha_gradients<T, P>(a.alpha, a.passed, transmittance, gains, lane, far, gradients);
    } else {
      optical_depth_gradients<T, P>(weight, transmittance, gains, lane, far, gradients);
    }
    T grad_densities[P];
#pragma unroll
    for (int j = 0; j < P; ++j)
      grad_densities[j] = j < here ? (alphas ? gradients[j] : a.delta[j] * gradients[j]) : T(0);
    store_chunk<1, vector>(g.grad_densities + at, samples, lane, tile, grad_densities);
    if (g.grad_t_starts != nullptr) {
      T grad_starts[P], grad_ends[P];
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const T of_position = j < here ? weight[j] * gain_depth : T(0);
        const T along = !alphas && j < here ? a.density[j] * gradients[j] : T(0);
        grad_starts[j] = alphas ? of_position : of_position * T(0.5) - along;
        grad_ends[j] = of_position * T(0.5) + along;
      }
      store_chunk<1, vector>(g.grad_t_starts + at, samples, lane, tile, grad_starts);
      if (!alphas) store_chunk<1, vector>(g.grad_t_ends + at, samples, lane, tile, grad_ends);
    }
  }

  if (g.grad_background != nullptr) {
    const T seen = 1 - sum_over_lanes(opacity);
    if constexpr (C > 0) {
      if (lane < C) g.grad_background[r * C + lane] = to_storage<S>(seen * to_compute(constants.gradient));
    } else {
      for (int64_t c = lane; c < channels; c += warp_lanes) {
        const T gradient = ray_gradient == nullptr ? T(0) : to_compute(load(ray_gradient + c));
        g.grad_background[r * channels + c] = to_storage<S>(seen * gradient);
      }
    }
  }
}

// C: the number of channels where it is compiled in, 0 for any number.
template <typename S, int C, bool alphas>
__global__ void __launch_bounds__(threads_per_block, backward_blocks<S>)
    composite_backward_kernel(const Rays<S> in,        // (R, S) or (N,), see Rays
                              const Gradients<S> g) {  // of outputs and of inputs, see Gradients
  using T = Compute<S>;
  constexpr int chunk = chunk_samples<S>;
  __shared__ __align__(16) unsigned char tiles[warps_per_block][chunk * (C > 0 ? C : 1) * sizeof(S)];
  __shared__ T sample_tiles[C > 0 ? 1 : warps_per_block][2][C > 0 ? 1 : chunk];  // weights and gains
  const int warp = threadIdx.x / warp_lanes;
  const int lane = threadIdx.x % warp_lanes;
  S* tile = reinterpret_cast<S*>(tiles[warp]);
  T* weight_tile = sample_tiles[C > 0 ? 0 : warp][0];
  T* gain_tile = sample_tiles[C > 0 ? 0 : warp][1];

  for (int64_t r = int64_t(blockIdx.x) * warps_per_block + warp; r < in.rays;
       r += int64_t(gridDim.x) * warps_per_block) {
    const Ray<S> ray = in.ray(r);
    const S* grad_weights =
        g.weights == nullptr ? nullptr : g.weights + (in.packed_info == nullptr ? r * g.weights_stride : ray.first);
    const auto from_first = [&](S* gradient, int64_t elements) {
      return gradient == nullptr ? nullptr : gradient + ray.first * elements;
    };
    const bool vector = ray.count % samples_per_lane<S> == 0 &&
                        aligned<S>(ray.densities, C > 0 ? ray.values : nullptr, ray.t_starts, ray.t_ends, grad_weights,
                                   from_first(g.grad_densities, 1), from_first(C > 0 ? g.grad_values : nullptr, C),
                                   from_first(g.grad_t_starts, 1), from_first(g.grad_t_ends, 1));
    if (vector) {
      backward_ray<S, C, alphas, true>(in, g, ray, grad_weights, r, lane, tile, weight_tile, gain_tile);
    } else {
      backward_ray<S, C, alphas, false>(in, g, ray, grad_weights, r, lane, tile, weight_tile, gain_tile);
    }
  }
}

}  // namespace composite
}  // namespace mpkernels
