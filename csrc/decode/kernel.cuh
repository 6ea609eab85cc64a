// Attention of few queries over many keys: bound by memory, so keys are split over thread blocks
// (Flash-Decoding, arXiv:2311.01282), the query heads that share a head of k are rows of one tile,
// and loads run ahead by rings of cp.async. mma.sync, so every NVIDIA GPU from Ampere on. It
// computes any mask, term and sequence (common/{mask,terms,sequence}.h), all decided at run time.
#pragma once

#include "common/swizzle.cuh"
#include "decode/merge.cuh"
#include "decode/split.h"
#include "decode/tile.h"
#include "ptx/cp_async.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"

namespace flashmoe::decoding {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// softcap * tanh(x / softcap), to 1e-6 * softcap; `slope` is 2 * log2(e) / softcap.
__device__ __forceinline__ float capped(float x, float softcap, float slope) {
  return softcap - 2 * softcap * ptx::rcp_approx_ftz(ptx::ex2_approx_ftz(x * slope) + 1);
}

// Of a row: what its weighted sum of O is multiplied with, and its softmax_lse. `total` is
// (maximum, sum); sink_log2 is -inf without a sink.
struct RowEnd {
  float scale, lse;

  __device__ __forceinline__ RowEnd(float2 total, float exponent, float sink_log2) {
    const float max_log2 = total.x * exponent;
    const float top = finite_max(fmaxf(max_log2, sink_log2));
    const float keys = ptx::ex2_approx_ftz(max_log2 - top);
    const float sum = total.y * keys + ptx::ex2_approx_ftz(sink_log2 - top);
    scale = sum == 0.f ? 0.f : keys / sum;
    lse = sum == 0.f ? -INFINITY : (top + __log2f(sum)) * LN_2;
  }
};

// PLAIN: for calls of which is_plain says so.
template <typename T, typename Tile, bool PLAIN>
__global__ void __launch_bounds__(Tile::NUM_THREADS, Tile::CTAS_PER_SM)
    attention_decode_kernel(const __grid_constant__ DecodeParams params) {
  constexpr int HEAD_DIM = Tile::HEAD_DIM;
  constexpr int WARP_N = Tile::WARP_N;
  constexpr int NUM_WARPS = Tile::NUM_WARPS;
  constexpr int NUM_STAGES = Tile::NUM_STAGES;
  constexpr int M_TILES = Tile::M_TILES;
  constexpr int N_TILES = WARP_N / 8;
  constexpr int D_TILES = HEAD_DIM / 8;
  // Lanes that fetch one row of K or V together: 128 bytes of it at a time, or 64.
  constexpr int ROW_LANES = HEAD_DIM % 64 == 0 ? 8 : 4;
  constexpr int ROWS_PER_PASS = 32 / ROW_LANES;
  // As in forward/sm80: O and the row sum are rescaled when a maximum grew by more than 2^8, and
  // bfloat16's P is smaller by 2^16, so that O stays finite.
  constexpr float LAZY_RESCALE = 8.f;
  constexpr float MAX_SHIFT = ptx::IS_BFLOAT16<T> ? 16.f : 0.f;

  extern __shared__ __align__(128) unsigned char smem[];
  const AttentionParams& p = params.attention;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const unsigned Q_smem = ptx::smem_address(smem);
  const unsigned ring_smem = Q_smem + Tile::FRONT_BYTES + warp * Tile::RING_BYTES;

  // Heads are neighbours: what thread blocks read at a time lies side by side.
  const int group = params.group.divisor, m_blocks = params.m_blocks.divisor;
  const int index = static_cast<int>(blockIdx.x);
  const int past_head = params.heads_kv.divide(index), head_kv = index - past_head * p.heads_kv;
  const int past_block = params.m_blocks.divide(past_head);
  const int m_block = past_head - past_block * m_blocks;
  const int batch = params.splits.divide(past_block);
  const int part = past_block - batch * params.num_splits;
  const long long tree =
      (static_cast<long long>(batch) * m_blocks + m_block) * p.heads_kv + head_kv;

  const Sequences& s = p.sequences;
  const Sequence sequence = PLAIN ? Sequence{0, 0, p.seqlen_q, p.seqlen_kv}
                                  : sequence_at(s, batch, p.seqlen_q, p.seqlen_kv);
  const int m_start = m_block * Tile::BLOCK_M;
  const int rows = min(Tile::BLOCK_M, sequence.seqlen_q * group - m_start);
  if (rows <= 0) return;
  const auto keys_of = [&](int first, int last) {
    const Mask mask{PLAIN ? -1 : p.mask.left, p.mask.right};
    return visible(mask, first, last + 1, sequence.seqlen_q, sequence.seqlen_kv);
  };

  // Positions are those of keys in their packed tensor, dense cache or pages. Of [begin, end),
  // which some row sees, all rows see [common_begin, common_end).
  const int first_query = params.group.divide(m_start);
  const int last_query = params.group.divide(m_start + rows - 1);
  const KeyRange keys = keys_of(first_query, last_query);
  const int begin = sequence.k_begin + keys.begin, end = sequence.k_begin + keys.end;
  const int common_begin = sequence.k_begin + keys_of(last_query, last_query).begin;
  const int common_end = sequence.k_begin + keys_of(first_query, first_query).end;
  // Steps begin at a multiple of 16, as pages do.
  const int origin = begin & ~15;
  const int steps = begin < end ? ceil_div(end - origin, Tile::BLOCK_N) : 0;
  const int even = params.splits.divide(steps + params.num_splits - 1);
  const int each = steps_each(steps, even, Tile::BLOCK_N, params.batch_invariant);
  const int step_begin = part * each;
  if (part > 0 && step_begin >= steps) return;
  const auto position_of = [&](int t) {  // of this warp's tile t
    return origin + ((step_begin + t) * NUM_WARPS + warp) * WARP_N;
  };
  int tiles = min(each, steps - step_begin);
  if (tiles > 0 && position_of(tiles - 1) >= end) --tiles;

  // Pages of a multiple of 16 keys are looked up once for 16 keys, by one lane for the next 32
  // times; others for each key.
  const bool paged = !PLAIN && s.block_table != nullptr;
  const bool by_key = paged && s.page_size % 16 != 0, by_16 = paged && !by_key;
  const int* table = paged ? s.block_table + batch * s.block_table_stride : nullptr;
  const auto page_of = [&](int page, bool exists) {
    return clamped(exists ? table[page] : 0, 0, s.num_pages - 1);
  };
  int fetched_page = 0, fetched_row = 0;
  const auto fetch_pages = [&](int first) {
    const int sixteen = first + lane;
    const int position = position_of(sixteen / (WARP_N / 16)) + sixteen % (WARP_N / 16) * 16;
    const int page = params.page_size.divide(position);
    fetched_page = page_of(page, position < end);
    fetched_row = position - page * s.page_size;
  };
  int kv_batch = batch;
  if (!PLAIN && s.cu_seqlens_k != nullptr) kv_batch = 0;
  if (!PLAIN && s.cache_batch_idx != nullptr) {
    kv_batch = clamped(s.cache_batch_idx[batch], 0, s.num_pages - 1);
  }

  [[maybe_unused]] const unsigned long long policy =
      PLAIN ? ptx::create_policy(params.evict_first) : 0;
  // Tile t of K or V of this warp to its ring, zeros for keys that no row sees; a group of its own,
  // also where there is nothing left to load.
  const auto load = [&](bool is_v, int t) {
    if (t >= tiles) return ptx::cp_async_commit_group();
    if (!is_v && by_16 && t * (WARP_N / 16) % 32 == 0) fetch_pages(t * (WARP_N / 16));
    const unsigned dst_smem = ring_smem + (t % NUM_STAGES * 2 + is_v) * Tile::KV_BYTES;
    const T* x = static_cast<const T*>(is_v ? p.v : p.k) +
                 head_kv * (is_v ? p.v_head_stride : p.k_head_stride);
    const long long batch_stride = is_v ? p.v_batch_stride : p.k_batch_stride;
    const long long row_stride = is_v ? p.v_row_stride : p.k_row_stride;
#pragma unroll
    for (int i = 0; i < WARP_N / 16; ++i) {
      const int position = position_of(t) + i * 16;
      int page = kv_batch, row = position;
      if (by_16) {
        page = __shfl_sync(0xffffffff, fetched_page, (t * (WARP_N / 16) + i) % 32);
        row = __shfl_sync(0xffffffff, fetched_row, (t * (WARP_N / 16) + i) % 32);
      }
      const T* src = x + page * batch_stride + row * row_stride;
#pragma unroll
      for (int pass = 0; pass < 16 / ROWS_PER_PASS; ++pass) {
        const int key = lane / ROW_LANES + pass * ROWS_PER_PASS;
        const bool seen = position + key >= begin && position + key < end;
        const T* row_src = src + key * row_stride;
        if (by_key) {
          const int its_page = params.page_size.divide(position + key);
          row_src = x + page_of(its_page, seen) * batch_stride +
                    (position + key - its_page * s.page_size) * row_stride;
        }
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 8 / ROW_LANES; ++c) {
          const int chunk = lane % ROW_LANES + c * ROW_LANES;
          const unsigned dst = dst_smem + swizzle<HEAD_DIM>(i * 16 + key, chunk);
          const bool exists = seen && chunk * 8 < p.head_dim;
          if constexpr (PLAIN) {
            ptx::cp_async_cg_16_zfill(dst, row_src + chunk * 8, exists, policy);
          } else {
            ptx::cp_async_cg_16_zfill(dst, row_src + chunk * 8, exists);
          }
        }
      }
    }
    ptx::cp_async_commit_group();
  };

