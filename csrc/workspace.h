// What the kernels over tokens share: the size of a register tile, and memory to pack into.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "simd.h"

namespace gradsurgery::GRADSURGERY_ISA {

// A register tile is the products of `tile_rows` values, read one by one, with up to `tile_panels`
// panels of others, a vector each: tile_rows * tile_panels accumulators.
#if defined(__AVX512F__)
constexpr int tile_panels = 3;
template <typename T>
constexpr int tile_rows = 8;
#else
constexpr int tile_panels = vector_bytes == 32 ? 3 : 2;
template <typename T>
constexpr int tile_rows = std::min(lanes<T>, 4);
#endif

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
