// mbarrier: a barrier in shared memory that counts arrivals and bytes of asynchronous copies
// (sm_90).
#pragma once

namespace flashmoe::ptx {

__device__ __forceinline__ void mbarrier_init(unsigned barrier_smem, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier_smem), "r"(arrivals));
}

// Makes the initialization visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned barrier_smem) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier_smem) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned barrier_smem, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier_smem),
               "r"(bytes)
               : "memory");
}

// Returns when the phase of the given parity has completed.
__device__ __forceinline__ void mbarrier_wait_parity(unsigned barrier_smem, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier_smem),
      "r"(parity)
      : "memory");
}

// Whether that phase has completed, without waiting.
__device__ __forceinline__ bool mbarrier_test_parity(unsigned barrier_smem, unsigned parity) {
  unsigned completed;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(completed)
      : "r"(barrier_smem), "r"(parity)
      : "memory");
  return completed;
}

// Waits for that phase, unless a test has told already that it has completed.
__device__ __forceinline__ void mbarrier_wait_parity_unless(bool completed, unsigned barrier_smem,
                                                            unsigned parity) {
  if (!completed) mbarrier_wait_parity(barrier_smem, parity);
}

// Named barriers of a thread block: `threads` threads meet; arrive does not wait.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flashmoe::ptx
