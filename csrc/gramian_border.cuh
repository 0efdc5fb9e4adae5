// Products of the last row with all rows.
#pragma once

#include "gramian_sums.cuh"

namespace gradsurgery::cuda {

namespace {

// One row with all rows, itself included, in float64: as fast as they are read.
template <typename T>
struct Border {
  static constexpr int threads = 256;
  static constexpr int rows = 8;  // of each block of threads; the last row is read again for each
  static constexpr int width = threads * per_unit<T>;  // columns of a slice
};

// parts [gridDim.x, gridDim.y, 8]: the last row with rows 8 blockIdx.y and on
template <typename T>
__global__ void __launch_bounds__(Border<T>::threads, 2)
    border_kernel(const __grid_constant__ Table table, std::int64_t slices, double* parts,
                  bool begin) {
  using Work = Border<T>;
  constexpr int threads = Work::threads, M = Work::rows, unit = per_unit<T>;
  __shared__ Row rows[M + 1];
  double sums[M] = {};
  Walk walk;
  int block = -1;
  bool units = false;
  const std::int64_t share = blockIdx.x, stop = slices * (share + 1) / gridDim.x;
  for (std::int64_t slice = slices * share / gridDim.x; slice < stop; ++slice) {
    const std::int64_t column = walk.seek(table, slice, Work::width);
    if (block != walk.block) {
      block = walk.block;
      __syncthreads();  // the former block's rows are no longer read
      if (threadIdx.x <= M) {
        const std::int64_t i = std::int64_t{blockIdx.y} * M + threadIdx.x;
        rows[threadIdx.x] = row_of(table, block, threadIdx.x == M ? table.m - 1 : i, 0);
      }
      __syncthreads();
      units = __syncthreads_and(threadIdx.x > M || in_units<T>(rows[threadIdx.x % (M + 1)]));
    }
    if (units && column + Work::width <= table.columns[block]) {
      const std::int64_t at = (column + threadIdx.x * unit) * sizeof(T);
      uint4 values[M + 1];
#pragma unroll
      for (int i = 0; i <= M; ++i) {
        const char* data = rows[i].data;
        values[i] =
            data == nullptr ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(data + at);
      }
#pragma unroll
      for (int v = 0; v < unit; ++v) {
        const double last = widen(value_of<T>(values[M], v));
#pragma unroll
        for (int i = 0; i < M; ++i) {
          sums[i] += last * static_cast<double>(widen(value_of<T>(values[i], v)));
        }
      }
    } else {
      // any strides, and the end of a block; neighbors in a warp take neighboring columns
#pragma unroll 1
      for (int k = 0; k < unit; ++k) {
        const std::int64_t at = column + k * threads + threadIdx.x;
        if (at >= table.columns[block]) {
          break;
        }
        const double last = widen(*reinterpret_cast<const T*>(rows[M].data + at * rows[M].column));
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const Row row = rows[i];
          if (row.data != nullptr) {
            const T value = *reinterpret_cast<const T*>(row.data + at * row.column);
            sums[i] += last * static_cast<double>(widen(value));
          }
        }
      }
    }
  }

  __shared__ double all[threads / 32][M];
#pragma unroll
  for (int i = 0; i < M; ++i) {
    const double sum = warp_sum(sums[i]);
    if (threadIdx.x % 32 == 0) {
      all[threadIdx.x / 32][i] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < M) {
    double sum = 0;
    for (int w = 0; w < threads / 32; ++w) {
      sum += all[w][threadIdx.x];
    }
    put(parts + (share * gridDim.y + blockIdx.y) * M + threadIdx.x, sum, begin);
  }
}

}  // namespace

}  // namespace gradsurgery::cuda
