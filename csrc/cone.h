// Non-negative least squares on a Gramian. As dense.h: float64, for the host and the device, a team
// of threads for a problem.
#pragma once

#include "dense.h"

#ifdef GRADSURGERY_ISA
namespace gradsurgery::GRADSURGERY_ISA::dense {
#else
namespace gradsurgery::dense {
#endif

// The projection of a vector on the cone of rows g_i: x >= 0 that minimizes xᵀ K x / 2 - bᵀ x.
//
// Rows are made unit first. Of the sets of rows that may have x > 0, each one tried costs a
// Cholesky factorization. Block principal pivoting (Júdice and Pires 1994, Kim and Park 2011)
// exchanges all rows of the wrong sign at once and needs a handful of sets; if the number of wrong
// signs does not fall, Lawson and Hanson's way (1974), one row at a time from none, always arrives.
template <typename Team>
struct Cone {
  const double* gram;  // [m, m]
  std::int64_t m;
  double rtol;   // a row nearer than this to the span of others is not added to them
  double noise;  // rounding of the Gramian's entries, for unit rows
  Team team;

  double* factor;          // [m, ld]
  double* scale;           // [m], 1 / norm, 0 for a zero row
  double* target;          // [m], b of unit rows, the largest 1
  double* x;               // [m], of unit rows
  double* z;               // [m], of the rows of the set
  double* gradient;        // [m], target - K x
  std::int64_t* at;        // [m], the rows of the set
  std::int64_t* standing;  // [m], 1 in the set, 0 out of it, -1 kept out

  static GRADSURGERY_HOST_DEVICE std::int64_t workspace(std::int64_t m) {
    return m * (m | 1) + 7 * m;
  }

  GRADSURGERY_HOST_DEVICE Cone(const double* gram, std::int64_t m, double rtol, double noise,
                               double* work, Team team)
      : gram(gram), m(m), rtol(rtol), noise(noise), team(team), factor(work) {
    scale = factor + m * ld();
    target = scale + m;
    x = target + m;
    z = x + m;
    gradient = z + m;
    at = reinterpret_cast<std::int64_t*>(gradient + m);
    standing = at + m;
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      scale[i] = gram[i * m + i] > 0 ? 1 / std::sqrt(gram[i * m + i]) : 0;
    }
    team.sync();
  }

  // an odd number: columns of a power of two would share a few sets of a cache
  GRADSURGERY_HOST_DEVICE std::int64_t ld() const { return m | 1; }

  // How large a gradient may be by rounding alone.
  GRADSURGERY_HOST_DEVICE double tolerance() const { return noise * (1 + sum()); }

  // Of the |x_i|, of unit rows.
  GRADSURGERY_HOST_DEVICE double sum() const {
    double total = 0;
    for (std::int64_t i = 0; i < m; ++i) {
      total += std::fabs(x[i]);
    }
    return total;
  }

