// Spherical harmonics on the CPU: color = sum_k Y_k(dir / |dir|) coeffs_k, and its gradients to dirs and coeffs
// (formulas in spherical_harmonics_math.h).
//
// Shapes: dirs, colors (B, C, N, 3); coeffs (B, N, K, 3); masks (B, C, N); all contiguous.
//
// Decomposition: a vector takes consecutive Gaussians, a lane each. Their coefficients, rows of 3 K numbers, are turned
// into columns in registers (a square transpose of log2(lanes) shuffles a row, 12 shuffles a Gaussian for degree 3 and
// 16 lanes; the alternative, gathers, costs more than the memory), and stay in the first-level cache while all cameras
// of a batch look at them: so each coefficient is read once, and its gradient, a sum over cameras in their order, is
// written once. Threads take runs of Gaussians, which share nothing.
//
// Bytes a Gaussian, float32, degree 3, one camera: forward 204 read and 12 written (192 of them coefficients),
// backward 216 read and 204 written.
#include "common/parallel.h"
#include "common/tensor.h"
#include "common/vector.h"
#include "splatting/spherical_harmonics_math.h"

#include <algorithm>
#include <tuple>

namespace mpkernels {
namespace spherical_harmonics {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t grain = 64;                       // vectors of Gaussians that a thread takes at a time
constexpr int64_t cached_bytes = int64_t{4} << 20;  // outputs that do not fit the caches go past them

template <typename T>
struct Problem {
  const T* dirs;
  const T* coeffs;
  const bool* masks;  // or null
  int64_t batches, cameras, gaussians, coefficients;

  Problem(const Tensor& dirs, const Tensor& coeffs, const OptionalTensor& masks)
      : dirs(pointer<T>(dirs)),
        coeffs(pointer<T>(coeffs)),
        masks(pointer<bool>(masks)),
        batches(dirs.size(0)),
        cameras(dirs.size(1)),
        gaussians(dirs.size(2)),
        coefficients(coeffs.size(2)) {}

  int64_t row() const { return 3 * coefficients; }

  // Calls body(batch, first Gaussian, how many) for every vector of Gaussians.
  template <typename Body>
  void each_vector(const Body& body) const {
    const int64_t vectors = (gaussians + lanes<T> - 1) / lanes<T>;
    parallel_pieces(batches * vectors, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % vectors * lanes<T>;
        body(i / vectors, first, std::min<int64_t>(lanes<T>, gaussians - first));
      }
      finish_streams();
    });
  }
};

template <typename T>
MPKERNELS_INLINE void write_first(bool streams, T* to, Vector<T> x, int64_t count) {
  if (streams) {
    stream_first<T>(to, x, count);
  } else {
    store_first<T>(to, x, count);
  }
}

// One step of a transpose: rows i and i + H exchange their off-diagonal blocks of H x H.
template <typename T, int H>
struct UpperOfBlocks {
  static constexpr int at(int j) { return j & H ? lanes<T> + j - H : j; }
};
template <typename T, int H>
struct LowerOfBlocks {
  static constexpr int at(int j) { return j & H ? lanes<T> + j : j + H; }
};

template <typename T, int H = 1>
MPKERNELS_INLINE void transpose(Vector<T> (&rows)[lanes<T>]) {
  if constexpr (H < lanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) {
      if (i & H) continue;
      const Vector<T> upper = rows[i], lower = rows[i + H];
      rows[i] = shuffle<UpperOfBlocks<T, H>, T>(upper, lower);
      rows[i + H] = shuffle<LowerOfBlocks<T, H>, T>(upper, lower);
    }
    transpose<T, 2 * H>(rows);
  }
}

// x, y, z of a lane each, from and to three vectors of interleaved ones.
template <typename T, int c, int k>
struct Collect {  // element 3 s + c of the interleaved ones, where it lies in vectors 0 and 1, then in vector 2
  static constexpr int at(int s) {
    const int element = 3 * s + c;
    if (k == 1) return element < 2 * lanes<T> ? element : 0;
    return element / lanes<T> == 2 ? lanes<T> + element % lanes<T> : s;
  }
};
template <typename T, int k, int step>
struct Interleave {  // lane l of vector k is element k L + l: first of x and y, then of z
  static constexpr int at(int l) {
    const int element = k * lanes<T> + l;
    if (step == 1) return element % 3 == 1 ? lanes<T> + element / 3 : element / 3;
    return element % 3 == 2 ? lanes<T> + element / 3 : l;
  }
};

