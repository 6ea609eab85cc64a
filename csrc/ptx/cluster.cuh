// Thread block clusters: their barrier, and the shared memory of their other thread blocks (sm_90).
#pragma once

namespace flashmoe::ptx {

// What a thread did before its arrival is visible to those that have waited; a thread that has ended
// counts as arrived.
__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// Where what is at src_smem is in the thread block of that rank, as a pointer.
__device__ __forceinline__ const unsigned char* shared_of(unsigned src_smem, int rank) {
  const unsigned char* x;
  asm volatile("{\n.reg .b64 own;\ncvt.u64.u32 own, %1;\ncvta.shared.u64 own, own;\nmapa.u64 %0, own, %2;\n}\n"
               : "=l"(x)
               : "r"(src_smem), "r"(rank));
  return x;
}

}  // namespace flashmoe::ptx
