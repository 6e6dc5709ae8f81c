// Volume compositing on the CPU, forward and backward.
//
//   alpha_i = 1 - exp(-sigma_i delta_i)   T_i = prod_{j<i} (1 - alpha_j)   w_i = T_i alpha_i
//   value = sum w_i c_i + (1 - sum w_i) background    opacity = sum w_i    depth = sum w_i (start_i + end_i) / 2
//
// (Max 1995, "Optical models for direct volume rendering"; Mildenhall et al. 2020, "NeRF", eq. 3), or alpha_i given.
// Shapes: mpkernels/volume/composite/schema.py. With G_i = dL/dw_i the backward is
//
//   dL/d(sigma_i delta_i) = T_{i+1} G_i - sum_{j>i} w_j G_j
//   dL/dalpha_i           = T_i (G_i - B_i),   B_i = alpha_{i+1} G_{i+1} + (1 - alpha_{i+1}) B_{i+1}
//
// Nothing is divided, so both hold at alpha = 1 and at sigma = 0, and both are summed from the far end, so nothing
// cancels behind an opaque sample.
//
// Decomposition: a thread takes whole rays, a vector takes consecutive samples of one ray. The product along the ray is
// a scan in the register (log2(lanes) shuffles) and one multiplication from vector to vector. Colours stay interleaved:
// each weight is spread over the channels by a shuffle whose pattern is known when compiling. The backward walks the
// ray twice: forwards to find alpha and T (kept in a buffer of the ray's length, which stays in the first-level cache),
// fetching the values ahead for the way back (without that it takes 1.7 times as long), then backwards. Rays are
// independent, so results do not depend on the number of threads.
//
// Bytes a sample, float32 RGB: forward 24 read and 4 written, backward 24 read and 16 written (24 with gradients to t).
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "common/vector.h"

#include <limits>
#include <tuple>

namespace mpkernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// One ray's samples; t_ends is null where the densities are alphas.
template <typename S>
struct Ray {
  const S* densities;  // (count)
  const S* values;     // (count, C)
  const S* t_starts;   // (count)
  const S* t_ends;     // (count) or null
  int64_t first;       // index of its first sample among all, where weights and gradients are written
  int64_t count;
};

template <typename S>
struct Rays {
  const S* densities;
  const S* values;
  const S* t_starts;
  const S* t_ends;
  const S* background;         // (R, C) or null
  const int64_t* packed_info;  // (R, 2) or null
  int64_t density_stride, value_stride, start_stride, end_stride, background_stride;
  int64_t rays, samples, total, channels;  // samples: of a dense ray; total: of all rays
  Compute<S> early_stop_eps;
  bool streams = false;  // whether outputs go past the caches

  Rays(const Tensor& densities, const Tensor& values, const Tensor& t_starts, const OptionalTensor& t_ends,
       const OptionalTensor& packed_info, const OptionalTensor& background, double early_stop_eps)
      : densities(pointer<S>(densities)),
        values(pointer<S>(values)),
        t_starts(pointer<S>(t_starts)),
        t_ends(pointer<S>(t_ends)),
        background(pointer<S>(background)),
        packed_info(pointer<int64_t>(packed_info)),
        density_stride(densities.stride(0)),
        value_stride(values.stride(0)),
        start_stride(t_starts.stride(0)),
        end_stride(ray_stride(t_ends)),
        background_stride(ray_stride(background)),
        rays(packed_info.has_value() ? packed_info->size(0) : densities.size(0)),
        samples(packed_info.has_value() ? 0 : densities.size(1)),
        total(densities.numel()),
        channels(values.size(values.dim() - 1)),
        early_stop_eps(static_cast<Compute<S>>(early_stop_eps)) {}

  Ray<S> ray(int64_t r) const {
    if (packed_info == nullptr) {
      return {densities + r * density_stride,
              values + r * value_stride,
              t_starts + r * start_stride,
              t_ends == nullptr ? nullptr : t_ends + r * end_stride,
              r * samples,
              samples};
    }
    // values of packed_info are checked by the caller where it can; under torch.compile it cannot
    const int64_t start = std::clamp<int64_t>(packed_info[2 * r], 0, total);
    const int64_t count = std::clamp<int64_t>(packed_info[2 * r + 1], 0, total - start);
    return {densities + start,
            values + start * channels,
            t_starts + start,
            t_ends == nullptr ? nullptr : t_ends + start,
            start,
            count};
  }

