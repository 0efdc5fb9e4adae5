// The Python module gradsurgery._C: names arguments, turns tensors into views and InputError into
// Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "caster.h"
#include "combine.h"
#include "combine_tokens.h"
#include "cpu.h"
#include "formed_gramian.h"
#include "gramian.h"
#include "group_norm.h"
#include "launchers.h"
#include "orthonormalize.h"
#include "token_gramian.h"
#include "weighting.h"

#ifdef GRADSURGERY_CUDA_VERSION
#define GRADSURGERY_HAS_CUDA 1
#else
#define GRADSURGERY_HAS_CUDA 0
#define GRADSURGERY_CUDA_VERSION nullptr
#define GRADSURGERY_CUDA_ARCHITECTURES ""
#endif

#ifdef __clang__
#define GRADSURGERY_COMPILER "clang " __clang_version__
#else
#define GRADSURGERY_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;
using namespace gradsurgery;

namespace {

double* matrix(const Tensor& tensor, std::int64_t m, std::int64_t n, const char* name) {
  check(tensor.dtype == Dtype::float64 && tensor.device == Device::cpu && tensor.is_contiguous() &&
            tensor.ndim == 2 && tensor.size(0) == m && tensor.size(1) == n,
        name, " must be a contiguous float64 [", m, ", ", n, "] on the CPU, got ",
        tensor.shape_text());
  return tensor.data_as<double>();
}

void gramian_cpu(const Sources& sources, const Tensor& out, bool precise, int threads) {
  Rows rows = make_rows(sources, "sources");
  double* gram = matrix(out, rows.m, rows.m, "out");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(gramian)(rows, gram, precise, threads);
}

bool combine_cpu(const Sources& sources, const Tensor& weights, const Sources& outs,
                 const std::optional<Tensor>& cross, const std::optional<Tensor>& gram,
                 bool precise, int threads) {
  Rows rows = make_rows(sources, "sources"), out = make_rows(outs, "outs");
  check(rows.blocks.size() == out.blocks.size() && rows.dtype == out.dtype,
        "outs must have the tensors and the dtype of sources");
  for (std::size_t k = 0; k < rows.blocks.size(); ++k) {
    check(rows.blocks[k].columns == out.blocks[k].columns, "outs[.][", k, "] has ",
          out.blocks[k].columns, " columns, sources[.][", k, "] has ", rows.blocks[k].columns);
  }
  double* w = matrix(weights, out.m, rows.m, "weights");
  double* c = cross ? matrix(*cross, out.m, rows.m, "cross") : nullptr;
  double* g = gram ? matrix(*gram, out.m, out.m, "gram") : nullptr;
  py::gil_scoped_release release;
  return GRADSURGERY_SELECT(combine)(rows, w, out, c, g, precise, threads);
}

void check_tokens(const Tokens& tokens, const char* name, const Tokens& like) {
  for (const Tensor* side : {&tokens.left, &tokens.right}) {
    check(side->ndim == 3 && side->device == Device::cpu && side->dtype == like.left.dtype &&
              side->size(0) == tokens.left.size(0) && side->size(1) == tokens.left.size(1),
          name, " must be two [n, T, .] of one dtype on the CPU, got ", side->shape_text());
  }
  check(tokens.left.dtype == Dtype::float32 || tokens.left.dtype == Dtype::float64, name,
        " must be float32 or float64, not ", gradsurgery::name(tokens.left.dtype));
  check(tokens.left.size(2) == like.left.size(2) && tokens.right.size(2) == like.right.size(2),
        name, " must be as wide as the first tokens, got ", tokens.left.shape_text(), " and ",
        tokens.right.shape_text());
}

void token_gramian_cpu(const Tensor& left, const Tensor& right,
                       const std::optional<Tensor>& other_left,
                       const std::optional<Tensor>& other_right, const Tensor& out, int threads) {
  const Tokens first{left, right};
  check_tokens(first, "left and right", first);
  std::optional<Tokens> second;
  check(other_left.has_value() == other_right.has_value(),
        "other_left and other_right come together");
  if (other_left) {
    second = Tokens{*other_left, *other_right};
    check_tokens(*second, "other_left and other_right", first);
  }
  double* gram = matrix(out, first.blocks(), (second ? *second : first).blocks(), "out");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(token_gramian)(first, second ? &*second : nullptr, gram, threads);
}

void formed_gramian_cpu(const std::vector<Tensor>& left, const std::vector<Tensor>& right,
                        const std::vector<Tensor>& rows, std::int64_t count,
                        const std::optional<Tensor>& kept, const Tensor& out, int threads) {
  check(!left.empty() && left.size() == right.size() && left.size() == rows.size(),
        "left, right and rows must be as many, one at least");
  Planes planes{{}, count, kept, left[0].size(-1), right[0].size(-1), left[0].dtype};
  for (std::size_t k = 0; k < left.size(); ++k) {
    const Tokens tokens{left[k], right[k]};
    check_tokens(tokens, "left and right", k == 0 ? tokens : planes.parts[0].tokens);
    check(rows[k].ndim == 1 && rows[k].size(0) == tokens.blocks() && rows[k].is_contiguous() &&
              rows[k].device == Device::cpu,
          "rows must be a contiguous [", tokens.blocks(), "] on the CPU, got ",
          rows[k].shape_text());
    planes.parts.push_back({tokens, rows[k].data_as<std::int64_t>()});
    for (std::int64_t i = 0; i < tokens.blocks(); ++i) {
      const std::int64_t row = planes.parts[k].rows[i];
      check(row >= 0 && row < count, "rows must be from 0 to ", count - 1, ", got ", row);
    }
  }
  check(!kept ||
            (kept->ndim == 2 && kept->size(0) == planes.height && kept->size(1) == planes.width &&
             kept->dtype == planes.dtype && kept->device == Device::cpu),
        "kept must be [", planes.height, ", ", planes.width, "] ", name(planes.dtype),
        " on the CPU, got ", kept ? kept->shape_text() : "");
  double* gram = matrix(out, planes.rows(), planes.rows(), "out");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(formed_gramian)(std::move(planes), gram, threads);
}

void combine_tokens_cpu(const Tensor& left, const Tensor& right, const Tensor& weights, double beta,
                        const Tensor& out, int threads) {
  const Tokens tokens{left, right};
  check_tokens(tokens, "left and right", tokens);
  check(weights.ndim == 1 && weights.size(0) == tokens.blocks() && weights.is_contiguous() &&
            weights.device == Device::cpu,
        "weights must be a contiguous [", tokens.blocks(), "] on the CPU, got ",
        weights.shape_text());
  check(out.ndim == 2 && out.size(0) == left.size(2) && out.size(1) == right.size(2) &&
            out.dtype == left.dtype && out.device == Device::cpu &&
            (out.stride(0) == 1 || out.stride(1) == 1),
        "out must be [", left.size(2), ", ", right.size(2), "] ", name(left.dtype),
        " on the CPU with a stride of 1, got ", out.shape_text(), " ", name(out.dtype));
  const double* w = weights.data_as<double>();
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(combine_tokens)(tokens, w, beta, out, threads);
}

void group_norm_double_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& u,
                                    const Tensor& weight, const Tensor& p, const Tensor& q,
                                    const Tensor& mean, const Tensor& rstd, const Tensor& to_dy,
                                    const Tensor& to_x, const Tensor& to_weight, int threads) {
  check(x.ndim == 3 && x.numel() > 0 && (x.dtype == Dtype::float32 || x.dtype == Dtype::float64),
        "x must be [N, C, L], not empty, float32 or float64, got ", x.shape_text(), " ",
        name(x.dtype));
  const std::int64_t batch = x.size(0), channels = x.size(1);
  check(mean.ndim == 2 && mean.size(0) == batch && mean.size(1) > 0 && channels % mean.size(1) == 0,
        "mean must be [", batch, ", G], G a divisor of ", channels, ", got ", mean.shape_text());
  const auto agrees = [&](const Tensor& tensor, std::int64_t size, const char* what) {
    check(tensor.numel() == size && tensor.is_contiguous() && tensor.device == Device::cpu &&
              tensor.dtype == x.dtype,
          what, " must be ", size, " contiguous values on the CPU, ", name(x.dtype), ", got ",
          tensor.shape_text(), " ", name(tensor.dtype));
  };
  for (const auto& [tensor, what] :
       {std::pair{&x, "x"}, {&dy, "dy"}, {&u, "u"}, {&to_dy, "to_dy"}, {&to_x, "to_x"}}) {
    agrees(*tensor, x.numel(), what);
  }
  for (const auto& [tensor, what] : {std::pair{&weight, "weight"}, {&p, "p"}, {&q, "q"}}) {
    agrees(*tensor, channels, what);
  }
  agrees(mean, mean.numel(), "mean");
  agrees(rstd, mean.numel(), "rstd");
  agrees(to_weight, batch * channels, "to_weight");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(group_norm_double_backward)
  ({dy, x, u, weight, p, q, mean, rstd, to_dy, to_x, to_weight}, threads);
}

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

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      std::rethrow_exception(pointer);
    } catch (const InputError& error) {
      py::set_error(py::module_::import("gradsurgery.errors").attr("InputError"), error.what());
    }
  });

  // what was built
  module.attr("cuda_version") = py::cast(static_cast<const char*>(GRADSURGERY_CUDA_VERSION));
  module.attr("cuda_architectures") = py::str(GRADSURGERY_CUDA_ARCHITECTURES).attr("split")();
  module.attr("isas") = py::str(GRADSURGERY_ISAS).attr("split")();
  module.attr("compiler") = GRADSURGERY_COMPILER;
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.def("isa", [] { return name(isa()); });

  module.def("gramian_cpu", &gramian_cpu, py::arg("sources"), py::arg("out"), py::arg("precise"),
             py::arg("threads"));
  module.def("combine_cpu", &combine_cpu, py::arg("sources"), py::arg("weights"), py::arg("outs"),
             py::arg("cross"), py::arg("gram"), py::arg("precise"), py::arg("threads"));
  module.def("group_norm_double_backward_cpu", &group_norm_double_backward_cpu, py::arg("dy"),
             py::arg("x"), py::arg("u"), py::arg("weight"), py::arg("p"), py::arg("q"),
             py::arg("mean"), py::arg("rstd"), py::arg("to_dy"), py::arg("to_x"),
             py::arg("to_weight"), py::arg("threads"));
  module.def(
      "orthonormalize_cpu",
      [](const Tensor& rows, const Tensor& q, const Tensor& factor, const Tensor& norms,
         const Tensor& rank, double rtol, int threads) {
        py::gil_scoped_release release;
        GRADSURGERY_SELECT(orthonormalize)
        (rows, q, factor.data_as<double>(), norms.data_as<double>(), rank.data_as<std::int64_t>(),
         rtol, threads);
      },
      py::arg("rows"), py::arg("q"), py::arg("factor"), py::arg("norms"), py::arg("rank"),
      py::arg("rtol"), py::arg("threads"));
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
  module.def("token_gramian_cpu", &token_gramian_cpu, py::arg("left"), py::arg("right"),
             py::arg("other_left"), py::arg("other_right"), py::arg("out"), py::arg("threads"));
  module.def("formed_gramian_cpu", &formed_gramian_cpu, py::arg("left"), py::arg("right"),
             py::arg("rows"), py::arg("count"), py::arg("kept"), py::arg("out"),
             py::arg("threads"));
  module.def("combine_tokens_cpu", &combine_tokens_cpu, py::arg("left"), py::arg("right"),
             py::arg("weights"), py::arg("beta"), py::arg("out"), py::arg("threads"));

