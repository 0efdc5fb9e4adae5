// The Gramian of per-sample weight gradients, from the tokens they are sums over.
#pragma once

#include "cpu.h"

namespace gradsurgery {

// Blocks of tokens: G_i = sum_t left_it right_itᵀ; left [n, T, a], right [n, T, b].
struct Tokens {
  Tensor left, right;

  std::int64_t blocks() const { return left.size(0); }
  std::int64_t per_block() const { return left.size(1); }
};

// out[i, j] += <G_i, G'_j> = sum_tu (left_it . left'_ju) (right_it . right'_ju), out [n, n'];
// `second` null: of the first with one another, `out` being symmetric. Both float32 or both
// float64, which is also what the inner products are summed in; their products are summed in
// float64.
GRADSURGERY_DECLARE(void token_pairs(const Tokens& first, const Tokens* second, double* out,
                                     int threads))

}  // namespace gradsurgery
