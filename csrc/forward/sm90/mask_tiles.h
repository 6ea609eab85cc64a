// Which tiles of keys a mask lets blocks of rows see, found on the device before the Hopper forward
// kernel. Plain C++, no std headers: NVRTC has none.
#pragma once

#include "common/mask.h"
#include "common/terms.h"

namespace flashmoe {

// In device memory. Blocks of rows whose mask is the same share a list.
struct MaskTiles {
  // [list][1 + tiles]: how many tiles of keys some row sees, then these in rising order:
  // tile << 1, and 1 where not all rows see all of its keys with nothing added to them.
  int* lists;
  // [list][tile][rows][4][words], of tiles of the second kind: for a thread of a quad, which holds
  // columns 8 * n + 2 * thread + i of a row, bit 2 * n + i says whether the row sees that key. The
  // window, the end of the keys and of the queries are in there, too.
  unsigned* bits;
  int tiles;                                    // of all keys
  int rows;                                     // block_m, or 1 where all rows are alike
  int batch_stride, head_stride, block_stride;  // from list to list; 0 where they share one

  static constexpr int words(int block_n) { return (block_n + 127) / 128; }
};

constexpr int MASK_THREADS = 256;
constexpr int MASK_SMEM_BYTES = 4 * MASK_THREADS / 32;

struct MaskTilesParams {
  AttnMask attn_mask;
  Mask window;
  int seqlen_q, seqlen_kv;
  int block_m, block_n;
  int heads, blocks;  // how many lists there are of a batch, and of a head
  MaskTiles out;
};

// What is added to a score, by the bits of an element: -infinity for a key that is hidden.
static constexpr float mask_value(AttnMask::Kind kind, unsigned bits) {
  constexpr float INF = __builtin_bit_cast(float, 0x7f800000u);
  if (kind == AttnMask::Kind::boolean) return bits != 0 ? 0.f : -INF;
  if (kind == AttnMask::Kind::float32) return __builtin_bit_cast(float, bits);
  if (kind == AttnMask::Kind::bfloat16) return __builtin_bit_cast(float, bits << 16);
  const unsigned magnitude = bits & 0x7fff;
  // Exact, subnormals included: the exponent is rebiased by a multiplication.
  const float value = magnitude < 0x7c00   ? __builtin_bit_cast(float, magnitude << 13) * 0x1p112f
                      : magnitude > 0x7c00 ? __builtin_bit_cast(float, 0x7fc00000u)
                                           : INF;
  return bits >> 15 ? -value : value;
}

}  // namespace flashmoe
