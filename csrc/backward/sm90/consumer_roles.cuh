// The consumers of the Hopper backward beyond head_dim 128, where one warpgroup cannot hold both
// gradients of 64 keys: the first one computes P and keeps dV, the second computes dS from it and
// keeps dK. Each computes half of the columns of dQ.
#pragma once

#include "backward/sm90/consumer.cuh"

namespace flashmoe::sm90_backward {

// P is handed on in float16, whose relative precision for a P from 6e-5 on is better than
// bfloat16's, and whose error below that is 3e-8: as each thread holds it, which is as the other
// warpgroup's threads hold dP.
template <typename T, Sm90BackwardTile TILE, Variant VARIANT>
struct Roles : Consumer<T, TILE, VARIANT> {
  using C = Consumer<T, TILE, VARIANT>;
  static constexpr int BLOCK_M = TILE.block_m, PARTS = TILE.panels() / 2;
  static_assert(TILE.panels() % 2 == 0 && BLOCK_M == 64, "two warpgroups share the columns of dQ");

  __device__ __forceinline__ unsigned handed_on() const {
    return this->smem.P + threadIdx.x % 128 * 16;
  }
  __device__ __forceinline__ void hand_on(const typename C::Scores& P_rmem) const {
#pragma unroll
    for (int i = 0; i < BLOCK_M / 16; ++i) {
      int x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] = int(ptx::cvt_rn_x2<__half>(P_rmem[8 * i + 2 * j], P_rmem[8 * i + 2 * j + 1]));
      }
      ptx::st_shared_v4(handed_on() + i * 2048, make_int4(x[0], x[1], x[2], x[3]));
    }
  }
  __device__ __forceinline__ void take(typename C::Scores& P_rmem) const {
#pragma unroll
    for (int i = 0; i < BLOCK_M / 16; ++i) {
      const int4 packed = ptx::ld_shared_v4(handed_on() + i * 2048);
      const int x[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 p = ptx::cvt_f32_x2<__half>(x[j]);
        P_rmem[8 * i + 2 * j] = p.x;
        P_rmem[8 * i + 2 * j + 1] = p.y;
      }
    }
  }
  __device__ __forceinline__ void store_gradient(typename C::Gradient& g_rmem,
                                                 const ptx::TensorMap* map, unsigned keys,
                                                 float scale) const {
    ptx::wgmma_wait_group<0>();
    ptx::fence_registers(g_rmem);
    ptx::bar_sync(C::BARRIER_DS, C::ALL);  // the other warpgroup has read K and V
    this->stage(g_rmem, keys, scale);
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(C::BARRIER_MINE + this->w, 128);
    if (threadIdx.x % 128 == 0) this->store(map, keys);
  }

  // S, P, dV.
  __device__ __forceinline__ void first() const {
    const auto& smem = this->smem;
    typename C::Gradient dV_rmem;
    typename C::Scores S_rmem;
    typename C::Operand P_rmem;
    typename C::PartOfDQ dQ_rmem;
    Ring<TILE.num_stages> q_ring;
    Ring<TILE.do_stages> do_ring;
    const Dropout dropout = this->dropout();
#pragma unroll
    for (int i = 0; i < TILE.head_dim / 2; ++i) dV_rmem[i] = 0.f;
    ptx::fence_registers(dV_rmem);
    auto steps = steps_of<TILE, VARIANT>(this->params, this->work, this->work.n_start);
    auto start_S = [&] {
      this->start_scores(S_rmem, smem.K, smem.Q + q_ring.stage() * TILE.q_bytes());
    };
    ptx::mbarrier_wait_parity(smem.full_K, 0);
    ptx::mbarrier_wait_parity(smem.full_V, 0);
    if (steps.count > 0) {
      ptx::mbarrier_wait_parity(smem.full_Q, 0);
      start_S();
      ptx::wgmma_wait_group<0>();
      ptx::fence_registers(S_rmem);
#pragma unroll 1
      for (int step = 1; step <= steps.count; ++step) {
        const float slope = this->slope(steps.head);
        this->weigh(steps, S_rmem, P_rmem, smem.stats + q_ring.stage() * TILE.stats_bytes(), slope,
                    dropout);
        hand_on(S_rmem);
        ptx::bar_arrive(C::BARRIER_P, C::ALL);
        ptx::mbarrier_wait_parity(smem.full_dO + 8 * do_ring.stage(), do_ring.parity());
        this->start_gradient(dV_rmem, P_rmem, smem.dO + do_ring.stage() * TILE.q_bytes());
        this->release(smem.empty_Q + 8 * q_ring.stage());
        ptx::bar_sync(C::BARRIER_DS, C::ALL);
        bool adds_first = false;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          this->start_dQ(dQ_rmem, smem.dS, part);
          if (part < PARTS - 1) {
            ptx::wgmma_wait_group<0>();
          } else {
            // S of the step after; the last one computes its own again for nothing.
            if (step < steps.count) {
              q_ring.next();
              ptx::mbarrier_wait_parity(smem.full_Q + 8 * q_ring.stage(), q_ring.parity());
            }
            start_S();
            ptx::wgmma_wait_group<1>();
          }
          if (part == 0) this->release(smem.empty_dO + 8 * do_ring.stage());
          ptx::fence_registers(dQ_rmem);
          if (part == 0) adds_first = this->await_turn(step - 1);
          this->add_dQ(dQ_rmem, steps, part, adds_first);
          if (part == PARTS - 1) this->pass_turn(step - 1);
        }
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(S_rmem);
        do_ring.next();
        steps.next(step < steps.count);
      }
    }
    store_gradient(dV_rmem, &this->params.dv, smem.V, C::rescale(this->p));
  }

  // dP, dS, dK.
  __device__ __forceinline__ void second() const {
    const auto& smem = this->smem;
    typename C::Gradient dK_rmem;
    typename C::Scores P_rmem, dP_rmem;
    typename C::Operand dS_rmem;
    typename C::PartOfDQ dQ_rmem;
    Ring<TILE.num_stages> q_ring;
    Ring<TILE.do_stages> do_ring;
#pragma unroll
    for (int i = 0; i < TILE.head_dim / 2; ++i) dK_rmem[i] = 0.f;
    ptx::fence_registers(dK_rmem);
    auto steps = steps_of<TILE, VARIANT>(this->params, this->work, this->work.n_start);
    auto start_dP = [&] {
      this->start_scores(dP_rmem, smem.V, smem.dO + do_ring.stage() * TILE.q_bytes());
    };
    ptx::mbarrier_wait_parity(smem.full_K, 0);
    ptx::mbarrier_wait_parity(smem.full_V, 0);
    if (steps.count > 0) {
      ptx::mbarrier_wait_parity(smem.full_dO, 0);
      start_dP();
      ptx::wgmma_wait_group<0>();
      ptx::fence_registers(dP_rmem);
#pragma unroll 1
      for (int step = 1; step <= steps.count; ++step) {
        this->release(smem.empty_dO + 8 * do_ring.stage());
        const unsigned stats = smem.stats + q_ring.stage() * TILE.stats_bytes();
        ptx::mbarrier_wait_parity(smem.full_Q + 8 * q_ring.stage(), q_ring.parity());
        ptx::bar_sync(C::BARRIER_P, C::ALL);
        take(P_rmem);
        this->differentiate(P_rmem, dP_rmem, dS_rmem, stats + 4 * BLOCK_M);
        this->store_dS(dS_rmem, smem.dS);
        ptx::bar_sync(C::BARRIER_DS, C::ALL);
        bool adds_first = false;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          this->start_dQ(dQ_rmem, smem.dS, PARTS + part);
          if (part == 0) {
            this->start_gradient(dK_rmem, dS_rmem, smem.Q + q_ring.stage() * TILE.q_bytes());
            ptx::wgmma_wait_group<1>();
          } else {
            if (step < steps.count) {
              do_ring.next();
              ptx::mbarrier_wait_parity(smem.full_dO + 8 * do_ring.stage(), do_ring.parity());
            }
            start_dP();
            ptx::wgmma_wait_group<1>();
            this->release(smem.empty_Q + 8 * q_ring.stage());
          }
          ptx::fence_registers(dQ_rmem);
          if (part == 0) adds_first = this->await_turn(step - 1);
          this->add_dQ(dQ_rmem, steps, PARTS + part, adds_first);
          if (part == PARTS - 1) this->pass_turn(step - 1);
        }
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(dP_rmem);
        q_ring.next();
        steps.next(step < steps.count);
      }
    }
    store_gradient(dK_rmem, &this->params.dk, smem.K, this->p.softmax_scale * C::rescale(this->p));
  }
};

}  // namespace flashmoe::sm90_backward
