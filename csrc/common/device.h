// The device that a launcher of CUDA kernels works on; on fibres, the CPU.
#pragma once

#include <cstring>

#include "common/launch.h"
#include "common/tensor.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mpkernels {

#if defined(MPKERNELS_ON_FIBRES)
// CPU memory, and kernels that have ended when their launch returns.
class Device {
 public:
  explicit Device(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  void zero(void* memory, size_t bytes) const { std::memset(memory, 0, bytes); }
};
#else
// Makes the tensor's device the current one, and orders what is done by torch's current stream of that device.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()), stream_(current_stream(tensor)) {}
  cudaStream_t stream() const { return stream_; }
  void zero(void* memory, size_t bytes) const {
    const cudaError_t status = cudaMemsetAsync(memory, 0, bytes, stream_);
    STD_TORCH_CHECK(status == cudaSuccess, "cudaMemsetAsync failed: ", cudaGetErrorString(status));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};
#endif

}  // namespace mpkernels
