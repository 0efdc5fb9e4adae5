// Float64 algorithms on matrices of a few rows, for the host and for the device. A team of threads
// works on one matrix; it enters with the operands visible to all, and leaves with the results so.
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

// One thread. A block of GPU threads is a larger team: values of a row go to lanes, rows to
// `row()`.
struct Alone {
  GRADSURGERY_HOST_DEVICE std::int64_t row() const { return 0; }
  GRADSURGERY_HOST_DEVICE std::int64_t rows() const { return 1; }
  GRADSURGERY_HOST_DEVICE std::int64_t lane() const { return 0; }
  GRADSURGERY_HOST_DEVICE std::int64_t lanes() const { return 1; }
  GRADSURGERY_HOST_DEVICE std::int64_t thread() const { return 0; }
  GRADSURGERY_HOST_DEVICE std::int64_t threads() const { return 1; }
  GRADSURGERY_HOST_DEVICE void sync() const {}
};

// Divides a Gramian [m, m] by the norms of its rows, in place, and returns 1 / norm, or 0 for a
// zero row, in scale [m].
template <typename Team = Alone>
GRADSURGERY_HOST_DEVICE inline void normalize(double* gram, double* scale, std::int64_t m,
                                              Team team = {}) {
  for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
    scale[i] = gram[i * m + i] > 0 ? 1 / std::sqrt(gram[i * m + i]) : 0;
  }
  team.sync();
  for (std::int64_t i = team.row(); i < m; i += team.rows()) {
    for (std::int64_t j = team.lane(); j < m; j += team.lanes()) {
      gram[i * m + j] *= scale[i] * scale[j];
    }
  }
  team.sync();
}

// Cholesky with pivoting of a Gramian [m, m] of unit or zero rows, in place: P K Pᵀ ≈ L Lᵀ with L
// in the lower triangle and order [m] the row each place of P came from. Stops where no row is
// farther than rtol from the span of those taken; returns how many were. margin: the squared
// distance of the last row taken or, if some are left, of the farthest of these; zero rows do not
// count.
template <typename Team = Alone>
GRADSURGERY_HOST_DEVICE inline std::int64_t pivoted_cholesky(double* gram, std::int64_t* order,
                                                             double* column, std::int64_t m,
                                                             double rtol, double* margin,
                                                             Team team = {}) {
  const std::int64_t thread = team.thread(), threads = team.threads();
  double smallest = 1;
  for (std::int64_t i = thread; i < m; i += threads) {
    order[i] = i;
    gram[i * m + i] = gram[i * m + i] > 0 ? gram[i * m + i] : -1;  // a zero row is never taken
  }
  team.sync();
  std::int64_t j = 0;
  for (; j < m; ++j) {
    std::int64_t pivot = j;
    for (std::int64_t i = j + 1; i < m; ++i) {
      pivot = gram[i * m + i] > gram[pivot * m + pivot] ? i : pivot;
    }
    const double distance = gram[pivot * m + pivot];
    if (distance > -0.5) {
      smallest = distance < 0 ? 0 : distance < smallest ? distance : smallest;
    }
    if (!(distance > rtol * rtol)) {
      break;
    }
    team.sync();  // all have found the pivot
    if (pivot != j) {
      // of a symmetric matrix of which the lower triangle is kept
      for (std::int64_t i = thread; i < j; i += threads) {
        swap(gram[j * m + i], gram[pivot * m + i]);
      }
      for (std::int64_t i = j + 1 + thread; i < pivot; i += threads) {
        swap(gram[i * m + j], gram[pivot * m + i]);
      }
      for (std::int64_t i = pivot + 1 + thread; i < m; i += threads) {
        swap(gram[i * m + j], gram[i * m + pivot]);
      }
      if (thread == 0) {
        swap(gram[j * m + j], gram[pivot * m + pivot]);
        std::int64_t from = order[j];
        order[j] = order[pivot];
        order[pivot] = from;
      }
      team.sync();
    }
    const double root = std::sqrt(distance);
    if (thread == 0) {
      gram[j * m + j] = root;
    }
    for (std::int64_t i = j + 1 + thread; i < m; i += threads) {
      gram[i * m + j] /= root;
      column[i] = gram[i * m + j];
    }
    team.sync();
    for (std::int64_t i = j + 1 + team.row(); i < m; i += team.rows()) {
      double* row = gram + i * m;
      for (std::int64_t l = j + 1 + team.lane(); l <= i; l += team.lanes()) {
        row[l] -= column[i] * column[l];
      }
    }
    team.sync();
  }
  if (thread == 0) {
    *margin = smallest;
  }
  team.sync();
  return j;
}

