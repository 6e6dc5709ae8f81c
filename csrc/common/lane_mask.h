// Truth values a lane, for kernels that choose in their inner loop: a mask register where the processor has those
// (AVX-512), else a vector of all ones or zeros. (GCC turns combined comparisons of vector types into vectors and back,
// which costs a third of a rasterizer's inner loop.)
#pragma once

#include "common/vector.h"

namespace mpkernels {

#if defined(__AVX512F__)

template <typename T>
using LaneMask = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>;

template <typename T>
MPKERNELS_INLINE LaneMask<T> at_least(Vector<T> a, Vector<T> b) {  // false for NaN
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), _CMP_GE_OQ);
  }
}
template <typename T>
MPKERNELS_INLINE LaneMask<T> above(Vector<T> a, Vector<T> b) {
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), _CMP_GT_OQ);
  }
}
// a > b, integers
template <typename T>
MPKERNELS_INLINE LaneMask<T> above(Mask<T> a, Mask<T> b) {
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmpgt_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  } else {
    return _mm512_cmpgt_epi64_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  }
}
template <typename T>
MPKERNELS_INLINE bool none(LaneMask<T> mask) {
  return mask == 0;
}
template <typename T>
MPKERNELS_INLINE LaneMask<T> but_not(LaneMask<T> a, LaneMask<T> b) {
  return static_cast<LaneMask<T>>(a & ~b);
}
template <typename T>
MPKERNELS_INLINE LaneMask<T> both(LaneMask<T> a, LaneMask<T> b) {
  return static_cast<LaneMask<T>>(a & b);
}
template <typename T>
MPKERNELS_INLINE Vector<T> choose(LaneMask<T> mask, Vector<T> yes, Vector<T> no) {
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vector<T>>(
        _mm512_mask_blend_ps(mask, reinterpret_cast<__m512>(no), reinterpret_cast<__m512>(yes)));
  } else {
    return reinterpret_cast<Vector<T>>(
        _mm512_mask_blend_pd(mask, reinterpret_cast<__m512d>(no), reinterpret_cast<__m512d>(yes)));
  }
}
template <typename T>
MPKERNELS_INLINE Mask<T> choose_integer(LaneMask<T> mask, Mask<T> yes, Mask<T> no) {
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Mask<T>>(
        _mm512_mask_blend_epi32(mask, reinterpret_cast<__m512i>(no), reinterpret_cast<__m512i>(yes)));
  } else {
    return reinterpret_cast<Mask<T>>(
        _mm512_mask_blend_epi64(mask, reinterpret_cast<__m512i>(no), reinterpret_cast<__m512i>(yes)));
  }
}

#else

template <typename T>
using LaneMask = Mask<T>;

template <typename T>
MPKERNELS_INLINE LaneMask<T> at_least(Vector<T> a, Vector<T> b) {
  return a >= b;
}
template <typename T>
MPKERNELS_INLINE LaneMask<T> above(Vector<T> a, Vector<T> b) {
  return a > b;
}
template <typename T>
MPKERNELS_INLINE LaneMask<T> above(Mask<T> a, Mask<T> b) {
  return a > b;
}
template <typename T>
MPKERNELS_INLINE bool none(LaneMask<T> mask) {
  return !any<T>(mask);
}
template <typename T>
MPKERNELS_INLINE LaneMask<T> but_not(LaneMask<T> a, LaneMask<T> b) {
  return a & ~b;
}
template <typename T>
MPKERNELS_INLINE LaneMask<T> both(LaneMask<T> a, LaneMask<T> b) {
  return a & b;
}
template <typename T>
MPKERNELS_INLINE Vector<T> choose(LaneMask<T> mask, Vector<T> yes, Vector<T> no) {
  return select<T>(mask, yes, no);
}
template <typename T>
MPKERNELS_INLINE Mask<T> choose_integer(LaneMask<T> mask, Mask<T> yes, Mask<T> no) {
  return mask ? yes : no;
}

#endif

}  // namespace mpkernels