template <typename T>
struct Triple {
  Vector<T> x, y, z;
};

template <typename T>
MPKERNELS_INLINE Triple<T> load_triples(const T* from, int64_t count) {
  const Vector<T> a = load_first<T>(from, 3 * count), b = load_first<T>(from + lanes<T>, 3 * count - lanes<T>),
                  c = load_first<T>(from + 2 * lanes<T>, 3 * count - 2 * lanes<T>);
  return {shuffle<Collect<T, 0, 2>, T>(shuffle<Collect<T, 0, 1>, T>(a, b), c),
          shuffle<Collect<T, 1, 2>, T>(shuffle<Collect<T, 1, 1>, T>(a, b), c),
          shuffle<Collect<T, 2, 2>, T>(shuffle<Collect<T, 2, 1>, T>(a, b), c)};
}

template <typename T>
MPKERNELS_INLINE void store_triples(bool streams, T* to, const Triple<T>& t, int64_t count) {
  const Vector<T> a = shuffle<Interleave<T, 0, 2>, T>(shuffle<Interleave<T, 0, 1>, T>(t.x, t.y), t.z),
                  b = shuffle<Interleave<T, 1, 2>, T>(shuffle<Interleave<T, 1, 1>, T>(t.x, t.y), t.z),
                  c = shuffle<Interleave<T, 2, 2>, T>(shuffle<Interleave<T, 2, 1>, T>(t.x, t.y), t.z);
  write_first<T>(streams, to, a, 3 * count);
  write_first<T>(streams, to + lanes<T>, b, 3 * count - lanes<T>);
  write_first<T>(streams, to + 2 * lanes<T>, c, 3 * count - 2 * lanes<T>);
}

template <typename T>
struct BytesOf {
  typedef uint8_t type __attribute__((vector_size(lanes<T>)));
};

// Which of the first `count` elements are wanted; `from` may be null: all are.
template <typename T>
MPKERNELS_INLINE Mask<T> load_mask(const bool* from, int64_t count) {
  if (from == nullptr) return first_lanes<T>(count);
  typename BytesOf<T>::type bytes{};
  std::memcpy(&bytes, from, count == lanes<T> ? sizeof(bytes) : static_cast<size_t>(count));
  return __builtin_convertvector(bytes, Mask<T>) != 0;
}

// The coefficients of `count` rows as columns: columns[e][i] is element e of row i; lanes behind the last row are 0.
template <typename T, int degree>
MPKERNELS_INLINE void load_columns(const T* rows, int64_t row, int64_t count, Vector<T>* columns) {
  constexpr int L = lanes<T>, wanted = 3 * terms<degree>;
#pragma GCC unroll 1
  for (int64_t first = 0; first < wanted; first += L) {
    Vector<T> block[L];
    const int64_t length = std::min<int64_t>(L, row - first);
    for (int i = 0; i < L; ++i) block[i] = i < count ? load_first<T>(rows + i * row + first, length) : Vector<T>{};
    transpose<T>(block);
    for (int j = 0; j < L; ++j) {
      if (first + j < wanted) columns[first + j] = block[j];
    }
  }
}

// The other way round; elements of a row behind the columns become 0.
template <typename T, int degree>
MPKERNELS_INLINE void store_columns(bool streams, T* rows, int64_t row, int64_t count, const Vector<T>* columns) {
  constexpr int L = lanes<T>, wanted = 3 * terms<degree>;
  int64_t first = 0;
#pragma GCC unroll 1
  for (; first < wanted; first += L) {
    Vector<T> block[L];
    for (int j = 0; j < L; ++j) block[j] = first + j < wanted ? columns[first + j] : Vector<T>{};
    transpose<T>(block);
    const int64_t length = std::min<int64_t>(L, row - first);
    for (int i = 0; i < count; ++i) write_first<T>(streams, rows + i * row + first, block[i], length);
  }
  for (int i = 0; i < count; ++i) {
    for (int64_t e = first; e < row; e += L) {
      write_first<T>(streams, rows + i * row + e, Vector<T>{}, std::min<int64_t>(L, row - e));
    }
  }
}

