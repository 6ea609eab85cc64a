// The consumers of the Hopper backward up to head_dim 128, with dQ a step late: a warpgroup need
// not wait for the other one's dS, so that one may be at its exponentials while the other
// multiplies.
#pragma once

#include "backward/sm90/consumer.cuh"

namespace flashmoe::sm90_backward {

template <typename T, Sm90BackwardTile TILE, Variant VARIANT>
__device__ __forceinline__ void consume_keys_late(const Sm90BackwardParams& params,
                                                  const Smem<TILE>& smem, const Work& work, int w) {
  using C = Consumer<T, TILE, VARIANT>;
  constexpr int BLOCK_M = TILE.block_m;
  const C c{params, smem, work, w};
  const Dropout dropout = c.dropout();
  typename C::Gradient dK_rmem, dV_rmem;
  typename C::Scores S_rmem, dP_rmem;
  typename C::Operand P_rmem, dS_rmem;
  typename C::PartOfDQ dQ_rmem;
  Ring<TILE.num_stages> q_ring, q_ring_ahead;
  Ring<TILE.do_stages> do_ring;
  Ring<TILE.ds_stages> ds_ring, dq_ring;
#pragma unroll
  for (int i = 0; i < TILE.head_dim / 2; ++i) dK_rmem[i] = dV_rmem[i] = 0.f;
  // Or ptxas sets them to 0 behind the first wgmma, and serializes (C7515).
  ptx::fence_registers(dK_rmem);
  ptx::fence_registers(dV_rmem);

  auto steps = steps_of<TILE, VARIANT>(params, work, work.n_start + w * 64);
  // S of the step after; the last one has none, and computes its own again for nothing: a branch
  // around it makes ptxas serialize.
  auto start_S = [&](bool more) {
    if (more) {
      q_ring_ahead.next();
      ptx::mbarrier_wait_parity(smem.full_Q + 8 * q_ring_ahead.stage(), q_ring_ahead.parity());
    }
    c.start_scores(S_rmem, smem.K, smem.Q + q_ring_ahead.stage() * TILE.q_bytes());
  };
  Queries next{};  // whose dQ is next
  auto wait_dS = [&] {
    ptx::mbarrier_wait_parity(smem.full_dS + 8 * dq_ring.stage(), dq_ring.parity());
  };
  auto add_dQ = [&](int step) {
    c.release(smem.empty_dS + 8 * dq_ring.stage());
    dq_ring.next();
    c.add_dQ(dQ_rmem, next, w, c.await_turn(step));
    c.pass_turn(step);
  };
  ptx::mbarrier_wait_parity(smem.full_K, 0);
  if (steps.count > 0) {
    ptx::mbarrier_wait_parity(smem.full_Q, 0);
    start_S(false);
    ptx::mbarrier_wait_parity(smem.full_V, 0);
    ptx::wgmma_wait_group<0>();
    ptx::fence_registers(S_rmem);
#pragma unroll 1
    for (int step = 1; step <= steps.count; ++step) {
      const float slope = c.slope(steps.head);
      const unsigned Q = smem.Q + q_ring.stage() * TILE.q_bytes();
      const unsigned dO = smem.dO + do_ring.stage() * TILE.q_bytes();
      const unsigned stats = smem.stats + q_ring.stage() * TILE.stats_bytes();
      ptx::mbarrier_wait_parity(smem.full_dO + 8 * do_ring.stage(), do_ring.parity());
      c.start_scores(dP_rmem, smem.V, dO);
      c.weigh(steps, S_rmem, P_rmem, stats, slope, dropout);
      c.start_gradient(dV_rmem, P_rmem, dO);
      ptx::wgmma_wait_group<1>();  // dP
      ptx::fence_registers(dP_rmem);
      c.differentiate(S_rmem, dP_rmem, dS_rmem, stats + 4 * BLOCK_M);
      ptx::mbarrier_wait_parity(smem.empty_dS + 8 * ds_ring.stage(), ds_ring.parity() ^ 1);
      c.store_dS(dS_rmem, smem.dS + ds_ring.stage() * TILE.ds_bytes());
      __syncwarp();
      c.release(smem.full_dS + 8 * ds_ring.stage());
      ptx::wgmma_wait_group<0>();  // dV
      ptx::fence_registers(dV_rmem);
      c.release(smem.empty_dO + 8 * do_ring.stage());
      // Before the first step there is none: what is computed then is thrown away.
      if (step > 1) wait_dS();
      c.start_dQ(dQ_rmem, smem.dS + dq_ring.stage() * TILE.ds_bytes(), w);
      c.start_gradient(dK_rmem, dS_rmem, Q);
      start_S(step < steps.count);
      ptx::wgmma_wait_group<2>();  // dQ
      ptx::fence_registers(dQ_rmem);
      if (step > 1) add_dQ(step - 2);
      next = steps;
      ptx::wgmma_wait_group<0>();
      ptx::fence_registers(S_rmem);
      c.release(smem.empty_Q + 8 * q_ring.stage());
      q_ring.next();
      do_ring.next();
      ds_ring.next();
      steps.next(step < steps.count);
    }
    wait_dS();
    c.start_dQ(dQ_rmem, smem.dS + dq_ring.stage() * TILE.ds_bytes(), w);
    ptx::wgmma_wait_group<0>();
    ptx::fence_registers(dQ_rmem);
    c.add_dQ(dQ_rmem, next, w, c.await_turn(steps.count - 1));
    c.pass_turn(steps.count - 1);
  }
  ptx::wgmma_wait_group<0>();
  ptx::fence_registers(dK_rmem);
  ptx::fence_registers(dV_rmem);
  ptx::mbarrier_wait_parity(smem.full_V, 0);  // even where no query sees these keys
  const float rescale = C::rescale(params.call.attention);
  c.stage(dV_rmem, smem.V, rescale);
  ptx::bar_sync(C::BARRIER_DS, C::ALL);  // the other warpgroup's dQ has read K
  c.stage(dK_rmem, smem.K, params.call.attention.softmax_scale * rescale);
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(C::BARRIER_MINE + w, 128);
  if (threadIdx.x % 128 == 0) {
    c.store(&params.dv, smem.V);
    c.store(&params.dk, smem.K);
  }
}

}  // namespace flashmoe::sm90_backward
