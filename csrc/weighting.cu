// The problems of solves.h on a batch of Gramians: a block of threads for each. Compiled, not yet
// run on a GPU.
#include "device.cuh"
#include "solves.h"

namespace gradsurgery {

namespace {

// What a problem works in is in shared memory if it fits 16 KiB, of which an H200's multiprocessor
// holds 14, as it does up to 29 rows and, for most, 42; else in scratch.
constexpr std::int64_t shared_values = 2048;

// Blocks of threads at most, each with a workspace.
constexpr std::int64_t max_blocks = cuda::blocks(1024);

constexpr int max_threads = 256;

template <typename Problem>
__global__ void __launch_bounds__(max_threads, 1)
    solve_kernel(Problem problem,
                 double* scratch) {  // [gridDim.x, workspace] or unused
  __shared__ double shared[shared_values];
  const std::int64_t size = Problem::workspace(problem.m);
  double* work = size <= shared_values ? shared : scratch + blockIdx.x * size;
  for (std::int64_t b = blockIdx.x; b < problem.count; b += gridDim.x) {
    problem.solve(b, work, cuda::BlockTeam{});  // leaves when all threads do
  }
}

template <typename Problem>
std::int64_t scratch_size(std::int64_t count, std::int64_t m) {
  const std::int64_t size = Problem::workspace(m);
  return size <= shared_values ? 0 : std::min(count, max_blocks) * size;
}

// [batch, m, m] of a Gramian [..., m, m]
struct Shape {
  std::int64_t batch, m;
};

Shape shape_of(const Tensor& gramian) {
  check(gramian.ndim >= 2 && gramian.size(-1) == gramian.size(-2),
        "gramian must be [..., m, m], got ", gramian.shape_text());
  const std::int64_t m = gramian.size(-1);
  std::int64_t batch = 1;
  for (int i = 0; i + 2 < gramian.ndim; ++i) {
    batch *= gramian.size(i);
  }
  cuda::check_result(gramian, Dtype::float64, batch * m * m, gramian.device_index, "gramian");
  return {batch, m};
}

template <typename Problem>
void solve(const char* name, const Problem& problem, const Tensor& gramian, const Tensor& scratch) {
  const int device = gramian.device_index;
  const std::int64_t needed = scratch_size<Problem>(problem.count, problem.m);
  cuda::check_result(scratch, Dtype::float64, needed, device, "scratch");
  if (problem.count == 0) {
    return;
  }
  const cuda::DeviceGuard guard(device);
  const unsigned threads = problem.m <= 32 ? 32 : problem.m <= 128 ? 128 : max_threads;
  cuda::launch(name, &solve_kernel<Problem>, dim3(std::min(problem.count, max_blocks)), threads,
               static_cast<cudaStream_t>(gramian.stream), problem, scratch.data_as<double>());
}

double* result(const Tensor& tensor, std::int64_t size, const Tensor& gramian, const char* name) {
  cuda::check_result(tensor, Dtype::float64, size, gramian.device_index, name);
  return tensor.data_as<double>();
}

}  // namespace

std::int64_t weighting_scratch(const std::string& problem, std::int64_t count, std::int64_t m) {
  if (problem == "projection") return scratch_size<dense::Projection>(count, m);
  if (problem == "cone") return scratch_size<dense::ConeProjection>(count, m);
  if (problem == "conflict_averse") return scratch_size<dense::ConflictAverse>(count, m);
  if (problem == "deconflict") return scratch_size<dense::Deconflict>(count, m);
  if (problem == "bargaining") return scratch_size<dense::Bargaining>(count, m);
  if (problem == "eigen") return scratch_size<dense::Eigen>(count, m);
  fail("no such problem: ", problem);
}

void projection_weights_cuda(const Tensor& gramian, const Tensor& products,
                             const Tensor& coefficients, const Tensor& rank, const Tensor& margin,
                             const Tensor& scratch, double rtol) {
  const auto [batch, m] = shape_of(gramian);
  cuda::check_result(rank, Dtype::int64, batch, gramian.device_index, "rank");
  solve("projection_weights",
        dense::Projection{
            gramian.data_as<double>(), result(products, batch * m, gramian, "products"),
            result(coefficients, batch * m, gramian, "coefficients"), rank.data_as<std::int64_t>(),
            result(margin, batch, gramian, "margin"), batch, m, rtol},
        gramian, scratch);
}

void cone_weights_cuda(const Tensor& gramian, const Tensor& products, const Tensor& coefficients,
                       const Tensor& residual, const Tensor& scratch, double rtol, double noise) {
  const auto [batch, m] = shape_of(gramian);
  const std::int64_t count = residual.numel(), vectors = batch > 0 ? count / batch : 0;
  check(vectors * batch == count, "residual must be [..., p] for ", batch, " Gramians, got ",
        residual.shape_text());
  solve("cone_weights",
        dense::ConeProjection{
            gramian.data_as<double>(), result(products, count * m, gramian, "products"),
            result(coefficients, count * m, gramian, "coefficients"),
            result(residual, count, gramian, "residual"), count, m, vectors, rtol, noise},
        gramian, scratch);
}

void conflict_averse_weights_cuda(const Tensor& gramian, const Tensor& weights,
                                  const Tensor& scratch, double c, double rtol, double noise) {
  const auto [batch, m] = shape_of(gramian);
  solve("conflict_averse_weights",
        dense::ConflictAverse{gramian.data_as<double>(),
                              result(weights, batch * m, gramian, "weights"), batch, m, c, rtol,
                              noise},
        gramian, scratch);
}

void deconflict_weights_cuda(const Tensor& gramian, const Tensor& order,
                             const std::optional<Tensor>& targets, const Tensor& coefficients,
                             const Tensor& scratch, double beta) {
  const auto [batch, m] = shape_of(gramian);
  cuda::check_result(order, Dtype::int64, batch * m * m, gramian.device_index, "order");
  solve("deconflict_weights",
        dense::Deconflict{gramian.data_as<double>(), order.data_as<std::int64_t>(),
                          targets ? result(*targets, batch * m * m, gramian, "targets") : nullptr,
                          result(coefficients, batch * m * m, gramian, "coefficients"), batch * m,
                          m, beta},
        gramian, scratch);
}

void bargaining_weights_cuda(const Tensor& gramian, const Tensor& weights, const Tensor& scratch,
                             double power, double rtol) {
  const auto [batch, m] = shape_of(gramian);
  solve("bargaining_weights",
        dense::Bargaining{gramian.data_as<double>(), result(weights, batch * m, gramian, "weights"),
                          batch, m, power, rtol},
        gramian, scratch);
}

void eigen_cuda(const Tensor& gramian, const Tensor& values, const Tensor& vectors,
                const Tensor& scratch) {
  const auto [batch, m] = shape_of(gramian);
  solve("eigen",
        dense::Eigen{gramian.data_as<double>(), result(values, batch * m, gramian, "values"),
                     result(vectors, batch * m * m, gramian, "vectors"), batch, m},
        gramian, scratch);
}

}  // namespace gradsurgery
