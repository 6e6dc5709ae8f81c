// Backward of the spline coupling on a GPU: a thread an element, as forward. An element's gradients of its parameters
// take the place of the parameters in shared memory and leave it as rows (B, C, S, P), 16 bytes a store; or they are
// written where they belong at once, side by side for neighbouring threads, which is right for (B, C, P, S).
#pragma once

#include "flows/spline_coupling.cuh"

namespace mpkernels {
namespace spline_coupling {

template <typename S>
struct Gradients {
  Elements<const S> of_y;
  const Compute<S>* of_log_abs_det;  // (B,) of stride `step`
  int64_t step;
  S* of_x;                      // (B, C, S), or null
  Parameters<S> of_parameters;  // (B, C, S, P), or null

  __device__ __forceinline__ S of_y_at(const Tiling& tiling, const Place& i) const {
    return tiling.flat ? of_y.data[i.n] : of_y.at(i);
  }
};

// Staged: through shared memory; parameters, or their gradients, or both, are in rows. (Those that are not are copied
// to and from there by the thread of the element.)
template <typename S, int K, bool Staged>
__global__ void __launch_bounds__(threads_per_block, backward_blocks<S>)
    backward_kernel(Problem<S> in, Gradients<S> to, int64_t blocks) {
  using T = Compute<S>;
  MPKERNELS_DYNAMIC_SHARED(T, space);
  const int thread = static_cast<int>(threadIdx.x), number = in.number();
  const bool loads = Staged && in.parameters.rows, stores = Staged && to.of_parameters.rows;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Span span = span_of(in.tiling, block);
    for (int64_t start = 0; start < span.count; start += threads_per_block) {
      const int64_t left = span.count - start, first = span.first + start;
      const int count = left < threads_per_block ? static_cast<int>(left) : threads_per_block;
      const S* from = in.parameters.data + span.sample * in.parameters.batch + first * number;
      S* target = stores ? to.of_parameters.data + (span.sample * in.tiling.elements + first) * number : nullptr;
      const int lead = !Staged ? 0 : loads ? lead_of(from) : lead_of(target);
      const Rows<T, K> rows{space + lead, number};
      if (loads) {
        load_rows<sizeof(S) == 2 ? 1 : 2>(from, count * number, rows, lead);
        __syncthreads();
      }
      if (thread < count) {
        const Place i = place_of(in.tiling, span.sample, first + thread);
        const S* own = in.parameters.of(i);
        S* of_own = to.of_parameters.data == nullptr ? nullptr : to.of_parameters.of(i);
        const auto read = [&](int p) { return static_cast<T>(own[p * in.parameters.number]); };
        const auto write = [&](int p, T gradient) {
          if (of_own != nullptr) of_own[p * to.of_parameters.number] = static_cast<S>(gradient);
        };
        const auto in_row = [&](int p) { return rows.at(thread, p); };
        const auto to_row = [&](int p, T gradient) { rows.at(thread, p) = gradient; };

        S of_x = to.of_y_at(in.tiling, i);
        const double value = widened(in.x_at(i)) + widened(in.low_at(i));
        if (inside(in.settings, value)) {
          const double g = widened(of_x), l = static_cast<double>(to.of_log_abs_det[i.b * to.step]);
          if constexpr (Staged) {
            for (int p = 0; !loads && p < number; ++p) to_row(p, read(p));
            of_x = static_cast<S>(gradients<T, K>(in.settings, value, g, l, in_row, to_row));
          } else {
            of_x = static_cast<S>(gradients<T, K>(in.settings, value, g, l, read, write));
          }
        } else {
          for (int p = 0; p < number; ++p) Staged ? to_row(p, T(0)) : write(p, T(0));
        }
        for (int p = 0; Staged && !stores && p < number; ++p) write(p, in_row(p));
        if (to.of_x != nullptr) to.of_x[i.n] = of_x;
      }
      if (stores) {
        __syncthreads();
        store_rows(target, count * number, rows, lead);
      }
      if (Staged) __syncthreads();
    }
  }
}

}  // namespace spline_coupling
}  // namespace mpkernels
