// Vectors of the instruction set that this file is compiled for, and what the kernels do with them.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline Vector<double> load_as_double(const double* from) { return load(from); }

inline Vector<double> load_as_double(const float* from) {
  HalfVector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return __builtin_convertvector(vector, Vector<double>);
}

inline void store(double* to, Vector<double> vector) { std::memcpy(to, &vector, sizeof(vector)); }

template <typename V, typename T>
inline T sum_halves(V vector) {
  constexpr int count = sizeof(V) / sizeof(T);
  if constexpr (count == 1) {
    return vector[0];
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half parts[2];
    std::memcpy(parts, &vector, sizeof(vector));
    return sum_halves<Half, T>(parts[0] + parts[1]);
  }
}

template <typename T>
inline T sum(Vector<T> vector) {
  return sum_halves<Vector<T>, T>(vector);
}

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
  _Float16 half;
  std::memcpy(&half, &value, sizeof(half));
  return static_cast<float>(half);
}

inline void narrow(double value, double* out) { *out = value; }
inline void narrow(double value, float* out) { *out = static_cast<float>(value); }
inline void narrow(double value, Float16* out) {
  _Float16 half = static_cast<_Float16>(static_cast<float>(value));
  std::memcpy(out, &half, sizeof(half));
}
inline void narrow(double value, BFloat16* out) {
  float single = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  // to nearest, ties to even; a NaN keeps a bit set
  out->bits = single != single ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// The columns [column, column + length) of every row of a block, as contiguous T: whole vectors in
// `rows`, what is left over in `ends`, one vector a row filled up with zeros. Rows that are
// contiguous T already are not copied, but for their ends.
template <typename T>
class Slice {
 public:
  Slice(const Rows& rows, std::int64_t width)
      : dtype_(rows.dtype), width_(width), m_(rows.m), rows_(m_), ends_(m_), end_values_(m_ * lanes<T>) {
    for (std::int64_t i = 0; i < m_; ++i) {
      ends_[i] = end_values_.data() + i * lanes<T>;
    }
  }

  void load(const Block& block, std::int64_t column, std::int64_t length) {
    dispatch(dtype_, [&](auto type) {
      find<typename decltype(type)::type>(block, column, length);
    });
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

  std::int64_t whole = 0;  // columns in whole vectors
  std::int64_t rest = 0;   // columns after them

 private:
  template <typename From>
  void find(const Block& block, std::int64_t column, std::int64_t length) {
    if constexpr (std::is_same_v<From, T>) {
      bool direct = true;
      for (const Row& row : block.rows) {
        direct = direct && row.stride == 1;
      }
      if (direct) {
        for (std::int64_t i = 0; i < m_; ++i) {
          rows_[i] = reinterpret_cast<const T*>(block.rows[i].data) + column;
        }
        return;
      }
    }
    values_.resize(m_ * width_);
    for (std::int64_t i = 0; i < m_; ++i) {
      const std::int64_t stride = block.rows[i].stride;
      const From* from = reinterpret_cast<const From*>(block.rows[i].data) + column * stride;
      T* to = values_.data() + i * width_;
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
  std::int64_t width_, m_;
  std::vector<const T*> rows_, ends_;
  std::vector<T> end_values_, values_;
};

// out[r, c] += <a_r, b_c> for an MR x NR tile, over `length` columns in whole vectors
template <typename T, int MR, int NR>
void tile_products(const T* const* a, const T* const* b, std::int64_t length, double* out,
                   std::int64_t stride) {
  Vector<T> sums[MR][NR] = {};
  for (std::int64_t j = 0; j < length; j += lanes<T>) {
    Vector<T> x[MR];
    for (int r = 0; r < MR; ++r) {
      x[r] = load(a[r] + j);
    }
    for (int c = 0; c < NR; ++c) {
      Vector<T> y = load(b[c] + j);
      for (int r = 0; r < MR; ++r) {
        sums[r][c] += x[r] * y;
      }
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int c = 0; c < NR; ++c) {
      out[r * stride + c] += sum<T>(sums[r][c]);
    }
  }
}

template <typename T>
using TileProducts = void (*)(const T* const*, const T* const*, std::int64_t, double*, std::int64_t);

template <typename T, int... I>
constexpr auto tile_table(std::integer_sequence<int, I...>) {
  return std::array<TileProducts<T>, sizeof...(I)>{tile_products<T, I / tile + 1, I % tile + 1>...};
}

// out[i, j] += <a_i, b_j> for i < m, j < n; with `lower`, a is b and only tiles that hold some
// j <= i are filled
template <typename T>
void products(const T* const* a, std::int64_t m, const T* const* b, std::int64_t n, bool lower,
              std::int64_t length, double* out) {
  static constexpr auto table = tile_table<T>(std::make_integer_sequence<int, tile * tile>{});
  for (std::int64_t i = 0; i < m; i += tile) {
    std::int64_t rows = std::min<std::int64_t>(tile, m - i);
    for (std::int64_t j = 0; j < (lower ? i + rows : n); j += tile) {
      std::int64_t columns = std::min<std::int64_t>(tile, n - j);
      table[(rows - 1) * tile + columns - 1](a + i, b + j, length, out + i * n + j, n);
    }
  }
}

template <typename T>
void products(const Slice<T>& a, std::int64_t m, const Slice<T>& b, std::int64_t n, bool lower,
              double* out) {
  products(a.rows(), m, b.rows(), n, lower, a.whole, out);
  if (a.rest > 0) {
    products(a.ends(), m, b.ends(), n, lower, lanes<T>, out);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