  // Groups are committed in the order K V Q K V .. , so that "at most 2 * NUM_STAGES - 1 pending"
  // always means that the one needed now has arrived, once Q has. Loops that run once a thread
  // block stay loops: it would take longer to fetch their code than to run it.
  const bool packed = !PLAIN && s.cu_seqlens_q != nullptr;
  const long long q_first = packed ? sequence.q_begin * p.q_row_stride : batch * p.q_batch_stride;
#pragma unroll 1
  for (int group_index = 0; group_index <= 2 * NUM_STAGES; ++group_index) {
    if (group_index != 2) {
      const int n = group_index - (group_index > 2);
      load(n % 2 != 0, n / 2);
      continue;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::BLOCK_M * D_TILES; i += Tile::NUM_THREADS) {
      const int row = i / D_TILES, chunk = i % D_TILES;
      const int query = params.group.divide(m_start + row);
      const int head = head_kv * group + m_start + row - query * group;
      ptx::cp_async_cg_16_zfill(Q_smem + swizzle<HEAD_DIM>(row, chunk),
                                static_cast<const T*>(p.q) + q_first + query * p.q_row_stride +
                                    head * p.q_head_stride + chunk * 8,
                                row < rows && chunk * 8 < p.head_dim);
    }
    ptx::cp_async_commit_group();
  }
  const int parts = max(ceil_div(steps, each), 1);
  const TreeMemory<Tile> memory(params, tree);
  if (parts > 1) memory.begin(part, parts);

