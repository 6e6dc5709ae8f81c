// The launcher of rasterize's CUDA kernels: registers mpkernels::rasterize and mpkernels::rasterize_backward for CUDA
// tensors. Compiled as C++ it registers the same launcher for mpkernels_fibres, on CPU tensors, where the kernels run a
// fibre per CUDA thread. Arguments: mpkernels/splatting/rasterize/schema.py.
#include "common/device.h"
#include "splatting/radix_sort.cuh"
#include "splatting/rasterize.cuh"

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace rasterize {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t most_blocks = (int64_t{1} << 31) - 1;

int64_t divided_up(int64_t x, int64_t by) {
  return (x + by - 1) / by;
}

// Blocks for a kernel whose blocks take further work in turn: enough to keep any GPU busy to the end.
unsigned blocks_for(int64_t work, int64_t work_of_block) {
  return static_cast<unsigned>(std::min(divided_up(work, work_of_block), int64_t{1} << 16));
}

template <typename T>
Gaussians<T> gaussians_of(const Tensor& means2d, const Tensor& conics, const Tensor& colors, const Tensor& opacities) {
  return {pointer<T>(means2d),   pointer<T>(conics), pointer<T>(colors),
          pointer<T>(opacities), means2d.size(0),    colors.size(1)};
}

Tiles tiles_of(const OptionalTensor& masks, const Tensor& isect_offsets, const Tensor& flatten_ids, int64_t width,
               int64_t height, int64_t tile_size) {
  constexpr int64_t most_pixels = 1 << 30;  // coordinates are int, and tiles may reach beyond the image
  STD_TORCH_CHECK(0 < width && width <= most_pixels && 0 < height && height <= most_pixels && tile_size > 0,
                  "rasterize: expected an image of 1 to 2^30 pixels a side, got ", width, " x ", height);
  tile_size = std::min(tile_size, std::max(width, height));
  Tiles tiles;
  tiles.offsets = pointer<int64_t>(isect_offsets);
  tiles.flatten_ids = pointer<int32_t>(flatten_ids);
  tiles.masks = pointer<bool>(masks);
  tiles.entries = flatten_ids.size(0);
  tiles.tiles = isect_offsets.numel();
  tiles.width = static_cast<int>(width);
  tiles.height = static_cast<int>(height);
  tiles.tile_size = static_cast<int>(tile_size);
  tiles.tile_rows = static_cast<int>(isect_offsets.size(1));
  tiles.tile_columns = static_cast<int>(isect_offsets.size(2));
  STD_TORCH_CHECK(
      tiles.tile_rows == divided_up(height, tile_size) && tiles.tile_columns == divided_up(width, tile_size),
      "rasterize: isect_offsets has ", tiles.tile_rows, " x ", tiles.tile_columns, " tiles, the image does not");
  tiles.patch_columns = static_cast<int>(divided_up(std::min(tile_size, width), patch_width));
  const int64_t patches = tiles.patch_columns * divided_up(std::min(tile_size, height), patch_height);
  STD_TORCH_CHECK(patches <= most_blocks, "rasterize: tile_size ", tile_size, " is too large");
  tiles.patches = static_cast<int>(patches);
  tiles.parts = static_cast<int>(divided_up(patches, most_warps));
  return tiles;
}

int warps_of_block(const Tiles& tiles) {
  return std::min(tiles.patches, most_warps);
}

// Calls f with a value of the dtype's C++ type and the number of channels where it is compiled in.
template <typename F>
void dispatch(const Tensor& means2d, int64_t channels, const F& f) {
  const auto with_channels = [&](auto element) {
    if (channels == 3) {
      f(element, std::integral_constant<int, 3>{});
    } else if (channels == 1) {
      f(element, std::integral_constant<int, 1>{});
    } else if (channels == 4) {
      f(element, std::integral_constant<int, 4>{});
    } else {
      f(element, std::integral_constant<int, 0>{});
    }
  };
  switch (means2d.scalar_type()) {
    case ScalarType::Float:
      return with_channels(float{});
    case ScalarType::Double:
      return with_channels(double{});
    default:
      STD_TORCH_CHECK(false, "rasterize: no CUDA kernel for this dtype");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& means2d, const Tensor& conics, const Tensor& colors,
                                                   const Tensor& opacities, const OptionalTensor& backgrounds,
                                                   const OptionalTensor& masks, const Tensor& isect_offsets,
                                                   const Tensor& flatten_ids, int64_t width, int64_t height,
                                                   int64_t tile_size) {
  const Device device(means2d);
  const int64_t images = isect_offsets.size(0), channels = colors.size(1);
  Tensor image = empty({images, height, width, channels}, means2d);
  Tensor alphas = empty({images, height, width}, means2d);
  Tensor transmittances = empty({images, height, width}, means2d);
  Tensor last = empty({images, height, width}, means2d, ScalarType::Int);
  const Tiles tiles = tiles_of(masks, isect_offsets, flatten_ids, width, height, tile_size);
  dispatch(means2d, channels, [&](auto element, auto compiled_channels) {
    using T = decltype(element);
    constexpr int C = compiled_channels;
    const Gaussians<T> gaussians = gaussians_of<T>(means2d, conics, colors, opacities);
    const Image<T> out{pointer<T>(image), pointer<T>(alphas), pointer<T>(transmittances), pointer<int32_t>(last)};
    const int64_t groups = C > 0 ? 1 : std::max(int64_t{1}, divided_up(channels, general_channels<T>));
    const int64_t tasks = tiles.tiles * tiles.parts * groups;
    for (int64_t first = 0; first < tasks; first += most_blocks) {
      MPKERNELS_LAUNCH((rasterize_forward_kernel<T, C>), static_cast<unsigned>(std::min(most_blocks, tasks - first)),
                       warps_of_block(tiles) * warp_lanes, 0, device.stream(), gaussians, tiles,
                       pointer<T>(backgrounds), out, first);
    }
  });
  return {image, alphas, transmittances, last};
}

// The gradients of backgrounds, from those of the image's colors.
template <typename T>
void sum_backgrounds(const Device& device, const OptionalTensor& grad_colors, const Tensor& transmittances,
                     const Tensor& gradients) {
  const int64_t images = gradients.size(0), channels = gradients.size(1);
  if (images * channels == 0) return;
  if (!grad_colors.has_value()) {
    device.zero(gradients.data_ptr(), images * channels * sizeof(T));
    return;
  }
  const int64_t pixels = transmittances.size(1) * transmittances.size(2);
  const int64_t pieces = divided_up(pixels, pixels_of_piece);
  const Tensor sums = empty({images, pieces, channels}, gradients);
  MPKERNELS_LAUNCH(sum_background_pieces_kernel<T>, blocks_for(images * pieces, 1), most_threads, 0, device.stream(),
                   pointer<T>(grad_colors), pointer<T>(transmittances), pointer<T>(sums), images, pixels, pieces,
                   channels);
  MPKERNELS_LAUNCH(sum_backgrounds_kernel<T>, blocks_for(images * channels, most_threads), most_threads, 0,
                   device.stream(), pointer<T>(sums), pointer<T>(gradients), images, pieces, channels);
}

// The rows of each Gaussian: `order` sorts the rows by Gaussian, and those of Gaussian i begin at bounds[0][i] of it
// and end at bounds[1][i].
struct RowsOfGaussians {
  Tensor order;   // (rows,)
  Tensor bounds;  // (2, M)

  RowsOfGaussians(const Device& device, const Tensor& keys, int64_t count, const Tensor& like)
      : order(empty({keys.numel()}, like, ScalarType::Int)), bounds(empty({2, count}, like, ScalarType::Int)) {
    const int64_t rows = keys.numel();
    device.zero(bounds.data_ptr(), 2 * count * sizeof(int32_t));
    if (rows == 0) return;
    const Tensor sorted = empty({rows}, like, ScalarType::Int);
    const size_t bytes = splatting::radix_sort_workspace_bytes<uint32_t>(rows);
    const Tensor workspace = empty({static_cast<int64_t>(bytes)}, like, ScalarType::Byte);
    int bits = 0;
    while (bits < 32 && count >> bits != 0) ++bits;  // keys are 0 to M
    splatting::radix_sort_pairs<uint32_t>(pointer<uint32_t>(keys), pointer<uint32_t>(sorted), nullptr,
                                          pointer<int32_t>(order), rows, 0, bits, workspace.data_ptr(),
                                          device.stream());
    MPKERNELS_LAUNCH(find_rows_kernel, static_cast<unsigned>(divided_up(rows, most_threads)), most_threads, 0,
                     device.stream(), pointer<uint32_t>(sorted), rows, pointer<int32_t>(bounds),
                     pointer<int32_t>(bounds) + count);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_colors, const OptionalTensor& grad_alphas, const Tensor& means2d, const Tensor& conics,
    const Tensor& colors, const Tensor& opacities, const OptionalTensor& backgrounds, const OptionalTensor& masks,
    const Tensor& isect_offsets, const Tensor& flatten_ids, const Tensor& /*render_colors*/,
    const Tensor& transmittances, const Tensor& last, int64_t width, int64_t height, int64_t tile_size, bool absgrad,
    bool needs_backgrounds) {
  const Device device(means2d);
  const int64_t count = means2d.size(0), channels = colors.size(1), images = isect_offsets.size(0);
  needs_backgrounds = needs_backgrounds && backgrounds.has_value();
  Tensor of_means2d = empty({count, 2}, means2d);
  Tensor of_conics = empty({count, 3}, means2d);
  Tensor of_colors = empty({count, channels}, means2d);
  Tensor of_opacities = empty({count}, means2d);
  Tensor of_backgrounds = needs_backgrounds ? empty({images, channels}, means2d) : no_gradient(means2d);
  Tensor absolute = absgrad ? empty({count, 2}, means2d) : no_gradient(means2d);
  const Tiles tiles = tiles_of(masks, isect_offsets, flatten_ids, width, height, tile_size);
  const int64_t row_count = tiles.entries * tiles.parts;
  STD_TORCH_CHECK(row_count <= most_blocks, "rasterize: the backward sorts at most 2^31 - 1 intersections, got ",
                  tiles.entries, " in tiles of ", tiles.parts,
                  " blocks: draw fewer images at a time, or use smaller Gaussians");
  dispatch(means2d, channels, [&](auto element, auto compiled_channels) {
    using T = decltype(element);
    constexpr int C = compiled_channels;
    if (needs_backgrounds) sum_backgrounds<T>(device, grad_colors, transmittances, of_backgrounds);
    if (count == 0) return;
    const Gaussians<T> gaussians = gaussians_of<T>(means2d, conics, colors, opacities);
    const GaussianGradients<T> out{pointer<T>(of_means2d), pointer<T>(of_conics), pointer<T>(of_colors),
                                   pointer<T>(of_opacities), pointer<T>(absolute)};
    const PixelGradients<T> in{pointer<T>(grad_colors), pointer<T>(grad_alphas), pointer<T>(backgrounds),
                               pointer<T>(transmittances), pointer<int32_t>(last)};
    const int64_t channels_of_launch = C > 0 ? C : std::min<int64_t>(channels, general_channels<T>);
    const Tensor keys = empty({row_count}, means2d, ScalarType::Int);
    if (row_count > 0) device.zero(keys.data_ptr(), row_count * sizeof(uint32_t));
    Rows<T> rows{nullptr, pointer<uint32_t>(keys), true, absgrad, 0, static_cast<int>(channels_of_launch)};
    const Tensor memory = empty({row_count, rows.values()}, means2d);
    rows.rows = pointer<T>(memory);
    std::optional<RowsOfGaussians> found;
    // once, but for many channels
    for (; rows.first_channel < channels; rows.first_channel += channels_of_launch) {
      rows.channels = static_cast<int>(std::min(channels_of_launch, channels - rows.first_channel));
      const int64_t tasks = row_count > 0 ? tiles.tiles * tiles.parts : 0;
      const int warps = warps_of_block(tiles);
      for (int64_t first = 0; first < tasks; first += most_blocks) {
        MPKERNELS_LAUNCH((rasterize_backward_kernel<T, C>), static_cast<unsigned>(std::min(most_blocks, tasks - first)),
                         warps * warp_lanes, (backward_shared_bytes<T, C>(warps, rows.values())), device.stream(),
                         gaussians, tiles, in, rows, first);
      }
      if (!found.has_value()) found.emplace(device, keys, count, means2d);
      MPKERNELS_LAUNCH(sum_rows_kernel<T>, blocks_for(count, most_warps), most_threads, 0, device.stream(), gaussians,
                       rows, pointer<int32_t>(found->order), pointer<int32_t>(found->bounds),
                       pointer<int32_t>(found->bounds) + count, out);
      rows.keys = nullptr;
      rows.geometric = rows.absolute = false;
    }
  });
  return {of_means2d, of_conics, of_colors, of_opacities, of_backgrounds, absolute};
}

}  // namespace
}  // namespace rasterize
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("rasterize", TORCH_BOX(&mpkernels::rasterize::forward));
  library.impl("rasterize_backward", TORCH_BOX(&mpkernels::rasterize::backward));
}
