// What the kernels share: rows as a kernel sees them, the walk over slices of their columns,
// storage types, a block of threads as a team, and launches.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "launchers.h"
#include "tensor.h"

namespace gradsurgery::cuda {

// Where kernels run, and the blocks of threads in a launch where `wanted` suit a GPU. On the host,
// see tests/emulated_cuda, few, so that small inputs too give each more than one piece of work.
#ifdef GRADSURGERY_EMULATE_CUDA
constexpr Device gpu = Device::cpu;
constexpr std::int64_t blocks(std::int64_t) { return 5; }
#else
constexpr Device gpu = Device::cuda;
constexpr std::int64_t blocks(std::int64_t wanted) { return wanted; }
#endif

// Some rows of one block of columns; strides in bytes.
struct Span {
  char* data;
  std::int64_t rows;
  std::int64_t row;     // from a row to the next
  std::int64_t column;  // from a column to the next
  std::int64_t batch;   // from a matrix of a batch to the next
};

// Blocks of columns as a kernel parameter: no copy to the device, and a CUDA graph keeps it. Kernel
// parameters have 4 KiB in all; jobs of more tensors take a launch for every 80.
struct Table {
  static constexpr int max_spans = 80;
  Span spans[max_spans];            // [blocks, sources]
  std::int64_t columns[max_spans];  // [blocks]
  std::int64_t m;                   // rows of all sources
  int sources;
  int blocks;
};
static_assert(sizeof(Table) <= 4096 - 128);

__host__ __device__ inline std::int64_t slices_of(std::int64_t columns, std::int64_t width) {
  return (columns + width - 1) / width;
}

// A Jacobian on the device: m rows over blocks of columns; `batch` of them, equally far apart.
struct DeviceRows {
  Dtype dtype;
  std::int64_t m;  // rows
  std::int64_t n;  // columns of all blocks
  std::int64_t batch;
  int sources;
  std::vector<Span> spans;            // [blocks, sources]
  std::vector<std::int64_t> columns;  // [blocks]
  int device;
  cudaStream_t stream;

  // Calls f(table, first) for tables that together hold all blocks; the first may hold none.
  template <typename Function>
  void for_tables(Function&& f) const {
    const std::int64_t per_table = Table::max_spans / sources, count = columns.size();
    for (std::int64_t k = 0; k == 0 || k < count; k += per_table) {
      Table table{};
      table.m = m;
      table.sources = sources;
      table.blocks = static_cast<int>(std::min(per_table, count - k));
      std::copy_n(spans.begin() + k * sources, table.blocks * sources, table.spans);
      std::copy_n(columns.begin() + k, table.blocks, table.columns);
      f(table, k == 0);
    }
  }
};

inline std::int64_t slices_of(const Table& table, std::int64_t width) {
  std::int64_t count = 0;
  for (int k = 0; k < table.blocks; ++k) {
    count += slices_of(table.columns[k], width);
  }
  return count;
}

// The rows of all sources, in order; a source is the blocks [m_s, n_k] of some rows.
DeviceRows make_device_rows(const Sources& sources, const char* name);
// The rows of matrices [b, m, n], one block.
DeviceRows make_device_rows(const Tensor& matrices, const char* name);
// Both Jacobians' rows, over the same blocks.
DeviceRows join(const DeviceRows& above, const DeviceRows& below);
// How many rows the last source has, and all rows but those.
std::int64_t last_source_rows(const DeviceRows& rows);
DeviceRows without_last_source(const DeviceRows& rows);

// Where the products of rows i >= first with rows j go: to gram, [m - first, m - first], if j also
// is >= first, else to cross, [m - first, first]. Either may be null. `pitch`: from a row of gram
// to the next, if that is not m - first; of one matrix alone.
struct Products {
  double* gram;
  double* cross;
  std::int64_t first;
  std::int64_t pitch = 0;
};

// Of every matrix of a batch; `out` is the first one's. With `fallback`, products in float32 that
// overflow or underflow are done again in float64, as the CPU does, without asking the host.
void row_products(const DeviceRows& rows, Products out, double* scratch, bool precise,
                  bool fallback);
// Adds the shares of products of the last row, [shares, groups of 8 rows], and puts them there.
void add_border(const DeviceRows& rows, const Products& out, const double* parts,
                std::int64_t shares);
std::int64_t row_products_scratch(std::int64_t batch, std::int64_t m);  // for any `first`

// outs = weights rows for every matrix of a batch; weights [b, p, m]. `triangular`: weights [r, i]
// with i > r are zero; outs may then be the rows.
void weighted_sums(const DeviceRows& rows, const double* weights, const DeviceRows& outs,
                   bool triangular);

// Throws unless tensor is contiguous, of this dtype and on the device of `like`.
void check_result(const Tensor& tensor, Dtype dtype, std::int64_t numel, int device,
                  const char* name);

inline void check_cuda(cudaError_t code, const char* name) {
  check(code == cudaSuccess, name, ": ", cudaGetErrorString(code));
}

// Makes a device current, and the former one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device) {
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) {
      (void)cudaSetDevice(former_);  // was current: cannot fail in a way worth a throw here
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  const cudaError_t code =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t last = cudaGetLastError();
  check_cuda(code == cudaSuccess ? last : code, name);
}

