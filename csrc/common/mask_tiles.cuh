// Lists the tiles of columns that blocks of rows see under a mask (MaskTiles): one thread block for
// each list, a warp for each tile.
#pragma once

#include "common/mask_tiles.h"
#include "ptx/cp_async.cuh"
#include "ptx/ld_st.cuh"

namespace flashmoe::sm90 {

// The bits of the element that is `offset` behind the first.
__device__ __forceinline__ unsigned mask_bits(const AttnMask& mask, long long offset) {
  if (mask.is_boolean()) return static_cast<const unsigned char*>(mask.data)[offset];
  if (mask.kind == AttnMask::Kind::float32) return static_cast<const unsigned*>(mask.data)[offset];
  return static_cast<const unsigned short*>(mask.data)[offset];
}

// Shared memory of a thread block.
struct MaskSmem {
  unsigned kinds;         // [warp]: of the tiles that the warps look at
  unsigned keeps_lowest;  // whether a row sees nothing but the lowest values
  unsigned rows;          // [row][2]: whether it sees one of these, and whether something else

  __device__ __forceinline__ explicit MaskSmem(unsigned base)
      : kinds(base), keeps_lowest(kinds + 4 * MASK_THREADS / 32), rows(keeps_lowest + 4) {}
};

// Of a tile: 0 if no row sees some of it, or else SEEN, and what else is true.
constexpr int SEEN = 1;
constexpr int PARTIAL = 2;  // not all rows see all of it, unchanged
constexpr int LOWEST = 4;   // of what is seen all values are the lowest
constexpr int ADDED = 8;    // as ListedTile::ADDED
constexpr int UNKNOWN = -1;

// Writes the bits of a tile for one list, whose first row is `m_start`: by one warp. `Element` is
// what the mask's elements take.
template <typename Element>
__device__ __forceinline__ int look_at_tile(const MaskTilesParams& params, long long first,
                                            int m_start, int tile, unsigned* bits,
                                            const MaskSmem& smem) {
  constexpr int AT_ONCE = 8;  // pairs of columns whose loads are under way together
  const AttnMask& mask = params.attn_mask;
  const Element* const data = static_cast<const Element*>(mask.data) + first;
  const bool columns_alike = params.out.room < params.out.tiles;
  const int row_in_8 = threadIdx.x % 32 / 4, thread = threadIdx.x % 4;
  const int words = MaskTiles::words(params.block_n);
  bool any = false, all = true, any_other = false;
  for (int row0 = 0; row0 < params.out.rows; row0 += 8) {
    const int row = row0 + row_in_8;
    const bool is_row = row < params.out.rows && m_start + row < params.num_rows;
    KeyRange seen{0, 0};
    if (is_row) {
      seen = visible(params.window, m_start + row, m_start + row + 1, params.num_rows,
                     params.num_columns);
      if (columns_alike) seen.end = params.block_n;  // of one tile, and its values are one
    }
    const Element* const row_data = data + (m_start + row) * mask.row_stride;
    bool lowest = false, other = false;
#pragma unroll 1
    for (int word = 0; word < words; ++word) {
      unsigned found = 0;
      const int end = min(params.block_n / 8 - word * 16, 16);
#pragma unroll 1
      for (int begin = 0; begin < end; begin += AT_ONCE) {
        unsigned elements[2 * AT_ONCE];
        const int column0 = tile * params.block_n + (word * 16 + begin) * 8 + 2 * thread;
        const auto is_seen = [&](int n, int i) {
          const int column = column0 + 8 * n + i;
          return bool((begin + n < end) & (column >= seen.begin) & (column < seen.end));
        };
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            elements[2 * n + i] = 0;
            const bool loads = is_seen(n, i) & (!columns_alike | (n + i == 0));
            if (loads) elements[2 * n + i] = row_data[(column0 + 8 * n + i) * mask.key_stride];
          }
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const bool in_tile = begin + n < end;
            const float value = mask_value(mask.kind, elements[columns_alike ? 0 : 2 * n + i]);
            const bool is_lowest = value <= LOWEST_VALUES;
            // The backward takes their probabilities for 0 in any row.
            const bool sees =
                is_seen(n, i) & (value != -INFINITY) & !(params.rows_are_keys & is_lowest);
            any |= sees;
            lowest |= sees & is_lowest;
            other |= sees & !is_lowest;
            // Queries that do not exist are computed for nothing, but keys would be seen.
            const bool counts = in_tile & (is_row | params.rows_are_keys);
            all &= bool(sees & (value == 0.f)) || !counts;
            found |= static_cast<unsigned>(sees) << (2 * (begin + n) + i);
          }
        }
      }
      if (row < params.out.rows) bits[(row * 4 + thread) * words + word] = found;
    }
    if (lowest) ptx::st_shared_b32(smem.rows + 8 * row, 1);
    if (other) ptx::st_shared_b32(smem.rows + 8 * row + 4, 1);
    any_other = any_other || other;
  }
  if (!__any_sync(0xffffffff, any)) return 0;
  const bool is_partial = __any_sync(0xffffffff, !all);
  return SEEN + is_partial * PARTIAL + !__any_sync(0xffffffff, any_other) * LOWEST;
}

