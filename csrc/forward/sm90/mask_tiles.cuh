// Lists the tiles of keys that blocks of rows see under a mask (MaskTiles): one thread block for
// each list, a warp for each tile.
#pragma once

#include "forward/sm90/mask_tiles.h"
#include "ptx/cp_async.cuh"
#include "ptx/ld_st.cuh"

namespace flashmoe::sm90 {

// The bits of the element that is `offset` behind the first.
__device__ __forceinline__ unsigned mask_bits(const AttnMask& mask, long long offset) {
  if (mask.is_boolean()) return static_cast<const unsigned char*>(mask.data)[offset];
  if (mask.kind == AttnMask::Kind::float32) return static_cast<const unsigned*>(mask.data)[offset];
  return static_cast<const unsigned short*>(mask.data)[offset];
}

// Whether an element hides its key, and whether it does nothing, which 0 and -0 do.
__device__ __forceinline__ bool mask_hides(AttnMask::Kind kind, unsigned bits) {
  return bits == (kind == AttnMask::Kind::boolean    ? 0
                  : kind == AttnMask::Kind::float32  ? 0xff800000u
                  : kind == AttnMask::Kind::bfloat16 ? 0xff80u
                                                     : 0xfc00u);
}
__device__ __forceinline__ bool mask_adds(AttnMask::Kind kind, unsigned bits) {
  return kind != AttnMask::Kind::boolean &&
         (kind == AttnMask::Kind::float32 ? bits << 1 : bits << 17) != 0;
}

// Writes the bits of a tile for one list, whose first row is `m_start`: by one warp. Returns 0 if
// no row sees a key of it, 1 if all see all, unchanged, or else 2.
__device__ __forceinline__ int look_at_tile(const MaskTilesParams& params, long long first,
                                            int m_start, int tile, unsigned* bits) {
  const AttnMask& mask = params.attn_mask;
  const int row_in_8 = threadIdx.x % 32 / 4, thread = threadIdx.x % 4;
  const int words = MaskTiles::words(params.block_n);
  bool any = false, all = true;
  for (int row0 = 0; row0 < params.out.rows; row0 += 8) {
    const int row = row0 + row_in_8;
    const bool is_row = row < params.out.rows && m_start + row < params.seqlen_q;
    KeyRange seen{0, 0};
    if (is_row) {
      seen = visible(params.window, m_start + row, m_start + row + 1, params.seqlen_q,
                     params.seqlen_kv);
    }
    const long long row_first = first + (m_start + row) * mask.row_stride;
    for (int word = 0; word < words; ++word) {
      unsigned found = 0;
      const int begin = word * 16, end = min(params.block_n / 8, begin + 16);
      for (int n = begin; n < end; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = tile * params.block_n + 8 * n + 2 * thread + i;
          bool sees = key >= seen.begin && key < seen.end;
          if (sees) {
            const unsigned element = mask_bits(mask, row_first + key * mask.key_stride);
            sees = !mask_hides(mask.kind, element);
            all = all && !mask_adds(mask.kind, element);
          }
          any = any || sees;
          all = all && (sees || !is_row);
          found |= static_cast<unsigned>(sees) << (2 * (n - begin) + i);
        }
      }
      if (row < params.out.rows) bits[(row * 4 + thread) * words + word] = found;
    }
  }
  any = __any_sync(0xffffffff, any);
  return any + (__any_sync(0xffffffff, !all) && any);
}

__device__ __forceinline__ void list_tiles(const MaskTilesParams& params) {
  extern __shared__ __align__(1024) unsigned char smem_raw[];
  const unsigned kinds = ptx::smem_address(smem_raw);  // of the tiles that the warps look at
  constexpr int WARPS = MASK_THREADS / 32;
  const MaskTiles& out = params.out;
  const int list = blockIdx.x, warp = threadIdx.x / 32;
  const int batch_head = list / params.blocks, block = list - batch_head * params.blocks;
  const int batch = batch_head / params.heads, head = batch_head - batch * params.heads;
  const int m_start = block * params.block_m;
  const long long first =
      batch * params.attn_mask.batch_stride + head * params.attn_mask.head_stride;
  // Where rows share a list, there is no window.
  const KeyRange seen =
      visible(params.window, m_start, min(m_start + params.block_m, params.seqlen_q),
              params.seqlen_q, params.seqlen_kv);
  const int end = seen.end > seen.begin ? (seen.end + params.block_n - 1) / params.block_n : 0;
  int* entries = out.lists + static_cast<long long>(list) * (out.tiles + 1);
  const int bits_of_tile = out.rows * 4 * MaskTiles::words(params.block_n);
  int count = 0;  // of the first thread
  for (int base = seen.begin / params.block_n; base < end; base += WARPS) {
    const int tile = base + warp;
    int kind = 0;
    if (tile < end) {
      kind =
          look_at_tile(params, first, m_start, tile,
                       out.bits + (static_cast<long long>(list) * out.tiles + tile) * bits_of_tile);
    }
    if (threadIdx.x % 32 == 0) ptx::st_shared_b32(kinds + 4 * warp, kind);
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 0; w < WARPS; ++w) {
        const int found = ptx::ld_shared_b32(kinds + 4 * w);
        if (found != 0) entries[++count] = (base + w) * 2 + found - 1;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) entries[0] = count;
}

}  // namespace flashmoe::sm90
