// What the producer and the consumers of the Hopper forward kernel share: blocks of rows, the plan
// of shared memory, and the rings of buffers in it.
#pragma once

#include "common/packed.cuh"
#include "common/schedule.cuh"
#include "forward/sm90/tile.h"
#include "ptx/ld_st.cuh"
#include "ptx/tma.cuh"

namespace flashmoe::sm90 {

// One block of rows of one head, as the scheduler hands it to the producer and the consumers.
struct Work {
  int n_tiles;  // tiles of keys that its rows see; NO_WORK after the last block of rows
  int m_start, head, batch;
  Sequence sequence;
};
constexpr int NO_WORK = -1;
constexpr float NO_MAXIMUM = 3e38f;  // for minus the scaled maximum of a row without keys so far

// What rows see, in a kernel of this variant: visible() of common/mask.h. Plain kernels are given
// no mask or a causal one, know that, and spell it so that ptxas makes of it what it made before
// there were windows.
template <Variant VARIANT>
struct VisibleKeys {
  const AttentionParams& p;
  const Sequence sequence;
  const int diagonal = seqlen_kv<VARIANT>(p, sequence) - seqlen_q<VARIANT>(p, sequence);

  // With a limit on the right: the last key that a row sees if there are so many, or below 0.
  __device__ __forceinline__ int last(int row) const {
    return row + diagonal + (VARIANT.local ? p.mask.right : 0);
  }
  // Of rows from first_row to last_row, that one too; a plain kernel's end may be below 0.
  __device__ __forceinline__ KeyRange operator()(int first_row, int last_row) const {
    if constexpr (VARIANT.local) {
      return visible(p.mask, first_row, last_row + 1, seqlen_q<VARIANT>(p, sequence),
                     seqlen_kv<VARIANT>(p, sequence));
    }
    int end = seqlen_kv<VARIANT>(p, sequence);
    if (p.is_causal) end = min(end, last(last_row) + 1);
    return {0, end};
  }
  // The tile of the first key that rows from `row` on see.
  template <int BLOCK_N>
  __device__ __forceinline__ int first_tile(int row) const {
    return (*this)(row, row).begin / BLOCK_N;
  }
};

// How many tiles of keys a block of rows sees.
template <Sm90Tile TILE, Variant VARIANT>
__device__ __forceinline__ int tiles_seen(const AttentionParams& p, const Work& work) {
  const KeyRange keys =
      VisibleKeys<VARIANT>{p, work.sequence}(work.m_start, work.m_start + TILE.block_m - 1);
  return keys.end > keys.begin
             ? (keys.end + TILE.block_n - 1) / TILE.block_n - keys.begin / TILE.block_n
             : 0;
}

// The list of a block of rows (MaskTiles), and what it has at `index`: first its length.
template <Sm90Tile TILE>
__device__ __forceinline__ unsigned mask_list(const MaskTiles& tiles, const Work& work) {
  return work.batch * tiles.batch_stride + work.head * tiles.head_stride +
         work.m_start / TILE.block_m * tiles.block_stride;
}
__device__ __forceinline__ int listed_at(const MaskTiles& tiles, unsigned list, int index) {
  return tiles.lists[list * (tiles.tiles + 1u) + index];
}

template <Sm90Tile TILE, Variant VARIANT>
__device__ __forceinline__ Work work_at(const Sm90Params& params, int index) {
  const AttentionParams& p = params.attention;
  int batch_head, m_block;
  if (VARIANT.local ? !p.mask.is_full() : p.is_causal) {
    // Sections of heads whose K and V fit L2 together; inside one, the longest blocks first.
    const int section = params.per_section.divide(index);
    const int in_section = index - section * params.per_section.divisor;
    const int rank = params.section_heads.divide(in_section);
    m_block = params.m_blocks.divisor - 1 - rank;
    // Without a limit on the right, earlier rows see more keys.
    if (VARIANT.local && p.mask.right < 0) m_block = rank;
    batch_head =
        section * params.section_heads.divisor + in_section - rank * params.section_heads.divisor;
  } else {
    batch_head = params.m_blocks.divide(index);
    m_block = index - batch_head * params.m_blocks.divisor;
  }
  Work work{};
  work.batch = params.heads_q.divide(batch_head);
  work.head = batch_head - work.batch * p.heads_q;
  work.m_start = m_block * TILE.block_m;
  if constexpr (VARIANT.mask) {
    work.n_tiles = listed_at(params.mask_tiles, mask_list<TILE>(params.mask_tiles, work), 0);
  } else {
    work.n_tiles = tiles_seen<TILE, VARIANT>(p, work);
  }
  return work;
}

// Of a packed kernel, which has `listed` blocks of rows for each head: in sections of heads as
// well, each of which goes through the whole list; the longest blocks of a sequence first.
template <Sm90Tile TILE, Variant VARIANT>
__device__ __forceinline__ Work packed_work_at(const Sm90Params& params, int index, int listed) {
  const AttentionParams& p = params.attention;
  const int heads = params.section_heads.divisor;
  const int section = index / (heads * listed), in_section = index - section * heads * listed;
  const int rank = params.section_heads.divide(in_section);
  const PackedBlock block = load_block(params.schedule.queries + rank);
  Work work;
  work.sequence = block.sequence;
  work.batch = block.batch;
  work.head = section * heads + in_section - rank * heads;
  work.m_start = block.start;
  if (p.mask.right >= 0) {
    work.m_start = (work.sequence.seqlen_q - 1) / TILE.block_m * TILE.block_m - block.start;
  }
  work.n_tiles = tiles_seen<TILE, VARIANT>(p, work);
  return work;
}

// Whether a packed batch has a list. Without one each thread block has one block of rows, or none.
__device__ __forceinline__ bool is_listed(const Sm90Params& params) {
  return params.schedule.queries != nullptr;
}

// Columns of out and v that there are, of the tile's o_columns.
template <Sm90Tile TILE>
__device__ __forceinline__ int out_columns(const AttentionParams& p) {
  return TILE.head_dim_v > 0 ? p.head_dim_v : p.head_dim;
}

template <Sm90Tile TILE>
struct Smem {
  static constexpr int PANELS = TILE.panels(), O_PANELS = TILE.o_panels();
  static constexpr int Q_BYTES = TILE.q_bytes();  // of one warpgroup and stage
  static constexpr int K_BYTES = TILE.k_bytes(), V_BYTES = TILE.v_bytes();
  // A block of rows that is multiplied, one that is fetched, and one more that has no keys.
  static constexpr int WORK_SLOTS = 3;
  // Of a slot's Work 16 bytes are published, and behind everything else 16 of its sequence by
  // packed kernels.
  unsigned Q, K, V, work, full_Q, empty_Q, full_K, empty_K, full_V, empty_V, full_work, empty_work;
  unsigned sequences;

