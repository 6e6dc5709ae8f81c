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

// Blocks of a multiprocessor at a time, which bounds a thread's registers to 64, 80 and 128, none of them spilled.
// Shared memory (50 KB a block for RGB in float32) allows 4 on an H100 and 3 on an A100.
template <typename T, int C>
constexpr int backward_blocks = sizeof(T) == 8 ? 2 : (C == 1 || C == 3 ? 4 : 3);

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
  T* rows;         // (parts, entries, values); only rows with a key are written
  uint32_t* keys;  // (parts, entries) zeros, which become 1 + the Gaussian where it is drawn; null: they stand already
  bool geometric;  // whether a row begins with its geometric sums
  bool absolute;   // whether those of |dL/dmean2d| follow
  int64_t first_channel;
  int channels;  // at the end of a row; all of them where their number is compiled in

  MPKERNELS_HOST_DEVICE int values() const {
    return (geometric ? geometric_sums : 0) + (absolute ? absolute_sums : 0) + channels;
  }
};

// Of an entry on a pixel.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T v;
  T weight;  // T alpha; 0 where it is not drawn
};

// The pixel's place among the gradients of a patch: lanes of different shares meet no bank conflicts.
template <typename T>
__device__ __forceinline__ int gradient_at(int pixel) {
  return pixel + pixel / pair_entries<T>;
}
template <typename T>
constexpr int gradients_of_patch = warp_lanes + warp_lanes / pair_entries<T>;

template <typename T, int C>
size_t backward_shared_bytes(int warps, int values) {
  const size_t of_warp = warp_lanes * pair_stride<T> * sizeof(Pair<T>) +
                         (C > 0 ? gradients_of_patch<T> * sizeof(Color<T, C>) : 0) + values * sum_stride * sizeof(T);
  return sizeof(Staged<T, C, batch>) + warps * of_warp + most_warps * sizeof(unsigned);
}

