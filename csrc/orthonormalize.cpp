#include "orthonormalize.h"

#include <cmath>

#include "combine.h"
#include "dense.h"
#include "gramian.h"
#include "products.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

// Up to this many rows, and values of a float64 copy that fits in cache, Gram-Schmidt is used.
constexpr std::int64_t few_rows = 4;
constexpr std::int64_t few_values = 1 << 16;

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

// A float64 matrix in rows, [m, n], as the view the other kernels take.
Rows in_double(double* values, std::int64_t m, std::int64_t n) {
  Rows rows{Dtype::float64, m, n, {{n, {}}}};
  for (std::int64_t i = 0; i < m; ++i) {
    rows.blocks[0].rows.push_back({reinterpret_cast<char*>(values + i * n), 1});
  }
  return rows;
}

double dot(const double* a, const double* b, std::int64_t length) {
  Vector<double> sums[4] = {};
  for (std::int64_t j = 0, part = 0; j < length; j += lanes<double>, ++part) {
    sums[part & 3] += load(a + j) * load(b + j);
  }
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Modified Gram-Schmidt, every row twice, on a float64 copy.
std::int64_t gram_schmidt(const Rows& rows, const Rows& q, double* factor, double* norms,
                          double rtol) {
  const std::int64_t m = rows.m, n = rows.n, width = (n + 15) / 16 * 16;
  std::vector<double> copy(m * width);
  std::vector<double> identity(m * m);
  Slice<double> slice(rows, std::max<std::int64_t>(n, 1), false);
  slice.load(rows.blocks[0], 0, n);
  std::int64_t rank = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    double* row = copy.data() + i * width;
    identity[i * m + i] = 1;
    std::copy_n(slice.rows()[i], n, row);
    norms[i] = std::sqrt(dot(row, row, width));
    for (int twice = 0; twice < 2; ++twice) {
      for (std::int64_t j = 0; j < i; ++j) {
        const double* other = copy.data() + j * width;
        const double product = dot(other, row, width);
        for (std::int64_t l = 0; l < width; ++l) {
          row[l] -= product * other[l];
        }
        factor[j * m + i] += product;
      }
    }
    double norm = std::sqrt(dot(row, row, width));
    norm = norm > rtol * norms[i] ? norm : 0;
    for (std::int64_t l = 0; l < width; ++l) {
      row[l] = norm > 0 ? row[l] / norm : 0;
    }
    factor[i * m + i] = norm;
    rank += norm > 0;
  }
  Rows source = in_double(copy.data(), m, n);
  for (std::int64_t i = 0; i < m; ++i) {
    source.blocks[0].rows[i].data = reinterpret_cast<char*>(copy.data() + i * width);
  }
  combine(source, identity.data(), q, nullptr, nullptr, true, 1);
  return rank;
}

// One pass of CholeskyQR: from a Gramian [m, m] the weights W = L⁻¹ D and R = (D⁻¹ L)ᵀ, D the inverse
// norms.
std::int64_t factorize(std::vector<double>& gram, double* weights, double* factor, std::int64_t m,
                       double rtol) {
  std::vector<double> scale(m);
  dense::normalize(gram.data(), scale.data(), m);
  std::int64_t rank = dense::ordered_cholesky(gram.data(), m, rtol);
  dense::invert_lower(gram.data(), weights, m);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < m; ++j) {
      weights[i * m + j] *= scale[j];
      factor[i * m + j] = j >= i && scale[j] > 0 ? gram[j * m + i] / scale[j] : 0;
    }
  }
  return rank;
}

// CholeskyQR in float64 leaves Q orthonormal to eps / d², d the smallest distance of a row to the span
// of those before, relative to its norm. That is below a float32's rounding down to d = 1e-4; else a
// second time, whose Gramian the first one's writes yield, makes it so.
std::int64_t cholesky_qr(const Rows& rows, const Rows& q, double* factor, double* norms, double rtol,
                         int threads) {
  const std::int64_t m = rows.m;
  std::vector<double> gram(m * m), weights(m * m), first(m * m), second(m * m);
  gramian(rows, gram.data(), true, threads);
  double distance = 1;
  for (std::int64_t i = 0; i < m; ++i) {
    norms[i] = std::sqrt(gram[i * m + i]);
    if (!std::isfinite(norms[i])) {
      return 0;
    }
  }
  std::int64_t rank = factorize(gram, weights.data(), first.data(), m, rtol);
  for (std::int64_t i = 0; i < m; ++i) {
    distance = first[i * m + i] > 0 ? std::min(distance, first[i * m + i] / norms[i]) : distance;
  }
  if (rows.dtype != Dtype::float64 && distance > 1e-4) {
    combine(rows, weights.data(), q, nullptr, nullptr, true, threads);
    std::copy_n(first.data(), m * m, factor);
    return rank;
  }
  combine(rows, weights.data(), q, nullptr, gram.data(), true, threads);
  factorize(gram, weights.data(), second.data(), m, 0);
  combine(q, weights.data(), q, nullptr, nullptr, true, threads);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t l = i; l < m; ++l) {
      for (std::int64_t j = l; j < m; ++j) {
        factor[i * m + j] += second[i * m + l] * first[l * m + j];
      }
    }
  }
  return rank;
}

}  // namespace

void orthonormalize(const Tensor& rows, const Tensor& q, double* factor, double* norms,
                    std::int64_t* rank, double rtol, int threads) {
  const std::int64_t batch = rows.size(0), m = rows.size(1), n = rows.size(2);
  std::fill_n(factor, batch * m * m, 0.0);
  const bool small = m <= few_rows && m * n <= few_values;
  // matrices that one thread finishes sooner than two can share are given out whole
  const bool whole = m * n < 1 << 17;
#pragma omp parallel for num_threads(threads) schedule(static) if (whole && batch > 1)
  for (std::int64_t b = 0; b < batch; ++b) {
    Rows source = make_rows({{matrix(rows, b)}}, "rows"), out = make_rows({{matrix(q, b)}}, "q");
    double* r = factor + b * m * m;
    rank[b] = small ? gram_schmidt(source, out, r, norms + b * m, rtol)
                    : cholesky_qr(source, out, r, norms + b * m, rtol, whole ? 1 : threads);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
