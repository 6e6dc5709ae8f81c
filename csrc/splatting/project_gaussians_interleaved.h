// Vectors of one component each from tensors of (N, C) with the components interleaved, and back: C = 2, 3, 4, 6.
#pragma once

#include "common/vector.h"

namespace mpkernels {

namespace interleaved {

// lane i takes element 2 i + K of the two vectors
template <typename T, int K>
struct Every2 {
  static constexpr int at(int i) { return 2 * i + K; }
};
// vector K of a_0 b_0 a_1 b_1 ...
template <typename T, int K>
struct Zip2 {
  static constexpr int at(int i) {
    const int element = K * lanes<T> + i;
    return element % 2 * lanes<T> + element / 2;
  }
};
// lane s takes element 3 s + K of three vectors: first from the first two, then from the third
template <typename T, int K, bool THIRD>
struct Every3 {
  static constexpr int at(int s) {
    const int element = 3 * s + K;
    if (!THIRD) return element < 2 * lanes<T> ? element : 0;
    return element >= 2 * lanes<T> ? element - lanes<T> : s;
  }
};
// vector K of a_0 b_0 c_0 a_1 ...: first a and b, then c
template <typename T, int K, bool THIRD>
struct Zip3 {
  static constexpr int at(int i) {
    const int element = K * lanes<T> + i;
    if (!THIRD) return element % 3 < 2 ? element % 3 * lanes<T> + element / 3 : 0;
    return element % 3 == 2 ? lanes<T> + element / 3 : i;
  }
};

template <typename T, int K>
MPKERNELS_INLINE Vector<T> every3(Vector<T> a, Vector<T> b, Vector<T> c) {
  return shuffle<Every3<T, K, true>, T>(shuffle<Every3<T, K, false>, T>(a, b), c);
}
template <typename T, int K>
MPKERNELS_INLINE Vector<T> zip3(Vector<T> a, Vector<T> b, Vector<T> c) {
  return shuffle<Zip3<T, K, true>, T>(shuffle<Zip3<T, K, false>, T>(a, b), c);
}

template <typename T, int C>
MPKERNELS_INLINE void split(Vector<T>* x) {
  if constexpr (C == 3) {
    const Vector<T> a = x[0], b = x[1], c = x[2];
    x[0] = every3<T, 0>(a, b, c);
    x[1] = every3<T, 1>(a, b, c);
    x[2] = every3<T, 2>(a, b, c);
  } else if constexpr (C > 1) {
    static_assert(C % 2 == 0, "2, 3, 4 or 6 components");
    Vector<T> even[C / 2], odd[C / 2];
    for (int i = 0; i < C / 2; ++i) {
      even[i] = shuffle<Every2<T, 0>, T>(x[2 * i], x[2 * i + 1]);
      odd[i] = shuffle<Every2<T, 1>, T>(x[2 * i], x[2 * i + 1]);
    }
    split<T, C / 2>(even);
    split<T, C / 2>(odd);
    for (int i = 0; i < C / 2; ++i) {
      x[2 * i] = even[i];
      x[2 * i + 1] = odd[i];
    }
  }
}

template <typename T, int C>
MPKERNELS_INLINE void join(Vector<T>* x) {
  if constexpr (C == 3) {
    const Vector<T> a = x[0], b = x[1], c = x[2];
    x[0] = zip3<T, 0>(a, b, c);
    x[1] = zip3<T, 1>(a, b, c);
    x[2] = zip3<T, 2>(a, b, c);
  } else if constexpr (C > 1) {
    Vector<T> even[C / 2], odd[C / 2];
    for (int i = 0; i < C / 2; ++i) {
      even[i] = x[2 * i];
      odd[i] = x[2 * i + 1];
    }
    join<T, C / 2>(even);
    join<T, C / 2>(odd);
    for (int i = 0; i < C / 2; ++i) {
      x[2 * i] = shuffle<Zip2<T, 0>, T>(even[i], odd[i]);
      x[2 * i + 1] = shuffle<Zip2<T, 1>, T>(even[i], odd[i]);
    }
  }
}

}  // namespace interleaved

// out[c] = component c of the first `count` rows (the others read as 0).
template <int C, typename T>
MPKERNELS_INLINE void load_components(const T* from, int64_t count, Vector<T> (&out)[C]) {
  for (int c = 0; c < C; ++c) out[c] = load_first<T>(from + c * lanes<T>, count * C - c * lanes<T>);
  interleaved::split<T, C>(out);
}

template <int C, typename T>
MPKERNELS_INLINE void store_components(T* to, const Vector<T> (&in)[C], int64_t count) {
  Vector<T> x[C];
  for (int c = 0; c < C; ++c) x[c] = in[c];
  interleaved::join<T, C>(x);
  const int64_t rows = count < lanes<T> ? count : lanes<T>;
  for (int c = 0; c < C; ++c) store_first<T>(to + c * lanes<T>, x[c], rows * C - c * lanes<T>);
}

}  // namespace mpkernels
