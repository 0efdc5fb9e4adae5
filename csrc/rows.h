// A Jacobian as the CPU kernels see it: m rows over blocks of columns, each row of a block an
// address and a stride.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace gradsurgery {

struct Row {
  char* data;
  std::int64_t stride;  // elements
};

struct Block {
  std::int64_t columns;
  std::vector<Row> rows;
};

struct Rows {
  Dtype dtype;
  std::int64_t m;  // rows
  std::int64_t n;  // columns of all blocks
  std::vector<Block> blocks;
};

// The rows of all sources, in order; a source is the blocks [m_s, n_k] of some rows, or those [n_k]
// of one.
Rows make_rows(const std::vector<std::vector<Tensor>>& sources, const char* name);

// Calls f(block, column, length) for the slices of at most `width` columns in [begin, end), where
// columns are counted over all blocks.
template <typename Function>
void for_slices(const Rows& rows, std::int64_t begin, std::int64_t end, std::int64_t width,
                Function&& f) {
  std::int64_t first = 0;
  for (const Block& block : rows.blocks) {
    std::int64_t column = std::max(begin - first, std::int64_t{0});
    std::int64_t stop = std::min(end - first, block.columns);
    for (; column < stop; column += width) {
      f(block, column, std::min(width, stop - column));
    }
    first += block.columns;
  }
}

// The columns of thread t of `threads`: equal shares in whole vectors, the same for every call.
inline std::int64_t share(std::int64_t n, int t, int threads) {
  constexpr std::int64_t grain = 64;
  return std::min(n, (n / grain * t / threads) * grain + (t == threads ? n : 0));
}

// A second thread pays for its start from some 64 thousand values on.
inline int threads_for(const Rows& rows, int threads) {
  std::int64_t values = rows.m * rows.n;
  return static_cast<int>(std::clamp<std::int64_t>(values >> 16, 1, std::max(threads, 1)));
}

}  // namespace gradsurgery