  __device__ __forceinline__ explicit Smem(unsigned base) {
    constexpr int C = TILE.consumers(), QS = TILE.q_stages, S = TILE.num_stages;
    Q = base;
    K = Q + C * QS * Q_BYTES;
    V = K + S * K_BYTES;
    work = V + S * V_BYTES;
    full_Q = work + WORK_SLOTS * sizeof(int4);
    empty_Q = full_Q + 8 * C * QS;
    full_K = empty_Q + 8 * C * QS;
    empty_K = full_K + 8 * S;
    full_V = empty_K + 8 * S;
    empty_V = full_V + 8 * S;
    full_work = empty_V + 8 * S;
    empty_work = full_work + 8 * WORK_SLOTS;
    sequences = empty_work + 8 * WORK_SLOTS;
    static_assert(WORK_SLOTS * 2 * sizeof(int4) + 16 * (C * QS + 2 * S + WORK_SLOTS) <= 512,
                  "what is behind the buffers");
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

template <Variant VARIANT, Sm90Tile TILE>
__device__ __forceinline__ void write_work(const Smem<TILE>& smem, int slot, const Work& work) {
  ptx::st_shared_v4(smem.work + slot * sizeof(int4),
                    make_int4(work.n_tiles, work.m_start, work.head, work.batch));
  if constexpr (VARIANT.packed) {
    const Sequence& s = work.sequence;
    ptx::st_shared_v4(smem.sequences + slot * sizeof(int4),
                      make_int4(s.q_begin, s.k_begin, s.seqlen_q, s.seqlen_kv));
  }
}

template <Variant VARIANT, Sm90Tile TILE>
__device__ __forceinline__ Work read_work(const Smem<TILE>& smem, int slot) {
  const int4 x = ptx::ld_shared_v4(smem.work + slot * sizeof(int4));
  if constexpr (!VARIANT.packed) return {x.x, x.y, x.z, x.w, {}};
  const int4 s = ptx::ld_shared_v4(smem.sequences + slot * sizeof(int4));
  return {x.x, x.y, x.z, x.w, {s.x, s.y, s.z, s.w}};
}

// Finds the block of rows of this thread block without a list, for the first slot. By a warp, of
// which each lane looks at a sequence. Heads are neighbours.
template <Sm90Tile TILE, Variant VARIANT>
__device__ __forceinline__ void find_work(const Sm90Params& params, const Smem<TILE>& smem) {
  const AttentionParams& p = params.attention;
  const int lane = threadIdx.x % 32;
  const int index = static_cast<int>(blockIdx.x), rank = params.heads_q.divide(index);
  Work work{NO_WORK, 0, index - rank * p.heads_q, 0, {}};
  int blocks_before = 0;
#pragma unroll 1
  for (int first = 0; first < p.batch && blocks_before <= rank; first += 32) {
    const int batch = first + lane;
    Sequence mine{};
    if (batch < p.batch) mine = sequence_at(p.sequences, batch, p.seqlen_q, p.seqlen_kv);
    const int blocks = (mine.seqlen_q + TILE.block_m - 1) / TILE.block_m;
    const int end = blocks_before + schedule::warp_sum(blocks), block = rank - (end - blocks);
    if (block >= 0 && block < blocks) {
      work.batch = batch, work.sequence = mine, work.m_start = block * TILE.block_m;
      work.n_tiles = tiles_seen<TILE, VARIANT>(p, work);
    }
    blocks_before = __shfl_sync(0xffffffff, end, 31);
  }
  const bool found = work.n_tiles != NO_WORK;
  if (__any_sync(0xffffffff, found) ? found : lane == 0) write_work<VARIANT>(smem, 0, work);
}

}  // namespace flashmoe::sm90
