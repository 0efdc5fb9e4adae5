// Problems on matrices of a few rows, for the host and the device: each says how many there are,
// how many float64 it works in, and solves the one of an index with a team of threads.
#pragma once

#include "cone.h"
#include "conflict_averse.h"
#include "dense.h"

#ifdef GRADSURGERY_ISA
namespace gradsurgery::GRADSURGERY_ISA::dense {
#else
namespace gradsurgery::dense {
#endif

// K c = k on the rows that rtol leaves, by Cholesky with pivoting.
struct Projection {
  const double* gramian;   // [count, m, m]
  const double* products;  // [count, m]
  double* coefficients;    // [count, m]
  std::int64_t* rank;      // [count]
  double* margin;          // [count]
  std::int64_t count, m;
  double rtol;

  static GRADSURGERY_HOST_DEVICE std::int64_t workspace(std::int64_t m) { return m * m + 4 * m; }

  template <typename Team>
  GRADSURGERY_HOST_DEVICE void solve(std::int64_t b, double* work, Team team) const {
    double* gram = work;
    double* scale = gram + m * m;
    double* column = scale + m;
    double* solution = column + m;
    std::int64_t* order = reinterpret_cast<std::int64_t*>(solution + m);
    for (std::int64_t i = team.thread(); i < m * m; i += team.threads()) {
      gram[i] = gramian[b * m * m + i];
    }
    team.sync();
    normalize(gram, scale, m, team);
    const std::int64_t taken = pivoted_cholesky(gram, order, column, m, rtol, margin + b, team);
    for (std::int64_t i = team.thread(); i < taken; i += team.threads()) {
      solution[i] = products[b * m + order[i]] * scale[order[i]];
    }
    team.sync();
    dense::solve(gram, solution, m, taken, team);
    // order is a permutation: every coefficient is written once
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      coefficients[b * m + order[i]] = i < taken ? solution[i] * scale[order[i]] : 0;
    }
    if (team.thread() == 0) {
      rank[b] = taken;
    }
    team.sync();
  }
};

// Several vectors projected on the cone of one Gramian's rows.
struct ConeProjection {
  const double* gramian;   // [count / vectors, m, m]
  const double* products;  // [count, m]
  double* coefficients;    // [count, m]
  double* residual;        // [count]
  std::int64_t count, m, vectors;
  double rtol, noise;

  static GRADSURGERY_HOST_DEVICE std::int64_t workspace(std::int64_t m) {
    return Cone<Alone>::workspace(m);
  }

  template <typename Team>
  GRADSURGERY_HOST_DEVICE void solve(std::int64_t b, double* work, Team team) const {
    Cone<Team> cone(gramian + b / vectors * m * m, m, rtol, noise, work, team);
    const double missed = cone.solve(products + b * m, coefficients + b * m);
    if (team.thread() == 0) {
      residual[b] = missed;
    }
    team.sync();
  }
};

// A weighted sum of the rows projected on their dual cone, as weights of the rows.
struct DualProjection {
  const double* gramian;  // [count, m, m]
  const double* given;    // [m], weights of the sum; null for the mean
  double* weights;        // [count, m]
  std::int64_t count, m;
  double rtol, noise;

  static GRADSURGERY_HOST_DEVICE std::int64_t workspace(std::int64_t m) {
    return Cone<Alone>::workspace(m) + m;
  }

  template <typename Team>
  GRADSURGERY_HOST_DEVICE void solve(std::int64_t b, double* work, Team team) const {
    const double* gram = gramian + b * m * m;
    const double mean = 1.0 / static_cast<double>(m);
    double* products = work;
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      products[i] = 0;
    }
    for (std::int64_t j = 0; j < m; ++j) {  // neighbors, many at a time
      const double weight = given == nullptr ? mean : given[j];
      for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
        products[i] -= gram[j * m + i] * weight;
      }
    }
    team.sync();
    Cone<Team> cone(gram, m, rtol, noise, work + m, team);
    cone.solve(products, weights + b * m);
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      weights[b * m + i] += given == nullptr ? mean : given[i];
    }
    team.sync();
  }
};

struct ConflictAverse {
  const double* gramian;  // [count, m, m]
  double* weights;        // [count, m]
  std::int64_t count, m;
  double c, rtol, noise;

  static GRADSURGERY_HOST_DEVICE std::int64_t workspace(std::int64_t m) {
    return Cone<Alone>::workspace(m) + 3 * m;
  }

  template <typename Team>
  GRADSURGERY_HOST_DEVICE void solve(std::int64_t b, double* work, Team team) const {
    conflict_averse(gramian + b * m * m, c, weights + b * m, work, m, rtol, noise, team);
  }
};

// Row i of problem b m + i: visits the other rows in its order and, where its cosine with one is
// below the target, adds as much of that one as makes it the target. A target of 0 is PCGrad.
struct Deconflict {
  const double* gramian;      // [count / m, m, m]
  const std::int64_t* order;  // [count, m]
  double* targets;            // [count, m], becomes (1 - beta) target + beta cosine; null for 0
  double* coefficients;       // [count, m]
  std::int64_t count, m;
  double beta;