// The pairs of entries with the pixels of one patch, and all that a warp needs to sum them. Lane = pixel writes them,
// lane = (entry, pixels of a share) reads them.
template <typename T, int C>
struct Patch {
  Pair<T>* pairs;              // (32 pixels, pair_stride)
  Color<T, C>* gradients;      // (gradients_of_patch,) dL/dcolors
  T* sums;                     // (values, sum_stride)
  const T* rows_of_gradients;  // (I, H, W, D) dL/dcolors, where C = 0
  T x, y;                      // centre of the lane's pixel
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
    const T left = center.x - (patch.x - T(lane % patch_width));
    const T top = center.y - (patch.y - T(lane / patch_width));
    constexpr int together = 4;  // pixels; more take too many registers
#pragma unroll 1
    for (int first = first_pixel; first < first_pixel + E; first += together) {
      const T dx_of_first = left - T(first % patch_width);
      const T dy = top - T(first / patch_width);
#pragma unroll
      for (int i = 0; i < together; ++i) {
        const int pixel = first + i;
        const Pair<T> pair = patch.pairs[pixel * pair_stride<T> + entry];
        const T dx = dx_of_first - T(i);
        const T here_dx = pair.v * dx, here_dy = pair.v * dy;
        v += pair.v;
        v_dx += here_dx;
        v_dy += here_dy;
        v_dxx += here_dx * dx;
        v_dxy += here_dx * dy;
        v_dyy += here_dy * dy;
        if (out.absolute) {
          absolute_x += fabs(2 * shape.a * here_dx + shape.b * here_dy);
          absolute_y += fabs(shape.b * here_dx + 2 * shape.c * here_dy);
        }
        if constexpr (C > 0) {
          const Color<T, C> gradient = patch.gradients[gradient_at<T>(pixel)];
#pragma unroll
          for (int c = 0; c < C; ++c) {
            // gradients of a pixel that it is not drawn on may be anything
            if (pair.weight != 0) color[c] += pair.weight * gradient.channel[c];
          }
        }
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
        const T weight = patch.pairs[pixel * pair_stride<T> + entry].weight;
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

// Where C = 0: g . c of the lane's pixel with each of the entries, left in the pairs' v.
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
  for (int e = 0; e < E; ++e) patch.pairs[lane * pair_stride<T> + e].v = product[e];
}

// C: the number of channels where it is compiled in; 0 for any number.
template <typename T, int C>
__global__ void __launch_bounds__(most_threads, backward_blocks<T, C>)
    rasterize_backward_kernel(const Gaussians<T> gaussians,  // M of them, see Gaussians
                              const Tiles tiles,             // I images of tiles, see Tiles
                              const PixelGradients<T> in,    // (I, H, W, ...), see PixelGradients
                              const Rows<T> out,             // (parts, entries, values), see Rows
                              int64_t first_task) {          // (tile, part) of block 0
  constexpr int E = pair_entries<T>;
  using Stage = Staged<T, C, batch>;
  const int threads = blockDim.x;
  const int warps = threads / warp_lanes;
  const int warp = threadIdx.x / warp_lanes;
  const int lane = threadIdx.x % warp_lanes;
  const int values = out.values();

  MPKERNELS_DYNAMIC_SHARED(unsigned char, memory);
  Stage& staged = *reinterpret_cast<Stage*>(memory);
  unsigned char* unused = memory + sizeof(Stage);
  Patch<T, C> patch;
  patch.pairs = reinterpret_cast<Pair<T>*>(unused) + warp * warp_lanes * pair_stride<T>;
  unused += warps * warp_lanes * pair_stride<T> * sizeof(Pair<T>);
  if constexpr (C > 0) {
    patch.gradients = reinterpret_cast<Color<T, C>*>(unused) + warp * gradients_of_patch<T>;
    unused += warps * gradients_of_patch<T> * sizeof(Color<T, C>);
  }
  const T* sums_of_warps = reinterpret_cast<const T*>(unused);
  patch.sums = reinterpret_cast<T*>(unused) + warp * values * sum_stride;
  unused += warps * values * sum_stride * sizeof(T);
  unsigned* of_warps = reinterpret_cast<unsigned*>(unused);  // (most_warps,)

  const int64_t task = first_task + blockIdx.x;
  const Part part(tiles, task / tiles.parts, static_cast<int>(task % tiles.parts));
  patch.x = T(part.x) + T(0.5);
  patch.y = T(part.y) + T(0.5);
  patch.rows_of_gradients = in.colors;
  const PixelsOfPatch pixels{part.pixel - int64_t(lane / patch_width) * tiles.width - lane % patch_width, tiles.width};

  const int32_t last = part.inside ? in.last[part.pixel] : 0;
  const int32_t last_of_warp = __reduce_max_sync(all_lanes, last);
  if (lane == 0) of_warps[warp] = static_cast<unsigned>(last_of_warp);
  __syncthreads();
  int32_t last_of_block = 0;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) last_of_block = max(last_of_block, static_cast<int32_t>(of_warps[w]));
  if (last_of_block == 0) return;

  // The state of the pixel behind the entry that is next, from the end of the list: T, and what lies behind it
  const int64_t channels = C > 0 ? C : gaussians.channels;
  const bool live = last > 0;
  const T* gradient = live && in.colors != nullptr ? in.colors + part.pixel * channels : nullptr;
  const T* background = in.backgrounds == nullptr ? nullptr : in.backgrounds + part.image * channels;
  T transmittance = live ? in.transmittances[part.pixel] : T(1);
  T behind = live && in.alphas != nullptr ? -in.alphas[part.pixel] : T(0);
  Color<T, C> g{};
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (gradient != nullptr) g.channel[c] = gradient[c];
    if (background != nullptr) behind += g.channel[c] * background[c];
  }
  if constexpr (C > 0) patch.gradients[gradient_at<T>(lane)] = g;
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
        T opacity;
        Pair<T> pair{0, 0};
        if (first + i < last && is_seen(staged.shapes[i], center.x - patch.x, center.y - patch.y, opacity)) {
          const T alpha = min(opacity, alpha_max<T>);
          const T factor = inverse(1 - alpha);
          transmittance *= factor;
          pair.weight = alpha * transmittance;
          T gain = 0;
          if constexpr (C > 0) {
            const Color<T, C> color = staged.colors[i];
#pragma unroll
            for (int c = 0; c < C; ++c) gain += g.channel[c] * color.channel[c];
          } else if (out.geometric) {
            gain = patch.pairs[lane * pair_stride<T> + e].v;
          }
          if (opacity <= alpha_max<T>) pair.v = opacity * (transmittance * gain - behind * factor);
          behind += pair.weight * gain;
          drawn |= 1u << e;
        }
        patch.pairs[lane * pair_stride<T> + e] = pair;
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
#pragma unroll 4
    for (int w = 0; w < warps; ++w) drawn |= of_warps[w];
    const int64_t row = part.first_patch / most_warps * tiles.entries + part.begin + first;
#pragma unroll 1
    for (int at = threadIdx.x; at < batch * values; at += threads) {
      const int entry = at / values, value = at % values;
      if (!(drawn >> entry & 1)) continue;
      T sum = 0;
#pragma unroll 4
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
