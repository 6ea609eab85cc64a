// Checks the problem, cuts it into tasks and hands them to the threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "forward/cpu/forward.h"
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

CpuIsa detected_cpu_isa() {
  static const CpuIsa isa = detect_cpu_isa();
  return isa;
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

template <typename T>
void check(bool ok, const char* what, T got) {
  if (!ok) throw std::invalid_argument(std::string(what) + ", got " + std::to_string(got));
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

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

// Kept per thread between calls: fresh pages would cost more than a small problem.
float* thread_scratch(long long floats) {
  thread_local std::unique_ptr<float[], AlignedDelete> scratch;
  thread_local long long capacity = 0;
  if (capacity < floats) {
    scratch.reset();
    capacity = 0;
    scratch.reset(new (std::align_val_t(64)) float[floats]);
    capacity = floats;
  }
  return scratch.get();
}

struct Work {
  const AttentionParams& params;
  DType dtype;
  const CpuKernel& kernel;
  long long block_m;
  int block_n;
  long long rows, row_blocks, heads, tasks;
  std::atomic<long long> next_task{0};

  // With one limit, blocks cost more the later their rows (causal) or the earlier: all heads'
  // longest blocks first, so that what is left for the end is small. With none or both, nearly all
  // cost the same: all blocks of a head in a row, for its keys to stay in the cache.
  CpuTask task(long long index) const {
    const bool left = params.mask.left >= 0, right = params.mask.right >= 0;
    const bool longest_first = left != right;
    const long long head = longest_first ? index % heads : index / row_blocks;
    long long block = longest_first ? index / heads : index % row_blocks;
    if (longest_first && right) block = row_blocks - 1 - block;
    const long long begin = block * block_m;
    return {static_cast<int>(head / params.heads_kv), static_cast<int>(head % params.heads_kv),
            begin, std::min(begin + block_m, rows)};
  }
};

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

CpuIsa best_cpu_isa() {
  static const CpuIsa isa = choose_cpu_isa();
  return isa;
}

void fwd_cpu(const AttentionParams& params, DType dtype, int block_m, int block_n, CpuIsa isa,
             ParallelFor parallel_for, int num_threads) {
  check(params.head_dim % 8 == 0 && params.head_dim >= 8 && params.head_dim <= 256,
        "head_dim must be a multiple of 8 from 8 to 256", params.head_dim);
  check(params.heads_kv > 0, "heads_kv must be positive", params.heads_kv);
  check(params.heads_q % params.heads_kv == 0, "heads_q must be a multiple of heads_kv",
        params.heads_q);
  check(dtype >= DType::float32 && dtype <= DType::bfloat16, "dtype must be 0, 1 or 2",
        static_cast<int>(dtype));
  check(std::isfinite(params.softmax_scale) && params.softmax_scale > 0,
        "softmax_scale must be finite and positive", params.softmax_scale);
  check(block_m > 0, "block_m must be positive", block_m);
  check(block_n > 0, "block_n must be positive", block_n);

  const long long rows =
      static_cast<long long>(params.seqlen_q) * (params.heads_q / params.heads_kv);
  if (rows == 0 || params.batch == 0) return;
  const long long rows_per_task = std::min<long long>(block_m, rows);
  const long long row_blocks = (rows + rows_per_task - 1) / rows_per_task;
  const long long heads = static_cast<long long>(params.batch) * params.heads_kv;
  Work work{params,
            dtype,
            kernel_of(isa),
            rows_per_task,
            std::clamp(block_n, 1, std::max(1, params.seqlen_kv)),
            rows,
            row_blocks,
            heads,
            row_blocks * heads};
  const long long threads = std::clamp<long long>(num_threads, 1, work.tasks);
  parallel_for(0, threads, 1, work_until_done, &work);
}

}  // namespace flashmoe
