// The backward kernel of rasterize: one row of sums for each entry of the lists. Formulas, shapes and decomposition:
// rasterize.cuh.
#pragma once

#include "splatting/rasterize_tile.cuh"

namespace mpkernels {
namespace rasterize {

constexpr int batch = warp_lanes;  // entries of a list between two barriers

// Entries whose pairs with a patch's pixels a warp keeps in shared memory at a time.
template <typename T>
constexpr int pair_entries = 64 / sizeof(T);
// One more, so that neither a lane a pixel nor a lane an entry meets bank conflicts.
template <typename T>
constexpr int pair_stride = pair_entries<T> + 1;
constexpr int sum_stride = batch + 1;  // likewise

// Places in a row: of v = alpha dL/dalpha and its moments, of |dL/dmean2d|, and of the colors behind them.
constexpr int of_v = 0, of_v_dx = 1, of_v_dy = 2, of_v_dxx = 3, of_v_dxy = 4, of_v_dyy = 5;
constexpr int geometric_sums = 6, absolute_sums = 2;
constexpr int channels_together = 4;  // where their number is not compiled in

template <typename T>
struct PixelGradients {
  const T* colors;          // (I, H, W, D) dL/dcolors, or null
  const T* alphas;          // (I, H, W) dL/dalphas, or null
  const T* backgrounds;     // (I, D) or null
  const T* transmittances;  // (I, H, W) of the forward
  const int32_t* last;      // (I, H, W) of the forward
};

template <typename T>
struct Rows {
  T* rows;  // (parts, entries, values); only rows with a key are written
  uint32_t*
      keys;  // (parts, entries) zeros, which become 1 + the Gaussian where it is drawn; or null: they stand already
  bool geometric;  // whether a row begins with its geometric sums
  bool absolute;   // whether those of |dL/dmean2d| follow
  int64_t first_channel;
  int channels;  // at the end of a row; all of them where their number is compiled in

