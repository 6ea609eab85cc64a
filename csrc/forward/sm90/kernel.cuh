// FlashAttention forward for Hopper: a producer warp fetches Q, K and V by TMA, consumer warpgroups
// of 64 rows each multiply with wgmma, P from registers, softmax of one tile under the matmuls of
// its neighbours (FlashAttention-3, arXiv:2407.08608), across blocks of rows as well as inside one.
// docs/dev/hopper-forward.md explains it. Includes nothing that NVRTC lacks.
#pragma once

#include "forward/sm90/consumer.cuh"
#include "forward/sm90/producer.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/setmaxnreg.cuh"

namespace flashmoe::sm90 {

// The kernel's whole body. Instances are __global__ functions around it, launched with the tile's
// num_threads() and smem_bytes(), and bounded by its num_threads() and ctas_per_sm.
template <typename T, Sm90Tile TILE, Variant VARIANT = Variant{}>
__device__ __forceinline__ void attention_forward(const Sm90Params& params) {
  // What the 128-byte swizzle and its descriptors need.
  extern __shared__ __align__(1024) unsigned char smem_raw[];
  const Smem<TILE> smem(ptx::smem_address(smem_raw));
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&params.q);
    ptx::prefetch_tensormap(&params.k);
    ptx::prefetch_tensormap(&params.v);
    if (TILE.stages_output()) ptx::prefetch_tensormap(&params.o);
    for (int i = 0; i < TILE.consumers() * TILE.q_stages; ++i) {
      ptx::mbarrier_init(smem.full_Q + 8 * i, 1);
      ptx::mbarrier_init(smem.empty_Q + 8 * i, TILE.stages_output() ? 1 : 4);
    }
    for (int s = 0; s < TILE.num_stages; ++s) {
      ptx::mbarrier_init(smem.full_K + 8 * s, 1);
      ptx::mbarrier_init(smem.full_V + 8 * s, 1);
      ptx::mbarrier_init(smem.empty_K + 8 * s, 4 * TILE.consumers());
      ptx::mbarrier_init(smem.empty_V + 8 * s, 4 * TILE.consumers());
    }
    for (int i = 0; i < Smem<TILE>::WORK_SLOTS; ++i) {
      ptx::mbarrier_init(smem.full_work + 8 * i, 1);
      ptx::mbarrier_init(smem.empty_work + 8 * i, 4 * TILE.consumers());
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (VARIANT.packed) {
    if (threadIdx.x / 32 == 1 && !is_listed(params)) find_work<TILE, VARIANT>(params, smem);
  }
  __syncthreads();
  // Through a shuffle, so that the compiler knows it as uniform in a warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<TILE.producer_registers(VARIANT)>();
    if (threadIdx.x == 0) produce<TILE, VARIANT>(params, smem);
    if (VARIANT.packed && threadIdx.x >= 32) clear_rest<T, TILE>(params.attention);
  } else {
    ptx::setmaxnreg_inc<TILE.consumer_registers(VARIANT)>();
    consume<T, TILE, VARIANT>(params, smem, warpgroup - 1);
  }
}

}  // namespace flashmoe::sm90
