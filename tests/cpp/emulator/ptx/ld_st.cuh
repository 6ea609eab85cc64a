// csrc/ptx/ld_st.cuh on emulator::run.
#pragma once

#include <cstring>

#include "device.h"

namespace flashmoe::ptx {

inline int4 ld_shared_v4(unsigned src_smem) {
  emulator::preempt();
  int4 x;
  std::memcpy(&x, emulator::shared(src_smem, 16), 16);
  return x;
}

inline int ld_shared_b32(unsigned src_smem) {
  emulator::preempt();
  int x;
  std::memcpy(&x, emulator::shared(src_smem, 4), 4);
  return x;
}

inline float2 ld_shared_v2(unsigned src_smem) {
  emulator::preempt();
  float2 x;
  std::memcpy(&x, emulator::shared(src_smem, 8), 8);
  return x;
}

inline void st_shared_v4(unsigned dst_smem, int4 x) {
  emulator::preempt();
  std::memcpy(emulator::shared(dst_smem, 16), &x, 16);
}

inline void st_shared_v2(unsigned dst_smem, float2 x) {
  emulator::preempt();
  std::memcpy(emulator::shared(dst_smem, 8), &x, 8);
}

inline void st_shared_b32(unsigned dst_smem, unsigned x) {
  std::memcpy(emulator::shared(dst_smem, 4), &x, 4);
}

inline int4 ld_global_cg_v4(const void* src_gmem) {
  emulator::require(reinterpret_cast<uintptr_t>(src_gmem) % 16 == 0, "misaligned ld.global");
  int4 x;
  std::memcpy(&x, src_gmem, 16);
  return x;
}

template <typename... Registers>
void st_global_if(bool condition, void* dst_gmem, Registers... registers) {
  if (!condition) return;
  const unsigned x[] = {registers...};
  emulator::require(reinterpret_cast<uintptr_t>(dst_gmem) % sizeof x == 0, "misaligned st.global");
  std::memcpy(dst_gmem, x, sizeof x);
}

inline void st_global_b32_if(bool condition, void* dst_gmem, unsigned x) {
  st_global_if(condition, dst_gmem, x);
}

inline void st_global_v2_if(bool condition, void* dst_gmem, unsigned x, unsigned y) {
  st_global_if(condition, dst_gmem, x, y);
}

inline void st_global_v4_if(bool condition, void* dst_gmem, unsigned x, unsigned y, unsigned z,
                            unsigned w) {
  st_global_if(condition, dst_gmem, x, y, z, w);
}

inline void ld_acquire_gpu_until(const int* src_gmem, int x) {
  emulator::device_memory_wait(src_gmem, x);
}

}  // namespace flashmoe::ptx
