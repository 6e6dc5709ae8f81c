// CUDA's functions of one thread: arithmetic, bits, conversions, and loads and stores with cache hints.
#pragma once

#include <math.h>  // expf and the others, in the global namespace as in CUDA

#include <cassert>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibres/scheduler.h"
#include "fibres/vector_types.h"

// min and max: both arguments of one type, or int with unsigned and float with double, as CUDA overloads them. Of a
// number and a NaN, the number.

#define MPKERNELS_FIBRES_MIN_MAX(type, a_type, b_type)          \
  constexpr type min(a_type a, b_type b) {                      \
    return static_cast<type>(a) < static_cast<type>(b) ? a : b; \
  }                                                             \
  constexpr type max(a_type a, b_type b) {                      \
    return static_cast<type>(a) > static_cast<type>(b) ? a : b; \
  }
MPKERNELS_FIBRES_MIN_MAX(int, int, int)
MPKERNELS_FIBRES_MIN_MAX(unsigned, unsigned, unsigned)
MPKERNELS_FIBRES_MIN_MAX(unsigned, int, unsigned)
MPKERNELS_FIBRES_MIN_MAX(unsigned, unsigned, int)
MPKERNELS_FIBRES_MIN_MAX(long, long, long)
MPKERNELS_FIBRES_MIN_MAX(unsigned long, unsigned long, unsigned long)
MPKERNELS_FIBRES_MIN_MAX(unsigned long, long, unsigned long)
MPKERNELS_FIBRES_MIN_MAX(unsigned long, unsigned long, long)
MPKERNELS_FIBRES_MIN_MAX(long long, long long, long long)
MPKERNELS_FIBRES_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
MPKERNELS_FIBRES_MIN_MAX(unsigned long long, long long, unsigned long long)
MPKERNELS_FIBRES_MIN_MAX(unsigned long long, unsigned long long, long long)
#undef MPKERNELS_FIBRES_MIN_MAX
inline float min(float a, float b) {
  return fminf(a, b);
}
inline float max(float a, float b) {
  return fmaxf(a, b);
}
inline double min(double a, double b) {
  return fmin(a, b);
}
inline double max(double a, double b) {
  return fmax(a, b);
}
inline double min(float a, double b) {
  return fmin(a, b);
}
inline double max(float a, double b) {
  return fmax(a, b);
}
inline double min(double a, float b) {
  return fmin(a, b);
}
inline double max(double a, float b) {
  return fmax(a, b);
}

// Arithmetic. The fast approximations of a GPU are exact here.

