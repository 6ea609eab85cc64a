// Cuts the problem into tasks, one for each sequence and kv head, and hands them to the threads.
// Where these are few, their rows are shared out, and each part has sums of dK and dV of its own.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "backward/cpu/backward.h"
#include "backward/cpu/task.h"
#include "forward/cpu/host.h"

namespace flashmoe {
namespace {

constexpr long long MOST_FLOATS_OF_SUMS = 32 << 20;
// Of P that are kept for a block of rows.
constexpr long long MOST_WEIGHTS = 2 << 20, FEWEST_ROWS = 64;
// Keys whose sums are added up at a time.
constexpr int COMBINED_KEYS = 64;

const CpuBackwardKernel& kernel_of(CpuIsa isa) {
  check(isa >= CpuIsa::generic && isa <= detected_cpu_isa(), "isa must be one this CPU supports",
        static_cast<int>(isa));
#if defined(__x86_64__)
  if (isa == CpuIsa::avx512) return cpu_backward_avx512;
  if (isa == CpuIsa::avx2) return cpu_backward_avx2;
#endif
  return cpu_backward_generic;
}

struct BatchEntry {
  FoundSequence found;
  int batch;
};

struct Work {
  const BackwardParams& params;
  DType dtype;
  const CpuBackwardKernel& kernel;
  long long block_m;
  int block_n;
  std::vector<BatchEntry> sequences;  // those that have rows and keys
  int parts = 1;
  long long part_floats = 0;
  float* sums = nullptr;
  int key_blocks = 1;  // that are combined one by one
  std::atomic<long long> next_task{0};

  long long rows_of(const Sequence& sequence) const {
    const AttentionParams& p = params.attention;
    return static_cast<long long>(sequence.seqlen_q) * (p.heads_q / p.heads_kv);
  }
  long long pairs() const {
    return static_cast<long long>(sequences.size()) * params.attention.heads_kv;
  }

