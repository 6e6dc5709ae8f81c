// Why the CPU kernels use the compiler's own vector types (docs/vector_layer.md): one loop, 1 - exp(-sigma delta) of
// 4096 samples, over three vector layers. Compile one of them at a time, in benchmarks/vector_layer.sh.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <vector>

#if defined(LAYER_ATEN)
#include <ATen/cpu/vec/vec.h>
static void absorb(const float* sigma, const float* delta, float* alpha, int64_t count) {
  using V = at::vec::Vectorized<float>;
  for (int64_t i = 0; i < count; i += V::size()) {
    ((V::loadu(sigma + i) * V::loadu(delta + i)).neg().expm1().neg()).store(alpha + i);
  }
}
#elif defined(LAYER_HIGHWAY)
#include <hwy/highway.h>
// (after highway.h)
#include <hwy/contrib/math/math-inl.h>
static void absorb(const float* sigma, const float* delta, float* alpha, int64_t count) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(d))) {
    const auto tau = hn::Mul(hn::LoadU(d, sigma + i), hn::LoadU(d, delta + i));
    hn::StoreU(hn::Neg(hn::Expm1(d, hn::Neg(tau))), d, alpha + i);
  }
}
#else
#include "common/vector.h"
static void absorb(const float* sigma, const float* delta, float* alpha, int64_t count) {
  using namespace mpkernels;
  for (int64_t i = 0; i < count; i += lanes<float>) {
    const auto e = exponential<float>(-(load<float>(sigma + i) * load<float>(delta + i)));
    store<float>(alpha + i, -e.expm1());
  }
}
#endif

int main() {
  constexpr int64_t count = 4096;
  std::vector<float> sigma(count), delta(count), alpha(count);
  for (int64_t i = 0; i < count; ++i) {
    sigma[i] = static_cast<float>(i % 97) * 0.05f;
    delta[i] = static_cast<float>(i % 31) * 0.03f;
  }
  double best = 1e30;
  for (int repeat = 0; repeat < 200; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 20; ++i) {
      absorb(sigma.data(), delta.data(), alpha.data(), count);
      asm volatile("" ::: "memory");
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = seconds < best ? seconds : best;
  }
  std::printf("%.3f ns a sample (alpha[1000] = %.9g)\n", best / 20 / count * 1e9, alpha[1000]);
}
