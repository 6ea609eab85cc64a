// csrc/ptx/registers.cuh on emulator::run.
#pragma once

#include "device.h"

namespace flashmoe::ptx {

inline void hide(unsigned&) {}
inline void hide(long long&) {}

template <int N>
void fence_registers(float (&)[N]) {}

inline float add_to_exponent(float y, float n, float x, float least) {
  if (x < least) return 0;
  return std::bit_cast<float>((std::bit_cast<unsigned>(n) << 23) + std::bit_cast<unsigned>(y));
}

inline void pmevent() {}

}  // namespace flashmoe::ptx
