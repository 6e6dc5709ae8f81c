// The affine coupling on the CPU: the ops of mpkernels/flows/affine_coupling/schema.py. Formulas and shapes:
// affine_coupling_math.h; vectors and bytes: affine_coupling_runs.h; the order of the work: affine_coupling_plan.h.
//
// Threads take pieces of 16384 elements; log-determinants are summed in vectors over 1024 elements, then in double over
// the lines of a piece and the pieces of a sample. Half types, and elements that do not lie side by side, are copied a
// line at a time.
#include "common/dispatch.h"
#include "common/scratch.h"
#include "flows/affine_coupling_plan.h"
#include "flows/affine_coupling_runs.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace mpkernels {
namespace affine_coupling {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t streamed_bytes = int64_t{4} << 20;  // outputs from here on are written past the caches

// What a call is about, in numbers.
struct Problem {
  int64_t batch, channels, height, width;
  double clamp, epsilon;
  bool shift_before, streamed;
  int64_t first, last;  // channels that are transformed
  Kept kept;
  Walk walk, rest;  // through those, and through the others

  Problem(const Tensor& x, double clamp, double epsilon, int64_t pattern, int64_t parity, bool shift_before)
      : batch(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        clamp(clamp),
        epsilon(epsilon),
        shift_before(shift_before),
        streamed(x.numel() * static_cast<int64_t>(x.element_size()) > streamed_bytes),
        first(0),
        last(channels),
        kept(pattern, parity, channels, height, width) {
    if (pattern == pattern_channel) (parity == 0 ? first : last) = (channels + 1) / 2;
    const int64_t plane = height * width, elements = channels * plane;
    const bool along_batch = elements <= few_elements && batch > elements;
    walk = {batch, (last - first) * plane, along_batch};
    rest = {batch, (channels - (last - first)) * plane, along_batch};
  }

  template <typename T>
  Settings<T> settings() const {
    return {static_cast<T>(clamp), static_cast<T>(epsilon), shift_before, streamed};
  }

  // `count` channels of a tensor from one on, `step` apart.
  template <typename S>
  Operand<S, Compute<std::remove_const_t<S>>> operand(const Tensor& x, int64_t begin, int64_t count,
                                                      int64_t step = 1) const {
    const Strides strides{x.stride(0), step * x.stride(1), x.stride(2), x.stride(3)};
    return {pointer<S>(x) + begin * x.stride(1), Levels(strides, count, height, width)};
  }
  template <typename S>
  auto transformed(const Tensor& x) const {
    return operand<S>(x, first, last - first);
  }
  template <typename S>
  auto others(const Tensor& x) const {
    return operand<S>(x, first == 0 ? last : 0, channels - (last - first));
  }

  // (raw, shift), wherever they are; what is not there stays null
  template <typename S>
  auto parameters(const OptionalTensor& raw, const OptionalTensor& shift, int64_t layout) const {
    const int64_t count = last - first;
    using Found = Operand<S, Compute<std::remove_const_t<S>>>;
    std::pair<Found, Found> found;
    if (layout == separate) {
      if (raw.has_value()) found.first = operand<S>(*raw, 0, count);
      if (shift.has_value()) found.second = operand<S>(*shift, 0, count);
    } else if (raw.has_value()) {
      const bool halves = layout == shift_scale || layout == scale_shift;
      found.first = operand<S>(*raw, 0, count, halves ? 1 : 2);
      found.second = operand<S>(*raw, halves ? count : 1, count, halves ? 1 : 2);
      if (layout == shift_scale || layout == shift_scale_interleaved) std::swap(found.first, found.second);
    }
    return found;
  }
};

// Which elements of the transformed part are kept.
struct Keeping {
  const Kept& pattern;
  Operand<const uint8_t, uint8_t> mask;

  Keeping(const Problem& problem, const OptionalTensor& tensor) : pattern(problem.kept) {
    if (!tensor.has_value()) return;
    const Strides strides{tensor->stride(0), tensor->stride(1), tensor->stride(2), tensor->stride(3)};
    mask = {pointer<const uint8_t>(*tensor), Levels(strides, problem.channels, problem.height, problem.width)};
  }

