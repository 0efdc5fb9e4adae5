// Vectors of the instruction set that this file is compiled for, and what the kernels do with them.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "rows.h"

namespace gradsurgery::GRADSURGERY_ISA {

// Rows of a register tile: tile * tile accumulators and 2 tile operands must fit the registers, 32
// with AVX-512 and 16 without.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int tile = 4;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int tile = 3;
#else
constexpr int vector_bytes = 16;
constexpr int tile = 3;
#endif

template <typename T>
constexpr int lanes = vector_bytes / sizeof(T);

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

// as many floats as a Vector<double> has lanes
typedef float HalfVector __attribute__((vector_size(vector_bytes / 2)));

template <typename V, typename T>
inline V load_vector(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename T>
inline Vector<T> load(const T* from) {
  return load_vector<Vector<T>>(from);
}

template <typename V, typename T>
inline void store(T* to, V vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// gcc 12 makes six instructions of __builtin_convertvector where one does
inline Vector<double> widen(HalfVector vector) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, vector);  // unmasked, it makes gcc 12 warn of its own header
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(vector);
#else
  return __builtin_convertvector(vector, Vector<double>);
#endif
}

inline HalfVector narrow(Vector<double> vector) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtpd_ps(0xff, vector);
#elif defined(__AVX2__)
  return _mm256_cvtpd_ps(vector);
#else
  return __builtin_convertvector(vector, HalfVector);
#endif
}

template <typename To, typename T>
inline Vector<To> load_as(const T* from) {
  if constexpr (std::is_same_v<To, T>) {
    return load(from);
  } else {
    return widen(load_vector<HalfVector>(from));
  }
}

// stores, and returns what was stored
template <typename T>
inline Vector<T> store_rounded(T* to, Vector<T> vector) {
  store(to, vector);
  return vector;
}

inline HalfVector store_rounded(float* to, Vector<double> vector) {
  HalfVector rounded = narrow(vector);
  store(to, rounded);
  return rounded;
}

template <typename V, typename T>
inline T sum_halves(V vector) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return vector[0];
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half low, high;
    std::memcpy(&low, &vector, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(low), sizeof(high));
    return sum_halves<Half, T>(low + high);
  }
}

template <typename T>
inline T sum(Vector<T> vector) {
  return sum_halves<Vector<T>, T>(vector);
}

// a processor's half: gcc 12 has _Float16 on x86-64 alone
#if defined(__aarch64__)
using Binary16 = __fp16;
#else
using Binary16 = _Float16;
#endif

// storage to arithmetic and back
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) {
  std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline float widen(Float16 value) {
  Binary16 half;
  std::memcpy(&half, &value, sizeof(half));
  return static_cast<float>(half);
}

inline void narrow(double value, double* out) { *out = value; }
inline void narrow(double value, float* out) { *out = static_cast<float>(value); }
inline void narrow(double value, Float16* out) {
  Binary16 half = static_cast<Binary16>(static_cast<float>(value));
  std::memcpy(out, &half, sizeof(half));
}
inline void narrow(double value, BFloat16* out) {
  float single = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  // to nearest, ties to even; a NaN keeps a bit set
  out->bits = single != single ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Columns of a slice. Up to 20 float32 rows, it and the next one, which is prefetched meanwhile,
// fit a first-level cache of 48 KiB; and a lane adds up no more than 32 floats before it starts
// anew.
constexpr std::int64_t slice_width = vector_bytes == 16 ? 128 : 256;

// The columns [column, column + length) of every row of a block, as contiguous T: whole vectors in
// `rows`, what is left over in `ends`, one vector a row filled up with zeros. Rows that are
// contiguous T already are not copied, but for their ends, unless `copy` asks for it.
template <typename T>
class Slice {
 public:
  Slice(const Rows& rows, std::int64_t width, bool copy)
      // a line between the copies, or all rows would share a few sets of the first-level cache
      : dtype_(rows.dtype),
        width_(width),
        stride_(width),
        m_(rows.m),
        copy_(copy),
        rows_(m_),
        ends_(m_),
        next_(m_),
        end_values_(m_ * lanes<T>) {
    for (std::int64_t i = 0; i < m_; ++i) {
      ends_[i] = end_values_.data() + i * lanes<T>;
    }
  }

  void load(const Block& block, std::int64_t column, std::int64_t length) {
    contiguous_ = true;
    for (const Row& row : block.rows) {
      contiguous_ = contiguous_ && row.stride == 1;
    }
    dispatch(dtype_,
             [&](auto type) { find<typename decltype(type)::type>(block, column, length); });
    whole = length / lanes<T> * lanes<T>;
    rest = length - whole;
    for (std::int64_t i = 0; rest > 0 && i < m_; ++i) {
      T* end = end_values_.data() + i * lanes<T>;
      std::memset(end, 0, sizeof(T) * lanes<T>);
      std::memcpy(end, rows_[i] + whole, sizeof(T) * rest);
    }
  }

  const T* const* rows() const { return rows_.data(); }
  const T* const* ends() const { return ends_.data(); }

  // where the next slice's rows are stored, for prefetching; null where they are strided
  const char* const* next() const { return contiguous_ ? next_.data() : nullptr; }
  std::int64_t next_bytes() const { return next_bytes_; }  // a value's

  std::int64_t whole = 0;  // columns in whole vectors
  std::int64_t rest = 0;   // columns after them

 private:
  template <typename From>
  void find(const Block& block, std::int64_t column, std::int64_t length) {
    next_bytes_ = sizeof(From);
    for (std::int64_t i = 0; i < m_; ++i) {
      next_[i] = block.rows[i].data + (column + width_) * sizeof(From);
    }
    if constexpr (std::is_same_v<From, T>) {
      if (contiguous_ && !copy_) {
        for (std::int64_t i = 0; i < m_; ++i) {
          rows_[i] = reinterpret_cast<const T*>(block.rows[i].data) + column;
        }
        return;
      }
    }
    values_.resize(m_ * stride_);
    for (std::int64_t i = 0; i < m_; ++i) {
      const std::int64_t stride = block.rows[i].stride;
      const From* from = reinterpret_cast<const From*>(block.rows[i].data) + column * stride;
      T* to = values_.data() + i * stride_;
      rows_[i] = to;
      if (stride == 1) {
        for (std::int64_t j = 0; j < length; ++j) {
          to[j] = static_cast<T>(widen(from[j]));
        }
      } else {
        for (std::int64_t j = 0; j < length; ++j) {
          to[j] = static_cast<T>(widen(from[j * stride]));
        }
      }
    }
  }

  Dtype dtype_;
  std::int64_t width_, stride_, m_;
  bool copy_, contiguous_ = false;
  std::vector<const T*> rows_, ends_;
  std::vector<const char*> next_;
  std::int64_t next_bytes_ = 0;
  std::vector<T> end_values_, values_;
};

}  // namespace gradsurgery::GRADSURGERY_ISA
