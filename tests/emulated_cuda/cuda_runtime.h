// Runs kernels on the host, to test their logic where there is no GPU: this folder comes before
// CUDA's own in the include path, and .cu files are compiled as C++. One block runs at a time; its
// threads are fibers that take turns at barriers. Says nothing of speed, memory order within a
// warp, or alignment that the GPU demands and the host forgives.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = -1;  // not the tensors': the guard acts
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrSingleToDoublePrecisionPerfRatio };
// EMULATED_DOUBLES=slow: as on a GPU that is not made for float64.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* doubles = std::getenv("EMULATED_DOUBLES");
  *value = doubles != nullptr && std::strcmp(doubles, "slow") == 0 ? 64 : 2;
  return cudaSuccess;
}

namespace emulated {

// EMULATED_ORDER=reverse lets threads take turns from the last to the first: a result that depends
// on the order misses a barrier.
inline const bool reversed = std::getenv("EMULATED_ORDER") != nullptr &&
                             std::strcmp(std::getenv("EMULATED_ORDER"), "reverse") == 0;

[[noreturn]] inline void stop(const char* what, int line) {
  std::fprintf(stderr, "emulated kernel: %s at line %d\n", what, line);
  std::abort();
}

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int waiting;  // line of its barrier, 0 before the first, -1 at the end
};

struct Slot {
  double values[12];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Slot> slots;  // what threads pass to one another
  ucontext_t scheduler;
  std::function<void()> body;
  std::size_t current;
};
inline Block block;

}  // namespace emulated

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr std::size_t stack_bytes = 128 << 10;

inline void enter() {
  block.body();
  block.fibers[block.current].waiting = -1;
  swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline void barrier(int line) {
  const std::size_t me = block.current;
  block.fibers[me].waiting = line;
  swapcontext(&block.fibers[me].context, &block.scheduler);
}

inline void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    fiber.stack.reset(new char[stack_bytes]);
  }
  fiber.waiting = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

// Every thread runs to its next barrier, which must be the same one, until all are at the end.
inline void run_block() {
  for (Fiber& fiber : block.fibers) {
    prepare(fiber);
  }
  const std::size_t count = block.fibers.size();
  do {
    for (std::size_t turn = 0; turn < count; ++turn) {
      block.current = reversed ? count - 1 - turn : turn;
      threadIdx = dim3(block.current);
      swapcontext(&block.scheduler, &block.fibers[block.current].context);
    }
    for (const Fiber& fiber : block.fibers) {
      if (fiber.waiting != block.fibers[0].waiting) {
        stop("threads wait at different barriers",
             std::max(fiber.waiting, block.fibers[0].waiting));
      }
    }
  } while (block.fibers[0].waiting != -1);
}

inline double exchange(double value, std::size_t from, int line) {
  block.slots[block.current].values[0] = value;
  barrier(line);
  const double got = block.slots[from < block.slots.size() ? from : block.current].values[0];
  barrier(line);
  return got;
}

// What a float holds of a value: tensor cores cut off the rest.
inline float cut(double value) {
  const float rounded = static_cast<float>(value);
  return std::isfinite(value) && std::fabs(rounded) > std::fabs(value)
             ? std::nextafter(rounded, 0.0f)
             : rounded;
}

// d += a b of a warp, for mma.cuh: a [8 * H, 4 * K], b [4 * K, 8]. Of both, a lane has K values of
// each row, and column, of its number over 4.
template <typename D, std::size_t H, std::size_t K>
void multiply_fragments(D (&d)[2 * H], const double (&a)[H][K], const double (&b)[K]) {
  double* mine = block.slots[block.current].values;
  static_assert((H + 1) * K <= sizeof(Slot) / sizeof(double));
  std::copy_n(a[0], H * K, mine);
  std::copy_n(b, K, mine + H * K);
  barrier(__LINE__);
  const std::size_t lane = block.current % 32;
  const Slot* warp = block.slots.data() + (block.current - lane);
  for (std::size_t h = 0; h < H; ++h) {
    for (std::size_t c = 0; c < 2; ++c) {
      double sum = d[2 * h + c];
      for (std::size_t t = 0; t < 4; ++t) {
        for (std::size_t k = 0; k < K; ++k) {
          sum += warp[lane / 4 * 4 + t].values[h * K + k] *
                 warp[(lane % 4 * 2 + c) * 4 + t].values[H * K + k];
        }
      }
      if constexpr (sizeof(D) == sizeof(float)) {
        d[2 * h + c] = cut(sum);
      } else {
        d[2 * h + c] = sum;
      }
    }
  }
  barrier(__LINE__);
}

}  // namespace emulated

#define __syncthreads() emulated::barrier(__LINE__)
#define __shfl_down_sync(mask, value, offset) \
  emulated::exchange(                         \
      value, threadIdx.x % 32 + (offset) < 32 ? threadIdx.x + (offset) : threadIdx.x, __LINE__)

inline int __syncthreads_and(int predicate) {
  emulated::block.slots[emulated::block.current].values[0] = predicate;
  emulated::barrier(__LINE__);
  bool all = true;
  for (const emulated::Slot& slot : emulated::block.slots) {
    all = all && slot.values[0] != 0;
  }
  emulated::barrier(__LINE__);
  return all;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace emulated;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x * gridDim.y * gridDim.z == 0 || gridDim.y > 65535 || gridDim.z > 65535 ||
      blockDim.x > 1024 || blockDim.x % 32 != 0 || (sizeof(Parameters) + ...) > 4096) {
    stop("a launch that a GPU refuses", __LINE__);
  }
  block.fibers.resize(blockDim.x);
  block.slots.resize(blockDim.x);
  block.body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block();
      }
    }
  }
  return cudaSuccess;
}
