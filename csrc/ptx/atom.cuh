// atom and what goes with it: counters in device memory by which thread blocks find one another,
// and in shared memory.
#pragma once

namespace flashmoe::ptx {

__device__ __forceinline__ unsigned long long ld_relaxed_gpu_b64(
    const unsigned long long* src_gmem) {
  unsigned long long x;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];\n" : "=l"(x) : "l"(src_gmem) : "memory");
  return x;
}

// Writes `x` where `expected` is. Returns what was there.
__device__ __forceinline__ unsigned long long atom_relaxed_gpu_cas_b64(unsigned long long* dst_gmem,
                                                                       unsigned long long expected,
                                                                       unsigned long long x) {
  unsigned long long before;
  asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;\n"
               : "=l"(before)
               : "l"(dst_gmem), "l"(expected), "l"(x)
               : "memory");
  return before;
}

// Returns what was there. What this thread did before, and what it has seen others do, is visible
// to whoever adds after it.
__device__ __forceinline__ unsigned long long atom_acq_rel_gpu_add_u64(unsigned long long* dst_gmem,
                                                                       unsigned long long x) {
  unsigned long long before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;\n"
               : "=l"(before)
               : "l"(dst_gmem), "l"(x)
               : "memory");
  return before;
}

__device__ __forceinline__ int atom_shared_add(unsigned dst_smem, int x) {
  int before;
  asm volatile("atom.shared.add.s32 %0, [%1], %2;\n"
               : "=r"(before)
               : "r"(dst_smem), "r"(x)
               : "memory");
  return before;
}

}  // namespace flashmoe::ptx
