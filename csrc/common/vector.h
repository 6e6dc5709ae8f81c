// The vector layer of the CPU kernels: GCC/Clang vector types, one register wide for the instruction set that the file
// is compiled for. See docs/vector_layer.md for what was measured against at::vec and Highway.
//
// Vector<T> has lanes<T> elements of T (float or double). Arithmetic and comparison are the compiler's own operators;
// this header adds loads (with conversion from bfloat16 and float16), stores, shuffles, reductions and exp.
#pragma once

#include "common/arithmetic.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#define MPKERNELS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define MPKERNELS_VECTOR_BYTES 32
#else
#define MPKERNELS_VECTOR_BYTES 16
#endif

namespace mpkernels {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <typename T>
inline constexpr int lanes = MPKERNELS_VECTOR_BYTES / sizeof(T);

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(MPKERNELS_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

// Signed integers of the size of T, as comparisons of Vector<T> give them: all ones where true.
template <typename T>
using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <typename T>
using Mask = Vector<Integer<T>>;

// The type that T is computed in.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// (always_inline everywhere: these functions are a handful of instructions, and must never become calls)
#define MPKERNELS_INLINE inline __attribute__((always_inline))

template <typename T>
MPKERNELS_INLINE Vector<T> broadcast(T x) {
  return Vector<T>{} + x;
}

template <typename T>
MPKERNELS_INLINE Vector<T> select(Mask<T> mask, Vector<T> yes, Vector<T> no) {
  return mask ? yes : no;
}

// 0, 1, 2, ...
template <typename T>
MPKERNELS_INLINE Mask<T> lane_indices() {
  Mask<T> index;
  for (int i = 0; i < lanes<T>; ++i) index[i] = i;
  return index;
}

// True in lanes [0, count).
template <typename T>
MPKERNELS_INLINE Mask<T> first_lanes(int64_t count) {
  return lane_indices<T>() < static_cast<Integer<T>>(count < lanes<T> ? count : lanes<T>);
}

// result[i] = concatenation(a, b)[Pattern::at(i)], with the pattern known when compiling.
template <typename Pattern, typename V, int... I>
MPKERNELS_INLINE V shuffle_with(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, Pattern::at(I)...);
}
template <typename Pattern, typename T>
MPKERNELS_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b) {
  return shuffle_with<Pattern>(a, b, std::make_integer_sequence<int, lanes<T>>{});
}

// Lanes moved up by K (lane i gets lane i - K), the first K lanes taken from `fill`; and the other way round.
template <typename T, int K>
struct MoveUp {
  static constexpr int at(int i) { return i >= K ? i - K : lanes<T> + i; }
};
template <typename T, int K>
struct MoveDown {
  static constexpr int at(int i) { return i + K < lanes<T> ? i + K : lanes<T> + i; }
};
template <int K, typename T>
MPKERNELS_INLINE Vector<T> move_up(Vector<T> x, Vector<T> fill) {
  return shuffle<MoveUp<T, K>, T>(x, fill);
}
template <int K, typename T>
MPKERNELS_INLINE Vector<T> move_down(Vector<T> x, Vector<T> fill) {
  return shuffle<MoveDown<T, K>, T>(x, fill);
}

// x_0, x_0 x_1, x_0 x_1 x_2, ...: log2(lanes) steps, in a fixed order.
template <typename T, int K = 1>
MPKERNELS_INLINE Vector<T> inclusive_product(Vector<T> x) {
  if constexpr (K < lanes<T>) {
    return inclusive_product<T, 2 * K>(x * move_up<K, T>(x, broadcast<T>(1)));
  } else {
    return x;
  }
}

// 1 - (1 - x_0), 1 - (1 - x_0)(1 - x_1), ...: the same in terms of the complement, a + b - a b, which keeps the digits
// of small x. (A product of factors just below 1 drops a b in every rounding, always in the same direction: over 2,500
// factors that is 8e-6 instead of 1e-6.)
template <typename T, int K = 1>
MPKERNELS_INLINE Vector<T> inclusive_complement(Vector<T> x) {
  if constexpr (K < lanes<T>) {
    const Vector<T> before = move_up<K, T>(x, Vector<T>{});
    return inclusive_complement<T, 2 * K>(before + (x - before * x));
  } else {
    return x;
  }
}

// ..., x_{n-2} + x_{n-1}, x_{n-1}: sums from each lane to the last.
template <typename T, int K = 1>
MPKERNELS_INLINE Vector<T> suffix_sum(Vector<T> x) {
  if constexpr (K < lanes<T>) {
    return suffix_sum<T, 2 * K>(x + move_down<K, T>(x, Vector<T>{}));
  } else {
    return x;
  }
}

