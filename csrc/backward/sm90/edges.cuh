// What stands before and behind the Hopper backward kernel: its rows' statistics and an empty sum
// of dQ; dQ in 16 bits.
#pragma once

#include "backward/sm90/tile.h"
#include "ptx/cp_async.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/mma.cuh"

namespace flashmoe::sm90_backward {

constexpr int EDGE_THREADS = 256;

// delta = rowsum(O dO) - dlse, and softmax_lse as the kernel wants it, of one block of queries of a
// head. The derivative of softmax_lse by a score is its P: dS = P (dP - rowsum(O dO) + dlse).
template <typename T, Sm90BackwardTile TILE>
__device__ __forceinline__ void prepare(const Sm90BackwardParams& params) {
  ptx::griddepcontrol_launch_dependents();
  // From the last on, here and in finish: what is needed first was touched last, and is in L2.
  constexpr int LANES = TILE.head_dim <= 64 ? 8 : TILE.head_dim <= 128 ? 16 : 32;  // of a row
  constexpr int ROWS = EDGE_THREADS / LANES;                                       // at once
  const AttentionParams& p = params.call.attention;
  const long long block = gridDim.x - 1 - blockIdx.x;
  const int m_block = static_cast<int>(block % params.m_blocks);
  const long long batch_head = block / params.m_blocks;
  const int batch = static_cast<int>(batch_head / p.heads_q);
  const int head = static_cast<int>(batch_head - static_cast<long long>(batch) * p.heads_q);
  const int column = threadIdx.x % LANES * 8;
  const T* out = static_cast<const T*>(p.out) + batch * p.o_batch_stride + head * p.o_head_stride;
  const T* dout = static_cast<const T*>(params.call.dout) + batch * params.call.do_batch_stride +
                  head * params.call.do_head_stride;
  float* stats = params.stats + block * (2 * TILE.block_m);
#pragma unroll
  for (int first = 0; first < TILE.block_m; first += ROWS) {
    const int in_block = first + threadIdx.x / LANES, row = m_block * TILE.block_m + in_block;
    const bool there = row < p.seqlen_q;
    float delta = 0.f;
    if (there && column < p.head_dim) {
      const int4 o = *reinterpret_cast<const int4*>(out + row * p.o_row_stride + column);
      const int4 d =
          *reinterpret_cast<const int4*>(dout + row * params.call.do_row_stride + column);
      const int os[4] = {o.x, o.y, o.z, o.w}, ds[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = ptx::cvt_f32_x2<T>(os[i]), y = ptx::cvt_f32_x2<T>(ds[i]);
        delta = fmaf(x.x, y.x, fmaf(x.y, y.y, delta));
      }
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
      delta += __shfl_xor_sync(0xffffffff, delta, mask);
    }
    if (threadIdx.x % LANES == 0) {
      const long long at = batch_head * p.seqlen_q + row;
      const float lse = there ? p.softmax_lse[at] : -INFINITY;
      // Where a row sees nothing, softmax_lse is a constant, and dlse may be NaN.
      if (params.call.dlse != nullptr && lse != -INFINITY) delta -= params.call.dlse[at];
      stats[in_block] = lse == -INFINITY ? -INFINITY : lse * -1.4426950408889634f;
      stats[TILE.block_m + in_block] = delta;
    }
  }
  if (threadIdx.x == 0) params.turns[block] = 0;
  if (block == 0 && threadIdx.x == 0) *params.ticket = 0;
  float4* sum = reinterpret_cast<float4*>(params.dq_sum + block * TILE.dq_elements());
#pragma unroll
  for (int i = threadIdx.x; i < TILE.dq_elements() / 4; i += EDGE_THREADS) {
    sum[i] = float4{0.f, 0.f, 0.f, 0.f};
  }
}

// dQ of one block of queries of a head from its sum.
template <typename T, Sm90BackwardTile TILE>
__device__ __forceinline__ void finish(const Sm90BackwardParams& params) {
  extern __shared__ __align__(1024) unsigned char smem_raw[];
  constexpr int PITCH = TILE.finish_pitch();
  const unsigned smem = ptx::smem_address(smem_raw);
  const AttentionParams& p = params.call.attention;
  const long long block = gridDim.x - 1 - blockIdx.x;
  ptx::griddepcontrol_wait();
  const float4* sum = reinterpret_cast<const float4*>(params.dq_sum + block * TILE.dq_elements());
#pragma unroll
  for (int i = threadIdx.x; i < TILE.dq_elements() / 4; i += EDGE_THREADS) {
    const float4 x = sum[i];
    const int thread = i % 128, group = i / 128;  // of 8 columns, of both warpgroups
    int row = thread / 32 * 16 + thread % 32 / 4, column = group * 8 + thread % 4 * 2;
    if constexpr (TILE.dq_by_rows()) {
      row += column / TILE.head_dim * 64;
      column %= TILE.head_dim;
    }
    const unsigned dst = smem + row * PITCH + column * 2;
    const float scale = p.softmax_scale;
    ptx::st_shared_b32(dst, ptx::cvt_rn_x2<T>(x.x * scale, x.y * scale));
    ptx::st_shared_b32(dst + 8 * PITCH, ptx::cvt_rn_x2<T>(x.z * scale, x.w * scale));
  }
  __syncthreads();
  const int m_start = static_cast<int>(block % params.m_blocks) * TILE.block_m;
  const long long batch_head = block / params.m_blocks;
  const int batch = static_cast<int>(batch_head / p.heads_q);
  const int head = static_cast<int>(batch_head - static_cast<long long>(batch) * p.heads_q);
  const int chunks = p.head_dim / 8, rows = min(TILE.block_m, p.seqlen_q - m_start);
  const long long row_stride = static_cast<long long>(p.heads_q) * p.head_dim;
  T* dq = static_cast<T*>(params.call.dq) +
          (static_cast<long long>(batch) * p.seqlen_q + m_start) * row_stride +
          static_cast<long long>(head) * p.head_dim;
  for (int i = threadIdx.x; i < rows * chunks; i += EDGE_THREADS) {
    const int row = i / chunks, chunk = i - row * chunks;
    const int4 x = ptx::ld_shared_v4(smem + row * PITCH + chunk * 16);
    *reinterpret_cast<int4*>(dq + row * row_stride + chunk * 8) = x;
  }
}

}  // namespace flashmoe::sm90_backward
