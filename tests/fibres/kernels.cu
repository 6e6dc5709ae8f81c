// nvcc compiles this to show that the text which the fibres run is CUDA. Every kernel is launched once.
#include "broken_kernels.cuh"
#include "kernels.cuh"

void launch_everything(void* memory, cudaStream_t stream) {
  const auto floats = static_cast<float*>(memory);
  const auto doubles = static_cast<double*>(memory);
  const auto integers = static_cast<int*>(memory);
  const auto unsigned_integers = static_cast<unsigned*>(memory);
  const auto atomics = static_cast<Atomics*>(memory);
  MPKERNELS_LAUNCH(places_kernel, dim3(2, 3, 4), dim3(5, 3, 2), 0, stream, static_cast<Place*>(memory));
  MPKERNELS_LAUNCH(shuffles_kernel<int>, 1, 64, 0, stream, integers, 1, 32);
  MPKERNELS_LAUNCH(shuffles_kernel<unsigned>, 1, 64, 0, stream, unsigned_integers, 1, 32);
  MPKERNELS_LAUNCH(shuffles_kernel<long long>, 1, 64, 0, stream, static_cast<long long*>(memory), 1, 32);
  MPKERNELS_LAUNCH(shuffles_kernel<float>, 1, 64, 0, stream, floats, 1, 32);
  MPKERNELS_LAUNCH(shuffles_kernel<double>, 1, 64, 0, stream, doubles, 1, 32);
  MPKERNELS_LAUNCH(votes_kernel, 1, 32, 0, stream, unsigned_integers);
  MPKERNELS_LAUNCH(sub_masks_kernel, 1, 32, 0, stream, integers);
  MPKERNELS_LAUNCH(exchange_kernel, 1, 32, 0, stream, integers);
  MPKERNELS_LAUNCH(counting_barriers_kernel, 1, 96, 0, stream, integers);
  MPKERNELS_LAUNCH((block_sum_kernel<float, 256>), 7, 256, 0, stream, floats, floats, 1700);
  MPKERNELS_LAUNCH((block_sum_kernel<double, 256>), 7, 256, 0, stream, doubles, doubles, 1700);
  MPKERNELS_LAUNCH(warp_scan_kernel<float>, 2, 64, 0, stream, floats, floats);
  MPKERNELS_LAUNCH(reverse_kernel<float>, 2, 100, 100 * sizeof(float), stream, floats, floats);
  MPKERNELS_LAUNCH(reverse_kernel<double>, 2, 100, 64 * 1024, stream, doubles, doubles);
  MPKERNELS_LAUNCH(unwritten_kernel<float>, 3, 1, 16, stream, floats, floats);
  MPKERNELS_LAUNCH(atomics_kernel, 2, 64, 0, stream, atomics, integers);
  MPKERNELS_LAUNCH(lock_kernel, 2, 64, 0, stream, atomics);
  MPKERNELS_LAUNCH(last_block_kernel, 9, 32, 0, stream, integers, integers, unsigned_integers, integers);
  MPKERNELS_LAUNCH(copy4_kernel, 1, 32, 0, stream, static_cast<const float4*>(memory), static_cast<float4*>(memory),
                   32);
  MPKERNELS_LAUNCH(functions_kernel, 1, 1, 0, stream, integers, floats);
  MPKERNELS_LAUNCH(barriers_kernel, 1, 256, 0, stream, 10);
}
