// Solves on Gramians, batched, float64; the algorithms are dense.h's.
#pragma once

#include "cpu.h"
#include "tensor.h"

namespace gradsurgery {

// K c = k for every matrix of a batch: gramian [b, m, m], products and coefficients [b, m], rank
// and margin [b].
GRADSURGERY_DECLARE(void projection_weights(const double* gramian, const double* products,
                                            double* coefficients, std::int64_t* rank,
                                            double* margin, std::int64_t batch, std::int64_t m,
                                            double rtol))

}  // namespace gradsurgery
