// CAGrad's direction as projections on a cone. As dense.h: float64, for the host and the device, a
// team of threads for a problem.
#pragma once

#include "cone.h"

#ifdef GRADSURGERY_ISA
namespace gradsurgery::GRADSURGERY_ISA::dense {
#else
namespace gradsurgery::dense {
#endif

// Weights 1 / m + x of d = g₀ + Jᵀ x, which makes the least <g_i, d> greatest within |d - g₀| <=
// c |g₀|, g₀ the mean row; zero rows do not count. d is the projection of g₀ on { <g_i, d> >= level
// } for the level at which it is that far from g₀: the distance is convex in the level and its
// slope sum(x) / distance, so that Newton's steps from above never pass the level sought.
template <typename Team>
GRADSURGERY_HOST_DEVICE inline void conflict_averse(const double* gram, double c, double* weights,
                                                    double* work, std::int64_t m, double rtol,
                                                    double noise, Team team) {
  double* mean = work;  // [m], <g_i, g₀>
  double* products = mean + m;
  double* x = products + m;
  Cone<Team> cone(gram, m, rtol, noise, x + m, team);
  for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
    double sum = 0;
    for (std::int64_t j = 0; j < m; ++j) {
      sum += gram[i * m + j];
    }
    mean[i] = sum / m;
    x[i] = 0;
  }
  team.sync();
  double square = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    square += mean[i] / m;
  }
  const double radius = c * std::sqrt(square > 0 ? square : 0);
  double low = 0, high = 0;  // levels within the radius, and beyond it
  bool any = false;
  for (std::int64_t i = 0; i < m; ++i) {
    if (cone.scale[i] > 0) {
      const double reach = mean[i] + radius / cone.scale[i];
      low = any && low < mean[i] ? low : mean[i];
      high = any && high < reach ? high : reach;
      any = true;
    }
  }
  double level = low < 0 && high > 0 ? 0 : high;
  bool within = true;  // what x holds
  for (int step = 0; step < 100 && radius > 0; ++step) {
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      products[i] = level - mean[i];
    }
    team.sync();
    const double missed = cone.solve(products, x);
    const bool feasible = missed <= 4 * cone.tolerance() && cone.sum() * rtol <= 1;
    double distance = 0, slope = 0;
    for (std::int64_t i = 0; i < m; ++i) {
      distance += x[i] * products[i];
      slope += x[i];
    }
    distance = std::sqrt(distance > 0 ? distance : 0);
    within = feasible && distance <= radius * (1 + 1e-12);
    if (feasible && std::fabs(distance - radius) <= 1e-12 * radius) {
      break;
    }
    low = within ? level : low;
    high = within ? high : level;
    const double newton = level + (radius - distance) * distance / slope;
    const double before = level;
    level = feasible && newton > low && newton < high ? newton : low + (high - low) / 2;
    if (!(level > low && level < high) || level == before) {
      level = low;  // no number between: rows of which a positive combination vanishes
      if (within) {
        break;
      }
    }
    team.sync();  // all have read x
  }
  for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
    weights[i] = 1.0 / m + x[i];
  }
  team.sync();
}

#ifdef GRADSURGERY_ISA
}  // namespace gradsurgery::GRADSURGERY_ISA::dense
#else
}  // namespace gradsurgery::dense
#endif
