// The Gramian of per-sample weight gradients, from the tokens they are sums over.
#pragma once

#include "cpu.h"
#include "tokens.h"

namespace gradsurgery {

// out[i, j] += <G_i, G'_j> = sum_tu (left_it . left'_ju) (right_it . right'_ju), out [n, n'];
// `second` null: of the first with one another, `out` being symmetric. Both float32 or both
// float64, which is also what the inner products are summed in; their products are summed in
// float64. Without `second`, out[i, i] is NaN where float32 lost a token that may be large.
GRADSURGERY_DECLARE(void token_gramian(const Tokens& first, const Tokens* second, double* out,
                                       int threads))

}  // namespace gradsurgery
