// Products of rows with rows, G = J Jᵀ: each block of threads sums a share of the columns, a second
// kernel adds the shares in their order.
#include <type_traits>

#include "gramian_border.cuh"
#include "gramian_fragments.cuh"
#include "gramian_small.cuh"
#include "gramian_sums.cuh"
#include "gramian_tiled.cuh"

namespace gradsurgery::cuda {

namespace {

// G is computed in square tiles of rows: the smallest that holds all rows, 64 from 33 rows on.
__host__ __device__ constexpr int tile_of(std::int64_t m) {
  return m <= 2 ? 2 : m <= 4 ? 4 : m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;
}

// Blocks of threads per launch at most, the same on every GPU so that sums are the same too: two of
// 256 threads for each of an H200's 132 multiprocessors, twice; smaller ones come in twice as many.
constexpr std::int64_t max_blocks(int tile) { return blocks(tile == 64 ? 512 : 1024); }

constexpr int add_threads = 256;

// Adds the shares, a warp for each product, and mirrors it.
__global__ void __launch_bounds__(add_threads)
    add_kernel(const double* parts, std::int64_t shares, std::int64_t first_tile,
               std::int64_t tiles, int tile, std::int64_t m, Products out, double least,
               Range range) {
  if (range.skip()) {
    return;
  }
  const std::int64_t entry =
      (static_cast<std::int64_t>(blockIdx.x) * add_threads + threadIdx.x) / 32;
  const std::int64_t i = out.first + entry / m, j = entry % m;
  const bool mine = i < m && j <= i;
  double sum = 0;
  if (mine) {
    const std::int64_t row = i / tile, at = row * (row + 1) / 2 + j / tile - first_tile;
    const double* part = parts + blockIdx.z * shares * tiles * tile * tile +
                         (at * tile + i % tile) * tile + j % tile;
    for (std::int64_t s = threadIdx.x % 32; s < shares; s += 32) {
      sum += part[s * tiles * tile * tile];
    }
  }
  sum = warp_sum(sum);
  if (!mine || threadIdx.x % 32 != 0) {
    return;
  }
  const std::int64_t p = m - out.first;
  if (j < out.first) {
    if (out.cross != nullptr) {
      out.cross[(i - out.first) * out.first + j] = sum;
    }
  } else if (out.gram != nullptr) {
    const std::int64_t pitch = out.pitch == 0 ? p : out.pitch;
    double* gram = out.gram + blockIdx.z * p * p;
    gram[(i - out.first) * pitch + j - out.first] = sum;
    gram[(j - out.first) * pitch + i - out.first] = sum;
  }
  range.note(i == j, sum, least);
}

// Adds the shares of products of the last row, a warp for each. They go as those of add_kernel do;
// of a Gramian, the last row and column alone.
__global__ void __launch_bounds__(add_threads)
    add_border_kernel(const double* parts, std::int64_t shares, std::int64_t groups, std::int64_t m,
                      Products out, double least, Range range) {
  constexpr int rows = Border<float>::rows;
  if (range.skip()) {
    return;
  }
  const std::int64_t j = (static_cast<std::int64_t>(blockIdx.x) * add_threads + threadIdx.x) / 32;
  double sum = 0;
  if (j < m) {
    for (std::int64_t s = threadIdx.x % 32; s < shares; s += 32) {
      sum += parts[s * groups * rows + j];
    }
  }
  sum = warp_sum(sum);
  if (j >= m || threadIdx.x % 32 != 0) {
    return;
  }
  const std::int64_t i = m - 1;
  if (j < out.first) {
    if (out.cross != nullptr) {
      out.cross[j] = sum;
    }
  } else if (out.gram != nullptr) {
    const std::int64_t pitch = out.pitch == 0 ? m - out.first : out.pitch;
    out.gram[(i - out.first) * pitch + j - out.first] = sum;
    out.gram[(j - out.first) * pitch + i - out.first] = sum;
  }
  range.note(i == j, sum, least);
}

struct Plan {
  int tile;
  std::int64_t first_tile, tiles, shares;
  bool border = false;  // one row more, in the same read

