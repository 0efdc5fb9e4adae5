// Instruction sets: an operator's .cpp is compiled once for each, in a namespace of that name, and
// isa() picks one.
#pragma once

#include <cstdlib>
#include <cstring>

#include "tensor.h"

namespace gradsurgery {

enum class Isa { baseline, avx2, avx512 };

inline const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

#if defined(__x86_64__) || defined(_M_X64)

// In a header: declares a function once per instruction set.
#define GRADSURGERY_DECLARE(...) \
  namespace baseline {           \
  __VA_ARGS__;                   \
  }                              \
  namespace avx2 {               \
  __VA_ARGS__;                   \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__;                   \
  }

// The one of such functions that fits this processor: GRADSURGERY_SELECT(gramian)(rows, out)
#define GRADSURGERY_SELECT(function)                                      \
  (::gradsurgery::isa() == ::gradsurgery::Isa::avx512 ? &avx512::function \
   : ::gradsurgery::isa() == ::gradsurgery::Isa::avx2 ? &avx2::function   \
                                                      : &baseline::function)

inline Isa best_isa() {
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
}

#else

#define GRADSURGERY_DECLARE(...) \
  namespace baseline {           \
  __VA_ARGS__;                   \
  }
#define GRADSURGERY_SELECT(function) (&baseline::function)

inline Isa best_isa() { return Isa::baseline; }

#endif

// the best this processor has, or what GRADSURGERY_CPU names
inline Isa find_isa() {
  const char* wanted = std::getenv("GRADSURGERY_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    return best_isa();
  }
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wanted, name(isa)) == 0) {
      check(isa <= best_isa(), "GRADSURGERY_CPU=", wanted, ": this processor has ",
            name(best_isa()), " at most");
      return isa;
    }
  }
  fail("GRADSURGERY_CPU=", wanted, ": expected baseline, avx2 or avx512");
}

inline Isa isa() {
  static const Isa found = find_isa();
  return found;
}

}  // namespace gradsurgery
