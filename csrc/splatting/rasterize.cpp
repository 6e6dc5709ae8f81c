// Rasterization of projected Gaussians on the CPU, forward and backward.
//
//   sigma_i = (a dx^2 + c dy^2) / 2 + b dx dy, with d = mean - centre of the pixel
//   alpha_i = min(0.999, o exp(-sigma_i))
//   color   = sum_i T_i alpha_i c_i + T background, with T_i = prod_{j<i} (1 - alpha_j)
//
// (Kerbl et al. 2023, "3D Gaussian Splatting", eq. 3), without Gaussians of o exp(-sigma) < 1/255, up to the first that
// would leave T <= 1e-4. Shapes: mpkernels/splatting/rasterize/schema.py. The backward walks a tile's list from the
// end. With g = dL/dcolor, what lies behind, B_i = sum_{j>i} T_j alpha_j (g . c_j) + T (g . background -
// dL/dalpha_out), and v_i = -dL/dsigma_i:
//
//   T_i          = T_{i+1} / (1 - alpha_i)
//   dL/dalpha_i  = T_i (g . c_i) - B_i / (1 - alpha_i)
//   v_i          = alpha_i dL/dalpha_i, 0 where alpha was cut to 0.999
//   dL/dc        = sum T_i alpha_i g               dL/do       = sum v / o
//   dL/dmean     = -(a, b; b, c) sum v d           dL/d(a,b,c) = -sum v (dx^2 / 2, dx dy, dy^2 / 2)
//
// with sums over pixels. dx does not depend on the row, so the inner loop keeps only sums over rows of v, v dy, v dy^2
// and of the colors.
//
// Decomposition: threads take tiles, a vector takes consecutive pixels of a row (with tiles of 16 and AVX-512: a whole
// row). A Gaussian is evaluated on the rows of the tile that its ellipse can reach, not on the others. Gaussians are
// packed first, one cache line each, and fetched ahead, because lists visit them in no order. A pixel that has ended
// has transmittance 0, a row of such pixels is skipped, and a tile of such rows is left.
//
// Backward: per entry (a Gaussian on a tile) one record of 6 + D sums (8 + D with absgrad), reduced over the vector's
// lanes all at once; then each range of Gaussians walks all lists in order and adds its entries. No atomics: neither
// the number of threads nor their order changes a bit. (Private copies of all gradients a thread would cost threads x
// M (6 + D) numbers instead of n (6 + D), and tie the sums to the number of threads.)
//
// Bytes, float32, both passes: 4 (6 + D) read and 64 written a Gaussian (its record), 68 read an entry, 4 (3 + D) a
// pixel; backward also 4 (6 + D) written and read an entry, and as many written a Gaussian.
#include "splatting/rasterize_backward.h"
#include "splatting/rasterize_forward.h"

#include <tuple>

