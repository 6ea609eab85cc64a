// Which weights dropout keeps: a function of the call's state, the batch (or sequence), the head,
// the row and the column, whatever computes it. Plain C++, no std headers: NVRTC has none.
// flashmoe/spec/dropout.py says the same in Python.
#pragma once

#include "common/terms.h"

namespace flashmoe {

// Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), with the fewest
// rounds that pass BigCrush there, as FlashAttention-2 has them.
constexpr int PHILOX_ROUNDS = 7;

struct Philox {
  unsigned x[4];
};

#define FLASHMOE_ALWAYS_INLINE __attribute__((always_inline))

FLASHMOE_ALWAYS_INLINE constexpr Philox philox(Philox counter, unsigned key0, unsigned key1) {
  unsigned a = counter.x[0], b = counter.x[1], c = counter.x[2], d = counter.x[3];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const unsigned long long p = 0xD2511F53ull * a, q = 0xCD9E8D57ull * c;
    a = static_cast<unsigned>(q >> 32) ^ b ^ key0;
    b = static_cast<unsigned>(q);
    c = static_cast<unsigned>(p >> 32) ^ d ^ key1;
    d = static_cast<unsigned>(p);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{a, b, c, d}};
}

// What dropout does to the weights of one head. 16 random bits of each decide: it stays where they
// are at most `limit`.
struct Dropout {
  unsigned key0, key1;          // the seed
  unsigned counter2, counter3;  // the offset plus the batch; its high half plus the head, too
  unsigned limit;

  // Of a call that has dropout.
  FLASHMOE_ALWAYS_INLINE static constexpr Dropout of(const Terms& terms, int batch, int head) {
    const unsigned long long seed = static_cast<unsigned long long>(terms.rng_state[0]);
    const unsigned long long offset = static_cast<unsigned long long>(terms.rng_state[1]) + batch;
    return {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32),
            static_cast<unsigned>(offset), static_cast<unsigned>(offset >> 32) + head,
            terms.dropout_limit};
  }

  // The random bits of 8 weights: of rows `row` and row + 8, which a multiple of 16 and up to 7 is,
  // and columns `column`, 1, 8 and 9 further, which a multiple of 16 and 0, 2, 4 or 6 is. That is
  // what one thread of a warp's 16 x 16 tile of an mma holds, and in its order: x[0] has those of
  // `row` and the first two columns, x[1] of the row below, x[2] and x[3] of the other columns; the
  // low half of each is the even column's.
  FLASHMOE_ALWAYS_INLINE constexpr Philox bits(int row, int column) const {
    return philox({{row_counter(row), column_counter(column), counter2, counter3}}, key0, key1);
  }
  FLASHMOE_ALWAYS_INLINE static constexpr unsigned row_counter(unsigned row) {
    return (row & ~15u) / 2 + (row & 7);
  }
  FLASHMOE_ALWAYS_INLINE static constexpr unsigned column_counter(unsigned column) {
    return (column & ~15u) / 4 + (column & 7) / 2;
  }
  // All bits of the halves of a word of bits() whose weights stay, packed in 16 bits each.
  FLASHMOE_ALWAYS_INLINE constexpr unsigned kept_halves(unsigned word) const {
    return ((word & 0xffff) <= limit ? 0xffffu : 0u) | (word >> 16 <= limit ? 0xffff0000u : 0u);
  }
};

// What weights that stay are multiplied by: 1 / (1 - p), p as the limit has it.
FLASHMOE_ALWAYS_INLINE constexpr float dropout_scale(unsigned limit) {
  return 65536.f / static_cast<float>(limit + 1);
}

}  // namespace flashmoe