  static GRADSURGERY_HOST_DEVICE std::int64_t workspace(std::int64_t m) { return m; }

  template <typename Team>
  GRADSURGERY_HOST_DEVICE void solve(std::int64_t b, double* work, Team team) const {
    const std::int64_t self = b % m, thread = team.thread(), threads = team.threads();
    const double* gram = gramian + b / m * m * m;
    double* products = work;  // [m], of v with the rows
    double* v = coefficients + b * m;
    for (std::int64_t i = thread; i < m; i += threads) {
      v[i] = i == self;
      products[i] = gram[self * m + i];
    }
    team.sync();
    double norm = std::sqrt(products[self] > 0 ? products[self] : 0);
    for (std::int64_t l = 0; l < m && norm > 0; ++l) {
      const std::int64_t j = order[b * m + l];
      const double square = j < 0 || j >= m || j == self ? 0 : gram[j * m + j];
      if (!(square > 0)) {
        continue;
      }
      double share = products[j] < 0 ? -products[j] / square : 0;
      if (targets != nullptr) {
        const double length = std::sqrt(square), target = targets[b * m + j];
        const double cosine = fmax(-1.0, fmin(1.0, products[j] / (norm * length)));
        const double sine = std::sqrt(1 - cosine * cosine);
        const double bound = std::sqrt(fmax(1 - target * target, 1e-8));
        share = norm * (target * sine - cosine * bound) / (length * bound);
        share = cosine < target && share > 0 ? share : 0;
        team.sync();  // all have read the target
        if (thread == 0) {
          targets[b * m + j] = (1 - beta) * target + beta * cosine;
        }
      }
      if (share > 0) {
        team.sync();  // all have read the product
        const double factor = -share;
        subtract<1>(products, gram + j * m, 0, &factor, m, thread, threads);
        if (thread == 0) {
          v[j] += share;
        }
        team.sync();
        if (targets != nullptr) {
          double sum = 0;
          for (std::int64_t i = 0; i < m; ++i) {
            sum += v[i] * products[i];
          }
          norm = std::sqrt(sum > 0 ? sum : 0);
        }
      }
    }
    team.sync();
  }
};

// K w = w^-power with w > 0: the least of wᵀ K w / 2 + sum of w^(1 - power) / (power - 1), a
// logarithm for power 1, by Newton's method. Zero rows get 0; so do all if some positive
// combination of rows vanishes to rtol, for then there is no such w.
struct Bargaining {
  const double* gramian;  // [count, m, m]
  double* weights;        // [count, m]
  std::int64_t count, m;
  double power, rtol;

  static GRADSURGERY_HOST_DEVICE std::int64_t workspace(std::int64_t m) {
    return m * m + Cone<Alone>::workspace(m) + 2 * m;  // the vectors below need less than the cone
  }

  template <typename Team>
  GRADSURGERY_HOST_DEVICE void solve(std::int64_t b, double* work, Team team) const {
    const std::int64_t thread = team.thread(), threads = team.threads(), ld = m | 1;
    const double* gram = gramian + b * m * m;
    const bool solvable = !vanishes(gram, work, team);
    double* factor = work;
    double* scale = factor + m * ld;  // w = scale y, by which y = 1 for orthogonal rows
    double* size = scale + m;         // of a row so scaled, squared
    double* y = size + m;
    double* step = y + m;
    double* gradient = step + m;
    double* product = gradient + m;
    double* curvature = product + m;
    for (std::int64_t i = thread; i < m; i += threads) {
      const double square = gram[i * m + i];
      scale[i] = square > 0 ? std::pow(square, -1 / (1 + power)) : 0;
      size[i] = square * scale[i] * scale[i];
      y[i] = 1;
    }
    team.sync();
    bool solved = false;
    double last = 0;
    for (int round = 0; round < 500 && solvable; ++round) {
      find_product(gram, scale, y, product, team);
      for (std::int64_t i = thread; i < m; i += threads) {
        const double pull = size[i] * std::pow(y[i], -power);
        gradient[i] = product[i] - pull;
        curvature[i] = scale[i] > 0 ? 1 / std::sqrt(size[i] + power * pull / y[i]) : 1;
      }
      team.sync();
      // the Hessian with a diagonal of 1
      for (std::int64_t i = team.row(); i < m; i += team.rows()) {
        for (std::int64_t j = team.lane(); j <= i; j += team.lanes()) {
          factor[i * ld + j] =
              i == j ? 1 : gram[i * m + j] * (scale[i] * scale[j]) * (curvature[i] * curvature[j]);
        }
      }
      for (std::int64_t i = thread; i < m; i += threads) {
        step[i] = -gradient[i] * curvature[i];
      }
      team.sync();
      if (ordered_cholesky(factor, m, ld, 0.0, m, team) < m) {
        break;
      }
      solve_ordered(factor, step, m, ld, true, team);
      for (std::int64_t i = thread; i < m; i += threads) {
        step[i] *= curvature[i];
      }
      team.sync();
      double decrease = 0, most = 0, change = 0, square = 0;
      for (std::int64_t i = 0; i < m; ++i) {
        decrease -= step[i] * gradient[i];
        most = fmax(most, -step[i] / y[i]);
        change = fmax(change, std::fabs(step[i]) / y[i]);
        square += y[i] * product[i];
      }
      // the last step is from where it is small, for its square is left then, or shrinks no more
      solved = change <= 1e-9 || (change <= 1e-3 && change > last / 4);
      last = change;
      double length = most > 0 ? fmin(1.0, 0.9 / most) : 1;
      if (change > 1e-3) {
        team.sync();  // all have read the gradient
        find_product(gram, scale, step, gradient, team);
        double curve = 0;  // stepᵀ K step
        for (std::int64_t i = 0; i < m; ++i) {
          curve += gradient[i] * step[i];
        }
        const double before = value(product, size, y, step, 0, 0);
        const double rounding = 1e-14 * (std::fabs(before) + square);
        for (int halving = 0; halving < 40; ++halving) {
          const double after = value(product, size, y, step, length, curve);
          if (after <= before - 1e-4 * length * decrease + rounding) {
            break;
          }
          length /= 2;
        }
      }
      team.sync();
      for (std::int64_t i = thread; i < m; i += threads) {
        y[i] += length * step[i];
      }
      team.sync();
      if (solved) {
        break;
      }
    }
    for (std::int64_t i = thread; i < m; i += threads) {
      weights[b * m + i] = solved ? scale[i] * y[i] : 0;
    }
    team.sync();
  }

