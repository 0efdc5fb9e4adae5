// The weighted sum of per-sample weight gradients, none of which is formed.
#pragma once

#include "cpu.h"
#include "tokens.h"

namespace gradsurgery {

// out [a, b] = beta out + sum_i weights_i sum_t left_it right_itᵀ, in the tokens' dtype, float32 or
// float64. What is in `out` is not read where beta is 0. One of its strides is 1.
GRADSURGERY_DECLARE(void combine_tokens(Tokens tokens, const double* weights, double beta,
                                        Tensor out, int threads))

}  // namespace gradsurgery
