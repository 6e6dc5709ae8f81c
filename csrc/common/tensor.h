// Tensors of torch's stable ABI, as the launchers of all families use them: allocation, pointers, dtypes, streams.
//
// Only torch/csrc/stable and torch/headeronly are included, so that one binary serves torch 2.11 and later.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>

#if !defined(__CUDACC__) && defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mpkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether tests asked for new memory to be filled with NaN (mpkernels.testing.poisoned_memory).
inline bool poisoned() {
  const char* value = std::getenv("MPKERNELS_POISON");
  return value != nullptr && value[0] == '1';
}

// Asks for huge pages for a large, fresh piece of CPU memory: one page fault for 2 MiB instead
// of 512. Torch's CPU allocator does not keep memory, so every large output may be fresh.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if !defined(__CUDACC__) && defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge_page = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / huge_page * huge_page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

#if defined(__CUDACC__)
// The stream that torch runs on now, on the device of `tensor`.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// The code of a dtype in torch's C interface.
inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      STD_TORCH_CHECK(false, "dtype_code: add this dtype to csrc/common/tensor.h");
  }
}

// A new contiguous tensor on the device of `like`, of its dtype or another; its contents are arbitrary (all ones bits,
// which is a NaN, or -1, while memory is poisoned).
inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like,
                    std::optional<ScalarType> dtype_wanted = std::nullopt) {
  int64_t strides[8];
  int64_t count = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = count;
    count *= sizes.begin()[i];
  }
  int32_t dtype, device_type, device_index;
  if (dtype_wanted.has_value()) {
    dtype = dtype_code(*dtype_wanted);
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                                  device_type, device_index, &handle));
  Tensor tensor(handle);
  const size_t bytes = static_cast<size_t>(count) * aoti_torch_dtype_element_size(dtype);
  if (!like.is_cuda()) prefer_huge_pages(tensor.data_ptr(), bytes);
  if (bytes > 0 && poisoned()) {
#if defined(__CUDACC__)
    cudaMemsetAsync(tensor.data_ptr(), 0xFF, bytes, current_stream(like));  // in order with the kernels that follow
#else
    std::memset(tensor.data_ptr(), 0xFF, bytes);
#endif
  }
  return tensor;
}

// What an op returns for a gradient that nobody asked for.
inline Tensor no_gradient(const Tensor& like) {
  return empty({0}, like);
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// The distance between rays of a (rays, ...) tensor; 0 for a missing one.
inline int64_t ray_stride(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->stride(0) : 0;
}

}  // namespace mpkernels
