// Products of 5 to 16 rows, and of one more with them, on tensor cores.
//
// A lane of a warp reads 16 bytes of the row of its number over 4: what an instruction of mma.cuh
// takes of the rows, and of their transpose. So values go from memory into registers and from there
// into products, and no warp waits for another. float32 is multiplied in float64: 6 operations a
// byte for 16 rows, which by count tensor cores made for it do as fast as values come. Compiled and
// emulated, not yet run on a GPU.
#pragma once

#include <type_traits>

#include "gramian_sums.cuh"
#include "mma.cuh"

namespace gradsurgery::cuda {

namespace {

// G groups of 8 rows; with BORDER, a row more. A: what products of 16-bit values are summed in.
template <typename T, typename A, int G, bool BORDER>
struct Fragments {
  static constexpr int threads = 128;
  static constexpr int resident = G == 2 ? 3 : 4;
  static constexpr int rows = 8 * G;
  static constexpr int lane_rows = G + BORDER;  // that a lane reads
  // of each row: 8 loads of 16 bytes of a lane are on their way at a time, 48 KiB of a
  // multiprocessor's for 16 rows, 64 for 8; a border leaves registers for half as many
  static constexpr int units = (BORDER ? 4 : 8) / G;
  static constexpr int warp_columns = 4 * units * per_unit<T>;
  static constexpr int width = threads / 32 * warp_columns;  // columns of a slice
  static constexpr int entries = rows * rows;
  static constexpr int border_entries = BORDER ? rows + 8 : 0;
  static constexpr bool direct = std::is_same_v<A, double>;
  // a unit of the 4 lanes of a row is what a float sums
  static_assert(direct || (sizeof(T) == 2 && 4 * per_unit<T> == float_run));

  double left[2 * G] = {};  // of all rows with the first 8, as d of mma.cuh
  double right[2] = {};     // of the last 8 rows with themselves, of 16
  double border[lane_rows] = {};

