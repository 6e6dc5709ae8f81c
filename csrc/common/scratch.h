// Memory that a CPU kernel works in.
#pragma once

#include <cstdint>
#include <memory>

namespace mpkernels {

// Memory of a thread for `size` numbers, kept between pieces of work and calls, contents arbitrary; its address is a
// multiple of 64 bytes. One piece for each type: what is got first is gone when more is asked for.
template <typename T>
T* scratch(int64_t size) {
  constexpr size_t alignment = 64;
  thread_local std::unique_ptr<unsigned char[]> memory;
  thread_local size_t capacity = 0;
  const size_t bytes = static_cast<size_t>(size) * sizeof(T) + alignment;
  if (bytes > capacity) {
    memory.reset(new unsigned char[bytes]);
    capacity = bytes;
  }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + alignment - 1) / alignment * alignment);
}

}  // namespace mpkernels
