// How kernels of packed variants find blocks of rows and their sequences (common/schedule.h), where
// plain ones have a batch of equal lengths.
#pragma once

#include "common/params.h"
#include "common/schedule.h"
#include "common/variant.h"
#include "ptx/ld_st.cuh"
#include "ptx/tma.cuh"

namespace flashmoe {

// A sequence's lengths. Plain kernels read their parameters where they need them, and no Sequence:
// ptxas makes something else of values that were read before.
template <Variant VARIANT>
__device__ __forceinline__ int seqlen_q(const AttentionParams& p, const Sequence& s) {
  return VARIANT.packed ? s.seqlen_q : p.seqlen_q;
}
template <Variant VARIANT>
__device__ __forceinline__ int seqlen_kv(const AttentionParams& p, const Sequence& s) {
  return VARIANT.packed ? s.seqlen_kv : p.seqlen_kv;
}
// Its first rows in packed tensors, in elements.
template <Variant VARIANT>
__device__ __forceinline__ long long offset(int begin, long long row_stride) {
  return VARIANT.packed ? begin * row_stride : 0;
}

__device__ __forceinline__ PackedBlock load_block(const PackedBlock* block) {
  const int4 x = ptx::ld_global_cg_v4(block);
  const int4 y = ptx::ld_global_cg_v4(reinterpret_cast<const int4*>(block) + 1);
  return {{x.x, x.y, x.z, x.w}, y.x, y.y, y.z, y.w};
}

// Coordinates of the TMA: row i of a sequence of a packed tensor is row `shift` + i of `end`. The
// last row that the TMA knows of is the sequence's: it neither reads nor writes past it
// (sm90_launch.h, TensorView). Dense tensors have the row and the batch itself.
struct Place {
  int shift, end;
};
template <Variant VARIANT>
__device__ __forceinline__ Place q_place(const Sequence& s) {
  if constexpr (!VARIANT.packed) return {};
  return {PACKED_ROWS - s.seqlen_q, s.q_begin + s.seqlen_q};
}
template <Variant VARIANT>
__device__ __forceinline__ Place k_place(const Sequence& s) {
  if constexpr (!VARIANT.packed) return {};
  return {PACKED_ROWS - s.seqlen_kv, s.k_begin + s.seqlen_kv};
}
// A box of a tensor's columns and rows, to and from shared memory.
template <Variant VARIANT>
__device__ __forceinline__ void load_box(unsigned dst_smem, const ptx::TensorMap* map,
                                         unsigned barrier_smem, int column, int row, int head,
                                         int batch, const Place& place) {
  if constexpr (VARIANT.packed) {
    ptx::cp_async_bulk_tensor_5d_load(dst_smem, map, barrier_smem, column, place.shift + row, head,
                                      place.end, PACKED_ROWS);
  } else {
    ptx::cp_async_bulk_tensor_4d_load(dst_smem, map, barrier_smem, column, row, head, batch);
  }
}
template <Variant VARIANT>
__device__ __forceinline__ void store_box(const ptx::TensorMap* map, unsigned src_smem, int column,
                                          int row, int head, int batch, const Place& place) {
  if constexpr (VARIANT.packed) {
    ptx::cp_async_bulk_tensor_5d_store(map, src_smem, column, place.shift + row, head, place.end,
                                       PACKED_ROWS);
  } else {
    ptx::cp_async_bulk_tensor_4d_store(map, src_smem, column, row, head, batch);
  }
}

// The end of the last sequence of a packed tensor: where its rows begin that are in none.
__device__ __forceinline__ int packed_end(const int* cu_seqlens, int batch, int total) {
  return clamped(cu_seqlens[batch], 0, total);
}

// Where softmax_lse has row 0 of a head of the sequence.
template <Variant VARIANT>
__device__ __forceinline__ long long lse_offset(const AttentionParams& p, const Sequence& s,
                                                int batch, int head) {
  if constexpr (VARIANT.packed) {
    return static_cast<long long>(head) * p.sequences.total_q + s.q_begin;
  }
  return (static_cast<long long>(batch) * p.heads_q + head) * p.seqlen_q;
}

}  // namespace flashmoe
