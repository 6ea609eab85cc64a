// FlashAttention-2's forward (arXiv:2307.08691) with mma.sync, cp.async and swizzled shared memory:
// every NVIDIA GPU from Ampere on. One thread block computes BLOCK_M rows of one (batch, head);
// each warp owns WARP_M of them from Q to O, so only K and V are shared between warps.
#pragma once

#include "common/dropout.h"
#include "common/params.h"
#include "common/swizzle.cuh"
#include "forward/sm80/tile.h"
#include "ptx/cp_async.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"

namespace flashmoe::sm80 {

// Rows [0, valid_rows) of a tile from global to shared memory, zeros beyond and past head_dim.
// ALIGNED needs 16-byte aligned rows; otherwise elements are loaded one by one, synchronously.
template <typename Tile, int ROWS, bool ALIGNED, bool CHECK_ROWS, typename T>
__device__ __forceinline__ void load_tile(unsigned dst_smem, const T* src, long long row_stride,
                                          int valid_rows, int head_dim) {
  constexpr int CHUNKS = Tile::HEAD_DIM / 8;
  constexpr int ROWS_PER_PASS = Tile::NUM_THREADS / CHUNKS;
  const int row0 = threadIdx.x / CHUNKS;
  const int chunk = threadIdx.x % CHUNKS;
  if (Tile::NUM_THREADS % CHUNKS != 0 && row0 >= ROWS_PER_PASS) return;
  const bool column_valid = chunk * 8 < head_dim;
  src += row0 * row_stride + chunk * 8;
#pragma unroll
  for (int pass = 0; pass < (ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS; ++pass) {
    const int row = row0 + pass * ROWS_PER_PASS;
    if (ROWS % ROWS_PER_PASS != 0 && row >= ROWS) return;
    const bool valid = column_valid && (!CHECK_ROWS || row < valid_rows);
    const unsigned dst = dst_smem + swizzle<Tile::HEAD_DIM>(row, chunk);
    const T* row_src = src + pass * ROWS_PER_PASS * row_stride;
    if constexpr (ALIGNED) {
      ptx::cp_async_cg_16_zfill(dst, row_src, valid);
    } else {
      unsigned packed[4] = {0, 0, 0, 0};
      if (valid) {
        const unsigned short* bits = reinterpret_cast<const unsigned short*>(row_src);
#pragma unroll
        for (int i = 0; i < 4; ++i) packed[i] = bits[2 * i] | (unsigned(bits[2 * i + 1]) << 16);
      }
      ptx::st_shared_v4(dst, make_int4(packed[0], packed[1], packed[2], packed[3]));
    }
  }
}

template <bool VALUE>
struct BoolConstant {
  static constexpr bool value = VALUE;
};

// -inf would make exp2(-inf - -inf) NaN in a row that has seen no key yet.
__device__ __forceinline__ float finite_max(float row_max) {
  return row_max == -INFINITY ? 0.f : row_max;
}

// GENERAL kernels have windows and terms, which they decide at run time; the others compute full
// and causal attention.
template <typename T, typename Tile, bool ALIGNED, bool GENERAL>
__global__ void __launch_bounds__(Tile::NUM_THREADS, Tile::MIN_BLOCKS_PER_SM)
    attention_forward_kernel(const __grid_constant__ AttentionParams params, int num_m_blocks) {
  constexpr int HEAD_DIM = Tile::HEAD_DIM;
  constexpr int BLOCK_M = Tile::BLOCK_M;
  constexpr int BLOCK_N = Tile::BLOCK_N;
  constexpr int NUM_STAGES = Tile::NUM_STAGES;
  constexpr int M_TILES = Tile::M_TILES;
  constexpr int N_TILES = BLOCK_N / 8;
  constexpr int D_TILES = HEAD_DIM / 8;
  constexpr float LOG2_E = 1.4426950408889634f;
  constexpr float LN_2 = 0.6931471805599453f;
  // O and the row sum are rescaled only when a row's maximum grew by more than this (log2 units);
  // until then P may exceed 1, by at most 2^8, which float16 and the float32 sums hold easily.
  constexpr float LAZY_RESCALE = 8.f;
  // Taken from the exponents of bfloat16's P: O stays finite over 2^16 keys of the largest values,
  // and the smallest values survive.
  constexpr float MAX_SHIFT = ptx::IS_BFLOAT16<T> ? 16.f : 0.f;
  // From here on the rounding of a row's scaled maximum can exceed the exponent's range.
  constexpr float COARSE_MAXIMUM = 0x1p24f;

  extern __shared__ __align__(128) unsigned char smem[];
  const unsigned Q_smem = ptx::smem_address(smem);
  const unsigned K_smem = Q_smem + 2 * Tile::Q_ELEMENTS;
  const unsigned V_smem = K_smem + 2 * NUM_STAGES * Tile::KV_ELEMENTS;

  // Longest work first: the last block of rows has the most keys when causal. Blocks of one head
  // are neighbours, so that K and V are read from L2.
  const int m_block = num_m_blocks - 1 - int(blockIdx.x % unsigned(num_m_blocks));
  const int batch_head = int(blockIdx.x / unsigned(num_m_blocks));
  const int batch = batch_head / params.heads_q;
  const int head = batch_head % params.heads_q;
  const int head_kv = head / (params.heads_q / params.heads_kv);
  const int m_start = m_block * BLOCK_M;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  const T* Q = static_cast<const T*>(params.q) + batch * params.q_batch_stride +
               head * params.q_head_stride + m_start * params.q_row_stride;
  const T* K = static_cast<const T*>(params.k) + batch * params.k_batch_stride +
               head_kv * params.k_head_stride;
  const T* V = static_cast<const T*>(params.v) + batch * params.v_batch_stride +
               head_kv * params.v_head_stride;

  const int diagonal = params.seqlen_kv - params.seqlen_q;
  const auto keys_of_rows = [&](int begin, int end) -> KeyRange {
    if constexpr (GENERAL) {
      return visible(params.mask, begin, end, params.seqlen_q, params.seqlen_kv);
    }
    // The end may be below 0.
    const int causal_end = params.mask.right >= 0 ? end + diagonal : params.seqlen_kv;
    return {0, min(params.seqlen_kv, causal_end)};
  };
  // Tiles [n_begin, n_end) hold keys that some row of this block sees; of these, all rows see all
  // of [n_unmasked_begin, n_unmasked_end).
  const int m_end = GENERAL ? min(m_start + BLOCK_M, params.seqlen_q) : m_start + BLOCK_M;
  const KeyRange keys = keys_of_rows(m_start, m_end);
  const int n_begin = keys.begin / BLOCK_N;
  const int n_end = keys.begin < keys.end ? (keys.end + BLOCK_N - 1) / BLOCK_N : n_begin;
  const int n_unmasked_end = max(keys_of_rows(m_start, m_start + 1).end, 0) / BLOCK_N;
  const int n_unmasked_begin = (keys_of_rows(m_end - 1, m_end).begin + BLOCK_N - 1) / BLOCK_N;

  float O_rmem[M_TILES][D_TILES][4] = {};
  float row_max[M_TILES][2];  // of the raw scores, as of the last rescaling
  float row_sum[M_TILES][2];  // this thread's columns only, until the epilogue
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    row_max[m][0] = row_max[m][1] = -INFINITY;
    row_sum[m][0] = row_sum[m][1] = 0.f;
  }

  auto load_K = [&](int n_tile) {
    const int stage = (n_end - 1 - n_tile) % NUM_STAGES;
    const unsigned dst = K_smem + stage * 2 * Tile::KV_ELEMENTS;
    const int n_start = n_tile * BLOCK_N;
    load_tile<Tile, BLOCK_N, ALIGNED, true>(dst, K + n_start * params.k_row_stride,
                                            params.k_row_stride, params.seqlen_kv - n_start,
                                            params.head_dim);
  };
  auto load_V = [&](int n_tile) {
    const int stage = (n_end - 1 - n_tile) % NUM_STAGES;
    const unsigned dst = V_smem + stage * 2 * Tile::KV_ELEMENTS;
    const int n_start = n_tile * BLOCK_N;
    load_tile<Tile, BLOCK_N, ALIGNED, true>(dst, V + n_start * params.v_row_stride,
                                            params.v_row_stride, params.seqlen_kv - n_start,
                                            params.head_dim);
  };

  // Groups are committed in the order Q+K K' V .. : K of tile j, then V of tile j, tiles from the
  // last to the first. A group is committed also when there is nothing left to load, so that
  // "at most 2 * (NUM_STAGES - 1) pending" always means the one needed now has arrived.
  load_tile<Tile, BLOCK_M, ALIGNED, true>(Q_smem, Q, params.q_row_stride, params.seqlen_q - m_start,
                                          params.head_dim);
#pragma unroll
  for (int stage = 0; stage < NUM_STAGES; ++stage) {
    if (stage < n_end - n_begin) load_K(n_end - 1 - stage);
    ptx::cp_async_commit_group();
    if (stage + 1 < NUM_STAGES) {
      if (stage < n_end - n_begin) load_V(n_end - 1 - stage);
      ptx::cp_async_commit_group();
    }
  }

  // ldmatrix row and chunk of this lane. A operand and V: matrices (rows 0-7, 8-15) x (chunk 0, 1)
  // with rows fastest; K: chunks fastest, so that a register pair is one 8-key B fragment.
  const int row_fast = lane & 15, row_fast_chunk = lane >> 4;
  const int chunk_fast = (lane & 7) + ((lane >> 4) << 3), chunk_fast_chunk = (lane >> 3) & 1;

  auto load_Q_fragment = [&](unsigned (&fragment)[4], int m, int k) {
    const int row = warp * Tile::WARP_M + m * 16 + row_fast;
    ptx::ldmatrix_x4(fragment, Q_smem + swizzle<HEAD_DIM>(row, k * 2 + row_fast_chunk));
  };
  unsigned Q_rmem[Tile::Q_IN_REGISTERS ? M_TILES : 1][Tile::Q_IN_REGISTERS ? HEAD_DIM / 16 : 1][4];
  if constexpr (Tile::Q_IN_REGISTERS) {
    ptx::cp_async_wait_group<2 * (NUM_STAGES - 1)>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; ++k) load_Q_fragment(Q_rmem[m][k], m, k);
    }
  }

  // With softcap, S is rewritten to what that scales.
  const Terms& terms = params.terms;
  const bool capped = GENERAL && terms.softcap > 0;
  const float scale = capped ? terms.softcap : params.softmax_scale, scale_log2 = scale * LOG2_E;
  float slope = 0.f;  // in units of S
  if (GENERAL && terms.alibi_slopes != nullptr) {
    slope = terms.alibi_slopes[batch * terms.alibi_batch_stride + head] / scale;
  }
  const bool drops = GENERAL && terms.rng_state != nullptr;
  int stage = 0;
  bool coarse = false;  // whether the maximum of a row of this warp is

  auto step = [&](int n_tile, auto masked) {
    // K of this tile has arrived, and every warp is done with V of the previous one.
    ptx::cp_async_wait_group<2 * (NUM_STAGES - 1)>();
    __syncthreads();
    if (n_tile - (NUM_STAGES - 1) >= n_begin) load_V(n_tile - (NUM_STAGES - 1));
    ptx::cp_async_commit_group();

    float S_rmem[M_TILES][N_TILES][4] = {};
    const unsigned K_stage = K_smem + stage * 2 * Tile::KV_ELEMENTS;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
      unsigned Q_step[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        if constexpr (Tile::Q_IN_REGISTERS) {
#pragma unroll
          for (int i = 0; i < 4; ++i) Q_step[m][i] = Q_rmem[m][k][i];
        } else {
          load_Q_fragment(Q_step[m], m, k);
        }
      }
#pragma unroll
      for (int n = 0; n < N_TILES; n += 2) {
        unsigned K_rmem[4];
        ptx::ldmatrix_x4(K_rmem,
                         K_stage + swizzle<HEAD_DIM>(n * 8 + chunk_fast, k * 2 + chunk_fast_chunk));
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          ptx::mma_m16n8k16<T>(S_rmem[m][n], Q_step[m], K_rmem[0], K_rmem[1]);
          ptx::mma_m16n8k16<T>(S_rmem[m][n + 1], Q_step[m], K_rmem[2], K_rmem[3]);
        }
      }
    }

    if (capped) {
      const float cap_scale = params.softmax_scale / terms.softcap;
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
          for (float& s : S_rmem[m][n]) s = ptx::tanh_approx(s * cap_scale);
        }
      }
    }
    if (GENERAL && slope != 0.f) {
      const int row = m_start + warp * Tile::WARP_M + lane / 4;
      const int level = row + diagonal - n_tile * BLOCK_N - (lane & 3) * 2;
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float distance = float(level + m * 16 + i / 2 * 8) - (n * 8 + i % 2);
            S_rmem[m][n][i] = fmaf(-slope, fabsf(distance), S_rmem[m][n][i]);
          }
        }
      }
    }
    if constexpr (decltype(masked)::value) {
      const int column0 = n_tile * BLOCK_N + (lane & 3) * 2;
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        const int row = m_start + warp * Tile::WARP_M + m * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row_i = row + (i / 2) * 8;
          const KeyRange seen = keys_of_rows(row_i, row_i + 1);
          const int column_i = column0 + (i & 1) - seen.begin;
#pragma unroll
          for (int n = 0; n < N_TILES; ++n) {
            // Both limits at once: what lies before the first is a large unsigned number.
            const bool hidden = GENERAL
                                    ? unsigned(column_i + n * 8) >= unsigned(seen.end - seen.begin)
                                    : column_i + n * 8 >= seen.end;
            if (hidden) S_rmem[m][n][i] = -INFINITY;
          }
        }
      }
    }

    bool grew = false;
    float tile_max[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = fmaxf(S_rmem[m][0][2 * half], S_rmem[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < N_TILES; ++n) {
          x = fmaxf(x, fmaxf(S_rmem[m][n][2 * half], S_rmem[m][n][2 * half + 1]));
        }
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
        tile_max[m][half] = x;
        grew |= (x - row_max[m][half]) * scale_log2 > LAZY_RESCALE;
      }
    }
    if (__any_sync(0xffffffff, grew)) {
      float largest = 0.f;
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float new_max = fmaxf(row_max[m][half], tile_max[m][half]);
          const float rescale =
              ptx::ex2_approx_ftz((row_max[m][half] - finite_max(new_max)) * scale_log2);
          row_max[m][half] = new_max;
          row_sum[m][half] *= rescale;
          largest = fmaxf(largest, fabsf(finite_max(new_max)));
#pragma unroll
          for (int d = 0; d < D_TILES; ++d) {
            O_rmem[m][d][2 * half] *= rescale;
            O_rmem[m][d][2 * half + 1] *= rescale;
          }
        }
      }
      coarse = __any_sync(0xffffffff, largest * scale_log2 >= COARSE_MAXIMUM);
    }

    // P = exp2(S - max), packed to 16 bit: the accumulator layout of two neighbouring S tiles is
    // the A operand layout of one k step of P V.
    unsigned P_rmem[M_TILES][BLOCK_N / 16][4];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float max_log2 = fmaf(finite_max(row_max[m][half]), scale_log2, MAX_SHIFT);
        if (coarse) {
          // The difference is scaled, not the scores: that would round by their own magnitude.
          const float max = finite_max(row_max[m][half]);
#pragma unroll
          for (int n = 0; n < N_TILES; ++n) {
            S_rmem[m][n][2 * half] -= max;
            S_rmem[m][n][2 * half + 1] -= max;
          }
          max_log2 = MAX_SHIFT;
        }
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
          const float p0 = ptx::ex2_approx_ftz(S_rmem[m][n][2 * half] * scale_log2 - max_log2);
          const float p1 = ptx::ex2_approx_ftz(S_rmem[m][n][2 * half + 1] * scale_log2 - max_log2);
          row_sum[m][half] += p0 + p1;
          P_rmem[m][n / 2][(n & 1) * 2 + half] = ptx::cvt_rn_x2<T>(p0, p1);
        }
      }
    }

    if (drops) {
      const Dropout dropout = Dropout::of(terms, batch, head);  // else it would take registers
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        const int row = m_start + warp * Tile::WARP_M + m * 16 + lane / 4;
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; ++k) {
          const Philox bits = dropout.bits(row, n_tile * BLOCK_N + k * 16 + (lane & 3) * 2);
#pragma unroll
          for (int i = 0; i < 4; ++i) P_rmem[m][k][i] &= dropout.kept_halves(bits.x[i]);
        }
      }
    }

    // V of this tile has arrived, and every warp is done with K of this tile.
    ptx::cp_async_wait_group<2 * (NUM_STAGES - 1)>();
    __syncthreads();
    if (n_tile - NUM_STAGES >= n_begin) load_K(n_tile - NUM_STAGES);
    ptx::cp_async_commit_group();

    const unsigned V_stage = V_smem + stage * 2 * Tile::KV_ELEMENTS;
