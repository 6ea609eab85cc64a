// What the producer and the consumers of the Hopper backward kernel share: a thread block's keys,
// the queries that see them, the plan of shared memory, and the rings of buffers in it.
#pragma once

#include "backward/sm90/tile.h"
#include "common/packed.cuh"
#include "ptx/registers.cuh"

namespace flashmoe::sm90_backward {

template <Sm90BackwardTile TILE>
struct Smem {
  unsigned K, V, Q, dO, dS, P, stats, full_K, full_V, full_Q, empty_Q, full_dO, empty_dO, full_dS,
      empty_dS;
  unsigned turn, added, passed, first, ticket;  // of deterministic kernels (order.cuh)

  __device__ __forceinline__ explicit Smem(unsigned base) {
    K = base;
    V = K + TILE.kv_bytes();
    Q = V + TILE.kv_bytes();
    dO = Q + TILE.num_stages * TILE.q_bytes();
    dS = dO + TILE.do_stages * TILE.q_bytes();
    P = dS + TILE.ds_stages * TILE.ds_bytes();
    stats = P + TILE.p_bytes();
    full_K = stats + TILE.num_stages * TILE.stats_bytes();
    full_V = full_K + 8;
    full_Q = full_V + 8;
    empty_Q = full_Q + 8 * TILE.num_stages;
    full_dO = empty_Q + 8 * TILE.num_stages;
    empty_dO = full_dO + 8 * TILE.do_stages;
    full_dS = empty_dO + 8 * TILE.do_stages;
    empty_dS = full_dS + 8 * TILE.ds_stages;
    turn = empty_dS + 8 * TILE.ds_stages;
    added = turn + 16;
    passed = added + 16;
    first = passed + 16;
    ticket = first + 16;
  }
};

// What a kernel honours of a mask. Plain ones are given none or a causal one, and know it.
template <Variant VARIANT>
__device__ __forceinline__ Mask mask_of(const AttentionParams& p) {
  return {VARIANT.local ? p.mask.left : -1, p.mask.right};
}
// How far to the right a query sees, where there is a limit: plain kernels have no other than 0.
template <Variant VARIANT>
__device__ __forceinline__ int reach(const AttentionParams& p) {
  return VARIANT.local ? p.mask.right : 0;
}

// A thread block's keys of one head, and the blocks of queries that see some of them: from m_first
// to m_end - 1, the same ones of each query head of the group. Each head begins at m_start.
struct Work {
  int batch, head_kv, n_start, m_first, m_last, m_start;
  Sequence sequence;
  int first_block;             // of packed kernels: blocks of queries of sequences before
  bool is_descending = false;  // of deterministic kernels: whether it goes down the queries

  template <Variant VARIANT>
  __device__ __forceinline__ int direction() const {
    return VARIANT.deterministic && is_descending ? -1 : 1;
  }

  // Plain kernels take the one that they know anyway.
  template <Variant VARIANT>
  __device__ __forceinline__ int m_end(const Sm90BackwardParams& params) const {
    return VARIANT.local || VARIANT.packed ? m_last + 1 : params.m_blocks;
  }
  // The number of a query head's first block of queries over all heads and sequences.
  template <Variant VARIANT>
  __device__ __forceinline__ long long row_block(const Sm90BackwardParams& params, int head) const {
    if constexpr (VARIANT.packed)
      return static_cast<long long>(head) * params.m_blocks + first_block;
    return (static_cast<long long>(batch) * params.call.attention.heads_q + head) * params.m_blocks;
  }

  // Whether there is work of a number: packed kernels are launched for as much as there may be.
  template <Variant VARIANT>
  __device__ __forceinline__ static bool is_there(const Sm90BackwardParams& params, int index) {
    if constexpr (!VARIANT.packed) return true;
    const int listed = ptx::ld_global_cg_v4(params.schedule.counts).y;
    return index < listed * params.call.attention.heads_kv;
  }

