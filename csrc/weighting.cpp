#include "weighting.h"

#include <algorithm>
#include <vector>

#include "dense.h"

namespace gradsurgery::GRADSURGERY_ISA {

void projection_weights(const double* gramian, const double* products, double* coefficients,
                        std::int64_t* rank, double* margin, std::int64_t batch, std::int64_t m,
                        double rtol) {
  std::vector<double> gram(m * m), scale(m), column(m), solution(m);
  std::vector<std::int64_t> order(m);
  for (std::int64_t b = 0; b < batch; ++b) {
    std::copy_n(gramian + b * m * m, m * m, gram.data());
    dense::normalize(gram.data(), scale.data(), m);
    rank[b] =
        dense::pivoted_cholesky(gram.data(), order.data(), column.data(), m, rtol, margin + b);
    for (std::int64_t i = 0; i < rank[b]; ++i) {
      solution[i] = products[b * m + order[i]] * scale[order[i]];
    }
    dense::solve(gram.data(), solution.data(), m, rank[b]);
    std::fill_n(coefficients + b * m, m, 0.0);
    for (std::int64_t i = 0; i < rank[b]; ++i) {
      coefficients[b * m + order[i]] = solution[i] * scale[order[i]];
    }
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
