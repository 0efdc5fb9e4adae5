#include "formed_gramian.h"

#include <algorithm>
#include <vector>

#include "products.h"
#include "register_tile.h"
#include "workspace.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

// Most tokens multiplied at a time: the fewer parts a block has, the fewer sums are read and
// written.
constexpr std::int64_t chunk = 256;

// Bytes of the tiles of all rows: they stay in the second-level cache until they are multiplied.
constexpr std::int64_t tiles_bytes = 768 << 10;

// Bytes of the packed tokens that all tiles below one another share.
constexpr std::int64_t packed_bytes = 4 << 20;

// One side of some tokens.
template <typename T>
struct Side {
  const T* data;
  std::int64_t stride, step;  // from token to token, from value to value
};

// `count` values of `length` tokens, as panels of `grain` values: a panel has those of the first
// token, then of the second, ... The last one is filled up with zeros.
template <int grain, typename T>
void pack(const Side<T>& side, std::int64_t length, std::int64_t count, T* to) {
  const std::int64_t whole = side.step == 1 ? count / grain * grain : 0;
  for (std::int64_t t = 0; t < length; ++t) {
    const T* from = side.data + t * side.stride;
    T* panel = to + t * grain;
    for (std::int64_t i = 0; i < whole; i += grain, panel += length * grain) {
      std::memcpy(panel, from + i, sizeof(T) * grain);
    }
    for (std::int64_t i = whole; i < count; i += grain, panel += length * grain) {
      for (std::int64_t k = 0; k < grain; ++k) {
        panel[k] = i + k < count ? from[(i + k) * side.step] : T{0};
      }
    }
  }
}

// Lines that come next: hardware does not foresee where a tile of tokens goes on, nor soon enough
// how far away a panel begins.
template <typename T>
struct Ahead {
  const T* panel;  // the next one, packed
  Side<T> side;    // the next tokens, to be packed
  std::int64_t values;

  static constexpr std::int64_t line = 64 / sizeof(T);
};

// A panel's products for `high` rows.
template <typename T, int panels>
void multiply_rows(const T* a, const T* b, std::int64_t b_stride, std::int64_t length,
                   std::int64_t high, T* out, std::int64_t stride, T beta, Ahead<T>& ahead) {
  constexpr std::int64_t line = Ahead<T>::line;
  constexpr int lines = panels * lanes<T> / line;  // of a token of the next panel
  for (std::int64_t h = 0; h < high; h += tile_rows<T>) {
    const std::int64_t step = h / tile_rows<T>;
    const T* next = ahead.panel + step * length * line;
    std::int64_t next_stride = line;
    if (step >= lines) {
      next = ahead.side.data;
      next_stride = ahead.side.stride;
      if (ahead.values > 0) {
        ahead.side.data += line * ahead.side.step;
        ahead.values -= line;
      }
    }
    multiply<T, panels>(a + h * length, b, b_stride, length, out + h * stride, stride, beta, next,
                        next_stride);
  }
}

// Multiplies in Product the rows whose planes are formed in T.
template <typename T, typename Product>
class Tiles {
 public:
  explicit Tiles(const Planes& planes) : planes_(planes) {
    for (const Planes::Part& part : planes.parts) {
      const std::int64_t tokens = part.tokens.per_block();
      const std::int64_t length = even(tokens, chunk);
      for (std::int64_t k = 0; k < part.tokens.blocks(); ++k) {
        for (std::int64_t t = 0; t < tokens; t += length) {
          pieces_.push_back(
              {&part.tokens, k, t, std::min(length, tokens - t), tokens_, part.rows[k]});
          tokens_ += pieces_.back().length;
        }
      }
    }
    // few rows of products are not worth packing what whole vectors can be read from
    packed_ = planes.height > 2 * tile_rows<T> || planes.width % lanes<T> != 0;
    for (const Planes::Part& part : planes.parts) {
      packed_ = packed_ || part.tokens.right.stride(2) != 1;
    }
    constexpr std::int64_t size = sizeof(T);
    const std::int64_t rows = planes.rows();
    const std::int64_t widest = packed_bytes / size / std::max<std::int64_t>(tokens_, 1);
    width_ = round_up(even(planes.width, std::clamp(widest, panel, 4 * panel)), lanes<T>);
    const std::int64_t highest = tiles_bytes / size / (rows * width_);
    height_ = round_up(even(planes.height, std::max<std::int64_t>(highest, 2 * tile_rows<T>)),
                       tile_rows<T>);
    down_ = (planes.height + height_ - 1) / height_;
    count_ = down_ * ((planes.width + width_ - 1) / width_);
  }

