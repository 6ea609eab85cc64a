// The template parameters of the Hopper backward kernels and what follows from them, and what their
// launches need. Plain C++, no std headers: host and NVRTC both read it. flashmoe/tiles says the
// same in Python (Tile.violations); a test compares the two.
#pragma once

#include "backward/params.h"
#include "common/mask_tiles.h"
#include "common/schedule.h"
#include "ptx/tensor_map.h"

namespace flashmoe {

struct Sm90BackwardTile {
  int head_dim;  // 64, 96, 128 or 256
  int block_m;   // queries a step: 128 at head_dim 64, otherwise 64
  int block_n;   // keys of a thread block: 64 for each of two warpgroups, at head_dim 256 for both
  int num_stages;  // buffers of Q, and of its rows' statistics
  int do_stages;   // buffers of dO
  int ds_stages;   // buffers of dS: one more saves a barrier a step
  bool late_dq;    // dQ is computed a step late, so that warpgroups need not keep step

  static constexpr int CONSUMERS = 2;
  constexpr int num_threads() const { return 128 * (CONSUMERS + 1); }
  constexpr int panels() const { return (head_dim + 63) / 64; }  // of 64 columns, 128 bytes
  constexpr int kv_bytes() const { return block_n * 128 * panels(); }
  constexpr int q_bytes() const { return block_m * 128 * panels(); }  // of one stage, dO as well
  constexpr int ds_bytes() const { return block_m * block_n * 2; }
  constexpr int stats_bytes() const { return 2 * 4 * block_m; }
  // Where warpgroups have the same keys, P of one step is handed on in 16 bits.
  constexpr bool by_roles() const { return block_n == 64; }
  constexpr int p_bytes() const { return by_roles() ? block_m * block_n * 2 : 0; }
  // 256 for the mbarriers, and what deterministic kernels keep beside them.
  constexpr int smem_bytes() const {
    return 256 + 2 * kv_bytes() + (num_stages + do_stages) * q_bytes() + ds_stages * ds_bytes() +
           p_bytes() + num_stages * stats_bytes();
  }
  // A block's dQ is computed in parts: 64 rows where it has 128, otherwise 64 columns.
  constexpr bool dq_by_rows() const { return block_m == 128; }
  constexpr int dq_columns() const { return dq_by_rows() ? head_dim : 64; }  // of a part
  // float32 elements of dQ of one block of queries, in the order in which threads hold them.
  constexpr int dq_elements() const { return dq_by_rows() ? 128 * head_dim : 64 * 64 * panels(); }
  // Bytes of a row of dQ in 16 bits, in shared memory behind the kernel: 16 more keep banks apart.
  constexpr int finish_pitch() const { return 2 * dq_elements() / block_m + 16; }
  static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
};

// Asserts what flashmoe/tiles calls legal, where a kernel is instantiated.
template <Sm90BackwardTile TILE>
struct LegalSm90BackwardTile {
  static_assert(TILE.head_dim == 64 || TILE.head_dim == 96 || TILE.head_dim == 128 ||
                    TILE.head_dim == 256,
                "head_dim: 64, 96, 128 or 256");
  static_assert(TILE.block_m == (TILE.head_dim <= 64 ? 128 : 64),
                "block_m: 128 at head_dim 64, otherwise 64");
  static_assert(TILE.block_n == (TILE.head_dim <= 128 ? 128 : 64),
                "block_n: 128, at head_dim 256 64");
  static_assert(TILE.num_stages >= 2 && TILE.num_stages <= 4, "num_stages: 2 to 4");
  static_assert(TILE.do_stages >= 1 && TILE.do_stages <= 4, "do_stages: 1 to 4");
  static_assert(TILE.ds_stages >= 1 && TILE.ds_stages <= (TILE.by_roles() ? 1 : 2),
                "ds_stages: 1 or 2, at head_dim 256 1");
  static_assert(!TILE.late_dq || TILE.ds_stages == 2, "late_dq: two buffers of dS");
  static_assert(TILE.smem_bytes() <= 232448, "shared memory");
};

struct Sm90BackwardParams {
  ptx::TensorMap q, k, v, dout, dk, dv;
  ptx::TensorMap stats_rows;  // of `stats`, a block of queries a row
  BackwardParams call;
  // For each (batch, query head) and block of queries: what to add to scaled scores in units of
  // log 2 (minus softmax_lse; -inf where a row sees nothing or does not exist), then delta.
  float* stats;
  float* dq_sum;  // dq_elements() for each (batch, query head) and block of queries
  // Of deterministic kernels: how many have added to each of these sums, and how many thread blocks
  // have begun.
  int *turns, *ticket;
  float scale_log2;  // what scores are scaled by, in units of log 2: softmax_scale, or softcap
  int m_blocks, n_blocks;
  int section;          // (batch, key head) pairs whose blocks of keys are worked on together
  int descending_from;  // of deterministic kernels: the section from which on order is reversed
  float cap_scale;      // with softcap: Q K^T times this is what tanh is taken of
  // Of packed kernels, whose blocks of queries are counted over all sequences: m_blocks and
  // n_blocks are the room for them, and a section has key heads.
  Schedule schedule;
  MaskTiles mask_tiles;  // with a mask: of blocks of keys
};

}  // namespace flashmoe
