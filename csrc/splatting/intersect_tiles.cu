// The launcher of tile intersection's CUDA kernels: registers mpkernels::intersect_tiles for CUDA tensors. Compiled as
// C++ it registers the same launcher for mpkernels_fibres, on CPU tensors, where the kernels run a fibre per CUDA
// thread. Arguments: mpkernels/splatting/intersect_tiles/schema.py.
#include "splatting/intersect_tiles.cuh"

#include "common/device.h"
#include "splatting/intersect_tiles_input.h"

#include <tuple>

#if defined(MPKERNELS_ON_FIBRES)
#include <unistd.h>
#endif

namespace mpkernels {
namespace splatting {
namespace {

// Of an intersection: 12 of the result, and what both sorts need beside.
constexpr int64_t bytes_of_an_intersection = 36;

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + intersect_threads - 1) / intersect_threads);
}

Tensor workspace(size_t bytes, const Tensor& like) {
  return empty({static_cast<int64_t>(bytes)}, like, ScalarType::Byte);
}

// One number that kernels have written, on the host: waits for them.
int64_t read([[maybe_unused]] const Device& device, const int64_t* number) {
#if defined(MPKERNELS_ON_FIBRES)
  return *number;
#else
  int64_t value = 0;
  cudaError_t status = cudaMemcpyAsync(&value, number, sizeof(value), cudaMemcpyDeviceToHost, device.stream());
  if (status == cudaSuccess) status = cudaStreamSynchronize(device.stream());
  STD_TORCH_CHECK(status == cudaSuccess, "intersect_tiles: ", cudaGetErrorString(status));
  return value;
#endif
}

int64_t memory_of_the_device() {
#if defined(MPKERNELS_ON_FIBRES)
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
#else
  size_t free_bytes = 0, bytes = 0;  // torch keeps memory that it has freed, which is not free to CUDA
  const cudaError_t status = cudaMemGetInfo(&free_bytes, &bytes);
  STD_TORCH_CHECK(status == cudaSuccess, "intersect_tiles: ", cudaGetErrorString(status));
  return static_cast<int64_t>(bytes);
#endif
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const ProjectedGaussians<T>& in, const Tensor& radii) {
  const Device device(radii);
  const cudaStream_t stream = device.stream();
  const int64_t lists = in.images * in.grid.tiles();
  Tensor tiles_per_gauss = empty({in.count}, radii);
  Tensor order = empty({in.count}, radii);
  Tensor begins = empty({in.count + 1}, radii, ScalarType::Long);
  int64_t total = 0;
  if (in.count > 0) {
    Tensor depth_keys = empty({in.count}, radii);
    MPKERNELS_LAUNCH(count_tiles_kernel<T>, blocks_for(in.count), intersect_threads, 0, stream, in,
                     pointer<int32_t>(tiles_per_gauss), pointer<uint32_t>(depth_keys));
    Tensor sorted_keys = empty({in.count}, radii);
    Tensor sort_memory = workspace(radix_sort_workspace_bytes<uint32_t>(in.count), radii);
    radix_sort_pairs<uint32_t>(pointer<uint32_t>(depth_keys), pointer<uint32_t>(sorted_keys), nullptr,
                               pointer<int32_t>(order), in.count, 0, 32, sort_memory.data_ptr(), stream);
    int32_t* const counts = pointer<int32_t>(depth_keys);  // the keys are not needed any more
    MPKERNELS_LAUNCH(counts_in_order_kernel<int32_t>, blocks_for(in.count), intersect_threads, 0, stream,
                     pointer<int32_t>(tiles_per_gauss), pointer<int32_t>(order), counts, in.count);
    Tensor sum_memory = workspace(prefix_sum_workspace_bytes(in.count), radii);
    prefix_sum(counts, pointer<int64_t>(begins), in.count, sum_memory.data_ptr(), stream);
    total = read(device, pointer<int64_t>(begins) + in.count);
  }
  check_intersections_fit(total, bytes_of_an_intersection, 8 * lists, memory_of_the_device());

  Tensor isect_ids = empty({total}, radii, ScalarType::Long);
  Tensor flatten_ids = empty({total}, radii);
  Tensor offsets = empty({in.images, in.grid.rows, in.grid.columns}, radii, ScalarType::Long);
  if (total == 0) {
    if (lists > 0) device.zero(offsets.data_ptr(), static_cast<size_t>(lists) * sizeof(int64_t));
    return {tiles_per_gauss, isect_ids, flatten_ids, offsets};
  }
  Tensor tiles = empty({total}, radii), gaussians = empty({total}, radii), sorted_tiles = empty({total}, radii);
  MPKERNELS_LAUNCH(emit_tiles_kernel<T>, blocks_for(in.count), intersect_threads, 0, stream, in,
                   pointer<int32_t>(order), pointer<int64_t>(begins), pointer<uint32_t>(tiles),
                   pointer<int32_t>(gaussians));
  Tensor sort_memory = workspace(radix_sort_workspace_bytes<uint32_t>(total), radii);
  radix_sort_pairs<uint32_t>(pointer<uint32_t>(tiles), pointer<uint32_t>(sorted_tiles), pointer<int32_t>(gaussians),
                             pointer<int32_t>(flatten_ids), total, 0, tile_bits(lists - 1), sort_memory.data_ptr(),
                             stream);
  MPKERNELS_LAUNCH(write_keys_kernel<T>, blocks_for(total), intersect_threads, 0, stream, in,
                   pointer<uint32_t>(sorted_tiles), pointer<int32_t>(flatten_ids), pointer<int64_t>(isect_ids), total,
                   tile_bits(in.grid.tiles()));
  MPKERNELS_LAUNCH(tile_begins_kernel<uint32_t>, blocks_for(lists), intersect_threads, 0, stream,
                   pointer<uint32_t>(sorted_tiles), total, pointer<int64_t>(offsets), lists);
  return {tiles_per_gauss, isect_ids, flatten_ids, offsets};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> intersect_tiles(const Tensor& means2d, const Tensor& radii,
                                                           const Tensor& depths, const std::optional<Tensor>& conics,
                                                           const std::optional<Tensor>& opacities,
                                                           const std::optional<Tensor>& image_ids, int64_t images,
                                                           int64_t width, int64_t height, int64_t tile_size) {
  const auto of_dtype = [&](auto element) {
    using T = decltype(element);
    return run<T>(
        gaussians_of<T>(means2d, radii, depths, conics, opacities, image_ids, images, width, height, tile_size), radii);
  };
  switch (means2d.scalar_type()) {
    case ScalarType::Float:
      return of_dtype(float{});
    case ScalarType::Double:
      return of_dtype(double{});
    default:
      STD_TORCH_CHECK(false, "intersect_tiles: no CUDA kernel for this dtype");
  }
}

}  // namespace
}  // namespace splatting
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("intersect_tiles", TORCH_BOX(&mpkernels::splatting::intersect_tiles));
}