// storage to arithmetic and back
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

__device__ inline void narrow(double value, double* out) { *out = value; }
__device__ inline void narrow(double value, float* out) { *out = static_cast<float>(value); }
// The bits by name: of a byte copy of a __half, ptxas 13.0 makes two stores of a byte, the lower
// one of the value converted to an integer.
__device__ inline void narrow(double value, Float16* out) {
  out->bits = __half_as_ushort(__float2half_rn(static_cast<float>(value)));
}
__device__ inline void narrow(double value, BFloat16* out) {
  const float single = static_cast<float>(value);
  std::uint32_t bits;
  memcpy(&bits, &single, sizeof(bits));
  // to nearest, ties to even; a NaN keeps a bit set
  out->bits = single != single ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// 16 bytes of a row are one access; they hold this many values.
template <typename T>
constexpr int per_unit = 16 / sizeof(T);

// Value v of a unit; v is a constant once loops are unrolled, so that the unit stays in registers.
template <typename T>
__device__ inline T value_of(const uint4& unit, int v) {
  const std::uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
  T value;
  if constexpr (sizeof(T) == 8) {
    const std::uint64_t bits = words[2 * v] | std::uint64_t{words[2 * v + 1]} << 32;
    memcpy(&value, &bits, sizeof(value));
  } else if constexpr (sizeof(T) == 4) {
    memcpy(&value, &words[v], sizeof(value));
  } else {
    value.bits = static_cast<std::uint16_t>(words[v / 2] >> 16 * (v % 2));
  }
  return value;
}

// The unit of sums[0, 1, ...], rounded.
template <typename T>
__device__ inline uint4 unit_of(const double* sums) {
  std::uint32_t words[4] = {};
#pragma unroll
  for (int v = 0; v < per_unit<T>; ++v) {
    T value;
    narrow(sums[v], &value);
    if constexpr (sizeof(T) == 8) {
      std::uint64_t bits;
      memcpy(&bits, &value, sizeof(bits));
      words[2 * v] = static_cast<std::uint32_t>(bits);
      words[2 * v + 1] = static_cast<std::uint32_t>(bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      memcpy(&words[v], &value, sizeof(value));
    } else {
      words[v / 2] |= std::uint32_t{value.bits} << 16 * (v % 2);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One row of one block of columns.
struct Row {
  const char* data;     // null past the last row, whose values are zeros
  std::int64_t column;  // bytes from a column to the next
};

// Row i of block k, of the matrix z of a batch.
__device__ inline Row row_of(const Table& table, int k, std::int64_t i, std::int64_t z) {
  for (int s = 0; s < table.sources; ++s) {
    const Span& span = table.spans[k * table.sources + s];
    if (i < span.rows) {
      return {span.data + z * span.batch + i * span.row, span.column};
    }
    i -= span.rows;
  }
  return {nullptr, 0};
}

// whether a row can be read by units, from any column that is a multiple of per_unit
template <typename T>
__device__ inline bool in_units(const Row& row) {
  return row.data == nullptr || (row.column == static_cast<std::int64_t>(sizeof(T)) &&
                                 reinterpret_cast<std::uintptr_t>(row.data) % 16 == 0);
}

// The same of all rows of block k.
template <typename T>
__device__ inline bool rows_in_units(const Table& table, int k, std::int64_t z) {
  bool units = true;
  for (int s = 0; s < table.sources; ++s) {
    const Span& span = table.spans[k * table.sources + s];
    units = units && in_units<T>({span.data + z * span.batch, span.column}) &&
            (span.rows == 1 || span.row % 16 == 0);
  }
  return units;
}

// The block that holds a slice, for slices that do not decrease.
struct Walk {
  int block = 0;
  std::int64_t first = 0;  // slice of the block

  // the column in its block where a slice of `width` columns begins
  __device__ std::int64_t seek(const Table& table, std::int64_t slice, std::int64_t width) {
    for (std::int64_t count; slice - first >= (count = slices_of(table.columns[block], width));) {
      first += count;
      ++block;
    }
    return (slice - first) * width;
  }
};

// The sum of a value over the lanes of a warp, in lane 0; the same order each time.
__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Adds to, or begins, one value of a share.
__device__ inline void put(double* share, double value, bool begin) {
  *share = begin ? value : *share + value;
}

// A block of threads as dense.h sees it: warps share out rows, lanes the values of a row.
struct BlockTeam {
  __device__ std::int64_t row() const { return threadIdx.x / 32; }
  __device__ std::int64_t rows() const { return blockDim.x / 32; }
  __device__ std::int64_t lane() const { return threadIdx.x % 32; }
  __device__ std::int64_t lanes() const { return 32; }
  __device__ std::int64_t thread() const { return threadIdx.x; }
  __device__ std::int64_t threads() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
};

}  // namespace gradsurgery::cuda
