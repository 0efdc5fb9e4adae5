// What registers hold of a product of matrices.
#pragma once

#include <algorithm>

#include "simd.h"

namespace gradsurgery::GRADSURGERY_ISA {

// A register tile is the products of `tile_rows` values, read one by one, with up to `tile_panels`
// panels of others, a vector each: tile_rows * tile_panels accumulators.
#if defined(__AVX512F__)
constexpr int tile_panels = 3;
template <typename T>
constexpr int tile_rows = 8;
#else
constexpr int tile_panels = vector_bytes == 32 ? 3 : 2;
template <typename T>
constexpr int tile_rows = std::min(lanes<T>, 4);
#endif

// out [tile_rows, panels * lanes], its rows `stride` apart, = beta out + sum_t a_t b_tᵀ, and is not
// read where beta is 0; tokens are tile_rows values apart in a. Meanwhile a line of each token that
// comes next is prefetched.
template <typename T, int panels>
void multiply(const T* a, const T* b, std::int64_t b_stride, std::int64_t length, T* out,
              std::int64_t stride, T beta, const T* next, std::int64_t next_stride) {
  constexpr int rows = tile_rows<T>;
  Vector<T> sums[rows * panels] = {};
  for (std::int64_t t = 0; t < length; ++t) {
    __builtin_prefetch(next, 0, 2);
    next += next_stride;
    Vector<T> x[panels];
#pragma GCC unroll 4
    for (int c = 0; c < panels; ++c) {
      x[c] = load(b + c * lanes<T>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < panels; ++c) {
        sums[r * panels + c] += x[c] * a[r];
      }
    }
    a += rows;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < panels; ++c) {
      T* to = out + r * stride + c * lanes<T>;
      const Vector<T> value = sums[r * panels + c];
      store(to, beta == 0 ? value : value + beta * load(to));
    }
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