  // The bytes of n elements, or of less: then n is lowered. Null where nothing is kept.
  const uint8_t* bytes(bool along_batch, int64_t which, int64_t i, int64_t& n, uint8_t* room) const {
    if (mask.at != nullptr) return mask.read(along_batch, which, i, n, room);
    if (pattern.bytes.empty()) return nullptr;
    if (along_batch) {
      std::fill_n(room, n, pattern.bytes[static_cast<size_t>(pattern.place(which))]);
      return room;
    }
    n = std::min(n, pattern.following(i));
    return pattern.bytes.data() + pattern.place(i);
  }
};

// How many of n elements from `to` on to write first, so that whole vectors can then be written past the caches.
template <typename S>
int64_t aligned_count(bool streamed, const S* to, int64_t n) {
  const auto behind = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % MPKERNELS_VECTOR_BYTES);
  if (!streamed || to == nullptr || behind == 0) return n;
  return std::min(n, (MPKERNELS_VECTOR_BYTES - behind) / static_cast<int64_t>(sizeof(S)));
}

// A piece of what is kept as it is.
template <typename S>
void copy(const Problem& problem, const Operand<const S, Compute<S>>& from, const Operand<S, Compute<S>>& to,
          int64_t item) {
  using T = Compute<S>;
  const bool along_batch = problem.rest.along_batch;
  T* room = scratch<T>(line_elements);
  problem.rest.run(item, [&](int64_t which, int64_t begin, int64_t end) {
    for (int64_t i = begin, n; i < end; i += n) {
      n = std::min(line_elements, end - i);
      if (!along_batch) n = aligned_count(problem.streamed, to.element(which, i), n);
      const S* there = from.in_place(along_batch, which, i, n);
      S* here = to.in_place(along_batch, which, i, n);
      if (there != nullptr && here != nullptr) {
        copy_run(there, here, n, problem.streamed);
        continue;
      }
      T* line = to.write(along_batch, which, i, n, room);
      const T* found = from.read(along_batch, which, i, n, line);
      if (found != line) std::copy_n(found, n, line);
      to.finish(along_batch, which, i, n, line, room);
    }
  });
}

// Calls work(item) for the pieces of the transformed part, and copies the others, on all threads.
template <typename S, typename Work>
void for_items(const Problem& problem, const Operand<const S, Compute<S>>& from, const Operand<S, Compute<S>>& to,
               const Work& work) {
  const int64_t items = problem.walk.items(), others = to.at == nullptr ? 0 : problem.rest.items();
  const int64_t elements = std::max({problem.walk.item_elements(), problem.rest.item_elements(), int64_t{1}});
  const int64_t grain = std::max<int64_t>(1, piece_elements / elements);
  parallel_pieces(items + others, grain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      item < items ? work(item) : copy<S>(problem, from, to, item - items);
    }
    if (problem.streamed) finish_streams();
  });
}

template <typename S>
struct Forward {
  using T = Compute<S>;
  Operand<const S, T> x, raw, shift, others;
  Operand<S, T> y, others_to;
  Keeping keeping;
  T* log_abs_det;
};

