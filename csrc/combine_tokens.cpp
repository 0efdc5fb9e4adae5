#include "combine_tokens.h"

#include <algorithm>
#include <utility>

#include "register_tile.h"
#include "workspace.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

// Tokens multiplied at a time: a panel of them about fits the first-level cache.
constexpr std::int64_t chunk = 192;

// Bytes of the rows and columns of a block of `out`: what is packed for it stays in cache.
constexpr std::int64_t block_bytes = 3072;

// The same side of some tokens of any blocks: tokens[t] is the first value of one.
template <typename T>
struct Chunk {
  const T* tokens[chunk];
  std::int64_t step;  // from value to value
};

// `count` values from `first` on, scaled, as panels of `grain` values: a panel has those of the
// first token, then of the second, ... The last one is filled up with zeros.
template <int grain, bool scaled, typename T>
void pack(const Chunk<T>& side, std::int64_t length, std::int64_t first, std::int64_t count,
          const T* scales, T* to) {
  const std::int64_t whole = side.step == 1 ? count / grain * grain : 0;
  for (std::int64_t t = 0; t < length; ++t) {
    const T* from = side.tokens[t] + first * side.step;
    const T scale = scaled ? scales[t] : T{1};
    T* panel = to + t * grain;
    for (std::int64_t i = 0; i < whole; i += grain, panel += length * grain) {
      if constexpr (scaled) {
        for (std::int64_t k = 0; k < grain; k += lanes<T>) {
          store(panel + k, load(from + i + k) * scale);
        }
      } else {
        std::memcpy(panel, from + i, sizeof(T) * grain);
      }
    }
    for (std::int64_t i = whole; i < count; i += grain, panel += length * grain) {
      for (std::int64_t k = 0; k < grain; ++k) {
        panel[k] = i + k < count ? from[(i + k) * side.step] * scale : T{0};
      }
    }
  }
}

template <typename T>
class Sum {
 public:
  Sum(const Tokens& tokens, const double* weights, double beta, const Tensor& out, int threads)
      : tokens_(tokens),
        weights_(weights),
        beta_(static_cast<T>(beta)),
        out_(static_cast<T*>(out.data)),
        stride_(out.stride(0)),
        height_(out.size(0)),
        width_(out.size(1)),
        length_(tokens.blocks() * tokens.per_block()) {
    constexpr std::int64_t size = sizeof(T), rows = tile_rows<T>;
    columns_ = even(width_, parts(width_, block_bytes / size), panel);
    across_ = parts(width_, columns_);
    std::int64_t down = parts(height_, block_bytes / size);
    while (down * across_ % threads != 0 && down * rows < height_) {
      ++down;
    }
    rows_ = even(height_, down, rows);
    down_ = parts(height_, rows_);
  }

  std::int64_t count() const { return down_ * across_; }

  void add(std::int64_t block) const {
    const std::int64_t top = block / across_ * rows_, left = block % across_ * columns_;
    const std::int64_t high = std::min(rows_, height_ - top);
    const std::int64_t wide = std::min(columns_, width_ - left);
    T* const a = workspace<T>(chunk * (rows_ + columns_));
    T* const b = a + chunk * rows_;
    T* const out = out_ + top * stride_ + left;
    Chunk<T> x, y;
    T scales[chunk];
    std::int64_t length = gather(0, x, y, scales), t = 0;
    do {  // once where there is no token: out = beta out
      pack<tile_rows<T>, false>(x, length, top, high, scales, a);
      pack<panel, true>(y, length, left, wide, scales, b);
      const std::int64_t next = gather(t + chunk, x, y, scales);
      multiply_block(a, b, length, out, high, wide, t == 0 ? beta_ : T{1},
                     next > 0 ? x.tokens[0] + top * x.step : nullptr,
                     next > 0 ? y.tokens[0] + left * y.step : nullptr);
      length = next;
      t += chunk;
    } while (t < length_);
  }

 private:
  static constexpr std::int64_t panel = tile_panels * lanes<T>;
  static constexpr std::int64_t line = 64 / sizeof(T);

  static std::int64_t parts(std::int64_t n, std::int64_t most) { return (n + most - 1) / most; }

  static std::int64_t even(std::int64_t n, std::int64_t parts, std::int64_t grain) {
    return round_up((n + parts - 1) / parts, grain);
  }

