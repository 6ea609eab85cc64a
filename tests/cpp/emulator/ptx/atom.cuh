// csrc/ptx/atom.cuh on emulator::run.
#pragma once

#include <cstring>

#include "device.h"

namespace flashmoe::ptx {

inline unsigned long long ld_relaxed_gpu_b64(const unsigned long long* src_gmem) {
  emulator::preempt();
  return *src_gmem;
}

inline unsigned long long atom_relaxed_gpu_cas_b64(unsigned long long* dst_gmem,
                                                   unsigned long long expected,
                                                   unsigned long long x) {
  emulator::preempt();
  const unsigned long long before = *dst_gmem;
  if (before == expected) *dst_gmem = x;
  return before;
}

inline unsigned long long atom_acq_rel_gpu_add_u64(unsigned long long* dst_gmem,
                                                   unsigned long long x) {
  emulator::preempt();
  const unsigned long long before = *dst_gmem;
  *dst_gmem += x;
  return before;
}

inline int atom_shared_add(unsigned dst_smem, int x) {
  emulator::preempt();
  uint8_t* memory = emulator::shared(dst_smem, 4);
  int before;
  std::memcpy(&before, memory, 4);
  const int sum = before + x;
  std::memcpy(memory, &sum, 4);
  return before;
}

}  // namespace flashmoe::ptx
