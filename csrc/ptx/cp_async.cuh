// cp.async: copies from global to shared memory that the thread does not wait for (sm_80).
#pragma once

namespace flashmoe::ptx {

__device__ __forceinline__ unsigned smem_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes past L1; writes zeros instead of reading when `valid` is false.
__device__ __forceinline__ void cp_async_cg_16_zfill(unsigned dst_smem, const void* src_gmem,
                                                     bool valid) {
  const int src_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(dst_smem),
               "l"(src_gmem), "r"(src_bytes));
}

// How L2 treats what is read with it: evicted before anything else, or as usual.
__device__ __forceinline__ unsigned long long create_policy(bool evict_first) {
  unsigned long long first, normal;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(first));
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(normal));
  return evict_first ? first : normal;
}

__device__ __forceinline__ void cp_async_cg_16_zfill(unsigned dst_smem, const void* src_gmem,
                                                     bool valid, unsigned long long policy) {
  const int src_bytes = valid ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;\n" ::"r"(dst_smem),
      "l"(src_gmem), "r"(src_bytes), "l"(policy));
}

__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;\n" ::);
}

// Waits until at most PENDING of the most recently committed groups are still in flight.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING));
}

}  // namespace flashmoe::ptx
