// Weighted sums of rows, outs = W J: every thread sums the rows over its own columns in float64 and
// writes them, so one read of the rows for up to four outs.
//
// A float32 value costs one conversion and p double multiply-adds for its 4 bytes; with p = 1 that
// is 1.2e12 of each a second at an H200's 4.8 TB/s, and it does 1.7e13 double multiply-adds (data
// sheets).
#include "combine_products.cuh"
#include "device.cuh"

namespace gradsurgery::cuda {

namespace {

constexpr int threads = 256;
// Blocks of threads at most; each takes neighboring slices.
constexpr std::int64_t max_blocks = blocks(1 << 16);

template <typename T, int R>
struct Sums {
  // of one out: enough loads on their way to keep the memory busy where rows are few
  static constexpr int units = R > 1 ? 1 : sizeof(T) == 8 ? 2 : 16 / per_unit<T>;
  static constexpr int depth = units == 4 ? 2 : 4;    // rows whose loads are on their way at a time
  static constexpr int values = units * per_unit<T>;  // columns of each thread
  static constexpr int width = threads * values;      // columns of a slice
  static constexpr int resident =
      R * values <= 16 ? 2 : 1;  // two of 256 threads have 128 registers
};

// The weights [p, m] of one matrix; those of outs past the last are zero.
struct Weights {
  const double* values;
  std::int64_t p, m;

  __device__ double at(std::int64_t r, std::int64_t i) const {
    return r < p ? __ldg(values + r * m + i) : 0;
  }
};

// Groups of R outs are taken from the last to the first: where weights are triangular, a group
// reads only rows that no group before it has written, so that outs may be rows.
template <typename T, int R>
__global__ void __launch_bounds__(threads, Sums<T, R>::resident)
    combine_kernel(const __grid_constant__ Table table, std::int64_t slices, int sources,
                   std::int64_t p, const double* all_weights, bool triangular) {
  using Work = Sums<T, R>;
  constexpr int unit = per_unit<T>;
  const std::int64_t m = table.m - p, z = blockIdx.z;
  const Weights weights{all_weights + z * p * m, p, m};
  Walk walk;
  int block = -1;
  bool units = false;
  const Span* spans = table.spans;
  const std::int64_t share = blockIdx.x, stop = slices * (share + 1) / gridDim.x;
  for (std::int64_t slice = slices * share / gridDim.x; slice < stop; ++slice) {
    const std::int64_t column = walk.seek(table, slice, Work::width);
    if (block != walk.block) {
      block = walk.block;
      spans = table.spans + block * table.sources;
      units = rows_in_units<T>(table, block, z);
    }
    const std::int64_t columns = table.columns[block];
    const bool fast = units && column + Work::width <= columns;
    for (std::int64_t r = (p - 1) / R * R; r >= 0; r -= R) {
      const std::int64_t limit = triangular ? std::int64_t{r + R < m ? r + R : m} : m;
      if (fast) {
        double sums[R][Work::values] = {};
        const std::int64_t at = column + threadIdx.x * unit;
        std::int64_t i = 0;
        for (int s = 0; s < sources && i < limit; ++s) {
          const Span& span = spans[s];
          const char* data = span.data + z * span.batch + at * sizeof(T);
          const std::int64_t count = span.rows < limit - i ? span.rows : limit - i;
#pragma unroll 1
          for (std::int64_t first = 0; first < count; first += Work::depth) {
            uint4 values[Work::depth][Work::units];
#pragma unroll
            for (int d = 0; d < Work::depth; ++d) {
#pragma unroll
              for (int u = 0; u < Work::units; ++u) {
                if (first + d < count) {
                  values[d][u] = *reinterpret_cast<const uint4*>(data + (first + d) * span.row +
                                                                 u * threads * 16);
                }
              }
            }
#pragma unroll
            for (int d = 0; d < Work::depth; ++d) {
              if (first + d < count) {
#pragma unroll
                for (int k = 0; k < R; ++k) {
                  const double weight = weights.at(r + k, i + first + d);
#pragma unroll
                  for (int j = 0; j < Work::values; ++j) {
                    sums[k][j] += weight * static_cast<double>(
                                               widen(value_of<T>(values[d][j / unit], j % unit)));
                  }
                }
              }
            }
          }
          i += span.rows;
        }
#pragma unroll
        for (int k = 0; k < R; ++k) {
          if (r + k < p) {
            const Row row = row_of(table, block, m + r + k, z);
#pragma unroll
            for (int u = 0; u < Work::units; ++u) {
              char* to = const_cast<char*>(row.data) + at * sizeof(T) + u * threads * 16;
              *reinterpret_cast<uint4*>(to) = unit_of<T>(sums[k] + u * unit);
            }
          }
        }
      } else {
        // any strides, and the end of a block; neighbors in a warp take neighboring columns
#pragma unroll 1
        for (int j = 0; j < Work::values; ++j) {
          const std::int64_t at = column + j * threads + threadIdx.x;
          if (at >= columns) {
            break;
          }
          double sums[R] = {};
          std::int64_t i = 0;
          for (int s = 0; s < sources && i < limit; ++s) {
            const Span& span = spans[s];
            const char* data = span.data + z * span.batch + at * span.column;
            const std::int64_t count = span.rows < limit - i ? span.rows : limit - i;
            for (std::int64_t l = 0; l < count; ++l) {
              const double value = widen(*reinterpret_cast<const T*>(data + l * span.row));
#pragma unroll
              for (int k = 0; k < R; ++k) {
                sums[k] += weights.at(r + k, i + l) * value;
              }
            }
            i += span.rows;
          }
#pragma unroll
          for (int k = 0; k < R; ++k) {
            if (r + k < p) {
              const Row row = row_of(table, block, m + r + k, z);
              narrow(sums[k], reinterpret_cast<T*>(const_cast<char*>(row.data) + at * row.column));
            }
          }
        }
      }
    }
  }
}

// first and last byte of a span's values
std::pair<const char*, const char*> extent(const Span& span, std::int64_t columns) {
  std::int64_t low = 0, high = 0;
  for (auto [count, stride] : {std::pair{span.rows, span.row}, std::pair{columns, span.column}}) {
    (stride < 0 ? low : high) += (count - 1) * stride;
  }
  return {span.data + low, span.data + high};
}

bool overlap(const DeviceRows& rows, const DeviceRows& outs) {
  for (std::size_t k = 0; k < rows.columns.size(); ++k) {
    for (int s = 0; s < rows.sources; ++s) {
      for (int o = 0; o < outs.sources; ++o) {
        const auto [begin, end] = extent(rows.spans[k * rows.sources + s], rows.columns[k]);
        const auto [first, last] = extent(outs.spans[k * outs.sources + o], rows.columns[k]);
        if (rows.columns[k] > 0 && begin <= last && first <= end) {
          return true;
        }
      }
    }
  }
  return false;
}

// One sum of 4 to 17 rows, and its products: joined, the rows and the sum.
void sum_products(const DeviceRows& joined, const double* weights, const Products& out,
                  double* parts) {
  dispatch(joined.dtype, [&](auto type) {
    auto run = [&](auto most_rows) {
      using T = typename decltype(type)::type;
      using Work = SumProducts<T, most_rows>;
      std::int64_t most = 0;
      joined.for_tables(
          [&](const Table& table, bool) { most = std::max(most, slices_of(table, Work::width)); });
      const std::int64_t shares = std::clamp<std::int64_t>(most, 1, Work::max_blocks);
      joined.for_tables([&](const Table& table, bool begin) {
        launch("combine: products", &sum_products_kernel<T, most_rows>, dim3(shares), Work::threads,
               joined.stream, table, slices_of(table, Work::width), weights, parts, begin);
      });
      add_border(joined, out, parts, shares);
    };
    joined.m <= 10 ? run(std::integral_constant<int, 9>{}) : run(std::integral_constant<int, 17>{});
  });
}

}  // namespace

void weighted_sums(const DeviceRows& rows, const double* weights, const DeviceRows& outs,
                   bool triangular) {
  check(outs.m <= 4 || triangular || !overlap(rows, outs),
        "outs that are rows must be four at most, or their weights triangular; got ", outs.m);
  if (outs.m == 0 || rows.n == 0 || rows.batch == 0) {
    return;
  }
  join(rows, outs).for_tables([&](const Table& table, bool) {
    dispatch(rows.dtype, [&](auto type) {
      auto run = [&](auto group) {
        constexpr int R = group;
        using T = typename decltype(type)::type;
        const std::int64_t slices = slices_of(table, Sums<T, R>::width);
        if (slices > 0) {
          const dim3 grid(std::min(slices, max_blocks), 1, rows.batch);
          launch("combine", &combine_kernel<T, R>, grid, threads, rows.stream, table, slices,
                 rows.sources, outs.m, weights, triangular);
        }
      };
      if (outs.m == 1) {
        run(std::integral_constant<int, 1>{});
      } else if (outs.m == 2) {
        run(std::integral_constant<int, 2>{});
      } else {
        run(std::integral_constant<int, 4>{});
      }
    });
  });
}

}  // namespace gradsurgery::cuda

