// The affine coupling on the CPU: the ops of mpkernels/flows/affine_coupling/schema.py. Formulas and shapes:
// affine_coupling_math.h; vectors and bytes: affine_coupling_runs.h; the order of the work: affine_coupling_plan.h.
//
// Threads take pieces of 16384 elements; log-determinants are summed in vectors over 1024 elements, then in double over
// the lines of a piece and the pieces of a sample. Tensors whose elements do not lie side by side are copied a line at
// a time.
#include "common/dispatch.h"
#include "common/scratch.h"
#include "flows/affine_coupling_plan.h"
#include "flows/affine_coupling_runs.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <type_traits>

namespace mpkernels {
namespace affine_coupling {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t streamed_bytes = int64_t{4} << 20;  // outputs from here on are written past the caches

// `n` elements of S side by side and as T, copied to `room` where they are not.
template <typename T, typename S>
const T* side_by_side(const S* from, int64_t stride, int64_t n, T* room) {
  if constexpr (std::is_same_v<S, T>) {
    if (stride == 1) return from;
  } else if (stride == 1) {
    int64_t i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) store<T>(room + i, load<S>(from + i));
    if (i < n) store_first<T>(room + i, load_first<S>(from + i, n - i), n - i);
    return room;
  }
  if (stride == 0) {
    std::fill_n(room, n, static_cast<T>(*from));
  } else if (stride == 2) {  // (a constant stride is vectorised)
    for (int64_t i = 0; i < n; ++i) room[i] = static_cast<T>(from[2 * i]);
  } else {
    for (int64_t i = 0; i < n; ++i) room[i] = static_cast<T>(from[i * stride]);
  }
  return room;
}

template <typename T, typename S>
void scatter(const T* from, S* to, int64_t stride, int64_t n) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) store<S>(to + i, load<T>(from + i));
    if (i < n) store_first<S>(to + i, load_first<T>(from + i, n - i), n - i);
  } else if (stride == 2) {
    for (int64_t i = 0; i < n; ++i) to[2 * i] = static_cast<S>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = static_cast<S>(from[i]);
  }
}

// Where an operand begins, how it goes on, or that it is not there.
template <typename S>
struct Place {
  S* at = nullptr;
  Strides strides;
};

template <typename S, typename P>
Place<S> place(const P& tensor, int64_t channel = 0) {
  if (!tensor.has_value()) return {};
  return {pointer<S>(*tensor) + channel * tensor->stride(1),
          {tensor->stride(0), tensor->stride(1), tensor->stride(2), tensor->stride(3)}};
}

// The scale's and the shift's part of a tensor that holds both.
template <typename S>
std::pair<Place<S>, Place<S>> parts(const OptionalTensor& both, int64_t layout) {
  Place<S> first = place<S>(both), second = first;
  if (first.at != nullptr) {
    const int64_t channel = both->stride(1);
    if (layout == shift_scale || layout == scale_shift) {
      second.at += both->size(1) / 2 * channel;
    } else {
      second.at += channel;
      first.strides.channel = second.strides.channel = 2 * channel;
    }
  }
  if (layout == scale_shift || layout == scale_shift_interleaved) return {first, second};
  return {second, first};
}

// One part of the channels of all samples, and how to walk through it.
template <typename S>
struct Part {
  using T = Compute<S>;

  const S* in[operands] = {};  // those up to in_grad; in_mask is of bytes
  const uint8_t* mask = nullptr;
  S* out[operands] = {};  // the others
  Strides strides[operands];
  bool present[operands] = {};
  const Kept* kept = nullptr;
  Walk walk{};

  void add(int operand, const Place<S>& place) {
    if (place.at == nullptr) return;
    (operand >= out_x ? out[operand] : const_cast<S*&>(in[operand])) = place.at;
    strides[operand] = place.strides;
    present[operand] = true;
  }

  // Whether lines of an operand are used where they are.
  bool in_place(int operand) const { return std::is_same_v<S, T> && walk.strides[operand][3] == 1; }