  template <Sm90BackwardTile TILE, Variant VARIANT>
  __device__ __forceinline__ static Work of(const Sm90BackwardParams& params, int index) {
    const AttentionParams& p = params.call.attention;
    const Mask mask = mask_of<VARIANT>(p);
    Work work;
    int pair = 0, n_block;
    int m_blocks = params.m_blocks, n_blocks = params.n_blocks;  // of the sequence
    if constexpr (VARIANT.packed) {
      // In sections of heads as well, each of which goes through the list of all sequences' blocks.
      const int per_section = params.section * ptx::ld_global_cg_v4(params.schedule.counts).y;
      const int first = index / per_section * params.section;
      const int heads = min(params.section, p.heads_kv - first);
      index %= per_section;
      const int place = index / heads;
      const PackedBlock block = load_block(params.schedule.keys + place);
      work.sequence = block.sequence;
      work.batch = block.batch;
      work.head_kv = first + index - place * heads;
      work.first_block = block.first_block;
      m_blocks = (work.sequence.seqlen_q + TILE.block_m - 1) / TILE.block_m;
      n_blocks = (work.sequence.seqlen_kv + TILE.block_n - 1) / TILE.block_n;
      n_block = block.start / TILE.block_n;
      work.m_last = m_blocks - 1;
    } else if (VARIANT.deterministic || !mask.is_full()) {
      // The longest first, in sections of heads that L2 holds.
      const int per_section = params.section * params.n_blocks;
      const int section = index / per_section, first = section * params.section;
      const int heads = min(params.section, p.batch * p.heads_kv - first);
      work.is_descending = VARIANT.deterministic && section >= params.descending_from;
      index %= per_section;
      n_block = index / heads;
      pair = first + index - n_block * heads;
    } else {
      pair = index / params.n_blocks;
      n_block = index - pair * params.n_blocks;
    }
    // The first keys are seen by the most queries where it is the limit on the right that hides
    // more, the last ones where it is the other (-1 hides nothing). Between narrow limits all
    // blocks but those at the ends are as long, and either order does. Deterministic: see
    // order.cuh.
    if (VARIANT.deterministic ? !work.is_descending
                              : VARIANT.local && unsigned(mask.left) < unsigned(mask.right)) {
      n_block = n_blocks - 1 - n_block;
    }
    if constexpr (!VARIANT.packed) {
      work.batch = pair / p.heads_kv;
      work.head_kv = pair - work.batch * p.heads_kv;
    }
    const Sequence& s = work.sequence;
    work.n_start = n_block * TILE.block_n;
    int first_row = work.n_start - (seqlen_kv<VARIANT>(p, s) - seqlen_q<VARIANT>(p, s));
    if constexpr (VARIANT.local) {
      const int n_end = min(work.n_start + TILE.block_n, seqlen_kv<VARIANT>(p, s));
      const KeyRange queries =
          seen_by(mask, work.n_start, n_end, seqlen_q<VARIANT>(p, s), seqlen_kv<VARIANT>(p, s));
      first_row = queries.begin;
      work.m_last = (queries.end + TILE.block_m - 1) / TILE.block_m - 1;
    }
    if (mask.right >= 0) {
      // Neighbours begin at other queries, a block of keys apart, and stay apart.
      work.m_first = work.m_start = min(max(first_row, 0) / TILE.block_m, m_blocks);
      if (work.is_descending) work.m_start = work.m_end<VARIANT>(params) - 1;
    } else if (VARIANT.deterministic) {
      // In step behind one another: each waits for the one before it anyway.
      work.m_first = work.m_start = 0;
    } else {
      // Each thread block somewhere else, or all would be at the same rows of Q and dQ all the
      // time.
      work.m_first = 0;
      work.m_start = static_cast<int>(static_cast<long long>(n_block) *
                                      work.m_end<VARIANT>(params) / n_blocks);
    }
    return work;
  }
};

// Of a mask's lists (MaskTiles) the one of a thread block's keys and a query head: the blocks of
// queries that see some of them.
template <Sm90BackwardTile TILE>
struct MaskList {
  const MaskTiles& tiles;
  unsigned list;

  __device__ __forceinline__ static MaskList of(const Sm90BackwardParams& params, const Work& work,
                                                int head) {
    const MaskTiles& tiles = params.mask_tiles;
    const int n_block = work.n_start / TILE.block_n;
    return {tiles, static_cast<unsigned>(work.batch * tiles.batch_stride +
                                         head * tiles.head_stride + n_block * tiles.block_stride)};
  }
  // Whether one block stands for all.
  __device__ __forceinline__ bool is_alike() const { return tiles.room < tiles.tiles; }
  __device__ __forceinline__ int at(int index) const {
    return tiles.lists[list * (tiles.room + 1u) + index];
  }
  __device__ __forceinline__ int count() const { return at(0); }
  __device__ __forceinline__ ListedTile entry(int index) const {
    return {is_alike() ? index << 2 | (at(1) & 3) : at(1 + index)};
  }
  // 1 where the block is seen, otherwise 0.
  __device__ __forceinline__ const unsigned char* seen(int m) const {
    return tiles.seen + list * static_cast<unsigned>(tiles.room) + (is_alike() ? 0 : m);
  }
  // Where to begin: somewhere else than the head's other thread blocks, as m_start of Work.
  template <Variant VARIANT>
  __device__ __forceinline__ int start(const Sm90BackwardParams& params, const Work& work,
                                       int count) const {
    if (VARIANT.deterministic || params.call.attention.mask.right >= 0) return 0;
    return static_cast<int>(static_cast<long long>(work.n_start / TILE.block_n) * count /
                            params.n_blocks);
  }
};

// Position in a ring of SIZE buffers and the parity of its current phase, in one register.
template <int SIZE>
struct Ring {
  int state = 0;
  __device__ __forceinline__ int stage() const { return SIZE == 1 ? 0 : state >> 1; }
  __device__ __forceinline__ int parity() const { return state & 1; }
  __device__ __forceinline__ void next() {
    state += 2;
    if (state >= 2 * SIZE) state = (state & 1) ^ 1;
  }
};

// Shared memory descriptor of a wgmma operand: 128-byte swizzle, 1024 bytes between groups of 8
// rows; `leading_bytes` between panels of 64 columns matters for MN-major operands only. Offsets
// are added to the low word, which holds the address in units of 16 bytes.
struct Descriptor {
  unsigned low;
  __device__ __forceinline__ Descriptor(unsigned smem, unsigned leading_bytes)
      : low((smem >> 4) | ((leading_bytes >> 4) << 16)) {
    ptx::hide(low);
  }
  __device__ __forceinline__ unsigned long long at(unsigned offset_bytes) const {
    constexpr unsigned long long HIGH = (64ull | 1ull << 30) << 32;
    return HIGH | (low + (offset_bytes >> 4));
  }
};

}  // namespace flashmoe::sm90_backward
