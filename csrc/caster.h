// pybind11 reads a torch.Tensor argument into a Tensor view through DLPack's exchange API: no torch
// header, no copy.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "tensor.h"

namespace gradsurgery {

namespace py = pybind11;

struct Torch {
  py::object tensor_type;
  const dlpack::ExchangeApi* api;
};

inline Torch find_torch() {
  py::module_ torch = py::module_::import("torch");
  py::object type = torch.attr("Tensor");
  auto version = py::cast<std::string>(torch.attr("__version__"));
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
    throw py::import_error(
        "gradsurgery's compiled kernels need torch 2.11 or newer, whose Tensor has "
        "__dlpack_c_exchange_api__; this is torch " +
        version);
  }
  auto capsule = py::reinterpret_borrow<py::capsule>(type.attr("__dlpack_c_exchange_api__"));
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name);
  if (pointer == nullptr) {
    throw py::error_already_set();
  }
  const auto* header = static_cast<const dlpack::ExchangeApi::Header*>(pointer);
  while (header != nullptr && header->major != dlpack::major_version) {
    header = header->previous;
  }
  const auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (api == nullptr || api->borrow == nullptr) {
    throw py::import_error("gradsurgery's compiled kernels speak DLPack 1.x, which torch " +
                           version + " does not offer; GRADSURGERY_BACKEND=torch avoids them");
  }
  return {type, api};
}

inline const Torch& torch() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> storage;
  return storage.call_once_and_store_result(find_torch).get_stored();
}

inline Dtype to_dtype(dlpack::DataType type, py::handle object) {
  if (type.lanes == 1 && type.code == dlpack::type_float) {
    switch (type.bits) {
      case 16:
        return Dtype::float16;
      case 32:
        return Dtype::float32;
      case 64:
        return Dtype::float64;
    }
  }
  if (type.lanes == 1 && type.code == dlpack::type_int && type.bits == 64) {
    return Dtype::int64;
  }
  check(type.lanes == 1 && type.code == dlpack::type_bfloat && type.bits == 16,
        "expected a tensor of float16, bfloat16, float32, float64 or int64, got ",
        py::cast<std::string>(py::str(object.attr("dtype"))));
  return Dtype::bfloat16;
}

inline Tensor view(py::handle object) {
  const Torch& owner = torch();
  if (!PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(owner.tensor_type.ptr()))) {
    fail("expected a torch.Tensor, got ", Py_TYPE(object.ptr())->tp_name);
  }
  // its memory holds the negated values, and DLPack does not say so
  check(!py::cast<bool>(object.attr("is_neg")()),
        "expected values as they are in memory, got a negated view: call resolve_neg()");
  dlpack::Tensor borrowed;
  if (owner.api->borrow(object.ptr(), &borrowed) != 0) {
    py::error_already_set error;  // sparse, meta, conjugated, ...; the first line says which
    auto message = py::cast<std::string>(py::str(error.value()));
    fail("expected a strided tensor with memory: ", message.substr(0, message.find('\n')));
  }
  check(borrowed.ndim <= Tensor::max_dims, "expected at most ", Tensor::max_dims,
        " dimensions, got ", borrowed.ndim);
  Tensor tensor{};
  tensor.ndim = borrowed.ndim;
  for (int i = 0; i < borrowed.ndim; ++i) {
    tensor.shape[i] = borrowed.shape[i];
    tensor.strides[i] = borrowed.shape[i] > 1 ? borrowed.strides[i] : 1;
  }
  tensor.dtype = to_dtype(borrowed.dtype, object);
  tensor.data = static_cast<char*>(borrowed.data) + borrowed.byte_offset;
  // fake tensors export a null pointer instead of failing
  check(borrowed.data != nullptr || tensor.numel() == 0, "expected a tensor with memory, got a ",
        Py_TYPE(object.ptr())->tp_name, " of shape ", tensor.shape_text(), " that has none");
  tensor.device_index = borrowed.device.index;
  switch (borrowed.device.type) {
    case dlpack::device_cpu:
    case dlpack::device_cuda_host:
      tensor.device = Device::cpu;
      break;
    case dlpack::device_cuda:
      tensor.device = Device::cuda;
      if (owner.api->current_stream(borrowed.device.type, borrowed.device.index, &tensor.stream) !=
          0) {
        throw py::error_already_set();
      }
      break;
    default:
      fail("expected a tensor on a CPU or a CUDA device");
  }
  return tensor;
}

}  // namespace gradsurgery

template <>
struct pybind11::detail::type_caster<gradsurgery::Tensor> {
  PYBIND11_TYPE_CASTER(gradsurgery::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value = gradsurgery::view(source);
    return true;
  }
};