#if GRADSURGERY_HAS_CUDA
  // launches only: short enough to keep the interpreter's lock
  module.def("gramian_scratch", &gramian_scratch, py::arg("m"));
  module.def("weighting_scratch", &weighting_scratch, py::arg("problem"), py::arg("count"),
             py::arg("m"));
  module.def("orthonormalize_scratch", &orthonormalize_scratch, py::arg("batch"), py::arg("m"));
  module.def("gramian_cuda", &gramian_cuda, py::arg("sources"), py::arg("out"), py::arg("scratch"),
             py::arg("precise"));
  module.def("gramian_border_cuda", &gramian_border_cuda, py::arg("sources"), py::arg("out"),
             py::arg("scratch"));
  module.def("combine_cuda", &combine_cuda, py::arg("sources"), py::arg("weights"), py::arg("outs"),
             py::arg("cross"), py::arg("gram"), py::arg("scratch"));
  module.def("orthonormalize_cuda", &orthonormalize_cuda, py::arg("rows"), py::arg("q"),
             py::arg("factor"), py::arg("norms"), py::arg("rank"), py::arg("scratch"),
             py::arg("rtol"));
  module.def("projection_weights_cuda", &projection_weights_cuda, py::arg("gramian"),
             py::arg("products"), py::arg("coefficients"), py::arg("rank"), py::arg("margin"),
             py::arg("scratch"), py::arg("rtol"));
  module.def("cone_weights_cuda", &cone_weights_cuda, py::arg("gramian"), py::arg("products"),
             py::arg("coefficients"), py::arg("residual"), py::arg("scratch"), py::arg("rtol"),
             py::arg("noise"));
  module.def("conflict_averse_weights_cuda", &conflict_averse_weights_cuda, py::arg("gramian"),
             py::arg("weights"), py::arg("scratch"), py::arg("c"), py::arg("rtol"),
             py::arg("noise"));
  module.def("deconflict_weights_cuda", &deconflict_weights_cuda, py::arg("gramian"),
             py::arg("order"), py::arg("targets"), py::arg("coefficients"), py::arg("scratch"),
             py::arg("beta"));
  module.def("bargaining_weights_cuda", &bargaining_weights_cuda, py::arg("gramian"),
             py::arg("weights"), py::arg("scratch"), py::arg("power"), py::arg("rtol"));
  module.def("eigen_cuda", &eigen_cuda, py::arg("gramian"), py::arg("values"), py::arg("vectors"),
             py::arg("scratch"));
#endif

  // what a kernel would see of a tensor
  module.def(
      "describe",
      [](const Tensor& tensor) {
        return py::dict(
            py::arg("shape") = std::vector(tensor.shape, tensor.shape + tensor.ndim),
            py::arg("strides") = std::vector(tensor.strides, tensor.strides + tensor.ndim),
            py::arg("dtype") = name(tensor.dtype),
            py::arg("device") = tensor.device == Device::cpu ? "cpu" : "cuda",
            py::arg("address") = reinterpret_cast<std::uintptr_t>(tensor.data));
      },
      py::arg("tensor"));
}
