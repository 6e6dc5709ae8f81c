// Lists of the Gaussians in every tile, on the CPU. Geometry: intersect_tiles_math.h; shapes of the arguments:
// mpkernels/splatting/intersect_tiles/schema.py.
//
// The keys image | tile | depth need no sort of their own, which would move each of the n intersections several times:
//   1. each Gaussian's columns in each row of tiles (its spans) are found once, and kept: a vector takes Gaussians,
//   then
//      rows of tiles;
//   2. the Gaussians that have tiles, of all images together, are sorted by depth: a radix sort of 11 bits a pass;
//   3. pieces of the sorted Gaussians count the rows of tiles that they cover; prefix sums over (row, piece) give every
//      piece a place in every row's list of spans, and each piece writes its spans there;
//   4. each row of tiles counts its columns, and writes the entries of its tiles, which lie side by side.
// Both counting sorts write to few places at a time (27 rows, then 41 columns, for 648 x 420 pixels), which caches
// hold; a single one, by tile, took twice as long. All pieces are of fixed size. The places do not depend on them, so
// neither do the results, nor on the threads. Threads take pieces, and in step 4 rows: few rows keep few threads busy.
//
// Bytes: 28 a Gaussian read (36 with image ids), 4 written; 16 a Gaussian and pass of the sort (3 passes); 8 + 16 a
// span, written and read; 12 an intersection written, 8 a tile.
#include "common/parallel.h"
#include "common/vector.h"
#include "splatting/intersect_tiles_input.h"

#include <unistd.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

namespace mpkernels {
namespace splatting {
namespace {

constexpr int64_t piece_gaussians = 4096;
constexpr int64_t kept_rows = 4096;           // of the ellipses of 256 Gaussians; those beyond are worked out again
constexpr int64_t far_ahead = 16, ahead = 8;  // Gaussians in order of depth, whose tiles and spans are fetched early
constexpr int digit_bits = 11;
constexpr int64_t digits = int64_t{1} << digit_bits;

int64_t pieces_of(int64_t count) {
  return (count + piece_gaussians - 1) / piece_gaussians;
}

// Memory that is not written before it is used, unlike a vector's.
template <typename T>
std::unique_ptr<T[]> uninitialised(int64_t count) {
  std::unique_ptr<T[]> memory(new T[static_cast<size_t>(count)]);
  prefer_huge_pages(memory.get(), static_cast<size_t>(count) * sizeof(T));
  return memory;
}

// The tiles of a Gaussian: in row r columns spans[step (r - row_begin)] of its piece.
struct Tiles {
  int32_t row_begin, row_end;
  int32_t first_span;  // -1: not kept
  int32_t step;        // 0: a box, whose rows share a span
};

// A Gaussian that has tiles, to be sorted by depth.
struct Keyed {
  uint32_t depth;
  int32_t gaussian;
};

// Step 1.
template <typename T>
class Spans {
 public:
  explicit Spans(const ProjectedGaussians<T>& in)
      : in_(in),
        tiles_(uninitialised<Tiles>(in.count)),
        spans_(static_cast<size_t>(pieces_of(in.count))),
        keyed_(uninitialised<Keyed>(in.count)),
        found_(static_cast<size_t>(pieces_of(in.count))) {}

  // Writes how many tiles each Gaussian has; returns how many all have.
  int64_t find(int32_t* tiles_per_gauss) {
    std::vector<int64_t> sums(spans_.size());
    parallel_pieces(in_.count, piece_gaussians, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += piece_gaussians) {  // one piece, or all on one thread
        const size_t piece = static_cast<size_t>(first / piece_gaussians);
        sums[piece] = find_piece(first, std::min(end, first + piece_gaussians), tiles_per_gauss);
      }
    });
    int64_t sum = 0;
    for (const int64_t of_piece : sums) sum += of_piece;
    return sum;
  }

  // Of each piece, at its first Gaussian's place: those that have tiles.
  Keyed* keyed() const { return keyed_.get(); }
  const std::vector<int64_t>& found() const { return found_; }

  const Tiles& tiles(int64_t gaussian) const { return tiles_[gaussian]; }

