// Small matrix products of a warp, on tensor cores: d += a b. Of lane l, g = l / 4 and t = l % 4:
//   a: rows g and g + 8, columns t, t + 4 of float64; 2t, 2t + 1, 2t + 8, 2t + 9 of 16 bits
//   b: the same of its transpose: rows of a are columns of b where they are the same registers
//   d: rows g and g + 8, columns 2t and 2t + 1
#pragma once

#include <cstdint>

#include "device.cuh"

namespace gradsurgery::cuda {

// 8 x 4 times 4 x 8, in float64
__device__ inline void multiply(double (&d)[2], double a, double b) {
#ifdef GRADSURGERY_EMULATE_CUDA
  emulated::multiply_fragments(d, {{a}}, {b});
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
#endif
}

// 16 x 8 times 8 x 8, in float64; one instruction on sm_90, four of 8 x 4 elsewhere
__device__ inline void multiply(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#ifdef GRADSURGERY_EMULATE_CUDA
  emulated::multiply_fragments(d, {{a[0], a[2]}, {a[1], a[3]}}, b);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    double half[2] = {d[2 * h], d[2 * h + 1]};
    multiply(half, a[h], b[0]);
    multiply(half, a[h + 2], b[1]);
    d[2 * h] = half[0];
    d[2 * h + 1] = half[1];
  }
#endif
}

// 16 x 16 times 16 x 8 of 16-bit values, two in a register; products exact, sums in float
template <typename T>
__device__ inline void multiply(float (&d)[4], const std::uint32_t (&a)[4],
                                const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
#ifdef GRADSURGERY_EMULATE_CUDA
  auto value = [](std::uint32_t two, int which) {
    return static_cast<double>(widen(T{static_cast<std::uint16_t>(two >> 16 * which)}));
  };
  double rows[2][4], columns[4];
  for (int k = 0; k < 4; ++k) {
    rows[0][k] = value(a[k / 2 * 2], k % 2);
    rows[1][k] = value(a[k / 2 * 2 + 1], k % 2);
    columns[k] = value(b[k / 2], k % 2);
  }
  emulated::multiply_fragments(d, rows, columns);
#else
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace gradsurgery::cuda
