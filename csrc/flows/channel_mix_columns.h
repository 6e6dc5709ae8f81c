// (B, C, S) numbers as C rows of B S columns, 64 columns at a time, for the product with a matrix at every position.
#pragma once

#include "common/matmul.h"
#include "common/tensor.h"
#include "common/vector.h"

#include <algorithm>

namespace mpkernels {
namespace channel_mix {

constexpr int64_t panel = 64;

// Column n is position n % positions of sample n / positions, whichever strides they have. Samples whose positions
// follow each other evenly are one: features (S = 1), and channels that lie side by side.
template <typename S>
struct Columns {
  S* data;
  int64_t positions, sample_stride, channel_stride, position_stride;

  explicit Columns(const Tensor& x)
      : data(pointer<S>(x)),
        positions(x.size(2)),
        sample_stride(x.stride(0)),
        channel_stride(x.stride(1)),
        position_stride(x.stride(2)) {
    if (x.size(1) == 1) channel_stride = 1;  // (a dimension of one element has any stride)
    if (positions == 1) position_stride = sample_stride;
    if (x.size(0) == 1 || sample_stride == positions * position_stride) {
      positions *= x.size(0);
      sample_stride = 0;
    }
  }

  S* at(int64_t n) const { return data + n / positions * sample_stride + n % positions * position_stride; }
  // How many columns from n on lie in one sample.
  int64_t run(int64_t n) const { return positions - n % positions; }
};

// to[c][j] = column first + j of channel c, for j < count; 0 up to 64.
template <typename S, typename T = Compute<S>>
void pack(const Columns<const S>& x, int64_t channels, int64_t first, int64_t count, T* to) {
  if (x.position_stride != 1 && x.channel_stride == 1 && x.run(first) >= count) {
    const S* from = x.at(first);
    if (count < panel) std::fill_n(to, channels * panel, T(0));
    transpose_into<T>(to, panel, count, channels, [&](int64_t j, int64_t c, int64_t n) {
      return load_first<S>(from + j * x.position_stride + c, n);
    });
    return;
  }
  for (int64_t j = 0, n; j < count; j += n) {
    n = std::min(x.run(first + j), count - j);
    const S* from = x.at(first + j);
    for (int64_t c = 0; c < channels; ++c, from += x.channel_stride) {
      T* row = to + c * panel + j;
      if (x.position_stride == 1) {
        for (int64_t i = 0; i < n; i += lanes<T>) store_first<T>(row + i, load_first<S>(from + i, n - i), n - i);
      } else {
        for (int64_t i = 0; i < n; ++i) row[i] = to_compute<S>(from[i * x.position_stride]);
      }
    }
  }
  for (int64_t c = 0; count < panel && c < channels; ++c) {
    std::fill(to + c * panel + count, to + (c + 1) * panel, T(0));
  }
}

// column first + j of channel c = from[c][j]
template <typename S, typename T = Compute<S>>
void unpack(const T* from, int64_t channels, int64_t first, int64_t count, const Columns<S>& y) {
  if (y.position_stride != 1 && y.channel_stride == 1 && y.run(first) >= count) {
    S* to = y.at(first);
    transpose_rows<T>(
        channels, count, [&](int64_t c, int64_t j, int64_t) { return load_raw(from + c * panel + j); },
        [&](int64_t j, int64_t c, Vector<T> values) {
          store_first<S>(to + j * y.position_stride + c, values, channels - c);
        });
    return;
  }
  for (int64_t j = 0, n; j < count; j += n) {
    n = std::min(y.run(first + j), count - j);
    S* to = y.at(first + j);
    for (int64_t c = 0; c < channels; ++c, to += y.channel_stride) {
      const T* row = from + c * panel + j;
      if (y.position_stride == 1) {
        for (int64_t i = 0; i < n; i += lanes<T>) store_first<S>(to + i, load_first<T>(row + i, n - i), n - i);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i * y.position_stride] = static_cast<S>(row[i]);
      }
    }
  }
}

// to[j][c] = column first + j of channel c: the transpose, in rows of `row` numbers. `packed` holds the columns as
// pack writes them, or is null where they are read in place.
template <typename S, typename T = Compute<S>>
void pack_transposed(const Columns<const S>& x, int64_t channels, int64_t first, int64_t count, T* to, int64_t row,
                     T* work) {
  if (x.position_stride == 1 && count == panel && x.run(first) >= count) {
    const S* from = x.at(first);
    transpose_into<T>(to, row, channels, panel, [&](int64_t c, int64_t j, int64_t n) {
      return load_first<S>(from + c * x.channel_stride + j, n);
    });
  } else {
    pack<S>(x, channels, first, count, work);
    transpose_into<T>(to, row, channels, panel,
                      [&](int64_t c, int64_t j, int64_t) { return load_raw(work + c * panel + j); });
  }
}

}  // namespace channel_mix
}  // namespace mpkernels
