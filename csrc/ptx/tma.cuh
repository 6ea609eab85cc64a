// Tensor memory accelerator: boxes of a tensor from global to shared memory (sm_90). A box past
// the tensor's edge is filled with zeros.
#pragma once

#include "tensor_map.h"

namespace flashmoe::ptx {

__device__ __forceinline__ void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_4d_load(unsigned dst_smem, const void* map,
                                                             unsigned barrier_smem, int c0, int c1,
                                                             int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5, %6}], [%2];\n" ::"r"(dst_smem),
      "l"(map), "r"(barrier_smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

}  // namespace flashmoe::ptx