template <typename S, int scale, bool inverse>
void forward_all(const Problem& problem, const Forward<S>& call) {
  using T = Compute<S>;
  const auto settings = problem.settings<T>();
  const Walk& walk = problem.walk;
  const bool along_batch = walk.along_batch;
  std::vector<double> sums(static_cast<size_t>(along_batch ? 0 : walk.items()));
  if (along_batch || walk.elements == 0) std::fill_n(call.log_abs_det, problem.batch, T(0));
  for_items<S>(problem, call.others, call.others_to, [&](int64_t item) {
    T* room = scratch<T>(4 * line_elements);
    uint8_t bytes[line_elements];
    double total = 0;
    walk.run(item, [&](int64_t which, int64_t begin, int64_t end) {
      for (int64_t i = begin, n; i < end; i += n) {
        n = std::min(line_elements, end - i);
        if (!along_batch) n = aligned_count(problem.streamed, call.y.element(which, i), n);
        const uint8_t* kept = call.keeping.bytes(along_batch, which, i, n, bytes);
        T* y = call.y.write(along_batch, which, i, n, room);
        const ForwardRun<T> run{call.x.read(along_batch, which, i, n, room + line_elements),
                                call.raw.read(along_batch, which, i, n, room + 2 * line_elements),
                                call.shift.read(along_batch, which, i, n, room + 3 * line_elements),
                                kept,
                                y,
                                along_batch ? call.log_abs_det + i : nullptr};
        total += forward_run<T, scale, inverse>(run, n, settings);
        call.y.finish(along_batch, which, i, n, y, room);
      }
    });
    if (!along_batch) sums[static_cast<size_t>(item)] = total;
  });
  if (along_batch || walk.elements == 0) return;
  const int64_t pieces = walk.pieces();
  for (int64_t sample = 0; sample < problem.batch; ++sample) {
    double total = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) total += sums[static_cast<size_t>(sample * pieces + piece)];
    call.log_abs_det[sample] = static_cast<T>(total);
  }
}

template <typename S>
struct Backward {
  using T = Compute<S>;
  Operand<const S, T> grad, x, raw, shift, others;
  Operand<S, T> of_x, of_raw, of_shift, others_to;
  Keeping keeping;
  const T* of_log;
  int64_t of_log_stride;
};

template <typename S, int scale, bool inverse>
void backward_all(const Problem& problem, const Backward<S>& call) {
  using T = Compute<S>;
  const auto settings = problem.settings<T>();
  const bool along_batch = problem.walk.along_batch;
  for_items<S>(problem, call.others, call.others_to, [&](int64_t item) {
    T* room = scratch<T>(7 * line_elements);
    uint8_t bytes[line_elements];
    alignas(64) T of_each[line_elements];
    const auto place = [&](int number) { return room + number * line_elements; };
    problem.walk.run(item, [&](int64_t which, int64_t begin, int64_t end) {
      for (int64_t i = begin, n; i < end; i += n) {
        n = std::min(line_elements, end - i);
        if (!along_batch && call.of_x.at != nullptr) {
          n = aligned_count(problem.streamed, call.of_x.element(which, i), n);
        }
        const uint8_t* kept = call.keeping.bytes(along_batch, which, i, n, bytes);
        if (along_batch) gather<T>(call.of_log + i * call.of_log_stride, call.of_log_stride, n, of_each);
        const BackwardRun<T> run{call.grad.read(along_batch, which, i, n, place(0)),
                                 call.x.read(along_batch, which, i, n, place(1)),
                                 call.raw.read(along_batch, which, i, n, place(2)),
                                 call.shift.read(along_batch, which, i, n, place(3)),
                                 kept,
                                 call.of_x.write(along_batch, which, i, n, place(4)),
                                 call.of_raw.write(along_batch, which, i, n, place(5)),
                                 call.of_shift.write(along_batch, which, i, n, place(6)),
                                 along_batch ? of_each : nullptr,
                                 along_batch ? T(0) : call.of_log[which * call.of_log_stride]};
        backward_run<T, scale, inverse>(run, n, settings);
        call.of_x.finish(along_batch, which, i, n, run.of_x, place(4));
        call.of_raw.finish(along_batch, which, i, n, run.of_raw, place(5));
        call.of_shift.finish(along_batch, which, i, n, run.of_shift, place(6));
      }
    });
  });
}

