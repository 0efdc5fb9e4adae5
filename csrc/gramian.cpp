#include "gramian.h"

#include <cmath>

#include "products.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

template <typename T>
void accumulate(const Rows& rows, std::int64_t begin, std::int64_t end, double* out) {
  const bool keep = Products<T>::keeps_lanes(rows.m, rows.m, true);
  const std::int64_t width = keep ? slice_width : 4 * slice_width;
  Slice<T> slice(rows, width, false);
  Products<T> products(rows.m, rows.m, true, out);
  for_slices(rows, begin, end, width,
             [&](const Block& block, std::int64_t column, std::int64_t length) {
               slice.load(block, column, length);
               products.add(slice, slice, true);
             });
}

template <typename T>
void gramian_in(const Rows& rows, double* out, int threads) {
  const std::int64_t m = rows.m;
  // a part for every thread but the first, added in their order: the same sum each time
  std::fill_n(out, m * m, 0.0);
  std::vector<double> parts((threads - 1) * m * m);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    std::int64_t begin = share(rows.n, t, threads), end = share(rows.n, t + 1, threads);
    accumulate<T>(rows, begin, end, t == 0 ? out : parts.data() + (t - 1) * m * m);
  }
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double value = out[i * m + j];
      for (int t = 1; t < threads; ++t) {
        value += parts[((t - 1) * m + i) * m + j];
      }
      out[i * m + j] = out[j * m + i] = value;
    }
  }
}

// Over so few columns the rounding of float32 sums does not average out to 1e-7 of the norms.
constexpr std::int64_t few_columns = 1 << 15;

// Products of values below 1e-17 lose digits in float32, and a sum above 3e38 is none.
bool in_range(const Rows& rows, const double* out) {
  for (std::int64_t i = 0; i < rows.m; ++i) {
    double square = out[i * rows.m + i];
    if (!(square >= 1e-34 * static_cast<double>(rows.n) && square < INFINITY)) {
      return false;
    }
  }
  return true;
}

}  // namespace

void gramian(const Rows& rows, double* out, bool precise, int threads) {
  threads = threads_for(rows, threads);
  precise = precise || rows.dtype == Dtype::float64 || rows.n <= few_columns;
  if (!precise) {
    gramian_in<float>(rows, out, threads);
    precise = !in_range(rows, out);
  }
  if (precise) {
    gramian_in<double>(rows, out, threads);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
