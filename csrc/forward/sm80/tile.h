// The template parameters of the mma.sync forward kernel, what follows from them, and what is
// legal. flashmoe/tiles says the same in Python (Tile.violations); a test compares the two.
#pragma once

namespace flashmoe {

template <int HEAD_DIM_, int BLOCK_M_, int BLOCK_N_, int NUM_STAGES_, int NUM_WARPS_>
struct Sm80Tile {
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int BLOCK_M = BLOCK_M_;
  static constexpr int BLOCK_N = BLOCK_N_;
  static constexpr int NUM_STAGES = NUM_STAGES_;
  static constexpr int NUM_WARPS = NUM_WARPS_;

  static constexpr int NUM_THREADS = NUM_WARPS * 32;
  static constexpr int WARP_M = BLOCK_M / NUM_WARPS;
  static constexpr int M_TILES = WARP_M / 16;

  // Q stays in registers where S, O and Q fragments leave room for the softmax; otherwise it is
  // read from shared memory again for every tile of K.
  static constexpr int SO_REGISTERS = M_TILES * (BLOCK_N / 2 + HEAD_DIM / 2);
  static constexpr bool Q_IN_REGISTERS = SO_REGISTERS + M_TILES * HEAD_DIM / 4 <= 168;

  // Thread blocks an SM should hold: as many as the fragments and the rest of a thread's registers
  // allow (the rest as ptxas -v shows it). Told to ptxas, which otherwise spends more registers on
  // scheduling than another resident block is worth.
  static constexpr int THREAD_REGISTERS =
      SO_REGISTERS + (Q_IN_REGISTERS ? M_TILES * HEAD_DIM / 4 + 40 : 48);
  static constexpr int MIN_BLOCKS_PER_SM = 65536 / (NUM_THREADS * THREAD_REGISTERS);

  static constexpr int Q_ELEMENTS = BLOCK_M * HEAD_DIM;
  static constexpr int KV_ELEMENTS = BLOCK_N * HEAD_DIM;
  static constexpr int SMEM_BYTES = 2 * (Q_ELEMENTS + 2 * NUM_STAGES * KV_ELEMENTS);

  static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 256, "HEAD_DIM: a multiple of 32 up to 256");
  static_assert(NUM_WARPS == 4 || NUM_WARPS == 8, "NUM_WARPS: 4 or 8");
  static_assert(BLOCK_M % (16 * NUM_WARPS) == 0 && BLOCK_M <= 256,
                "BLOCK_M: a multiple of 16 * NUM_WARPS up to 256");
  static_assert(BLOCK_N % 16 == 0 && BLOCK_N >= 16 && BLOCK_N <= 256,
                "BLOCK_N: a multiple of 16 from 16 to 256");
  static_assert(NUM_STAGES >= 1 && NUM_STAGES <= 4, "NUM_STAGES: 1 to 4");
  static_assert(SO_REGISTERS <= 208, "fragments of S and O exceed the registers of a thread");
};

}  // namespace flashmoe
