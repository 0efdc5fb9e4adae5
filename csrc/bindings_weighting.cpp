// The solves on Gramians, for Python.
#include <optional>

#include "bindings.h"
#include "cpu.h"
#include "weighting.h"

namespace gradsurgery {

namespace {

// [..., m, m] float64 on the CPU as a batch of matrices.
struct Gramians {
  const double* values;
  std::int64_t batch, m;
};

double* contiguous(const Tensor& tensor, std::int64_t size, const char* what) {
  check(tensor.numel() == size && tensor.is_contiguous() && tensor.device == Device::cpu, what,
        " must be ", size, " contiguous values on the CPU, got ", tensor.shape_text());
  return tensor.data_as<double>();
}

Gramians gramians(const Tensor& gramian) {
  check(gramian.ndim >= 2 && gramian.size(-1) == gramian.size(-2),
        "gramian must be [..., m, m], got ", gramian.shape_text());
  Gramians out{nullptr, 1, gramian.size(-1)};
  for (int i = 0; i + 2 < gramian.ndim; ++i) {
    out.batch *= gramian.size(i);
  }
  out.values = contiguous(gramian, out.batch * out.m * out.m, "gramian");
  return out;
}

void projection_weights_cpu(const Tensor& gramian, const Tensor& products,
                            const Tensor& coefficients, const Tensor& rank, const Tensor& margin,
                            double rtol, int threads) {
  const auto [gram, batch, m] = gramians(gramian);
  const double* k = contiguous(products, batch * m, "products");
  double* c = contiguous(coefficients, batch * m, "coefficients");
  double* margins = contiguous(margin, batch, "margin");
  check(rank.numel() == batch && rank.is_contiguous() && rank.device == Device::cpu,
        "rank must be ", batch, " contiguous values on the CPU, got ", rank.shape_text());
  std::int64_t* ranks = rank.data_as<std::int64_t>();
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(projection_weights)(gram, k, c, ranks, margins, batch, m, rtol, threads);
}

void cone_weights_cpu(const Tensor& gramian, const Tensor& products, const Tensor& coefficients,
                      const Tensor& residual, double rtol, double noise, int threads) {
  const auto [gram, batch, m] = gramians(gramian);
  const std::int64_t count = residual.numel(), vectors = batch > 0 ? count / batch : 0;
  const double* b = contiguous(products, count * m, "products");
  double* x = contiguous(coefficients, count * m, "coefficients");
  double* missed = contiguous(residual, batch * vectors, "residual");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(cone_weights)(gram, b, x, missed, batch, vectors, m, rtol, noise, threads);
}

// false, and nothing written, if a value of the Gramian is not finite
bool dual_projection_weights_cpu(const Tensor& gramian, const std::optional<Tensor>& given,
                                 const Tensor& weights, double rtol, double noise, int threads) {
  const auto [gram, batch, m] = gramians(gramian);
  const double* mine = given ? contiguous(*given, m, "given") : nullptr;
  double* w = contiguous(weights, batch * m, "weights");
  py::gil_scoped_release release;
  if (!GRADSURGERY_SELECT(all_finite)(gram, batch * m * m)) {
    return false;
  }
  GRADSURGERY_SELECT(dual_projection_weights)(gram, mine, w, batch, m, rtol, noise, threads);
  return true;
}

void conflict_averse_weights_cpu(const Tensor& gramian, const Tensor& weights, double c,
                                 double rtol, double noise, int threads) {
  const auto [gram, batch, m] = gramians(gramian);
  double* w = contiguous(weights, batch * m, "weights");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(conflict_averse_weights)(gram, w, batch, m, c, rtol, noise, threads);
}

bool all_finite_cpu(const Tensor& values) {
  const double* first = contiguous(values, values.numel(), "values");
  return GRADSURGERY_SELECT(all_finite)(first, values.numel());
}

void shuffle_cpu(const Tensor& draws, const Tensor& order) {
  check(draws.ndim >= 1 && draws.is_contiguous() && draws.device == Device::cpu &&
            order.numel() == draws.numel() && order.is_contiguous() && order.device == Device::cpu,
        "draws and order must be alike, contiguous and on the CPU, got ", draws.shape_text(),
        " and ", order.shape_text());
  const std::int64_t m = draws.size(-1);
  const float* numbers = draws.data_as<float>();
  std::int64_t* lines = order.data_as<std::int64_t>();
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(shuffle)(numbers, lines, m > 0 ? draws.numel() / m : 0, m);
}

void deconflict_weights_cpu(const Tensor& gramian, const Tensor& order,
                            const std::optional<Tensor>& targets, const Tensor& coefficients,
                            double beta, int threads) {
  const auto [gram, batch, m] = gramians(gramian);
  const std::int64_t size = batch * m * m;
  check(order.numel() == size && order.is_contiguous() && order.device == Device::cpu,
        "order must be ", size, " contiguous values on the CPU, got ", order.shape_text());
  const std::int64_t* visits = order.data_as<std::int64_t>();
  double* cosines = targets ? contiguous(*targets, size, "targets") : nullptr;
  double* v = contiguous(coefficients, size, "coefficients");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(deconflict_weights)(gram, visits, cosines, v, batch, m, beta, threads);
}

void bargaining_weights_cpu(const Tensor& gramian, const Tensor& weights, double power, double rtol,
                            int threads) {
  const auto [gram, batch, m] = gramians(gramian);
  double* w = contiguous(weights, batch * m, "weights");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(bargaining_weights)(gram, w, batch, m, power, rtol, threads);
}

void eigen_cpu(const Tensor& gramian, const Tensor& values, const Tensor& vectors, int threads) {
  const auto [gram, batch, m] = gramians(gramian);
  double* lambda = contiguous(values, batch * m, "values");
  double* v = contiguous(vectors, batch * m * m, "vectors");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(eigen)(gram, lambda, v, batch, m, threads);
}

}  // namespace

void bind_weighting(py::module_& module) {
  module.def("projection_weights_cpu", &projection_weights_cpu, py::arg("gramian"),
             py::arg("products"), py::arg("coefficients"), py::arg("rank"), py::arg("margin"),
             py::arg("rtol"), py::arg("threads"));
  module.def("cone_weights_cpu", &cone_weights_cpu, py::arg("gramian"), py::arg("products"),
             py::arg("coefficients"), py::arg("residual"), py::arg("rtol"), py::arg("noise"),
             py::arg("threads"));
  module.def("dual_projection_weights_cpu", &dual_projection_weights_cpu, py::arg("gramian"),
             py::arg("given"), py::arg("weights"), py::arg("rtol"), py::arg("noise"),
             py::arg("threads"));
  module.def("conflict_averse_weights_cpu", &conflict_averse_weights_cpu, py::arg("gramian"),
             py::arg("weights"), py::arg("c"), py::arg("rtol"), py::arg("noise"),
             py::arg("threads"));
  module.def("all_finite_cpu", &all_finite_cpu, py::arg("values"));
  module.def("shuffle_cpu", &shuffle_cpu, py::arg("draws"), py::arg("order"));
  module.def("deconflict_weights_cpu", &deconflict_weights_cpu, py::arg("gramian"),
             py::arg("order"), py::arg("targets"), py::arg("coefficients"), py::arg("beta"),
             py::arg("threads"));
  module.def("bargaining_weights_cpu", &bargaining_weights_cpu, py::arg("gramian"),
             py::arg("weights"), py::arg("power"), py::arg("rtol"), py::arg("threads"));
  module.def("eigen_cpu", &eigen_cpu, py::arg("gramian"), py::arg("values"), py::arg("vectors"),
             py::arg("threads"));
}

}  // namespace gradsurgery
