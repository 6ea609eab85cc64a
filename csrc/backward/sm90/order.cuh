// Deterministic dQ: thread blocks add to the sum of a block of queries in a fixed order, that of
// their keys from the last to the first, or from the first on, so that its bits are the same every
// time.
#pragma once

#include "backward/sm90/work.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/red.cuh"

namespace flashmoe::sm90_backward {

// A thread block's steps, as the threads that keep the order go over them: `visit` gets a step's
// number from 0, its count in device memory, its block of queries and their head.
template <Sm90BackwardTile TILE, Variant VARIANT, typename Visit>
__device__ __forceinline__ void for_each_step(const Sm90BackwardParams& params, const Work& work,
                                              const Visit& visit) {
  const AttentionParams& p = params.call.attention;
  const int group = p.heads_q / p.heads_kv;
  const int count = work.m_end<VARIANT>(params) - work.m_first;
  int* turns = params.turns + work.row_block<VARIANT>(params, work.head_kv * group);
  int step = 0;
#pragma unroll 1
  for (int head = 0; head < group; ++head, turns += params.m_blocks) {
    if constexpr (VARIANT.mask) {
      const int head_q = work.head_kv * group + head;
      const MaskList<TILE> list = MaskList<TILE>::of(params, work, head_q);
      const int listed = list.count();
#pragma unroll 1
      for (int i = 0; i < listed; ++i, ++step) {
        const int m = list.entry(i).tile();
        visit(step, turns + m, m, head_q);
      }
      continue;
    }
    int m = work.m_start;
#pragma unroll 1
    for (int i = 0; i < count; ++i, ++step, m += work.direction<VARIANT>()) {
      visit(step, turns + m, m, head);
    }
  }
}

// Two steps may be under way, of which the second has its turn before the first has added: each
// has mbarriers of its own.
__device__ __forceinline__ unsigned of_step(unsigned barriers, int step) {
  return barriers + (step & 1) * 8;
}
__device__ __forceinline__ int parity_of_step(int step) { return step >> 1 & 1; }

// Two threads of warps that have nothing else to do keep the order. This one waits in device memory
// until the thread blocks before have added to a block of queries, and lets the consumers add.
//
// A thread block waits for thread blocks of the same head only, which have drawn smaller tickets.
// So they run or have ended, and the one with the smallest waits for nobody.
template <Sm90BackwardTile TILE, Variant VARIANT>
__device__ __forceinline__ void await_turns(const Sm90BackwardParams& params,
                                            const Smem<TILE>& smem, const Work& work) {
  const AttentionParams& p = params.call.attention;
  const Mask mask = mask_of<VARIANT>(p);
  const Sequence& s = work.sequence;
  const int n_block = work.n_start / TILE.block_n;
  for_each_step<TILE, VARIANT>(params, work, [&](int step, const int* turn, int m, int head) {
    // Blocks of keys that see some of these queries are neighbours.
    const int row = m * TILE.block_m;
    const KeyRange keys =
        visible(mask, row, row + TILE.block_m, seqlen_q<VARIANT>(p, s), seqlen_kv<VARIANT>(p, s));
    const int last = (keys.end + TILE.block_n - 1) / TILE.block_n - 1;
    int before = work.is_descending ? n_block - keys.begin / TILE.block_n : last - n_block;
    if constexpr (VARIANT.mask) {
      const MaskTiles& tiles = params.mask_tiles;
      const MaskList<TILE> list = MaskList<TILE>::of(params, work, head);
      const unsigned char* seen = list.seen(m);
      before = 0;
      for (int n = n_block + 1; n < params.n_blocks; ++n) {
        seen += static_cast<long long>(tiles.block_stride) * tiles.room;
        before += *seen;
      }
    }
    ptx::mbarrier_wait_parity(of_step(smem.passed, step), parity_of_step(step) ^ 1);
    ptx::ld_acquire_gpu_until(turn, before);
    // Under a mask there are zeros to add to.
    ptx::st_shared_b32(of_step(smem.first, step), !VARIANT.mask && before == 0);
    ptx::mbarrier_arrive(of_step(smem.turn, step));
  });
}

// And this one passes turns on. Its release covers the consumers' additions, too: they arrived at
// the mbarrier behind them. It takes as long as these take to reach L2, which is why the other
// thread does not wait for it.
template <Sm90BackwardTile TILE, Variant VARIANT>
__device__ __forceinline__ void pass_turns(const Sm90BackwardParams& params, const Smem<TILE>& smem,
                                           const Work& work) {
  for_each_step<TILE, VARIANT>(params, work, [&](int step, int* turn, int, int) {
    ptx::mbarrier_wait_parity(of_step(smem.added, step), parity_of_step(step));
    ptx::mbarrier_arrive(of_step(smem.passed, step));
    ptx::red_release_gpu_add(turn, 1);
  });
}

// A thread block's place in the order of their starts, which launches do not promise to be that of
// their numbers.
__device__ __forceinline__ int draw_ticket(const Sm90BackwardParams& params) {
  return atomicAdd(params.ticket, 1);
}

}  // namespace flashmoe::sm90_backward
