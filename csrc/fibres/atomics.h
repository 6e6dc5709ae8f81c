// Atomic functions, for the types that CUDA has them for. They are atomic between OS threads as well, which matters
// when MPKERNELS_FIBRES_THREADS runs several blocks at once.
#pragma once

#include <cstring>
#include <type_traits>

#include "fibres/scheduler.h"

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {

  // A parameter type that takes no part in template argument deduction, so that atomicAdd(float*, 1) converts the 1.
  template <typename T>
  struct Plain {
    using type = T;
  };

  template <typename T, typename... Allowed>
  inline constexpr bool is_one_of = (std::is_same<T, Allowed>::value || ...);

  // Replaces *address by combine(*address) and returns the old value.
  template <typename T, typename Combine>
  T atomic_update(T * address, Combine combine) {
    if (BlockRunner* runner = BlockRunner::current()) runner->at_atomic();
    T expected, desired;
    __atomic_load(address, &expected, __ATOMIC_RELAXED);
    do {
      desired = combine(expected);
    } while (!__atomic_compare_exchange(address, &expected, &desired, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return expected;
  }

  // Integers wrap around, as on a GPU.
  template <typename T>
  T wrapping_add(T a, T b) {
    if constexpr (std::is_integral<T>::value) {
      using Unsigned = typename std::make_unsigned<T>::type;
      return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
    } else {
      return a + b;
    }
  }

}  // namespace fibres
}  // namespace mpkernels

// name, the new value from `old` and `value`, and the types that CUDA has
#define MPKERNELS_FIBRES_ATOMIC(name, new_value, ...)                                                         \
  template <typename T>                                                                                       \
  T name(T* address, typename mpkernels::fibres::Plain<T>::type value) {                                      \
    static_assert(mpkernels::fibres::is_one_of<T, __VA_ARGS__>, "CUDA has no " #name " for this type");       \
    return mpkernels::fibres::atomic_update(address, [&]([[maybe_unused]] T old) -> T { return new_value; }); \
  }
MPKERNELS_FIBRES_ATOMIC(atomicAdd, mpkernels::fibres::wrapping_add(old, value), int, unsigned, unsigned long long,
                        float, double)
MPKERNELS_FIBRES_ATOMIC(atomicSub, static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(value)), int,
                        unsigned)
MPKERNELS_FIBRES_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
MPKERNELS_FIBRES_ATOMIC(atomicMax, value > old ? value : old, int, unsigned, long long, unsigned long long)
MPKERNELS_FIBRES_ATOMIC(atomicExch, value, int, unsigned, unsigned long long, float)
MPKERNELS_FIBRES_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
MPKERNELS_FIBRES_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
MPKERNELS_FIBRES_ATOMIC(atomicXor, old ^ value, int, unsigned, unsigned long long)
MPKERNELS_FIBRES_ATOMIC(atomicInc, old >= value ? 0 : old + 1, unsigned)
MPKERNELS_FIBRES_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1, unsigned)
#undef MPKERNELS_FIBRES_ATOMIC

template <typename T>
T atomicCAS(T* address, typename mpkernels::fibres::Plain<T>::type compare,
            typename mpkernels::fibres::Plain<T>::type value) {
  static_assert(mpkernels::fibres::is_one_of<T, int, unsigned, unsigned short, unsigned long long>,
                "CUDA has no atomicCAS for this type");
  return mpkernels::fibres::atomic_update(address, [&](T old) { return old == compare ? value : old; });
}

inline void __threadfence_block() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_system() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