// Whether all rows of a block see all columns of a tile but for what the mask hides.
__device__ __forceinline__ bool is_inside(const MaskTilesParams& params, int m_start, int tile) {
  const int begin = tile * params.block_n, end = begin + params.block_n;
  const int m_end = m_start + params.block_m;
  if (end > params.num_columns || m_end > params.num_rows) return false;
  const KeyRange first =
      visible(params.window, m_start, m_start + 1, params.num_rows, params.num_columns);
  const KeyRange last =
      visible(params.window, m_end - 1, m_end, params.num_rows, params.num_columns);
  return max(first.begin, last.begin) <= begin && min(first.end, last.end) >= end;
}

// What look_at_tile says of a tile that lies in memory as lines of vectors, if that is the same for
// all of its elements; otherwise UNKNOWN. By one warp.
template <typename Element>
__device__ __forceinline__ int scan_tile(const MaskTilesParams& params, long long first,
                                         int m_start, int tile, const MaskSmem& smem) {
  constexpr int AT_ONCE = 4, WIDTH = 16 / sizeof(Element);
  constexpr unsigned MAGNITUDE = sizeof(Element) == 2 ? 0x7fff7fff : 0x7fffffff;
  const AttnMask& mask = params.attn_mask;
  const int lane = threadIdx.x % 32, n_vectors = params.vectors.divisor;
  const Element* const data = static_cast<const Element*>(mask.data) + first +
                              m_start * mask.row_stride +
                              static_cast<long long>(tile) * params.block_n * mask.key_stride;
  const unsigned pattern = *reinterpret_cast<const unsigned*>(data);  // of the first elements
  unsigned differs = 0, largest = 0;
  const int count = params.lines * n_vectors;
#pragma unroll 1
  for (int begin = lane; begin < count; begin += 32 * AT_ONCE) {
    int4 x[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int index = min(begin + 32 * i, count - 1);
      const int line = params.vectors.divide(index);
      x[i] = *reinterpret_cast<const int4*>(data + line * params.line_stride +
                                            (index - line * n_vectors) * WIDTH);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const unsigned words[4] = {unsigned(x[i].x), unsigned(x[i].y), unsigned(x[i].z),
                                 unsigned(x[i].w)};
#pragma unroll
      for (unsigned word : words) {
        differs |= word ^ pattern;
        if constexpr (sizeof(Element) == 2) largest = __vmaxu2(largest, word & MAGNITUDE);
        if constexpr (sizeof(Element) == 4) largest = max(largest, word & MAGNITUDE);
      }
    }
  }
  const bool is_one = !__any_sync(0xffffffff, differs != 0) &&
                      (sizeof(Element) == 4 || pattern == (pattern >> 16 | pattern << 16)) &&
                      (sizeof(Element) != 1 || (pattern & 0xff) == (pattern >> 8 & 0xff));
  if (is_one) {
    const float value = mask_value(mask.kind, static_cast<Element>(pattern));
    if (value == -INFINITY || (params.rows_are_keys && value <= LOWEST_VALUES)) return 0;
  } else if (sizeof(Element) == 1) {
    return UNKNOWN;
  }
  largest = __reduce_max_sync(0xffffffff, max(largest & (sizeof(Element) == 2 ? 0xffff : ~0u),
                                              sizeof(Element) == 2 ? largest >> 16 : 0));
  const bool is_zero = sizeof(Element) == 1 || largest == 0;
  // Finite and not the lowest.
  const float magnitude = mask_value(mask.kind, static_cast<Element>(largest));
  if (!is_zero && !(params.adds && magnitude < -LOWEST_VALUES)) return UNKNOWN;
  for (int row = lane; row < params.out.rows; row += 32) {
    ptx::st_shared_b32(smem.rows + 8 * row + 4, 1);
  }
  return is_zero ? SEEN : SEEN + ADDED;
}

