// What a CUDA kernel header (`.cuh`) includes, and all it needs: the CUDA language, and how to launch.
//
// Compiled by nvcc, this is CUDA. Compiled by a C++ compiler, the same text runs on the CPU, a fibre per CUDA
// thread (fibres/fibres.h), so that a machine without a GPU executes the kernels in its tests. The include root
// is `csrc/`.
//
//     #include "common/launch.h"
//
//     template <typename T>
//     __global__ void scale_kernel(const T* input, T* output, int64_t size, T factor) {
//       const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
//       if (i < size) output[i] = factor * input[i];
//     }
//
//     MPKERNELS_LAUNCH((scale_kernel<float>), blocks, 256, 0, stream, input, output, size, 2.0f);
//
// MPKERNELS_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, arguments...)
//     grid and block are dim3 or integers. A kernel with a comma in its template arguments goes in parentheses.
//     A launch that fails throws std::runtime_error naming kernel, grid and block. On CUDA the kernel runs
//     asynchronously on `stream`, and more than 48 KiB of dynamic shared memory is requested as it must be.
//     On fibres `stream` is ignored, and the kernel has finished, or thrown, when the launch returns.
// MPKERNELS_DYNAMIC_SHARED(type, name)
//     declares `type* name`, the block's dynamic shared memory. (`extern __shared__` does not compile on fibres.)
// MPKERNELS_HOST_DEVICE
//     marks a function for host and device; usable in headers that the CPU kernels include as well.
// MPKERNELS_ON_FIBRES
//     is defined on fibres and not under nvcc, to guard what fibres do not model (see fibres/fibres.h).
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#define MPKERNELS_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  ::mpkernels::launch_kernel(#kernel, kernel, grid, block, dynamic_shared_bytes, stream, ##__VA_ARGS__)

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define MPKERNELS_HOST_DEVICE __host__ __device__

#define MPKERNELS_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char mpkernels_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(mpkernels_dynamic_shared)

namespace mpkernels {

inline void check_launch(cudaError_t status, const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes) {
  if (status == cudaSuccess) return;
  const auto text = [](dim3 size) {
    return "(" + std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z) + ")";
  };
  throw std::runtime_error("mpkernels: launch of kernel " + std::string(kernel) + " with grid " + text(grid) +
                           ", block " + text(block) + " and " + std::to_string(shared_bytes) +
                           " bytes of dynamic shared memory failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t dynamic_shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "the kernel takes another number of arguments");
  constexpr std::size_t shared_bytes_without_request = 48 * 1024;
  if (dynamic_shared_bytes > shared_bytes_without_request) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(dynamic_shared_bytes));
    if (status != cudaSuccess) static_cast<void>(cudaGetLastError());  // leave no error behind for the next launch
    check_launch(status, name, grid, block, dynamic_shared_bytes);
  }
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  check_launch(cudaGetLastError(), name, grid, block, dynamic_shared_bytes);
}

}  // namespace mpkernels

#else

#define MPKERNELS_ON_FIBRES 1
#include "fibres/fibres.h"

#endif
