#include "attention/attention_bfloat16.h"
namespace mpkernels {
namespace attention {
bool multiplies_bfloat16() {
  return false;
}
void run_forward_bfloat16(const Problem<BFloat16>&, const Heads<BFloat16>&, float*) {}
void run_backward_bfloat16(const Problem<BFloat16>&, const Gradients<BFloat16>&) {}
}  // namespace attention
}  // namespace mpkernels