  // A line of an operand from element i on, side by side in the type that is computed in; or null if it is not there.
  const T* input(int operand, int64_t a, int64_t b, int64_t c, int64_t i, int64_t n, T* room) const {
    if (!present[operand]) return nullptr;
    return side_by_side<T>(in[operand] + walk.offset(operand, a, b, c, i), walk.strides[operand][3], n,
                           room + operand * line_elements);
  }
  // Where to write a line of an output: there, or in a copy that `finish` moves there.
  T* output(int operand, int64_t a, int64_t b, int64_t c, int64_t i, T* room) const {
    if (!present[operand]) return nullptr;
    if constexpr (std::is_same_v<S, T>) {
      if (in_place(operand)) return out[operand] + walk.offset(operand, a, b, c, i);
    }
    return room + operand * line_elements;
  }
  void finish(int operand, int64_t a, int64_t b, int64_t c, int64_t i, int64_t n, const T* room) const {
    if (!present[operand] || in_place(operand)) return;
    scatter<T>(room + operand * line_elements, out[operand] + walk.offset(operand, a, b, c, i),
               walk.strides[operand][3], n);
  }

  // Calls f(i, n, kept) for the parts of a line that are worked on at a time.
  template <typename F>
  void cut(int64_t a, int64_t b, int64_t c, int64_t begin, int64_t end, bool streamed, uint8_t* room,
           const F& f) const {
    const S* to = present[out_x] && in_place(out_x) ? out[out_x] + walk.offset(out_x, a, b, c, 0) : nullptr;
    for (int64_t i = begin; i < end;) {
      int64_t n = std::min(line_elements, end - i);
      if (streamed && to != nullptr) {  // up to where whole vectors can be written past the caches
        const int64_t behind = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to + i) % MPKERNELS_VECTOR_BYTES);
        if (behind != 0) n = std::min<int64_t>(n, (MPKERNELS_VECTOR_BYTES - behind) / static_cast<int64_t>(sizeof(S)));
      }
      const uint8_t* bytes = nullptr;
      if (mask != nullptr) {
        bytes = side_by_side<uint8_t>(mask + walk.offset(in_mask, a, b, c, i), walk.strides[in_mask][3], n, room);
      } else if (kept != nullptr && walk.along_batch) {
        const int64_t element = (a * walk.sizes[1] + b) * walk.sizes[2] + c;
        std::fill_n(room, n, kept->bytes[static_cast<size_t>(kept->place(element))]);
        bytes = room;
      } else if (kept != nullptr) {
        const int64_t element = walk.offset(numbers, 0, b, c, i);
        const int64_t first = kept->place(element);
        n = std::min(n, kept->size() - first);
        bytes = kept->bytes.data() + first;
      }
      f(i, n, bytes);
      i += n;
    }
  }
};

// What a call is about, in numbers.
struct Problem {
  int64_t batch, channels, height, width;
  int64_t scale, layout, pattern, parity;
  double clamp, epsilon;
  bool shift_first, inverse;
  int64_t first, last;  // channels that are transformed
  Kept kept;
  bool along_batch, planes_apart;

