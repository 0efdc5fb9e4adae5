#include "weighting.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <vector>

#include "solves.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

template <typename Problem>
void run(const Problem& problem, int threads) {
  // a team of threads costs some microseconds to start
  const bool small = problem.count * problem.m * problem.m < 1 << 12;
  threads = small || problem.count < 2 ? 1 : threads;
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> work(Problem::workspace(problem.m));
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t b = 0; b < problem.count; ++b) {
      problem.solve(b, work.data(), dense::Alone{});
    }
  }
}

}  // namespace

void projection_weights(const double* gramian, const double* products, double* coefficients,
                        std::int64_t* rank, double* margin, std::int64_t batch, std::int64_t m,
                        double rtol, int threads) {
  run(dense::Projection{gramian, products, coefficients, rank, margin, batch, m, rtol}, threads);
}

void cone_weights(const double* gramian, const double* products, double* coefficients,
                  double* residual, std::int64_t batch, std::int64_t vectors, std::int64_t m,
                  double rtol, double noise, int threads) {
  run(dense::ConeProjection{gramian, products, coefficients, residual, batch * vectors, m, vectors,
                            rtol, noise},
      threads);
}

void dual_projection_weights(const double* gramian, const double* given, double* weights,
                             std::int64_t batch, std::int64_t m, double rtol, double noise,
                             int threads) {
  run(dense::DualProjection{gramian, given, weights, batch, m, rtol, noise}, threads);
}

void conflict_averse_weights(const double* gramian, double* weights, std::int64_t batch,
                             std::int64_t m, double c, double rtol, double noise, int threads) {
  run(dense::ConflictAverse{gramian, weights, batch, m, c, rtol, noise}, threads);
}

bool all_finite(const double* values, std::int64_t count) {
  constexpr std::uint64_t exponent = std::uint64_t{0x7ff} << 52;
  std::uint64_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    found |= (std::bit_cast<std::uint64_t>(values[i]) & exponent) == exponent ? 1 : 0;
  }
  return found == 0;
}

void shuffle(const float* draws, std::int64_t* order, std::int64_t batch, std::int64_t m) {
  for (std::int64_t b = 0; b < batch; ++b) {
    std::int64_t* line = order + b * m;
    std::iota(line, line + m, 0);
    for (std::int64_t k = m - 1; k > 0; --k) {
      const auto other = static_cast<std::int64_t>(draws[b * m + k] * static_cast<float>(k + 1));
      std::swap(line[k], line[std::clamp<std::int64_t>(other, 0, k)]);
    }
  }
}

void deconflict_weights(const double* gramian, const std::int64_t* order, double* targets,
                        double* coefficients, std::int64_t batch, std::int64_t m, double beta,
                        int threads) {
  // some 0.8 ns a step: less than half a millisecond is done before a sleeping thread is awake
  const bool brief = batch * m * m * m < 1 << 19;
  run(dense::Deconflict{gramian, order, targets, coefficients, batch * m, m, beta},
      brief ? 1 : threads);
}

void bargaining_weights(const double* gramian, double* weights, std::int64_t batch, std::int64_t m,
                        double power, double rtol, int threads) {
  run(dense::Bargaining{gramian, weights, batch, m, power, rtol}, threads);
}

void eigen(const double* gramian, double* values, double* vectors, std::int64_t batch,
           std::int64_t m, int threads) {
  run(dense::Eigen{gramian, values, vectors, batch, m}, threads);
}

}  // namespace gradsurgery::GRADSURGERY_ISA
