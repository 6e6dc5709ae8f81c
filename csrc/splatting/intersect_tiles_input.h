// The arguments of intersect_tiles as the launchers of the CPU and the CUDA kernels read them, and the check that the
// result fits into memory. Shapes: mpkernels/splatting/intersect_tiles/schema.py.
#pragma once

#include "common/tensor.h"
#include "splatting/intersect_tiles_math.h"

namespace mpkernels {
namespace splatting {

template <typename T>
ProjectedGaussians<T> gaussians_of(const Tensor& means2d, const Tensor& radii, const Tensor& depths,
                                   const std::optional<Tensor>& conics, const std::optional<Tensor>& opacities,
                                   const std::optional<Tensor>& image_ids, int64_t images, int64_t width,
                                   int64_t height, int64_t tile_size) {
  ProjectedGaussians<T> in;
  in.means2d = pointer<T>(means2d);
  in.radii = pointer<int32_t>(radii);
  in.depths = pointer<T>(depths);
  in.conics = pointer<T>(conics);
  in.opacities = pointer<T>(opacities);
  in.image_ids = pointer<int64_t>(image_ids);
  in.count = means2d.size(0);
  in.images = images;
  in.per_image = images > 0 && in.count > 0 ? in.count / images : 1;
  in.grid = {width, height, tile_size, (width + tile_size - 1) / tile_size, (height + tile_size - 1) / tile_size};
  return in;
}

// Raises, before anything of that size is allocated, if the intersections cannot fit.
inline void check_intersections_fit(int64_t intersections, int64_t bytes_each, int64_t bytes_of_tiles,
                                    int64_t memory_bytes) {
  const double bytes =
      static_cast<double>(intersections) * static_cast<double>(bytes_each) + static_cast<double>(bytes_of_tiles);
  constexpr double gib = 1024.0 * 1024.0 * 1024.0;
  STD_TORCH_CHECK(bytes <= static_cast<double>(memory_bytes), "intersect_tiles: ", intersections,
                  " intersections of Gaussians with tiles need ", bytes / gib, " GiB of memory, there are ",
                  static_cast<double>(memory_bytes) / gib,
                  " GiB. Use fewer or smaller Gaussians, conics and opacities for the exact test, a larger tile_size, "
                  "or fewer images in a call.");
}

}  // namespace splatting
}  // namespace mpkernels
