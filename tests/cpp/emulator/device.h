// CUDA C++ as a host compiler can read it, for kernels that run on emulator::run. Include it before
// the kernel's headers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "gpu.h"
#include "include/cuda_runtime.h"  // before the macros below, which its fields are named like
#include "number.h"

#define __CUDACC__ 1  // after the standard headers, which look at it, too
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define gridDim emulator::grid_dim

using std::max;
using std::min;

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// Dynamic shared memory: its address is what emulator::run says.
namespace flashmoe {
namespace sm80 {
inline unsigned char smem[1];
}
namespace decoding {
inline unsigned char smem[1];
}
namespace sm90 {
inline unsigned char smem_raw[1];
}
namespace sm90_backward {
inline unsigned char smem_raw[1];
}
namespace schedule {
inline unsigned char smem_raw[1];
}
}  // namespace flashmoe

namespace emulator {

template <typename T>
T shuffle(const char* what, T value, int source) {
  struct Mine {
    T value;
    int source;
    T received;
  } mine{value, source, value};
  collective(what, &mine, [](Slots slots) {
    for (void* slot : slots) {
      auto* lane = static_cast<Mine*>(slot);
      lane->received = static_cast<Mine*>(slots[lane->source])->value;
    }
  });
  return mine.received;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::shuffle("shfl", value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle("shfl.xor", value, (emulator::thread_index.x % 32) ^ mask);
}
inline bool __any_sync(unsigned, bool mine) {
  bool any = mine;
  emulator::collective("vote.any", &any, [](emulator::Slots slots) {
    bool found = false;
    for (void* slot : slots) found = found || *static_cast<bool*>(slot);
    for (void* slot : slots) *static_cast<bool*>(slot) = found;
  });
  return any;
}
inline unsigned __reduce_max_sync(unsigned, unsigned mine) {
  emulator::collective("redux.max", &mine, [](emulator::Slots slots) {
    unsigned largest = 0;
    for (void* slot : slots) largest = std::max(largest, *static_cast<unsigned*>(slot));
    for (void* slot : slots) *static_cast<unsigned*>(slot) = largest;
  });
  return mine;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}
inline void __syncwarp() {
  emulator::collective("syncwarp", nullptr, [](emulator::Slots) {});
}
inline void __syncthreads() { emulator::syncthreads(); }

inline int atomicAdd(int* address, int x) {
  emulator::preempt();
  const int before = *address;
  *address += x;
  return before;
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  emulator::preempt();
  const unsigned before = *address;
  *address = before >= last ? 0 : before + 1;
  return before;
}
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __log2f(float x) { return std::log2(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int __vimax3_s32(int a, int b, int c) { return std::max(std::max(a, b), c); }