  // Of a (sequence, kv head) pair.
  BackwardTask task(long long pair, int part) {
    const BatchEntry& x = sequences[pair / params.attention.heads_kv];
    const int head = static_cast<int>(pair % params.attention.heads_kv);
    const CpuTask forward{
        x.batch,          head, 0, rows_of(x.found.sequence), x.found.sequence, x.found.kv_batch,
        x.found.is_masked};
    float* of_pair = sums == nullptr ? nullptr : sums + pair * parts * part_floats;
    return {forward, part, parts, of_pair};
  }
};

// Whoever runs it takes tasks until there are none, so the range given does not matter.
void work_until_done(long long, long long, void* context) {
  Work& work = *static_cast<Work*>(context);
  for (;;) {
    const long long index = work.next_task.fetch_add(1, std::memory_order_relaxed);
    if (index >= work.pairs() * work.parts) return;
    const BackwardTask task = work.task(index / work.parts, static_cast<int>(index % work.parts));
    float* scratch =
        thread_scratch(work.kernel.scratch_floats(work.params, task, work.block_m, work.block_n));
    work.kernel.run(work.params, work.dtype, task, work.block_m, work.block_n, scratch);
  }
}

void combine_until_done(long long, long long, void* context) {
  Work& work = *static_cast<Work*>(context);
  for (;;) {
    const long long index = work.next_task.fetch_add(1, std::memory_order_relaxed);
    if (index >= work.pairs() * work.key_blocks) return;
    const BackwardTask task = work.task(index / work.key_blocks, 0);
    const int begin = static_cast<int>(index % work.key_blocks) * COMBINED_KEYS;
    const int end = std::min(begin + COMBINED_KEYS, task.forward.sequence.seqlen_kv);
    if (begin < end) work.kernel.combine(work.params, work.dtype, task, begin, end);
  }
}

// Whether tasks write every row of dq, dk and dv.
bool covers_all(const AttentionParams& p) {
  return !has_lengths(p.sequences) && !is_padding(p) && p.seqlen_q > 0 && p.seqlen_kv > 0;
}

void clear(const BackwardParams& params, DType dtype) {
  const AttentionParams& p = params.attention;
  const size_t size = dtype == DType::float32 ? 4 : 2;
  const bool packed_q = p.sequences.cu_seqlens_q != nullptr;
  const bool packed_k = p.sequences.cu_seqlens_k != nullptr;
  const size_t rows_q = packed_q ? p.sequences.total_q : static_cast<size_t>(p.batch) * p.seqlen_q;
  const size_t rows_k = packed_k ? p.sequences.total_k : static_cast<size_t>(p.batch) * p.seqlen_kv;
  std::memset(params.dq, 0, rows_q * p.heads_q * p.head_dim * size);
  std::memset(params.dk, 0, rows_k * p.heads_kv * p.head_dim * size);
  std::memset(params.dv, 0, rows_k * p.heads_kv * p.head_dim_v * size);
}

}  // namespace

void bwd_cpu(const BackwardParams& params, DType dtype, int block_m, int block_n, CpuIsa isa,
             ParallelFor parallel_for, int num_threads) {
  const AttentionParams& p = params.attention;
  check_problem(p, dtype, block_m, block_n);
  const Sequences& s = p.sequences;
  check(s.block_table == nullptr && s.leftpad_k == nullptr && s.cache_batch_idx == nullptr,
        "pages, left padding and indices of batches must be null", 0);
  if (!covers_all(p)) clear(params, dtype);
  Work work{params, dtype, kernel_of(isa), block_m, block_n, {}, 1, 0, nullptr, 1};
  long long most_rows = 1;
  int most_keys = 1;
  for (int i = 0; i < p.batch; ++i) {
    const FoundSequence found = sequence_of(p, i);
    const long long rows = work.rows_of(found.sequence);
    if (rows == 0 || found.sequence.seqlen_kv == 0) continue;
    work.sequences.push_back({found, i});
    most_rows = std::max(most_rows, rows);
    most_keys = std::max(most_keys, found.sequence.seqlen_kv);
  }
  if (work.sequences.empty()) return;
  work.block_m = std::min<long long>(block_m, most_rows);
  work.block_m = std::min(work.block_m, std::max(MOST_WEIGHTS / most_keys, FEWEST_ROWS));
  work.block_n = std::min(block_n, most_keys);
  // The longest first, for what is left for the end to be small.
  std::stable_sort(work.sequences.begin(), work.sequences.end(),
                   [&](const BatchEntry& a, const BatchEntry& b) {
                     const auto cost = [&](const BatchEntry& x) {
                       return work.rows_of(x.found.sequence) * x.found.sequence.seqlen_kv;
                     };
                     return cost(a) > cost(b);
                   });
  work.part_floats = work.kernel.part_floats(params);
  const long long pairs = work.pairs();
  if (pairs < 2 * num_threads && pairs % num_threads != 0) {
    const long long blocks = (most_rows + work.block_m - 1) / work.block_m;
    const long long wanted = (2 * num_threads + pairs - 1) / pairs;
    const long long room = MOST_FLOATS_OF_SUMS / (pairs * work.part_floats);
    work.parts = static_cast<int>(std::max(std::min({wanted, blocks, room}), 1ll));
    if (work.parts > 1) work.sums = thread_scratch<1>(pairs * work.parts * work.part_floats);
  }
  const auto run = [&](ParallelRange body, long long tasks) {
    work.next_task = 0;
    parallel_for(0, std::clamp<long long>(num_threads, 1, tasks), 1, body, &work);
  };
  run(work_until_done, pairs * work.parts);
  if (work.parts == 1) return;
  work.key_blocks = (most_keys + COMBINED_KEYS - 1) / COMBINED_KEYS;
  run(combine_until_done, pairs * work.key_blocks);
}

}  // namespace flashmoe
