// The window of SSIM: a Gaussian of `size` pixels that sums to 1, the same in both directions.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace mpkernels {
namespace ssim {

template <typename T>
std::vector<T> window(int64_t size, double sigma) {
  std::vector<double> weights(static_cast<size_t>(size));
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double distance = static_cast<double>(i - size / 2) / sigma;
    sum += weights[i] = std::exp(-0.5 * distance * distance);
  }
  std::vector<T> normalised;
  for (const double weight : weights) normalised.push_back(static_cast<T>(weight / sum));
  return normalised;
}

}  // namespace ssim
}  // namespace mpkernels
