// Lists the blocks of a packed batch (common/schedule.h): one thread block, before the kernel.
#pragma once

#include "common/schedule.h"
#include "ptx/atom.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/ld_st.cuh"

namespace flashmoe::schedule {

constexpr int THREADS = SCHEDULE_THREADS, WARPS = THREADS / 32, CLASSES = SCHEDULE_CLASSES;
static_assert(WARPS == 32, "a warp adds up the sums of all warps");

__device__ __forceinline__ int add(int a, int b) { return min(a + b, MANY_BLOCKS); }

// The sum of x over the lanes up to this one.
__device__ __forceinline__ int warp_sum(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_sync(0xffffffff, x, max(lane - distance, 0));
    if (lane >= distance) x = add(x, before);
  }
  return x;
}

// Four to each power of two, the longest first.
__device__ __forceinline__ int class_of(const Sequence& s) {
  const unsigned rows = unsigned(s.seqlen_q) + unsigned(s.seqlen_kv);
  if (rows < 4) return CLASSES - 1 - int(rows);
  const int exponent = 31 - __clz(int(rows));
  return CLASSES - 1 - (exponent * 4 + int(rows >> (exponent - 2) & 3));
}

// One more of `mine`, whose count is at counts + 4 * mine: how many there were. -1 counts nothing.
// Lanes of one class, as in a batch of equal lengths, are counted together.
__device__ __forceinline__ int count_class(unsigned counts, int mine) {
  const int lane = threadIdx.x % 32;
  const int first = __shfl_sync(0xffffffff, mine, 0);
  if (__any_sync(0xffffffff, mine != first)) {
    return mine < 0 ? 0 : ptx::atom_shared_add(counts + 4 * mine, 1);
  }
  int before = 0;
  if (lane == 0 && mine >= 0) before = ptx::atom_shared_add(counts + 4 * mine, 32);
  return __shfl_sync(0xffffffff, before, 0) + lane;
}

// Writes a warp's part of a list: of each lane's sequence `count` blocks, from `first` on in the
// list, with room for `room`.
__device__ __forceinline__ void write_blocks(PackedBlock* list, int room, PackedBlock mine,
                                             int first, int count, int block_rows) {
  const int lane = threadIdx.x % 32;
  const int begin = __shfl_sync(0xffffffff, first, 0);
  const int end =
      min(add(__shfl_sync(0xffffffff, first, 31), __shfl_sync(0xffffffff, count, 31)), room);
  for (int base = begin; base < end; base += 32) {
    const int index = base + lane;
    int owner = 0;  // the last lane that does not begin behind it
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      if (__shfl_sync(0xffffffff, first, owner + step) <= index) owner += step;
    }
    const auto of_owner = [&](int x) { return __shfl_sync(0xffffffff, x, owner); };
    PackedBlock block;
    block.sequence = {of_owner(mine.sequence.q_begin), of_owner(mine.sequence.k_begin),
                      of_owner(mine.sequence.seqlen_q), of_owner(mine.sequence.seqlen_kv)};
    const int place = index - of_owner(first), blocks = of_owner(count);
    block.start = place * block_rows;
    block.batch = of_owner(mine.batch);
    block.first_block = of_owner(mine.first_block);
    block.unused = 0;
    if (index < end && place < blocks) list[index] = block;
  }
}

__device__ __forceinline__ void list_blocks(const ScheduleParams& params) {
  ptx::griddepcontrol_launch_dependents();
  extern __shared__ __align__(1024) unsigned char smem_raw[];
  const Schedule& out = params.schedule;
  const unsigned classes = ptx::smem_address(smem_raw), sums = classes + 4 * CLASSES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto sequence = [&](int index) {
    return sequence_at(params.sequences, index, params.seqlen_q, params.seqlen_kv);
  };
  // A place for each sequence, by its class.
  if (threadIdx.x < CLASSES) ptx::st_shared_b32(classes + 4 * threadIdx.x, 0);
  __syncthreads();
  for (int base = 0; base < params.batch; base += THREADS) {
    const int index = base + threadIdx.x;
    count_class(classes, index < params.batch ? class_of(sequence(index)) : -1);
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;
    for (int first = 0; first < CLASSES; first += 32) {
      const unsigned at = classes + 4 * (first + lane);
      const int mine = ptx::ld_shared_b32(at), sum = warp_sum(mine);
      ptx::st_shared_b32(at, before + sum - mine);
      before += __shfl_sync(0xffffffff, sum, 31);
    }
  }
  __syncthreads();
  for (int base = 0; base < params.batch; base += THREADS) {
    const int index = base + threadIdx.x;
    const bool there = index < params.batch;
    const Sequence mine = there ? sequence(index) : Sequence{};
    const int place = count_class(classes, there ? class_of(mine) : -1);
    if (there) out.sequences[place] = {mine, 0, index, 0, 0};
  }
  __syncthreads();
  // Then each one's blocks. Those that there is no room for, as where sequences overlap, and all
  // behind them, are left out.
  int queries = 0, keys = 0;
  for (int base = 0; base < params.batch; base += THREADS) {
    const int index = base + threadIdx.x;
    PackedBlock mine{};
    if (index < params.batch) mine = out.sequences[index];
    int num_q = (mine.sequence.seqlen_q + out.block_queries - 1) / out.block_queries, num_k = 0;
    if (out.keys != nullptr) {
      num_k = (mine.sequence.seqlen_kv + out.block_keys - 1) / out.block_keys;
    }
    const int sum_q = warp_sum(num_q), sum_k = warp_sum(num_k);
    if (lane == 31) {
      ptx::st_shared_b32(sums + 4 * warp, sum_q);
      ptx::st_shared_b32(sums + 4 * (WARPS + warp), sum_k);
    }
    __syncthreads();
    const int all_q = warp_sum(ptx::ld_shared_b32(sums + 4 * lane));
    const int all_k = warp_sum(ptx::ld_shared_b32(sums + 4 * (WARPS + lane)));
    // Before this sequence: those of earlier rounds, of earlier warps, of earlier lanes.
    const auto before = [&](int rounds, int all, int sum, int num) {
      const int warps = __shfl_sync(0xffffffff, all, max(warp - 1, 0));
      return add(add(rounds, warp > 0 ? warps : 0), sum - num);
    };
    const int first_q = before(queries, all_q, sum_q, num_q);
    const int first_k = before(keys, all_k, sum_k, num_k);
    if (add(first_q, num_q) > out.room_queries || add(first_k, num_k) > out.room_keys) {
      num_q = num_k = 0;
      if (first_q <= out.room_queries && first_k <= out.room_keys) {
        out.counts[0] = first_q, out.counts[1] = first_k;
      }
    }
    mine.first_block = first_q;
    write_blocks(out.queries, out.room_queries, mine, first_q, num_q, out.block_queries);
    if (out.keys != nullptr) {
      write_blocks(out.keys, out.room_keys, mine, first_k, num_k, out.block_keys);
    }
    queries = add(queries, __shfl_sync(0xffffffff, all_q, 31));
    keys = add(keys, __shfl_sync(0xffffffff, all_k, 31));
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    out.counts[2] = 0;
    if (queries <= out.room_queries && keys <= out.room_keys) {
      out.counts[0] = queries, out.counts[1] = keys;
    }
  }
}

}  // namespace flashmoe::schedule
