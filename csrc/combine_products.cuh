// One sum of a few rows, and its products with them, in one read: a thread keeps some bytes of
// every row until it has the sum of its columns.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace gradsurgery::cuda {

namespace {

template <typename T, int M>
struct SumProducts {
  static constexpr int threads = 128;
  static constexpr int resident = M > 9 && sizeof(T) == 2 ? 2 : 3;
  // 8 bytes of 17 rows, 16 of 9: 34 to 54 KiB of a multiprocessor's are on their way
  using Unit = std::conditional_t<(M > 9), uint2, uint4>;
  static constexpr int values = sizeof(Unit) / sizeof(T);
  static constexpr int width = threads * values;  // columns of a slice
  static constexpr std::int64_t max_blocks = blocks(1536);

  double totals[M + 1] = {};  // with each row, and the sum with itself

  // The sum of one column's values, and its products.
  __device__ T add(const T (&x)[M], const double* weights) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      sum += weights[i] * static_cast<double>(widen(x[i]));
    }
    T out;
    narrow(sum, &out);
    const double y = widen(out);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      totals[i] += static_cast<double>(widen(x[i])) * y;
    }
    totals[M] += y * y;
    return out;
  }
};

// parts [gridDim.x, groups of 8]: products with up to M rows, which the sum follows. It may be one
// of them: a thread has read its columns of all before it writes.
template <typename T, int M>
__global__ void __launch_bounds__(SumProducts<T, M>::threads, SumProducts<T, M>::resident)
    sum_products_kernel(const __grid_constant__ Table table, std::int64_t slices,
                        const double* weights, double* parts, bool begin) {
  using Work = SumProducts<T, M>;
  using Unit = typename Work::Unit;
  constexpr int threads = Work::threads;
  const int t = threadIdx.x, m = static_cast<int>(table.m) - 1;
  __shared__ Row rows[M + 1];
  __shared__ double shared_weights[M];
  if (t < M) {
    shared_weights[t] = t < m ? weights[t] : 0;
  }
  Work work;
  Walk walk;
  int block = -1;
  bool units = false;
  const std::int64_t share = blockIdx.x, stop = slices * (share + 1) / gridDim.x;
  for (std::int64_t slice = slices * share / gridDim.x; slice < stop; ++slice) {
    const std::int64_t column = walk.seek(table, slice, Work::width);
    if (block != walk.block) {
      block = walk.block;
      __syncthreads();  // the former block's rows are no longer read
      if (t <= M) {
        // the sum is last
        rows[t] = row_of(table, block, t == M ? m : t < m ? t : m + 1, 0);
      }
      __syncthreads();
      units = rows_in_units<T>(table, block, 0);
    }
    if (units && column + Work::width <= table.columns[block]) {
      const std::int64_t at = (column + t * Work::values) * sizeof(T);
      Unit units_of[M];
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const char* data = rows[i].data;
        units_of[i] = data == nullptr ? Unit{} : *reinterpret_cast<const Unit*>(data + at);
      }
      T outs[Work::values];
#pragma unroll
      for (int v = 0; v < Work::values; ++v) {
        T x[M];
#pragma unroll
        for (int i = 0; i < M; ++i) {
          T all[Work::values];
          memcpy(all, &units_of[i], sizeof(Unit));
          x[i] = all[v];
        }
        outs[v] = work.add(x, shared_weights);
      }
      Unit out;
      memcpy(&out, outs, sizeof(out));
      *reinterpret_cast<Unit*>(const_cast<char*>(rows[M].data) + at) = out;
    } else {
      // any strides, and the end of a block; neighbors in a warp take neighboring columns
#pragma unroll 1
      for (int k = 0; k < Work::values; ++k) {
        const std::int64_t at = column + k * threads + t;
        if (at >= table.columns[block]) {
          break;
        }
        T x[M];
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const Row row = rows[i];
          x[i] =
              row.data == nullptr ? T{} : *reinterpret_cast<const T*>(row.data + at * row.column);
        }
        char* to = const_cast<char*>(rows[M].data) + at * rows[M].column;
        *reinterpret_cast<T*>(to) = work.add(x, shared_weights);
      }
    }
  }

  __shared__ double all[threads / 32][M + 1];
#pragma unroll
  for (int i = 0; i <= M; ++i) {
    const double sum = warp_sum(work.totals[i]);
    if (t % 32 == 0) {
      all[t / 32][i] = sum;
    }
  }
  __syncthreads();
  if (t <= m) {
    double sum = 0;
    for (int w = 0; w < threads / 32; ++w) {
      sum += all[w][t == m ? M : t];
    }
    put(parts + share * slices_of(m + 1, 8) * 8 + t, sum, begin);
  }
}

}  // namespace

}  // namespace gradsurgery::cuda
