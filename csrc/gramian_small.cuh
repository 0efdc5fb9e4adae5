// Products of up to 8 rows, in registers.
#pragma once

#include <type_traits>

#include "gramian_sums.cuh"

namespace gradsurgery::cuda {

namespace {

// Up to 8 rows: every thread multiplies all pairs of its own columns, in registers.
template <typename T, typename A, int M>
struct Small {
  static constexpr int threads = 128;
  static constexpr int resident =
      M == 8 ? 2 : 3;  // more would not leave the registers for the pairs
  static constexpr int units =
      8 / M;  // of each row: 8 loads of 16 bytes are on their way at a time
  static constexpr int values = units * per_unit<T>;
  static constexpr int width = threads * values;  // columns of a slice
  static constexpr int pairs = M * (M + 1) / 2;
  static constexpr int run = std::max(1, float_run / values);  // slices between flushes
  static constexpr bool direct = std::is_same_v<A, double>;

  A sums[pairs] = {};
  double totals[direct ? 1 : pairs] = {};

  __device__ void multiply(const A (&x)[M]) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        sums[i * (i + 1) / 2 + j] += x[i] * x[j];
      }
    }
  }

  __device__ void flush() {
    if constexpr (!direct) {
#pragma unroll
      for (int q = 0; q < pairs; ++q) {
        totals[q] += static_cast<double>(sums[q]);
        sums[q] = 0;
      }
    }
  }

  __device__ double total(int q) const {
    if constexpr (direct) {
      return sums[q];
    } else {
      return totals[q];
    }
  }
};

// parts [batch, gridDim.x, M, M], lower triangles
template <typename T, typename A, int M>
__global__ void __launch_bounds__(Small<T, A, M>::threads, Small<T, A, M>::resident)
    small_kernel(const __grid_constant__ Table table, std::int64_t slices, double* parts,
                 bool begin, Range range) {
  using Work = Small<T, A, M>;
  constexpr int threads = Work::threads, unit = per_unit<T>;
  if (range.skip()) {
    return;
  }
  range.clear();
  __shared__ Row rows[M];
  Work work;
  Walk walk;
  int block = -1, since = 0;
  bool units = false;
  const std::int64_t share = blockIdx.x, stop = slices * (share + 1) / gridDim.x;
  for (std::int64_t slice = slices * share / gridDim.x; slice < stop; ++slice) {
    const std::int64_t column = walk.seek(table, slice, Work::width);
    if (block != walk.block) {
      block = walk.block;
      __syncthreads();  // the former block's rows are no longer read
      if (threadIdx.x < M) {
        rows[threadIdx.x] = row_of(table, block, threadIdx.x, blockIdx.z);
      }
      __syncthreads();
      units = __syncthreads_and(threadIdx.x >= M || in_units<T>(rows[threadIdx.x % M]));
    }
    if (units && column + Work::width <= table.columns[block]) {
      uint4 values[Work::units][M];
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const char* data = rows[i].data;
#pragma unroll
        for (int u = 0; u < Work::units; ++u) {
          const std::int64_t at = column + (u * threads + threadIdx.x) * unit;
          values[u][i] = data == nullptr ? make_uint4(0, 0, 0, 0)
                                         : *reinterpret_cast<const uint4*>(data + at * sizeof(T));
        }
      }
#pragma unroll
      for (int u = 0; u < Work::units; ++u) {
#pragma unroll
        for (int v = 0; v < unit; ++v) {
          A x[M];
#pragma unroll
          for (int i = 0; i < M; ++i) {
            x[i] = static_cast<A>(widen(value_of<T>(values[u][i], v)));
          }
          work.multiply(x);
        }
      }
    } else {
      // any strides, and the end of a block; neighbors in a warp take neighboring columns
#pragma unroll 1
      for (int k = 0; k < Work::values; ++k) {
        const std::int64_t at = column + k * threads + threadIdx.x;
        A x[M];
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const Row row = rows[i];
          x[i] =
              at < table.columns[block] && row.data != nullptr
                  ? static_cast<A>(widen(*reinterpret_cast<const T*>(row.data + at * row.column)))
                  : A(0);
        }
        work.multiply(x);
      }
    }
    if (++since == Work::run) {
      since = 0;
      work.flush();
    }
  }
  work.flush();

  __shared__ double sums[threads / 32][Work::pairs];
#pragma unroll
  for (int q = 0; q < Work::pairs; ++q) {
    const double sum = warp_sum(work.total(q));
    if (threadIdx.x % 32 == 0) {
      sums[threadIdx.x / 32][q] = sum;
    }
  }
  __syncthreads();
  double* part = parts + (static_cast<std::int64_t>(blockIdx.z) * gridDim.x + share) * M * M;
  for (int e = threadIdx.x; e < M * M; e += threads) {
    const int i = e / M, j = e % M;
    if (j <= i) {
      double sum = 0;
      for (int w = 0; w < threads / 32; ++w) {
        sum += sums[w][i * (i + 1) / 2 + j];
      }
      put(part + e, sum, begin);
    }
  }
}

}  // namespace

}  // namespace gradsurgery::cuda
