// FlashAttention backward for Hopper: a producer warp fetches Q and dO by TMA, two consumer
// warpgroups accumulate dK and dV in registers (FlashAttention-3, arXiv:2407.08608).
// docs/dev/hopper-backward.md explains it. Includes nothing that NVRTC lacks.
#pragma once

#include "backward/sm90/consumer_keys.cuh"
#include "backward/sm90/consumer_keys_late.cuh"
#include "backward/sm90/consumer_roles.cuh"
#include "backward/sm90/edges.cuh"
#include "backward/sm90/order.cuh"
#include "backward/sm90/producer.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/setmaxnreg.cuh"

namespace flashmoe::sm90_backward {

// The kernel's whole body. Instances are __global__ functions around it, launched with the tile's
// num_threads() and smem_bytes().
template <typename T, Sm90BackwardTile TILE, Variant VARIANT = Variant{}>
__device__ __forceinline__ void attention_backward(const Sm90BackwardParams& params) {
  ptx::griddepcontrol_launch_dependents();
  // What the 128-byte swizzle and its descriptors need.
  extern __shared__ __align__(1024) unsigned char smem_raw[];
  const Smem<TILE> smem(ptx::smem_address(smem_raw));
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&params.q);
    ptx::prefetch_tensormap(&params.k);
    ptx::prefetch_tensormap(&params.v);
    ptx::prefetch_tensormap(&params.dout);
    ptx::prefetch_tensormap(&params.stats_rows);
    ptx::mbarrier_init(smem.full_K, 1);
    ptx::mbarrier_init(smem.full_V, 1);
    for (int s = 0; s < TILE.num_stages; ++s) {
      ptx::mbarrier_init(smem.full_Q + 8 * s, 1);
      ptx::mbarrier_init(smem.empty_Q + 8 * s, 4 * TILE.CONSUMERS);
    }
    for (int s = 0; s < TILE.do_stages; ++s) {
      ptx::mbarrier_init(smem.full_dO + 8 * s, 1);
      ptx::mbarrier_init(smem.empty_dO + 8 * s, 4 * TILE.CONSUMERS);
    }
    for (int s = 0; s < TILE.ds_stages; ++s) {
      ptx::mbarrier_init(smem.full_dS + 8 * s, 4 * TILE.CONSUMERS);
      ptx::mbarrier_init(smem.empty_dS + 8 * s, 4 * TILE.CONSUMERS);
    }
    if constexpr (VARIANT.deterministic) {
      for (int step = 0; step < 2; ++step) {
        ptx::mbarrier_init(of_step(smem.turn, step), 1);
        ptx::mbarrier_init(of_step(smem.added, step), 4 * TILE.CONSUMERS);
        ptx::mbarrier_init(of_step(smem.passed, step), 1);
      }
      ptx::griddepcontrol_wait();  // for the zeros that tickets and turns are counted from
      ptx::st_shared_b32(smem.ticket, draw_ticket(params));
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int index = VARIANT.deterministic ? ptx::ld_shared_b32(smem.ticket) : blockIdx.x;
  if (!Work::is_there<VARIANT>(params, index)) {
    // This kernel ends after the one before, even where it has no work at all: the next relies on
    // it.
    ptx::griddepcontrol_wait();
    return;
  }
  const Work work = Work::of<TILE, VARIANT>(params, index);
  // Through a shuffle, so that the compiler knows it as uniform in a warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<TILE.PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce<TILE, VARIANT>(params, smem, work);
    if constexpr (VARIANT.deterministic) {
      if (threadIdx.x == 32) await_turns<TILE, VARIANT>(params, smem, work);
      if (threadIdx.x == 64) pass_turns<TILE, VARIANT>(params, smem, work);
    }
  } else {
    ptx::setmaxnreg_inc<TILE.CONSUMER_REGISTERS>();
    if constexpr (TILE.by_roles()) {
      const Roles<T, TILE, VARIANT> roles{{params, smem, work, warpgroup - 1}};
      if (warpgroup == 1) {
        roles.first();
      } else {
        roles.second();
      }
    } else if constexpr (TILE.late_dq) {
      consume_keys_late<T, TILE, VARIANT>(params, smem, work, warpgroup - 1);
    } else {
      consume_keys<T, TILE, VARIANT>(params, smem, work, warpgroup - 1);
    }
  }
}

}  // namespace flashmoe::sm90_backward
