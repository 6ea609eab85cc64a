// csrc/ptx/mbarrier.cuh on emulator::run.
#pragma once

#include "device.h"

namespace flashmoe::ptx {

inline void mbarrier_init(unsigned barrier_smem, int arrivals) {
  emulator::mbarrier_init(barrier_smem, arrivals);
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(unsigned barrier_smem) { emulator::mbarrier_arrive(barrier_smem, 0); }
inline void mbarrier_arrive_expect_tx(unsigned barrier_smem, unsigned bytes) {
  emulator::mbarrier_arrive(barrier_smem, bytes);
}
inline void mbarrier_wait_parity(unsigned barrier_smem, unsigned parity) {
  emulator::mbarrier_wait(barrier_smem, parity);
}
inline bool mbarrier_test_parity(unsigned barrier_smem, unsigned parity) {
  return emulator::mbarrier_test(barrier_smem, parity);
}
inline void mbarrier_wait_parity_unless(bool completed, unsigned barrier_smem, unsigned parity) {
  if (!completed) mbarrier_wait_parity(barrier_smem, parity);
}
inline void bar_sync(int id, int threads) { emulator::bar(id, threads, true); }
inline void bar_arrive(int id, int threads) { emulator::bar(id, threads, false); }

}  // namespace flashmoe::ptx