namespace gradsurgery {

void combine_cuda(const Sources& sources, const Tensor& weights, const Sources& outs,
                  const std::optional<Tensor>& cross, const std::optional<Tensor>& gram,
                  const std::optional<Tensor>& scratch) {
  const cuda::DeviceRows rows = cuda::make_device_rows(sources, "sources");
  const cuda::DeviceRows out = cuda::make_device_rows(outs, "outs");
  const std::int64_t m = rows.m, p = out.m;
  cuda::check_result(weights, Dtype::float64, p * m, rows.device, "weights");
  const cuda::DeviceGuard guard(rows.device);
  if (!cross && !gram) {
    cuda::weighted_sums(rows, weights.data_as<double>(), out, false);
    return;
  }
  cuda::Products products{nullptr, nullptr, m};
  if (cross) {
    cuda::check_result(*cross, Dtype::float64, p * m, rows.device, "cross");
    products.cross = cross->data_as<double>();
  }
  if (gram) {
    cuda::check_result(*gram, Dtype::float64, p * p, rows.device, "gram");
    products.gram = gram->data_as<double>();
  }
  check(scratch.has_value(), "cross and gram need scratch");
  cuda::check_result(*scratch, Dtype::float64, gramian_scratch(m + p), rows.device, "scratch");
  const cuda::DeviceRows joined = cuda::join(rows, out);
  if (p == 1 && joined.m > 4 && joined.m <= 18) {
    cuda::sum_products(joined, weights.data_as<double>(), products, scratch->data_as<double>());
    return;
  }
  // a second read, of the outs too: a thread holds its columns of the outs and not those of all
  // rows
  cuda::weighted_sums(rows, weights.data_as<double>(), out, false);
  cuda::row_products(joined, products, scratch->data_as<double>(), false, false);
}

}  // namespace gradsurgery
