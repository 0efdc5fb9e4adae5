// How the kernels of a Gramian sum: float sums of a few columns, put into double ones.
#pragma once

#include "device.cuh"

namespace gradsurgery::cuda {

namespace {

// A float sum holds the products of this many columns at most, then goes into a double sum: off by
// 1e-7 of its value or so. Many of them average that out.
constexpr int float_run = 32;

// Fewer columns make few sums, and take no longer in float64: the time goes into the launches.
#ifdef GRADSURGERY_EMULATE_CUDA
constexpr std::int64_t few_columns = 256;  // for tests: a block of threads takes milliseconds there
#else
constexpr std::int64_t few_columns = 1 << 14;
#endif

// Float products that left float's range; null where nobody asks.
struct Range {
  int* flag;
  bool repeat;  // this launch is the repetition in float64: nothing to do unless the flag is set

  __device__ bool skip() const { return repeat && *flag == 0; }
  __device__ void clear() const {
    if (flag != nullptr && !repeat && threadIdx.x + blockIdx.x + blockIdx.y + blockIdx.z == 0) {
      *flag = 0;
    }
  }
  // a squared norm; every thread that writes here writes the same
  __device__ void note(bool square, double sum, double least) const {
    if (flag != nullptr && !repeat && square && !(sum >= least && sum < INFINITY)) {
      *flag = 1;
    }
  }
};

}  // namespace

}  // namespace gradsurgery::cuda
