// Weight gradients as the tokens they are sums over.
#pragma once

#include "tensor.h"

namespace gradsurgery {

// n blocks: G_i = sum_t left_it right_itᵀ; left [n, T, a], right [n, T, b].
struct Tokens {
  Tensor left, right;

  std::int64_t blocks() const { return left.size(0); }
  std::int64_t per_block() const { return left.size(1); }
};

}  // namespace gradsurgery