  Plan(std::int64_t batch, std::int64_t m, std::int64_t first) : tile(tile_of(m)) {
    auto below = [](std::int64_t rows) { return rows * (rows + 1) / 2; };
    first_tile = below(first / tile);
    tiles = below((m + tile - 1) / tile) - first_tile;
    shares = std::max<std::int64_t>(1, max_blocks(tile) / std::max<std::int64_t>(1, tiles * batch));
  }
};

// Whether float64 takes at most twice as long as float32, as on the GPUs of data centers.
bool fast_doubles(int device) {
  int ratio = 0;
  check_cuda(cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device),
             "cudaDeviceGetAttribute");
  return ratio <= 2;
}

void add_border(const DeviceRows& rows, const Products& out, const double* parts,
                std::int64_t shares, double least, Range range) {
  const std::int64_t groups = slices_of(rows.m, Border<float>::rows);
  const dim3 warps((rows.m * 32 + add_threads - 1) / add_threads);
  launch("gramian: sum of the border", &add_border_kernel, warps, add_threads, rows.stream, parts,
         shares, groups, rows.m, out, least, range);
}

template <typename T, typename A>
void multiply(const DeviceRows& rows, const Products& out, double* parts, Plan plan, Range range) {
  auto run = [&](auto kernel, int width, unsigned threads, auto... more) {
    std::int64_t most = 0;
    rows.for_tables(
        [&](const Table& table, bool) { most = std::max(most, slices_of(table, width)); });
    plan.shares = std::clamp<std::int64_t>(most, 1, plan.shares);
    const dim3 grid(plan.shares, plan.tiles, rows.batch);
    rows.for_tables([&](const Table& table, bool begin) {
      launch("gramian", kernel, grid, threads, rows.stream, table, slices_of(table, width), more...,
             parts, begin, range);
    });
  };
  auto small = [&](auto tile) {
    using Work = Small<T, A, tile>;
    run(&small_kernel<T, A, tile>, Work::width, Work::threads);
  };
  auto tiled = [&](auto tile) {
    using Work = Tiled<T, A, tile>;
    run(&tiled_kernel<T, A, tile>, Work::width, Work::threads, plan.first_tile);
  };
  auto fragments = [&](auto groups, auto border) {
    using Work = Fragments<T, A, groups, border>;
    run(&fragments_kernel<T, A, groups, border>, Work::width, Work::threads);
  };
  // 5 to 16 rows go to tensor cores, unless float64 is slow there
  constexpr bool single = std::is_same_v<T, float> && std::is_same_v<A, float>;
  switch (plan.tile) {
    case 2:
      small(std::integral_constant<int, 2>{});
      break;
    case 4:
      small(std::integral_constant<int, 4>{});
      break;
    case 8:
      if constexpr (single) {
        small(std::integral_constant<int, 8>{});
      } else {
        const std::integral_constant<int, 1> groups;
        plan.border ? fragments(groups, std::true_type{}) : fragments(groups, std::false_type{});
      }
      break;
    case 16:
      if constexpr (single) {
        tiled(std::integral_constant<int, 16>{});
      } else {
        const std::integral_constant<int, 2> groups;
        plan.border ? fragments(groups, std::true_type{}) : fragments(groups, std::false_type{});
      }
      break;
    case 32:
      tiled(std::integral_constant<int, 32>{});
      break;
    default:
      tiled(std::integral_constant<int, 64>{});
  }
  // the bounds of the CPU's in_range(): products of values below 1e-17 lose digits in float32
  const double least = 1e-34 * static_cast<double>(rows.n);
  const std::int64_t m = rows.m - plan.border, entries = (m - out.first) * m;
  Products within = out;
  if (plan.border) {
    within.pitch = rows.m;
  }
  const dim3 grid((entries * 32 + add_threads - 1) / add_threads, 1, rows.batch);
  launch("gramian: sum", &add_kernel, grid, add_threads, rows.stream, parts, plan.shares,
         plan.first_tile, plan.tiles, plan.tile, m, within, least, range);
  if (plan.border) {
    const double* borders = parts + plan.shares * plan.tile * plan.tile;
    add_border(rows, out, borders, plan.shares, least, range);
  }
}

// The products of the last row.
void border(const DeviceRows& rows, const Products& out, double* parts) {
  const std::int64_t groups = slices_of(rows.m, Border<float>::rows);
  dispatch(rows.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Work = Border<T>;
    std::int64_t most = 0;
    rows.for_tables(
        [&](const Table& table, bool) { most = std::max(most, slices_of(table, Work::width)); });
    const std::int64_t limit = std::max<std::int64_t>(1, max_blocks(Work::rows) / groups);
    const std::int64_t shares = std::clamp<std::int64_t>(most, 1, limit);
    const dim3 grid(shares, groups);
    rows.for_tables([&](const Table& table, bool begin) {
      launch("gramian: border", &border_kernel<T>, grid, Work::threads, rows.stream, table,
             slices_of(table, Work::width), parts, begin);
    });
    cuda::add_border(rows, out, parts, shares);
  });
}