  // Rays a thread takes at a time: about 16,384 samples, some ten microseconds.
  int64_t grain() const {
    return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, total / std::max<int64_t>(1, rays)));
  }
};

// What consecutive samples absorb. Lanes behind the end of the ray absorb nothing: alpha = 0.
template <typename T>
struct Absorption {
  Vector<T> alpha;
  Vector<T> position;     // where the sample lies
  Exponential<T> passed;  // of densities: 1 - alpha without its rounding
  bool alphas;            // whether alpha was given
};

// An infinite density counts as the largest finite one.
template <typename T>
MPKERNELS_INLINE Vector<T> finite(Vector<T> density) {
  const Vector<T> largest = broadcast<T>(std::numeric_limits<T>::max());
  return density > largest ? largest : density;
}

template <typename S, typename T = Compute<S>>
MPKERNELS_INLINE Absorption<T> absorb(const Ray<S>& ray, int64_t i, int64_t count) {
  Absorption<T> a;
  const Vector<T> density = load_first<S>(ray.densities + i, count);
  const Vector<T> start = load_first<S>(ray.t_starts + i, count);
  a.alphas = ray.t_ends == nullptr;
  if (a.alphas) {
    a.alpha = density;
    a.position = start;
    return a;
  }
  const Vector<T> end = load_first<S>(ray.t_ends + i, count);
  a.passed = exponential<T>(finite<T>(density) * (start - end));
  a.alpha = -a.passed.expm1();
  a.position = (start + end) * T(0.5);
  return a;
}

// The transmittance in front of each sample, and how many of `count` samples lie in front of the early stop.
template <typename T>
struct Transmittance {
  Vector<T> in_front;
  int64_t alive;
  T behind;  // behind the last lane
};

template <typename T>
MPKERNELS_INLINE Transmittance<T> transmit(const Absorption<T>& a, T carry, int64_t count, T early_stop_eps) {
  Transmittance<T> t;
  // thin samples by their absorption, thick ones (and NaN) by what they let pass: each form where it keeps its digits
  const Vector<T> absorbed = inclusive_complement<T>(a.alpha);
  if (__builtin_expect(absorbed[lanes<T> - 1] <= T(0.5), 1)) {
    t.in_front = (1 - move_up<1, T>(absorbed, Vector<T>{})) * carry;
    t.behind = (1 - absorbed[lanes<T> - 1]) * carry;
  } else {
    const Vector<T> product = inclusive_product<T>(a.alphas ? 1 - a.alpha : a.passed.exp());
    t.in_front = move_up<1, T>(product, broadcast<T>(1)) * carry;
    t.behind = product[lanes<T> - 1] * carry;
  }
  t.alive = count;
  if (early_stop_eps > 0) {
    const Mask<T> alive = t.in_front >= early_stop_eps;  // false for NaN, which only dead samples can cause
    if (any<T>(~alive)) {
      int64_t first_dead = 0;
      while (first_dead < count && alive[first_dead]) ++first_dead;
      t.alive = first_dead;
    }
  }
  return t;
}

// Weights spread over C interleaved channels: lane l of vector k belongs to sample (k lanes + l) / C.
template <typename T, int C, int k>
struct Spread {
  static constexpr int at(int l) { return (k * lanes<T> + l) / C; }
};
// The inverse: lane s takes channel c of sample s, element s C + c, from vector k of the interleaved ones.
template <typename T, int C, int c, int k>
struct Collect {
  static constexpr int at(int s) {
    const int element = s * C + c;
    if (k == 1) return element < 2 * lanes<T> ? element : 0;
    return element / lanes<T> == k ? lanes<T> + element % lanes<T> : s;
  }
};

template <typename T, int C, int c>
MPKERNELS_INLINE Vector<T> collect(const Vector<T>* interleaved) {
  if constexpr (C == 1) {
    return interleaved[0];
  } else {
    Vector<T> x = shuffle<Collect<T, C, c, 1>, T>(interleaved[0], interleaved[1]);
    if constexpr (C > 2) x = shuffle<Collect<T, C, c, 2>, T>(x, interleaved[2]);
    static_assert(C <= 3, "add the shuffles for more vectors");
    return x;
  }
}

