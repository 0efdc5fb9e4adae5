// Solves on a batch of Gramians: a block of threads for each matrix, with the algorithms of
// dense.h. Compiled, not yet run on a GPU.
#include "dense.h"
#include "device.cuh"

namespace gradsurgery {

namespace {

// The workspace of a matrix: a copy of it, three vectors and an order. Up to 43 rows it fits 16 KiB
// of shared memory, of which an H200's multiprocessor holds 14; else it is in scratch.
constexpr std::int64_t shared_values = 2048;

__host__ __device__ constexpr std::int64_t workspace(std::int64_t m) { return m * m + 4 * m; }

// Blocks of threads at most, each with a workspace.
constexpr std::int64_t max_blocks = cuda::blocks(1024);

constexpr int max_threads = 512;

__global__ void __launch_bounds__(max_threads)
    projection_weights_kernel(const double* gramian,   // [batch, m, m]
                              const double* products,  // [batch, m]
                              double* coefficients,    // [batch, m]
                              std::int64_t* rank,      // [batch]
                              double* margin,          // [batch]
                              double* scratch,         // [gridDim.x, workspace(m)] or unused
                              std::int64_t batch, std::int64_t m, double rtol) {
  __shared__ double shared[shared_values];
  const cuda::BlockTeam team;
  const std::int64_t thread = team.thread(), threads = team.threads();
  double* gram = workspace(m) <= shared_values ? shared : scratch + blockIdx.x * workspace(m);
  double* scale = gram + m * m;
  double* column = scale + m;
  double* solution = column + m;
  std::int64_t* order = reinterpret_cast<std::int64_t*>(solution + m);
  for (std::int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    for (std::int64_t e = thread; e < m * m; e += threads) {
      gram[e] = gramian[b * m * m + e];
    }
    team.sync();
    dense::normalize(gram, scale, m, team);
    const std::int64_t taken =
        dense::pivoted_cholesky(gram, order, column, m, rtol, margin + b, team);
    for (std::int64_t i = thread; i < taken; i += threads) {
      solution[i] = products[b * m + order[i]] * scale[order[i]];
    }
    team.sync();
    dense::solve(gram, solution, m, taken, team);
    // order is a permutation: every coefficient is written once
    for (std::int64_t i = thread; i < m; i += threads) {
      coefficients[b * m + order[i]] = i < taken ? solution[i] * scale[order[i]] : 0;
    }
    if (thread == 0) {
      rank[b] = taken;
    }
    team.sync();  // before the workspace holds the next matrix
  }
}

}  // namespace

std::int64_t projection_weights_scratch(std::int64_t batch, std::int64_t m) {
  return workspace(m) <= shared_values ? 0 : std::min(batch, max_blocks) * workspace(m);
}

void projection_weights_cuda(const Tensor& gramian, const Tensor& products,
                             const Tensor& coefficients, const Tensor& rank, const Tensor& margin,
                             const Tensor& scratch, double rtol) {
  check(gramian.ndim >= 2, "gramian must be [..., m, m], got ", gramian.shape_text());
  const std::int64_t m = gramian.size(-1), batch = margin.numel();
  const int device = gramian.device_index;
  cuda::check_result(gramian, Dtype::float64, batch * m * m, device, "gramian");
  cuda::check_result(products, Dtype::float64, batch * m, device, "products");
  cuda::check_result(coefficients, Dtype::float64, batch * m, device, "coefficients");
  cuda::check_result(rank, Dtype::int64, batch, device, "rank");
  cuda::check_result(margin, Dtype::float64, batch, device, "margin");
  const std::int64_t needed = projection_weights_scratch(batch, m);
  cuda::check_result(scratch, Dtype::float64, needed, device, "scratch");
  if (batch == 0) {
    return;
  }
  const cuda::DeviceGuard guard(device);
  const unsigned threads = m <= 32 ? 32 : m <= 128 ? 128 : max_threads;
  cuda::launch("projection_weights", &projection_weights_kernel, dim3(std::min(batch, max_blocks)),
               threads, static_cast<cudaStream_t>(gramian.stream), gramian.data_as<double>(),
               products.data_as<double>(), coefficients.data_as<double>(),
               rank.data_as<std::int64_t>(), margin.data_as<double>(), scratch.data_as<double>(),
               batch, m, rtol);
}

}  // namespace gradsurgery