template <typename T, int degree>
void forward_vector(const Problem<T>& in, T* colors, bool streams, int64_t batch, int64_t first, int64_t count) {
  constexpr int K = terms<degree>;
  Vector<T> columns[3 * K];
  bool loaded = false;
  for (int64_t c = 0; c < in.cameras; ++c) {
    const int64_t at = (batch * in.cameras + c) * in.gaussians + first;
    const Mask<T> wanted = load_mask<T>(in.masks == nullptr ? nullptr : in.masks + at, count);
    Triple<T> color{};
    if (any<T>(wanted)) {
      if (!loaded) {
        load_columns<T, degree>(in.coeffs + (batch * in.gaussians + first) * in.row(), in.row(), count, columns);
        loaded = true;
      }
      const Triple<T> dir = load_triples<T>(in.dirs + 3 * at, count);
      const Direction<Vector<T>> d = direction<Vector<T>>(dir.x, dir.y, dir.z);
      Vector<T> b[K];
      basis<degree, Vector<T>>(d.x, d.y, d.z, b);
      const Triple<T> constant{b[0] * columns[0], b[0] * columns[1], b[0] * columns[2]};
      Triple<T> sum = constant;
#pragma GCC unroll 25
      for (int k = 1; k < K; ++k) {
        sum.x += b[k] * columns[3 * k];
        sum.y += b[k] * columns[3 * k + 1];
        sum.z += b[k] * columns[3 * k + 2];
      }
      const auto chosen = [&](Vector<T> all, Vector<T> alone) {
        return select<T>(wanted, select<T>(d.usable, all, alone), Vector<T>{});
      };
      color = {chosen(sum.x, constant.x), chosen(sum.y, constant.y), chosen(sum.z, constant.z)};
    }
    store_triples<T>(streams, colors + 3 * at, color, count);
  }
}

template <typename T, int degree>
void backward_vector(const Problem<T>& in, const T* grad, T* of_dirs, T* of_coeffs, bool streams, int64_t batch,
                     int64_t first, int64_t count) {
  constexpr int K = terms<degree>;
  Vector<T> columns[3 * K];
  Vector<T> sums[3 * K] = {};
  const int64_t rows = (batch * in.gaussians + first) * in.row();
  bool loaded = false;
  for (int64_t c = 0; c < in.cameras; ++c) {
    const int64_t at = (batch * in.cameras + c) * in.gaussians + first;
    const Mask<T> wanted = load_mask<T>(in.masks == nullptr ? nullptr : in.masks + at, count);
    if (!any<T>(wanted)) {
      if (of_dirs != nullptr) store_triples<T>(streams, of_dirs + 3 * at, Triple<T>{}, count);
      continue;
    }
    Triple<T> g = load_triples<T>(grad + 3 * at, count);
    g = {select<T>(wanted, g.x, Vector<T>{}), select<T>(wanted, g.y, Vector<T>{}), select<T>(wanted, g.z, Vector<T>{})};
    const Triple<T> dir = load_triples<T>(in.dirs + 3 * at, count);
    const Direction<Vector<T>> d = direction<Vector<T>>(dir.x, dir.y, dir.z);
    if (of_dirs != nullptr) {
      if (!loaded) load_columns<T, degree>(in.coeffs + rows, in.row(), count, columns);
      loaded = true;
      const auto weight = [&](int k) {
        return g.x * columns[3 * k] + g.y * columns[3 * k + 1] + g.z * columns[3 * k + 2];
      };
      const auto of_unit = basis_gradient<degree, Vector<T>>(d.x, d.y, d.z, weight);
      const auto of_dir = through_length<Vector<T>>(d, of_unit);
      store_triples<T>(streams, of_dirs + 3 * at,
                       {select<T>(wanted, of_dir.x, Vector<T>{}), select<T>(wanted, of_dir.y, Vector<T>{}),
                        select<T>(wanted, of_dir.z, Vector<T>{})},
                       count);
    }
    if (of_coeffs != nullptr) {
      Vector<T> b[K];
      basis<degree, Vector<T>>(d.x, d.y, d.z, b);
      sums[0] += b[0] * g.x;
      sums[1] += b[0] * g.y;
      sums[2] += b[0] * g.z;
      g = {select<T>(d.usable, g.x, Vector<T>{}), select<T>(d.usable, g.y, Vector<T>{}),
           select<T>(d.usable, g.z, Vector<T>{})};
#pragma GCC unroll 25
      for (int k = 1; k < K; ++k) {
        sums[3 * k] += b[k] * g.x;
        sums[3 * k + 1] += b[k] * g.y;
        sums[3 * k + 2] += b[k] * g.z;
      }
    }
  }
  if (of_coeffs != nullptr) store_columns<T, degree>(streams, of_coeffs + rows, in.row(), count, sums);
}

