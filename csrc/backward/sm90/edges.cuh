// What stands before and behind the Hopper backward kernel: its rows' statistics and an empty sum
// of dQ; dQ in 16 bits.
#pragma once

#include "backward/sm90/work.cuh"
#include "common/dropout.h"
#include "ptx/cp_async.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/mma.cuh"

namespace flashmoe::sm90_backward {

constexpr int EDGE_THREADS = 256;
// From here on (2^24 in units of log 2) softmax_lse has no digits left that an exponent is made of.
constexpr float LARGEST_LSE = 0x1p24f * 0.6931471805599453f;

// Where a thread block of an edge is: one block of queries of a head. They go from the last to the
// first: what the kernel needs first was touched last, and is in L2; so are the sums it added to
// last.
struct EdgeWork {
  int block, batch, head, m_start;  // m_start: -1 where a packed batch has no such block
  Sequence sequence;

  template <Sm90BackwardTile TILE, Variant VARIANT>
  __device__ __forceinline__ static EdgeWork of(const Sm90BackwardParams& params) {
    const unsigned block = gridDim.x - 1 - blockIdx.x, m_blocks = params.m_blocks;
    const unsigned heads = params.call.attention.heads_q, batch_head = block / m_blocks;
    if constexpr (VARIANT.packed) {
      const unsigned place = block - batch_head * m_blocks;
      if (int(place) >= ptx::ld_global_cg_v4(params.schedule.counts).x) {
        return {int(block), 0, 0, -1, {}};
      }
      const PackedBlock found = load_block(params.schedule.queries + place);
      return {int(block), found.batch, int(batch_head), found.start, found.sequence};
    }
    const unsigned batch = batch_head / heads;
    return {int(block),
            int(batch),
            int(batch_head - batch * heads),
            int(block - batch_head * m_blocks) * TILE.block_m,
            {}};
  }
};

// Rows of a block as its threads hold them: 16 bytes each, ROWS rows at once.
template <Sm90BackwardTile TILE>
struct EdgeRows {
  static constexpr int LANES = TILE.head_dim <= 64    ? 8
                               : TILE.head_dim <= 128 ? 16
                                                      : 32;  // of a row
  static constexpr int ROWS = EDGE_THREADS / LANES, COUNT = TILE.block_m / ROWS;
  static constexpr int SUMS = TILE.dq_elements() / 4 / EDGE_THREADS;  // 16 bytes each, of dQ
  static_assert(SUMS * 4 * EDGE_THREADS == TILE.dq_elements(), "each thread has as many sums");

