// The kernels of gramian.cu that read rows: up to 8 in registers, more through shared memory.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace gradsurgery::cuda {

namespace {

// A float sum holds the products of this many columns at most, then goes into a double sum: off by
// 1e-7 of its value or so. Many of them average that out.
constexpr int float_run = 32;

// Fewer columns make few sums, and take no longer in float64: the time goes into the launches.
#ifdef GRADSURGERY_EMULATE_CUDA
constexpr std::int64_t few_columns = 256;  // for tests: a block of threads takes milliseconds there
#else
constexpr std::int64_t few_columns = 1 << 14;
#endif

// Float products that left float's range; null where nobody asks.
struct Range {
  int* flag;
  bool repeat;  // this launch is the repetition in float64: nothing to do unless the flag is set

  __device__ bool skip() const { return repeat && *flag == 0; }
  __device__ void clear() const {
    if (flag != nullptr && !repeat && threadIdx.x + blockIdx.x + blockIdx.y + blockIdx.z == 0) {
      *flag = 0;
    }
  }
};

// Adds to, or begins, one value of a share.
__device__ inline void put(double* share, double value, bool begin) {
  *share = begin ? value : *share + value;
}

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

// 16 bytes of values, one access to shared memory.
template <typename A>
struct alignas(16) Pack {
  A values[16 / sizeof(A)];
};

// More rows: slices of 2 tiles of rows go through shared memory, and each thread multiplies 4 rows
// with 4. Threads come in groups that each fill a tile of G; the groups share out the columns.
template <typename T, typename A, int TILE>
struct Tiled {
  static constexpr int threads = 256;
  static constexpr int resident = sizeof(T) == 8 ? 1 : 2;  // float64 on its way needs 32 registers
  static constexpr int side = TILE / 4;  // threads along a tile's side; their rows are `side` apart
  static constexpr int groups = threads / (side * side);
  static constexpr int values = 2048;           // of a slice of one tile of rows
  static constexpr int width = values / TILE;   // columns of a slice
  static constexpr int lanes = 16 / sizeof(A);  // columns in one access to shared memory
  // rows are one access apart in their banks: 8 rows are read at a time without a conflict
  static constexpr int pitch = width + lanes;
  static constexpr int loads = values / per_unit<T> / threads;        // units each thread moves
  static constexpr int per_row = width / per_unit<T>;                 // units of a row
  static constexpr int run = std::max(1, float_run* groups / width);  // slices between flushes
  static_assert(loads >= 1 && per_row * per_unit<T> == width && width % (groups * lanes) == 0);
};

// parts [batch, gridDim.x, gridDim.y, TILE, TILE]; tile blockIdx.y + first_tile of the lower
// triangle of tiles, by rows
template <typename T, typename A, int TILE>
__global__ void __launch_bounds__(256, Tiled<T, A, TILE>::resident)
    tiled_kernel(const __grid_constant__ Table table, std::int64_t slices, std::int64_t first_tile,
                 double* parts, bool begin, Range range) {
  using Work = Tiled<T, A, TILE>;
  constexpr int lanes = Work::lanes, pitch = Work::pitch, side = Work::side;
  if (range.skip()) {
    return;
  }
  range.clear();
  __shared__ Row rows[2][TILE];
  alignas(16) __shared__ A tiles[2][TILE * pitch];
  __shared__ double result[Work::groups > 1 ? TILE * TILE : 1];

  std::int64_t tile_column = first_tile + blockIdx.y, tile_row = 0;
  while (tile_column > tile_row) {
    tile_column -= ++tile_row;
  }
  const int sides = tile_row == tile_column ? 1 : 2;  // tiles to load: on the diagonal they are one
  const int t = threadIdx.x;
  const int group = t / (side * side), ty = t / side % side, tx = t % side;

  A sums[4][4] = {};
  double totals[4][4] = {};
  auto flush = [&] {
    if constexpr (!std::is_same_v<A, double>) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          totals[r][c] += static_cast<double>(sums[r][c]);
          sums[r][c] = 0;
        }
      }
    }
  };

  Walk walk;
  int block = -1, since = 0;
  bool units = false, fast = false;
  std::int64_t column = 0;
  uint4 next[2][Work::loads];
  // finds a slice and, if it comes in whole units, sends for it
  auto fetch = [&](std::int64_t slice) {
    column = walk.seek(table, slice, Work::width);
    if (block != walk.block) {
      block = walk.block;
      bool good = true;
      if (t < 2 * TILE) {  // rows of the former block were last read two barriers ago
        const std::int64_t tile = t < TILE ? tile_row : tile_column;
        const Row row = row_of(table, block, tile * TILE + t % TILE, blockIdx.z);
        rows[t / TILE][t % TILE] = row;
        good = in_units<T>(row);
      }
      units = __syncthreads_and(good);
    }
    fast = units && column + Work::width <= table.columns[block];
    if (fast) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int l = 0; l < Work::loads; ++l) {
          const int u = l * Work::threads + t;
          const char* data = s < sides ? rows[s][u / Work::per_row].data : nullptr;
          const std::int64_t at = column + u % Work::per_row * per_unit<T>;
          next[s][l] = data == nullptr ? make_uint4(0, 0, 0, 0)
                                       : *reinterpret_cast<const uint4*>(data + at * sizeof(T));
        }
      }
    }
  };

  const std::int64_t share = blockIdx.x, stop = slices * (share + 1) / gridDim.x;
  std::int64_t slice = slices * share / gridDim.x;
  if (slice < stop) {
    fetch(slice);
  }
  for (; slice < stop; ++slice) {
    __syncthreads();  // the former slice is used up
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s >= sides) {
        break;
      }
      if (fast) {
#pragma unroll
        for (int l = 0; l < Work::loads; ++l) {
          const int u = l * Work::threads + t;
          A* to = tiles[s] + u / Work::per_row * pitch + u % Work::per_row * per_unit<T>;
#pragma unroll
          for (int v = 0; v < per_unit<T>; v += lanes) {
            Pack<A> pack;
#pragma unroll
            for (int k = 0; k < lanes; ++k) {
              pack.values[k] = static_cast<A>(widen(value_of<T>(next[s][l], v + k)));
            }
            *reinterpret_cast<Pack<A>*>(to + v) = pack;
          }
        }
      } else {
        // any strides, and the end of a block
        for (int e = t; e < Work::values; e += Work::threads) {
          const int i = e / Work::width, j = e % Work::width;
          const Row row = rows[s][i];
          const std::int64_t at = column + j;
          tiles[s][i * pitch + j] =
              at < table.columns[block] && row.data != nullptr
                  ? static_cast<A>(widen(*reinterpret_cast<const T*>(row.data + at * row.column)))
                  : A(0);
        }
      }
    }
    __syncthreads();
    if (slice + 1 < stop) {
      fetch(slice + 1);
    }
    const A* above = tiles[0];
    const A* left = tiles[sides - 1];
