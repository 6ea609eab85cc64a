// What the dispatcher (fwd_cpu.cpp) and the kernels of each instruction set agree on.
#pragma once

#include "common/params.h"

namespace flashmoe {

// Rows [row_begin, row_end) of one (sequence, kv head). Row r is query position r / group of query
// head head_kv * group + r % group, group = heads_q / heads_kv: all query heads of a kv head share
// its tiles, and neither end of the visible keys ever decreases with r.
struct CpuTask {
  int batch, head_kv;  // batch is the sequence's index
  long long row_begin, row_end;
  Sequence sequence;
  int kv_batch;  // the batch of k and v that it reads, unless they are packed or in pages: 0 there
  bool is_masked;  // whether attn_mask hides any of the sequence's keys, or adds to their scores
};

struct CpuKernel {
  // Floats of 64-byte aligned scratch that run() needs for tasks of at most block_m rows.
  long long (*scratch_floats)(const AttentionParams& params, long long block_m, int block_n);
  void (*run)(const AttentionParams& params, DType dtype, const CpuTask& task, long long block_m,
              int block_n, float* scratch);
};

extern const CpuKernel cpu_kernel_generic;
extern const CpuKernel cpu_kernel_avx2;    // x86-64 only
extern const CpuKernel cpu_kernel_avx512;  // x86-64 only

}  // namespace flashmoe
