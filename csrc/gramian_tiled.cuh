// Products of more than 8 rows, tile by tile through shared memory.
#pragma once

#include <type_traits>

#include "gramian_sums.cuh"

namespace gradsurgery::cuda {

namespace {

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
