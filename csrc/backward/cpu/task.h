// What the dispatcher (dispatch.cpp) and the backward kernels of each instruction set agree on.
#pragma once

#include "backward/params.h"
#include "forward/cpu/task.h"

namespace flashmoe {

// All rows of one (sequence, kv head), or of its blocks of rows every num_parts-th from `part` on.
struct BackwardTask {
  CpuTask forward;
  int part, num_parts;
  float* sums;  // of dk and dv, one part's behind the other's; null where there is one, in scratch
};

struct CpuBackwardKernel {
  // Floats of 64-byte aligned scratch that run() needs.
  long long (*scratch_floats)(const BackwardParams& params, const BackwardTask& task,
                              long long block_m, int block_n);
  // Floats of sums that a part needs.
  long long (*part_floats)(const BackwardParams& params);
  void (*run)(const BackwardParams& params, DType dtype, const BackwardTask& task,
              long long block_m, int block_n, float* scratch);
  // Writes dk and dv of the keys from `begin` to `end` - 1 once all parts, of which `task` is the
  // first, are done.
  void (*combine)(const BackwardParams& params, DType dtype, const BackwardTask& task, int begin,
                  int end);
};

extern const CpuBackwardKernel cpu_backward_generic;
extern const CpuBackwardKernel cpu_backward_avx2;    // x86-64 only
extern const CpuBackwardKernel cpu_backward_avx512;  // x86-64 only

}  // namespace flashmoe
