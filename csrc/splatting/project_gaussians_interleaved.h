// Vectors of one component each from tensors of (N, C) with the components interleaved, and back: C = 2, 3, 4,
// 6, 9.
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

// x: C vectors of interleaved components become a vector a component; and back.
template <typename T, int C>
MPKERNELS_INLINE void split(Vector<T>* x) {
  if constexpr (C % 2 == 0) {
    Vector<T> part[2][C / 2];
    for (int i = 0; i < C / 2; ++i) {
      part[0][i] = shuffle<Every2<T, 0>, T>(x[2 * i], x[2 * i + 1]);
      part[1][i] = shuffle<Every2<T, 1>, T>(x[2 * i], x[2 * i + 1]);
    }
    split<T, C / 2>(part[0]);
    split<T, C / 2>(part[1]);
    for (int c = 0; c < C; ++c) x[c] = part[c % 2][c / 2];
  } else if constexpr (C % 3 == 0) {
    Vector<T> part[3][C / 3];
    for (int i = 0; i < C / 3; ++i) {
      part[0][i] = every3<T, 0>(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
      part[1][i] = every3<T, 1>(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
      part[2][i] = every3<T, 2>(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
    }
    for (int k = 0; k < 3; ++k) split<T, C / 3>(part[k]);
    for (int c = 0; c < C; ++c) x[c] = part[c % 3][c / 3];
  } else {
    static_assert(C == 1, "2, 3, 4, 6 or 9 components");
  }
}

template <typename T, int C>
MPKERNELS_INLINE void join(Vector<T>* x) {
  if constexpr (C % 2 == 0) {
    Vector<T> part[2][C / 2];
    for (int c = 0; c < C; ++c) part[c % 2][c / 2] = x[c];
    join<T, C / 2>(part[0]);
    join<T, C / 2>(part[1]);
    for (int i = 0; i < C / 2; ++i) {
      x[2 * i] = shuffle<Zip2<T, 0>, T>(part[0][i], part[1][i]);
      x[2 * i + 1] = shuffle<Zip2<T, 1>, T>(part[0][i], part[1][i]);
    }
  } else if constexpr (C % 3 == 0) {
    Vector<T> part[3][C / 3];
    for (int c = 0; c < C; ++c) part[c % 3][c / 3] = x[c];
    for (int k = 0; k < 3; ++k) join<T, C / 3>(part[k]);
    for (int i = 0; i < C / 3; ++i) {
      x[3 * i] = zip3<T, 0>(part[0][i], part[1][i], part[2][i]);
      x[3 * i + 1] = zip3<T, 1>(part[0][i], part[1][i], part[2][i]);
      x[3 * i + 2] = zip3<T, 2>(part[0][i], part[1][i], part[2][i]);
    }
  } else {
    static_assert(C == 1, "2, 3, 4, 6 or 9 components");
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