// Calls f with 0, 1, ..., C - 1 as constants.
template <typename F, int... I>
MPKERNELS_INLINE void each_of(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int C, typename F>
MPKERNELS_INLINE void each(const F& f) {
  each_of(std::make_integer_sequence<int, C>{}, f);
}

template <typename S>
MPKERNELS_INLINE void zero(S* to, int64_t count) {
  if (count > 0) std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(S));
}

// Outputs that do not fit the caches go past them.
constexpr int64_t cached_bytes = int64_t{4} << 20;

template <typename S>
MPKERNELS_INLINE void write_first(bool streams, S* to, Vector<Compute<S>> x, int64_t count) {
  if (streams) {
    stream_first<S>(to, x, count);
  } else {
    store_first<S>(to, x, count);
  }
}

template <typename S>
struct ForwardOutput {
  S* values;   // (R, C)
  S* opacity;  // (R)
  S* depth;    // (R)
  S* weights;  // (R, S) or (N)
};

// C: the number of channels where it is compiled in (1 or 3), 0 for any number.
template <typename S, int C>
void forward_ray(const Rays<S>& in, int64_t r, const ForwardOutput<S>& out) {
  using T = Compute<S>;
  constexpr int L = lanes<T>;
  const Ray<S> ray = in.ray(r);
  const int64_t channels = C > 0 ? C : in.channels;
  S* weights = out.weights + ray.first;
  T* sums = C > 0 ? nullptr : scratch<T>(channels + L);
  Vector<T> interleaved[C > 0 ? C : 1] = {};
  if constexpr (C == 0) {
    for (int64_t c = 0; c < channels; c += L) store<T>(sums + c, Vector<T>{});
  }

  Vector<T> opacity{}, depth{};
  T carry = 1;
  int64_t i = 0;
  for (; i < ray.count; i += L) {
    const int64_t count = std::min<int64_t>(L, ray.count - i);
    const Absorption<T> a = absorb<S>(ray, i, count);
    const Transmittance<T> t = transmit<T>(a, carry, count, in.early_stop_eps);
    Vector<T> weight = t.in_front * a.alpha;
    Vector<T> position = a.position;
    if (t.alive < count) {
      weight = select<T>(first_lanes<T>(t.alive), weight, Vector<T>{});
      position = select<T>(first_lanes<T>(t.alive), position, Vector<T>{});
    }
    write_first<S>(in.streams, weights + i, weight, count);
    opacity += weight;
    depth += weight * position;

    const S* values = ray.values + i * channels;
    if constexpr (C > 0) {
      each<C>([&](auto k) {
        const Vector<T> spread = shuffle<Spread<T, C, k>, T>(weight, weight);
        interleaved[k] += spread * load_first<S>(values + k * L, t.alive * C - k * L);
      });
    } else {
      for (int64_t c = 0; c < channels; c += L) {
        Vector<T> total = load<T>(sums + c);
        for (int64_t s = 0; s < t.alive; ++s) {
          total += weight[s] * load_first<S>(values + s * channels + c, channels - c);
        }
        store<T>(sums + c, total);
      }
    }
    carry = t.behind;
    if (t.alive < count) {
      i += L;
      break;
    }
  }
  zero(weights + std::min(i, ray.count), ray.count - i);

  const T total_opacity = sum<T>(opacity);
  const S* background = in.background == nullptr ? nullptr : in.background + r * in.background_stride;
  const auto finish = [&](int64_t c, T value) {
    if (background != nullptr) value += (1 - total_opacity) * to_compute<S>(background[c]);
    out.values[r * channels + c] = static_cast<S>(value);
  };
  if constexpr (C > 0) {
    each<C>([&](auto c) { finish(c, sum<T>(collect<T, C, c>(interleaved))); });
  } else {
    for (int64_t c = 0; c < channels; ++c) finish(c, sums[c]);
  }
  out.opacity[r] = static_cast<S>(total_opacity);
  out.depth[r] = static_cast<S>(sum<T>(depth));
}

template <typename S>
struct Gradients {
  // of the outputs; null where there is none
  const S* values;   // (R, C)
  const S* opacity;  // (R)
  const S* depth;    // (R)
  const S* weights;  // (R, S) or (N), rays weights_stride apart
  int64_t weights_stride;
  // of the inputs; null where not needed
  S* grad_densities;
  S* grad_values;
  S* grad_t_starts;
  S* grad_t_ends;
  S* grad_background;
};

