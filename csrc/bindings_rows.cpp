// The operators on rows, for Python.
#include <optional>

#include "bindings.h"
#include "combine.h"
#include "cpu.h"
#include "gramian.h"
#include "launchers.h"
#include "orthonormalize.h"
#include "rows.h"

namespace gradsurgery {

namespace {

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

}  // namespace

void bind_rows(py::module_& module) {
  module.def("gramian_cpu", &gramian_cpu, py::arg("sources"), py::arg("out"), py::arg("precise"),
             py::arg("threads"));
  module.def("combine_cpu", &combine_cpu, py::arg("sources"), py::arg("weights"), py::arg("outs"),
             py::arg("cross"), py::arg("gram"), py::arg("precise"), py::arg("threads"));
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
