#include "gramian.h"

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
  add_parts(parts, m, threads, out);
}

}  // namespace

void gramian(const Rows& rows, double* out, bool precise, int threads) {
  threads = threads_for(rows, threads);
  precise = precise || rows.dtype == Dtype::float64 || rows.n <= few_columns;
  if (!precise) {
    gramian_in<float>(rows, out, threads);
    precise = !in_range(rows.m, rows.n, out);
  }
  if (precise) {
    gramian_in<double>(rows, out, threads);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