// Values of all tiles: one row more can ask for many.
std::int64_t tile_values(std::int64_t m) {
  const Plan plan(1, m, 0);
  return plan.tiles * plan.tile * plan.tile;
}

}  // namespace

void add_border(const DeviceRows& rows, const Products& out, const double* parts,
                std::int64_t shares) {
  add_border(rows, out, parts, shares, 0, {nullptr, false});
}

std::int64_t row_products_scratch(std::int64_t batch, std::int64_t m) {
  const Plan plan(batch, m, 0);
  // shares fill up the blocks of a launch, unless tiles alone do
  return 2 + std::max(max_blocks(plan.tile), batch * plan.tiles) * plan.tile * plan.tile;
}

void row_products(const DeviceRows& rows, Products out, double* scratch, bool precise,
                  bool fallback) {
  if (rows.m == out.first || rows.batch == 0) {
    return;
  }
  // tiles of so few rows hold a border, too
  const bool bordered = rows.batch == 1 && rows.m > 4;
  if (bordered && rows.m - out.first == 1) {
    border(rows, out, scratch + 2);
    return;
  }
  precise = precise || rows.n < few_columns;
  const bool one_more = bordered && out.first == 0 && (rows.m == 9 || rows.m == 17);
  bool fragments = rows.m > 4 && (rows.m <= 16 || one_more);
  if (fragments && rows.dtype == Dtype::float32 && !precise) {
    fragments = precise = fast_doubles(rows.device);
  }
  if (bordered && !fragments && out.first == 0 && tile_values(rows.m - 1) < tile_values(rows.m) &&
      last_source_rows(rows) == 1) {
    out.pitch = rows.m;
    row_products(without_last_source(rows), out, scratch, precise, fallback);
    border(rows, out, scratch + 2);
    return;
  }
  Plan plan(rows.batch, rows.m - (fragments && one_more), out.first);
  plan.border = fragments && one_more;
  Range range{fallback ? reinterpret_cast<int*>(scratch) : nullptr, false};
  double* parts = scratch + 2;  // 16 bytes on
  dispatch(rows.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (!precise) {
        multiply<T, float>(rows, out, parts, plan, range);
        if (!fallback) {
          return;
        }
        range.repeat = true;
      } else {
        range.flag = nullptr;
      }
    } else {
      range.flag = nullptr;
    }
    multiply<T, double>(rows, out, parts, plan, range);
  });
}

}  // namespace gradsurgery::cuda

namespace gradsurgery {

namespace {

cuda::DeviceRows checked_rows(const Sources& sources, const Tensor& out, const Tensor& scratch) {
  const cuda::DeviceRows rows = cuda::make_device_rows(sources, "sources");
  cuda::check_result(out, Dtype::float64, rows.m * rows.m, rows.device, "out");
  cuda::check_result(scratch, Dtype::float64, gramian_scratch(rows.m), rows.device, "scratch");
  return rows;
}

}  // namespace

std::int64_t gramian_scratch(std::int64_t m) { return cuda::row_products_scratch(1, m); }

void gramian_cuda(const Sources& sources, const Tensor& out, const Tensor& scratch, bool precise,
                  bool repeat) {
  const cuda::DeviceRows rows = checked_rows(sources, out, scratch);
  const cuda::DeviceGuard guard(rows.device);
  cuda::row_products(rows, {out.data_as<double>(), nullptr, 0}, scratch.data_as<double>(), precise,
                     repeat);
}

void gramian_border_cuda(const Sources& sources, const Tensor& out, const Tensor& scratch) {
  const cuda::DeviceRows rows = checked_rows(sources, out, scratch);
  check(rows.m > 4, "sources have ", rows.m, " rows; with fewer than 5, take the whole Gramian");
  const cuda::DeviceGuard guard(rows.device);
  cuda::border(rows, {out.data_as<double>(), nullptr, 0}, scratch.data_as<double>() + 2);
}

}  // namespace gradsurgery
