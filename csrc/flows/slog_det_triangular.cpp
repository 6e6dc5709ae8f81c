// Sign and log |det| of triangular matrices on the CPU, from their diagonals (N, n) of any strides.
//
//   sign[m] = prod_i sign(d_i),   log_abs_det[m] = sum_i log |d_i| = ln 2 sum_i e_i + log prod_i m_i,  |d_i| = m_i
//   2^e_i
//
// with 1 <= m_i < 2, in float64: exponents are added as integers and the significands' product is split again before it
// overflows, so that a matrix costs one logarithm, and digits are lost neither to a sum of large logarithms nor to the
// range. Decomposition: threads take matrices. An element costs a cache line of its matrix and a few operations: memory
// is the limit, n lines a matrix.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "common/vector.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace mpkernels {
namespace slog_det_triangular {
namespace {

// A product of numbers: its sign, and its magnitude as significand 2^exponent.
struct Product {
  double significand = 1;
  int64_t exponent = 0;
  bool negative = false;

  void split() {
    uint64_t bits;
    std::memcpy(&bits, &significand, sizeof(bits));
    exponent += static_cast<int64_t>(bits >> 52) - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000;
    std::memcpy(&significand, &bits, sizeof(bits));
  }
  // finite, not 0
  void multiply(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    negative ^= bits >> 63 != 0;
    int64_t biased = static_cast<int64_t>(bits >> 52 & 0x7FF);
    if (biased == 0) {  // subnormal
      x *= 0x1p64;
      std::memcpy(&bits, &x, sizeof(bits));
      biased = static_cast<int64_t>(bits >> 52 & 0x7FF) - 64;
    }
    exponent += biased - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000;
    std::memcpy(&x, &bits, sizeof(x));
    significand *= x;
  }
  double log() const {
    // (near 1 from below: 1.9 2^-1 as 0.95, whose logarithm has all its digits)
    const bool upper = significand > 1.4142135623730951;
    return static_cast<double>(exponent + upper) * 0.69314718055994530942 +
           std::log(upper ? significand * 0.5 : significand);
  }
};

template <typename S>
void one(const S* diagonal, int64_t stride, int64_t size, S* sign, Compute<S>* log_abs_det) {
  constexpr int64_t together = 512;  // factors below 2: far from overflow
  Product product;
  bool zero = false, infinite = false, unknown = false;
  for (int64_t i = 0; i < size; i += together) {
    for (int64_t k = i; k < std::min(size, i + together); ++k) {
      const double x = static_cast<double>(to_compute<S>(diagonal[k * stride]));
      if (x == 0 || !(std::fabs(x) <= std::numeric_limits<double>::max())) {
        zero |= x == 0;
        unknown |= std::isnan(x);
        infinite |= std::isinf(x);
        product.negative ^= std::signbit(x);
      } else {
        product.multiply(x);
      }
    }
    product.split();
  }
  double log = product.log(), factor = product.negative ? -1 : 1;
  if (infinite) log = std::numeric_limits<double>::infinity();
  if (zero) log = infinite ? std::numeric_limits<double>::quiet_NaN() : -std::numeric_limits<double>::infinity();
  if (zero) factor = 0;
  if (unknown) log = factor = std::numeric_limits<double>::quiet_NaN();
  *sign = static_cast<S>(static_cast<Compute<S>>(factor));
  *log_abs_det = static_cast<Compute<S>>(log);
}

std::tuple<Tensor, Tensor> forward(const Tensor& diagonal) {
  const int64_t rows = diagonal.size(0), size = diagonal.size(1);
  const bool is_double = diagonal.scalar_type() == ScalarType::Double;
  Tensor sign = empty({rows}, diagonal);
  Tensor log_abs_det = empty({rows}, diagonal, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_floating("slog_det_triangular", diagonal, [&](auto element) {
    using S = decltype(element);
    const S* from = pointer<const S>(diagonal);
    const int64_t row = diagonal.stride(0), stride = diagonal.stride(1);
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 12) / std::max<int64_t>(size, 1));
    parallel_pieces(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        one<S>(from + m * row, stride, size, pointer<S>(sign) + m, pointer<Compute<S>>(log_abs_det) + m);
      }
    });
  });
  return {sign, log_abs_det};
}

}  // namespace
}  // namespace slog_det_triangular
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("slog_det_triangular", TORCH_BOX(&mpkernels::slog_det_triangular::forward));
}