  void prefetch(int64_t gaussian) const { __builtin_prefetch(&tiles_[gaussian]); }
  void prefetch_spans(int64_t gaussian) const {
    const std::vector<TileSpan>& spans = spans_[gaussian / piece_gaussians];
    __builtin_prefetch(spans.data() + std::max(tiles_[gaussian].first_span, 0));
  }

  // Calls f(row, columns) for each row of the Gaussian that has tiles.
  template <typename F>
  void for_each_row(int64_t gaussian, const F& f) const {
    const Tiles& tiles = tiles_[gaussian];
    if (tiles.first_span >= 0) {
      const TileSpan* span = spans_[gaussian / piece_gaussians].data() + tiles.first_span;
      for (int32_t row = tiles.row_begin; row < tiles.row_end; ++row, span += tiles.step) f(row, *span);
    } else {
      const Footprint footprint = in_.footprint(gaussian);
      for (int32_t row = tiles.row_begin; row < tiles.row_end; ++row) {
        f(row, footprint.columns_of(in_.grid, row));
      }
    }
  }

 private:
  using V = Vector<double>;
  static constexpr int64_t batch = 256;

  // A batch of Gaussians on its way through the steps below, and the rows of its ellipses.
  struct Batch {
    alignas(64) double x[batch], y[batch], a[batch], b[batch], c[batch], log_255_opacity[batch];
    alignas(64) double row_begin[batch], row_end[batch];
    Ellipse<double> ellipses[batch];
    int64_t tiles[batch];
    int32_t gaussian_of_row[kept_rows];
    double row[kept_rows];
  };

  int64_t find_piece(int64_t begin, int64_t end, int32_t* tiles_per_gauss) {
    const auto memory = std::make_unique<Batch>();
    Keyed* keyed = keyed_.get() + begin;
    int64_t sum = 0;
    for (int64_t first = begin; first < end; first += batch) {
      const int64_t count = std::min(batch, end - first);
      find_batch(first, count, *memory);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t g = first + i, own = memory->tiles[i];
        tiles_per_gauss[g] = static_cast<int32_t>(own);
        sum += own;
        *keyed = {in_.depth_bits(g), static_cast<int32_t>(g)};
        keyed += own > 0;
      }
    }
    found_[begin / piece_gaussians] = keyed - (keyed_.get() + begin);
    return sum;
  }

