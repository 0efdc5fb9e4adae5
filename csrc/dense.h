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

// One copy per instruction set: of an inline function that several objects define, the linker would
// keep the slowest.
#ifdef GRADSURGERY_ISA
namespace gradsurgery::GRADSURGERY_ISA::dense {
#else
namespace gradsurgery::dense {
#endif

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

// values[0 .. n) -= sum over t of factors[t] * rows[t * stride + (0 .. n)]
template <int count>
GRADSURGERY_HOST_DEVICE inline void subtract(double* __restrict__ values,
                                             const double* __restrict__ rows, std::int64_t stride,
                                             const double* __restrict__ factors, std::int64_t n,
                                             std::int64_t lane, std::int64_t lanes) {
  for (std::int64_t l = lane; l < n; l += lanes) {
    double value = values[l];
    for (int t = 0; t < count; ++t) {
      value -= factors[t] * rows[t * stride + l];
    }
    values[l] = value;
  }
}

// Cholesky in the rows' own order of a Gramian [m, m] of unit or zero rows, ld values from one row
// to the next, in place: L in the lower triangle, Lᵀ in the upper one. A row not farther than rtol
// from the span of those before has diagonal and column zero, and so has one after `most` that are,
// as many as there are dimensions: it seems to be by rounding. Returns how many are farther.
template <typename Team = Alone>
GRADSURGERY_HOST_DEVICE inline std::int64_t ordered_cholesky(double* gram, std::int64_t m,
                                                             std::int64_t ld, double rtol,
                                                             std::int64_t most, Team team = {}) {
  constexpr std::int64_t width = 8;  // columns of a panel: a value beyond it is read once for each
  std::int64_t rank = 0;
  for (std::int64_t begin = 0; begin < m; begin += width) {
    const std::int64_t end = begin + width < m ? begin + width : m;
    for (std::int64_t j = begin; j < end; ++j) {
      const double distance = gram[j * ld + j];
      const bool taken = distance > rtol * rtol && rank < most;
      const double root = taken ? std::sqrt(distance) : 0;
      rank += taken;
      team.sync();                     // all have read the diagonal
      double* column = gram + j * ld;  // in the upper triangle: in the order of memory
      for (std::int64_t i = j + team.thread(); i < m; i += team.threads()) {
        column[i] = i == j ? root : taken ? gram[i * ld + j] / root : 0;
        gram[i * ld + j] = column[i];
      }
      team.sync();
      for (std::int64_t i = j + 1 + team.thread(); taken && i < m; i += team.threads()) {
        double* row = gram + i * ld;
        for (std::int64_t l = j + 1; l < end && l <= i; ++l) {
          row[l] -= row[j] * column[l];
        }
      }
      team.sync();
    }
    for (std::int64_t i = end + team.row(); i < m; i += team.rows()) {
      double* row = gram + i * ld;
      subtract<width>(row + end, gram + begin * ld + end, ld, row + begin, i + 1 - end, team.lane(),
                      team.lanes());
    }
    team.sync();
  }
  return rank;
}

// Solves L x = b, or L Lᵀ x = b, in place, for a factor [k, k] from ordered_cholesky, all rows
// taken.
template <typename Team = Alone>
GRADSURGERY_HOST_DEVICE inline void solve_ordered(const double* factor, double* b, std::int64_t k,
                                                  std::int64_t ld, bool both, Team team = {}) {
  const std::int64_t thread = team.thread(), threads = team.threads();
  for (std::int64_t step = 0; step < (both ? 2 : 1) * k; ++step) {
    const bool down = step < k;  // L, then Lᵀ
    const std::int64_t j = down ? step : 2 * k - 1 - step;
    const double* line = factor + j * ld;  // right of the diagonal a column of L, left of it a row
    const double x = b[j] / line[j];
    team.sync();  // all have read b[j]
    const std::int64_t first = down ? j + 1 : 0, last = down ? k : j;
    for (std::int64_t i = first + thread; i < last; i += threads) {
      b[i] -= line[i] * x;
    }
    if (thread == 0) {
      b[j] = x;
    }
    team.sync();
  }
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

// Eigenvalues [m], ascending, and eigenvectors, the rows of vectors [m, m], of a symmetric matrix
// [m, m], which is overwritten: Jacobi's rotations, of m / 2 pairs at a time in the order of a
// round robin. Relative precision holds for the small eigenvalues too if rows are of one norm.
// work: 3 m + 1 values.
template <typename Team = Alone>
GRADSURGERY_HOST_DEVICE inline void eigen(double* matrix, double* values, double* vectors,
                                          double* work, std::int64_t m, Team team = {}) {
  const std::int64_t thread = team.thread(), threads = team.threads();
  const std::int64_t seats = m + m % 2, pairs = seats / 2;  // with m odd, one sits out
  double* cosines = work;
  double* sines = work + pairs;
  double* found = work + seats;  // [1]
  for (std::int64_t i = thread; i < m * m; i += threads) {
    vectors[i] = i / m == i % m;
  }
  const auto first = [&](std::int64_t pair, std::int64_t round) {
    return pair == 0 ? seats - 1 : (round + pair) % (seats - 1);
  };
  const auto second = [&](std::int64_t pair, std::int64_t round) {
    return pair == 0 ? round : (round + seats - 1 - pair) % (seats - 1);
  };
  for (int sweep = 0; sweep < 40; ++sweep) {
    team.sync();
    if (thread == 0) {
      *found = 0;
    }
    team.sync();
    for (std::int64_t round = 0; round + 1 < seats; ++round) {
      for (std::int64_t k = thread; k < pairs; k += threads) {
        const std::int64_t p = first(k, round), q = second(k, round);
        cosines[k] = 1;
        sines[k] = 0;
        if (p < m && q < m) {
          const double a = matrix[p * m + p], b = matrix[q * m + q], c = matrix[p * m + q];
          if (std::fabs(c) > 1e-16 * std::sqrt(std::fabs(a * b)) && std::fabs(c) > 1e-300) {
            const double theta = (b - a) / (2 * c);
            const double t = (theta < 0 ? -1 : 1) / (std::fabs(theta) + std::hypot(theta, 1.0));
            cosines[k] = 1 / std::sqrt(1 + t * t);
            sines[k] = t * cosines[k];
            *found = 1;
          }
        }
      }
      team.sync();
      for (std::int64_t k = team.row(); k < pairs; k += team.rows()) {  // rows
        const std::int64_t p = first(k, round), q = second(k, round);
        if (p < m && q < m && sines[k] != 0) {
          for (std::int64_t l = team.lane(); l < m; l += team.lanes()) {
            const double x = matrix[p * m + l], y = matrix[q * m + l];
            matrix[p * m + l] = cosines[k] * x - sines[k] * y;
            matrix[q * m + l] = sines[k] * x + cosines[k] * y;
            const double u = vectors[p * m + l], v = vectors[q * m + l];
            vectors[p * m + l] = cosines[k] * u - sines[k] * v;
            vectors[q * m + l] = sines[k] * u + cosines[k] * v;
          }
        }
      }
      team.sync();
      for (std::int64_t l = team.row(); l < m; l += team.rows()) {  // columns
        double* row = matrix + l * m;
        for (std::int64_t k = team.lane(); k < pairs; k += team.lanes()) {
          const std::int64_t p = first(k, round), q = second(k, round);
          if (p < m && q < m && sines[k] != 0) {
            const double x = row[p], y = row[q];
            row[p] = cosines[k] * x - sines[k] * y;
            row[q] = sines[k] * x + cosines[k] * y;
          }
        }
      }
      team.sync();
    }
    if (*found == 0) {
      break;
    }
  }
  // in order, by how many are smaller; into the matrix, which is done with
  for (std::int64_t i = thread; i < m; i += threads) {
    values[i] = matrix[i * m + i];
  }
  team.sync();
  for (std::int64_t i = team.row(); i < m; i += team.rows()) {
    std::int64_t place = 0;
    for (std::int64_t j = 0; j < m; ++j) {
      place += values[j] < values[i] || (values[j] == values[i] && j < i);
    }
    for (std::int64_t l = team.lane(); l < m; l += team.lanes()) {
      matrix[place * m + l] = vectors[i * m + l];
    }
    if (team.lane() == 0) {
      work[place] = values[i];
    }
  }
  team.sync();
  for (std::int64_t i = thread; i < m * m; i += threads) {
    vectors[i] = matrix[i];
  }
  for (std::int64_t i = thread; i < m; i += threads) {
    values[i] = work[i];
  }
  team.sync();
}

#ifdef GRADSURGERY_ISA
}  // namespace gradsurgery::GRADSURGERY_ISA::dense
#else
}  // namespace gradsurgery::dense
#endif
