#include "token_gramian.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "register_tile.h"
#include "workspace.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

// Values of a token multiplied at a time: longer float32 sums would round more, shorter ones be
// read and written more often.
constexpr std::int64_t chunk = 192;

// Most tokens on a side of the squares in which pairs are taken: what is held for a square fits the
// second-level cache, and more tokens need no more memory.
constexpr std::int64_t square = 384;

template <typename T>
constexpr std::int64_t panel_size = chunk * lanes<T>;

// One step of a transpose: swaps the upper right and lower left squares of side `half` in every
// square of twice the side.
template <typename T, int half, int... I>
inline void swap_squares(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, I...>) {
  const Vector<T> first = a, second = b;
  constexpr int n = sizeof...(I);
  a = __builtin_shufflevector(first, second, (I & half ? n + I - half : I)...);
  b = __builtin_shufflevector(first, second, (I & half ? n + I : I + half)...);
}

template <typename T, int half = lanes<T> / 2>
inline void transpose(Vector<T>* rows) {
#pragma GCC unroll 16
  for (int r = 0; r < lanes<T>; ++r) {
    if (!(r & half)) {
      swap_squares<T, half>(rows[r], rows[r + half], std::make_integer_sequence<int, lanes<T>>{});
    }
  }
  if constexpr (half > 1) {
    transpose<T, half / 2>(rows);
  }
}

// Whether a token's product with itself is lost on one side and large on the other, which may bring
// it back: float32 squares of values below 2^-63 lose digits. The bounds of ops/token_gramian.py.
inline bool out_of_range(float x, float y) {
  return std::min(x, y) < 0x1p-116f && std::max(x, y) > 0x1p30f;
}
inline bool out_of_range(double, double) { return false; }

// left or right of all tokens
template <typename T>
class Side {
 public:
  explicit Side(const Tensor& side)
      : data_(static_cast<const T*>(side.data)),
        width_(side.size(2)),
        count_(side.size(0) * side.size(1)),
        per_block_(side.size(1)),
        block_stride_(side.stride(0)),
        stride_(side.stride(1)),
        step_(side.stride(2)) {}

  std::int64_t width() const { return width_; }

  // A panel: some values of a vector of tokens, all tokens' first value, then their second, ...
  // Past the last token it is repeated; nobody reads its products there.
  void pack(std::int64_t token, std::int64_t value, std::int64_t length, T* to) const {
    const T* rows[lanes<T>];
    for (int r = 0; r < lanes<T>; ++r) {
      const std::int64_t t = std::min(token + r, count_ - 1);
      rows[r] = data_ + t / per_block_ * block_stride_ + t % per_block_ * stride_ + value * step_;
    }
    std::int64_t k = 0;
    for (; step_ == 1 && k + lanes<T> <= length; k += lanes<T>) {
      Vector<T> values[lanes<T>];
#pragma GCC unroll 16
      for (int r = 0; r < lanes<T>; ++r) {
        values[r] = load(rows[r] + k);
      }
      transpose<T>(values);
#pragma GCC unroll 16
      for (int r = 0; r < lanes<T>; ++r) {
        store(to, values[r]);
        to += lanes<T>;
      }
    }
    for (; k < length; ++k) {
      for (int r = 0; r < lanes<T>; ++r) {
        *to++ = rows[r][k * step_];
      }
    }
  }

 private:
  const T* data_;
  std::int64_t width_, count_, per_block_, block_stride_, stride_, step_;
};

// sums [rows, panels * lanes] += a_r . b_c over `length` values of the tokens
template <typename T, int panels>
void multiply(const T* a, const T* b, std::int64_t length, T* sums) {
  constexpr int rows = tile_rows<T>;
  // from zero, not from sums: short sums, added up, round less than one long sum
  Vector<T> acc[rows * panels] = {};
  for (std::int64_t k = 0; k < length; ++k) {
    Vector<T> x[panels];
#pragma GCC unroll 4
    for (int c = 0; c < panels; ++c) {
      x[c] = load(b + c * panel_size<T>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < panels; ++c) {
        acc[r * panels + c] += x[c] * a[r];
      }
    }
    a += lanes<T>;
    b += lanes<T>;
  }
#pragma GCC unroll 32
  for (int i = 0; i < rows * panels; ++i) {
    store(sums + i * lanes<T>, load(sums + i * lanes<T>) + acc[i]);
  }
}

// Products of tokens from `row` on with those of some panels, from `column` on.
struct Tile {
  std::int64_t row, column, panels;
  std::int64_t row_panel, column_panel;  // where they are packed
};

template <typename T>
class Pairs {
 public:
  Pairs(const Tokens& first, const Tokens& second, bool symmetric, int threads)
      : symmetric_(symmetric),
        row_tokens_(first.per_block()),
        column_tokens_(second.per_block()),
        row_blocks_(first.blocks()),
        column_blocks_(second.blocks()),
        rows_(row_blocks_ * row_tokens_),
        columns_(column_blocks_ * column_tokens_),
        row_sides_{Side<T>(first.left), Side<T>(first.right)},
        column_sides_{Side<T>(second.left), Side<T>(second.right)},
        width_(row_sides_[0].width() + row_sides_[1].width()) {
    // a second thread pays for its start from some ten microseconds on
    const std::int64_t products = rows_ * columns_ / (symmetric ? 2 : 1) * width_;
    threads_ = static_cast<int>(std::clamp<std::int64_t>(products >> 19, 1, std::max(threads, 1)));
  }

