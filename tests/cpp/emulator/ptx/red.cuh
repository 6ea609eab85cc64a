// csrc/ptx/red.cuh on emulator::run.
#pragma once

#include "device.h"

namespace flashmoe::ptx {

inline void red_global_add_v4(float* dst_gmem, float x, float y, float z, float w) {
  emulator::preempt();
  emulator::require(reinterpret_cast<uintptr_t>(dst_gmem) % 16 == 0, "misaligned red.global");
  dst_gmem[0] += x;
  dst_gmem[1] += y;
  dst_gmem[2] += z;
  dst_gmem[3] += w;
}

inline void red_release_gpu_add(int* dst_gmem, int x) {
  emulator::preempt();
  *dst_gmem += x;
}

}  // namespace flashmoe::ptx