  void find_batch(int64_t first, int64_t count, Batch& m) {
    constexpr int width = lanes<double>;
    std::vector<TileSpan>& spans = spans_[first / piece_gaussians];
    for (int64_t i = 0; i < (count + width - 1) / width * width; ++i) {
      const int64_t g = first + i;
      const int64_t image = i < count ? in_.image_of(g) : -1;
      const T* const mean = in_.means2d + 2 * g;
      const T* const conic = in_.conics != nullptr ? in_.conics + 3 * g : nullptr;
      const T* const opacity = in_.opacities + g;
      const Shape shape =
          image >= 0 && image < in_.images ? shape_of(in_.radii + 2 * g, conic, opacity) : Shape::nothing;
      m.tiles[i] = 0;
      m.x[i] = m.y[i] = m.b[i] = m.log_255_opacity[i] = 0;
      m.a[i] = m.c[i] = 1;
      if (i < count) tiles_[g] = {0, 0, 0, shape == Shape::ellipse ? 1 : 0};
      if (shape == Shape::ellipse) {
        m.x[i] = mean[0];
        m.y[i] = mean[1];
        m.a[i] = conic[0];
        m.b[i] = conic[1];
        m.c[i] = conic[2];
        m.log_255_opacity[i] = std::log(255 * static_cast<double>(*opacity));
      } else if (shape == Shape::box) {
        const Footprint f = in_.footprint(g);
        tiles_[g] = {f.rows.begin, f.rows.end, static_cast<int32_t>(spans.size()), 0};
        m.tiles[i] = std::max<int64_t>(f.rows.end - f.rows.begin, 0) * tiles_in(f.columns);
        if (m.tiles[i] > 0) spans.push_back(f.columns);
      }
    }
    if (in_.conics == nullptr) return;
    for (int64_t i = 0; i < count; i += width) {
      const auto part = [i](const double* of) { return load_raw<double>(of + i); };
      const Ellipse<V> e =
          ellipse_of<V>(part(m.x), part(m.y), part(m.a), part(m.b), part(m.c), part(m.log_255_opacity));
      const TileRange<V> rows = rows_of_ellipse<V>(in_.grid, e);
      store<double>(m.row_begin + i, rows.begin);
      store<double>(m.row_end + i, rows.end);
      for (int lane = 0; lane < width; ++lane) {
        m.ellipses[i + lane] = {e.x[lane],          e.y[lane],         e.level[lane],  e.slope[lane],
                                e.det_over_a[lane], e.inverse_a[lane], e.height[lane], e.dy_at_right[lane]};
      }
    }
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) {
      Tiles& tiles = tiles_[first + i];
      if (tiles.step == 0) continue;
      tiles.row_begin = static_cast<int32_t>(m.row_begin[i]);
      tiles.row_end = static_cast<int32_t>(m.row_end[i]);
      tiles.first_span = static_cast<int32_t>(spans.size() + rows);
      const int64_t own = std::max(tiles.row_end - tiles.row_begin, 0);
      if (rows + own > kept_rows - width) {
        tiles.first_span = -1;
        const Footprint f = in_.footprint(first + i);
        for (int32_t row = f.rows.begin; row < f.rows.end; ++row) m.tiles[i] += tiles_in(f.columns_of(in_.grid, row));
        continue;
      }
      for (int64_t row = 0; row < own; ++row, ++rows) {
        m.gaussian_of_row[rows] = static_cast<int32_t>(i);
        m.row[rows] = m.row_begin[i] + static_cast<double>(row);
      }
    }
    for (int64_t rest = 0; rest < width; ++rest) {  // the last vector is full
      m.gaussian_of_row[rows + rest] = 0;
      m.row[rows + rest] = 0;
    }
    const size_t spans_before = spans.size();
    spans.resize(spans_before + static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; r += width) {
      const auto gathered = [&](double Ellipse<double>::* member) {
        V values{};
        for (int lane = 0; lane < width; ++lane) values[lane] = m.ellipses[m.gaussian_of_row[r + lane]].*member;
        return values;
      };
      using E = Ellipse<double>;
      const Ellipse<V> e{gathered(&E::x),      gathered(&E::y),          gathered(&E::level),
                         gathered(&E::slope),  gathered(&E::det_over_a), gathered(&E::inverse_a),
                         gathered(&E::height), gathered(&E::dy_at_right)};
      const TileRange<V> columns = columns_of_row<V>(in_.grid, e, load_raw<double>(m.row + r));
      for (int lane = 0; lane < std::min<int64_t>(width, rows - r); ++lane) {
        const TileSpan span{static_cast<int32_t>(columns.begin[lane]), static_cast<int32_t>(columns.end[lane])};
        spans[spans_before + r + lane] = span;
        m.tiles[m.gaussian_of_row[r + lane]] += tiles_in(span);
      }
    }
  }

  const ProjectedGaussians<T>& in_;
  std::unique_ptr<Tiles[]> tiles_;
  std::vector<std::vector<TileSpan>> spans_;
  std::unique_ptr<Keyed[]> keyed_;
  std::vector<int64_t> found_;
};

// From counts (pieces, columns) to places: exclusive sums over (column, piece). Returns the total; begins (columns,) is
// where each column begins.
int64_t prefix_over_pieces(int64_t* counts, int64_t pieces, int64_t columns, int64_t* begins) {
  const std::unique_ptr<int64_t[]> next = uninitialised<int64_t>(columns);
  std::fill(begins, begins + columns, 0);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t c = 0; c < columns; ++c) begins[c] += counts[piece * columns + c];
  }
  int64_t total = 0;
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t own = begins[c];
    begins[c] = next[c] = total;
    total += own;
  }
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t own = counts[piece * columns + c];
      counts[piece * columns + c] = next[c];
      next[c] += own;
    }
  }
  return total;
}

