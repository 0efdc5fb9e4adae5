// The parts of the Python module that call kernels for the CPU, a file each: they name arguments,
// turn tensors into views and check them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "caster.h"
#include "tensor.h"

namespace gradsurgery {

void bind_rows(py::module_& module);
void bind_layers(py::module_& module);
void bind_weighting(py::module_& module);

inline double* matrix(const Tensor& tensor, std::int64_t m, std::int64_t n, const char* name) {
  check(tensor.dtype == Dtype::float64 && tensor.device == Device::cpu && tensor.is_contiguous() &&
            tensor.ndim == 2 && tensor.size(0) == m && tensor.size(1) == n,
        name, " must be a contiguous float64 [", m, ", ", n, "] on the CPU, got ",
        tensor.shape_text());
  return tensor.data_as<double>();
}

}  // namespace gradsurgery