  // Of this lane's rows: the key that the query is level with, and the slope by head.
  const float* slopes = p.terms.alibi_slopes;
  int level[M_TILES][2];
  float slope[M_TILES][2], row_max[M_TILES][2], row_sum[M_TILES][2];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m_start + min(m * 16 + half * 8 + lane / 4, rows - 1);
      const int query = params.group.divide(row), head = head_kv * group + row - query * group;
      level[m][half] = query + sequence.seqlen_kv - sequence.seqlen_q;
      slope[m][half] = slopes == nullptr ? 0.f : slopes[batch * p.terms.alibi_batch_stride + head];
      row_max[m][half] = -INFINITY;
      row_sum[m][half] = 0.f;  // this lane's columns only, until the end
    }
  }
  float O_rmem[M_TILES][D_TILES][4] = {};

  // ldmatrix row and chunk of this lane, as in forward/sm80.
  const int row_fast = lane & 15, row_fast_chunk = lane >> 4;
  const int chunk_fast = (lane & 7) + ((lane >> 4) << 3), chunk_fast_chunk = (lane >> 3) & 1;
  const auto load_Q_fragment = [&](unsigned (&fragment)[4], int m, int k) {
    ptx::ldmatrix_x4(fragment,
                     Q_smem + swizzle<HEAD_DIM>(m * 16 + row_fast, k * 2 + row_fast_chunk));
  };
  ptx::cp_async_wait_group<2 * NUM_STAGES - 2>();
  __syncthreads();
  unsigned Q_rmem[Tile::Q_IN_REGISTERS ? M_TILES : 1][Tile::Q_IN_REGISTERS ? HEAD_DIM / 16 : 1][4];
  if constexpr (Tile::Q_IN_REGISTERS) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; ++k) load_Q_fragment(Q_rmem[m][k], m, k);
    }
  }

  // Without softcap and ALiBi scores are those of q k^T. Their differences are scaled, not they:
  // that would round them by their own magnitude.
  const bool changed = p.terms.softcap > 0 || slopes != nullptr;
  const float cap_slope = 2 * LOG2_E / p.terms.softcap;
  const float exponent = changed ? LOG2_E : p.softmax_scale * LOG2_E;

  for (int t = 0; t < tiles; ++t) {
    const int position = position_of(t);
    ptx::cp_async_wait_group<2 * NUM_STAGES - 1>();
    __syncwarp();
    float S_rmem[M_TILES][N_TILES][4] = {};
    const unsigned K_smem = ring_smem + t % NUM_STAGES * 2 * Tile::KV_BYTES;
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
                         K_smem + swizzle<HEAD_DIM>(n * 8 + chunk_fast, k * 2 + chunk_fast_chunk));
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          ptx::mma_m16n8k16<T>(S_rmem[m][n], Q_step[m], K_rmem[0], K_rmem[1]);
          ptx::mma_m16n8k16<T>(S_rmem[m][n + 1], Q_step[m], K_rmem[2], K_rmem[3]);
        }
      }
    }
    __syncwarp();
    load(false, t + NUM_STAGES);

    const int key0 = position - sequence.k_begin + (lane & 3) * 2;
    if (changed) {
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float x = S_rmem[m][n][i] * p.softmax_scale;
            if (p.terms.softcap > 0) x = capped(x, p.terms.softcap, cap_slope);
            const int distance = level[m][i / 2] - (key0 + n * 8 + (i & 1));
            S_rmem[m][n][i] = x - slope[m][i / 2] * fabsf(static_cast<float>(distance));
          }
        }
      }
    }
    if (position < common_begin || position + WARP_N > common_end) {
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int query = level[m][i / 2] - sequence.seqlen_kv + sequence.seqlen_q;
          const KeyRange seen = keys_of(query, query);
          const int column = key0 + (i & 1) - seen.begin;
#pragma unroll
          for (int n = 0; n < N_TILES; ++n) {
            // Both limits at once: what lies before the first is a large unsigned number.
            if (unsigned(column + n * 8) >= unsigned(seen.end - seen.begin)) {
              S_rmem[m][n][i] = -INFINITY;
            }
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
        float x = -INFINITY;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
          x = fmaxf(x, fmaxf(S_rmem[m][n][2 * half], S_rmem[m][n][2 * half + 1]));
        }
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
        tile_max[m][half] = x;
        grew |= (x - row_max[m][half]) * exponent > LAZY_RESCALE;
      }
    }
    if (__any_sync(0xffffffff, grew)) {
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float new_max = fmaxf(row_max[m][half], tile_max[m][half]);
          const float rescale =
              ptx::ex2_approx_ftz((row_max[m][half] - finite_max(new_max)) * exponent);
          row_max[m][half] = new_max;
          row_sum[m][half] *= rescale;
#pragma unroll
          for (int d = 0; d < D_TILES; ++d) {
            O_rmem[m][d][2 * half] *= rescale;
            O_rmem[m][d][2 * half + 1] *= rescale;
          }
        }
      }
    }

    unsigned P_rmem[M_TILES][WARP_N / 16][4];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float max = finite_max(row_max[m][half]);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
          const float* x = &S_rmem[m][n][2 * half];
          const float p0 = ptx::ex2_approx_ftz((x[0] - max) * exponent - MAX_SHIFT);
          const float p1 = ptx::ex2_approx_ftz((x[1] - max) * exponent - MAX_SHIFT);
          row_sum[m][half] += p0 + p1;
          P_rmem[m][n / 2][(n & 1) * 2 + half] = ptx::cvt_rn_x2<T>(p0, p1);
        }
      }
    }

    ptx::cp_async_wait_group<2 * NUM_STAGES - 1>();
    __syncwarp();
    const unsigned V_smem = K_smem + Tile::KV_BYTES;