// Step 2. Sorts what lies in pieces of `from`, found[p] of piece p, into a list without holes; returns where it lies:
// `from` or `to`.
Keyed* sort_by_depth(Keyed* from, Keyed* to, std::vector<int64_t> found, int64_t* count) {
  int64_t pieces = static_cast<int64_t>(found.size());
  std::vector<int64_t> places(static_cast<size_t>(pieces * digits)), begins(digits);
  const auto each_piece = [&](const auto& body) {
    parallel_pieces(pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        body(from + piece * piece_gaussians, from + piece * piece_gaussians + found[piece],
             places.data() + piece * digits);
      }
    });
  };
  for (int shift = 0; shift < 32; shift += digit_bits) {
    const auto digit = [shift](const Keyed& keyed) { return (keyed.depth >> shift) & (digits - 1); };
    each_piece([&](const Keyed* begin, const Keyed* end, int64_t* counts) {
      std::fill(counts, counts + digits, 0);
      for (const Keyed* keyed = begin; keyed < end; ++keyed) ++counts[digit(*keyed)];
    });
    const int64_t total = prefix_over_pieces(places.data(), pieces, digits, begins.data());
    each_piece([&](const Keyed* begin, const Keyed* end, int64_t* next) {
      for (const Keyed* keyed = begin; keyed < end; ++keyed) to[next[digit(*keyed)]++] = *keyed;
    });
    std::swap(from, to);
    pieces = pieces_of(total);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      found[piece] = std::min(piece_gaussians, total - piece * piece_gaussians);
    }
    *count = total;
  }
  return from;
}

// A Gaussian in a row of tiles.
struct RowEntry {
  int32_t gaussian;
  uint32_t depth;
  TileSpan columns;
};

// Step 3. Rows of all images are numbered through; returns their entries by row, in order of depth, and where each
// row's begin, with their number at the end.
template <typename T>
std::unique_ptr<RowEntry[]> entries_by_row(const ProjectedGaussians<T>& in, const Spans<T>& spans, const Keyed* sorted,
                                           int64_t count, std::vector<int64_t>* begins) {
  const int64_t rows = in.images * in.grid.rows, pieces = pieces_of(count);
  const int64_t counters = rows + 1;  // what covers [begin, end) is added at begin and taken off at end
  const std::unique_ptr<int64_t[]> places = uninitialised<int64_t>(pieces * counters);
  const auto each_piece = [&](const auto& body) {
    parallel_pieces(pieces, 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        body(places.get() + piece * counters, piece * piece_gaussians, std::min(count, (piece + 1) * piece_gaussians));
      }
    });
  };
  each_piece([&](int64_t* counts, int64_t begin, int64_t end) {
    std::fill(counts, counts + counters, 0);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t gaussian = sorted[k].gaussian;
      if (k + far_ahead < end) spans.prefetch(sorted[k + far_ahead].gaussian);
      const Tiles& tiles = spans.tiles(gaussian);
      int64_t* const of_image = counts + in.image_of(gaussian) * in.grid.rows;
      ++of_image[tiles.row_begin];
      --of_image[tiles.row_end];
    }
    int64_t open = 0;
    for (int64_t row = 0; row < counters; ++row) counts[row] = open += counts[row];
  });
  begins->resize(static_cast<size_t>(counters));
  std::unique_ptr<RowEntry[]> entries =
      uninitialised<RowEntry>(prefix_over_pieces(places.get(), pieces, counters, begins->data()));
  each_piece([&](int64_t* next, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Keyed keyed = sorted[k];
      if (k + far_ahead < end) spans.prefetch(sorted[k + far_ahead].gaussian);
      if (k + ahead < end) spans.prefetch_spans(sorted[k + ahead].gaussian);
      int64_t* const of_image = next + in.image_of(keyed.gaussian) * in.grid.rows;
      spans.for_each_row(keyed.gaussian, [&](int32_t row, TileSpan columns) {
        entries[of_image[row]++] = {keyed.gaussian, keyed.depth, columns};
      });
    }
  });
  return entries;
}

