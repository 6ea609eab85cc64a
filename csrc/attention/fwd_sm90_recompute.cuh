// Rows whose scores grew further than a lagging maximum can follow, once more: by one warp, from
// global memory, with their own maximum. Rare, so it is slow, and made to need few registers.
#pragma once

#include "../ptx/mma.cuh"
#include "../ptx/registers.cuh"
#include "fwd_sm90_softmax.cuh"
#include "fwd_sm90_work.cuh"

namespace flashmoe::sm90 {

// 16 rows of O of one warp, 8 keys at a time. Threads hold S and O as mma_m16n8k16 leaves them.
template <typename T, Sm90Tile TILE>
struct Recompute {
  const Sm90Params& params;
  const Smem<TILE>& smem;
  const int slot;  // of the block of rows
  const AttentionParams& p = params.attention;

  // Hidden: what follows from it would be kept in registers all the time.
  __device__ __forceinline__ static int thread() {
    unsigned x = threadIdx.x;
    ptx::hide(x);
    return int(x);
  }
  // The first row of this warp; warpgroup 0 is the producer.
  __device__ __forceinline__ static int first_row(const Work& work, int thread) {
    return work.m_start + (thread / 32 - 4) * 16;
  }
  // S of the keys from n on, -infinity where a row does not see a key.
  __device__ __forceinline__ void scores(int n, float (&S)[4]) const {
    const Work work = read_work(smem, slot);
    const int thread_ = thread(), lane = thread_ % 32;
    const int row = first_row(work, thread_) + lane / 4, key = n + lane / 4;
    const T* q = static_cast<const T*>(p.q) + work.batch * p.q_batch_stride +
                 work.head * p.q_head_stride + row * p.q_row_stride + lane % 4 * 2;
    const T* k = static_cast<const T*>(p.k) + work.batch * p.k_batch_stride +
                 params.group.divide(work.head) * p.k_head_stride + key * p.k_row_stride +
                 lane % 4 * 2;
    auto load = [](const T* x, bool there) {
      return there ? *reinterpret_cast<const unsigned*>(x) : 0u;
    };
    for (int i = 0; i < 4; ++i) S[i] = 0.f;
#pragma unroll 1
    for (int d = 0; d < p.head_dim; d += 8) {
      const unsigned a[2] = {load(q, row < p.seqlen_q),
                             load(q + 8 * p.q_row_stride, row + 8 < p.seqlen_q)};
      ptx::mma_m16n8k8<T>(S, a, load(k, key < p.seqlen_kv));
      q += 8;
      k += 8;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int limit = p.seqlen_kv;
      if (p.causal) limit = min(limit, row + e / 2 * 8 + p.seqlen_kv - p.seqlen_q + 1);
      if (n + lane % 4 * 2 + e % 2 >= limit) S[e] = -INFINITY;
    }
  }
  // O += P V of the keys from n on.
  __device__ __forceinline__ void add(int n, const unsigned (&P)[2],
                                      float (&O_rmem)[TILE.head_dim / 2]) const {
    const Work work = read_work(smem, slot);
    const int lane = thread() % 32;
    const int key = n + lane % 4 * 2;
    const unsigned short* v =
        static_cast<const unsigned short*>(p.v) + work.batch * p.v_batch_stride +
        params.group.divide(work.head) * p.v_head_stride + key * p.v_row_stride + lane / 4;
#pragma unroll
    for (int d = 0; d < TILE.head_dim / 8; ++d) {
      auto load = [&](int i) -> unsigned {
        return key + i < p.seqlen_kv && d * 8 < p.head_dim ? v[i * p.v_row_stride + d * 8] : 0;
      };
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = O_rmem[4 * d + i];
      ptx::mma_m16n8k8<T>(x, P, load(0) | load(1) << 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) O_rmem[4 * d + i] = x[i];
      ptx::pmevent();  // or ptxas fetches far ahead, into registers that are not there
    }
  }
  // O, with its maximum and sums.
  __device__ __forceinline__ void run(Softmax<TILE>& softmax,
                                      float (&O_rmem)[TILE.head_dim / 2]) const {
    int n_end = p.seqlen_kv;
    if (p.causal) {
      n_end = min(n_end, first_row(read_work(smem, slot), thread()) + 16 + n_end - p.seqlen_q);
    }
    // Told that a warp agrees on it: ptxas would take the whole kernel for divergent.
    n_end = __shfl_sync(0xffffffff, n_end, 0);
    float S[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.minus_max[half] = NO_MAXIMUM;
      softmax.row_sum[half] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < TILE.head_dim / 2; ++i) O_rmem[i] = 0.f;
#pragma unroll 1
    for (int n = 0; n < n_end; n += 8) {
      scores(n, S);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        softmax.update_max(fmaxf(S[2 * half], S[2 * half + 1]), half);
      }
    }
#pragma unroll 1
    for (int n = 0; n < n_end; n += 8) {
      scores(n, S);
      unsigned P[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          x[i] = ptx::ex2_approx_ftz(
              fmaf(S[2 * half + i], params.scale_log2, softmax.minus_max[half]));
          softmax.row_sum[half] += x[i];
        }
        P[half] = ptx::cvt_rn_x2<T>(x[0], x[1]);
      }
      add(n, P, O_rmem);
    }
  }
};

}  // namespace flashmoe::sm90