template <typename T, int K = lanes<T> / 2>
MPKERNELS_INLINE T sum(Vector<T> x) {
  if constexpr (K >= 1) {
    return sum<T, K / 2>(x + move_down<K, T>(x, Vector<T>{}));
  } else {
    return x[0];
  }
}

template <typename T>
MPKERNELS_INLINE bool any(Mask<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  Integer<T> found = 0;
  for (int i = 0; i < lanes<T>; ++i) found |= mask[i];
  return found != 0;
#endif
}

// Unaligned loads and stores of full vectors.
template <typename T>
MPKERNELS_INLINE Vector<T> load_raw(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

typedef uint16_t Words32 __attribute__((vector_size(MPKERNELS_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(MPKERNELS_VECTOR_BYTES)));

MPKERNELS_INLINE Vector<float> widen_bfloat16(Words32 bits) {
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(bits, Words) << 16);
}
// Round to nearest even; NaN stays NaN.
MPKERNELS_INLINE Words32 narrow_bfloat16(Vector<float> x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((x == x) ? rounded : Words{} + 0x7FC0, Words32);
}
// Half: move exponent and mantissa into place and scale by 2^112, which is exact for subnormals too.
MPKERNELS_INLINE Vector<float> widen_half(Words32 half) {
  const Words bits = __builtin_convertvector(half, Words);
  const Words magnitude = (bits & 0x7FFF) << 13;
  const Vector<float> scaled = reinterpret_cast<Vector<float>>(magnitude) * 0x1p112f;
  const Words special = reinterpret_cast<Words>(scaled) | 0x7F800000;
  const Words finite = reinterpret_cast<Words>(scaled);
  const Words joined = ((bits & 0x7C00) == 0x7C00) ? special : finite;
  return reinterpret_cast<Vector<float>>(joined | ((bits & 0x8000) << 16));
}
// Round to nearest even by adding a power of two that leaves 10 mantissa bits; overflow gives infinity.
MPKERNELS_INLINE Words32 narrow_half(Vector<float> x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words sign = (bits >> 16) & 0x8000;
  const Vector<float> magnitude = reinterpret_cast<Vector<float>>(bits & 0x7FFFFFFF);
  // normal numbers: rebias the exponent, and round the mantissa's low 13 bits
  const Words normal_bits = reinterpret_cast<Words>(magnitude);
  const Words normal = (normal_bits - 0x38000000 + 0x0FFF + ((normal_bits >> 13) & 1)) >> 13;
  // below 2^-14: 0.5 has its last bit at 2^-24, where half's subnormals have theirs
  const Words subnormal = reinterpret_cast<Words>(magnitude + 0.5f) - 0x3F000000;
  Words result = (magnitude < 0x1p-14f) ? subnormal : normal;
  result = (magnitude >= 65520.0f) ? Words{} + 0x7C00 : result;
  result = (magnitude == magnitude) ? result : Words{} + 0x7E00;
  return __builtin_convertvector(result | sign, Words32);
}

// lanes elements of S, converted to the type they are computed in.
template <typename S>
MPKERNELS_INLINE Vector<Compute<S>> load(const S* from) {
  if constexpr (sizeof(S) >= 4) {
    return load_raw<S>(from);
  } else {
    Words32 bits;
    std::memcpy(&bits, from, sizeof(bits));
    if constexpr (std::is_same_v<S, BFloat16>) {
      return widen_bfloat16(bits);
    } else {
      return widen_half(bits);
    }
  }
}

template <typename S>
MPKERNELS_INLINE void store(S* to, Vector<Compute<S>> x) {
  if constexpr (sizeof(S) >= 4) {
    std::memcpy(to, &x, sizeof(x));
  } else {
    Words32 bits;
    if constexpr (std::is_same_v<S, BFloat16>) {
      bits = narrow_bfloat16(x);
    } else {
      bits = narrow_half(x);
    }
    std::memcpy(to, &bits, sizeof(bits));
  }
}

// The first `count` elements (no more than lanes are used; the others read as 0), never touching memory behind them.
template <typename S>
MPKERNELS_INLINE Vector<Compute<S>> load_first(const S* from, int64_t count) {
  if (count >= lanes<Compute<S>>) return load<S>(from);
  if (count <= 0) return Vector<Compute<S>>{};
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    return reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
  } else if constexpr (std::is_same_v<S, double>) {
    return reinterpret_cast<Vector<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from));
  }
