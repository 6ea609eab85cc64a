// The template parameters of the decode kernel, what follows from them, and what is legal.
// flashmoe/tiles says the same in Python (Tile.violations); a test compares the two. Plain C++.
#pragma once

#include "decode/split.h"

namespace flashmoe {

// A thread block computes BLOCK_M rows, which are (query, head of a group) pairs, in steps of
// BLOCK_N keys. Each warp takes WARP_N keys of a step, all rows, and has its own ring of
// NUM_STAGES buffers of K and V: warps meet only to merge what they have.
template <int HEAD_DIM_, int BLOCK_M_, int BLOCK_N_, int NUM_STAGES_, int NUM_WARPS_,
          int CTAS_PER_SM_>
struct DecodeTile {
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int BLOCK_M = BLOCK_M_;
  static constexpr int BLOCK_N = BLOCK_N_;
  static constexpr int NUM_STAGES = NUM_STAGES_;
  static constexpr int NUM_WARPS = NUM_WARPS_;
  static constexpr int CTAS_PER_SM = CTAS_PER_SM_;

  static constexpr int NUM_THREADS = NUM_WARPS * 32;
  static constexpr int WARP_N = BLOCK_N / NUM_WARPS;
  static constexpr int M_TILES = BLOCK_M / 16;
  // Whether it is compiled for plain calls, too (is_plain): that is faster from the launch to the
  // first load, which is what few queries wait for.
  static constexpr bool HAS_PLAIN = BLOCK_M == 16 && NUM_WARPS >= 4 && CTAS_PER_SM <= 2;

  // Q stays in registers where S and O leave room; otherwise it is read from shared memory again
  // for every tile of K.
  static constexpr int THREAD_REGISTERS =
      NUM_THREADS * CTAS_PER_SM > 256 ? 65536 / (NUM_THREADS * CTAS_PER_SM) : 255;
  static constexpr int SO_REGISTERS = M_TILES * (WARP_N / 2 + HEAD_DIM / 2);
  static constexpr bool Q_IN_REGISTERS =
      SO_REGISTERS + M_TILES * HEAD_DIM / 4 <= THREAD_REGISTERS - 64;

  // Bytes. A warp's ring holds its O, maxima and sums in the end, float32. Rows of O are 32 bytes
  // further apart than they are long: that spreads what a warp writes over the banks.
  static constexpr int KV_BYTES = WARP_N * HEAD_DIM * 2;
  static constexpr int RING_BYTES = NUM_STAGES * 2 * KV_BYTES;
  static constexpr int OUT_STRIDE = HEAD_DIM * 4 + 32;
  // In front of the rings: Q, and when it has been read what is merged.
  static constexpr int Q_BYTES = BLOCK_M * HEAD_DIM * 2;
  static constexpr int MERGE_BYTES = BLOCK_M * (decoding::MERGE_ALL * 4 + 8) + 16;
  static constexpr int FRONT_BYTES =
      decoding::ceil_div(Q_BYTES > MERGE_BYTES ? Q_BYTES : MERGE_BYTES, 128) * 128;
  static constexpr int SMEM_BYTES = FRONT_BYTES + NUM_WARPS * RING_BYTES;

  static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 256, "HEAD_DIM: a multiple of 32 up to 256");
  static_assert(BLOCK_M == 16 || BLOCK_M == 32 || BLOCK_M == 64, "BLOCK_M: 16, 32 or 64");
  static_assert(NUM_WARPS == 2 || NUM_WARPS == 4 || NUM_WARPS == 8 || NUM_WARPS == 16,
                "NUM_WARPS: 2, 4, 8 or 16");
  static_assert(BLOCK_N == 16 * NUM_WARPS || BLOCK_N == 32 * NUM_WARPS,
                "BLOCK_N: 16 or 32 for each warp");
  static_assert(NUM_STAGES >= 1 && NUM_STAGES <= 8, "NUM_STAGES: 1 to 8");
  static_assert(CTAS_PER_SM >= 1 && NUM_WARPS * CTAS_PER_SM <= 32,
                "CTAS_PER_SM: at most 32 warps on an SM");
  static_assert(RING_BYTES >= BLOCK_M * (OUT_STRIDE + 8), "a warp's ring must hold its O");
  static_assert(SO_REGISTERS <= THREAD_REGISTERS - 64,
                "fragments of S and O exceed the registers of a thread");
};

}  // namespace flashmoe