  // This thread's first one. The others are EDGE_THREADS apart.
  __device__ __forceinline__ static float4* sums(const Sm90BackwardParams& params,
                                                 const EdgeWork& work) {
    float* block = params.dq_sum + work.block * static_cast<long long>(TILE.dq_elements());
    return reinterpret_cast<float4*>(block) + threadIdx.x;
  }
};

__device__ __forceinline__ long long dq_row_stride(const AttentionParams& p) {
  return static_cast<long long>(p.heads_q) * p.head_dim;
}
// The rows of dQ of a block of queries of a head.
template <typename T, Variant VARIANT>
__device__ __forceinline__ T* dq_rows(const Sm90BackwardParams& params, const EdgeWork& work) {
  const AttentionParams& p = params.call.attention;
  return static_cast<T*>(params.call.dq) +
         (static_cast<long long>(VARIANT.packed ? 0 : work.batch) * p.seqlen_q + work.m_start) *
             dq_row_stride(p) +
         offset<VARIANT>(work.sequence.q_begin, dq_row_stride(p)) +
         static_cast<long long>(work.head) * p.head_dim;
}

// delta = rowsum(O dO) - dlse, and softmax_lse as the kernel wants it, of one block of queries of a
// head. The derivative of softmax_lse by a score is its P: dS = P (dP - rowsum(O dO) + dlse).
template <typename T, Sm90BackwardTile TILE, Variant VARIANT = Variant{}>
__device__ __forceinline__ void prepare(const Sm90BackwardParams& params) {
  // What is launched behind may read the list of blocks at once, as it has been written then.
  if constexpr (VARIANT.packed) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  using E = EdgeRows<TILE>;
  constexpr int AT_ONCE = 4;  // rows of a thread whose loads are under way together
  static_assert(E::COUNT % AT_ONCE == 0 && E::COUNT <= E::LANES, "a lane has one row's statistics");
  const AttentionParams& p = params.call.attention;
  const EdgeWork work = EdgeWork::of<TILE, VARIANT>(params);
  if (VARIANT.packed && work.m_start < 0) {
    if (work.block == 0 && threadIdx.x == 0) *params.ticket = 0;
    return;
  }
  const Sequence& sequence = work.sequence;
  bool needs_zeros = true;
  if constexpr ((VARIANT.deterministic && !VARIANT.mask) || VARIANT.whole) {
    // Who adds first stores; there are blocks to which nobody does.
    const KeyRange keys = visible(mask_of<VARIANT>(p), work.m_start, work.m_start + TILE.block_m,
                                  seqlen_q<VARIANT>(p, sequence), seqlen_kv<VARIANT>(p, sequence));
    needs_zeros = keys.begin == keys.end;
  }
  // Before the loads, or the compiler keeps these until the loads have come.
  if (!VARIANT.whole && needs_zeros) {
    float4* sum = E::sums(params, work);
#pragma unroll
    for (int i = 0; i < E::SUMS; ++i) sum[i * EDGE_THREADS] = float4{0.f, 0.f, 0.f, 0.f};
  }
  if (threadIdx.x == 0) params.turns[work.block] = 0;
  if (work.block == 0 && threadIdx.x == 0) *params.ticket = 0;
  const int lane = threadIdx.x % E::LANES, first = threadIdx.x / E::LANES, column = lane * 8;
  const T* out = static_cast<const T*>(p.out) + work.batch * p.o_batch_stride +
                 offset<VARIANT>(sequence.q_begin, p.o_row_stride) + work.head * p.o_head_stride;
  const T* dout = static_cast<const T*>(params.call.dout) +
                  work.batch * params.call.do_batch_stride +
                  offset<VARIANT>(sequence.q_begin, params.call.do_row_stride) +
                  work.head * params.call.do_head_stride;
  if (VARIANT.whole && needs_zeros) {
    T* dq = dq_rows<T, VARIANT>(params, work);
#pragma unroll
    for (int i = 0; i < E::COUNT; ++i) {
      const int row = i * E::ROWS + first;
      const bool there = work.m_start + row < p.seqlen_q && column < p.head_dim;
      ptx::st_global_v4_if(there, dq + row * dq_row_stride(p) + column, 0, 0, 0, 0);
    }
  }
  // The one of a thread's rows whose statistics it writes, and their inputs.
  const int mine = lane * E::ROWS + first, my_row = work.m_start + mine;
  float lse = -INFINITY, dlse = 0.f;
  if (lane < E::COUNT && my_row < seqlen_q<VARIANT>(p, sequence)) {
    const long long at = lse_offset<VARIANT>(p, sequence, work.batch, work.head) + my_row;
    lse = p.softmax_lse[at];
    if (params.call.dlse != nullptr) dlse = params.call.dlse[at];
    // Of a row that sees only a mask's lowest values there is no telling what each weighs: 0.
    if (VARIANT.mask && fabsf(lse) >= LARGEST_LSE) lse = -INFINITY;
  }
  // Where a row sees nothing, softmax_lse is a constant, and dlse may be NaN.
  float delta = 0.f;
#pragma unroll
  for (int start = 0; start < E::COUNT; start += AT_ONCE) {
    int4 o[AT_ONCE], d[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int row = work.m_start + (start + i) * E::ROWS + first;
      o[i] = d[i] = make_int4(0, 0, 0, 0);
      if (row < seqlen_q<VARIANT>(p, sequence) && column < p.head_dim) {
        o[i] = *reinterpret_cast<const int4*>(out + row * p.o_row_stride + column);
        d[i] = *reinterpret_cast<const int4*>(dout + row * params.call.do_row_stride + column);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int os[4] = {o[i].x, o[i].y, o[i].z, o[i].w}, ds[4] = {d[i].x, d[i].y, d[i].z, d[i].w};
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = ptx::cvt_f32_x2<T>(os[j]), y = ptx::cvt_f32_x2<T>(ds[j]);
        sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
      }
#pragma unroll
      for (int mask = E::LANES / 2; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, mask);
      }
      if (lane == start + i) delta = sum;
    }
  }
  if (lane < E::COUNT) {
    float* stats = params.stats + work.block * (2ll * TILE.block_m);
    stats[mine] = lse == -INFINITY ? -INFINITY : lse * -1.4426950408889634f;
    stats[TILE.block_m + mine] = lse == -INFINITY ? delta : delta - dlse;
  }
}