  Problem(const Tensor& x, int64_t scale, double clamp, double epsilon, int64_t layout, int64_t pattern, int64_t parity,
          bool shift_first, bool inverse)
      : batch(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        scale(scale),
        layout(layout),
        pattern(pattern),
        parity(parity),
        clamp(clamp),
        epsilon(epsilon),
        shift_first(shift_first),
        inverse(inverse),
        first(0),
        last(channels) {
    if (pattern == pattern_channel) (parity == 0 ? first : last) = (channels + 1) / 2;
    const int64_t elements = channels * height * width;
    along_batch = elements <= few_elements && batch > elements;
    planes_apart = pattern == pattern_checkerboard && height % 2 == 1 && height * width > 1;
    if (pattern == pattern_checkerboard || pattern == pattern_alternating) {
      kept = kept_elements(pattern, parity, channels, height, width);
    }
  }

  template <typename T>
  Settings<T> settings(int64_t bytes) const {
    return {static_cast<T>(clamp), static_cast<T>(epsilon), shift_first != inverse, bytes > streamed_bytes};
  }

  template <typename S>
  void plan_walk(Part<S>& part, int64_t count) const {
    if (!kept.bytes.empty()) {
      part.strides[numbers] = {0, height * width, width, 1};
      part.present[numbers] = true;
    }
    part.walk = plan(batch, count, height, width, part.strides, part.present, along_batch, planes_apart);
    part.kept = kept.bytes.empty() ? nullptr : &kept;
  }

  // The channels that are kept, from one operand to another.
  template <typename S>
  Part<S> copied(const Tensor& from, const Tensor& to) const {
    Part<S> part;
    const int64_t begin = first == 0 ? last : 0;
    part.add(in_x, place<S>(OptionalTensor(from), begin));
    part.add(out_x, place<S>(OptionalTensor(to), begin));
    plan_walk(part, channels - (last - first));
    return part;
  }
};

template <typename S>
void copy(const Part<S>& part, int64_t item, bool streamed) {
  S* room = scratch<S>(line_elements);
  part.walk.run(item, [&](int64_t a, int64_t b, int64_t c, int64_t begin, int64_t end) {
    uint8_t unused[line_elements];  // (nothing is kept within the part)
    part.cut(a, b, c, begin, end, streamed, unused, [&](int64_t i, int64_t n, const uint8_t*) {
      const int64_t from_stride = part.walk.strides[in_x][3], to_stride = part.walk.strides[out_x][3];
      const S* from = part.in[in_x] + part.walk.offset(in_x, a, b, c, i);
      S* to = part.out[out_x] + part.walk.offset(out_x, a, b, c, i);
      if (from_stride != 1) {
        for (int64_t j = 0; j < n; ++j) room[j] = from[j * from_stride];
        from = room;
      }
      if (to_stride == 1) {
        copy_run(from, to, n, streamed);
      } else {
        for (int64_t j = 0; j < n; ++j) to[j * to_stride] = from[j];
      }
    });
  });
}

// Calls work(part, item) for the pieces of both parts, on all threads.
template <typename S, typename Work>
void for_items(const Part<S>& part, const Part<S>& rest, int64_t rest_items, bool streamed, const Work& work) {
  const int64_t items = part.walk.items();
  const int64_t elements = std::max(part.walk.item_elements(), int64_t{1});
  parallel_pieces(items + rest_items, std::max<int64_t>(1, piece_elements / elements),
                  [&](int64_t first, int64_t last) {
                    for (int64_t item = first; item < last; ++item) {
                      item < items ? work(item) : copy(rest, item - items, streamed);
                    }
                    if (streamed) finish_streams();
                  });
}

template <typename S, int scale, bool inverse>
void forward_part(const Problem& problem, const Part<S>& part, const Part<S>& rest, int64_t rest_items,
                  Compute<S>* log_abs_det) {
  using T = Compute<S>;
  const auto settings = problem.settings<T>(problem.batch * problem.channels * problem.height * problem.width *
                                            static_cast<int64_t>(sizeof(S)));
  const Walk& walk = part.walk;
  std::vector<double> sums(static_cast<size_t>(walk.along_batch ? 0 : walk.items()));
  for_items(part, rest, rest_items, settings.streamed, [&](int64_t item) {
    T* room = scratch<T>(operands * line_elements);
    uint8_t bytes[line_elements];
    double total = 0;
    if (walk.along_batch) {
      const int64_t begin = item * line_elements;
      std::fill_n(log_abs_det + begin, std::min(line_elements, walk.sizes[3] - begin), T(0));
    }
    walk.run(item, [&](int64_t a, int64_t b, int64_t c, int64_t begin, int64_t end) {
      part.cut(a, b, c, begin, end, settings.streamed, bytes, [&](int64_t i, int64_t n, const uint8_t* kept) {
        const ForwardRun<T> run{
            part.input(in_x, a, b, c, i, n, room),     part.input(in_raw, a, b, c, i, n, room),
            part.input(in_shift, a, b, c, i, n, room), kept,
            part.output(out_x, a, b, c, i, room),      walk.along_batch ? log_abs_det + i : nullptr};
        total += forward_run<T, scale, inverse>(run, n, settings);
        part.finish(out_x, a, b, c, i, n, room);
      });
    });
    if (!walk.along_batch) sums[static_cast<size_t>(item)] = total;
  });
  if (walk.along_batch) return;
  for (int64_t sample = 0; sample < problem.batch; ++sample) {
    double total = 0;
    for (int64_t piece = 0; piece < walk.pieces; ++piece) {
      total += sums[static_cast<size_t>(sample * walk.pieces + piece)];
    }
    log_abs_det[sample] = static_cast<T>(total);
  }
}

template <typename S, int scale, bool inverse>
void backward_part(const Problem& problem, const Part<S>& part, const Part<S>& rest, int64_t rest_items,
                   const Compute<S>* of_log, int64_t of_log_stride) {
  using T = Compute<S>;
  const auto settings = problem.settings<T>(problem.batch * problem.channels * problem.height * problem.width *
                                            static_cast<int64_t>(sizeof(S)));
  const Walk& walk = part.walk;
  for_items(part, rest, rest_items, settings.streamed, [&](int64_t item) {
    T* room = scratch<T>(operands * line_elements);
    uint8_t bytes[line_elements];
    alignas(64) T of_each[line_elements];
    walk.run(item, [&](int64_t a, int64_t b, int64_t c, int64_t begin, int64_t end) {
      part.cut(a, b, c, begin, end, settings.streamed, bytes, [&](int64_t i, int64_t n, const uint8_t* kept) {
        BackwardRun<T> run{part.input(in_grad, a, b, c, i, n, room),
                           part.input(in_x, a, b, c, i, n, room),
                           part.input(in_raw, a, b, c, i, n, room),
                           part.input(in_shift, a, b, c, i, n, room),
                           kept,
                           part.output(out_x, a, b, c, i, room),
                           part.output(out_raw, a, b, c, i, room),
                           part.output(out_shift, a, b, c, i, room),
                           nullptr,
                           T(0)};
        if (walk.along_batch) {
          run.of_log_each = side_by_side<T>(of_log + i * of_log_stride, of_log_stride, n, of_each);
        } else {
          run.of_log = of_log[a * of_log_stride];
        }
        backward_run<T, scale, inverse>(run, n, settings);
        for (const int operand : {out_x, out_raw, out_shift}) part.finish(operand, a, b, c, i, n, room);
      });
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

// The parameters of a part: raw and shift, wherever they are.
template <typename S>
std::pair<Place<S>, Place<S>> parameters(const OptionalTensor& raw, const OptionalTensor& shift, int64_t layout) {
  if (layout != separate) return parts<S>(raw, layout);
  return {place<S>(raw), place<S>(shift)};
}

template <typename S>
void add_mask(Part<S>& part, const OptionalTensor& mask, int64_t pattern) {
  if (pattern != pattern_tensor) return;
  part.mask = pointer<uint8_t>(mask);
  part.strides[in_mask] = {mask->stride(0), mask->stride(1), mask->stride(2), mask->stride(3)};
  part.present[in_mask] = true;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& raw, const OptionalTensor& shift,
                                   const OptionalTensor& mask, int64_t scale, double clamp, double epsilon,
                                   int64_t layout, int64_t pattern, int64_t parity, bool shift_first, bool inverse) {
  const Problem problem(x, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse);
  Tensor y = empty({problem.batch, problem.channels, problem.height, problem.width}, x);
  const bool is_double = x.scalar_type() == ScalarType::Double;
  Tensor log_abs_det = empty({problem.batch}, x, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_floating("affine_coupling", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    if (x.numel() == 0) {
      std::fill_n(pointer<T>(log_abs_det), problem.batch, T(0));
      return;
    }
    Part<S> part;
    const auto [of_scale, of_shift] = parameters<S>(raw, shift, layout);
    part.add(in_x, place<S>(OptionalTensor(x), problem.first));
    part.add(in_raw, of_scale);
    part.add(in_shift, of_shift);
    part.add(out_x, place<S>(OptionalTensor(y), problem.first));
    add_mask(part, mask, pattern);
    problem.plan_walk(part, problem.last - problem.first);
    const Part<S> rest = problem.copied<S>(x, y);
    const int64_t rest_items = problem.last - problem.first == problem.channels ? 0 : rest.walk.items();
    dispatch_scale(scale, epsilon, inverse, [&](auto kind, auto direction) {
      forward_part<S, decltype(kind)::value, decltype(direction)::value>(problem, part, rest, rest_items,
                                                                         pointer<T>(log_abs_det));
    });
  });
  return {y, log_abs_det};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_log_abs_det, const Tensor& x,
                                            const OptionalTensor& raw, const OptionalTensor& shift,
                                            const OptionalTensor& mask, int64_t scale, double clamp, double epsilon,
                                            int64_t layout, int64_t pattern, int64_t parity, bool shift_first,
                                            bool inverse, bool needs_x, bool needs_raw, bool needs_shift) {
  const Problem problem(x, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse);
  const auto gradient = [&](const OptionalTensor& of, bool needed) {
    if (!needed || !of.has_value()) return no_gradient(x);
    return empty({of->size(0), of->size(1), of->size(2), of->size(3)}, x);
  };
  Tensor of_x = gradient(x, needs_x), of_raw = gradient(raw, needs_raw), of_shift = gradient(shift, needs_shift);
  if (x.numel() == 0) return {of_x, of_raw, of_shift};
  dispatch_floating("affine_coupling", x, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const auto wanted = [](const Tensor& found, bool needed) {
      return needed ? OptionalTensor(found) : OptionalTensor();
    };
    const auto [in_scale, in_translation] = parameters<S>(raw, shift, layout);
    const auto [to_scale, to_translation] = parameters<S>(wanted(of_raw, needs_raw && raw.has_value()),
                                                          wanted(of_shift, needs_shift && shift.has_value()), layout);
    Part<S> part;
    part.add(in_grad, place<S>(OptionalTensor(grad_y), problem.first));
    part.add(in_raw, in_scale);
    if (to_scale.at != nullptr) {
      part.add(in_x, place<S>(OptionalTensor(x), problem.first));
      if (shift_first != inverse) part.add(in_shift, in_translation);
    }
    part.add(out_x, place<S>(wanted(of_x, needs_x), problem.first));
    part.add(out_raw, to_scale);
    part.add(out_shift, to_translation);
    add_mask(part, mask, pattern);
    problem.plan_walk(part, problem.last - problem.first);
    Part<S> rest;
    int64_t rest_items = 0;
    if (needs_x && problem.last - problem.first != problem.channels) {
      rest = problem.copied<S>(grad_y, of_x);
      rest_items = rest.walk.items();
    }
    dispatch_scale(scale, epsilon, inverse, [&](auto kind, auto direction) {
      backward_part<S, decltype(kind)::value, decltype(direction)::value>(
          problem, part, rest, rest_items, pointer<T>(grad_log_abs_det), grad_log_abs_det.stride(0));
    });
  });
  return {of_x, of_raw, of_shift};
}

}  // namespace
}  // namespace affine_coupling
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("affine_coupling", TORCH_BOX(&mpkernels::affine_coupling::forward));
  library.impl("affine_coupling_backward", TORCH_BOX(&mpkernels::affine_coupling::backward));
}
