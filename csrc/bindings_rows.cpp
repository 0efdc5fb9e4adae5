// The operators on rows, for Python.
#include <optional>

#include "bindings.h"
#include "combine.h"
#include "cpu.h"
#include "gramian.h"
#include "launchers.h"
#include "orthonormalize.h"
#include "project_out.h"
#include "rows.h"

namespace gradsurgery {

namespace {

void gramian_cpu(const Sources& sources, const Tensor& out, bool precise, int threads) {
  Rows rows = make_rows(sources, "sources");
  double* gram = matrix(out, rows.m, rows.m, "out");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(gramian)(rows, gram, precise, threads);
}

void check_alike(const Rows& rows, const Rows& out) {
  check(rows.blocks.size() == out.blocks.size() && rows.dtype == out.dtype,
        "outs must have the tensors and the dtype of sources");
  for (std::size_t k = 0; k < rows.blocks.size(); ++k) {
    check(rows.blocks[k].columns == out.blocks[k].columns, "outs[.][", k, "] has ",
          out.blocks[k].columns, " columns, sources[.][", k, "] has ", rows.blocks[k].columns);
  }
}

bool combine_cpu(const Sources& sources, const Tensor& weights, const Sources& outs,
                 const std::optional<Tensor>& cross, const std::optional<Tensor>& gram,
                 bool precise, int threads) {
  Rows rows = make_rows(sources, "sources"), out = make_rows(outs, "outs");
  check_alike(rows, out);
  double* w = matrix(weights, out.m, rows.m, "weights");
  double* c = cross ? matrix(*cross, out.m, rows.m, "cross") : nullptr;
  double* g = gram ? matrix(*gram, out.m, out.m, "gram") : nullptr;
  py::gil_scoped_release release;
  return GRADSURGERY_SELECT(combine)(rows, w, out, c, g, precise, threads);
}

template <typename T>
T* figure(const Tensor& tensor, const char* name) {
  check(tensor.device == Device::cpu && tensor.numel() == 1, name, " must be one value on the CPU");
  return tensor.data_as<T>();
}

// the largest cosine; None, and outs and figures without meaning, where a number is not finite or a
// row too short
std::optional<double> project_out_cpu(const Sources& sources, const std::vector<Tensor>& outs,
                                      const std::vector<Tensor>& figures, double rtol,
                                      std::int64_t refine, double promise, double safe_margin,
                                      double safe_parts, double least, int threads) {
  Rows rows = make_rows(sources, "sources"), out = make_rows({outs}, "outs");
  check(out.m == 1 && rows.m > 0, "outs must be one row, and sources end with one");
  check_alike(rows, out);
  for (const Block& block : out.blocks) {
    check(block.rows[0].stride == 1, "outs must be contiguous");
  }
  check(figures.size() == 3, "figures must be rank, kept and worst");
  std::int64_t* rank = figure<std::int64_t>(figures[0], "rank");
  double* kept = figure<double>(figures[1], "kept");
  double* worst = figure<double>(figures[2], "worst");
  const ProjectionLimits limits{rtol, refine, promise, safe_margin, safe_parts, least};
  std::optional<Projected> found;
  {
    py::gil_scoped_release release;
    found = GRADSURGERY_SELECT(project_out)(rows, out, limits, threads);
  }
  if (!found) {
    return std::nullopt;
  }
  *rank = found->rank;
  *kept = found->kept;
  *worst = found->worst;
  return found->worst;
}

}  // namespace

void bind_rows(py::module_& module) {
  module.def("gramian_cpu", &gramian_cpu, py::arg("sources"), py::arg("out"), py::arg("precise"),
             py::arg("threads"));
  module.def("combine_cpu", &combine_cpu, py::arg("sources"), py::arg("weights"), py::arg("outs"),
             py::arg("cross"), py::arg("gram"), py::arg("precise"), py::arg("threads"));
  module.def("project_out_cpu", &project_out_cpu, py::arg("sources"), py::arg("outs"),
             py::arg("figures"), py::arg("rtol"), py::arg("refine"), py::arg("promise"),
             py::arg("safe_margin"), py::arg("safe_parts"), py::arg("least"), py::arg("threads"));
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
}

}  // namespace gradsurgery
