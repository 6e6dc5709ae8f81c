// The launcher of WaveNet's sample loop: for mpkernels on CUDA tensors, or, compiled as C++, for mpkernels_fibres on
// the CPU. Arguments: mpkernels/convolution/wavenet_generate/schema.py.
#include "common/device.h"
#include "convolution/wavenet_generate.cuh"

#include <tuple>
#include <vector>

namespace mpkernels {
namespace wavenet_generate {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Calls f with a value of the C++ type of the weights, and one of the type that is computed in.
template <typename F>
void dispatch(const Tensor& weights, const F& f) {
  switch (weights.scalar_type()) {
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::BFloat16:
      return f(Bits16{}, float{});
    default:
      STD_TORCH_CHECK(false, "wavenet_generate: no CUDA kernel for this dtype");
  }
}

std::tuple<Tensor, Tensor, Tensor> generate(const Tensor& weights, const Tensor& offsets, const Tensor& biases,
                                            const Tensor& embedding, std::vector<int64_t> dilations,
                                            std::vector<int64_t> sizes, double residual_scale, double skip_scale,
                                            bool mixture, const OptionalTensor& forced, const OptionalTensor& condition,
                                            const Tensor& last, const Tensor& rings, const Tensor& seed, int64_t start,
                                            int64_t first_sequence, int64_t steps, double temperature,
                                            bool keep_logits) {
  const Device device(weights);
  const int64_t batch = rings.size(0), given = forced.has_value() ? forced->size(1) : 0, length = given + steps;
  Tensor samples = empty({batch, length}, last);
  Tensor logits = keep_logits ? empty({batch, length, sizes[5]}, rings) : empty({0}, rings);
  Tensor new_rings = empty({batch, rings.size(1), rings.size(2)}, rings);
  if (batch == 0) return {samples, logits, new_rings};
  dispatch(weights, [&](auto element, auto wide) {
    using S = decltype(element);
    using T = decltype(wide);
    Problem<S, T> in;
    in.shape = {sizes[0], sizes[1], sizes[2], sizes[3],
                sizes[4], sizes[5], sizes[6], static_cast<int64_t>(dilations.size())};
    STD_TORCH_CHECK(in.shape.layers <= most_layers, "wavenet_generate: more than 256 layers");
    for (int64_t i = 0; i < in.shape.layers; ++i) in.dilations[i] = static_cast<int32_t>(dilations[i]);
    in.weights = pointer<S>(weights);
    in.offsets = pointer<T>(offsets);
    in.offset_layer = offsets.size(1) * offsets.size(2);
    in.offset_sequence = offsets.size(1) > 1 ? offsets.size(2) : 0;
    in.biases = pointer<T>(biases);
    in.embedding = pointer<T>(embedding);
    in.residual_scale = static_cast<T>(residual_scale);
    in.skip_scale = static_cast<T>(skip_scale);
    in.temperature = static_cast<T>(temperature);
    in.mixture = mixture;
    in.forced_classes = mixture ? nullptr : pointer<int64_t>(forced);
    in.forced_values = mixture ? pointer<T>(forced) : nullptr;
    in.forced = given;
    in.length = length;
    in.condition = pointer<T>(condition);
    in.last_class = mixture ? nullptr : pointer<int64_t>(last);
    in.last_value = mixture ? pointer<T>(last) : nullptr;
    in.old_rings = pointer<T>(rings);
    in.rings = pointer<T>(new_rings);
    in.ring_rows = rings.size(1);
    in.seed = pointer<int64_t>(seed);
    in.start = start;
    in.first_sequence = first_sequence;
    in.classes = mixture ? nullptr : pointer<int64_t>(samples);
    in.values = mixture ? pointer<T>(samples) : nullptr;
    in.logits = keep_logits ? pointer<T>(logits) : nullptr;
    const auto bytes = static_cast<size_t>(Memory<T>::size(in.shape, pack_size<S>)) * sizeof(T);
    STD_TORCH_CHECK(bytes <= 160 * 1024, "wavenet_generate: the channels of a position need ", bytes,
                    " bytes of shared memory, more than GPUs have");
    MPKERNELS_LAUNCH((generate_kernel<S, T>), static_cast<unsigned>(batch), threads_per_block, bytes, device.stream(),
                     in);
  });
  return {samples, logits, new_rings};
}

Tensor sample(const Tensor& logits, const Tensor& seed, int64_t step, int64_t first_sequence, double temperature,
              bool mixture) {
  const Device device(logits);
  const int64_t batch = logits.size(0), outputs = logits.size(1);
  Tensor samples = mixture ? empty({batch}, logits) : empty({batch}, logits, ScalarType::Long);
  if (batch == 0) return samples;
  dispatch(logits, [&](auto element, auto wide) {
    using T = decltype(wide);
    static_cast<void>(element);
    const auto bytes = static_cast<size_t>(outputs) * sizeof(T);
    STD_TORCH_CHECK(bytes <= 160 * 1024, "wavenet_sample: more classes than shared memory holds");
    MPKERNELS_LAUNCH((sample_kernel<T>), static_cast<unsigned>(batch), threads_per_block, bytes, device.stream(),
                     pointer<T>(logits), pointer<int64_t>(seed), outputs, step, first_sequence,
                     static_cast<T>(temperature), mixture, mixture ? nullptr : pointer<int64_t>(samples),
                     mixture ? pointer<T>(samples) : nullptr);
  });
  return samples;
}

}  // namespace
}  // namespace wavenet_generate
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("wavenet_generate", TORCH_BOX(&mpkernels::wavenet_generate::generate));
  library.impl("wavenet_sample", TORCH_BOX(&mpkernels::wavenet_generate::sample));
}