  // a unit of each row
  __device__ void multiply(const uint4 (&x)[lane_rows]) {
    if constexpr (direct) {
#pragma unroll
      for (int v = 0; v < per_unit<T>; v += 2) {
        double a[lane_rows][2];
#pragma unroll
        for (int h = 0; h < lane_rows; ++h) {
          a[h][0] = widen(value_of<T>(x[h], v));
          a[h][1] = widen(value_of<T>(x[h], v + 1));
        }
        if constexpr (G == 2) {
          cuda::multiply(left, {a[0][0], a[1][0], a[0][1], a[1][1]}, a[0]);
          cuda::multiply(right, a[1][0], a[1][0]);
          cuda::multiply(right, a[1][1], a[1][1]);
        } else {
          cuda::multiply(left, a[0][0], a[0][0]);
          cuda::multiply(left, a[0][1], a[0][1]);
        }
        if constexpr (BORDER) {
#pragma unroll
          for (int h = 0; h < lane_rows; ++h) {
            border[h] += a[h][0] * a[G][0];
            border[h] += a[h][1] * a[G][1];
          }
        }
      }
    } else {
      float first[4] = {}, last[4] = {};
      const uint4 zeros = make_uint4(0, 0, 0, 0), &y = G == 2 ? x[1] : zeros;
      cuda::multiply<T>(first, {x[0].x, y.x, x[0].y, y.y}, {x[0].x, x[0].y});
      cuda::multiply<T>(first, {x[0].z, y.z, x[0].w, y.w}, {x[0].z, x[0].w});
#pragma unroll
      for (int e = 0; e < 2 * G; ++e) {
        left[e] += static_cast<double>(first[e]);
      }
      if constexpr (G == 2) {
        cuda::multiply<T>(last, {x[0].x, y.x, x[0].y, y.y}, {y.x, y.y});
        cuda::multiply<T>(last, {x[0].z, y.z, x[0].w, y.w}, {y.z, y.w});
        right[0] += static_cast<double>(last[2]);
        right[1] += static_cast<double>(last[3]);
      }
      if constexpr (BORDER) {
        A sums[lane_rows] = {};
#pragma unroll
        for (int v = 0; v < per_unit<T>; ++v) {
          const float one_more = widen(value_of<T>(x[G], v));
#pragma unroll
          for (int h = 0; h < lane_rows; ++h) {
            sums[h] += widen(value_of<T>(x[h], v)) * one_more;
          }
        }
#pragma unroll
        for (int h = 0; h < lane_rows; ++h) {
          border[h] += static_cast<double>(sums[h]);
        }
      }
    }
  }
};

// A unit of values 4 columns apart, from `at` on: any strides, and zeros past the end of a block.
template <typename T>
__device__ inline uint4 gather(const Row& row, std::int64_t at, std::int64_t columns) {
  T values[per_unit<T>] = {};
#pragma unroll
  for (int v = 0; v < per_unit<T>; ++v) {
    if (at + 4 * v < columns) {
      values[v] = *reinterpret_cast<const T*>(row.data + (at + 4 * v) * row.column);
    }
  }
  uint4 unit;
  memcpy(&unit, values, sizeof(unit));
  return unit;
}

// A unit of global memory, in its turn among the products.
__device__ inline uint4 load(const uint4* from) {
#ifdef GRADSURGERY_EMULATE_CUDA
  return *from;
#else
  uint4 unit;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(unit.x), "=r"(unit.y), "=r"(unit.z), "=r"(unit.w)
               : "l"(__cvta_generic_to_global(from)));
  return unit;
#endif
}

// parts [batch, gridDim.x, 8 G, 8 G], lower triangles; a border's behind them, [gridDim.x, 8 G + 8]
template <typename T, typename A, int G, bool BORDER>
__global__ void __launch_bounds__(Fragments<T, A, G, BORDER>::threads,
                                  Fragments<T, A, G, BORDER>::resident)
    fragments_kernel(const __grid_constant__ Table table, std::int64_t slices, double* parts,
                     bool begin, Range range) {
  using Work = Fragments<T, A, G, BORDER>;
  constexpr int lane_rows = Work::lane_rows, unit = per_unit<T>;
  if (range.skip()) {
    return;
  }
  range.clear();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  Work work;
  Walk walk;
  const std::int64_t share = blockIdx.x, stop = slices * (share + 1) / gridDim.x;
  std::int64_t slice = slices * share / gridDim.x;
  while (slice < stop) {
    const std::int64_t column = walk.seek(table, slice, Work::width) + warp * Work::warp_columns;
    const std::int64_t columns = table.columns[walk.block];
    Row rows[lane_rows];
#pragma unroll
    for (int h = 0; h < lane_rows; ++h) {
      // past the last row, that one again: nobody looks at what comes of it
      const std::int64_t i = h < G ? 8 * h + g : 8 * G;
      rows[h] = row_of(table, walk.block, i < table.m ? i : table.m - 1, blockIdx.z);
    }
    const bool units = rows_in_units<T>(table, walk.block, blockIdx.z);
    std::int64_t count = stop - slice;  // of slices at a time, all in one way
    if (units && column + Work::warp_columns <= columns) {
      const std::int64_t whole = (columns - column - Work::warp_columns) / Work::width + 1;
      count = whole < count ? whole : count;
      const uint4* from[lane_rows];
      uint4 values[Work::units][lane_rows];
#pragma unroll
      for (int h = 0; h < lane_rows; ++h) {
        from[h] = reinterpret_cast<const uint4*>(rows[h].data + column * sizeof(T)) + t;
#pragma unroll
        for (int u = 0; u < Work::units; ++u) {
          values[u][h] = load(from[h] + 4 * u);
        }
      }
#pragma unroll 1
      for (std::int64_t k = 1; k < count; ++k) {
#pragma unroll
        for (int h = 0; h < lane_rows; ++h) {
          from[h] += Work::width / unit;
        }
#pragma unroll
        for (int u = 0; u < Work::units; ++u) {
          work.multiply(values[u]);
          // in the place of what was multiplied: some are always on their way
#pragma unroll
          for (int h = 0; h < lane_rows; ++h) {
            values[u][h] = load(from[h] + 4 * u);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < Work::units; ++u) {
        work.multiply(values[u]);
      }
    } else {
      const std::int64_t rest = walk.first + slices_of(columns, Work::width) - slice;
      count = units ? 1 : rest < count ? rest : count;
#pragma unroll 1
      for (std::int64_t k = 0; k < count; ++k) {
#pragma unroll 1
        for (int u = 0; u < Work::units; ++u) {
          const std::int64_t at = column + k * Work::width + u * 4 * unit + t;
          uint4 x[lane_rows];
#pragma unroll
          for (int h = 0; h < lane_rows; ++h) {
            x[h] = gather<T>(rows[h], at, columns);
          }
          work.multiply(x);
        }
      }
    }
    slice += count;
  }

  if constexpr (BORDER) {
#pragma unroll
    for (int h = 0; h < lane_rows; ++h) {  // of the 4 lanes of a row, in the first of them
      work.border[h] += __shfl_down_sync(0xffffffffu, work.border[h], 2);
      work.border[h] += __shfl_down_sync(0xffffffffu, work.border[h], 1);
    }
  }
  // one warp after another, the same order each time
  __shared__ double sums[Work::entries + Work::border_entries];
  for (int w = 0; w < Work::threads / 32; ++w) {
    if (w == warp) {
      if constexpr (BORDER) {
#pragma unroll
        for (int h = 0; h < lane_rows; ++h) {
          if (t == 0 && (h < G || g == 0)) {
            put(sums + Work::entries + 8 * h + g, work.border[h], w == 0);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int h = 0; h < G; ++h) {
          put(sums + (8 * h + g) * Work::rows + 2 * t + c, work.left[2 * h + c], w == 0);
        }
        if constexpr (G == 2) {
          put(sums + (8 + g) * Work::rows + 8 + 2 * t + c, work.right[c], w == 0);
        }
      }
    }
    __syncthreads();
  }
  double* part =
      parts + (static_cast<std::int64_t>(blockIdx.z) * gridDim.x + share) * Work::entries;
  for (int e = threadIdx.x; e < Work::entries; e += Work::threads) {
    if (e % Work::rows <= e / Work::rows) {
      put(part + e, sums[e], begin);
    }
  }
  if constexpr (BORDER) {
    double* borders = parts + gridDim.x * Work::entries + share * Work::border_entries;
    for (int e = threadIdx.x; e <= Work::rows; e += Work::threads) {
      put(borders + e, sums[Work::entries + e], begin);
    }
  }
}

}  // namespace

}  // namespace gradsurgery::cuda
