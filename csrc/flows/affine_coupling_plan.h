// In which order the CPU kernels of the affine coupling walk through tensors of any strides. It follows from the shape
// of x alone, so that sums have the same bits whatever the strides of the tensors are, and on any number of threads.
#pragma once

#include "common/parallel.h"
#include "common/vector.h"
#include "flows/affine_coupling_math.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace mpkernels {
namespace affine_coupling {

constexpr int64_t line_elements = 1024;                 // what is worked on at a time: its copies stay in the L1 cache
constexpr int64_t piece_elements = 16 * line_elements;  // what a thread takes
constexpr int64_t few_elements = 16;  // samples of no more are walked through together, an element after the other

struct Strides {
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

// The elements of a sample in order (channel, row, column), as at most three nested loops, the innermost one first.
struct Levels {
  int64_t batch = 0;
  int count = 1;
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {1, 0, 0};

  Levels() = default;
  Levels(const Strides& s, int64_t channels, int64_t height, int64_t width) : batch(s.batch), count(0) {
    const int64_t all[3] = {width, height, channels}, apart[3] = {s.column, s.row, s.channel};
    for (int d = 0; d < 3; ++d) {
      if (all[d] == 1) continue;
      if (count > 0 && apart[d] == strides[count - 1] * sizes[count - 1]) {
        sizes[count - 1] *= all[d];
      } else {
        sizes[count] = all[d];
        strides[count++] = apart[d];
      }
    }
    count = std::max(count, 1);
  }

  int64_t offset(int64_t i) const {
    if (count == 1) return i * strides[0];
    const int64_t rest = i / sizes[0];
    return i % sizes[0] * strides[0] + rest % sizes[1] * strides[1] + rest / sizes[1] * strides[2];
  }
  // Whether elements [i, i + n) lie side by side.
  bool together(int64_t i, int64_t n) const { return strides[0] == 1 && (count == 1 || i % sizes[0] + n <= sizes[0]); }
};

// n elements `stride` apart, converted; side by side at `to`.
template <typename T, typename S>
void gather(const S* from, int64_t stride, int64_t n, T* to) {
  if (stride == 1) {
    if constexpr (std::is_same_v<S, T>) {
      std::copy_n(from, n, to);
    } else {
      int64_t i = 0;
      for (; i + lanes<T> <= n; i += lanes<T>) store<T>(to + i, load<S>(from + i));
      if (i < n) store_first<T>(to + i, load_first<S>(from + i, n - i), n - i);
    }
  } else if (stride == 0) {
    std::fill_n(to, n, static_cast<T>(*from));
  } else if (stride == 2) {  // (a constant stride is vectorised)
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[2 * i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * stride]);
  }
}

// The other way round.
template <typename T, typename S>
void scatter(const T* from, int64_t stride, int64_t n, S* to) {
  if (stride == 1) {
    if constexpr (std::is_same_v<S, T>) {
      std::copy_n(from, n, to);
    } else {
      int64_t i = 0;
      for (; i + lanes<T> <= n; i += lanes<T>) store<S>(to + i, load<T>(from + i));
      if (i < n) store_first<S>(to + i, load_first<T>(from + i, n - i), n - i);
    }
  } else if (stride == 2) {
    for (int64_t i = 0; i < n; ++i) to[2 * i] = static_cast<S>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = static_cast<S>(from[i]);
  }
}

// Calls piece(offset, first, count) for parts of elements [i, i + n) that are evenly strided: they are `first` of the
// n.
template <typename Piece>
void for_even_pieces(const Levels& levels, int64_t i, int64_t n, const Piece& piece) {
  for (int64_t done = 0; done < n;) {
    const int64_t count = levels.count == 1 ? n : std::min(n - done, levels.sizes[0] - (i + done) % levels.sizes[0]);
    piece(levels.offset(i + done), done, count);
    done += count;
  }
}

// One tensor of a call, or a part of its channels. S is what it holds, T what is computed in.
template <typename S, typename T>
struct Operand {
  S* at = nullptr;  // null where it is not there
  Levels levels;

  static constexpr bool converted = !std::is_same_v<std::remove_const_t<S>, T>;

  S* element(int64_t sample, int64_t i) const { return at + sample * levels.batch + levels.offset(i); }