// Zeros in the rows of a packed gradient behind the last sequence.
template <typename T>
__device__ __forceinline__ void clear_rest(void* gradient, const int* cu_seqlens, int batch,
                                           int total, int heads, int head_dim) {
  const long long row_chunks = heads * (head_dim / 8);  // of 16 bytes
  const long long first = packed_end(cu_seqlens, batch, total) * row_chunks;
  for (long long i = first + blockIdx.x * EDGE_THREADS + threadIdx.x; i < total * row_chunks;
       i += static_cast<long long>(gridDim.x) * EDGE_THREADS) {
    ptx::st_global_v4_if(true, static_cast<T*>(gradient) + i * 8, 0, 0, 0, 0);
  }
}

// dQ of one block of queries of a head from its sum.
template <typename T, Sm90BackwardTile TILE, Variant VARIANT = Variant{}>
__device__ __forceinline__ void finish(const Sm90BackwardParams& params) {
  extern __shared__ __align__(1024) unsigned char smem_raw[];
  using E = EdgeRows<TILE>;
  constexpr int PITCH = TILE.finish_pitch();
  const unsigned smem = ptx::smem_address(smem_raw);
  const AttentionParams& p = params.call.attention;
  const EdgeWork work = EdgeWork::of<TILE, VARIANT>(params);
  if constexpr (VARIANT.packed) {
    const Sequences& s = p.sequences;
    clear_rest<T>(params.call.dq, s.cu_seqlens_q, p.batch, s.total_q, p.heads_q, p.head_dim);
    clear_rest<T>(params.call.dk, s.cu_seqlens_k, p.batch, s.total_k, p.heads_kv, p.head_dim);
    clear_rest<T>(params.call.dv, s.cu_seqlens_k, p.batch, s.total_k, p.heads_kv, p.head_dim);
    if (work.m_start < 0) {
      ptx::griddepcontrol_wait();  // as in kernel.cuh
      return;
    }
  }
  const float4* sum = E::sums(params, work);
  float scale = p.softmax_scale;
  if constexpr (VARIANT.dropout) scale *= dropout_scale(p.terms.dropout_limit);
  ptx::griddepcontrol_wait();
  float4 x[E::SUMS];  // all under way together
#pragma unroll
  for (int i = 0; i < E::SUMS; ++i) x[i] = sum[i * EDGE_THREADS];
#pragma unroll
  for (int i = 0; i < E::SUMS; ++i) {
    // Of 8 columns, of both warpgroups.
    const int thread = threadIdx.x % 128, group = i * 2 + threadIdx.x / 128;
    int row = thread / 32 * 16 + thread % 32 / 4, column = group * 8 + thread % 4 * 2;
    if constexpr (TILE.dq_by_rows()) {
      row += column / TILE.head_dim * 64;
      column %= TILE.head_dim;
    }
    const unsigned dst = smem + row * PITCH + column * 2;
    ptx::st_shared_b32(dst, ptx::cvt_rn_x2<T>(x[i].x * scale, x[i].y * scale));
    ptx::st_shared_b32(dst + 8 * PITCH, ptx::cvt_rn_x2<T>(x[i].z * scale, x[i].w * scale));
  }
  __syncthreads();
  const int lane = threadIdx.x % E::LANES, first = threadIdx.x / E::LANES;
  const long long row_stride = dq_row_stride(p);
  T* dq = dq_rows<T, VARIANT>(params, work);
#pragma unroll
  for (int i = 0; i < E::COUNT; ++i) {
    const int row = i * E::ROWS + first;
    const bool there =
        work.m_start + row < seqlen_q<VARIANT>(p, work.sequence) && lane * 8 < p.head_dim;
    const int4 x = ptx::ld_shared_v4(smem + row * PITCH + lane * 16);
    ptx::st_global_v4_if(there, dq + row * row_stride + lane * 8, x.x, x.y, x.z, x.w);
  }
}

}  // namespace flashmoe::sm90_backward
