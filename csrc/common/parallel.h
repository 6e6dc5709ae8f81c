// Loops over independent pieces of work on torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mpkernels {

// Calls body(begin, end) for pieces of [0, count). Threads take pieces of `grain` as they become free, so that uneven
// pieces balance; which thread runs a piece must not change its result. Fewer than two grains run on the caller, with
// no torch call at all.
template <typename Body>
void parallel_pieces(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  const int64_t pieces = (count + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pieces);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
        body(piece * grain, std::min(count, (piece + 1) * grain));
      }
    }
  });
}

}  // namespace mpkernels
