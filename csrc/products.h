// Inner products of rows, register tile by register tile, for a slice of columns at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace gradsurgery::GRADSURGERY_ISA {

// Columns of a tile of `rows` rows: fewer rows take more, or each sum would wait for its last.
constexpr int most_columns = 12;
constexpr int widest(int rows) { return rows == tile ? tile : most_columns / rows; }

// sums[r, c] += a_r * b_c, lane by lane, over `length` columns in whole vectors; of a tile on the
// diagonal only c <= r. Meanwhile two rows of the next slice are prefetched.
template <typename T, int MR, int NR, bool diagonal>
void tile_products(const T* const* a, const T* const* b, std::int64_t length,
                   const char* const* next, std::int64_t next_bytes, Vector<T>* partial) {
  const char *first = next[0], *second = next[1];
  next_bytes *= lanes<T>;
  // from zero, not from partial: short sums, added up, round less than one long sum
  Vector<T> sums[MR * NR] = {};
  for (std::int64_t j = 0; j < length; j += lanes<T>) {
    __builtin_prefetch(first, 0, 3);
    __builtin_prefetch(second, 0, 3);
    first += next_bytes;
    second += next_bytes;
    Vector<T> x[MR];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      x[r] = load(a[r] + j);
    }
#pragma GCC unroll 16
    for (int c = 0; c < NR; ++c) {
      Vector<T> y = diagonal ? x[c] : load(b[c] + j);
#pragma GCC unroll 16
      for (int r = diagonal ? c : 0; r < MR; ++r) {
        sums[r * NR + c] += x[r] * y;
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < MR * NR; ++k) {
    partial[k] += sums[k];
  }
}

template <typename T>
using TileProducts = void (*)(const T* const*, const T* const*, std::int64_t, const char* const*,
                              std::int64_t, Vector<T>*);

// [rows - 1][columns - 1], as one array
template <typename T, int... I>
constexpr auto tile_table(std::integer_sequence<int, I...>) {
  return std::array<TileProducts<T>, sizeof...(I)>{
      tile_products<T, I / most_columns + 1,
                    std::min(I % most_columns + 1, widest(I / most_columns + 1)), false>...};
}

template <typename T, int... I>
constexpr auto diagonal_table(std::integer_sequence<int, I...>) {
  return std::array<TileProducts<T>, sizeof...(I)>{tile_products<T, I + 1, I + 1, true>...};
}

// The products of m rows with n rows, or of m rows with one another. They are summed lane by lane
// over slices, and from time to time across lanes and in float64: to sum across lanes for every
// slice would cost as much as a quarter of the products. Only where the lanes' sums would not fit
// the second-level cache, from some 120 rows on, are they summed for every slice, a longer one.
template <typename T>
class Products {
 public:
  // with slices of 256 columns and 16 lanes, 16 + 4 additions of floats: relative errors up to
  // 1e-6, and of 1e-8 where they average out
  static constexpr std::int64_t flush_columns = 1024;

  // `out` [m, n] is added to; of a Gramian, where n is m and b is a, the lower triangle.
  Products(std::int64_t m, std::int64_t n, bool gramian, double* out) : m_(m), n_(n), out_(out) {
    for (std::int64_t i = 0; i < m; i += tile) {
      const std::int64_t rows = std::min<std::int64_t>(tile, m - i);
      const std::int64_t stop = gramian ? i : n;
      for (std::int64_t j = 0; j < stop; j += widest(rows)) {
        tiles_.push_back({i, j, rows, std::min<std::int64_t>(widest(rows), stop - j), false});
      }
      if (gramian) {
        tiles_.push_back({i, i, rows, rows, true});
      }
    }
    keep_ = keeps_lanes(m, n, gramian);
    if (!keep_) {
      // squares of rows that fit the second-level cache together
      constexpr std::int64_t side = 48;
      std::stable_sort(tiles_.begin(), tiles_.end(), [](const Tile& a, const Tile& b) {
        return std::pair(a.i / side, a.j / side) < std::pair(b.i / side, b.j / side);
      });
    }
    partial_.resize((keep_ ? tiles_.size() : 1) * tile_size);
  }

  // Whether the lanes' sums are kept over slices, which then may be short.
  static bool keeps_lanes(std::int64_t m, std::int64_t n, bool gramian) {
    return m * n / (gramian ? 2 : 1) * static_cast<std::int64_t>(sizeof(Vector<T>)) <= 512 << 10;
  }

  Products(const Products&) = delete;

  ~Products() { flush(); }

  // The next slice of a is prefetched, if asked, evenly over the tiles: a burst would wait for
  // memory, and tiles that find their rows in cache would leave it idle.
  void add(const Slice<T>& a, const Slice<T>& b, bool prefetch) {
    add(a.rows(), b.rows(), a.whole, prefetch ? a.next() : nullptr, a.next_bytes());
    if (a.rest > 0) {
      add(a.ends(), b.ends(), lanes<T>, nullptr, 0);
    }
    columns_ += a.whole + a.rest;
    if (keep_ && columns_ >= flush_columns) {
      flush();
    }
  }

  void flush() {
    for (std::size_t t = 0; keep_ && t < tiles_.size(); ++t) {
      flush(tiles_[t], partial_.data() + t * tile_size);
    }
    columns_ = 0;
  }

 private:
  struct Tile {
    std::int64_t i, j, rows, columns;
    bool diagonal;
  };

  static constexpr int tile_size = std::max(tile * tile, most_columns);

  void flush(const Tile& at, Vector<T>* sums) {
    for (std::int64_t r = 0; r < at.rows; ++r) {
      for (std::int64_t c = 0; c < at.columns; ++c) {
        Vector<T>& lanes_sum = sums[r * at.columns + c];
        out_[(at.i + r) * n_ + at.j + c] += sum<T>(lanes_sum);
        lanes_sum = Vector<T>{};
      }
    }
  }

  void add(const T* const* a, const T* const* b, std::int64_t length, const char* const* next,
           std::int64_t next_bytes) {
    static constexpr auto table =
        tile_table<T>(std::make_integer_sequence<int, tile * most_columns>{});
    static constexpr auto diagonals = diagonal_table<T>(std::make_integer_sequence<int, tile>{});
    const std::int64_t count = tiles_.size();
    for (std::int64_t t = 0; t < count; ++t) {
      const Tile& at = tiles_[t];
      const std::int64_t first = t * m_ / count, last = (t + 1) * m_ / count;
      const char* own = reinterpret_cast<const char*>(a[at.i]);
      const char* two[2] = {own, own};
      if (next != nullptr && last > first) {
        two[0] = next[first];
        two[1] = next[last - 1];
      }
      const auto kernel = at.diagonal ? diagonals[at.rows - 1]
                                      : table[(at.rows - 1) * most_columns + at.columns - 1];
      kernel(a + at.i, b + at.j, length, two, next_bytes,
             partial_.data() + (keep_ ? t * tile_size : 0));
      if (!keep_) {
        flush(at, partial_.data());
      }
    }
  }

  std::int64_t m_, n_, columns_ = 0;
  bool keep_;
  double* out_;
  std::vector<Tile> tiles_;
  std::vector<Vector<T>> partial_;
};

// The lower triangles that threads other than the first made, [threads - 1, m, m], added to `out`
// in their order, and its upper triangle.
inline void add_parts(const std::vector<double>& parts, std::int64_t m, int threads, double* out) {
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double value = out[i * m + j];
      for (int t = 1; t < threads; ++t) {
        value += parts[((t - 1) * m + i) * m + j];
      }
      out[i * m + j] = out[j * m + i] = value;
    }
  }
}

// Over so few columns the rounding of float32 sums does not average out to 1e-7 of the norms.
constexpr std::int64_t few_columns = 1 << 15;

// Products of values below 1e-17 lose digits in float32, and a sum above 3e38 is none.
inline bool in_range(std::int64_t m, std::int64_t n, const double* out) {
  for (std::int64_t i = 0; i < m; ++i) {
    double square = out[i * m + i];
    if (!(square >= 1e-34 * static_cast<double>(n) && square < INFINITY)) {
      return false;
    }
  }
  return true;
}

}  // namespace gradsurgery::GRADSURGERY_ISA
