// The Gramian of per-sample weight gradients, each formed tile by tile and dropped.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "cpu.h"
#include "tokens.h"

namespace gradsurgery {

// Rows that are sums of blocks' planes [a, b].
struct Planes {
  struct Part {
    Tokens tokens;
    const std::int64_t* rows;  // [n] the row of each block
  };

  std::vector<Part> parts;
  std::int64_t count;          // rows
  std::optional<Tensor> kept;  // [a, b], one more row, which exists
  std::int64_t height, width;
  Dtype dtype;  // float32 or float64

  // the same rows, of transposed planes
  void transpose() {
    for (Part& part : parts) {
      std::swap(part.tokens.left, part.tokens.right);
    }
    if (kept) {
      std::swap(kept->shape[0], kept->shape[1]);
      std::swap(kept->strides[0], kept->strides[1]);
    }
    std::swap(height, width);
  }

  std::int64_t rows() const { return count + (kept ? 1 : 0); }
};

// out = the inner products of the rows, [rows, rows]. Planes are formed in the dtype of their
// tokens and multiplied as `gramian` does.
GRADSURGERY_DECLARE(void formed_gramian(Planes planes, double* out, int threads))

}  // namespace gradsurgery
