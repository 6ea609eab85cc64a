// The producer of the Hopper forward kernel: one thread that chooses blocks of rows and fetches
// their Q, K and V by TMA.
#pragma once

#include "forward/sm90/work.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/mbarrier.cuh"

namespace flashmoe::sm90 {

// How many blocks of rows a packed batch has for each head, once it is known; 0 without a list.
__device__ __forceinline__ int await_list(const Sm90Params& params) {
  if (!is_listed(params)) return 0;
  ptx::griddepcontrol_wait();
  return ptx::ld_global_cg_v4(params.schedule.counts).x;
}

// Fetches in the order in which consumers need it: K one tile ahead of V, across blocks of rows.
// Also chooses the work: blocks of rows that differ in length are drawn from a counter, as late as
// their loads allow, so that no thread block is left with more than the others.
template <Sm90Tile TILE, Variant VARIANT>
__device__ __forceinline__ void produce(const Sm90Params& params, const Smem<TILE>& smem) {
  using S = Smem<TILE>;
  // With a second buffer, Q of the next block of rows is fetched while this one is multiplied.
  constexpr bool Q_AHEAD = TILE.q_stages > 1;
  const AttentionParams& p = params.attention;
  // A buffer that was never filled counts as released: the phase before the first has parity 1.
  Ring<TILE.q_stages> q_ring;
  Ring<TILE.num_stages> k_ring, v_ring;
  Ring<S::WORK_SLOTS> work_ring;
  auto publish = [&](const Work& work) {
    ptx::mbarrier_wait_parity(smem.empty_work + 8 * work_ring.stage(), work_ring.parity() ^ 1);
    write_work<VARIANT>(smem, work_ring.stage(), work);
    ptx::mbarrier_arrive(smem.full_work + 8 * work_ring.stage());
    work_ring.next();
  };
  int index = blockIdx.x;
  const int listed = VARIANT.packed ? await_list(params) : 0;
  auto draw = [&] {
    if constexpr (VARIANT.packed) {
      if (is_listed(params)) index = gridDim.x + atomicAdd(params.schedule.counts + 2, 1);
      return;
    }
    if (params.counter == nullptr) {
      index += gridDim.x;
      return;
    }
    // Every thread block draws one number past the end: the last of all leaves the counter at 0,
    // and so do two launches of the same work that draw from it at once.
    index = gridDim.x + atomicInc(params.counter, params.num_work - 1);
  };
  auto decode = [&] {
    const Work none{NO_WORK, 0, 0, 0, {}};
    if constexpr (VARIANT.packed) {
      return index < listed * p.heads_q ? packed_work_at<TILE, VARIANT>(params, index, listed)
                                        : none;
    } else {
      return index < params.num_work ? work_at<TILE, VARIANT>(params, index) : none;
    }
  };
  auto load_Q = [&](const Work& work) {
    const Place place = q_place<VARIANT>(work.sequence);
#pragma unroll 1  // 24 registers are few
    for (int w = 0; w < TILE.consumers(); ++w) {
      const int buffer = q_ring.stage() * TILE.consumers() + w;
      const unsigned full = smem.full_Q + 8 * buffer, dst = smem.Q + buffer * S::Q_BYTES;
      ptx::mbarrier_wait_parity(smem.empty_Q + 8 * buffer, q_ring.parity() ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, S::PANELS * 8192);
#pragma unroll 1
      for (int panel = 0; panel < S::PANELS; ++panel) {
        const int row = work.m_start + w * 64;
        load_box<VARIANT>(dst + panel * 8192, &params.q, full, panel * 64, row, work.head,
                          work.batch, place);
      }
    }
    q_ring.next();
  };
  Place kv_place{};
  auto load = [&](int panels, const ptx::TensorMap* map, unsigned dst, unsigned full,
                  unsigned empty, int head_kv, int batch, int n, Ring<TILE.num_stages>& ring) {
    const int bytes = panels * TILE.block_n * 128;
    ptx::mbarrier_wait_parity(empty + 8 * ring.stage(), ring.parity() ^ 1);
    ptx::mbarrier_arrive_expect_tx(full + 8 * ring.stage(), bytes);
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) {
      load_box<VARIANT>(dst + ring.stage() * bytes + panel * TILE.block_n * 128, map,
                        full + 8 * ring.stage(), panel * 64, n * TILE.block_n, head_kv, batch,
                        kv_place);
    }
    ring.next();
  };
  int head_kv = 0, batch = 0;
  int n_first = 0;                     // tiles of a block of rows are counted from this one on
  [[maybe_unused]] unsigned list = 0;  // of them, with a mask
  // Whose tiles plain kernels must not see, either.
  auto load_K = [&](int n) {
    if constexpr (VARIANT.mask) {
      n = ListedTile{listed_at(params.mask_tiles, list, n + 1)}.tile();
      load(S::PANELS, &params.k, smem.K, smem.full_K, smem.empty_K, head_kv, batch, n, k_ring);
    } else {
      load(S::PANELS, &params.k, smem.K, smem.full_K, smem.empty_K, head_kv, batch, n_first + n,
           k_ring);
    }
  };
  auto load_V = [&](int n) {
    if constexpr (VARIANT.mask) {
      n = ListedTile{listed_at(params.mask_tiles, list, n + 1)}.tile();
      load(S::O_PANELS, &params.v, smem.V, smem.full_V, smem.empty_V, head_kv, batch, n, v_ring);
    } else {
      load(S::O_PANELS, &params.v, smem.V, smem.full_V, smem.empty_V, head_kv, batch, n_first + n,
           v_ring);
    }
  };
  // The last tile of V of a block of rows is fetched with the next one's first of K.
  auto v_owed = [&] { return v_ring.state != k_ring.state; };
  bool q_ahead = false;  // Q is on its way already
  Work work = VARIANT.packed && !is_listed(params) ? read_work<VARIANT>(smem, 0) : decode();
  while (true) {
    const int slot = work_ring.stage();
    publish(work);
    if (work.n_tiles == NO_WORK) break;
    if (v_owed()) load_V(0);  // before more blocks are told of: serial consumers may wait for it
    if (work.n_tiles == 0) {
      draw();
      work = decode();
      continue;
    }
    work = read_work<VARIANT>(smem, slot);  // rather than spill it
    head_kv = params.group.divide(work.head), batch = work.batch;
    if constexpr (VARIANT.packed) kv_place = k_place<VARIANT>(work.sequence);
    n_first =
        VisibleKeys<VARIANT>{p, work.sequence}.template first_tile<TILE.block_n>(work.m_start);
    if constexpr (VARIANT.mask) list = mask_list<TILE>(params.mask_tiles, work);
    // One buffer of Q is free only when its consumer is done with the block before. Serial ones
    // have nothing else to do until then: K and V are fetched meanwhile.
    if (!TILE.serial && !q_ahead) load_Q(work);
    load_K(work.n_tiles - 1);
    if (TILE.serial) {
      load_V(work.n_tiles - 1);
      if (!q_ahead) load_Q(work);
    }
    constexpr int LATE = 4;  // tiles before the end: enough to hide how long a draw takes
    if (Q_AHEAD || work.n_tiles <= LATE) draw();
    q_ahead = false;
#pragma unroll 1
    for (int n = work.n_tiles - 1; n > 0; --n) {
      if (!Q_AHEAD && n == LATE) draw();
      load_K(n - 1);
      if (!TILE.serial || n < work.n_tiles - 1) load_V(n);
      if (Q_AHEAD && n == work.n_tiles - 2) {
        const Work next = decode();
        q_ahead = next.n_tiles > 0;
        if (q_ahead) load_Q(next);
      }
    }
    work = decode();
  }
  if (v_owed()) load_V(0);
}

}  // namespace flashmoe::sm90