#endif
  alignas(64) unsigned char bytes[lanes<Compute<S>> * sizeof(S)] = {};
  std::memcpy(bytes, from, static_cast<size_t>(count) * sizeof(S));
  return load<S>(reinterpret_cast<const S*>(bytes));
}

template <typename S>
MPKERNELS_INLINE void store_first(S* to, Vector<Compute<S>> x, int64_t count) {
  if (count >= lanes<Compute<S>>) {
    store<S>(to, x);
    return;
  }
  if (count <= 0) return;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(x));
    return;
  } else if constexpr (std::is_same_v<S, double>) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), reinterpret_cast<__m512d>(x));
    return;
  }
#endif
  alignas(64) unsigned char bytes[lanes<Compute<S>> * sizeof(S)];
  store<S>(reinterpret_cast<S*>(bytes), x);
  std::memcpy(to, bytes, static_cast<size_t>(count) * sizeof(S));
}

// store_first past the caches where the address allows it: memory that is only written is then not read first. For
// outputs larger than the caches; call finish_streams before another thread may read them.
template <typename S>
MPKERNELS_INLINE void stream_first(S* to, Vector<Compute<S>> x, int64_t count) {
#if defined(__AVX512F__) || defined(__AVX2__)
  if constexpr (sizeof(S) >= 4) {
    if (count >= lanes<S> && reinterpret_cast<uintptr_t>(to) % MPKERNELS_VECTOR_BYTES == 0) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(x));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(x));
#endif
      return;
    }
  }
#endif
  store_first<S>(to, x, count);
}

MPKERNELS_INLINE void finish_streams() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// Single elements, converted as above.
template <typename S>
MPKERNELS_INLINE Compute<S> to_compute(S x) {
  return static_cast<Compute<S>>(x);
}

// e^x in two parts, from which exp and expm1 both follow within 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2,
// scale = 2^n, p = e^r - 1 by its Taylor polynomial (degree 7 for float, 13 for double: truncated below half an ulp).
// x is limited to [-87.3, 88] ([-708, 709] in double): e^x saturates above; below it is 0, and expm1 is -1. NaN stays
// NaN.
template <typename T>
struct Exponential {
  Vector<T> scale;
  Vector<T> p;
  Mask<T> vanishes;

  MPKERNELS_INLINE Vector<T> exp() const { return select<T>(vanishes, Vector<T>{}, p * scale + scale); }
  MPKERNELS_INLINE Vector<T> expm1() const { return p * scale + (scale - 1); }
};

template <typename T>
MPKERNELS_INLINE Exponential<T> exponential(Vector<T> x) {
  constexpr bool is_float = std::is_same_v<T, float>;
  constexpr T log2_e = T(1.44269504088896340736L);
  constexpr T ln2_high = is_float ? T(0.693359375L) : T(6.93147180369123816490e-01L);
  constexpr T ln2_low = is_float ? T(-2.12194440054690583e-4L) : T(1.90821492927058770002e-10L);
  constexpr T highest = is_float ? T(88) : T(709);
  constexpr T lowest = is_float ? T(-87.3365447504019L) : T(-708.396418532264106L);
  // adding 1.5 2^(mantissa bits) rounds to the nearest integer and leaves it, here with the exponent's bias, in the low
  // bits; shifted up they are 2^n
  constexpr int mantissa_bits = is_float ? 23 : 52;
  constexpr T round_shift = (is_float ? T(0x1.8p23) : T(0x1.8p52)) + (is_float ? 127 : 1023);

  const Mask<T> vanishes = x < lowest;
  Vector<T> inside = x > highest ? broadcast<T>(highest) : x;
  inside = inside < lowest ? broadcast<T>(lowest) : inside;
  const Vector<T> shifted = inside * log2_e + round_shift;
  const Vector<T> n = shifted - round_shift;
  const Vector<T> r = (inside - n * ln2_high) - n * ln2_low;

  constexpr int degree = is_float ? 7 : 13;
  constexpr long double inverse_factorial[] = {
      1.0L,         1.0L / 2,      1.0L / 6,       1.0L / 24,       1.0L / 120,       1.0L / 720,       1.0L / 5040,
      1.0L / 40320, 1.0L / 362880, 1.0L / 3628800, 1.0L / 39916800, 1.0L / 479001600, 1.0L / 6227020800};
  Vector<T> p = broadcast<T>(T(inverse_factorial[degree - 1]));
#pragma GCC unroll 13
  for (int k = degree - 2; k >= 1; --k) p = p * r + T(inverse_factorial[k]);
  p = p * r * r + r;

  const Vector<T> scale = reinterpret_cast<Vector<T>>(reinterpret_cast<Mask<T>>(shifted) << mantissa_bits);
  return {scale, p, vanishes};
}

