// The activation of the depthwise convolution, for host and device; V is a number, or a vector of numbers.
#pragma once

#include "common/launch.h"

namespace mpkernels {
namespace depthwise_conv1d {

// The derivative of silu(y) = y / (1 + e^-y), with sigmoid = 1 / (1 + e^-y).
template <typename V>
MPKERNELS_HOST_DEVICE inline V silu_derivative(V y, V sigmoid) {
  return sigmoid * (1 + y * (1 - sigmoid));
}

}  // namespace depthwise_conv1d
}  // namespace mpkernels