namespace mpkernels {
namespace rasterize {
namespace {

// Calls f with a value of the dtype and the number of channels where it is compiled in.
template <typename F>
void dispatch(const Tensor& means2d, int64_t channels, const F& f) {
  const auto with_channels = [&](auto element) {
    if (channels == 3) {
      f(element, std::integral_constant<int, 3>{});
    } else if (channels == 1) {
      f(element, std::integral_constant<int, 1>{});
    } else if (channels == 4) {
      f(element, std::integral_constant<int, 4>{});
    } else {
      f(element, std::integral_constant<int, 0>{});
    }
  };
  switch (means2d.scalar_type()) {
    case ScalarType::Float:
      return with_channels(float{});
    case ScalarType::Double:
      return with_channels(double{});
    default:
      STD_TORCH_CHECK(false, "rasterize: no CPU kernel for this dtype");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& means2d, const Tensor& conics, const Tensor& colors,
                                                   const Tensor& opacities, const OptionalTensor& backgrounds,
                                                   const OptionalTensor& masks, const Tensor& isect_offsets,
                                                   const Tensor& flatten_ids, int64_t width, int64_t height,
                                                   int64_t tile_size) {
  const int64_t images = isect_offsets.size(0), channels = colors.size(1);
  Tensor image = empty({images, height, width, channels}, means2d);
  Tensor alphas = empty({images, height, width}, means2d);
  Tensor transmittances = empty({images, height, width}, means2d);
  Tensor last = empty({images, height, width}, means2d, ScalarType::Int);
  dispatch(means2d, channels, [&](auto element, auto compiled_channels) {
    using T = decltype(element);
    Scene<T> scene(means2d, conics, colors, opacities, backgrounds, masks, isect_offsets, flatten_ids, width, height,
                   tile_size);
    const Tensor records = memory_for_records<T>(means2d, scene.count);
    pack(scene, records);
    const Images<T> out{pointer<T>(image), pointer<T>(alphas), pointer<T>(transmittances), pointer<int32_t>(last)};
    parallel_pieces(scene.tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) draw_tile<T, compiled_channels>(scene, Tile<T>(scene, i), out);
    });
  });
  return {image, alphas, transmittances, last};
}

// Where a Gaussian's sums become its gradients.
template <typename T>
struct Outputs {
  T* means2d;    // (M, 2)
  T* conics;     // (M, 3)
  T* colors;     // (M, D)
  T* opacities;  // (M)
  T* absolute;   // (M, 2) or null
};

template <typename T>
void finish(const Scene<T>& s, int64_t id, const T* sums, int64_t first_color, int64_t first_absolute,
            const Outputs<T>& out) {
  const T a = s.conics[3 * id], b = s.conics[3 * id + 1], c = s.conics[3 * id + 2], opacity = s.opacities[id];
  const bool drawn = s.gaussians[id].reach >= 0;
  const auto write = [&](T* to, T value) { *to = drawn ? value : T(0); };  // what is not drawn may be NaN
  write(out.means2d + 2 * id, -(a * sums[of_v_dx] + b * sums[of_v_dy]));
  write(out.means2d + 2 * id + 1, -(b * sums[of_v_dx] + c * sums[of_v_dy]));
  write(out.conics + 3 * id, T(-0.5) * sums[of_v_dxx]);
  write(out.conics + 3 * id + 1, -sums[of_v_dxy]);
  write(out.conics + 3 * id + 2, T(-0.5) * sums[of_v_dyy]);
  write(out.opacities + id, sums[of_v] / opacity);
  for (int64_t k = 0; k < s.channels; ++k) write(out.colors + id * s.channels + k, sums[first_color + k]);
  if (out.absolute != nullptr) {
    // the record's conic is scaled by log2 e / 2
    const T unscale = T(-1) / exponent_factor<T>;
    write(out.absolute + 2 * id, sums[first_absolute] * unscale);
    write(out.absolute + 2 * id + 1, sums[first_absolute + 1] * unscale);
  }
}

// Adds the entries of every Gaussian in the order of the lists. Each range of Gaussians reads all ids (4 bytes an
// entry) and the records of its own.
template <typename T>
void add_entries(const Scene<T>& s, const Gradients<T>& g, T* sums, int64_t first_color, int64_t first_absolute,
                 const Outputs<T>& out) {
  const int64_t ranges = std::min<int64_t>(torch::stable::get_num_threads(), 16);
  const int64_t length = (s.count + ranges - 1) / ranges;
  const int64_t per = g.per_entry;
  parallel_pieces(ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range) {
      const int64_t low = std::min(range * length, s.count), high = std::min(low + length, s.count);
      std::fill(sums + low * per, sums + high * per, T(0));
      for (int64_t index = 0; index < s.tiles(); ++index) {
        const Tile<T> tile(s, index);
        for (int64_t k = tile.first; k < tile.first + g.used[index]; ++k) {
          const int64_t id = static_cast<uint32_t>(s.ids[k]);
          if (id < low || id >= high) continue;
          for (int64_t j = 0; j < per; ++j) sums[id * per + j] += g.entries[k * per + j];
        }
      }
      for (int64_t id = low; id < high; ++id) finish(s, id, sums + id * per, first_color, first_absolute, out);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_colors, const OptionalTensor& grad_alphas, const Tensor& means2d, const Tensor& conics,
    const Tensor& colors, const Tensor& opacities, const OptionalTensor& backgrounds, const OptionalTensor& masks,
    const Tensor& isect_offsets, const Tensor& flatten_ids, const Tensor&, const Tensor& transmittances,
    const Tensor& last, int64_t width, int64_t height, int64_t tile_size, bool absgrad, bool needs_backgrounds) {
  const int64_t count = opacities.numel(), channels = colors.size(1), images = isect_offsets.size(0);
  Tensor of_means2d = empty({count, 2}, means2d), of_conics = empty({count, 3}, means2d);
  Tensor of_colors = empty({count, channels}, means2d), of_opacities = empty({count}, means2d);
  Tensor of_backgrounds = needs_backgrounds ? empty({images, channels}, means2d) : no_gradient(means2d);
  Tensor absolute = absgrad ? empty({count, 2}, means2d) : no_gradient(means2d);
  dispatch(means2d, channels, [&](auto element, auto compiled_channels) {
    using T = decltype(element);
    constexpr int C = compiled_channels;
    Scene<T> scene(means2d, conics, colors, opacities, backgrounds, masks, isect_offsets, flatten_ids, width, height,
                   tile_size);
    const Tensor records = memory_for_records<T>(means2d, count);
    pack(scene, records);
    const int64_t per_entry = gains + channels + (absgrad ? 2 : 0);
    const Tensor entries = empty({scene.intersections, per_entry}, means2d);
    const Tensor used = empty({scene.tiles()}, means2d, ScalarType::Long);
    const Tensor of_tiles = empty({needs_backgrounds ? scene.tiles() : 0, channels}, means2d);
    const Gradients<T> g{pointer<T>(grad_colors),
                         pointer<T>(grad_alphas),
                         pointer<T>(transmittances),
                         pointer<int32_t>(last),
                         pointer<T>(entries),
                         pointer<int64_t>(used),
                         needs_backgrounds ? pointer<T>(of_tiles) : nullptr,
                         per_entry};
    parallel_pieces(scene.tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (absgrad) {
          differentiate_tile<T, C, true>(scene, i, g);
        } else {
          differentiate_tile<T, C, false>(scene, i, g);
        }
      }
    });
    const Tensor sums = empty({count, per_entry}, means2d);
    const Outputs<T> out{pointer<T>(of_means2d), pointer<T>(of_conics), pointer<T>(of_colors), pointer<T>(of_opacities),
                         absgrad ? pointer<T>(absolute) : nullptr};
    // a general number of channels follows absgrad's two
    const int64_t first_color = C > 0 || !absgrad ? gains : gains + 2;
    add_entries(scene, g, pointer<T>(sums), first_color, C > 0 ? gains + C : gains, out);
    if (needs_backgrounds) {
      T* to = pointer<T>(of_backgrounds);
      const T* from = pointer<T>(of_tiles);
      const int64_t tiles = scene.tiles_high * scene.tiles_wide;
      for (int64_t image = 0; image < images; ++image) {
        for (int64_t c = 0; c < channels; ++c) {
          T total = 0;
          for (int64_t tile = 0; tile < tiles; ++tile) total += from[(image * tiles + tile) * channels + c];
          to[image * channels + c] = total;
        }
      }
    }
  });
  return {of_means2d, of_conics, of_colors, of_opacities, of_backgrounds, absolute};
}

}  // namespace
}  // namespace rasterize
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("rasterize", TORCH_BOX(&mpkernels::rasterize::forward));
  library.impl("rasterize_backward", TORCH_BOX(&mpkernels::rasterize::backward));
}