  // Elements [i, i + n) of a sample, or of samples [i, i + n) the element numbered `which`: where they are if they lie
  // side by side, else null.
  S* in_place(bool along_batch, int64_t which, int64_t i, int64_t n) const {
    if (along_batch) return levels.batch == 1 ? element(i, which) : nullptr;
    return levels.together(i, n) ? element(which, i) : nullptr;
  }

  // The same elements, in `room` where they do not lie side by side; null where the tensor is not there.
  const T* read(bool along_batch, int64_t which, int64_t i, int64_t n, T* room) const {
    if (at == nullptr) return nullptr;
    if constexpr (!converted) {
      if (const S* found = in_place(along_batch, which, i, n)) return found;
    }
    if (along_batch) {
      gather<T>(static_cast<const std::remove_const_t<S>*>(element(i, which)), levels.batch, n, room);
    } else {
      const std::remove_const_t<S>* from = at + which * levels.batch;
      for_even_pieces(levels, i, n, [&](int64_t offset, int64_t first, int64_t count) {
        gather<T>(from + offset, levels.strides[0], count, room + first);
      });
    }
    return room;
  }

  // Where to write those elements: there, or in `room`, from which `finish` moves them.
  T* write(bool along_batch, int64_t which, int64_t i, int64_t n, T* room) const {
    if (at == nullptr) return nullptr;
    if constexpr (!converted) {
      if (S* found = in_place(along_batch, which, i, n)) return found;
    }
    return room;
  }
  void finish(bool along_batch, int64_t which, int64_t i, int64_t n, const T* written, const T* room) const {
    if (at == nullptr || written != room) return;
    if (along_batch) {
      scatter(room, levels.batch, n, element(i, which));
    } else {
      S* to = at + which * levels.batch;
      for_even_pieces(levels, i, n, [&](int64_t offset, int64_t first, int64_t count) {
        scatter(room + first, levels.strides[0], count, to + offset);
      });
    }
  }
};

// Which elements a pattern of indices keeps, as bytes along the elements of a sample: what repeats, or the first of it.
struct Kept {
  std::vector<uint8_t> bytes;
  int64_t restart = 1;  // elements after which they begin again

  int64_t size() const { return static_cast<int64_t>(bytes.size()); }
  // Where the byte of an element is, and of how many elements the bytes follow.
  int64_t place(int64_t element) const { return element % restart % size(); }
  int64_t following(int64_t element) const { return std::min(size() - place(element), restart - element % restart); }

  Kept() = default;
  Kept(int64_t pattern, int64_t parity, int64_t channels, int64_t height, int64_t width) {
    const bool board = pattern == pattern_checkerboard;
    const int64_t plane = height * width, all = channels * plane;
    if (all == 0 || !(board || pattern == pattern_alternating)) return;
    // all planes of a board are the same; two rows of one repeat, but an odd number of rows ends in between
    const bool by_rows = board && (height % 2 == 0 || plane > 65536);
    const int64_t period = by_rows ? 2 * width : board ? plane : 2 * plane;
    restart = by_rows && height % 2 == 1 ? plane : all;
    bytes.resize(static_cast<size_t>((2 * line_elements + period - 1) / period * period));
    for (int64_t i = 0; i < size(); ++i) {
      const int64_t number = board ? i % plane / width + i % width : i / plane;
      bytes[static_cast<size_t>(i)] = number % 2 != parity;
    }
  }
};

// The order of the work on B samples of `elements`: pieces of samples, or, where those are few, pieces of the batch.
struct Walk {
  int64_t batch = 0, elements = 0;
  bool along_batch = false;

  int64_t pieces() const {  // of a sample; along the batch in all
    return along_batch ? (batch + line_elements - 1) / line_elements : (elements + piece_elements - 1) / piece_elements;
  }
  int64_t items() const { return elements == 0 ? 0 : along_batch ? pieces() : batch * pieces(); }
  int64_t item_elements() const {
    return along_batch ? elements * std::min(batch, line_elements) : std::min(elements, piece_elements);
  }

  // Calls line(which, begin, end) for the lines of a piece: elements of sample `which`, or samples of element `which`.
  template <typename Line>
  void run(int64_t item, const Line& line) const {
    if (along_batch) {
      const int64_t begin = item * line_elements, end = std::min(batch, begin + line_elements);
      for (int64_t element = 0; element < elements; ++element) line(element, begin, end);
    } else {
      const int64_t begin = item % pieces() * piece_elements;
      line(item / pieces(), begin, std::min(elements, begin + piece_elements));
    }
  }
};

}  // namespace affine_coupling
}  // namespace mpkernels
