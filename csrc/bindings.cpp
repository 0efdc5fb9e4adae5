// The Python module gradsurgery._C: names arguments, turns tensors into views and InputError into
// Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "caster.h"
#include "cpu.h"

#ifndef GRADSURGERY_CUDA_VERSION
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