// Step 4.
template <typename T>
void write_lists(const ProjectedGaussians<T>& in, const RowEntry* entries, const std::vector<int64_t>& begins,
                 int64_t* isect_ids, int32_t* flatten_ids, int64_t* offsets) {
  const int64_t columns = in.grid.columns, rows = in.images * in.grid.rows;
  const int bits = tile_bits(in.grid.tiles());
  const auto each_row = [&](const auto& body) {
    parallel_pieces(rows, 1, [&](int64_t first, int64_t last) {
      std::vector<int64_t> of_columns(static_cast<size_t>(columns) + 1);
      for (int64_t row = first; row < last; ++row) {
        body(row, entries + begins[row], entries + begins[row + 1], of_columns.data());
      }
    });
  };
  each_row([&](int64_t row, const RowEntry* begin, const RowEntry* end, int64_t* counts) {
    std::fill(counts, counts + columns + 1, 0);
    for (const RowEntry* entry = begin; entry < end; ++entry) {
      const TileSpan span = entry->columns;  // may be empty
      ++counts[span.begin];
      --counts[std::max(span.begin, span.end)];
    }
    int64_t open = 0;
    for (int64_t column = 0; column < columns; ++column) offsets[row * columns + column] = open += counts[column];
  });
  int64_t total = 0;
  for (int64_t list = 0; list < rows * columns; ++list) {
    const int64_t own = offsets[list];
    offsets[list] = total;
    total += own;
  }
  each_row([&](int64_t row, const RowEntry* begin, const RowEntry* end, int64_t* next) {
    std::copy(offsets + row * columns, offsets + (row + 1) * columns, next);
    const int64_t first = row / in.grid.rows << bits | row % in.grid.rows * columns;
    for (const RowEntry* entry = begin; entry < end; ++entry) {
      for (int64_t column = entry->columns.begin; column < entry->columns.end; ++column) {
        const int64_t place = next[column]++;
        isect_ids[place] = (first + column) << 32 | entry->depth;
        flatten_ids[place] = entry->gaussian;
      }
    }
  });
}

int64_t memory_of_this_machine() {
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const ProjectedGaussians<T>& in, const Tensor& radii) {
  Tensor tiles_per_gauss = empty({in.count}, radii);
  Spans<T> spans(in);
  const int64_t total = spans.find(pointer<int32_t>(tiles_per_gauss));
  const int64_t lists = in.images * in.grid.tiles();
  check_intersections_fit(total, 12, 8 * lists, memory_of_this_machine());
  Tensor isect_ids = empty({total}, radii, ScalarType::Long);
  Tensor flatten_ids = empty({total}, radii);
  Tensor offsets = empty({in.images, in.grid.rows, in.grid.columns}, radii, ScalarType::Long);
  if (total == 0) {
    std::fill(pointer<int64_t>(offsets), pointer<int64_t>(offsets) + lists, 0);
  } else {
    const std::unique_ptr<Keyed[]> other = uninitialised<Keyed>(in.count);
    int64_t count = 0;
    const Keyed* sorted = sort_by_depth(spans.keyed(), other.get(), spans.found(), &count);
    std::vector<int64_t> begins;
    const std::unique_ptr<RowEntry[]> entries = entries_by_row(in, spans, sorted, count, &begins);
    write_lists(in, entries.get(), begins, pointer<int64_t>(isect_ids), pointer<int32_t>(flatten_ids),
                pointer<int64_t>(offsets));
  }
  return {tiles_per_gauss, isect_ids, flatten_ids, offsets};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> intersect_tiles(const Tensor& means2d, const Tensor& radii,
                                                           const Tensor& depths, const std::optional<Tensor>& conics,
                                                           const std::optional<Tensor>& opacities,
                                                           const std::optional<Tensor>& image_ids, int64_t images,
                                                           int64_t width, int64_t height, int64_t tile_size) {
  const auto of_dtype = [&](auto element) {
    using T = decltype(element);
    return run<T>(
        gaussians_of<T>(means2d, radii, depths, conics, opacities, image_ids, images, width, height, tile_size), radii);
  };
  switch (means2d.scalar_type()) {
    case ScalarType::Float:
      return of_dtype(float{});
    case ScalarType::Double:
      return of_dtype(double{});
    default:
      STD_TORCH_CHECK(false, "intersect_tiles: no CPU kernel for this dtype");
  }
}

}  // namespace
}  // namespace splatting
}  // namespace mpkernels

STABLE_TORCH_LIBRARY_IMPL(mpkernels, CPU, library) {
  library.impl("intersect_tiles", TORCH_BOX(&mpkernels::splatting::intersect_tiles));
}