// tanh(x) = expm1(2x) / (expm1(2x) + 2): keeps the digits of small x.
template <typename T>
MPKERNELS_INLINE Vector<T> hyperbolic_tangent(Vector<T> x) {
  const Vector<T> e = exponential<T>(x + x).expm1();
  return e / (e + 2);
}

// 2^r for |r| <= 1/2 by the polynomial that is nearest in the Chebyshev sense (degree 6: 2e-9).
MPKERNELS_INLINE Vector<float> power_of_two_near_zero(Vector<float> r) {
  Vector<float> p = broadcast<float>(1.5461445e-04f);
  p = p * r + 1.3400428e-03f;
  p = p * r + 9.618057e-03f;
  p = p * r + 5.550327e-02f;
  p = p * r + 2.402265e-01f;
  p = p * r + 6.931472e-01f;
  p = p * r + 1.e+00f;
  return p;
}

#if defined(__AVX512F__)
// e^(sign x) for |x| <= 104, 0 or infinity where that is no float. The power of two is an instruction, and x log2 e is
// reduced by a fused multiply-add, so that no digit of a large x is lost: 12 operations.
template <int sign>
MPKERNELS_INLINE Vector<float> signed_exponential(__m512 x) {
  const __m512 high = _mm512_set1_ps(sign * 1.44269502f), low = _mm512_set1_ps(sign * 1.92596303e-8f);
  const __m512 n =
      _mm512_maskz_roundscale_ps(0xFFFF, _mm512_mul_ps(x, high), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fmadd_ps(x, low, _mm512_fmsub_ps(x, high, n));
  const Vector<float> p = power_of_two_near_zero(reinterpret_cast<Vector<float>>(r));
  return reinterpret_cast<Vector<float>>(_mm512_maskz_scalef_ps(0xFFFF, reinterpret_cast<__m512>(p), n));
}
#endif

// 1 + e^-x, within 2 ulp; infinity from about x = -88.7 on.
template <typename T>
MPKERNELS_INLINE Vector<T> one_plus_exp_minus(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const __m512 above = _mm512_maskz_max_ps(0xFFFF, _mm512_set1_ps(-104), reinterpret_cast<__m512>(x));
    const __m512 inside = _mm512_maskz_min_ps(0xFFFF, _mm512_set1_ps(104), above);  // (second, a NaN stays)
    return 1 + signed_exponential<-1>(inside);
  }
#endif
  return 1 + exponential<T>(-x).exp();
}

// e^x for |x| <= 87 (708 in double), within 2 ulp: with half the operations where nothing overflows or vanishes. NaN
// stays NaN.
template <typename T>
MPKERNELS_INLINE Vector<T> limited_exponential(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return signed_exponential<1>(reinterpret_cast<__m512>(x));
#endif
  return exponential<T>(x).exp();
}

// 1 / (1 + e^-x)
template <typename T>
MPKERNELS_INLINE Vector<T> sigmoid(Vector<T> x) {
  return 1 / one_plus_exp_minus<T>(x);
}

// 2 artanh(z) = log((1 + z) / (1 - z)) for |z| <= 1/3 by its Taylor series: relative error below 2e-9 (2e-17 in
// double). A smaller |z| needs fewer terms: those below `terms`.
template <typename T, int terms = std::is_same_v<T, float> ? 8 : 17>
MPKERNELS_INLINE Vector<T> twice_artanh(Vector<T> z) {
  const Vector<T> square = z * z;
  Vector<T> p = broadcast<T>(T(2.0L / (2 * terms - 1)));
#pragma GCC unroll 17
  for (int k = terms - 2; k >= 1; --k) p = p * square + T(2.0L / (2 * k + 1));
  return p * square * z + 2 * z;
}

// log(x) for positive normal numbers, within 2 ulp: x = 2^n m with m in [sqrt(1/2), sqrt(2)]. NaN stays NaN.
template <typename T>
MPKERNELS_INLINE Vector<T> natural_logarithm(Vector<T> x) {
  constexpr bool is_float = std::is_same_v<T, float>;
  constexpr int mantissa_bits = is_float ? 23 : 52;
  constexpr Integer<T> root_half = static_cast<Integer<T>>(is_float ? 0x3f3504f3 : 0x3fe6a09e667f3bcd);
  constexpr T ln2_high = is_float ? T(0.693359375L) : T(6.93147180369123816490e-01L);
  constexpr T ln2_low = is_float ? T(-2.12194440054690583e-4L) : T(1.90821492927058770002e-10L);
  const Mask<T> bits = reinterpret_cast<Mask<T>>(x);
  const Mask<T> exponent = (bits - root_half) >> mantissa_bits;
  const Vector<T> m = reinterpret_cast<Vector<T>>(bits - (exponent << mantissa_bits));
  const Vector<T> n = __builtin_convertvector(exponent, Vector<T>);
  const Vector<T> log_m = twice_artanh<T, is_float ? 5 : 11>((m - 1) / (m + 1));
  return select<T>(x == x, n * ln2_high + (n * ln2_low + log_m), x);
}