  std::int64_t count() const { return count_; }

  // out [rows, rows], the lower triangle, += the products of the tiles [begin, end)
  void add(std::int64_t begin, std::int64_t end, double* out) const {
    const std::int64_t rows = planes_.rows(), size = height_ * width_;
    T* const tiles = workspace<T>(rows * size + chunk * height_ + (packed_ ? tokens_ * width_ : 0));
    T* const a = tiles + rows * size;
    T* const b = a + chunk * height_;
    Rows view{planes_.dtype, rows, 0, std::vector<Block>(1)};
    for (std::int64_t i = 0; i < rows; ++i) {
      view.blocks[0].rows.push_back({reinterpret_cast<char*>(tiles + i * size), 1});
    }
    const bool keep = Products<Product>::keeps_lanes(rows, rows, true);
    const std::int64_t slice = keep ? slice_width : 4 * slice_width;
    Slice<Product> columns(view, slice, false);
    Products<Product> products(rows, rows, true, out);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t top = i % down_ * height_, left = i / down_ * width_;
      if (packed_ && (i == begin || top == 0)) {
        pack_right(left, b);
      }
      const std::int64_t length = form(top, left, a, b, tiles);
      view.blocks[0].columns = length;
      for (std::int64_t column = 0; column < length; column += slice) {
        columns.load(view.blocks[0], column, std::min(slice, length - column));
        products.add(columns, columns, false);
      }
    }
  }

 private:
  static constexpr std::int64_t panel = tile_panels * lanes<T>;

  // n as equal parts, none larger than allowed
  static std::int64_t even(std::int64_t n, std::int64_t most) {
    const std::int64_t parts = std::max<std::int64_t>((n + most - 1) / most, 1);
    return std::max<std::int64_t>((n + parts - 1) / parts, 1);
  }

  // Some tokens of a block.
  struct Piece {
    const Tokens* tokens;
    std::int64_t block, token, length;
    std::int64_t before;  // tokens of the pieces before it
    std::int64_t row;
  };

  static Side<T> side(const Piece& piece, const Tensor& all, std::int64_t value) {
    return {static_cast<const T*>(all.data) + piece.block * all.stride(0) +
                piece.token * all.stride(1) + value * all.stride(2),
            all.stride(1), all.stride(2)};
  }

  // The values from `left` on of all tokens' right sides, piece by piece and panel by panel.
  void pack_right(std::int64_t left, T* b) const {
    const std::int64_t wide = std::min(width_, planes_.width - left);
    const std::int64_t whole = wide / panel * panel;
    for (const Piece& piece : pieces_) {
      const Side<T> y = side(piece, piece.tokens->right, left);
      T* to = b + piece.before * width_;
      pack<panel>(y, piece.length, whole, to);
      if (wide > whole) {
        const Side<T> rest{y.data + whole * y.step, y.stride, y.step};
        to += whole * piece.length;
        switch ((wide - whole - 1) / lanes<T>) {
          case 0:
            pack<lanes<T>>(rest, piece.length, wide - whole, to);
            break;
          case 1:
            pack<2 * lanes<T>>(rest, piece.length, wide - whole, to);
            break;
          default:
            pack<panel>(rest, piece.length, wide - whole, to);
        }
      }
    }
  }

  // The tiles of all rows from (top, left) on; returns the values of each, zeros that fill up its
  // last vectors included.
  std::int64_t form(std::int64_t top, std::int64_t left, T* a, const T* b, T* tiles) const {
    const std::int64_t rows = planes_.rows(), size = height_ * width_;
    const std::int64_t high = std::min(height_, planes_.height - top);
    const std::int64_t wide = std::min(width_, planes_.width - left);
    const std::int64_t stride = round_up(wide, lanes<T>);
    std::vector<char> written(rows);
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      const Piece& piece = pieces_[i];
      const Piece& next = pieces_[std::min(i + 1, pieces_.size() - 1)];
      Ahead<T> ahead{nullptr, side(next, next.tokens->left, top), high};
      pack<tile_rows<T>>(side(piece, piece.tokens->left, top), piece.length, high, a);
      for (std::int64_t w = 0; w < stride; w += panel) {
        constexpr decltype(&multiply_rows<T, 1>) by_panels[] = {
            multiply_rows<T, 1>, multiply_rows<T, 2>, multiply_rows<T, tile_panels>};
        const std::int64_t grain = std::min(panel, stride - w);
        const T* at = b + piece.before * width_ + w * piece.length;
        std::int64_t at_stride = grain;
        ahead.panel = w + panel < stride ? at + panel * piece.length : b + next.before * width_;
        if (!packed_) {
          const Side<T> y = side(piece, piece.tokens->right, left + w);
          at = ahead.panel = y.data;
          at_stride = y.stride;
        }
        by_panels[grain / lanes<T> - 1](a, at, at_stride, piece.length, high,
                                        tiles + piece.row * size + w, stride,
                                        T{written[piece.row] ? 1.0f : 0.0f}, ahead);
      }
      written[piece.row] = true;
    }
    for (std::int64_t i = 0; i < planes_.count; ++i) {
      if (!written[i]) {
        std::fill_n(tiles + i * size, high * stride, T{0});
      }
    }
    if (planes_.kept) {
      const Tensor& kept = *planes_.kept;
      T* to = tiles + planes_.count * size;
      const std::int64_t step = kept.stride(1);
      for (std::int64_t h = 0; h < high; ++h, to += stride) {
        const T* from = static_cast<const T*>(kept.data) + (top + h) * kept.stride(0) + left * step;
        if (step == 1) {
          std::copy_n(from, wide, to);
        } else {
          for (std::int64_t w = 0; w < wide; ++w) {
            to[w] = from[w * step];
          }
        }
        std::fill(to + wide, to + stride, T{0});
      }
    }
    return high * stride;
  }

  const Planes& planes_;
  std::vector<Piece> pieces_;
  std::int64_t tokens_ = 0;
  bool packed_;                  // right sides are
  std::int64_t height_, width_;  // of a tile
  std::int64_t down_, count_;    // tiles below one another, and in all
};