#pragma unroll
    for (int k = 0; k < WARP_N / 16; ++k) {
#pragma unroll
      for (int d = 0; d < D_TILES; d += 2) {
        unsigned V_rmem[4];
        ptx::ldmatrix_x4_trans(V_rmem,
                               V_smem + swizzle<HEAD_DIM>(k * 16 + row_fast, d + row_fast_chunk));
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          ptx::mma_m16n8k16<T>(O_rmem[m][d], P_rmem[m][k], V_rmem[0], V_rmem[1]);
          ptx::mma_m16n8k16<T>(O_rmem[m][d + 1], P_rmem[m][k], V_rmem[2], V_rmem[3]);
        }
      }
    }
    __syncwarp();
    load(true, t + NUM_STAGES);
  }

  // Each warp's result to its own ring.
  ptx::cp_async_wait_group<0>();
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[m][half];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      const int row = m * 16 + half * 8 + lane / 4;
      if (row < rows) {
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
        const unsigned dst = ring_smem + row * Tile::OUT_STRIDE + (lane & 3) * 8;
#pragma unroll
        for (int d = 0; d < D_TILES; ++d) {
          ptx::st_shared_v2(dst + d * 32, {O_rmem[m][d][2 * half] * inverse,
                                           O_rmem[m][d][2 * half + 1] * inverse});
        }
        if ((lane & 3) == 0) {
          ptx::st_shared_v2(ring_smem + Tile::BLOCK_M * Tile::OUT_STRIDE + row * 8,
                            {row_max[m][half], sum * (1 << int(MAX_SHIFT))});
        }
      }
    }
  }
  __syncthreads();

  // One result of all of them: it is the row's end, or goes to the workspace.
  const Merger<Tile> merger{Q_smem, rows, exponent};
  const auto finish = [&](int row, int column, float4 sum, float2 total) {
    const int query = params.group.divide(m_start + row);
    const int head = head_kv * group + m_start + row - query * group;
    const float sink = p.terms.sinks == nullptr ? -INFINITY : p.terms.sinks[head] * LOG2_E;
    const RowEnd row_end(total, exponent, sink);
    T* out = static_cast<T*>(p.out) + head * p.o_head_stride +
             (packed ? (sequence.q_begin + query) * p.o_row_stride
                     : batch * p.o_batch_stride + query * p.o_row_stride);
    ptx::st_global_v2_if(column < p.head_dim, out + column,
                         ptx::cvt_rn_x2<T>(sum.x * row_end.scale, sum.y * row_end.scale),
                         ptx::cvt_rn_x2<T>(sum.z * row_end.scale, sum.w * row_end.scale));
    if (column == 0) {
      const long long lse_row =
          packed ? static_cast<long long>(head) * s.total_q + sequence.q_begin
                 : (static_cast<long long>(batch) * p.heads_q + head) * p.seqlen_q;
      p.softmax_lse[lse_row + query] = row_end.lse;
    }
  };
  // A result to the workspace, or, of all keys, to where the row ends.
  const auto put = [&](int result, bool is_last) {
    return [&, result, is_last](int row, int column, float4 sum, float2 total) {
      if (is_last) return finish(row, column, sum, total);
      const float inverse = total.y == 0.f ? 0.f : 1.f / total.y;
      // nvcc makes four stores of an assignment.
      ptx::st_global_v4_if(true, memory.out_of(result, row) + column,
                           __float_as_int(sum.x * inverse), __float_as_int(sum.y * inverse),
                           __float_as_int(sum.z * inverse), __float_as_int(sum.w * inverse));
      if (column == 0) *memory.stats_of(result, row) = total;
    };
  };
  const unsigned rings_smem = Q_smem + Tile::FRONT_BYTES;
  merger.weigh(NUM_WARPS, [&](int i, int row) {
    return ptx::ld_shared_v2(rings_smem + i * Tile::RING_BYTES + Tile::BLOCK_M * Tile::OUT_STRIDE +
                             row * 8);
  });
  const auto of_warp = [&](int i, int row, int column) {
    const int4 x =
        ptx::ld_shared_v4(rings_smem + i * Tile::RING_BYTES + row * Tile::OUT_STRIDE + column * 4);
    return float4{__int_as_float(x.x), __int_as_float(x.y), __int_as_float(x.z),
                  __int_as_float(x.w)};
  };
  merger.template sum<0>(NUM_WARPS, of_warp, put(part, parts == 1), nullptr);

  int count = parts, first_result = 0, own = part;
  unsigned long long* counters = memory.counters;
  while (count > 1) {
    const int node = node_of(own, count), first = first_result + node * MERGE_EACH;
    const int members = count <= MERGE_ALL ? count : min(MERGE_EACH, count - node * MERGE_EACH);
    if (!memory.last_of(counters + node, members, merger.flag_smem())) return;
    const auto of_part = [&](int i, int row, int column) {
      const float* out = memory.out_of(first, row) + column;
      return *reinterpret_cast<const float4*>(out + i * (memory.rows * HEAD_DIM));
    };
    // As many as registers hold are under way while the weights are.
    float4 ahead[merger.AHEAD] = {};
    merger.fetch(ahead, members, of_part);
    merger.weigh(members, [&](int i, int row) { return *memory.stats_of(first + i, row); });
    first_result += count;
    count = nodes_of(count);
    counters += count;
    own = node;
    merger.template sum<merger.AHEAD>(members, of_part, put(first_result + node, count == 1),
                                      ahead);
  }
}

}  // namespace flashmoe::decoding