inline float rsqrtf(float x) {
  return 1.0f / sqrtf(x);
}
inline double rsqrt(double x) {
  return 1.0 / sqrt(x);
}
inline float fdividef(float a, float b) {
  return a / b;
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
inline float __fsqrt_rn(float x) {
  return sqrtf(x);
}
inline float __frsqrt_rn(float x) {
  return static_cast<float>(1.0 / sqrt(static_cast<double>(x)));
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __fma_rn(double a, double b, double c) {
  return fma(a, b, c);
}
inline float __saturatef(float x) {
  return fminf(fmaxf(x, 0.0f), 1.0f);
}  // NaN becomes 0

// <math.h> of glibc declares these names for itself, so they are macros.
#define __expf(x) ::expf(x)
#define __exp10f(x) ::powf(10.0f, x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __log10f(x) ::log10f(x)
#define __sinf(x) ::sinf(x)
#define __cosf(x) ::cosf(x)
#define __tanf(x) ::tanf(x)
#define __powf(x, y) ::powf(x, y)

// Integers.

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}  // 1 + the lowest bit that is set, or 0
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long reversed = 0;
  for (int bit = 0; bit < 64; ++bit) reversed |= (x >> bit & 1) << (63 - bit);
  return reversed;
}
inline unsigned __brev(unsigned x) {
  return static_cast<unsigned>(__brevll(x) >> 32);
}
inline int __mulhi(int a, int b) {
  return static_cast<int>((static_cast<long long>(a) * b) >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}

// The same bits as another type.

#define MPKERNELS_FIBRES_BIT_CAST(name, from, to)  \
  inline to name(from value) {                     \
    static_assert(sizeof(from) == sizeof(to), ""); \
    to result;                                     \
    std::memcpy(&result, &value, sizeof(to));      \
    return result;                                 \
  }
MPKERNELS_FIBRES_BIT_CAST(__float_as_int, float, int)
MPKERNELS_FIBRES_BIT_CAST(__int_as_float, int, float)
MPKERNELS_FIBRES_BIT_CAST(__float_as_uint, float, unsigned)
MPKERNELS_FIBRES_BIT_CAST(__uint_as_float, unsigned, float)
MPKERNELS_FIBRES_BIT_CAST(__double_as_longlong, double, long long)
MPKERNELS_FIBRES_BIT_CAST(__longlong_as_double, long long, double)
#undef MPKERNELS_FIBRES_BIT_CAST

// Conversions. Out of range they saturate and NaN becomes 0, as on a GPU.

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {
  inline int saturating_int(double x) {
    if (!(x > INT_MIN)) return x != x ? 0 : INT_MIN;
    return x < INT_MAX ? static_cast<int>(x) : INT_MAX;
  }
}  // namespace fibres
}  // namespace mpkernels

inline int __float2int_rn(float x) {
  return mpkernels::fibres::saturating_int(nearbyintf(x));
}
inline int __float2int_rz(float x) {
  return mpkernels::fibres::saturating_int(truncf(x));
}
inline int __float2int_rd(float x) {
  return mpkernels::fibres::saturating_int(floorf(x));
}
inline int __float2int_ru(float x) {
  return mpkernels::fibres::saturating_int(ceilf(x));
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}
inline float __double2float_rn(double x) {
  return static_cast<float>(x);
}

// Loads and stores with cache hints.

#define MPKERNELS_FIBRES_LOAD(name) \
  template <typename T>             \
  T name(const T* address) {        \
    return *address;                \
  }
MPKERNELS_FIBRES_LOAD(__ldg)
MPKERNELS_FIBRES_LOAD(__ldca)
MPKERNELS_FIBRES_LOAD(__ldcg)
MPKERNELS_FIBRES_LOAD(__ldcs)
MPKERNELS_FIBRES_LOAD(__ldcv)
MPKERNELS_FIBRES_LOAD(__ldlu)
#undef MPKERNELS_FIBRES_LOAD

#define MPKERNELS_FIBRES_STORE(name)                   \
  template <typename T>                                \
  void name(T* address, std::common_type_t<T> value) { \
    *address = value;                                  \
  }
MPKERNELS_FIBRES_STORE(__stwb)
MPKERNELS_FIBRES_STORE(__stcg)
MPKERNELS_FIBRES_STORE(__stcs)
MPKERNELS_FIBRES_STORE(__stwt)
#undef MPKERNELS_FIBRES_STORE

// A failed assert in a kernel is an error of the launch, and not the end of the process. Including <cassert> after
// this header brings the C library's assert back.

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {
  [[noreturn]] inline void fail_assertion(const char* condition, const char* file, int line) {
    const std::string what = std::string("assertion failed: ") + condition + " at " + file + ":" + std::to_string(line);
    if (BlockRunner* runner = BlockRunner::current()) runner->fail(what);
    std::fprintf(stderr, "%s\n", what.c_str());
    std::abort();
  }
}  // namespace fibres
}  // namespace mpkernels

#if !defined(NDEBUG)
#undef assert
#define assert(...) \
  ((__VA_ARGS__) ? static_cast<void>(0) : ::mpkernels::fibres::fail_assertion(#__VA_ARGS__, __FILE__, __LINE__))
#endif
