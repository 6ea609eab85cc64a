// How a consumer warpgroup of the Hopper forward kernel writes its rows of O and softmax_lse.
#pragma once

#include "forward/sm90/softmax.cuh"
#include "forward/sm90/work.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"

namespace flashmoe::sm90 {

// O_rmem holds 64 rows of O as wgmma leaves them (see Softmax).
template <typename T, Sm90Tile TILE, Variant VARIANT>
struct Output {
  using S = Smem<TILE>;
  static constexpr int O_COLUMNS = TILE.o_columns(), CONSUMERS = TILE.consumers();
  static constexpr float LN_2 = 0.6931471805599453f;
  using Sums = float[O_COLUMNS / 2];

  const Sm90Params& params;
  const S& smem;
  const int w, warp, lane;
  const AttentionParams& p = params.attention;

  __device__ __forceinline__ int row_of(const Work& work, int half) const {
    return work.m_start + w * 64 + warp * 16 + lane / 4 + half * 8;
  }
  __device__ __forceinline__ T* out_of(const Work& work) const {
    return static_cast<T*>(p.out) + work.batch * p.o_batch_stride +
           offset<VARIANT>(work.sequence.q_begin, p.o_row_stride) + work.head * p.o_head_stride;
  }
  // Sets softmax_lse, and `scale` to what O must be multiplied with.
  __device__ __forceinline__ void finish_rows(const Work& work, const float (&minus_max)[2],
                                              const float (&final_sum)[2],
                                              float (&scale)[2]) const {
    float* lse = p.softmax_lse + lse_offset<VARIANT>(p, work.sequence, work.batch, work.head);
    float sink = -INFINITY;  // in units of log 2
    if constexpr (VARIANT.sink) {
      if (p.terms.sinks != nullptr) sink = p.terms.sinks[work.head] * 1.4426950408889634f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = final_sum[half], minus = minus_max[half], share = 1.f;
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      if constexpr (VARIANT.sink) {
        // Relative to the larger one of the maximum and the sink, which may be far apart.
        const float largest = fmaxf(-minus, sink + MAX_SHIFT<T>);
        share = ptx::ex2_approx_ftz(-minus - largest);
        sum = fmaf(sum, share, ptx::ex2_approx_ftz(sink - largest));
        minus = -largest;
      }
      const bool empty = minus == NO_MAXIMUM;
      scale[half] = empty ? 0.f : ptx::rcp_approx_ftz(sum);
      if constexpr (VARIANT.sink) scale[half] *= share;
      if constexpr (VARIANT.dropout) scale[half] *= dropout_scale(p.terms.dropout_limit);
      const int row = row_of(work, half);
      if ((lane & 3) == 0 && row < seqlen_q<VARIANT>(p, work.sequence)) {
        // About 1 without the shift, where lg2.approx is at its best.
        const float log2_sum = ptx::lg2_approx_ftz(sum * (1 << int(MAX_SHIFT<T>)));
        lse[row] = empty ? -INFINITY : (log2_sum - (minus + MAX_SHIFT<T>)) * LN_2;
      }
    }
  }
  __device__ __forceinline__ static unsigned packed(const Sums& O_rmem, int d, int half,
                                                    const float (&scale)[2]) {
    return ptx::cvt_rn_x2<T>(O_rmem[4 * d + 2 * half] * scale[half],
                             O_rmem[4 * d + 2 * half + 1] * scale[half]);
  }
  // O to where its Q was, and from there by TMA.
  __device__ __forceinline__ void store_staged(const Sums& O_rmem, const Work& work, int buffer,
                                               const float (&scale)[2]) const {
    const unsigned staged = smem.Q + buffer * S::Q_BYTES;
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int d = 0; d < O_COLUMNS / 8; d += 2) {
      const unsigned x[4] = {packed(O_rmem, d, 0, scale), packed(O_rmem, d, 1, scale),
                             packed(O_rmem, d + 1, 0, scale), packed(O_rmem, d + 1, 1, scale)};
      const int chunk = (d % 8 + lane / 16) ^ (row & 7);
      ptx::stmatrix_x4(staged + d / 8 * 8192 + row * 128 + chunk * 16, x);
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(1 + CONSUMERS + w, 128);
    if (threadIdx.x % 128 == 0) {
      const Place place = q_place<VARIANT>(work.sequence);
      const int row = work.m_start + w * 64;
#pragma unroll
      for (int panel = 0; panel < S::O_PANELS; ++panel) {
        store_box<VARIANT>(&params.o, staged + panel * 8192, panel * 64, row, work.head, work.batch,
                           place);
      }
      ptx::cp_async_bulk_commit_group();
    }
  }
  // Groups of 8 columns of O from FIRST to LAST, straight from registers. A lane holds 2 columns of
  // each; lanes of a row trade, so that each holds 4 or 8 of one group and a row's 32 or 64 bytes
  // are written at once.
  template <int GROUPS, int FIRST, int LAST>
  __device__ __forceinline__ void store_columns(const Sums& O_rmem, const Work& work,
                                                const float (&scale)[2], int half) const {
    const int row = row_of(work, half);
    const int mine = GROUPS == 4 ? lane & 3 : lane & 1;
    const int column0 = mine * 8 + (GROUPS == 4 ? 0 : (lane & 2) * 2);
    T* out_row = out_of(work) + row * p.o_row_stride + column0;
    const int columns =
        row < seqlen_q<VARIANT>(p, work.sequence) ? out_columns<TILE>(p) - column0 : 0;
#pragma unroll
    for (int d = FIRST; d < LAST; d += GROUPS) {
      unsigned x[GROUPS];
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) x[i] = packed(O_rmem, d + i, half, scale);
#pragma unroll
      for (int bit = 1; bit < GROUPS; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < GROUPS / 2; ++i) {
          const int low = bit == 1 ? 2 * i : i, high = low + bit;
          const unsigned received = __shfl_xor_sync(0xffffffff, upper ? x[low] : x[high], bit);
          x[low] = upper ? received : x[low];
          x[high] = upper ? x[high] : received;
        }
      }
      if constexpr (GROUPS == 4) {
        ptx::st_global_v4_if(d * 8 < columns, out_row + d * 8, x[0], x[1], x[2], x[3]);
      } else {
        ptx::st_global_v2_if(d * 8 < columns, out_row + d * 8, x[0], x[1]);
      }
    }
  }
  __device__ __forceinline__ void store_direct(const Sums& O_rmem, const Work& work,
                                               const float (&scale)[2]) const {
    constexpr int FOURS = O_COLUMNS / 32 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_columns<4, 0, FOURS>(O_rmem, work, scale, half);
      store_columns<2, FOURS, O_COLUMNS / 8>(O_rmem, work, scale, half);
    }
  }
  __device__ __forceinline__ void store(Sums& O_rmem, const Work& work, int buffer,
                                        const float (&minus_max)[2],
                                        const float (&final_sum)[2]) const {
    float scale[2];
    finish_rows(work, minus_max, final_sum, scale);
    if constexpr (TILE.stages_output()) {
      store_staged(O_rmem, work, buffer, scale);
    } else {
      store_direct(O_rmem, work, scale);
    }
#pragma unroll
    for (int i = 0; i < O_COLUMNS / 2; ++i) O_rmem[i] = 0.f;
  }
  // The TMA has read what store staged in `buffer`: room for another Q.
  __device__ __forceinline__ void release_staged(int buffer) const {
    if (threadIdx.x % 128 == 0) {
      ptx::cp_async_bulk_wait_group_read<0>();
      ptx::mbarrier_arrive(smem.empty_Q + 8 * buffer);
    }
  }
  // Rows that see no key.
  __device__ __forceinline__ void store_empty(const Work& work) const {
    const float no_max[2] = {NO_MAXIMUM, NO_MAXIMUM}, no_sum[2] = {0.f, 0.f};
    float scale[2];
    finish_rows(work, no_max, no_sum, scale);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(work, half);
#pragma unroll 1
      for (int column = (lane & 3) * 8; column < out_columns<TILE>(p); column += 32) {
        ptx::st_global_v4_if(row < seqlen_q<VARIANT>(p, work.sequence),
                             out_of(work) + row * p.o_row_stride + column, 0, 0, 0, 0);
      }
    }
  }
};

// Rows of packed tensors behind the last sequence, as if they saw no key: by the 96 threads from 32
// on of each thread block.
template <typename T, Sm90Tile TILE>
__device__ __forceinline__ void clear_rest(const AttentionParams& p) {
  const int chunks = out_columns<TILE>(p) / 8;  // of 16 bytes, in a row of a head
  for (int row = packed_end(p.sequences.cu_seqlens_q, p.batch, p.sequences.total_q) + blockIdx.x;
       row < p.sequences.total_q; row += gridDim.x) {
    T* out = static_cast<T*>(p.out) + row * p.o_row_stride;
    for (int i = threadIdx.x - 32; i < p.heads_q * chunks; i += 96) {
      const int head = i / chunks;
      ptx::st_global_v4_if(true, out + head * p.o_head_stride + (i - head * chunks) * 8, 0, 0, 0,
                           0);
    }
    for (int head = threadIdx.x - 32; head < p.heads_q; head += 96) {
      p.softmax_lse[static_cast<long long>(head) * p.sequences.total_q + row] = -INFINITY;
    }
  }
}

}  // namespace flashmoe::sm90
