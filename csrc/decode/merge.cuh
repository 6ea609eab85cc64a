// Results of disjoint sets of keys become one: those of a thread block's warps in shared memory,
// then those of thread blocks through the workspace, in a tree whose nodes are the last to arrive.
// A result has for each row O, which its sum has divided, and (maximum, sum) of the exponentials.
#pragma once

#include "decode/split.h"
#include "ptx/atom.cuh"
#include "ptx/ld_st.cuh"
#include "ptx/mma.cuh"

namespace flashmoe::decoding {

// -inf would make exp2(-inf - -inf) NaN in a row that has seen no key yet.
__device__ __forceinline__ float finite_max(float row_max) {
  return row_max == -INFINITY ? 0.f : row_max;
}

// What the merges of a thread block share. `exponent` is what a difference of scores is multiplied
// with to become one of exponents of 2.
template <typename Tile>
struct Merger {
  static constexpr int COLUMNS = Tile::HEAD_DIM / 4;
  // Results of which a thread fetches O before it knows their weights, which saves one wait for L2.
  // Wider tiles have no registers left.
  static constexpr int AHEAD = Tile::BLOCK_M == 16 ? 16 : 1;

  unsigned smem;  // of MERGE_BYTES: the weights of each row, (maximum, sum) of each row, a flag
  int rows;
  float exponent;

  __device__ __forceinline__ unsigned weight_smem(int row, int i) const {
    return smem + (row * MERGE_ALL + i) * 4;
  }
  __device__ __forceinline__ unsigned total_smem(int row) const {
    return smem + Tile::BLOCK_M * MERGE_ALL * 4 + row * 8;
  }
  __device__ __forceinline__ unsigned flag_smem() const { return total_smem(Tile::BLOCK_M); }

  // The weights of `count` results: each one's sum, relative to the maximum of all. `stats` gives
  // (maximum, sum) of result i and a row. A warp takes a row, a lane a result.
  template <typename Stats>
  __device__ __forceinline__ void weigh(int count, Stats stats) const {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < rows; row += Tile::NUM_WARPS) {
      float max = -INFINITY, sum = 0.f;
      for (int i = lane; i < count; i += 32) max = fmaxf(max, stats(i, row).x);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
        max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, mask));
      }
      for (int i = lane; i < count; i += 32) {
        const float2 x = stats(i, row);
        const float weight = x.y * ptx::ex2_approx_ftz((x.x - finite_max(max)) * exponent);
        ptx::st_shared_b32(weight_smem(row, i), __float_as_int(weight));
        sum += weight;
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffff, sum, mask);
      if (lane == 0) ptx::st_shared_v2(total_smem(row), {max, sum});
    }
    __syncthreads();
  }

  // Of the first results what `sum` needs of this thread's first item. `values` as there.
  template <typename Values>
  __device__ __forceinline__ void fetch(float4 (&ahead)[AHEAD], int count, Values values) const {
    const int item = static_cast<int>(threadIdx.x);
    if (item >= rows * COLUMNS) return;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (i < count) ahead[i] = values(i, item / COLUMNS, item % COLUMNS * 4);
    }
  }

  // After `weigh`: hands `store` for each row and fourth column the weighted sum of O, four
  // columns of it, and (maximum, sum) of the row. `values` gives O of result i there, unless it was
  // fetched: all or none.
  template <int FETCHED, typename Values, typename Store>
  __device__ __forceinline__ void sum(int count, Values values, Store store,
                                      const float4* ahead) const {
    for (int item = threadIdx.x; item < rows * COLUMNS; item += Tile::NUM_THREADS) {
      const int row = item / COLUMNS, column = item % COLUMNS * 4;
      float4 sum{0.f, 0.f, 0.f, 0.f};
      const auto add = [&](int i, const float4& x) {
        const float weight = __int_as_float(ptx::ld_shared_b32(weight_smem(row, i)));
        sum.x += weight * x.x;
        sum.y += weight * x.y;
        sum.z += weight * x.z;
        sum.w += weight * x.w;
      };
      int first = 0;
      if (FETCHED > 0 && item == static_cast<int>(threadIdx.x)) {
#pragma unroll
        for (int i = 0; i < FETCHED; ++i) {
          if (i < count) add(i, ahead[i]);
        }
        first = FETCHED;
      }
#pragma unroll 8
      for (int i = first; i < count; ++i) add(i, values(i, row, column));
      store(row, column, sum, ptx::ld_shared_v2(total_smem(row)));
    }
  }
};

// One tree in the workspace, as a thread block sees it that is number `part` of `parts`.
template <typename Tile>
struct TreeMemory {
  unsigned long long* counters;
  float* out;     // [result][row][HEAD_DIM]
  float2* stats;  // [result][row]
  unsigned long long tag;
  int rows;

  __device__ __forceinline__ TreeMemory(const DecodeParams& params, long long tree)
      : tag(params.tag << COUNT_BITS) {
    const Workspace space(params.attention, Tile::BLOCK_M, Tile::HEAD_DIM, params.num_splits);
    auto* bytes = static_cast<unsigned char*>(params.workspace);
    rows = static_cast<int>(space.rows);
    counters = reinterpret_cast<unsigned long long*>(bytes) + tree * space.tree.groups;
    out = reinterpret_cast<float*>(bytes + space.out_offset()) +
          tree * space.tree.results * rows * Tile::HEAD_DIM;
    stats =
        reinterpret_cast<float2*>(bytes + space.stats_offset()) + tree * space.tree.results * rows;
  }

  __device__ __forceinline__ float* out_of(int result, int row) const {
    return out + static_cast<long long>(result * rows + row) * Tile::HEAD_DIM;
  }
  __device__ __forceinline__ float2* stats_of(int result, int row) const {
    return stats + result * rows + row;
  }

  // Workspaces hold anything, and to clear them first would take a launch of its own: whoever finds
  // a counter without this launch's tag begins it. What is left there by others has the tag by
  // chance, one in 2^52. The last to arrive clears it, because a graph launches the same tag again.
  // Thread i does this for level i, early, where the wait costs nothing.
  __device__ __forceinline__ void begin(int part, int parts) const {
    int level = 0;
    unsigned long long* first = counters;
    for (int count = parts; count > 1; ++level) {
      part = node_of(part, count);
      if (static_cast<int>(threadIdx.x) == level) {
        const unsigned long long found = ptx::ld_relaxed_gpu_b64(first + part);
        if (found >> COUNT_BITS != tag >> COUNT_BITS) {
          ptx::atom_relaxed_gpu_cas_b64(first + part, found, tag);
        }
      }
      count = nodes_of(count);
      first += count;
    }
  }

  // Whether the thread block is the last of `members` to arrive: of all its threads, which have
  // written a result, and may then read those of the others.
  __device__ __forceinline__ bool last_of(unsigned long long* counter, int members,
                                          unsigned flag_smem) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned long long before = ptx::atom_acq_rel_gpu_add_u64(counter, 1);
      const bool last = before == tag + members - 1;
      if (last) *counter = 0;
      ptx::st_shared_b32(flag_smem, last);
    }
    __syncthreads();
    return ptx::ld_shared_b32(flag_smem) != 0;
  }
};

}  // namespace flashmoe::decoding
