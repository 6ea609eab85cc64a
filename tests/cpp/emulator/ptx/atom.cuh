// csrc/ptx/atom.cuh on emulator::run.
#pragma once

#include <cstring>

#include "device.h"

namespace flashmoe::ptx {

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
