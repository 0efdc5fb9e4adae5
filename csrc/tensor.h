// A view of a torch.Tensor that knows nothing of torch, and the checks and dispatch kernels begin
// with.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace gradsurgery {

// becomes gradsurgery.errors.InputError in Python
struct InputError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Text of a piece of a message. Without the library's streams: where a linker puts a C++ library of
// its own into the module, their locales are mixed up with those of the one that torch has loaded,
// and writing a number crashes.
template <typename Piece>
std::string text_of(const Piece& piece) {
  if constexpr (std::is_floating_point_v<Piece>) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", static_cast<double>(piece));
    return text;
  } else if constexpr (std::is_integral_v<Piece>) {
    return std::to_string(piece);
  } else {
    return piece;
  }
}

template <typename... Pieces>
[[noreturn]] void fail(const Pieces&... pieces) {
  throw InputError((std::string() + ... + text_of(pieces)));
}

template <typename... Pieces>
void check(bool condition, const Pieces&... pieces) {
  if (!condition) [[unlikely]] {
    fail(pieces...);
  }
}

enum class Dtype { float16, bfloat16, float32, float64, int64 };  // int64 for counts only
enum class Device { cpu, cuda };

// storage only: each instruction set and CUDA convert these in their own way
struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// owns nothing; valid while the Python tensor it was made from lives and is not resized
struct Tensor {
  static constexpr int max_dims = 8;

  void* data;
  int ndim;
  std::int64_t shape[max_dims];
  std::int64_t strides[max_dims];  // in elements; 1 where the size is 0 or 1
  Dtype dtype;
  Device device;
  int device_index;
  void* stream;  // current CUDA stream of the device; nullptr on the CPU

  // negative dimensions count from the end
  std::int64_t size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }
  std::int64_t stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }

  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < ndim; ++i) {
      count *= shape[i];
    }
    return count;
  }

  bool is_contiguous() const {
    std::int64_t expected = 1;
    bool dense = true;
    for (int i = ndim - 1; i >= 0; --i) {
      dense = dense && (shape[i] == 1 || strides[i] == expected);
      expected *= shape[i];
    }
    return dense || expected == 0;  // torch calls every empty tensor contiguous
  }

  // T is the tensor's element type, or char for its bytes
  template <typename T>
  T* data_as() const;

  // "[2, 3]", as error messages say it
  std::string shape_text() const {
    std::string text = "[";
    for (int i = 0; i < ndim; ++i) {
      text += (i ? ", " : "") + std::to_string(shape[i]);
    }
    return text + "]";
  }
};

inline const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::float16:
      return "float16";
    case Dtype::bfloat16:
      return "bfloat16";
    case Dtype::float32:
      return "float32";
    case Dtype::float64:
      return "float64";
    case Dtype::int64:
      return "int64";
  }
  return "unknown";
}

template <typename T>
struct Type {
  using type = T;
};

template <typename T>
constexpr Dtype dtype_of = Type<T>::no_such_dtype;
template <>
inline constexpr Dtype dtype_of<Float16> = Dtype::float16;
template <>
inline constexpr Dtype dtype_of<BFloat16> = Dtype::bfloat16;
template <>
inline constexpr Dtype dtype_of<float> = Dtype::float32;
template <>
inline constexpr Dtype dtype_of<double> = Dtype::float64;
template <>
inline constexpr Dtype dtype_of<std::int64_t> = Dtype::int64;

template <typename T>
T* Tensor::data_as() const {
  if constexpr (!std::is_same_v<T, char>) {
    check(dtype == dtype_of<T>, "expected ", name(dtype_of<T>), ", got ", name(dtype), " of shape ",
          shape_text());
  }
  return static_cast<T*>(data);
}

// calls function(Type<T>{}) with the element type of `dtype`
template <typename Function>
decltype(auto) dispatch(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::float16:
      return function(Type<Float16>{});
    case Dtype::bfloat16:
      return function(Type<BFloat16>{});
    case Dtype::float32:
      return function(Type<float>{});
    case Dtype::float64:
      return function(Type<double>{});
    case Dtype::int64:
      break;
  }
  fail("expected a floating-point dtype, got ", name(dtype));
}

}  // namespace gradsurgery
