// The Python module gradsurgery._C: the parts that bindings.h lists, a GPU's launchers, what was
// built; turns InputError into Python's.
#include "bindings.h"

#include <exception>
#include <vector>

#include "cpu.h"
#include "launchers.h"

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

using namespace gradsurgery;

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

  bind_rows(module);
  bind_layers(module);
  bind_weighting(module);

#if GRADSURGERY_HAS_CUDA
  // launches only: short enough to keep the interpreter's lock
  module.def("gramian_scratch", &gramian_scratch, py::arg("m"));
  module.def("weighting_scratch", &weighting_scratch, py::arg("problem"), py::arg("count"),
             py::arg("m"));
  module.def("orthonormalize_scratch", &orthonormalize_scratch, py::arg("batch"), py::arg("m"));
  module.def("gramian_cuda", &gramian_cuda, py::arg("sources"), py::arg("out"), py::arg("scratch"),
             py::arg("precise"), py::arg("repeat"));
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
