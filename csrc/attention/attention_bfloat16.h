// Attention whose products multiply bfloat16 numbers (AVX512-BF16), where the processor does.
#pragma once

#include "attention/attention_backward.h"

namespace mpkernels {
namespace attention {

// Whether this processor multiplies bfloat16, and this library is compiled for it.
bool multiplies_bfloat16();

void run_forward_bfloat16(const Problem<BFloat16>& p, const Heads<BFloat16>& out, float* lse);
void run_backward_bfloat16(const Problem<BFloat16>& p, const Gradients<BFloat16>& g);

}  // namespace attention
}  // namespace mpkernels