// Solves L Lᵀ x = b in place on the first `rank` entries.
template <typename Team = Alone>
GRADSURGERY_HOST_DEVICE inline void solve(const double* factor, double* b, std::int64_t m,
                                          std::int64_t rank, Team team = {}) {
  const std::int64_t thread = team.thread(), threads = team.threads();
  for (std::int64_t j = 0; j < rank; ++j) {
    const double x = b[j] / factor[j * m + j];
    team.sync();  // all have read b[j]
    for (std::int64_t i = j + thread; i < rank; i += threads) {
      b[i] = i == j ? x : b[i] - factor[i * m + j] * x;
    }
    team.sync();
  }
  for (std::int64_t i = rank - 1; i >= 0; --i) {
    const double x = b[i] / factor[i * m + i];
    team.sync();
    for (std::int64_t j = thread; j <= i; j += threads) {
      b[j] = j == i ? x : b[j] - factor[i * m + j] * x;
    }
    team.sync();
  }
}

// Cholesky in the rows' own order of a Gramian [m, m] of unit or zero rows, in place, lower
// triangle; the upper one is overwritten. A row not farther than rtol from the span of those before
// has diagonal and column zero. Returns how many are farther.
template <typename Team = Alone>
GRADSURGERY_HOST_DEVICE inline std::int64_t ordered_cholesky(double* gram, std::int64_t m,
                                                             double rtol, Team team = {}) {
  std::int64_t rank = 0;
  for (std::int64_t j = 0; j < m; ++j) {
    const double distance = gram[j * m + j];
    const bool taken = distance > rtol * rtol;
    const double root = taken ? std::sqrt(distance) : 0;
    rank += taken;
    team.sync();                    // all have read the diagonal
    double* column = gram + j * m;  // Lᵀ in the upper triangle: column j in the order of memory
    for (std::int64_t i = j + team.thread(); i < m; i += team.threads()) {
      column[i] = i == j ? root : taken ? gram[i * m + j] / root : 0;
      gram[i * m + j] = column[i];
    }
    team.sync();
    for (std::int64_t i = j + 1 + team.row(); taken && i < m; i += team.rows()) {
      double* row = gram + i * m;
      for (std::int64_t l = j + 1 + team.lane(); l <= i; l += team.lanes()) {
        row[l] -= row[j] * column[l];
      }
    }
    team.sync();
  }
  return rank;
}

// The inverse of a lower triangle from ordered_cholesky, zero rows for zero diagonals.
template <typename Team = Alone>
GRADSURGERY_HOST_DEVICE inline void invert_lower(const double* factor, double* inverse,
                                                 std::int64_t m, Team team = {}) {
  const std::int64_t thread = team.thread(), threads = team.threads();
  for (std::int64_t i = 0; i < m; ++i) {
    // a thread keeps to its columns, so that it waits for no other
    for (std::int64_t j = thread; j < m; j += threads) inverse[i * m + j] = 0;
    const double diagonal = factor[i * m + i];
    if (diagonal > 0) {
      for (std::int64_t l = 0; l < i; ++l) {
        const double value = factor[i * m + l] / diagonal;
        for (std::int64_t j = thread; j <= l; j += threads) {
          inverse[i * m + j] -= value * inverse[l * m + j];
        }
      }
      if (i % threads == thread) {
        inverse[i * m + i] = 1 / diagonal;
      }
    }
  }
  team.sync();
}

}  // namespace gradsurgery::dense
