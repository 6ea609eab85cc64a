// What csrc/ptx/generate_wgmma.py writes, on emulator::run.
#pragma once

#include "mma.cuh"

namespace flashmoe::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit_group() { emulator::wgmma_commit_group(); }

template <int PENDING>
void wgmma_wait_group() {
  emulator::wgmma_wait_group(PENDING);
}

template <typename T, int N>
struct Wgmma {
  static void ss(float (&d)[N / 2], unsigned long long a, unsigned long long b, int accumulate) {
    emulator::wgmma({d, nullptr, a, b, N, accumulate != 0, false, FORMAT<T>});
  }
  static void ss_init(float (&d)[N / 2], unsigned long long a, unsigned long long b) {
    ss(d, a, b, 0);
  }
  static void ss_mn_major(float (&d)[N / 2], unsigned long long a, unsigned long long b,
                          int accumulate) {
    emulator::wgmma({d, nullptr, a, b, N, accumulate != 0, true, FORMAT<T>});
  }
  static void ss_mn_major_init(float (&d)[N / 2], unsigned long long a, unsigned long long b) {
    ss_mn_major(d, a, b, 0);
  }
  static void rs(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, int accumulate) {
    emulator::wgmma({d, a, 0, b, N, accumulate != 0, true, FORMAT<T>});
  }
  static void rs_k_major(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b,
                         int accumulate) {
    emulator::wgmma({d, a, 0, b, N, accumulate != 0, false, FORMAT<T>});
  }
};

}  // namespace flashmoe::ptx
