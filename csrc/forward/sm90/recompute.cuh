// Rows of which the fast path lost something, once more: by one warp, from global memory, with
// their own maximum. Rare, so it is slow, and its code short: it stands between the instructions of
// the fast path, and is fetched with them. Hence loops over arrays in local memory.
//
// Lost is what overflowed, because scores grew further than a lagging maximum can follow or values
// are large, or what was rounded by more than the exponent's range, because scores are large.
#pragma once

#include "common/mask_tiles.cuh"
#include "forward/sm90/softmax.cuh"
#include "forward/sm90/work.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/mma.cuh"

namespace flashmoe::sm90 {

// The larger magnitude of a thread's two maxima. Under a mask there are rows that see nothing, of
// which nothing is lost.
template <Variant VARIANT>
__device__ __forceinline__ float largest_maximum(const float (&minus_max)[2]) {
  if constexpr (VARIANT.mask) {
    const float first = minus_max[0] == NO_MAXIMUM ? 0.f : minus_max[0];
    const float second = minus_max[1] == NO_MAXIMUM ? 0.f : minus_max[1];
    return fmaxf(fabsf(first), fabsf(second));
  }
  return fmaxf(fabsf(minus_max[0]), fabsf(minus_max[1]));
}

// Whether the fast path may have lost something in a row of this warp, by the maxima of a thread's
// two rows and its shares of their sums.
template <typename T, Variant VARIANT>
__device__ __forceinline__ bool is_suspect(const float (&minus_max)[2], const float (&row_sum)[2]) {
  const bool coarse = largest_maximum<VARIANT>(minus_max) >= COARSE_MAXIMUM;
  // Negated, for a sum of NaN.
  const bool safe = row_sum[0] < SAFE_SUM<T> && row_sum[1] < SAFE_SUM<T>;
  return __any_sync(0xffffffff, coarse || !safe);
}

// The largest magnitude of a tile's values in shared memory, in bfloat16.
template <int BYTES>
__device__ __forceinline__ float largest_magnitude(unsigned smem) {
  unsigned largest = 0;  // of two values, as integers, which order as they do
#pragma unroll 1
  for (int i = threadIdx.x % 32 * 16; i < BYTES; i += 512) {
    const int4 x = ptx::ld_shared_v4(smem + i);
    const int pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = __vmaxu2(largest, pairs[j] & 0x7fff7fff);
  }
  largest = __reduce_max_sync(0xffffffff, max(largest >> 16, largest & 0xffff));
  return __int_as_float(largest << 16);
}

// Whether the fast path did lose something in a row of this warp. O is what it added up, but for
// probabilities that still multiply values of up to `pending`.
template <int O_COLUMNS, Variant VARIANT>
__device__ __forceinline__ bool is_lost(const float (&O_rmem)[O_COLUMNS / 2],
                                        const float (&minus_max)[2], const float (&row_sum)[2],
                                        float pending) {
  bool lost = largest_maximum<VARIANT>(minus_max) >= COARSE_MAXIMUM;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Negated, for a sum of NaN.
    lost |= !(row_sum[half] < TOO_LARGE && row_sum[half] * pending < 0x1p120f);
  }
#pragma unroll
  for (int i = 0; i < O_COLUMNS / 2; ++i) lost |= !(fabsf(O_rmem[i]) < 0x1p126f);
  return __any_sync(0xffffffff, lost);
}

// A thread's part of 16 rows of O, as mma_m16n8k16 leaves it, with their maxima and its shares of
// their sums (see Softmax).
template <int O_COLUMNS>
struct Rows {
  float O[O_COLUMNS / 8][4];
  float minus_max[2], row_sum[2];
};

// S of 16 rows from `row` on and the 8 keys from `key` on, -infinity where a row does not see a
// key.
template <typename T, Variant VARIANT>
__device__ __forceinline__ void recompute_scores(const Sm90Params& params, const Sequence& sequence,
                                                 const T* q, const T* k, int row, int key,
                                                 float slope, float (&S)[4]) {
  const AttentionParams& p = params.attention;
  const int lane = threadIdx.x % 32;
  const int my_row = row + lane / 4, my_key = key + lane / 4;
  q += my_row * p.q_row_stride + lane % 4 * 2;
  k += my_key * p.k_row_stride + lane % 4 * 2;
  auto load = [](const T* x, bool there) {
    return there ? *reinterpret_cast<const unsigned*>(x) : 0u;
  };
#pragma unroll
  for (int e = 0; e < 4; ++e) S[e] = 0.f;
#pragma unroll 1
  for (int d = 0; d < p.head_dim; d += 8) {
    const unsigned a[2] = {
        load(q + d, my_row < seqlen_q<VARIANT>(p, sequence)),
        load(q + 8 * p.q_row_stride + d, my_row + 8 < seqlen_q<VARIANT>(p, sequence))};
    ptx::mma_m16n8k8<T>(S, a, load(k + d, my_key < seqlen_kv<VARIANT>(p, sequence)));
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int e_row = my_row + e / 2 * 8, e_key = key + lane % 4 * 2 + e % 2;
    const VisibleKeys<VARIANT> visible_keys{p, sequence};
    S[e] = with_terms<VARIANT>(params, S[e], slope,
                               static_cast<float>(e_row + visible_keys.diagonal - e_key));
    const KeyRange keys = visible_keys(e_row, e_row);
    if (e_key >= keys.end || e_key < keys.begin) S[e] = -INFINITY;
  }
}

