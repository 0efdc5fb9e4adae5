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

struct Block {
  std::vector<Fiber> fibers;
  std::vector<double> slots;  // what threads pass to one another
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
  block.slots[block.current] = value;
  barrier(line);
  const double got = block.slots[from < block.slots.size() ? from : block.current];
  barrier(line);
  return got;
}

}  // namespace emulated

#define __syncthreads() emulated::barrier(__LINE__)
#define __shfl_down_sync(mask, value, offset) \
  emulated::exchange(                         \
      value, threadIdx.x % 32 + (offset) < 32 ? threadIdx.x + (offset) : threadIdx.x, __LINE__)

inline int __syncthreads_and(int predicate) {
  emulated::block.slots[emulated::block.current] = predicate;
  emulated::barrier(__LINE__);
  bool all = true;
  for (double slot : emulated::block.slots) {
    all = all && slot != 0;
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
