#include "orthonormalize.h"

#include <cmath>

#include "combine.h"
#include "dense.h"
#include "gramian.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

Tensor matrix(const Tensor& batch, std::int64_t b) {
  Tensor out = batch;
  const std::int64_t size = dispatch(batch.dtype, [](auto type) {
    return static_cast<std::int64_t>(sizeof(typename decltype(type)::type));
  });
  out.data = batch.data_as<char>() + b * batch.stride(0) * size;
  out.ndim = 2;
  for (int i = 0; i < 2; ++i) {
    out.shape[i] = batch.shape[i + 1];
    out.strides[i] = batch.strides[i + 1];
  }
  return out;
}

// One pass of CholeskyQR: from a Gramian [m, m] the weights W = L⁻¹ D and R = (D⁻¹ L)ᵀ, D the
// inverse norms.
std::int64_t factorize(std::vector<double>& gram, double* weights, double* factor, std::int64_t m,
                       double rtol, std::int64_t most) {
  std::vector<double> scale(m);
  dense::normalize(gram.data(), scale.data(), m);
  std::int64_t rank = dense::ordered_cholesky(gram.data(), m, m, rtol, most);
  dense::invert_lower(gram.data(), weights, m);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < m; ++j) {
      weights[i * m + j] *= scale[j];
      factor[i * m + j] = j >= i && scale[j] > 0 ? gram[j * m + i] / scale[j] : 0;
    }
  }
  return rank;
}

// CholeskyQR in float64 leaves Q orthonormal to eps times the condition of the Gramian, which m
// times the squared norm of L⁻¹ bounds. Where that is below a float32's rounding, one pass will do;
// else a second, whose Gramian the first one's writes yield, makes it so.
std::int64_t cholesky_qr(const Rows& rows, const Rows& q, double* factor, double* norms,
                         double rtol, int threads) {
  const std::int64_t m = rows.m;
  std::vector<double> gram(m * m), weights(m * m), first(m * m), second(m * m);
  gramian(rows, gram.data(), true, threads);
  for (std::int64_t i = 0; i < m; ++i) {
    norms[i] = std::sqrt(gram[i * m + i]);
    if (!std::isfinite(norms[i])) {
      return 0;
    }
  }
  std::int64_t rank = factorize(gram, weights.data(), first.data(), m, rtol, rows.n);
  double inverse = 0;  // |L⁻¹|², of the normalized rows
  for (std::int64_t i = 0; i < m * m; ++i) {
    inverse += weights[i] * norms[i % m] * weights[i] * norms[i % m];
  }
  if (rows.dtype != Dtype::float64 && static_cast<double>(m) * inverse < 1e8) {
    combine(rows, weights.data(), q, nullptr, nullptr, true, threads);
    std::copy_n(first.data(), m * m, factor);
    return rank;
  }
  combine(rows, weights.data(), q, nullptr, gram.data(), true, threads);
  factorize(gram, weights.data(), second.data(), m, 0, m);
  combine(q, weights.data(), q, nullptr, nullptr, true, threads);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t l = i; l < m; ++l) {
      for (std::int64_t j = l; j < m; ++j) {
        factor[i * m + j] += second[i * m + l] * first[l * m + j];
      }
    }
  }
  if (static_cast<double>(m) * inverse < 1e8) {
    return rank;
  }
  // Rows that cancel so far have lost digits in the first pass, which that product does not know
  // of: R = Q rowsᵀ.
  Rows both = q;
  both.m = 2 * m;
  for (std::size_t k = 0; k < both.blocks.size(); ++k) {
    both.blocks[k].rows.insert(both.blocks[k].rows.end(), rows.blocks[k].rows.begin(),
                               rows.blocks[k].rows.end());
  }
  std::vector<double> products(4 * m * m);
  gramian(both, products.data(), true, threads);
  for (std::int64_t i = 0; i < m; ++i) {
    const double* product = products.data() + i * 2 * m;
    for (std::int64_t j = i; j < m && product[i] > 0; ++j) {
      factor[i * m + j] = product[m + j] / product[i];
    }
  }
  return rank;
}

}  // namespace

void orthonormalize(const Tensor& rows, const Tensor& q, double* factor, double* norms,
                    std::int64_t* rank, double rtol, int threads) {
  const std::int64_t batch = rows.size(0), m = rows.size(1), n = rows.size(2);
  std::fill_n(factor, batch * m * m, 0.0);
  // matrices that one thread finishes sooner than two can share are given out whole
  const bool whole = m * n < 1 << 17;
#pragma omp parallel for num_threads(threads) schedule(static) if (whole && batch > 1)
  for (std::int64_t b = 0; b < batch; ++b) {
    Rows source = make_rows({{matrix(rows, b)}}, "rows"), out = make_rows({{matrix(q, b)}}, "q");
    double* r = factor + b * m * m;
    rank[b] = cholesky_qr(source, out, r, norms + b * m, rtol, whole ? 1 : threads);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
