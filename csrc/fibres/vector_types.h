// CUDA's vector types, dim3, and the functions that make them. Alignment is CUDA's, so that UBSan reports a float4
// load from an address that would fault on a GPU. may_alias permits the usual reinterpret_cast from float*.
#pragma once

#define MPKERNELS_VECTOR_TYPES(name, type, alignment2, alignment4)   \
  struct __attribute__((may_alias)) name##1 {                        \
    type x;                                                          \
  };                                                                 \
  struct __attribute__((may_alias, aligned(alignment2))) name##2 {   \
    type x, y;                                                       \
  };                                                                 \
  struct __attribute__((may_alias)) name##3 {                        \
    type x, y, z;                                                    \
  };                                                                 \
  struct __attribute__((may_alias, aligned(alignment4))) name##4 {   \
    type x, y, z, w;                                                 \
  };                                                                 \
  constexpr name##1 make_##name##1(type x) {                         \
    return {x};                                                      \
  }                                                                  \
  constexpr name##2 make_##name##2(type x, type y) {                 \
    return {x, y};                                                   \
  }                                                                  \
  constexpr name##3 make_##name##3(type x, type y, type z) {         \
    return {x, y, z};                                                \
  }                                                                  \
  constexpr name##4 make_##name##4(type x, type y, type z, type w) { \
    return {x, y, z, w};                                             \
  }

MPKERNELS_VECTOR_TYPES(char, signed char, 2, 4)
MPKERNELS_VECTOR_TYPES(uchar, unsigned char, 2, 4)
MPKERNELS_VECTOR_TYPES(short, short, 4, 8)
MPKERNELS_VECTOR_TYPES(ushort, unsigned short, 4, 8)
MPKERNELS_VECTOR_TYPES(int, int, 8, 16)
MPKERNELS_VECTOR_TYPES(uint, unsigned int, 8, 16)
MPKERNELS_VECTOR_TYPES(longlong, long long, 16, 16)
MPKERNELS_VECTOR_TYPES(ulonglong, unsigned long long, 16, 16)
MPKERNELS_VECTOR_TYPES(float, float, 8, 16)
MPKERNELS_VECTOR_TYPES(double, double, 16, 16)
#undef MPKERNELS_VECTOR_TYPES

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 size) : x(size.x), y(size.y), z(size.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // ignored on fibres