// Calls f with a value of the dtype's C++ type and the degree as a constant.
template <typename F>
void dispatch(const Tensor& dirs, int64_t degree, const F& f) {
  const auto with_degree = [&](auto element) {
    switch (degree) {
      case 0:
        return f(element, std::integral_constant<int, 0>{});
      case 1:
        return f(element, std::integral_constant<int, 1>{});
      case 2:
        return f(element, std::integral_constant<int, 2>{});
      case 3:
        return f(element, std::integral_constant<int, 3>{});
      case 4:
        return f(element, std::integral_constant<int, 4>{});
      default:
        STD_TORCH_CHECK(false, "spherical_harmonics: no CPU kernel for this degree");
    }
  };
  switch (dirs.scalar_type()) {
    case ScalarType::Float:
      return with_degree(float{});
    case ScalarType::Double:
      return with_degree(double{});
    default:
      STD_TORCH_CHECK(false, "spherical_harmonics: no CPU kernel for this dtype");
  }
}

Tensor forward(int64_t degree, const Tensor& dirs, const Tensor& coeffs, const OptionalTensor& masks) {
  Tensor colors = empty({dirs.size(0), dirs.size(1), dirs.size(2), 3}, dirs);
  dispatch(dirs, degree, [&](auto element, auto compiled_degree) {
    using T = decltype(element);
    const Problem<T> in(dirs, coeffs, masks);
    T* out = pointer<T>(colors);
    const bool streams = dirs.numel() * static_cast<int64_t>(sizeof(T)) > cached_bytes;
    in.each_vector([&](int64_t batch, int64_t first, int64_t count) {
      forward_vector<T, compiled_degree>(in, out, streams, batch, first, count);
    });
  });
  return colors;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, int64_t degree, const Tensor& dirs, const Tensor& coeffs,
                                    const OptionalTensor& masks, bool needs_dirs, bool needs_coeffs) {
  Tensor of_dirs = needs_dirs ? empty({dirs.size(0), dirs.size(1), dirs.size(2), 3}, dirs) : no_gradient(dirs);
  Tensor of_coeffs =
      needs_coeffs ? empty({coeffs.size(0), coeffs.size(1), coeffs.size(2), 3}, coeffs) : no_gradient(coeffs);
  dispatch(dirs, degree, [&](auto element, auto compiled_degree) {
    using T = decltype(element);
    const Problem<T> in(dirs, coeffs, masks);
    const T* gradient = pointer<T>(grad);
    T* dirs_out = needs_dirs ? pointer<T>(of_dirs) : nullptr;
    T* coeffs_out = needs_coeffs ? pointer<T>(of_coeffs) : nullptr;
    const bool streams = (of_dirs.numel() + of_coeffs.numel()) * static_cast<int64_t>(sizeof(T)) > cached_bytes;
    in.each_vector([&](int64_t batch, int64_t first, int64_t count) {
      backward_vector<T, compiled_degree>(in, gradient, dirs_out, coeffs_out, streams, batch, first, count);
    });
  });
  return {of_dirs, of_coeffs};
}

}  // namespace
}  // namespace spherical_harmonics
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("spherical_harmonics", TORCH_BOX(&mpkernels::spherical_harmonics::forward));
  library.impl("spherical_harmonics_backward", TORCH_BOX(&mpkernels::spherical_harmonics::backward));
}
