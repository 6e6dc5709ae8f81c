// What the forward and the backward kernel of rasterize share: the tile, part and patch that a block and its warps work
// on, and how Gaussians are staged in shared memory. Shapes and decomposition: rasterize.cuh.
#pragma once

#include "common/launch.h"
#include "splatting/rasterize_math.h"

namespace mpkernels {
namespace rasterize {

constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// A warp's pixels: more compact than two rows of 16, so that fewer Gaussians reach into them.
constexpr int patch_width = 8;
constexpr int patch_height = 4;
static_assert(patch_width * patch_height == warp_lanes, "a lane a pixel");

constexpr int most_warps = 8;  // patches of a block
constexpr int most_threads = most_warps * warp_lanes;

// Channels taken at a time where their number is not compiled in.
template <typename T>
constexpr int general_channels = 64 / sizeof(T);

constexpr int longest_list = 0x7fffff00;  // places in a list are int, with room for a batch

template <typename T>
struct Gaussians {
  const T* means2d;    // (M, 2)
  const T* conics;     // (M, 3)
  const T* colors;     // (M, D)
  const T* opacities;  // (M,)
  int64_t count;       // M
  int64_t channels;    // D
};

struct Tiles {
  const int64_t* offsets;      // (I, tile_rows, tile_columns): where a tile's list starts in flatten_ids
  const int32_t* flatten_ids;  // (entries,) Gaussians in [0, M), others are ignored
  const bool* masks;           // (I, tile_rows, tile_columns), or null: tiles to draw
  int64_t entries;
  int64_t tiles;  // I * tile_rows * tile_columns
  int width, height;
  int tile_size, tile_rows, tile_columns;
  int patch_columns;  // patches side by side in a tile
  int patches;        // of a tile
  int parts;          // blocks of a tile, each with most_warps patches
};

// The part of a tile that a block draws, and the pixel of a thread.
struct Part {
  int64_t image;
  int64_t begin;    // of the tile's list in flatten_ids
  int length;       // of the list
  int left, top;    // of the tile
  int first_patch;  // of the block, in the tile
  int x, y;         // the thread's pixel
  bool inside;
  int64_t pixel;  // in (I, H, W); only where `inside`

  __device__ __forceinline__ Part(const Tiles& tiles, int64_t tile, int part) {
    const int64_t tiles_of_image = int64_t(tiles.tile_rows) * tiles.tile_columns;
    image = tile / tiles_of_image;
    const int64_t in_image = tile % tiles_of_image;
    left = static_cast<int>(in_image % tiles.tile_columns) * tiles.tile_size;
    top = static_cast<int>(in_image / tiles.tile_columns) * tiles.tile_size;
    // offsets that make no sense must not be read beyond the list
    begin = max(int64_t(0), min(tiles.offsets[tile], tiles.entries));
    const int64_t end = tile + 1 < tiles.tiles ? min(tiles.offsets[tile + 1], tiles.entries) : tiles.entries;
    const bool masked = tiles.masks != nullptr && !tiles.masks[tile];
    length = masked ? 0 : static_cast<int>(max(int64_t(0), min(end - begin, int64_t(longest_list))));
    first_patch = part * most_warps;
    const int warp = threadIdx.x / warp_lanes;
    const int lane = threadIdx.x % warp_lanes;
    const int patch = first_patch + warp;
    const int across = patch % tiles.patch_columns * patch_width + lane % patch_width;
    const int down = patch / tiles.patch_columns * patch_height + lane / patch_width;
    x = left + across;
    y = top + down;
    inside = patch < tiles.patches && across < tiles.tile_size && down < tiles.tile_size && x < tiles.width &&
             y < tiles.height;
    pixel = (image * tiles.height + y) * tiles.width + x;
  }
};

template <typename T>
__device__ __forceinline__ bool finite(T x) {
  return x - x == 0;
}

// Bit w is 0 only if the Gaussian is drawn on no pixel of the block's patch w: the bounding box of the ellipse at
// which alpha is 1/255 misses it. `is_seen` has rounding errors, so the ellipse is taken larger: for a correlation
// below sqrt(1 - 1e-4) the exponent's error is below 1 %, and thinner ellipses get all patches. Gaussians that are
// drawn on no pixel wherever it lies, such as those that are not finite, get none.
template <typename T>
__device__ __forceinline__ unsigned patches_touched(const Center<T>& center, const Shape<T>& shape, const Part& part,
                                                    const Tiles& tiles) {
  const bool sound = finite(center.x) && finite(center.y) && finite(shape.a) && finite(shape.b) && finite(shape.c) &&
                     finite(shape.opacity);
  if (!sound || !(shape.opacity >= alpha_min<T> * T(0.99))) return 0;
  const int patches = min(most_warps, tiles.patches - part.first_patch);
  const unsigned all = (1u << patches) - 1;
  const T product = 4 * shape.a * shape.c;
  const T determinant = product - shape.b * shape.b;
  if (!(shape.a > 0 && determinant > product * T(1e-4))) return all;
  const T most = log2(shape.opacity * 255) * T(1.02) + T(1e-3);
  const T half_width = T(1.01) * sqrt(most * (4 * shape.c / determinant));
  const T half_height = T(1.01) * sqrt(most * (4 * shape.a / determinant));
  unsigned touched = 0;
  int column = part.first_patch % tiles.patch_columns;
  int row = part.first_patch / tiles.patch_columns;
  for (int w = 0; w < patches; ++w) {
    const T x = T(part.left + column * patch_width) + T(0.5);
    const T y = T(part.top + row * patch_height) + T(0.5);
    const bool misses = x - center.x > half_width || center.x - (x + (patch_width - 1)) > half_width ||
                        y - center.y > half_height || center.y - (y + (patch_height - 1)) > half_height;
    if (!misses) touched |= 1u << w;
    if (++column == tiles.patch_columns) {
      column = 0;
      ++row;
    }
  }
  return touched;
}

// K channels, read from shared memory 16 bytes at a time.
template <typename T, int K>
struct alignas(K >= 3 ? 16 : sizeof(T)) Color {
  T channel[K > 0 ? K : 1];
};

// Gaussians in shared memory.
template <typename T, int K, int capacity>
struct Staged {
  Center<T> centers[capacity];
  Shape<T> shapes[capacity];
  Color<T, K> colors[capacity];
  int32_t ids[capacity];
  unsigned char touched[capacity];  // a bit a patch of the block

  // One thread stages one entry of the list, and the colors of K channels from first_channel; those that the Gaussian
  // lacks are 0.
  __device__ __forceinline__ void stage(int at, const Gaussians<T>& gaussians, const Tiles& tiles, const Part& part,
                                        int64_t entry, int64_t first_channel) {
    const int64_t id = tiles.flatten_ids[entry];
    touched[at] = 0;
    if (id < 0 || id >= gaussians.count) return;
    const Center<T> center{gaussians.means2d[2 * id], gaussians.means2d[2 * id + 1]};
    const T* conic = gaussians.conics + 3 * id;
    const Shape<T> shape = scaled_shape(conic[0], conic[1], conic[2], gaussians.opacities[id]);
    centers[at] = center;
    shapes[at] = shape;
    ids[at] = static_cast<int32_t>(id);
    const T* color = gaussians.colors + id * gaussians.channels + first_channel;
#pragma unroll
    for (int c = 0; c < K; ++c) {
      colors[at].channel[c] = first_channel + c < gaussians.channels ? color[c] : T(0);
    }
    touched[at] = static_cast<unsigned char>(patches_touched(center, shape, part, tiles));
  }
};

}  // namespace rasterize
}  // namespace mpkernels
