// Attention forward on the CPU: blocked online softmax, float32 arithmetic. Needs no torch, OpenMP
// or BLAS; the caller brings the threads.
#pragma once

#include "common/params.h"

namespace flashmoe {

enum class CpuIsa : int { generic, avx2, avx512 };

// The widest instruction set this CPU, its operating system and this build support, detected once.
// The environment variable FLASHMOE_CPU_ISA=generic|avx2|avx512 lowers it; a value that is unknown
// or not supported here throws std::invalid_argument naming it, on every call.
CpuIsa best_cpu_isa();

// Runs body over [begin, end) in chunks of at least `grain`, possibly concurrently, and returns
// when all are done. fwd_cpu starts one iteration per thread; which thread runs which does not
// matter.
using ParallelRange = void (*)(long long begin, long long end, void* context);
using ParallelFor = void (*)(long long begin, long long end, long long grain, ParallelRange body,
                             void* context);

// Computes params.out and params.softmax_lse; any of float32, float16, bfloat16 (all four tensors
// the same). Every row's head_dim elements are read, nothing between or behind the rows.
//
// block_m query rows share each tile of block_n keys that is staged; rows are (position, query head
// of the kv head's group) pairs, so there are seqlen_q * group of them. Both may be any positive
// number and are clamped to the problem. The result is the same, bit for bit, for any num_threads.
//
// A query row depends only on the keys and values it may see: NaN or inf elsewhere never reaches
// it, and NaN or inf it sees propagates as in PyTorch. A row whose visible scores are all -inf,
// like a row that sees nothing, gives out 0 and lse -inf.
//
// Lengths of sequences are read on the calling thread, before it returns; nothing outside a
// sequence is read. Rows of a packed q that are in none get out 0 and lse -inf. Indices of pages
// and of batches are clamped to those there are; without any there are no keys.
//
// Throws std::invalid_argument when head_dim, heads, softmax_scale, softcap or a block size is not
// supported.
void fwd_cpu(const AttentionParams& params, DType dtype, int block_m, int block_n, CpuIsa isa,
             ParallelFor parallel_for, int num_threads);

}  // namespace flashmoe
