// How kernels of packed variants find blocks of rows and their sequences (common/schedule.h), where
// plain ones have a batch of equal lengths.
#pragma once

#include "common/params.h"
#include "common/schedule.h"
#include "common/variant.h"
#include "ptx/ld_st.cuh"

namespace flashmoe {

// Of a plain kernel: all that it is given.
__device__ __forceinline__ Sequence whole_sequence(const AttentionParams& p) {
  return {0, 0, p.seqlen_q, p.seqlen_kv};
}

__device__ __forceinline__ PackedBlock load_block(const PackedBlock* block) {
  const int4 x = ptx::ld_global_cg_v4(block);
  const int4 y = ptx::ld_global_cg_v4(reinterpret_cast<const int4*>(block) + 1);
  return {{x.x, x.y, x.z, x.w}, y.x, y.y, y.z, y.w};
}

// Coordinates of the TMA: row i of a sequence is row `shift` + i of `end`. In packed tensors rows
// are shifted so that the tensor's last one is the sequence's: the TMA neither reads nor writes past
// it (sm90_launch.h, packed_view). In dense ones `end` is the batch.
struct Place {
  int shift, end;
};
template <Variant VARIANT>
__device__ __forceinline__ Place q_place(const AttentionParams& p, const Sequence& s, int batch) {
  if constexpr (!VARIANT.packed) return {0, batch};
  return {p.sequences.total_q - s.seqlen_q, s.q_begin + s.seqlen_q};
}
template <Variant VARIANT>
__device__ __forceinline__ Place k_place(const AttentionParams& p, const Sequence& s, int batch) {
  if constexpr (!VARIANT.packed) return {0, batch};
  return {p.sequences.total_k - s.seqlen_kv, s.k_begin + s.seqlen_kv};
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