 private:
  // Whether 0 is in the hull of the unit rows. Its distance from them is that from 0 and 1 of the
  // cone of the rows with a 1 appended: with x the projection, 1 / sum(x) - 1 is its square.
  template <typename Team>
  GRADSURGERY_HOST_DEVICE bool vanishes(const double* gram, double* work, Team team) const {
    const std::int64_t thread = team.thread(), threads = team.threads();
    double* raised = work;
    double* x = raised + m * m;
    double* ones = x + m;
    for (std::int64_t i = thread; i < m * m; i += threads) {
      const double size = gram[i / m * (m + 1)] * gram[i % m * (m + 1)];
      raised[i] = size > 0 ? gram[i] / std::sqrt(size) + 1 : 0;
    }
    for (std::int64_t i = thread; i < m; i += threads) {
      ones[i] = 1;
    }
    team.sync();
    Cone<Team> cone(raised, m, rtol, rtol * rtol, ones + m, team);
    cone.solve(ones, x);
    double sum = 0;
    for (std::int64_t i = 0; i < m; ++i) {
      sum += x[i];
    }
    team.sync();  // all have read x, which makes room
    return (1 / sum - 1) * m <= rtol * rtol;
  }

  // out = S K S y
  template <typename Team>
  GRADSURGERY_HOST_DEVICE void find_product(const double* gram, const double* scale,
                                            const double* y, double* out, Team team) const {
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      double sum = 0;
      for (std::int64_t j = 0; j < m; ++j) {
        sum += gram[i * m + j] * (scale[i] * scale[j]) * y[j];
      }
      out[i] = sum;
    }
    team.sync();
  }

  // The function at y + length step, but for what it is at y of its quadratic part.
  GRADSURGERY_HOST_DEVICE double value(const double* product, const double* size, const double* y,
                                       const double* step, double length, double curve) const {
    double sum = length * length * curve / 2;
    for (std::int64_t i = 0; i < m; ++i) {
      const double at = y[i] + length * step[i];
      sum += product[i] * (length * step[i]);
      if (size[i] > 0) {
        sum += size[i] * (power == 1 ? -std::log(at) : std::pow(at, 1 - power) / (power - 1));
      }
    }
    return sum;
  }
};

// Eigenvalues, ascending, and eigenvectors as rows.
struct Eigen {
  const double* gramian;  // [count, m, m]
  double* values;         // [count, m]
  double* vectors;        // [count, m, m]
  std::int64_t count, m;

  static GRADSURGERY_HOST_DEVICE std::int64_t workspace(std::int64_t m) {
    return m * m + 3 * m + 1;
  }

  template <typename Team>
  GRADSURGERY_HOST_DEVICE void solve(std::int64_t b, double* work, Team team) const {
    for (std::int64_t i = team.thread(); i < m * m; i += team.threads()) {
      work[i] = gramian[b * m * m + i];
    }
    team.sync();
    eigen(work, values + b * m, vectors + b * m * m, work + m * m, m, team);
  }
};

#ifdef GRADSURGERY_ISA
}  // namespace gradsurgery::GRADSURGERY_ISA::dense
#else
}  // namespace gradsurgery::dense
#endif