#pragma unroll
    for (int k = 0; k < BLOCK_N / 16; ++k) {
#pragma unroll
      for (int d = 0; d < D_TILES; d += 2) {
        unsigned V_rmem[4];
        ptx::ldmatrix_x4_trans(V_rmem,
                               V_stage + swizzle<HEAD_DIM>(k * 16 + row_fast, d + row_fast_chunk));
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          ptx::mma_m16n8k16<T>(O_rmem[m][d], P_rmem[m][k], V_rmem[0], V_rmem[1]);
          ptx::mma_m16n8k16<T>(O_rmem[m][d + 1], P_rmem[m][k], V_rmem[2], V_rmem[3]);
        }
      }
    }
    stage = stage + 1 == NUM_STAGES ? 0 : stage + 1;
  };

  int n_tile = n_end - 1;
  for (; n_tile >= n_unmasked_end; --n_tile) step(n_tile, BoolConstant<true>{});
  for (; n_tile >= n_unmasked_begin; --n_tile) step(n_tile, BoolConstant<false>{});
  if constexpr (GENERAL) {
    for (; n_tile >= n_begin; --n_tile) step(n_tile, BoolConstant<true>{});
  }

  // Epilogue: each warp passes its own rows of O through its own rows of Q_smem, which no other
  // warp reads, to write whole 16-byte chunks.
  ptx::cp_async_wait_group<0>();
  if (n_begin == n_end) __syncthreads();  // other warps' copies of Q may still be landing here
  float* lse = params.softmax_lse + static_cast<long long>(batch_head) * params.seqlen_q;
  const float sink = GENERAL && terms.sinks != nullptr ? terms.sinks[head] : -INFINITY;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[m][half];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      const bool empty = row_max[m][half] == -INFINITY && sum == 0.f;
      float inverse = empty ? 0.f : 1.f / sum;
      float row_lse = -INFINITY;
      if (!empty) {
        row_lse = row_max[m][half] * scale + __log2f(sum * (1 << int(MAX_SHIFT))) * LN_2;
      }
      if (GENERAL && fmaxf(row_lse, sink) > -INFINITY) {
        // The sink takes its share of the sum; O is of the keys' share.
        const float largest = fmaxf(row_lse, sink);
        const float share = ptx::ex2_approx_ftz((row_lse - largest) * LOG2_E);
        const float both = share + ptx::ex2_approx_ftz((sink - largest) * LOG2_E);
        inverse *= share / both;
        row_lse = largest + __log2f(both) * LN_2;
      }
      if (drops) inverse *= dropout_scale(terms.dropout_limit);
      const int row = warp * Tile::WARP_M + m * 16 + half * 8 + lane / 4;
      if ((lane & 3) == 0 && m_start + row < params.seqlen_q) lse[m_start + row] = row_lse;
#pragma unroll
      for (int d = 0; d < D_TILES; ++d) {
        const unsigned packed = ptx::cvt_rn_x2<T>(O_rmem[m][d][2 * half] * inverse,
                                                  O_rmem[m][d][2 * half + 1] * inverse);
        ptx::st_shared_b32(Q_smem + swizzle<HEAD_DIM>(row, d) + (lane & 3) * 4, packed);
      }
    }
  }
  __syncwarp();
  constexpr int CHUNKS = HEAD_DIM / 8;
  T* O = static_cast<T*>(params.out) + batch * params.o_batch_stride + head * params.o_head_stride;
  for (int i = lane; i < Tile::WARP_M * CHUNKS; i += 32) {
    const int row = warp * Tile::WARP_M + i / CHUNKS;
    const int chunk = i % CHUNKS;
    if (m_start + row < params.seqlen_q && chunk * 8 < params.head_dim) {
      *reinterpret_cast<int4*>(O + (m_start + row) * params.o_row_stride + chunk * 8) =
          ptx::ld_shared_v4(Q_smem + swizzle<HEAD_DIM>(row, chunk));
    }
  }
}

}  // namespace flashmoe::sm80
