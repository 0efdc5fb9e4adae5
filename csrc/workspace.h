// Memory that the kernels over tokens pack into.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "simd.h"

namespace gradsurgery::GRADSURGERY_ISA {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t grain) {
  return (n + grain - 1) / grain * grain;
}

template <typename T>
using Values = std::unique_ptr<T[], void (*)(T*)>;

// without a value, on a cache line
template <typename T>
Values<T> allocate(std::int64_t count) {
  constexpr std::align_val_t line{64};
  return {static_cast<T*>(::operator new(sizeof(T) * std::max<std::int64_t>(count, 1), line)),
          [](T* values) { ::operator delete(values, line); }};
}

// Memory that a thread keeps from call to call, a few MiB: fresh pages would cost as much as the
// products of a hundred tokens.
template <typename T>
T* workspace(std::int64_t count) {
  thread_local Values<T> values = allocate<T>(0);
  thread_local std::int64_t size = 0;
  if (count > size) {
    values = allocate<T>(count);
    size = count;
  }
  return values.get();
}

}  // namespace gradsurgery::GRADSURGERY_ISA
