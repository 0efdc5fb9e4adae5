// Conversions of __half, for kernels that run on the host.
#pragma once

#include <bit>

struct __half {
  _Float16 value;
};

inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
inline unsigned short __half_as_ushort(__half half) {
  return std::bit_cast<unsigned short>(half.value);
}
inline __half __ushort_as_half(unsigned short bits) { return {std::bit_cast<_Float16>(bits)}; }
