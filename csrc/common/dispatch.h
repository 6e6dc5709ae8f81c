// From the dtype of a tensor to a C++ type.
#pragma once

#include "common/tensor.h"
#include "common/vector.h"

#include <string>

namespace mpkernels {

// Calls f with a number of the type of x; `op` is named where there is no kernel for that type.
template <typename F>
void dispatch_floating(const char* op, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, (std::string(op) + ": no CPU kernel for this dtype").c_str());
  }
}

}  // namespace mpkernels
