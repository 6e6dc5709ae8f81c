// The launcher of SSIM: for mpkernels on CUDA tensors, or, compiled as C++, for mpkernels_fibres on the CPU. Arguments:
// mpkernels/splatting/ssim/schema.py.
#include "common/device.h"
#include "splatting/ssim.cuh"

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace ssim {
namespace {

constexpr int most_compiled = 11;  // the window size that is compiled in

unsigned launched(int64_t tiles) {
  constexpr int64_t most = 1 << 20;
  return static_cast<unsigned>(std::min(tiles, most));
}

template <typename T>
struct Problem {
  int64_t planes;
  Grid forward;   // from images to the map
  Grid backward;  // from the map to images
  T c1, c2;

  Problem(const Tensor& image, int64_t step, int64_t size, double data_range, bool valid)
      : planes(image.size(0)),
        c1(static_cast<T>(0.01 * data_range * (0.01 * data_range))),
        c2(static_cast<T>(0.03 * data_range * (0.03 * data_range))) {
    const int64_t rows = image.size(1), columns = image.size(2), around = size - 1;
    const int64_t before = valid ? 0 : size / 2, behind = around - before;
    const int64_t map_rows = rows - (valid ? around : 0), map_columns = columns - (valid ? around * step : 0);
    forward = {rows, columns, before, before * step, map_rows, map_columns, step, size};
    backward = {map_rows, map_columns, behind, behind * step, rows, columns, step, size};
  }

  int64_t tiles(const Grid& grid) const { return planes * grid.tiles_down<T>() * grid.tiles_across(); }
  int64_t pixels() const { return planes * forward.out_rows * forward.out_columns; }
};

template <typename T, typename Entry>
size_t shared_bytes(const Grid& grid) {
  return static_cast<size_t>(2 * (threads_per_block + grid.reach())) * sizeof(Entry) +
         static_cast<size_t>(grid.size) * sizeof(T);
}

template <typename T>
Tensor window_of(const Tensor& like, int64_t size, double sigma, const Device& device) {
  Tensor weights = empty({size}, like);
  MPKERNELS_LAUNCH((window_kernel<T>), 1, threads_per_block, 0, device.stream(), pointer<T>(weights), size, sigma);
  return weights;
}

// Calls f with a value of the dtype's C++ type, and the window's size where it is compiled in, else 0.
template <typename F>
void dispatch(const Tensor& image, int64_t window_size, const F& f) {
  const auto with_size = [&](auto element) {
    if (window_size == most_compiled) {
      f(element, std::integral_constant<int, most_compiled>{});
    } else {
      f(element, std::integral_constant<int, 0>{});
    }
  };
  switch (image.scalar_type()) {
    case ScalarType::Float:
      return with_size(float{});
    case ScalarType::Double:
      return with_size(double{});
    default:
      STD_TORCH_CHECK(false, "ssim: no CUDA kernel for this dtype");
  }
}

Tensor forward(const Tensor& image, const Tensor& target, int64_t step, int64_t window_size, double sigma,
               double data_range, bool valid, bool mean) {
  const Device device(image);
  const int64_t around = valid ? window_size - 1 : 0;
  Tensor out =
      mean ? empty({}, image) : empty({image.size(0), image.size(1) - around, image.size(2) - around * step}, image);
  dispatch(image, window_size, [&](auto element, auto compiled_size) {
    using T = decltype(element);
    constexpr int Size = compiled_size;
    const Problem<T> in(image, step, window_size, data_range, valid);
    const Images<T> images{pointer<T>(image), pointer<T>(target)};
    const int64_t tiles = in.tiles(in.forward);
    Tensor sums = empty({mean ? tiles : 0}, image, ScalarType::Double);
    if (tiles > 0) {
      const Tensor weights = window_of<T>(image, window_size, sigma, device);
      MPKERNELS_LAUNCH((forward_kernel<T, Size>), launched(tiles), threads_per_block,
                       (shared_bytes<T, Pair<T>>(in.forward)), device.stream(), in.forward, images, pointer<T>(weights),
                       in.c1, in.c2, mean ? nullptr : pointer<T>(out), mean ? pointer<double>(sums) : nullptr, tiles);
    }
    if (mean) {
      MPKERNELS_LAUNCH((mean_kernel<T>), 1, threads_per_block, 0, device.stream(), pointer<double>(sums), tiles,
                       in.pixels(), pointer<T>(out));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& image, const Tensor& target, int64_t step,
                                    int64_t window_size, double sigma, double data_range, bool valid, bool mean,
                                    bool needs_image, bool needs_target) {
  const Device device(image);
  const auto gradient = [&](bool needed) {
    return needed ? empty({image.size(0), image.size(1), image.size(2)}, image) : no_gradient(image);
  };
  Tensor of_image = gradient(needs_image);
  Tensor of_target = gradient(needs_target);
  dispatch(image, window_size, [&](auto element, auto compiled_size) {
    using T = decltype(element);
    constexpr int Size = compiled_size;
    const Problem<T> in(image, step, window_size, data_range, valid);
    const Images<T> images{pointer<T>(image), pointer<T>(target)};
    const int64_t map_tiles = in.tiles(in.forward), tiles = in.tiles(in.backward);
    if (tiles == 0) return;
    const Tensor weights = window_of<T>(image, window_size, sigma, device);
    Tensor maps = empty({in.planes, in.forward.out_rows, in.forward.out_columns, 4}, image);
    Quad<T>* quads = static_cast<Quad<T>*>(maps.data_ptr());
    MPKERNELS_LAUNCH((derivatives_kernel<T, Size>), launched(map_tiles), threads_per_block,
                     (shared_bytes<T, Pair<T>>(in.forward)), device.stream(), in.forward, images, pointer<T>(weights),
                     in.c1, in.c2, pointer<T>(grad), mean ? in.pixels() : 0, quads, map_tiles);
    MPKERNELS_LAUNCH((backward_kernel<T, Size>), launched(tiles), threads_per_block,
                     (shared_bytes<T, Quad<T>>(in.backward)), device.stream(), in.backward, Maps<T>{quads}, images,
                     pointer<T>(weights), needs_image ? pointer<T>(of_image) : nullptr,
                     needs_target ? pointer<T>(of_target) : nullptr, tiles);
  });
  return {of_image, of_target};
}

}  // namespace
}  // namespace ssim
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("ssim", TORCH_BOX(&mpkernels::ssim::forward));
  library.impl("ssim_backward", TORCH_BOX(&mpkernels::ssim::backward));
}
