// Attention backward on the CPU, float32 arithmetic. Needs no torch, OpenMP or BLAS; the caller
// brings the threads.
#pragma once

#include "backward/params.h"
#include "forward/cpu/forward.h"

namespace flashmoe {

// Computes params.dq, dk and dv, all of them: rows in no sequence, keys that no row sees and rows
// that see none get 0. What is read, and what tile sizes mean, is as in fwd_cpu; there is no
// backward through pages, caches or left padding.
//
// The result is the same, bit for bit, every time; with fewer (sequence, kv head) pairs than twice
// num_threads it depends on num_threads, which then share out a pair's rows.
//
// Throws std::invalid_argument as fwd_cpu does.
void bwd_cpu(const BackwardParams& params, DType dtype, int block_m, int block_n, CpuIsa isa,
             ParallelFor parallel_for, int num_threads);

}  // namespace flashmoe
