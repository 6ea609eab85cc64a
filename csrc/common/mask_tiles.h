// Which tiles of a mask are seen, found on the device before Hopper's kernels. The forward's rows
// are queries, and its columns keys; a thread block of the backward has keys and goes over queries:
// there rows are keys. Plain C++, no std headers: NVRTC has none.
#pragma once

#include "common/fast_divisor.h"
#include "common/mask.h"
#include "common/terms.h"

namespace flashmoe {

// What a list has of a tile of columns: which, and how rows see it.
struct ListedTile {
  // All of it, with nothing added; or not all see all; or all of it, with finite values added that
  // lie in memory as vectors of 16 bytes.
  enum Kind { WHOLE = 0, PARTIAL = 1, ADDED = 2 };
  int entry = 0;

  constexpr int tile() const { return entry >> 2; }
  constexpr bool is_whole() const { return (entry & 3) == WHOLE; }
  constexpr bool is_partial() const { return entry & PARTIAL; }
  constexpr bool is_added() const { return entry & ADDED; }
};

// In device memory. Blocks of rows whose mask is the same share a list.
struct MaskTiles {
  // [list][1 + room]: how many tiles of columns some row sees, then these in rising order, as
  // ListedTile says.
  int* lists;
  // [list][room][rows][4][words], of partial tiles: for a thread of a quad, which holds
  // columns 8 * n + 2 * thread + i of a row, bit 2 * n + i says whether the row sees that column.
  // The window and the ends of rows and columns are in there, too.
  unsigned* bits;
  unsigned char* seen;  // [list][room]: whether a row sees the tile. Null: nobody needs to know
  int tiles;            // of all columns
  int room;  // tiles that a list has room for: 1 where columns are alike, and it stands for all
  int rows;  // block_m, or 1 where all rows are alike
  int batch_stride, head_stride, block_stride;  // from list to list; 0 where they share one

  static constexpr int words(int block_n) { return (block_n + 127) / 128; }
};

constexpr int MASK_THREADS = 256;
constexpr int MASK_SMEM_BYTES = 4 * MASK_THREADS / 32 + 4 + 8 * 256;

struct MaskTilesParams {
  AttnMask attn_mask;  // row_stride and key_stride are those of rows and columns here
  Mask window;         // of rows
  int num_rows, num_columns;
  int block_m, block_n;      // rows, at most 256, and columns of a tile
  int heads, blocks, lists;  // how many lists there are of a batch, of a head, and of all
  bool rows_are_keys;
  // Where tiles are lines of vectors of 16 bytes in memory: how many of them a line has, how far
  // apart lines are, and whether they are rows. Otherwise lines is 0.
  int lines;
  FastDivisor vectors;
  long long line_stride;
  bool lines_are_rows;
  bool adds;  // whether tiles may be ADDED
  MaskTiles out;
};

// Finite values from here on down are padding's (`finfo.min` of bfloat16 and float32). Beside any
// other value they leave a key a weight of 0, whatever the scores are.
constexpr float LOWEST_VALUES = -1e30f;

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