// Calls f with the scale's formulas and the direction, as constants.
template <typename F>
void dispatch_scale(int64_t scale, double epsilon, bool inverse, const F& f) {
  const auto directed = [&](auto constant) {
    inverse ? f(constant, std::true_type{}) : f(constant, std::false_type{});
  };
  switch (scale) {
    case scale_exp:
      return directed(std::integral_constant<int, scale_exp>{});
    case scale_sigmoid:
      return epsilon == 0 ? directed(std::integral_constant<int, scale_sigmoid>{})
                          : directed(std::integral_constant<int, scale_sigmoid_epsilon>{});
    case scale_tanh:
      return directed(std::integral_constant<int, scale_tanh>{});
    case scale_softclamp:
      return directed(std::integral_constant<int, scale_softclamp>{});
    default:
      return directed(std::integral_constant<int, scale_additive>{});
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& raw, const OptionalTensor& shift,
                                   const OptionalTensor& mask, int64_t scale, double clamp, double epsilon,
                                   int64_t layout, int64_t pattern, int64_t parity, bool shift_first, bool inverse) {
  const Problem problem(x, clamp, epsilon, pattern, parity, shift_first != inverse);
  Tensor y = empty({problem.batch, problem.channels, problem.height, problem.width}, x);
  const bool is_double = x.scalar_type() == ScalarType::Double;
  Tensor log_abs_det = empty({problem.batch}, x, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_floating("affine_coupling", x, [&](auto element) {
    using S = decltype(element);
    const auto [in_raw, in_shift] = problem.parameters<const S>(raw, shift, layout);
    const Forward<S> call{problem.transformed<const S>(x),
                          in_raw,
                          in_shift,
                          problem.others<const S>(x),
                          problem.transformed<S>(y),
                          problem.others<S>(y),
                          Keeping(problem, mask),
                          pointer<Compute<S>>(log_abs_det)};
    dispatch_scale(scale, epsilon, inverse, [&](auto kind, auto direction) {
      forward_all<S, decltype(kind)::value, decltype(direction)::value>(problem, call);
    });
  });
  return {y, log_abs_det};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_log_abs_det, const Tensor& x,
                                            const OptionalTensor& raw, const OptionalTensor& shift,
                                            const OptionalTensor& mask, int64_t scale, double clamp, double epsilon,
                                            int64_t layout, int64_t pattern, int64_t parity, bool shift_first,
                                            bool inverse, bool needs_x, bool needs_raw, bool needs_shift) {
  const Problem problem(x, clamp, epsilon, pattern, parity, shift_first != inverse);
  const auto gradient = [](const OptionalTensor& of, bool needed) {
    if (!needed || !of.has_value()) return OptionalTensor();
    return OptionalTensor(empty({of->size(0), of->size(1), of->size(2), of->size(3)}, *of));
  };
  const OptionalTensor of_x = gradient(x, needs_x), of_raw = gradient(raw, needs_raw),
                       of_shift = gradient(shift, needs_shift);
  dispatch_floating("affine_coupling", x, [&](auto element) {
    using S = decltype(element);
    const auto [in_raw, in_shift] = problem.parameters<const S>(raw, shift, layout);
    const auto [to_raw, to_shift] = problem.parameters<S>(of_raw, of_shift, layout);
    Backward<S> call{problem.transformed<const S>(grad_y),
                     {},
                     in_raw,
                     {},
                     problem.others<const S>(grad_y),
                     {},
                     to_raw,
                     to_shift,
                     {},
                     Keeping(problem, mask),
                     pointer<const Compute<S>>(grad_log_abs_det),
                     grad_log_abs_det.stride(0)};
    if (to_raw.at != nullptr) {
      call.x = problem.transformed<const S>(x);
      if (problem.shift_before) call.shift = in_shift;
    }
    if (of_x.has_value()) {
      call.of_x = problem.transformed<S>(*of_x);
      call.others_to = problem.others<S>(*of_x);
    }
    dispatch_scale(scale, epsilon, inverse, [&](auto kind, auto direction) {
      backward_all<S, decltype(kind)::value, decltype(direction)::value>(problem, call);
    });
  });
  const auto found = [&](const OptionalTensor& gradient) { return gradient.has_value() ? *gradient : no_gradient(x); };
  return {found(of_x), found(of_raw), found(of_shift)};
}

}  // namespace
}  // namespace affine_coupling
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("affine_coupling", TORCH_BOX(&mpkernels::affine_coupling::forward));
  library.impl("affine_coupling_backward", TORCH_BOX(&mpkernels::affine_coupling::backward));
}
