// Float64 algorithms on matrices of a few rows, for the host and for the device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GRADSURGERY_HOST_DEVICE __host__ __device__
#else
#define GRADSURGERY_HOST_DEVICE
#endif

namespace gradsurgery::dense {

GRADSURGERY_HOST_DEVICE inline void swap(double& a, double& b) {
  double c = a;
  a = b;
  b = c;
}

// Divides a Gramian [m, m] by the norms of its rows, in place, and returns 1 / norm, or 0 for a zero
// row, in scale [m].
GRADSURGERY_HOST_DEVICE inline void normalize(double* gram, double* scale, std::int64_t m) {
  for (std::int64_t i = 0; i < m; ++i) {
    scale[i] = gram[i * m + i] > 0 ? 1 / std::sqrt(gram[i * m + i]) : 0;
  }
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < m; ++j) {
      gram[i * m + j] *= scale[i] * scale[j];
    }
  }
}

// Cholesky with pivoting of a Gramian [m, m] of unit or zero rows, in place: P K Pᵀ ≈ L Lᵀ with L in
// the lower triangle and order [m] the row each place of P came from. Stops where no row is farther
// than rtol from the span of those taken; returns how many were. margin: the squared distance of the
// last row taken or, if some are left, of the farthest of these; zero rows do not count.
GRADSURGERY_HOST_DEVICE inline std::int64_t pivoted_cholesky(double* gram, std::int64_t* order,
                                                             double* column, std::int64_t m,
                                                             double rtol, double* margin) {
  *margin = 1;
  for (std::int64_t i = 0; i < m; ++i) {
    order[i] = i;
    gram[i * m + i] = gram[i * m + i] > 0 ? gram[i * m + i] : -1;  // a zero row is never taken
  }
  for (std::int64_t j = 0; j < m; ++j) {
    std::int64_t pivot = j;
    for (std::int64_t i = j + 1; i < m; ++i) {
      pivot = gram[i * m + i] > gram[pivot * m + pivot] ? i : pivot;
    }
    const double distance = gram[pivot * m + pivot];
    if (distance > -0.5) {
      *margin = distance < 0 ? 0 : distance < *margin ? distance : *margin;
    }
    if (!(distance > rtol * rtol)) {
      return j;
    }
    if (pivot != j) {
      // of a symmetric matrix of which the lower triangle is kept
      for (std::int64_t i = 0; i < j; ++i) swap(gram[j * m + i], gram[pivot * m + i]);
      for (std::int64_t i = j + 1; i < pivot; ++i) swap(gram[i * m + j], gram[pivot * m + i]);
      for (std::int64_t i = pivot + 1; i < m; ++i) swap(gram[i * m + j], gram[i * m + pivot]);
      swap(gram[j * m + j], gram[pivot * m + pivot]);
      std::int64_t from = order[j];
      order[j] = order[pivot];
      order[pivot] = from;
    }
    const double root = std::sqrt(distance);
    gram[j * m + j] = root;
    for (std::int64_t i = j + 1; i < m; ++i) {
      gram[i * m + j] /= root;
      column[i] = gram[i * m + j];
    }
    for (std::int64_t i = j + 1; i < m; ++i) {
      double* row = gram + i * m;
      for (std::int64_t l = j + 1; l <= i; ++l) {
        row[l] -= column[i] * column[l];
      }
    }
  }
  return m;
}

// Solves L Lᵀ x = b in place on the first `rank` entries.
GRADSURGERY_HOST_DEVICE inline void solve(const double* factor, double* b, std::int64_t m,
                                          std::int64_t rank) {
  for (std::int64_t i = 0; i < rank; ++i) {
    for (std::int64_t j = 0; j < i; ++j) b[i] -= factor[i * m + j] * b[j];
    b[i] /= factor[i * m + i];
  }
  for (std::int64_t i = rank - 1; i >= 0; --i) {
    b[i] /= factor[i * m + i];
    for (std::int64_t j = 0; j < i; ++j) b[j] -= factor[i * m + j] * b[i];
  }
}

// Cholesky in the rows' own order of a Gramian [m, m] of unit or zero rows, in place, lower triangle.
// A row not farther than rtol from the span of those before has diagonal and column zero. Returns
// how many are farther.
GRADSURGERY_HOST_DEVICE inline std::int64_t ordered_cholesky(double* gram, std::int64_t m, double rtol) {
  std::int64_t rank = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    double* row = gram + i * m;
    for (std::int64_t j = 0; j <= i; ++j) {
      const double* other = gram + j * m;
      double rest = row[j];
      for (std::int64_t l = 0; l < j; ++l) rest -= row[l] * other[l];
      if (j < i) {
        row[j] = other[j] > 0 ? rest / other[j] : 0;
      } else {
        row[i] = rest > rtol * rtol ? std::sqrt(rest) : 0;
        rank += row[i] > 0;
      }
    }
  }
  return rank;
}

// The inverse of a lower triangle from ordered_cholesky, zero rows for zero diagonals.
GRADSURGERY_HOST_DEVICE inline void invert_lower(const double* factor, double* inverse, std::int64_t m) {
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < m; ++j) inverse[i * m + j] = 0;
    const double diagonal = factor[i * m + i];
    if (diagonal > 0) {
      for (std::int64_t l = 0; l < i; ++l) {
        const double value = factor[i * m + l] / diagonal;
        for (std::int64_t j = 0; j <= l; ++j) inverse[i * m + j] -= value * inverse[l * m + j];
      }
      inverse[i * m + i] = 1 / diagonal;
    }
  }
}

}  // namespace gradsurgery::dense
