#include "gramian.h"

#include <cmath>

#include "simd.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

// A slice's rows share the second-level cache with their neighbors' prefetch.
constexpr std::int64_t slice_bytes = 192 << 10;
constexpr std::int64_t max_width = 2048;  // columns; bounds what is summed in float32

template <typename T>
std::int64_t slice_width(std::int64_t m) {
  std::int64_t width = slice_bytes / static_cast<std::int64_t>(sizeof(T)) / std::max<std::int64_t>(m, 1);
  return std::clamp<std::int64_t>(width / 64 * 64, 256, max_width);
}

template <typename T>
void accumulate(const Rows& rows, std::int64_t begin, std::int64_t end, double* out) {
  const std::int64_t width = slice_width<T>(rows.m);
  Slice<T> slice(rows, width);
  for_slices(rows, begin, end, width,
             [&](const Block& block, std::int64_t column, std::int64_t length) {
               slice.load(block, column, length);
               products(slice, rows.m, slice, rows.m, true, out);
             });
}

template <typename T>
void gramian_in(const Rows& rows, double* out, int threads) {
  const std::int64_t m = rows.m;
  // a part for every thread, added in their order: the same sum each time
  std::vector<double> parts(threads * m * m);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    std::int64_t begin = share(rows.n, t, threads), end = share(rows.n, t + 1, threads);
    accumulate<T>(rows, begin, end, parts.data() + t * m * m);
  }
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double value = 0;
      for (int t = 0; t < threads; ++t) {
        value += parts[(t * m + i) * m + j];
      }
      out[i * m + j] = out[j * m + i] = value;
    }
  }
}

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
  if (!precise && rows.dtype != Dtype::float64) {
    gramian_in<float>(rows, out, threads);
    precise = !in_range(rows, out);
  }
  if (precise || rows.dtype == Dtype::float64) {
    gramian_in<double>(rows, out, threads);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
