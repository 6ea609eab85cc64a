// Where rows of 16-bit elements lie in shared memory, for kernels that read them by ldmatrix.
#pragma once

namespace flashmoe {

// Byte offset of 16-byte chunk `chunk` of `row`. The XOR spreads the 8 rows that one ldmatrix reads
// over all 32 banks: rows of a multiple of 128 bytes all start in bank 0, rows of 64 or 192 bytes
// in bank 0 or 16 in turn.
template <int HEAD_DIM>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  constexpr int ROW_BYTES = HEAD_DIM * 2;
  if constexpr (ROW_BYTES % 128 == 0) {
    return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
  } else {
    return row * ROW_BYTES + ((chunk ^ ((row >> 1) & 3)) << 4);
  }
}

}  // namespace flashmoe