#pragma unroll 1
    for (int j = group * lanes; j < Work::width; j += Work::groups * lanes) {
      Pack<A> a[4], b[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[r] = *reinterpret_cast<const Pack<A>*>(above + (ty + r * side) * pitch + j);
        b[r] = *reinterpret_cast<const Pack<A>*>(left + (tx + r * side) * pitch + j);
      }
#pragma unroll
      for (int v = 0; v < lanes; ++v) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sums[r][c] += a[r].values[v] * b[c].values[v];
          }
        }
      }
    }
    if (++since == Work::run) {
      since = 0;
      flush();
    }
  }
  flush();

  double* part = parts + ((static_cast<std::int64_t>(blockIdx.z) * gridDim.x + share) * gridDim.y +
                          blockIdx.y) *
                             TILE * TILE;
  for (int g = 0; g < Work::groups; ++g) {
    if (g == group) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int e = (ty + r * side) * TILE + tx + c * side;
          const double total = std::is_same_v<A, double> ? sums[r][c] : totals[r][c];
          if constexpr (Work::groups == 1) {
            put(part + e, total, begin);
          } else {
            put(result + e, total, g == 0);
          }
        }
      }
    }
    __syncthreads();
  }
  if constexpr (Work::groups > 1) {
    for (int e = t; e < TILE * TILE; e += Work::threads) {
      put(part + e, result[e], begin);
    }
  }
}

}  // namespace

}  // namespace gradsurgery::cuda
