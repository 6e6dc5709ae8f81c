// The passes of attention over all blocks, on torch's threads; a template over the kind of products.
#pragma once

#include "attention/attention_backward.h"
#include "attention/attention_forward.h"
#include "common/parallel.h"

#include <memory>

namespace mpkernels {
namespace attention {

template <typename Products>
void run_forward(const Problem<typename Products::Element>& p, const Heads<typename Products::Element>& out,
                 typename Products::T* lse) {
  const int64_t blocks = p.query_blocks();
  parallel_pieces(p.batches * p.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // (the last queries first: a causal mask leaves them most work)
      const int64_t head = i / blocks, block = blocks - 1 - i % blocks;
      ForwardBlock<Products>(p, head / p.heads, head % p.heads, block).run(out, lse);
    }
  });
}

template <typename N>
std::unique_ptr<N[]> workspace(int64_t size) {
  return std::unique_ptr<N[]>(new N[static_cast<size_t>(size)]);
}

template <typename Products>
void run_backward(const Problem<typename Products::Element>& p, const Gradients<typename Products::Element>& g) {
  using T = typename Products::T;
  using Packed = typename Products::Packed;
  using Natural = typename Products::Natural;
  const int64_t per_head = p.query_blocks(), blocks = p.batches * p.heads * per_head;
  // heads that add to the same elements of the bias belong to one piece, in one order
  const int64_t batches = g.bias != nullptr && g.bias_batch == 0 ? 1 : p.batches;
  const int64_t heads = g.bias != nullptr && g.bias_head == 0 ? 1 : p.key_heads;
  const int64_t owners = std::max<int64_t>(batches * heads, 1);
  const int64_t splits = std::clamp<int64_t>((wanted_pieces + owners - 1) / owners, 1, most_splits);
  const bool with_out = g.grad_out.data != nullptr;
  const auto query = workspace<Packed>(blocks * Products::packed_size(p.width));
  const auto grad_out = workspace<Packed>(with_out ? blocks * Products::packed_size(p.value_width) : 0);
  const auto query_rows =
      workspace<Natural>(Products::natural_in_place(p.width) ? 0 : blocks * Products::natural_size(p.width));
  const auto grad_rows = workspace<Natural>(
      with_out && !Products::natural_in_place(p.value_width) ? blocks * Products::natural_size(p.value_width) : 0);
  const auto delta = workspace<T>(blocks * block_queries);
  const auto lse = workspace<T>(blocks * block_queries);
  const auto ranges = workspace<KeyRange>(blocks);
  const auto finite = workspace<unsigned char>(blocks);
  const auto sums = workspace<T>(splits * blocks * p.width * block_queries);
  const Prepared<Products> prepared{query.get(),
                                    grad_out.get(),
                                    Products::natural_in_place(p.width) ? nullptr : query_rows.get(),
                                    Products::natural_in_place(p.value_width) ? nullptr : grad_rows.get(),
                                    delta.get(),
                                    lse.get(),
                                    ranges.get(),
                                    finite.get(),
                                    sums.get(),
                                    splits};
  const auto each_block = [&](const auto& body) {
    parallel_pieces(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / per_head / p.heads, i / per_head % p.heads, i % per_head);
    });
  };
  each_block([&](int64_t b, int64_t h, int64_t block) { prepare_block(p, g, prepared, b, h, block); });
  parallel_pieces(batches * heads * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t split = piece % splits, head = piece / splits % heads, batch = piece / splits / heads;
      BackwardTile<Products> tile(p, g, prepared, split);
      // a head after the other: its queries stay in the caches
      for (int64_t b = batch; b < p.batches; b += batches) {
        for (int64_t kv = head; kv < p.key_heads; kv += heads) {
          for (int64_t key = split * backward_keys; key < p.keys; key += splits * backward_keys) tile.run(b, kv, key);
        }
      }
    }
  });
  each_block([&](int64_t b, int64_t h, int64_t block) { finish_block(p, g, prepared, b, h, block); });
}

}  // namespace attention
}  // namespace mpkernels
