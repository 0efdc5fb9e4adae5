// Solves on Gramians, batched, float64: the problems of solves.h, on the host here.
#pragma once

#include "cpu.h"
#include "tensor.h"

namespace gradsurgery {

// K c = k for every matrix of a batch: gramian [b, m, m], products and coefficients [b, m], rank
// and margin [b].
GRADSURGERY_DECLARE(void projection_weights(const double* gramian, const double* products,
                                            double* coefficients, std::int64_t* rank,
                                            double* margin, std::int64_t batch, std::int64_t m,
                                            double rtol, int threads))

// The least of xᵀ K x / 2 - bᵀ x over x >= 0: gramian [b, m, m], products and coefficients
// [b, vectors, m], residual [b, vectors].
GRADSURGERY_DECLARE(void cone_weights(const double* gramian, const double* products,
                                      double* coefficients, double* residual, std::int64_t batch,
                                      std::int64_t vectors, std::int64_t m, double rtol,
                                      double noise, int threads))

// A weighted sum of the rows, given [m] or null for the mean, projected on their dual cone, as
// weights [b, m].
GRADSURGERY_DECLARE(void dual_projection_weights(const double* gramian, const double* given,
                                                 double* weights, std::int64_t batch,
                                                 std::int64_t m, double rtol, double noise,
                                                 int threads))

// CAGrad's direction as weights [b, m].
GRADSURGERY_DECLARE(void conflict_averse_weights(const double* gramian, double* weights,
                                                 std::int64_t batch, std::int64_t m, double c,
                                                 double rtol, double noise, int threads))

// Whether no value is NaN or infinite: one thread, which need not wake others.
GRADSURGERY_DECLARE(bool all_finite(const double* values, std::int64_t count))

// Permutations of 0 .. m - 1 [b, m] from numbers in [0, 1) [b, m]: Fisher and Yates's shuffle.
GRADSURGERY_DECLARE(void shuffle(const float* draws, std::int64_t* order, std::int64_t batch,
                                 std::int64_t m))

// Rows corrected one by one, as coefficients [b, m, m] of the given rows; order [b, m, m], targets
// [b, m, m] or null.
GRADSURGERY_DECLARE(void deconflict_weights(const double* gramian, const std::int64_t* order,
                                            double* targets, double* coefficients,
                                            std::int64_t batch, std::int64_t m, double beta,
                                            int threads))

// K w = w^-power, weights [b, m].
GRADSURGERY_DECLARE(void bargaining_weights(const double* gramian, double* weights,
                                            std::int64_t batch, std::int64_t m, double power,
                                            double rtol, int threads))

// Eigenvalues [b, m], ascending, and eigenvectors, the rows of [b, m, m].
GRADSURGERY_DECLARE(void eigen(const double* gramian, double* values, double* vectors,
                               std::int64_t batch, std::int64_t m, int threads))

}  // namespace gradsurgery
