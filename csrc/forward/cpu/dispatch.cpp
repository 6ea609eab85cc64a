// Checks the problem, cuts it into tasks and hands them to the threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "forward/cpu/host.h"
#include "forward/cpu/task.h"

namespace flashmoe {
namespace {

constexpr const char* ISA_NAMES[] = {"generic", "avx2", "avx512"};

CpuIsa detect_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return CpuIsa::avx512;
  if (avx2) return CpuIsa::avx2;
#endif
  return CpuIsa::generic;
}

CpuIsa choose_cpu_isa() {
  const CpuIsa detected = detected_cpu_isa();
  const char* wanted = std::getenv("FLASHMOE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return detected;
  std::string allowed;
  for (int isa = 0; isa <= static_cast<int>(detected); ++isa) {
    if (std::string(wanted) == ISA_NAMES[isa]) return static_cast<CpuIsa>(isa);
    allowed += (isa ? ", " : "") + std::string(ISA_NAMES[isa]);
  }
  throw std::invalid_argument("FLASHMOE_CPU_ISA must be one of " + allowed +
                              " on this machine, got '" + wanted + "'");
}

const CpuKernel& kernel_of(CpuIsa isa) {
  check(isa >= CpuIsa::generic && isa <= detected_cpu_isa(), "isa must be one this CPU supports",
        static_cast<int>(isa));
#if defined(__x86_64__)
  if (isa == CpuIsa::avx512) return cpu_kernel_avx512;
  if (isa == CpuIsa::avx2) return cpu_kernel_avx2;
#endif
  return cpu_kernel_generic;
}

// The tasks of one sequence, of all its heads.
struct SequenceTasks {
  Sequence sequence;
  int batch, kv_batch;
  long long first_task, row_blocks;
  bool is_masked;
};

struct Work {
  const AttentionParams& params;
  DType dtype;
  const CpuKernel& kernel;
  long long block_m;
  int block_n;
  long long tasks;
  std::vector<SequenceTasks> sequences;  // empty where all are alike
  std::atomic<long long> next_task{0};

  CpuTask task(long long index) const {
    if (sequences.empty()) {
      const Sequence dense{0, 0, params.seqlen_q, params.seqlen_kv};
      CpuTask task = task_of(dense, params.batch, index, tasks / params.batch / params.heads_kv);
      task.is_masked = params.terms.attn_mask.is_given();
      return task;
    }
    const auto after = [](long long task, const SequenceTasks& x) { return task < x.first_task; };
    const SequenceTasks& found =
        *(std::upper_bound(sequences.begin(), sequences.end(), index, after) - 1);
    CpuTask task = task_of(found.sequence, 1, index - found.first_task, found.row_blocks);
    task.batch = found.batch;
    task.kv_batch = found.kv_batch;
    task.is_masked = found.is_masked;
    return task;
  }

  // Of `batch` sequences alike. With one limit, blocks cost more the later their rows (causal) or
  // the earlier: all heads' longest blocks first, so that what is left for the end is small. With
  // none or both, nearly all cost the same: all blocks of a head in a row, for its keys to stay in
  // the cache.
  CpuTask task_of(const Sequence& sequence, int batch, long long index,
                  long long row_blocks) const {
    const bool left = params.mask.left >= 0, right = params.mask.right >= 0;
    const bool longest_first = left != right;
    const long long heads = static_cast<long long>(batch) * params.heads_kv;
    const long long head = longest_first ? index % heads : index / row_blocks;
    long long block = longest_first ? index / heads : index % row_blocks;
    if (longest_first && right) block = row_blocks - 1 - block;
    const long long begin = block * block_m;
    const int of_batch = static_cast<int>(head / params.heads_kv);
    return {of_batch, static_cast<int>(head % params.heads_kv),
            begin,    std::min(begin + block_m, rows_of(sequence)),
            sequence, of_batch,
            false};
  }

  long long rows_of(const Sequence& sequence) const {
    return static_cast<long long>(sequence.seqlen_q) * (params.heads_q / params.heads_kv);
  }

  // Sets block_m, block_n, tasks and sequences of a call whose sequences differ.
  void list_sequences() {
    long long most_rows = 1;
    int most_keys = 1;
    for (int i = 0; i < params.batch; ++i) {
      const auto [found, kv_batch, is_masked] = sequence_of(params, i);
      if (rows_of(found) == 0) continue;
      sequences.push_back({found, i, kv_batch, 0, 0, is_masked});
      most_rows = std::max(most_rows, rows_of(found));
      most_keys = std::max(most_keys, found.seqlen_kv);
    }
    block_m = std::min(block_m, most_rows);
    block_n = std::min(block_n, most_keys);
    // The longest tasks first, for what is left for the end to be small.
    const auto cost = [&](const SequenceTasks& x) {
      return std::min(block_m, rows_of(x.sequence)) * x.sequence.seqlen_kv;
    };
    const auto longer = [&](const SequenceTasks& a, const SequenceTasks& b) {
      return cost(a) > cost(b);
    };
    std::stable_sort(sequences.begin(), sequences.end(), longer);
    tasks = 0;
    for (SequenceTasks& x : sequences) {
      x.first_task = tasks;
      x.row_blocks = (rows_of(x.sequence) + block_m - 1) / block_m;
      tasks += x.row_blocks * params.heads_kv;
    }
  }
};

// What rows of a packed q that are in no sequence get: out 0 and softmax_lse -inf.
void clear_rows(const AttentionParams& params, DType dtype, int begin, int end) {
  const size_t size = dtype == DType::float32 ? 4 : 2;
  for (long long row = begin; row < end; ++row) {
    for (long long head = 0; head < params.heads_q; ++head) {
      const long long offset = row * params.o_row_stride + head * params.o_head_stride;
      std::memset(static_cast<char*>(params.out) + offset * size, 0, params.head_dim_v * size);
      params.softmax_lse[head * params.sequences.total_q + row] = -INFINITY;
    }
  }
}

void clear_rows_between(const AttentionParams& params, DType dtype) {
  const Sequences& s = params.sequences;
  int end = 0;  // of the sequences so far
  for (int i = 0; i < params.batch; ++i) {
    const Sequence found = sequence_at(s, i, params.seqlen_q, params.seqlen_kv);
    clear_rows(params, dtype, end, found.q_begin);
    end = std::max(end, found.q_begin + found.seqlen_q);
  }
  clear_rows(params, dtype, end, s.total_q);
}

// Whoever runs it takes tasks until there are none, so the range given does not matter.
void work_until_done(long long, long long, void* context) {
  Work& work = *static_cast<Work*>(context);
  float* scratch =
      thread_scratch(work.kernel.scratch_floats(work.params, work.block_m, work.block_n));
  for (;;) {
    const long long index = work.next_task.fetch_add(1, std::memory_order_relaxed);
    if (index >= work.tasks) return;
    work.kernel.run(work.params, work.dtype, work.task(index), work.block_m, work.block_n, scratch);
  }
}

}  // namespace

CpuIsa detected_cpu_isa() {
  static const CpuIsa isa = detect_cpu_isa();
  return isa;
}

CpuIsa best_cpu_isa() {
  static const CpuIsa isa = choose_cpu_isa();
  return isa;
}

void fwd_cpu(const AttentionParams& params, DType dtype, int block_m, int block_n, CpuIsa isa,
             ParallelFor parallel_for, int num_threads) {
  check_problem(params, dtype, block_m, block_n);
  const Sequences& s = params.sequences;
  if (s.cu_seqlens_q != nullptr) clear_rows_between(params, dtype);
  Work work{params, dtype, kernel_of(isa), block_m, block_n, 0, {}};
  const long long rows = work.rows_of({0, 0, params.seqlen_q, params.seqlen_kv});
  if (rows == 0 || params.batch == 0) return;
  if (has_lengths(s) || is_padding(params)) {
    work.list_sequences();
    if (work.tasks == 0) return;
  } else {
    work.block_m = std::min<long long>(block_m, rows);
    work.block_n = std::clamp(block_n, 1, std::max(1, params.seqlen_kv));
    const long long row_blocks = (rows + work.block_m - 1) / work.block_m;
    work.tasks = row_blocks * params.batch * params.heads_kv;
  }
  const long long threads = std::clamp<long long>(num_threads, 1, work.tasks);
  parallel_for(0, threads, 1, work_until_done, &work);
}

}  // namespace flashmoe
