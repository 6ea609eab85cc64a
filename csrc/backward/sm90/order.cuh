// Deterministic dQ: thread blocks add to the sum of a block of queries in a fixed order, that of
// their keys from the last to the first, so that its bits are the same every time.
#pragma once

#include "backward/sm90/work.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/red.cuh"

namespace flashmoe::sm90_backward {

// One thread of a warp that has nothing else to do: waits in device memory until the thread blocks
// before have added to a block of queries, lets the consumers add, and passes the turn on. Its
// release covers their additions, too: they arrived at the mbarrier behind them.
//
// A thread block waits for thread blocks of later keys only, of the same head. Those have drawn
// smaller tickets, so they run or have ended, and the one with the smallest waits for nobody. With
// a limit on the right, those of later keys begin at later queries and are ahead from the start.
template <Sm90BackwardTile TILE, Variant VARIANT>
__device__ __forceinline__ void keep_order(const Sm90BackwardParams& params, const Smem<TILE>& smem,
                                           const Work& work) {
  const AttentionParams& p = params.call.attention;
  const Mask mask = mask_of<VARIANT>(p);
  const int group = p.heads_q / p.heads_kv, n_block = work.n_start / TILE.block_n;
  const Sequence& s = work.sequence;
  int* turns = params.turns + work.row_block<VARIANT>(params, work.head_kv * group);
  int parity = 0;
#pragma unroll 1
  for (int head = 0; head < group; ++head, turns += params.m_blocks) {
#pragma unroll 1
    for (int m = work.m_first; m < work.m_end<VARIANT>(params); ++m, parity ^= 1) {
      // Blocks of keys that see some of these queries are neighbours: up to this one.
      const int row = m * TILE.block_m;
      const KeyRange keys =
          visible(mask, row, row + TILE.block_m, seqlen_q<VARIANT>(p, s), seqlen_kv<VARIANT>(p, s));
      const int last = (keys.end + TILE.block_n - 1) / TILE.block_n - 1;
      ptx::ld_acquire_gpu_until(turns + m, last - n_block);
      ptx::st_shared_b32(smem.first, last == n_block);
      ptx::mbarrier_arrive(smem.turn);
      ptx::mbarrier_wait_parity(smem.added, parity);
      ptx::red_release_gpu_add(turns + m, 1);
    }
  }
}

// A thread block's place in the order of their starts, which launches do not promise to be that of
// their numbers.
__device__ __forceinline__ int draw_ticket(const Sm90BackwardParams& params) {
  return atomicAdd(params.ticket, 1);
}

}  // namespace flashmoe::sm90_backward