  // x [m] from b [m]; returns by how much an optimality condition is missed, for unit rows and the
  // largest b_i 1.
  GRADSURGERY_HOST_DEVICE double solve(const double* b, double* out) {
    double largest = 0;
    for (std::int64_t i = 0; i < m; ++i) {
      largest = b[i] * scale[i] > largest ? b[i] * scale[i] : largest;
    }
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      target[i] = largest > 0 ? b[i] * scale[i] / largest : 0;
      standing[i] = target[i] > 0;
    }
    team.sync();
    if (!exchange()) {
      add_one_by_one();
    }
    double missed = 0;
    for (std::int64_t i = 0; i < m; ++i) {
      const double size = standing[i] == 1 ? std::fabs(gradient[i])
                          : scale[i] > 0   ? gradient[i]
                                           : 0;
      missed = size > missed ? size : missed;
    }
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      out[i] = x[i] > 0 ? x[i] * scale[i] * largest : 0;
    }
    team.sync();
    return missed;
  }

 private:
  GRADSURGERY_HOST_DEVICE double entry(std::int64_t i, std::int64_t j) const {
    return gram[i * m + j] * (scale[i] * scale[j]);
  }

  // Lists the set and factorizes it; rows that depend on others of it leave. Returns its size.
  GRADSURGERY_HOST_DEVICE std::int64_t factorize() {
    for (;;) {
      std::int64_t k = 0;
      for (std::int64_t i = 0; i < m; ++i) {
        if (standing[i] == 1) {
          if (team.thread() == 0) {
            at[k] = i;
          }
          ++k;
        }
      }
      team.sync();
      for (std::int64_t i = team.row(); i < k; i += team.rows()) {
        for (std::int64_t j = team.lane(); j <= i; j += team.lanes()) {
          factor[i * ld() + j] = i == j ? 1 : entry(at[i], at[j]);
        }
      }
      team.sync();
      if (ordered_cholesky(factor, k, ld(), rtol, k, team) == k) {
        return k;
      }
      for (std::int64_t i = team.thread(); i < k; i += team.threads()) {
        standing[at[i]] = factor[i * ld() + i] > 0;
      }
      team.sync();
    }
  }

  // z = K⁻¹ of what `from` holds for the rows of the set
  GRADSURGERY_HOST_DEVICE void solve_set(const double* from, std::int64_t k) {
    for (std::int64_t i = team.thread(); i < k; i += team.threads()) {
      z[i] = from[at[i]];
    }
    team.sync();
    solve_ordered(factor, z, k, ld(), true, team);
  }

  GRADSURGERY_HOST_DEVICE void find_gradient(std::int64_t k) {
    // a thread keeps to its columns
    const std::int64_t thread = team.thread(), threads = team.threads();
    for (std::int64_t j = thread; j < m; j += threads) {
      gradient[j] = 0;
    }
    for (std::int64_t i = 0; i < k; ++i) {
      const double* row = gram + at[i] * m;
      const double factor = x[at[i]] * scale[at[i]];
      double* __restrict__ sum = gradient;
      for (std::int64_t j = thread; j < m; j += threads) {
        sum[j] += factor * row[j];
      }
    }
    for (std::int64_t j = thread; j < m; j += threads) {
      gradient[j] = target[j] - scale[j] * gradient[j];
    }
    team.sync();
  }

  // x = z on the set, 0 elsewhere
  GRADSURGERY_HOST_DEVICE void accept(std::int64_t k) {
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      x[i] = 0;
    }
    team.sync();
    add(k);
  }

  GRADSURGERY_HOST_DEVICE void add(std::int64_t k) {
    for (std::int64_t i = team.thread(); i < k; i += team.threads()) {
      x[at[i]] += z[i];
    }
    team.sync();
    find_gradient(k);
  }

  // What is left of the gradient on the set, solved for too.
  GRADSURGERY_HOST_DEVICE void correct(std::int64_t k) {
    solve_set(gradient, k);
    add(k);
  }

  GRADSURGERY_HOST_DEVICE bool exchange() {
    std::int64_t fewest = m + 1, patience = 3;
    for (int round = 0; round < 100; ++round) {
      const std::int64_t k = factorize();
      solve_set(target, k);
      accept(k);
      const double most = tolerance();
      std::int64_t wrong = 0;
      for (std::int64_t i = 0; i < m; ++i) {
        wrong += standing[i] == 1 ? x[i] < 0 : scale[i] > 0 && gradient[i] > most;
      }
      if (wrong == 0) {
        team.sync();  // all have counted
        correct(k);
        return true;
      }
      if (wrong < fewest) {
        fewest = wrong;
        patience = 3;
      } else if (patience-- == 0) {
        return false;
      }
      team.sync();  // all have counted
      for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
        standing[i] = standing[i] == 1 ? x[i] >= 0 : scale[i] > 0 && gradient[i] > most;
      }
      team.sync();
    }
    return false;
  }

  GRADSURGERY_HOST_DEVICE void add_one_by_one() {
    const std::int64_t thread = team.thread(), threads = team.threads();
    for (std::int64_t i = thread; i < m; i += threads) {
      standing[i] = scale[i] > 0 ? 0 : -1;
      x[i] = 0;
      gradient[i] = target[i];
    }
    team.sync();
    std::int64_t k = 0;
    for (std::int64_t round = 0; round < 10 * m; ++round) {
      std::int64_t next = -1;
      double steepest = tolerance();
      for (std::int64_t i = 0; i < m; ++i) {
        if (standing[i] == 0 && gradient[i] > steepest) {
          next = i;
          steepest = gradient[i];
        }
      }
      team.sync();  // all have chosen
      if (next < 0) {
        return;
      }
      if (!append(next, k)) {
        k = replace(next, k);
        if (k == 0) {
          return;  // no minimum: x may grow without end
        }
        accept(k);
        correct(k);
        continue;
      }
      ++k;
      solve_set(target, k);
      if (!(z[k - 1] > 0)) {  // by rounding
        team.sync();
        --k;
        if (thread == 0) {
          standing[next] = -1;
        }
        team.sync();
        continue;
      }
      k = retreat(k);
      accept(k);
      correct(k);
      for (std::int64_t i = thread; i < m; i += threads) {
        standing[i] = standing[i] < 0 && scale[i] > 0 ? 0 : standing[i];
      }
      team.sync();
    }
  }

  // Along a row that depends on the set, the gradient is the same all the way: as far as the first
  // row of the set allows, which then leaves in its favor. Returns the size of the set, or 0 if
  // none is in the way.
  GRADSURGERY_HOST_DEVICE std::int64_t replace(std::int64_t next, std::int64_t k) {
    for (std::int64_t i = team.thread(); i < k; i += team.threads()) {
      z[i] = entry(next, at[i]);
    }
    team.sync();
    solve_ordered(factor, z, k, ld(), true, team);  // next = the sum of z_i of the set's rows
    std::int64_t out = -1;
    double length = 0;
    for (std::int64_t i = 0; i < k; ++i) {
      if (z[i] > 1e-12 && (out < 0 || x[at[i]] < length * z[i])) {
        out = i;
        length = x[at[i]] / z[i];
      }
    }
    if (out < 0) {
      return 0;
    }
    team.sync();  // all have found it
    for (std::int64_t i = team.thread(); i < k; i += team.threads()) {
      const std::int64_t row = at[i];
      const double value = x[row] - length * z[i];
      x[row] = i == out || value < 0 ? 0 : value;
      standing[row] = x[row] > 0;
    }
    if (team.thread() == 0) {
      x[next] = length;
      standing[next] = 1;
    }
    team.sync();
    k = factorize();
    solve_set(target, k);
    return retreat(k);
  }

  // A row more in the factor; false if it depends on those there.
  GRADSURGERY_HOST_DEVICE bool append(std::int64_t next, std::int64_t k) {
    double* row = factor + k * ld();
    for (std::int64_t i = team.thread(); i < k; i += team.threads()) {
      row[i] = entry(next, at[i]);
    }
    team.sync();
    solve_ordered(factor, row, k, ld(), false, team);
    double distance = 1;
    for (std::int64_t i = 0; i < k; ++i) {
      distance -= row[i] * row[i];
    }
    if (!(distance > rtol * rtol)) {
      return false;
    }
    for (std::int64_t i = team.thread(); i < k; i += team.threads()) {
      factor[i * ld() + k] = row[i];
    }
    if (team.thread() == 0) {
      row[k] = std::sqrt(distance);
      at[k] = next;
      standing[next] = 1;
    }
    team.sync();
    return true;
  }

  // From x towards z as far as all stay positive; the rows that reach zero leave the set, until z
  // is positive. Returns the size of the set.
  GRADSURGERY_HOST_DEVICE std::int64_t retreat(std::int64_t k) {
    for (;;) {
      double share = 1;
      for (std::int64_t i = 0; i < k; ++i) {
        if (!(z[i] > 0)) {
          const double most = x[at[i]] / (x[at[i]] - z[i]);
          share = most < share ? most : share;
        }
      }
      bool positive = true;
      for (std::int64_t i = 0; i < k; ++i) {
        positive = positive && z[i] > 0;
      }
      if (positive) {
        return k;
      }
      team.sync();  // all have the share
      for (std::int64_t i = team.thread(); i < k; i += team.threads()) {
        const std::int64_t row = at[i];
        const bool leaves = !(z[i] > 0) && x[row] <= share * (x[row] - z[i]) * (1 + 1e-12);
        x[row] = leaves ? 0 : x[row] + share * (z[i] - x[row]);
        standing[row] = leaves ? 0 : 1;
      }
      team.sync();
      k = factorize();
      solve_set(target, k);
    }
  }
};

#ifdef GRADSURGERY_ISA
}  // namespace gradsurgery::GRADSURGERY_ISA::dense
#else
}  // namespace gradsurgery::dense
#endif