template <typename T, typename Product>
void formed_gramian_in(const Planes& planes, double* out, int threads) {
  const Tiles<T, Product> tiles(planes);
  const std::int64_t m = planes.rows();
  std::int64_t work = m * m;
  for (const Planes::Part& part : planes.parts) {
    work += part.tokens.blocks() * part.tokens.per_block();
  }
  work *= planes.height * planes.width;
  // a second thread pays for its start from some ten microseconds on
  threads = static_cast<int>(
      std::clamp<std::int64_t>(std::min(work >> 19, tiles.count()), 1, std::max(threads, 1)));
  // a part for every thread but the first, added in their order: the same sum each time
  std::fill_n(out, m * m, 0.0);
  std::vector<double> parts((threads - 1) * m * m);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    tiles.add(tiles.count() * t / threads, tiles.count() * (t + 1) / threads,
              t == 0 ? out : parts.data() + (t - 1) * m * m);
  }
  add_parts(parts, m, threads, out);
}

}  // namespace

void formed_gramian(Planes planes, double* out, int threads) {
  // left sides are packed again for every tile beside; but vectors are along the right ones
  const std::int64_t vectors = tile_panels * lanes<float>;
  if (planes.height < planes.width ? planes.height >= vectors : planes.width < vectors) {
    planes.transpose();
  }
  if (planes.dtype == Dtype::float64) {
    formed_gramian_in<double, double>(planes, out, threads);
    return;
  }
  const std::int64_t columns = planes.height * planes.width;
  if (columns > few_columns) {
    formed_gramian_in<float, float>(planes, out, threads);
    if (in_range(planes.rows(), columns, out)) {
      return;
    }
  }
  formed_gramian_in<float, double>(planes, out, threads);
}

}  // namespace gradsurgery::GRADSURGERY_ISA