// arctan(x), within 3 ulp: the Taylor series (to 7e-9, in double 2e-17) below tan(pi / 8), to which larger arguments
// are reduced by arctan(x) = pi / 4 + arctan((x - 1) / (x + 1)) = pi / 2 - arctan(1 / x).
template <typename T>
MPKERNELS_INLINE Vector<T> arctangent(Vector<T> x) {
  constexpr T half_pi = T(1.57079632679489661923L);
  const Vector<T> a = x < Vector<T>{} ? -x : x;
  const Mask<T> high = a > T(2.41421356237309504880L), middle = a > T(0.41421356237309504880L);
  const Vector<T> one = broadcast<T>(1);
  const Vector<T> above = select<T>(high, -one, select<T>(middle, a - 1, a));
  const Vector<T> below = select<T>(high, a, select<T>(middle, a + 1, one));
  const Vector<T> start =
      select<T>(high, broadcast<T>(half_pi), select<T>(middle, broadcast<T>(half_pi / 2), one - one));
  const Vector<T> z = above / below, square = z * z;
  constexpr int terms = std::is_same_v<T, float> ? 9 : 20;
  Vector<T> p = broadcast<T>(T((terms % 2 == 1 ? 1.0L : -1.0L) / (2 * terms - 1)));
#pragma GCC unroll 20
  for (int k = terms - 2; k >= 1; --k) p = p * square + T((k % 2 == 0 ? 1.0L : -1.0L) / (2 * k + 1));
  const Vector<T> found = start + (p * square * z + z);
  return select<T>(x < Vector<T>{}, -found, found);
}

// 2^x for x <= 0 (and a little above), within 2 ulp: x = n + r with |r| <= 1/2, and the polynomial that is nearest to
// 2^r in the Chebyshev sense (degree 6: 2e-9; in double precision the Taylor series of e^(r ln 2)). Below 2^-126
// (2^-1022) the result is 0 or tiny. NaN stays NaN.
template <typename T>
MPKERNELS_INLINE Vector<T> power_of_two(Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) {
#if defined(__AVX512F__)
    const __m512 input = reinterpret_cast<__m512>(x);
    const __m512 n = _mm512_maskz_roundscale_ps(0xFFFF, input, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = x < -126.0f ? broadcast<float>(-126.0f) : x;  // (false for NaN)
    constexpr float round_shift = 0x1.8p23f + 127;
    const Vector<float> shifted = x + round_shift;
    const Vector<float> n = shifted - round_shift;
#endif
    const Vector<float> r = x - reinterpret_cast<Vector<float>>(n);
    const Vector<float> p = power_of_two_near_zero(r);
#if defined(__AVX512F__)
    return reinterpret_cast<Vector<float>>(_mm512_maskz_scalef_ps(0xFFFF, reinterpret_cast<__m512>(p), n));
#else
    return p * reinterpret_cast<Vector<float>>(reinterpret_cast<Mask<float>>(shifted) << 23);
#endif
  } else {
    return exponential<T>(x * T(0.693147180559945309417L)).exp();
  }
}

// The formulas of `<op>_math.h`, a vector at a time.
template <typename T>
struct VectorArithmetic {
  using Scalar = T;
  using Truth = Mask<T>;
  using V = Vector<T>;

  static MPKERNELS_INLINE V select(Truth truth, V yes, V no) { return truth ? yes : no; }
  static MPKERNELS_INLINE V minimum(V a, V b) { return a < b ? a : b; }
  static MPKERNELS_INLINE V maximum(V a, V b) { return a > b ? a : b; }
  static MPKERNELS_INLINE V sqrt(V x) {
    for (int i = 0; i < lanes<T>; ++i) x[i] = std::sqrt(x[i]);
    return x;
  }
  static MPKERNELS_INLINE Truth finite(V x) { return x - x == V{}; }
};
template <>
struct Arithmetic<Vector<float>> : VectorArithmetic<float> {};
template <>
struct Arithmetic<Vector<double>> : VectorArithmetic<double> {};

}  // namespace mpkernels