  MPKERNELS_HOST_DEVICE int values() const {
    return (geometric ? geometric_sums : 0) + (absolute ? absolute_sums : 0) + channels;
  }
};

template <typename T, int C>
size_t backward_shared_bytes(int warps, int values) {
  const size_t numbers = warps * (2 * warp_lanes * pair_stride<T> + values * sum_stride + C * warp_lanes);
  return sizeof(Staged<T, C, batch>) + numbers * sizeof(T) + most_warps * sizeof(unsigned);
}

// Entries' v and w = T alpha on the pixels of one patch, and all that a warp needs to sum them. Lane = pixel writes
// them, lane = (entry, pixels of a share) reads them.
template <typename T, int C>
struct Patch {
  T* v;                        // (32 pixels, pair_stride)
  T* w;                        // (32 pixels, pair_stride)
  T* sums;                     // (values, sum_stride)
  T* gradients;                // (C, 32 pixels) dL/dcolors
  const T* rows_of_gradients;  // (I, H, W, D) dL/dcolors, where C = 0
  T left, top;                 // centre of the first pixel
};

template <typename T>
__device__ __forceinline__ T sum_of_shares(T x) {
#pragma unroll
  for (int step = pair_entries<T>; step < warp_lanes; step *= 2) x += __shfl_xor_sync(all_lanes, x, step);
  return x;
}

// Phase 2: sums over the pixels of the patch, for `drawn` entries among those from first_entry.
template <typename T, int C>
__device__ __forceinline__ void sum_pairs(const Patch<T, C>& patch, const Staged<T, C, batch>& staged,
                                          const Rows<T>& out, unsigned drawn, int first_entry, int lane) {
  constexpr int E = pair_entries<T>;
  constexpr int colors = C > 0 ? C : 1;
  const int entry = lane % E;
  const int first_pixel = lane / E * E;
  const bool mine = drawn >> entry & 1;
  T v = 0, v_dx = 0, v_dy = 0, v_dxx = 0, v_dxy = 0, v_dyy = 0, absolute_x = 0, absolute_y = 0;
  T color[colors] = {};
  if (mine && (C > 0 || out.geometric)) {
    const Center<T> center = staged.centers[first_entry + entry];
    const Shape<T> shape = staged.shapes[first_entry + entry];
#pragma unroll
    for (int row = 0; row < E / patch_width; ++row) {
      const T dy = center.y - (patch.top + T(first_pixel / patch_width + row));
#pragma unroll
      for (int column = 0; column < patch_width; ++column) {
        const int pixel = first_pixel + row * patch_width + column;
        const T weight = patch.w[pixel * pair_stride<T> + entry];
        if (weight == 0) continue;  // not drawn here: nothing of it is multiplied
        const T here = patch.v[pixel * pair_stride<T> + entry];
        const T dx = center.x - (patch.left + T(column));
        const T here_dx = here * dx, here_dy = here * dy;
        v += here;
        v_dx += here_dx;
        v_dy += here_dy;
        v_dxx += here_dx * dx;
        v_dxy += here_dx * dy;
        v_dyy += here_dy * dy;
        if (out.absolute) {
          absolute_x += fabs(2 * shape.a * here_dx + shape.b * here_dy);
          absolute_y += fabs(shape.b * here_dx + 2 * shape.c * here_dy);
        }
#pragma unroll
        for (int c = 0; c < C; ++c) color[c] += weight * patch.gradients[c * warp_lanes + pixel];
      }
    }
  }
  const bool writes = mine && first_pixel == 0;
  T* sums = patch.sums + first_entry + entry;
  const auto write = [&](T x) {
    x = sum_of_shares(x);
    if (writes) *sums = x;
    sums += sum_stride;
  };
  if (out.geometric) {
    write(v);
    write(v_dx);
    write(v_dy);
    write(v_dxx);
    write(v_dxy);
    write(v_dyy);
  }
  if (out.absolute) {
    write(absolute_x);
    write(absolute_y);
  }
#pragma unroll
  for (int c = 0; c < C; ++c) write(color[c]);
}

// dL/dcolors of a patch's pixel q, in (I, H, W, D).
struct PixelsOfPatch {
  int64_t first;  // pixel of lane 0
  int width;
  __device__ __forceinline__ int64_t operator()(int q) const {
    return first + int64_t(q / patch_width) * width + q % patch_width;
  }
};

// Where C = 0: sums of the colors of out.channels channels.
template <typename T>
__device__ __forceinline__ void sum_color_pairs(const Patch<T, 0>& patch, const Rows<T>& out,
                                                const PixelsOfPatch& pixels, int64_t channels, unsigned drawn,
                                                int first_entry, int lane) {
  constexpr int E = pair_entries<T>;
  const int entry = lane % E;
  const int first_pixel = lane / E * E;
  const bool mine = drawn >> entry & 1;
  T* sums = patch.sums + (out.values() - out.channels) * sum_stride + first_entry + entry;
  for (int first = 0; first < out.channels; first += channels_together) {
    const int count = min(channels_together, out.channels - first);
    T color[channels_together] = {};
    if (mine && patch.rows_of_gradients != nullptr) {
      for (int pixel = first_pixel; pixel < first_pixel + E; ++pixel) {
        const T weight = patch.w[pixel * pair_stride<T> + entry];
        if (weight == 0) continue;
        const T* gradient = patch.rows_of_gradients + pixels(pixel) * channels + out.first_channel + first;
#pragma unroll
        for (int c = 0; c < channels_together; ++c) {
          if (c < count) color[c] += weight * gradient[c];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < channels_together; ++c) {
      const T sum = sum_of_shares(color[c]);
      if (c < count && mine && first_pixel == 0) sums[(first + c) * sum_stride] = sum;
    }
  }
}

// Where C = 0: g . c of the lane's pixel with each of the entries, left in patch.v.
template <typename T>
__device__ __forceinline__ void color_products(const Patch<T, 0>& patch, const Staged<T, 0, batch>& staged,
                                               const Gaussians<T>& gaussians, const T* gradient,  // (D,) or null
                                               unsigned reaching, int first_entry, int lane) {
  constexpr int E = pair_entries<T>;
  T product[E] = {};
  for (int64_t first = 0; first < gaussians.channels; first += channels_together) {
    T g[channels_together];
#pragma unroll
    for (int c = 0; c < channels_together; ++c) {
      g[c] = gradient != nullptr && first + c < gaussians.channels ? gradient[first + c] : T(0);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (!(reaching >> e & 1)) continue;
      const T* color = gaussians.colors + staged.ids[first_entry + e] * gaussians.channels + first;
#pragma unroll
      for (int c = 0; c < channels_together; ++c) {
        if (first + c < gaussians.channels) product[e] += g[c] * color[c];
      }
    }
  }
#pragma unroll
  for (int e = 0; e < E; ++e) patch.v[lane * pair_stride<T> + e] = product[e];
}

// C: the number of channels where it is compiled in; 0 for any number.
template <typename T, int C>
__global__ void __launch_bounds__(most_threads)
    rasterize_backward_kernel(const Gaussians<T> gaussians,  // M of them, see Gaussians
                              const Tiles tiles,             // I images of tiles, see Tiles
                              const PixelGradients<T> in,    // (I, H, W, ...), see PixelGradients
                              const Rows<T> out,             // (parts, entries, values), see Rows
                              int64_t first_task) {          // (tile, part) of block 0
  constexpr int E = pair_entries<T>;
  constexpr int colors = C > 0 ? C : 1;
  using Stage = Staged<T, C, batch>;
  const int threads = blockDim.x;
  const int warps = threads / warp_lanes;
  const int warp = threadIdx.x / warp_lanes;
  const int lane = threadIdx.x % warp_lanes;
  const int values = out.values();

  MPKERNELS_DYNAMIC_SHARED(unsigned char, memory);
  Stage& staged = *reinterpret_cast<Stage*>(memory);
  T* numbers = reinterpret_cast<T*>(memory + sizeof(Stage));
  Patch<T, C> patch;
  patch.v = numbers + warp * warp_lanes * pair_stride<T>;
  numbers += warps * warp_lanes * pair_stride<T>;
  patch.w = numbers + warp * warp_lanes * pair_stride<T>;
  numbers += warps * warp_lanes * pair_stride<T>;
  const T* sums_of_warps = numbers;
  patch.sums = numbers + warp * values * sum_stride;
  numbers += warps * values * sum_stride;
  patch.gradients = numbers + warp * C * warp_lanes;
  numbers += warps * C * warp_lanes;
  unsigned* of_warps = reinterpret_cast<unsigned*>(numbers);  // (most_warps,)

  const int64_t task = first_task + blockIdx.x;
  const int part_of_tile = static_cast<int>(task % tiles.parts);
  const Part part(tiles, task / tiles.parts, part_of_tile);
  const T x = T(part.x) + T(0.5), y = T(part.y) + T(0.5);
  patch.left = T(part.x - lane % patch_width) + T(0.5);
  patch.top = T(part.y - lane / patch_width) + T(0.5);
  patch.rows_of_gradients = in.colors;
  const PixelsOfPatch pixels{part.pixel - int64_t(lane / patch_width) * tiles.width - lane % patch_width, tiles.width};

  const int32_t last = part.inside ? in.last[part.pixel] : 0;
  const int32_t last_of_warp = __reduce_max_sync(all_lanes, last);
  if (lane == 0) of_warps[warp] = static_cast<unsigned>(last_of_warp);
  __syncthreads();
  int32_t last_of_block = 0;
  for (int w = 0; w < warps; ++w) last_of_block = max(last_of_block, static_cast<int32_t>(of_warps[w]));
  if (last_of_block == 0) return;

  // The state of the pixel behind the entry that is next, from the end of the list: T, and what lies behind it
  const int64_t channels = C > 0 ? C : gaussians.channels;
  const bool live = last > 0;
  const T* gradient = live && in.colors != nullptr ? in.colors + part.pixel * channels : nullptr;
  const T* background = in.backgrounds == nullptr ? nullptr : in.backgrounds + part.image * channels;
  T transmittance = live ? in.transmittances[part.pixel] : T(1);
  T behind = live && in.alphas != nullptr ? -in.alphas[part.pixel] : T(0);
  T g[colors] = {};
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (gradient != nullptr) g[c] = gradient[c];
    patch.gradients[c * warp_lanes + lane] = g[c];
    if (background != nullptr) behind += g[c] * background[c];
  }
  if (C == 0 && gradient != nullptr && background != nullptr) {
    for (int64_t c = 0; c < channels; ++c) behind += gradient[c] * background[c];
  }
  behind *= transmittance;

  for (int first = (last_of_block - 1) / batch * batch; first >= 0; first -= batch) {
    if (int(threadIdx.x) < batch && first + int(threadIdx.x) < last_of_block) {
      staged.stage(threadIdx.x, gaussians, tiles, part, part.begin + first + threadIdx.x, 0);
    }
    __syncthreads();  // and the sums of the batch before have been read
    const bool reaches = first + lane < last_of_warp && (staged.touched[lane] >> warp & 1);
    const unsigned reaching = __ballot_sync(all_lanes, reaches);
    unsigned drawn_by_warp = 0;
    for (int first_entry = batch - E; first_entry >= 0; first_entry -= E) {
      unsigned left = reaching >> first_entry & ((1u << E) - 1);
      if (left == 0) continue;
      if constexpr (C == 0) {
        if (out.geometric) color_products(patch, staged, gaussians, gradient, left, first_entry, lane);
      }
      // Phase 1: a lane a pixel, back to front
      unsigned drawn = 0;
      while (left != 0) {
        const int e = 31 - __clz(left);
        left ^= 1u << e;
        const int i = first_entry + e;
        const Center<T> center = staged.centers[i];
        T opacity, v = 0, weight = 0;
        if (first + i < last && is_seen(staged.shapes[i], center.x - x, center.y - y, opacity)) {
          const T alpha = min(opacity, alpha_max<T>);
          const T factor = inverse(1 - alpha);
          transmittance *= factor;
          weight = alpha * transmittance;
          T gain = 0;
          if constexpr (C == 0) {
            if (out.geometric) gain = patch.v[lane * pair_stride<T> + e];
          }
#pragma unroll
          for (int c = 0; c < C; ++c) gain += g[c] * staged.colors[i * C + c];
          if (opacity <= alpha_max<T>) v = opacity * (transmittance * gain - behind * factor);
          behind += weight * gain;
          drawn |= 1u << e;
        }
        patch.v[lane * pair_stride<T> + e] = v;
        patch.w[lane * pair_stride<T> + e] = weight;
      }
      drawn = __reduce_or_sync(all_lanes, drawn);
      if (drawn == 0) continue;
      __syncwarp();  // all pairs are written
      sum_pairs(patch, staged, out, drawn, first_entry, lane);
      if constexpr (C == 0) sum_color_pairs(patch, out, pixels, channels, drawn, first_entry, lane);
      __syncwarp();  // all pairs are read
      drawn_by_warp |= drawn << first_entry;
    }
    if (lane == 0) of_warps[warp] = drawn_by_warp;
    __syncthreads();

    // Phase 3: sums of the warps that drew, in their order
    unsigned drawn = 0;
    for (int w = 0; w < warps; ++w) drawn |= of_warps[w];
    const int64_t row = part_of_tile * tiles.entries + part.begin + first;
    for (int at = threadIdx.x; at < batch * values; at += threads) {
      const int entry = at / values, value = at % values;
      if (!(drawn >> entry & 1)) continue;
      T sum = 0;
      for (int w = 0; w < warps; ++w) {
        if (of_warps[w] >> entry & 1) sum += sums_of_warps[(w * values + value) * sum_stride + entry];
      }
      out.rows[(row + entry) * values + value] = sum;
    }
    if (out.keys != nullptr && int(threadIdx.x) < batch && (drawn >> threadIdx.x & 1)) {
      out.keys[row + threadIdx.x] = static_cast<uint32_t>(staged.ids[threadIdx.x]) + 1;
    }
  }
}

}  // namespace rasterize
}  // namespace mpkernels
