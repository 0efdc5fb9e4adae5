// The part of DLPack 1.x's C ABI that a borrowing library needs: how torch describes a tensor and
// names its stream.
#pragma once

#include <cstdint>

namespace gradsurgery::dlpack {

constexpr std::uint32_t major_version = 1;  // another major version is another layout
constexpr const char* capsule_name = "dlpack_exchange_api";

enum DeviceType : std::int32_t { device_cpu = 1, device_cuda = 2, device_cuda_host = 3 };
enum TypeCode : std::uint8_t { type_int = 0, type_float = 2, type_bfloat = 4 };

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  struct Header {
    std::uint32_t major;
    std::uint32_t minor;
    Header* previous;
  } header;
  void* allocate;
  void* export_owning;
  void* import_owning;
  int (*borrow)(void* py_object, Tensor* out);  // 0, or -1 with a Python exception set
  int (*current_stream)(std::int32_t device_type, std::int32_t index, void** out);
};

}  // namespace gradsurgery::dlpack
