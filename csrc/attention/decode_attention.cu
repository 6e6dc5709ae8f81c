// The launcher of attention of few queries to many keys: for mpkernels on CUDA tensors, or, compiled as C++, for
// mpkernels_fibres on the CPU. Arguments: mpkernels/attention/decode_attention/schema.py.
#include "attention/decode_attention.cuh"
#include "common/device.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace decode_attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

Broadcast broadcast_of(const OptionalTensor& x) {
  if (!x.has_value()) return {0, 0, 0, 0};
  const auto stride = [&](int64_t d) { return x->size(d) == 1 ? int64_t{0} : x->stride(d); };
  return {stride(0), stride(1), stride(2), stride(3)};
}

// Whether every row of a (B, G, S, width) tensor starts at, and has, a multiple of 16 bytes.
template <typename S>
bool wide_rows(const Tensor& x) {
  bool wide = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.size(3) % pack_size<S> == 0;
  for (int64_t d = 0; d < 3; ++d) wide = wide && (x.size(d) <= 1 || x.stride(d) % pack_size<S> == 0);
  return wide;
}

template <typename S>
Problem<S> problem_of(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& first,
                      const OptionalTensor& last, const OptionalTensor& mask, const OptionalTensor& bias, double scale,
                      double softcap) {
  Problem<S> in;
  in.query = pointer<S>(query);
  in.key = pointer<S>(key);
  in.value = pointer<S>(value);
  in.first = pointer<int32_t>(first);
  in.last = pointer<int32_t>(last);
  in.mask = pointer<bool>(mask);
  in.bias = pointer<S>(bias);
  in.query_batch = query.stride(0), in.query_head = query.stride(1), in.query_row = query.stride(2);
  in.key_batch = key.stride(0), in.key_head = key.stride(1), in.key_row = key.stride(2);
  in.value_batch = value.stride(0), in.value_head = value.stride(1), in.value_row = value.stride(2);
  in.interval_batch = first.has_value() && first->size(0) > 1 ? first->size(1) * first->size(2) : 0;
  in.interval_head = first.has_value() && first->size(1) > 1 ? first->size(2) : 0;
  in.mask_strides = broadcast_of(mask);
  in.bias_strides = broadcast_of(bias);
  in.batch = query.size(0), in.heads = query.size(1), in.groups = key.size(1);
  in.queries = query.size(2), in.keys = key.size(2);
  in.rows = in.heads / in.groups * in.queries;
  in.pieces = (in.keys + piece_keys - 1) / piece_keys;
  in.width = static_cast<int>(query.size(3));
  in.value_width = static_cast<int>(value.size(3));
  in.wide_keys = wide_rows<S>(key);
  in.wide_values = wide_rows<S>(value);
  in.scale = static_cast<Compute<S>>(scale);
  in.softcap = static_cast<Compute<S>>(softcap);
  return in;
}

// Calls f with a value of the dtype's C++ type, and, as constants, a width that holds the heads, and the rows of a
// block.
template <typename F>
void dispatch(const Tensor& query, int64_t width, int64_t rows, const F& f) {
  const auto with_rows = [&](auto element, auto compiled_width) {
    if (rows == 1) {
      f(element, compiled_width, std::integral_constant<int, 1>{});
    } else if (rows <= 4 || std::is_same_v<decltype(element), double>) {
      f(element, compiled_width, std::integral_constant<int, 4>{});
    } else if constexpr (!std::is_same_v<decltype(element), double>) {  // (doubles of 8 rows do not fit the registers)
      f(element, compiled_width, std::integral_constant<int, 8>{});
    }
  };
  const auto with_width = [&](auto element) {
    if (width <= 64) {
      with_rows(element, std::integral_constant<int, 64>{});
    } else if (width <= 128) {
      with_rows(element, std::integral_constant<int, 128>{});
    } else {
      with_rows(element, std::integral_constant<int, 256>{});
    }
  };
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return with_width(float{});
    case ScalarType::Double:
      return with_width(double{});
#if !defined(MPKERNELS_ON_FIBRES)
    case ScalarType::BFloat16:
      return with_width(__nv_bfloat16{});
    case ScalarType::Half:
      return with_width(__half{});
#endif
    default:
      STD_TORCH_CHECK(false, "decode_attention: no CUDA kernel for this dtype");
  }
}

unsigned launched(int64_t tasks) {
  constexpr int64_t most = 1 << 20;  // further ones are taken in turn
  return static_cast<unsigned>(std::min(tasks, most));
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& first, const OptionalTensor& last, const OptionalTensor& mask,
                                   const OptionalTensor& bias, double scale, double softcap, bool heads_last) {
  const Device device(query);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), width = value.size(3);
  Tensor out = heads_last ? torch::stable::transpose(empty({batch, queries, heads, width}, query), 1, 2)
                          : empty({batch, heads, queries, width}, query);
  const ScalarType wide = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor lse = empty({batch, heads, queries}, query, wide);
  if (lse.numel() == 0) return {out, lse};
  const int64_t problem_rows = heads / key.size(1) * queries;
  dispatch(query, std::max(query.size(3), width), problem_rows, [&](auto element, auto compiled_width, auto rows) {
    using S = decltype(element);
    using T = Compute<S>;
    constexpr int W = decltype(compiled_width)::value, R = decltype(rows)::value;
    const Problem<S> in = problem_of<S>(query, key, value, first, last, mask, bias, scale, softcap);
    const int64_t parts = in.batch * in.groups * in.pieces * in.rows, tiles = (in.rows + R - 1) / R;
    Tensor statistics = empty({parts, 2}, query, wide), partial = empty({parts, width}, query, wide);
    auto* softmax = reinterpret_cast<Softmax<T>*>(pointer<T>(statistics));
    const int64_t tasks = in.batch * in.groups * in.pieces * tiles;
    if (tasks > 0) {
      MPKERNELS_LAUNCH((piece_kernel<S, W, R>), launched(tasks), threads_per_block, 0, device.stream(), in, softmax,
                       pointer<T>(partial), tiles);
    }
    MPKERNELS_LAUNCH((merge_kernel<S>), launched(batch * heads * queries), threads_per_block, 0, device.stream(), in,
                     softmax, pointer<T>(partial), pointer<S>(out), pointer<T>(lse), heads_last);
  });
  return {out, lse};
}

}  // namespace
}  // namespace decode_attention
}  // namespace mpkernels

#if defined(MPKERNELS_ON_FIBRES)
STABLE_TORCH_LIBRARY_IMPL(mpkernels_fibres, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mpkernels, CUDA, library) {
#endif
  library.impl("decode_attention", TORCH_BOX(&mpkernels::decode_attention::forward));
}