template <typename S, int C>
void backward_ray(const Rays<S>& in, int64_t r, const Gradients<S>& g) {
  using T = Compute<S>;
  constexpr int L = lanes<T>;
  const Ray<S> ray = in.ray(r);
  const int64_t channels = C > 0 ? C : in.channels;
  const bool alphas = ray.t_ends == nullptr;
  const int64_t padded = (ray.count + L - 1) / L * L;

  // forwards: alpha of every sample in front of the stop, and the transmittance in front of it and behind the last
  T* transmittances = scratch<T>(2 * padded + L + channels + L);
  T* alphas_of = transmittances + padded + L;
  T* grad_value = alphas_of + padded;  // (C) gradient of this ray's values, then zeros
  int64_t alive = ray.count;
  Vector<T> opacity{};
  T carry = 1;
  for (int64_t i = 0; i < ray.count; i += L) {
    const int64_t count = std::min<int64_t>(L, ray.count - i);
    // the way back reads the values from the far end, which the processor would not foresee
    for (int64_t byte = 0; byte < static_cast<int64_t>(sizeof(S)) * L * channels; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(ray.values + i * channels) + byte);
    }
    Absorption<T> a = absorb<S>(ray, i, count);
    Transmittance<T> t = transmit<T>(a, carry, count, in.early_stop_eps);
    if (t.alive < count) {
      t.in_front = select<T>(first_lanes<T>(t.alive + 1), t.in_front, Vector<T>{});
      a.alpha = select<T>(first_lanes<T>(t.alive), a.alpha, Vector<T>{});
    }
    store<T>(transmittances + i, t.in_front);
    store<T>(alphas_of + i, a.alpha);
    opacity += t.in_front * a.alpha;
    carry = t.behind;
    if (t.alive < count) {
      alive = i + t.alive;
      break;
    }
    transmittances[i + L] = t.behind;
  }

  // what every weight of the ray gains: through opacity and background, and a factor of the position
  const S* background = in.background == nullptr ? nullptr : in.background + r * in.background_stride;
  T gain = g.opacity == nullptr ? T(0) : to_compute<S>(g.opacity[r]);
  for (int64_t c = 0; c < channels; ++c) {
    grad_value[c] = g.values == nullptr ? T(0) : to_compute<S>(g.values[r * channels + c]);
    if (background != nullptr) gain -= grad_value[c] * to_compute<S>(background[c]);
  }
  for (int64_t c = channels; c < channels + L; ++c) grad_value[c] = 0;
  const T gain_depth = g.depth == nullptr ? T(0) : to_compute<S>(g.depth[r]);
  if (g.grad_background != nullptr) {
    const T seen = 1 - sum<T>(opacity);
    for (int64_t c = 0; c < channels; ++c) {
      g.grad_background[r * channels + c] = static_cast<S>(seen * grad_value[c]);
    }
  }
  Vector<T> repeated[C > 0 ? C : 1] = {};  // grad_value over the interleaved channels
  if constexpr (C > 0) {
    each<C>([&](auto k) {
      for (int l = 0; l < L; ++l) repeated[k][l] = grad_value[(k * L + l) % C];
    });
  }

  // from the far end: the sum behind (densities), or the recurrence B (alphas)
  T behind = 0;
  for (int64_t i = (alive + L - 1) / L * L - L; i >= 0; i -= L) {
    const int64_t count = std::min<int64_t>(L, alive - i);
    const Vector<T> in_front = load<T>(transmittances + i);
    const Vector<T> alpha = load<T>(alphas_of + i);
    const Vector<T> weight = in_front * alpha;
    const Vector<T> start = load_first<S>(ray.t_starts + i, count);
    const Vector<T> end = alphas ? start : load_first<S>(ray.t_ends + i, count);
    Vector<T> gains = broadcast<T>(gain);
    if (g.depth != nullptr) gains += gain_depth * ((start + end) * T(0.5));
    if (g.weights != nullptr) {
      const S* grad_weights = g.weights + (in.packed_info == nullptr ? r * g.weights_stride : ray.first);
      gains += load_first<S>(grad_weights + i, count);
    }

    const S* values = ray.values + i * channels;
    S* grad_values = g.grad_values == nullptr ? nullptr : g.grad_values + (ray.first + i) * channels;
    if (g.values != nullptr) {
      if constexpr (C > 0) {
        Vector<T> products[C];
        each<C>([&](auto k) {
          products[k] = repeated[k] * load_first<S>(values + k * L, count * C - k * L);
          if (grad_values != nullptr) {
            const Vector<T> spread = shuffle<Spread<T, C, k>, T>(weight, weight);
            write_first<S>(in.streams, grad_values + k * L, spread * repeated[k], count * C - k * L);
          }
        });
        each<C>([&](auto c) { gains += collect<T, C, c>(products); });
      } else {
        for (int64_t s = 0; s < count; ++s) {
          Vector<T> products{};
          for (int64_t c = 0; c < channels; c += L) {
            const Vector<T> grad = load<T>(grad_value + c);
            products += grad * load_first<S>(values + s * channels + c, channels - c);
            if (grad_values != nullptr) {
              store_first<S>(grad_values + s * channels + c, weight[s] * grad, channels - c);
            }
          }
          gains[s] += sum<T>(products);
        }
      }
    } else if (grad_values != nullptr) {
      zero(grad_values, count * channels);
    }

    if (alphas) {
      // f(B) = alpha G + passed B of each sample, composed from the far end
      Vector<T> offset = alpha * gains, factor = 1 - alpha;
      each<__builtin_ctz(L)>([&](auto step) {
        offset += factor * move_down<(1 << step), T>(offset, Vector<T>{});
        factor *= move_down<(1 << step), T>(factor, broadcast<T>(1));
      });
      const Vector<T> b = move_down<1, T>(offset, Vector<T>{}) + move_down<1, T>(factor, broadcast<T>(1)) * behind;
      behind = offset[0] + factor[0] * behind;
      write_first<S>(in.streams, g.grad_densities + ray.first + i, in_front * (gains - b), count);
      if (g.grad_t_starts != nullptr) {
        write_first<S>(in.streams, g.grad_t_starts + ray.first + i, weight * gain_depth, count);
      }
    } else {
      const Vector<T> sums = suffix_sum<T>(weight * gains);
      const Vector<T> grad_optical_depth =
          load<T>(transmittances + i + 1) * gains - (move_down<1, T>(sums, Vector<T>{}) + behind);
      behind += sums[0];
      write_first<S>(in.streams, g.grad_densities + ray.first + i, (end - start) * grad_optical_depth, count);
      if (g.grad_t_starts != nullptr) {
        const Vector<T> middle = weight * (gain_depth * T(0.5));
        const Vector<T> along = finite<T>(load_first<S>(ray.densities + i, count)) * grad_optical_depth;
        write_first<S>(in.streams, g.grad_t_starts + ray.first + i, middle - along, count);
        write_first<S>(in.streams, g.grad_t_ends + ray.first + i, middle + along, count);
      }
    }
  }

  const int64_t dead = ray.count - alive;
  zero(g.grad_densities + ray.first + alive, dead);
  if (g.grad_values != nullptr) zero(g.grad_values + (ray.first + alive) * channels, dead * channels);
  if (g.grad_t_starts != nullptr) zero(g.grad_t_starts + ray.first + alive, dead);
  if (g.grad_t_ends != nullptr) zero(g.grad_t_ends + ray.first + alive, dead);
}

