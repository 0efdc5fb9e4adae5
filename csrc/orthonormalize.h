// J = Rᵀ Q: orthonormal rows, batched.
#pragma once

#include "cpu.h"
#include "rows.h"

namespace gradsurgery {

// rows and q [b, m, n], factor [b, m, m] float64 (R, upper), norms [b, m] float64, rank [b] int64.
GRADSURGERY_DECLARE(void orthonormalize(const Tensor& rows, const Tensor& q, double* factor,
                                        double* norms, std::int64_t* rank, double rtol,
                                        int threads))

}  // namespace gradsurgery
