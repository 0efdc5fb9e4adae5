// J = Rᵀ Q by CholeskyQR2, batched: the Gramians and the sums are row_products() and
// weighted_sums(), what lies between is done here, a block of threads for each matrix.
#include "dense.h"
#include "device.cuh"

namespace gradsurgery {

namespace {

using cuda::BlockTeam;

constexpr int max_threads = 512;

// Matrices are taken this many at a time: a grid has at most 65535 in its third dimension, and the
// scratch of a million small ones would be large.
constexpr std::int64_t max_batch = cuda::blocks(4096);

// From a Gramian [batch, m, m], which is overwritten, the weights W = L⁻¹ D and R = (D⁻¹ L)ᵀ, D the
// inverse norms; norms and rank only where not null.
__global__ void __launch_bounds__(max_threads, 1)
    factorize_kernel(double* grams, double* scales, double* weights, double* factors, double* norms,
                     std::int64_t* rank, std::int64_t m, double rtol, std::int64_t most) {
  const BlockTeam team;
  const std::int64_t b = blockIdx.x;
  double* gram = grams + b * m * m;
  double* scale = scales + b * m;
  double* weight = weights + b * m * m;
  double* factor = factors + b * m * m;
  if (norms != nullptr) {
    for (std::int64_t i = team.thread(); i < m; i += team.threads()) {
      norms[b * m + i] = std::sqrt(gram[i * m + i]);
    }
    team.sync();
  }
  dense::normalize(gram, scale, m, team);
  const std::int64_t taken = dense::ordered_cholesky(gram, m, m, rtol, most, team);
  dense::invert_lower(gram, weight, m, team);
  for (std::int64_t i = team.row(); i < m; i += team.rows()) {
    for (std::int64_t j = team.lane(); j < m; j += team.lanes()) {
      weight[i * m + j] *= scale[j];
      factor[i * m + j] = j >= i && scale[j] > 0 ? gram[j * m + i] / scale[j] : 0;
    }
  }
  if (rank != nullptr && team.thread() == 0) {
    rank[b] = taken;
  }
}

// R = R₂ R₁ of upper triangles [batch, m, m]
__global__ void __launch_bounds__(max_threads, 1)
    multiply_kernel(const double* seconds, const double* firsts, double* factors, std::int64_t m) {
  const BlockTeam team;
  const double* second = seconds + blockIdx.x * m * m;
  const double* first = firsts + blockIdx.x * m * m;
  double* factor = factors + blockIdx.x * m * m;
  for (std::int64_t i = team.row(); i < m; i += team.rows()) {
    for (std::int64_t j = team.lane(); j < m; j += team.lanes()) {
      double sum = 0;
      for (std::int64_t l = i; l <= j; ++l) {
        sum += second[i * m + l] * first[l * m + j];
      }
      factor[i * m + j] = sum;
    }
  }
}

// Matrices [begin, begin + count) of a batch.
Tensor part(const Tensor& batch, std::int64_t begin, std::int64_t count) {
  Tensor out = batch;
  const std::int64_t size = batch.dtype == Dtype::int64 ? 8 : dispatch(batch.dtype, [](auto type) {
    return static_cast<std::int64_t>(sizeof(typename decltype(type)::type));
  });
  out.data = batch.data_as<char>() + begin * batch.strides[0] * size;
  out.shape[0] = count;
  return out;
}

void orthonormalize_part(const Tensor& rows, const Tensor& q, double* factor, double* norms,
                         std::int64_t* rank, double* scratch, double rtol) {
  const cuda::DeviceRows source = cuda::make_device_rows(rows, "rows");
  const cuda::DeviceRows out = cuda::make_device_rows(q, "q");
  const std::int64_t batch = source.batch, m = source.m, square = batch * m * m;
  double* gram = scratch;
  double* weights = gram + square;
  double* first = weights + square;
  double* second = first + square;
  double* scale = second + square;
  double* parts = scale + batch * m;
  parts += (parts - scratch) % 2;  // 16 bytes apart
  const unsigned threads = m <= 32 ? 32 : m <= 128 ? 128 : max_threads;
  const dim3 grid(batch);

  cuda::row_products(source, {gram, nullptr, 0}, parts, true, false);
  cuda::launch("orthonormalize: factorize", &factorize_kernel, grid, threads, source.stream, gram,
               scale, weights, first, norms, rank, m, rtol, source.n);
  cuda::weighted_sums(source, weights, out, true);
  // Q is orthonormal to eps cond², 1e-4 at 1e6; a second pass leaves it so to rounding
  cuda::row_products(out, {gram, nullptr, 0}, parts, true, false);
  cuda::launch("orthonormalize: factorize", &factorize_kernel, grid, threads, source.stream, gram,
               scale, weights, second, static_cast<double*>(nullptr),
               static_cast<std::int64_t*>(nullptr), m, 0.0, m);
  cuda::weighted_sums(out, weights, out, true);
  cuda::launch("orthonormalize: multiply", &multiply_kernel, grid, threads, source.stream, second,
               first, factor, m);
}

}  // namespace

std::int64_t orthonormalize_scratch(std::int64_t batch, std::int64_t m) {
  batch = std::min(batch, max_batch);
  return batch * (4 * m * m + m) + 1 + cuda::row_products_scratch(batch, m);
}

void orthonormalize_cuda(const Tensor& rows, const Tensor& q, const Tensor& factor,
                         const Tensor& norms, const Tensor& rank, const Tensor& scratch,
                         double rtol) {
  check(rows.ndim == 3, "rows must be [b, m, n], got ", rows.shape_text());
  const std::int64_t batch = rows.size(0), m = rows.size(1);
  const int device = rows.device_index;
  check(q.ndim == 3 && std::equal(rows.shape, rows.shape + 3, q.shape) && q.dtype == rows.dtype,
        "q must be like rows, ", rows.shape_text(), ", got ", q.shape_text());
  cuda::check_result(factor, Dtype::float64, batch * m * m, device, "factor");
  cuda::check_result(norms, Dtype::float64, batch * m, device, "norms");
  cuda::check_result(rank, Dtype::int64, batch, device, "rank");
  const std::int64_t needed = orthonormalize_scratch(batch, m);
  cuda::check_result(scratch, Dtype::float64, needed, device, "scratch");
  const cuda::DeviceGuard guard(device);
  for (std::int64_t b = 0; b < batch; b += max_batch) {
    const std::int64_t count = std::min(batch - b, max_batch);
    orthonormalize_part(part(rows, b, count), part(q, b, count),
                        factor.data_as<double>() + b * m * m, norms.data_as<double>() + b * m,
                        rank.data_as<std::int64_t>() + b, scratch.data_as<double>(), rtol);
  }
}

}  // namespace gradsurgery