// Calls f with a value of the dtype's C++ type, and the number of channels where it is compiled in.
template <typename F>
void dispatch(const Tensor& densities, int64_t channels, const F& f) {
  const auto with_channels = [&](auto element) {
    if (channels == 3) {
      f(element, std::integral_constant<int, 3>{});
    } else if (channels == 1) {
      f(element, std::integral_constant<int, 1>{});
    } else {
      f(element, std::integral_constant<int, 0>{});
    }
  };
  switch (densities.scalar_type()) {
    case ScalarType::Float:
      return with_channels(float{});
    case ScalarType::Double:
      return with_channels(double{});
    case ScalarType::BFloat16:
      return with_channels(BFloat16{});
    case ScalarType::Half:
      return with_channels(Half{});
    default:
      STD_TORCH_CHECK(false, "composite: no CPU kernel for this dtype");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& densities, const Tensor& values,
                                                   const Tensor& t_starts, const OptionalTensor& t_ends,
                                                   const OptionalTensor& packed_info, const OptionalTensor& background,
                                                   double early_stop_eps, bool gaps) {
  const int64_t channels = values.size(values.dim() - 1);
  const int64_t rays = packed_info.has_value() ? packed_info->size(0) : densities.size(0);
  Tensor value = empty({rays, channels}, densities);
  Tensor opacity = empty({rays}, densities);
  Tensor depth = empty({rays}, densities);
  Tensor weights =
      packed_info.has_value() ? empty({densities.size(0)}, densities) : empty({rays, densities.size(1)}, densities);
  dispatch(densities, channels, [&](auto element, auto compiled_channels) {
    using S = decltype(element);
    Rays<S> in(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps);
    in.streams = in.total * static_cast<int64_t>(sizeof(S)) > cached_bytes;
    const ForwardOutput<S> out{pointer<S>(value), pointer<S>(opacity), pointer<S>(depth), pointer<S>(weights)};
    if (gaps) zero(out.weights, in.total);
    parallel_pieces(in.rays, in.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) forward_ray<S, compiled_channels>(in, r, out);
      finish_streams();
    });
  });
  return {value, opacity, depth, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_values, const OptionalTensor& grad_opacity, const OptionalTensor& grad_depth,
    const OptionalTensor& grad_weights, const Tensor& densities, const Tensor& values, const Tensor& t_starts,
    const OptionalTensor& t_ends, const OptionalTensor& packed_info, const OptionalTensor& background,
    double early_stop_eps, bool gaps, bool needs_values, bool needs_ts, bool needs_background) {
  const int64_t channels = values.size(values.dim() - 1);
  const bool packed = packed_info.has_value();
  const int64_t rays = packed ? packed_info->size(0) : densities.size(0);
  const auto like_samples = [&](bool needed) {
    if (!needed) return no_gradient(densities);
    return packed ? empty({densities.size(0)}, densities) : empty({rays, densities.size(1)}, densities);
  };
  const auto like_values = [&]() {
    return packed ? empty({densities.size(0), channels}, densities)
                  : empty({rays, densities.size(1), channels}, densities);
  };
  const bool ends = needs_ts && t_ends.has_value();
  const bool backgrounds = needs_background && background.has_value();
  Tensor of_densities = like_samples(true);
  Tensor of_values = needs_values ? like_values() : no_gradient(densities);
  Tensor of_t_starts = like_samples(needs_ts);
  Tensor of_t_ends = like_samples(ends);
  Tensor of_background = backgrounds ? empty({rays, channels}, densities) : no_gradient(densities);
  dispatch(densities, channels, [&](auto element, auto compiled_channels) {
    using S = decltype(element);
    Rays<S> in(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps);
    const int64_t written = 1 + (needs_values ? channels : 0) + (needs_ts ? 2 : 0);
    in.streams = in.total * written * static_cast<int64_t>(sizeof(S)) > cached_bytes;
    const Gradients<S> g{pointer<S>(grad_values),
                         pointer<S>(grad_opacity),
                         pointer<S>(grad_depth),
                         pointer<S>(grad_weights),
                         packed ? 0 : ray_stride(grad_weights),
                         pointer<S>(of_densities),
                         needs_values ? pointer<S>(of_values) : nullptr,
                         needs_ts ? pointer<S>(of_t_starts) : nullptr,
                         ends ? pointer<S>(of_t_ends) : nullptr,
                         backgrounds ? pointer<S>(of_background) : nullptr};
    if (gaps) {
      zero(g.grad_densities, in.total);
      if (needs_values) zero(g.grad_values, in.total * channels);
      if (needs_ts) zero(g.grad_t_starts, in.total);
      if (ends) zero(g.grad_t_ends, in.total);
    }
    parallel_pieces(in.rays, in.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) backward_ray<S, compiled_channels>(in, r, g);
      finish_streams();
    });
  });
  return {of_densities, of_values, of_t_starts, of_t_ends, of_background};
}

}  // namespace
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("composite", TORCH_BOX(&mpkernels::forward));
  library.impl("composite_backward", TORCH_BOX(&mpkernels::backward));
}