  void add_to(double* out) const {
    if (rows_ == 0 || columns_ == 0 || width_ == 0) {
      return;
    }
    std::vector<Square> squares;
    std::int64_t cost = 0;
    const std::int64_t row_step = step(rows_), column_step = step(columns_);
    for (std::int64_t j = 0; j < columns_; j += column_step) {
      for (std::int64_t i = 0; i < (symmetric_ ? j + 1 : rows_); i += row_step) {
        squares.push_back({i, std::min(i + row_step, rows_), j, std::min(j + column_step, columns_),
                           symmetric_ && i == j, cost});
        for_tiles(squares.back(), [&](const Tile& tile) { cost += tile.panels; });
      }
    }
    // Every thread has its part, and they are added in order: the same sum each time. Each packs
    // what it needs, or they would wait for one another and for one another's caches.
    const std::int64_t cells = row_blocks_ * column_blocks_;
    std::vector<double> parts((threads_ - 1) * cells);
#pragma omp parallel for num_threads(threads_) schedule(static, 1)
    for (int t = 0; t < threads_; ++t) {
      const std::int64_t begin = cost * t / threads_, end = cost * (t + 1) / threads_;
      for (std::size_t i = 0; i < squares.size() && squares[i].before < end; ++i) {
        if (i + 1 == squares.size() || squares[i + 1].before > begin) {
          add_square(squares[i], begin, end, t == 0 ? out : parts.data() + (t - 1) * cells);
        }
      }
    }
    // a few are added sooner than threads start
    const int threads = cells < (1 << 16) ? 1 : threads_;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t i = 0; i < row_blocks_; ++i) {
      for (int t = 1; t < threads_; ++t) {
        const double* part = parts.data() + (t - 1) * cells;
        for (std::int64_t j = symmetric_ ? i : 0; j < column_blocks_; ++j) {
          out[i * column_blocks_ + j] += part[i * column_blocks_ + j];
        }
      }
    }
    if (symmetric_) {
      mirror(out, threads);
    }
  }

 private:
  static constexpr std::int64_t tile_columns = tile_panels * lanes<T>;
  static constexpr std::int64_t tile_size = tile_rows<T> * tile_columns;
  static_assert(lanes<T> % tile_rows<T> == 0);

  // by squares: a column of a large matrix takes as many pages as it is long
  void mirror(double* out, [[maybe_unused]] int threads) const {  // unused without OpenMP
    constexpr std::int64_t side = 32;
    const std::int64_t n = row_blocks_;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (std::int64_t row = 0; row < n; row += side) {
      for (std::int64_t column = 0; column <= row; column += side) {
        for (std::int64_t i = row; i < std::min(row + side, n); ++i) {
          for (std::int64_t j = column; j < std::min(column + side, i); ++j) {
            out[i * n + j] = out[j * n + i];
          }
        }
      }
    }
  }

  struct Square {
    std::int64_t row, row_end, column, column_end;
    bool diagonal;
    std::int64_t before;  // panels of the tiles before it
  };

  // of equal squares, none larger than allowed
  static std::int64_t step(std::int64_t tokens) {
    return round_up((tokens - 1) / ((tokens + square - 1) / square) + 1, tile_columns);
  }

  // the tiles that begin in [begin, end), counted in panels
  void add_square(const Square& square, std::int64_t begin, std::int64_t end, double* part) const {
    std::vector<Tile> tiles;
    std::int64_t before = square.before;
    for_tiles(square, [&](const Tile& tile) {
      if (begin <= before && before < end) {
        tiles.push_back(tile);
      }
      before += tile.panels;
    });
    // panels of the columns, then those of the rows; on the diagonal they are the same
    const std::int64_t column_panels =
        round_up(square.column_end - square.column, lanes<T>) / lanes<T>;
    const std::int64_t first = square.diagonal ? 0 : column_panels;
    std::vector<char> needed(first + round_up(square.row_end - square.row, lanes<T>) / lanes<T>);
    for (Tile& tile : tiles) {
      tile.row_panel = first + (tile.row - square.row) / lanes<T>;
      tile.column_panel = (tile.column - square.column) / lanes<T>;
      needed[tile.row_panel] = true;
      std::fill_n(needed.begin() + tile.column_panel, tile.panels, true);
    }
    const std::int64_t panels = needed.size(), count = tiles.size();
    T* const packed = workspace<T>(panels * panel_size<T> + 2 * count * tile_size);
    T* const sums[] = {packed + panels * panel_size<T>,
                       packed + panels * panel_size<T> + count * tile_size};
    std::fill(sums[0], sums[1] + count * tile_size, T{0});

    for (int side = 0; side < 2; ++side) {
      const std::int64_t width = row_sides_[side].width();
      for (std::int64_t k = 0; k < width; k += chunk) {
        const std::int64_t length = std::min(chunk, width - k);
        for (std::int64_t i = 0; i < panels; ++i) {
          if (!needed[i]) {
            continue;
          }
          T* to = packed + i * panel_size<T>;
          if (i < column_panels) {
            column_sides_[side].pack(square.column + i * lanes<T>, k, length, to);
          } else {
            row_sides_[side].pack(square.row + (i - first) * lanes<T>, k, length, to);
          }
        }
        for (std::int64_t i = 0; i < count; ++i) {
          const Tile& tile = tiles[i];
          multiply_panels[tile.panels - 1](
              packed + tile.row_panel * panel_size<T> + tile.row % lanes<T>,
              packed + tile.column_panel * panel_size<T>, length, sums[side] + i * tile_size);
        }
      }
    }
    for (std::int64_t i = 0; i < count; ++i) {
      reduce(tiles[i], sums[0] + i * tile_size, sums[1] + i * tile_size, part);
    }
  }

  static constexpr void (*multiply_panels[])(const T*, const T*, std::int64_t, T*) = {
      multiply<T, 1>, multiply<T, 2>, multiply<T, tile_panels>};

  // Calls f(tile) for the tiles of a square; on the diagonal, those that reach it or are above.
  template <typename Function>
  static void for_tiles(const Square& square, Function&& f) {
    for (std::int64_t j = square.column; j < square.column_end; j += tile_columns) {
      const std::int64_t end = std::min(j + tile_columns, square.column_end);
      for (std::int64_t i = square.row; i < square.row_end; i += tile_rows<T>) {
        const std::int64_t start = square.diagonal ? std::max(j, i / lanes<T> * lanes<T>) : j;
        if (start < end) {
          f(Tile{i, start, round_up(end - start, lanes<T>) / lanes<T>, 0, 0});
        }
      }
    }
  }

  // part[block, block] += the products of both sides of a tile. Of tokens with one another, pairs
  // above the diagonal are those below it too, where these are in the same block.
  void reduce(const Tile& tile, const T* left, const T* right, double* part) const {
    const std::int64_t stride = tile.panels * lanes<T>;
    const std::int64_t columns = std::min(stride, columns_ - tile.column);
    const std::int64_t end = std::min(tile.row + tile_rows<T>, rows_);
    const double self = row_tokens_ == 1 ? 1 : 0.5;
    double sums[tile_columns];
    for (std::int64_t row = tile.row, stop; row < end; row = stop) {
      const std::int64_t block = row / row_tokens_;
      stop = std::min(end, (block + 1) * row_tokens_);
      const T* x = left + (row - tile.row) * stride;
      const T* y = right + (row - tile.row) * stride;
      if (symmetric_ && tile.column < end) {
        std::fill_n(sums, stride, 0.0);
        for (std::int64_t r = row; r < stop; ++r, x += stride, y += stride) {
          for (std::int64_t c = std::max<std::int64_t>(r - tile.column, 0); c < columns; ++c) {
            const double product = static_cast<double>(x[c]) * static_cast<double>(y[c]);
            sums[c] += c == r - tile.column ? self * product : product;
          }
          const std::int64_t own = r - tile.column;
          if (own >= 0 && own < columns && out_of_range(x[own], y[own])) {
            sums[own] = std::numeric_limits<double>::quiet_NaN();
          }
        }
      } else {
        for (std::int64_t c = 0; c < stride; c += lanes<double>) {
          Vector<double> sum = {};
          for (std::int64_t r = 0; r < stop - row; ++r) {
            sum += load_as<double>(x + r * stride + c) * load_as<double>(y + r * stride + c);
          }
          store(sums + c, sum);
        }
      }
      double* to = part + block * column_blocks_;
      if (column_tokens_ == 1) {
        for (std::int64_t c = 0; c < columns; ++c) {
          to[tile.column + c] += sums[c];
        }
      } else {
        for (std::int64_t c = 0, last; c < columns; c = last) {
          const std::int64_t other = (tile.column + c) / column_tokens_;
          last = std::min(columns, (other + 1) * column_tokens_ - tile.column);
          double sum = 0;
          for (std::int64_t i = c; i < last; ++i) {
            sum += sums[i];
          }
          to[other] += symmetric_ && other == block ? 2 * sum : sum;
        }
      }
    }
  }

  bool symmetric_;
  std::int64_t row_tokens_, column_tokens_;  // in a block
  std::int64_t row_blocks_, column_blocks_;
  std::int64_t rows_, columns_;  // tokens
  Side<T> row_sides_[2], column_sides_[2];
  std::int64_t width_;  // of both sides
  int threads_;
};

}  // namespace

void token_gramian(const Tokens& first, const Tokens* second, double* out, int threads) {
  const Tokens& other = second != nullptr ? *second : first;
  if (first.left.dtype == Dtype::float64) {
    Pairs<double>(first, other, second == nullptr, threads).add_to(out);
  } else {
    Pairs<float>(first, other, second == nullptr, threads).add_to(out);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
