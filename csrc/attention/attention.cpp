// Attention on the CPU: out = softmax(cap(scale Q K^T) + bias) V over the keys that intervals and mask leave, and its
// gradients. Shapes of the arguments: mpkernels/attention/attention/schema.py. The kernels: attention_forward.h and
// attention_backward.h, on the products of attention_products.h, or, where the processor multiplies bfloat16, of
// attention_bfloat16.cpp.
#include "attention/attention_bfloat16.h"
#include "attention/attention_products.h"
#include "attention/attention_run.h"
#include "common/dispatch.h"
#include "common/tensor.h"

#include <tuple>

namespace mpkernels {
namespace attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <typename S>
Heads<S> heads_of(const Tensor& x) {
  return {pointer<S>(x), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename S>
Broadcast<S> broadcast_of(const OptionalTensor& x) {
  if (!x.has_value()) return {nullptr, 0, 0, 0, 0};
  const auto stride = [&](int64_t i) { return x->size(i) == 1 ? 0 : x->stride(i); };
  // (a last dimension of one key is as contiguous as any)
  return {pointer<S>(*x), stride(0), stride(1), stride(2), stride(3)};
}

template <typename S>
Problem<S> problem_of(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& first,
                      const OptionalTensor& last, const OptionalTensor& mask, const OptionalTensor& bias,
                      const OptionalTensor& seed, double scale, double softcap, double dropout_p) {
  Problem<S> p{};
  p.query = heads_of<const S>(query);
  p.key = heads_of<const S>(key);
  p.value = heads_of<const S>(value);
  p.batches = query.size(0);
  p.heads = query.size(1);
  p.key_heads = key.size(1);
  p.queries = query.size(2);
  p.keys = key.size(2);
  p.width = query.size(3);
  p.value_width = value.size(3);
  p.first = pointer<const int32_t>(first);
  p.last = pointer<const int32_t>(last);
  if (first.has_value()) {
    p.interval_batch = first->size(0) == 1 ? 0 : first->stride(0);
    p.interval_head = first->size(1) == 1 ? 0 : first->stride(1);
  }
  p.mask = broadcast_of<const bool>(mask);
  p.bias = broadcast_of<const S>(bias);
  p.scale = scale;
  p.softcap = softcap;
  p.dropout_p = seed.has_value() ? dropout_p : 0;
  p.seed = seed.has_value() ? static_cast<uint64_t>(*pointer<const int64_t>(*seed)) : 0;
  return p;
}

// (B, H, rows, width), in the memory order (B, rows, H, width) where `heads_last`
Tensor empty_heads(const Tensor& like, int64_t heads, int64_t rows, int64_t width, bool heads_last) {
  if (!heads_last) return empty({like.size(0), heads, rows, width}, like);
  return torch::stable::transpose(empty({like.size(0), rows, heads, width}, like), 1, 2);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& first, const OptionalTensor& last, const OptionalTensor& mask,
                                   const OptionalTensor& bias, const OptionalTensor& seed, double scale, double softcap,
                                   double dropout_p, bool heads_last) {
  Tensor out = empty_heads(query, query.size(1), query.size(2), value.size(3), heads_last);
  const auto wide = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor lse = empty({query.size(0), query.size(1), query.size(2)}, query, wide);
  dispatch_floating("attention", query, [&](auto element) {
    using S = decltype(element);
    const auto p = problem_of<S>(query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p);
    const auto to = heads_of<S>(out);
    auto* to_lse = pointer<Compute<S>>(lse);
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (multiplies_bfloat16()) return run_forward_bfloat16(p, to, to_lse);
    }
    run_forward<WideProducts<S>>(p, to, to_lse);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const OptionalTensor& grad_out, const OptionalTensor& grad_lse,
                                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const Tensor& out, const Tensor& lse, const OptionalTensor& first,
                                                    const OptionalTensor& last, const OptionalTensor& mask,
                                                    const OptionalTensor& bias, const OptionalTensor& seed,
                                                    double scale, double softcap, double dropout_p, bool heads_last,
                                                    bool needs_bias) {
  const auto gradient = [&](const Tensor& x) { return empty_heads(x, x.size(1), x.size(2), x.size(3), heads_last); };
  Tensor of_query = gradient(query), of_key = gradient(key), of_value = gradient(value);
  Tensor of_bias = no_gradient(query);
  dispatch_floating("attention", query, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const auto p = problem_of<S>(query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p);
    Gradients<S> g{};
    g.out = heads_of<const S>(out);
    if (grad_out.has_value()) g.grad_out = heads_of<const S>(*grad_out);
    g.lse = pointer<const T>(lse);
    g.grad_lse = pointer<const T>(grad_lse);
    g.query = heads_of<S>(of_query);
    g.key = heads_of<S>(of_key);
    g.value = heads_of<S>(of_value);
    if (needs_bias) {
      const bool wide = std::is_same_v<T, double>;
      of_bias = empty({bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, query,
                      wide ? ScalarType::Double : ScalarType::Float);
      g.bias = pointer<T>(of_bias);
      const auto stride = [&](int64_t i) { return bias->size(i) == 1 ? 0 : of_bias.stride(i); };
      g.bias_batch = stride(0);
      g.bias_head = stride(1);
      g.bias_row = stride(2);
      g.bias_over_queries = bias->size(2) == 1;
      torch::stable::zero_(of_bias);
    }
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (multiplies_bfloat16()) return run_backward_bfloat16(p, g);
    }
    run_backward<WideProducts<S>>(p, g);
  });
  if (needs_bias && of_bias.scalar_type() != query.scalar_type()) {
    of_bias = torch::stable::to(of_bias, query.scalar_type());
  }
  return {of_query, of_key, of_value, of_bias};
}

}  // namespace
}  // namespace attention
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("attention", TORCH_BOX(&mpkernels::attention::forward));
  library.impl("attention_backward", TORCH_BOX(&mpkernels::attention::backward));
}