// attn_mask of these scores.
__device__ __forceinline__ void mask_scores(const Sm90Params& params, const Work& work, int row,
                                            int key, float (&S)[4]) {
  const AttnMask& mask = params.attention.terms.attn_mask;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int e_row = row + lane / 4 + e / 2 * 8, e_key = key + lane % 4 * 2 + e % 2;
    // What is hidden already, keys that do not exist as well, stays so, whatever the mask has
    // there.
    if (S[e] == -INFINITY || e_row >= params.attention.seqlen_q) continue;
    const unsigned bits =
        mask_bits(mask, work.batch * mask.batch_stride + work.head * mask.head_stride +
                            e_row * mask.row_stride + e_key * mask.key_stride);
    const float value = mask_value(mask.kind, bits);
    if (value == -INFINITY) {
      S[e] = -INFINITY;
    } else if (!mask.is_boolean()) {
      S[e] += mask_term(params, value);
    }
  }
}

// The 16 rows of one warp from `row` on.
template <typename T, Sm90Tile TILE, Variant VARIANT>
__device__ __forceinline__ void recompute_rows(const Sm90Params& params, const Work& work, int row,
                                               Rows<TILE.o_columns()>& rows) {
  // Enough for O to stay finite over 2^24 keys of the largest values.
  constexpr float SHIFT = ptx::IS_BFLOAT16<T> ? 24.f : 0.f;
  const AttentionParams& p = params.attention;
  const int lane = threadIdx.x % 32, batch = work.batch, head = work.head;
  const int head_kv = params.group.divide(head);
  const Sequence& sequence = work.sequence;
  const T* q = static_cast<const T*>(p.q) + batch * p.q_batch_stride +
               offset<VARIANT>(sequence.q_begin, p.q_row_stride) + head * p.q_head_stride;
  const T* k = static_cast<const T*>(p.k) + batch * p.k_batch_stride +
               offset<VARIANT>(sequence.k_begin, p.k_row_stride) + head_kv * p.k_head_stride;
  const unsigned short* v = static_cast<const unsigned short*>(p.v) + batch * p.v_batch_stride +
                            offset<VARIANT>(sequence.k_begin, p.v_row_stride) +
                            head_kv * p.v_head_stride + lane / 4;
  const float slope = alibi_slope<VARIANT>(params, batch, head);
  const KeyRange keys = VisibleKeys<VARIANT>{p, sequence}(row, row + 15);
  // Told that a warp agrees on them: ptxas would take the fast path for divergent, too.
  const int n_end = __shfl_sync(0xffffffff, keys.end, 0);
  int n_begin = VARIANT.local ? __shfl_sync(0xffffffff, keys.begin, 0) : 0;
  if (VARIANT.dropout) n_begin &= ~7;  // as its bits are grouped
#pragma unroll 1
  for (auto& columns : rows.O) {
    for (float& x : columns) x = 0.f;
  }
  float S[4], max[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
  for (int n = n_begin; n < n_end; n += 8) {
    recompute_scores<T, VARIANT>(params, sequence, q, k, row, n, slope, S);
    if constexpr (VARIANT.mask) mask_scores(params, work, row, n, S);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[half] = fmaxf(max[half], fmaxf(S[2 * half], S[2 * half + 1]));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    max[half] = fmaxf(max[half], __shfl_xor_sync(0xffffffff, max[half], 1));
    max[half] = fmaxf(max[half], __shfl_xor_sync(0xffffffff, max[half], 2));
    rows.minus_max[half] = NO_MAXIMUM;
    rows.row_sum[half] = 0.f;
    if (max[half] == -INFINITY) {
      max[half] = 0.f;  // the difference of infinities is no number
    } else {
      rows.minus_max[half] = fmaf(-max[half], params.scale_log2, -SHIFT);
    }
  }
#pragma unroll 1
  for (int n = n_begin; n < n_end; n += 8) {
    recompute_scores<T, VARIANT>(params, sequence, q, k, row, n, slope, S);
    if constexpr (VARIANT.mask) mask_scores(params, work, row, n, S);
    unsigned P[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // The difference is scaled, not the scores: that would round by their own magnitude.
        x[i] = ptx::ex2_approx_ftz(fmaf(S[2 * half + i] - max[half], params.scale_log2, -SHIFT));
        rows.row_sum[half] += x[i];
      }
      P[half] = ptx::cvt_rn_x2<T>(x[0], x[1]);
    }
    if constexpr (VARIANT.dropout) {
      const Dropout dropout = Dropout::of(p.terms, batch, head);
      const Philox bits = dropout.bits(row + lane / 4, n + lane % 4 * 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        P[half] &= dropout.kept_halves(n & 8 ? bits.x[2 + half] : bits.x[half]);
      }
    }
    const int key = n + lane % 4 * 2;
#pragma unroll 1
    for (int d = 0; d < out_columns<TILE>(p); d += 8) {
      auto load = [&](int i) -> unsigned {
        return key + i < seqlen_kv<VARIANT>(p, sequence) ? v[(key + i) * p.v_row_stride + d] : 0;
      };
      ptx::mma_m16n8k8<T>(rows.O[d / 8], P, load(0) | load(1) << 16);
    }
  }
}

}  // namespace flashmoe::sm90