template <typename Element>
__device__ __forceinline__ void list_tiles_of(const MaskTilesParams& params) {
  extern __shared__ __align__(1024) unsigned char smem_raw[];
  const MaskSmem smem(ptx::smem_address(smem_raw));
  constexpr int WARPS = MASK_THREADS / 32;
  const MaskTiles& out = params.out;
  const int list = blockIdx.x, warp = threadIdx.x / 32;
  const int batch_head = list / params.blocks, block = list - batch_head * params.blocks;
  const int batch = batch_head / params.heads, head = batch_head - batch * params.heads;
  const int m_start = block * params.block_m;
  const long long first =
      batch * params.attn_mask.batch_stride + head * params.attn_mask.head_stride;
  // Where rows share a list, or columns are alike, there is no window.
  const KeyRange seen =
      visible(params.window, m_start, min(m_start + params.block_m, params.num_rows),
              params.num_rows, params.num_columns);
  const int last = seen.end > seen.begin ? (seen.end + params.block_n - 1) / params.block_n : 0;
  const int end = min(last, out.room);
  const long long first_entry = static_cast<long long>(list) * out.room;
  int* entries = out.lists + first_entry + list;
  const int bits_of_tile = out.rows * 4 * MaskTiles::words(params.block_n);
  for (int i = threadIdx.x; i < 2 * out.rows; i += MASK_THREADS) {
    ptx::st_shared_b32(smem.rows + 4 * i, 0);
  }
  if (threadIdx.x == 0) ptx::st_shared_b32(smem.keeps_lowest, 0);
  for (int i = threadIdx.x; out.seen != nullptr && i < out.room; i += MASK_THREADS) {
    out.seen[first_entry + i] = 0;
  }
  __syncthreads();
  int count = 0, count_lowest = 0;  // of the first thread
  for (int base = seen.begin / params.block_n; base < end; base += WARPS) {
    const int tile = base + warp;
    int kind = 0;
    if (tile < end) {
      kind = UNKNOWN;
      if (params.lines > 0 && is_inside(params, m_start, tile)) {
        kind = scan_tile<Element>(params, first, m_start, tile, smem);
      }
      if (kind == UNKNOWN) {
        kind = look_at_tile<Element>(params, first, m_start, tile,
                                     out.bits + (first_entry + tile) * bits_of_tile, smem);
      }
    }
    if (threadIdx.x % 32 == 0) {
      ptx::st_shared_b32(smem.kinds + 4 * warp, kind);
      if (out.seen != nullptr && kind != 0) out.seen[first_entry + tile] = 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 0; w < WARPS; ++w) {
        const int found = ptx::ld_shared_b32(smem.kinds + 4 * w);
        if (found == 0) continue;
        // Marked by its sign, for as long as it is not known whether it stays.
        const int mark = found & LOWEST ? 1 << 31 : 0;
        entries[++count] = mark | (base + w) << 2 | (found & PARTIAL ? ListedTile::PARTIAL : 0) |
                           (found & ADDED ? ListedTile::ADDED : 0);
        count_lowest += mark != 0;
      }
    }
    __syncthreads();
  }
  for (int row = threadIdx.x; row < out.rows; row += MASK_THREADS) {
    const bool sees_lowest = ptx::ld_shared_b32(smem.rows + 8 * row) != 0;
    const bool sees_other = ptx::ld_shared_b32(smem.rows + 8 * row + 4) != 0;
    if (sees_lowest && !sees_other) ptx::st_shared_b32(smem.keeps_lowest, 1);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (count_lowest > 0) {
    const bool keeps = ptx::ld_shared_b32(smem.keeps_lowest) != 0;
    int kept = 0;
    for (int i = 1; i <= count; ++i) {
      const int entry = entries[i];
      if (entry >= 0 || keeps) entries[++kept] = entry & 0x7fffffff;
    }
    count = kept;
  }
  // One stands for all.
  entries[0] = out.room < out.tiles ? count * out.tiles : count;
}

__device__ __forceinline__ void list_tiles(const MaskTilesParams& params) {
  if (params.attn_mask.is_boolean()) {
    list_tiles_of<unsigned char>(params);
  } else if (params.attn_mask.kind == AttnMask::Kind::float32) {
    list_tiles_of<unsigned>(params);
  } else {
    list_tiles_of<unsigned short>(params);
  }
}

}  // namespace flashmoe::sm90
