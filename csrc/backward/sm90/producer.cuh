// The producer of the Hopper backward kernel: one thread that fetches a block of K and V, then
// block by block Q, its rows' statistics, and dO.
#pragma once

#include "backward/sm90/work.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace flashmoe::sm90_backward {

template <Sm90BackwardTile TILE, Variant VARIANT>
__device__ __forceinline__ void produce(const Sm90BackwardParams& params, const Smem<TILE>& smem,
                                        const Work& work) {
  const AttentionParams& p = params.call.attention;
  const Place q_rows = q_place<VARIANT>(work.sequence), k_rows = k_place<VARIANT>(work.sequence);
  auto load_panels = [&](unsigned dst, const ptx::TensorMap* map, unsigned full, int rows, int row,
                         int head, const Place& place) {
#pragma unroll 1
    for (int panel = 0; panel < TILE.panels(); ++panel) {
      load_box<VARIANT>(dst + panel * rows * 128, map, full, panel * 64, row, head, work.batch,
                        place);
    }
  };
  // A buffer that was never filled counts as released: the phase before the first has parity 1.
  Ring<TILE.num_stages> q_ring;
  Ring<TILE.do_stages> do_ring;
  const int group = p.heads_q / p.heads_kv;
  bool first = true;
  ptx::mbarrier_arrive_expect_tx(smem.full_K, TILE.kv_bytes());
  load_panels(smem.K, &params.k, smem.full_K, TILE.block_n, work.n_start, work.head_kv, k_rows);
  ptx::griddepcontrol_wait();  // for the statistics, and the zeros that dQ is added to
#pragma unroll 1
  for (int head = work.head_kv * group; head < (work.head_kv + 1) * group; ++head) {
    // The launch keeps blocks of queries below 2^31.
    const int row_block = static_cast<int>(work.row_block<VARIANT>(params, head));
    int i = work.m_first, end = work.m_end<VARIANT>(params), m = work.m_start;
    [[maybe_unused]] int index = 0;  // in a mask's list
    const MaskList<TILE> list = MaskList<TILE>::of(params, work, head);
    if constexpr (VARIANT.mask) {
      i = 0, end = list.count();
      index = list.template start<VARIANT>(params, work, end);
    }
#pragma unroll 1
    for (; i < end; ++i) {
      if constexpr (VARIANT.mask) {
        m = list.entry(index).tile();
        if (++index == end) index = 0;
      }
      const unsigned full_Q = smem.full_Q + 8 * q_ring.stage();
      ptx::mbarrier_wait_parity(smem.empty_Q + 8 * q_ring.stage(), q_ring.parity() ^ 1);
      ptx::mbarrier_arrive_expect_tx(full_Q, TILE.q_bytes() + TILE.stats_bytes());
      load_panels(smem.Q + q_ring.stage() * TILE.q_bytes(), &params.q, full_Q, TILE.block_m,
                  m * TILE.block_m, head, q_rows);
      // As a tensor: racecheck does not follow the arrival of bulk copies of bytes.
      ptx::cp_async_bulk_tensor_4d_load(smem.stats + q_ring.stage() * TILE.stats_bytes(),
                                        &params.stats_rows, full_Q, 0, row_block + m, 0, 0);
      q_ring.next();
      if (first) {
        first = false;
        ptx::mbarrier_arrive_expect_tx(smem.full_V, TILE.kv_bytes());
        load_panels(smem.V, &params.v, smem.full_V, TILE.block_n, work.n_start, work.head_kv,
                    k_rows);
      }
      const unsigned full_dO = smem.full_dO + 8 * do_ring.stage();
      ptx::mbarrier_wait_parity(smem.empty_dO + 8 * do_ring.stage(), do_ring.parity() ^ 1);
      ptx::mbarrier_arrive_expect_tx(full_dO, TILE.q_bytes());
      load_panels(smem.dO + do_ring.stage() * TILE.q_bytes(), &params.dout, full_dO, TILE.block_m,
                  m * TILE.block_m, head, q_rows);
      do_ring.next();
      m += work.direction<VARIANT>();
      if (m == work.m_end<VARIANT>(params)) m = work.m_first;
    }
  }
  if (first) {
    ptx::mbarrier_arrive_expect_tx(smem.full_V, TILE.kv_bytes());
    load_panels(smem.V, &params.v, smem.full_V, TILE.block_n, work.n_start, work.head_kv, k_rows);
  }
}

}  // namespace flashmoe::sm90_backward