  // The tokens from the t-th on, a chunk of them at most; returns how many there are.
  std::int64_t gather(std::int64_t t, Chunk<T>& x, Chunk<T>& y, T* scales) const {
    const Tensor &left = tokens_.left, &right = tokens_.right;
    const std::int64_t length = std::clamp<std::int64_t>(length_ - t, 0, chunk);
    x.step = left.stride(2);
    y.step = right.stride(2);
    for (std::int64_t k = 0; k < length; ++k, ++t) {
      const std::int64_t block = t / tokens_.per_block(), token = t % tokens_.per_block();
      x.tokens[k] =
          static_cast<const T*>(left.data) + block * left.stride(0) + token * left.stride(1);
      y.tokens[k] =
          static_cast<const T*>(right.data) + block * right.stride(0) + token * right.stride(1);
      scales[k] = static_cast<T>(weights_[block]);
    }
    return length;
  }

  // out [high, wide] = beta out + the products of what is packed. Meanwhile the sides of the tokens
  // that come next, if there are any, are prefetched.
  void multiply_block(const T* a, const T* b, std::int64_t length, T* out, std::int64_t high,
                      std::int64_t wide, T beta, const T* next_left, const T* next_right) const {
    constexpr std::int64_t rows = tile_rows<T>;
    // lines of a token, to be prefetched evenly over the tiles
    const std::int64_t left_lines = parts(high, line), lines = left_lines + parts(wide, line);
    const std::int64_t tiles = parts(high, rows) * parts(wide, panel);
    const Tensor &left = tokens_.left, &right = tokens_.right;
    const bool blocks = tokens_.per_block() == 1;
    std::int64_t tile = 0;
    T edge[rows * panel];
    constexpr decltype(&multiply<T, 1>) by_panels[] = {multiply<T, 1>, multiply<T, 2>,
                                                       multiply<T, tile_panels>};
    for (std::int64_t w = 0; w < wide; w += panel, b += panel * length) {
      const std::int64_t columns = std::min(panel, wide - w);
      const auto kernel = by_panels[(columns - 1) / lanes<T>];
      for (std::int64_t h = 0; h < high; h += rows, ++tile) {
        T* const to = out + h * stride_ + w;
        const std::int64_t own = std::min(rows, high - h);
        for (std::int64_t r = 0; r < own; ++r) {
          for (std::int64_t c = 0; c < columns; c += line) {
            __builtin_prefetch(to + r * stride_ + c, 1, 3);
          }
        }
        const T* ahead = a;  // what is in cache costs nothing
        std::int64_t ahead_stride = 0;
        const std::int64_t at = tile * lines / tiles;
        if (next_left != nullptr && at != (tile + 1) * lines / tiles) {
          if (at < left_lines) {
            ahead = next_left + at * line * left.stride(2);
            ahead_stride = left.stride(blocks ? 0 : 1);
          } else {
            ahead = next_right + (at - left_lines) * line * right.stride(2);
            ahead_stride = right.stride(blocks ? 0 : 1);
          }
        }
        if (own == rows && columns % lanes<T> == 0) {
          kernel(a + h * length, b, panel, length, to, stride_, beta, ahead, ahead_stride);
          continue;
        }
        kernel(a + h * length, b, panel, length, edge, panel, T{0}, ahead, ahead_stride);
        for (std::int64_t r = 0; r < own; ++r) {
          for (std::int64_t c = 0; c < columns; ++c) {
            T& value = to[r * stride_ + c];
            value = beta == 0 ? edge[r * panel + c] : edge[r * panel + c] + beta * value;
          }
        }
      }
    }
  }

  const Tokens& tokens_;
  const double* weights_;
  T beta_;
  T* out_;
  std::int64_t stride_, height_, width_, length_;
  std::int64_t rows_, columns_;  // of a block
  std::int64_t down_, across_;   // blocks
};

template <typename T>
void combine_tokens_in(const Tokens& tokens, const double* weights, double beta, const Tensor& out,
                       int threads) {
  if (out.numel() == 0) {
    return;
  }
  const std::int64_t length = tokens.blocks() * tokens.per_block();
  // a second thread pays for its start from some ten microseconds on
  const std::int64_t work = length * out.numel();
  threads = static_cast<int>(std::clamp<std::int64_t>(work >> 19, 1, std::max(threads, 1)));
  const Sum<T> sum(tokens, weights, beta, out, threads);
  const std::int64_t count = sum.count();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t block = 0; block < count; ++block) {
    sum.add(block);
  }
}

}  // namespace

void combine_tokens(Tokens tokens, const double* weights, double beta, Tensor out, int threads) {
  if (out.stride(1) != 1) {
    std::swap(tokens.left, tokens.right);
    std::swap(out.shape[0], out.shape[1]);
    std::swap(out.strides[0], out.strides[1]);
  }
  if (out.dtype == Dtype::float64) {
    combine_tokens_in<double>(tokens, weights, beta, out, threads);
  } else {
    combine_tokens_in<float>(tokens, weights, beta, out, threads);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
