// The template parameters of the Hopper forward kernel and what follows from them, and what its
// launch needs. Plain C++, no std headers: host and NVRTC both read it. flashmoe/tiles says the
// same in Python (Tile.violations); a test compares the two.
#pragma once

#include "common/fast_divisor.h"
#include "common/mask_tiles.h"
#include "common/params.h"
#include "common/schedule.h"
#include "common/variant.h"
#include "ptx/tensor_map.h"

namespace flashmoe {

struct Sm90Tile {
  int head_dim;         // a multiple of 16 up to 256
  int block_m;          // 64 rows a consumer warpgroup
  int block_n;          // keys a step, a multiple of 16 from 32 to 256
  int num_stages;       // buffers each of K and V
  int q_stages;         // buffers of Q: 2 fetches the next block of rows early
  bool pingpong;        // consumer warpgroups take turns at the tensor cores
  bool q_in_registers;  // Q from registers instead of shared memory
  int exp2_fma;         // sixteenths of the exponentials computed on the FMA pipes
  int ctas_per_sm;
  bool serial;  // a warpgroup's softmax waits for its matmuls: P takes the registers of S
  // Columns of V and O, a multiple of 16 up to 256, where they are not to be those of Q and K: 0.
  int head_dim_v = 0;

  constexpr int o_columns() const { return head_dim_v > 0 ? head_dim_v : head_dim; }
  constexpr int consumers() const { return block_m / 64; }
  constexpr int num_threads() const { return 128 * (consumers() + 1); }
  constexpr bool uses_pingpong() const { return pingpong && consumers() > 1; }
  // O leaves through the buffer of its Q, which is free when Q of the next block has another.
  constexpr bool stages_output() const { return q_stages > 1; }
  constexpr int panels() const { return (head_dim + 63) / 64; }  // of 64 columns, 128 bytes
  constexpr int o_panels() const { return (o_columns() + 63) / 64; }
  // Of one warpgroup and stage: Q, and O where it takes that buffer.
  constexpr int q_bytes() const {
    return 64 * 128 * (stages_output() && o_panels() > panels() ? o_panels() : panels());
  }
  constexpr int k_bytes() const { return block_n * 128 * panels(); }
  constexpr int v_bytes() const { return block_n * 128 * o_panels(); }
  // 512 for the mbarriers and what the scheduler writes.
  constexpr int smem_bytes() const {
    return 512 + consumers() * q_stages * q_bytes() + num_stages * (k_bytes() + v_bytes());
  }
  // What ptxas may use at entry, and what setmaxnreg makes of it.
  constexpr int entry_registers() const {
    const int registers = 65536 / (num_threads() * ctas_per_sm) / 8 * 8;
    return registers > 255 ? 255 : registers;
  }
  // What it needs without spills: more would cost the consumers some, where they are two. With a
  // window it keeps the first tile of keys, too, packed ones where their sequence is, and with a
  // mask its list.
  constexpr int producer_registers(Variant variant = {}) const {
    const bool is_more = variant.local || variant.packed || variant.mask;
    return consumers() == 2 && q_stages == 1 && !is_more ? 24 : 32;
  }
  constexpr int consumer_registers(Variant variant = {}) const {
    const int left =
        (entry_registers() - producer_registers(variant)) / consumers() + entry_registers();
    return left > 240 ? 240 : left / 8 * 8;
  }
  // What ptxas must have at entry to compile the larger wgmma, whatever setmaxnreg adds.
  constexpr int wgmma_registers() const {
    return (o_columns() > block_n ? o_columns() : block_n) / 2 + 30;
  }
  // What a consumer thread needs: O, S, P beside it, Q where it is kept there, and the rest, which
  // is more with the exponential's polynomial, long rows of O, or two buffers of Q.
  constexpr int needed_registers() const {
    return o_columns() / 2 + block_n / 2 + (serial ? 0 : block_n / 4) +
           (q_in_registers ? head_dim / 4 + 4 : 0) + 28 +
           (exp2_fma > 0 || o_columns() > 128 || q_stages > 1 ? 4 : 0) +
           (o_columns() > 128 && q_stages > 1 ? 4 : 0);
  }
};

// Asserts what flashmoe/tiles calls legal, where a kernel is instantiated.
template <Sm90Tile TILE>
struct LegalSm90Tile {
  static_assert(TILE.head_dim % 16 == 0 && TILE.head_dim >= 16 && TILE.head_dim <= 256,
                "head_dim: a multiple of 16 from 16 to 256");
  static_assert(TILE.head_dim_v % 16 == 0 && TILE.head_dim_v >= 0 && TILE.head_dim_v <= 256,
                "head_dim_v: a multiple of 16 up to 256");
  static_assert(TILE.block_m % 64 == 0 && TILE.block_m >= 64 && TILE.block_m <= 256,
                "block_m: 64, 128, 192 or 256");
  static_assert(TILE.block_n % 16 == 0 && TILE.block_n >= 32 && TILE.block_n <= 256,
                "block_n: a multiple of 16 from 32 to 256");
  static_assert(TILE.num_stages >= 1 && TILE.num_stages <= 4, "num_stages: 1 to 4");
  static_assert(TILE.q_stages >= 1 && TILE.q_stages <= 2, "q_stages: 1 or 2");
  static_assert(!TILE.pingpong || TILE.block_m > 64, "pingpong: two groups of 64 rows");
  static_assert(!TILE.serial || TILE.q_stages == 1 || TILE.block_m == 256,
                "serial: one buffer of Q, or block_m 256");
  // ptxas 13.0 gives P the registers of Q: every tile of keys but the first was wrong.
  static_assert(!TILE.serial || !TILE.q_in_registers || TILE.block_n != TILE.head_dim,
                "serial with Q in registers: block_n other than head_dim");
  static_assert(TILE.exp2_fma >= 0 && TILE.exp2_fma <= 8, "exp2_fma: 0 to 8");
  static_assert(TILE.ctas_per_sm >= 1 && TILE.ctas_per_sm <= 2, "ctas_per_sm: 1 or 2");
  static_assert(TILE.smem_bytes() <= 233472 / TILE.ctas_per_sm - 1024, "shared memory");
  static_assert(TILE.needed_registers() <= TILE.consumer_registers(), "registers");
  static_assert(TILE.wgmma_registers() <= TILE.entry_registers(), "registers at entry");
};

// P is 2^(S - maximum) in units of log 2, less this. In bfloat16 a row's sum then stays below 1
// where fewer than 2^16 keys weigh as much as the maximum's, and O finite whatever the values are;
// the smallest values still survive. float16 does not reach so low, nor so high that it needed it.
constexpr float max_shift(bool bfloat16) { return bfloat16 ? 16.f : 0.f; }

struct Sm90Params {
  ptx::TensorMap q, k, v, o;
  AttentionParams attention;
  // In units of log 2, what scores are in units of: softmax_scale, or softcap (softmax.cuh).
  float scale_log2, inverse_scale_log2;
  float slack;   // by how much, in units of scores, a row's maximum may lag behind
  int num_work;  // blocks of rows over all heads and batches
  FastDivisor m_blocks, heads_q, group;  // blocks of rows of a head; heads_q over heads_kv
  FastDivisor section_heads;             // (batch, head) pairs whose blocks are worked on together
  FastDivisor per_section;               // and their blocks
  unsigned*
      counter;      // null: blocks are dealt in turn. Otherwise drawn from it; 0 before and after.
  float cap_scale;  // with softcap: Q K^T times this is what tanh is taken of
  Schedule schedule;     // of packed kernels, which find num_work, m_blocks and a counter there
  MaskTiles mask_tiles;  // with a mask
};

}  // namespace flashmoe
