// The one description of an attention call that every kernel takes. Plain C++, no std headers:
// NVRTC has none.
#pragma once

#include "common/mask.h"
#include "common/sequence.h"
#include "common/terms.h"

namespace flashmoe {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// Layout: q (batch, seqlen_q, heads_q, head_dim), out the same of head_dim_v; k (batch, seqlen_kv,
// heads_kv, head_dim), v the same of head_dim_v; softmax_lse (batch, heads_q, seqlen_q),
// contiguous, natural logarithm, -inf for a row that attends to nothing (its out row is 0). Strides
// are in elements; the last dimension is contiguous.
struct AttentionParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* softmax_lse;
  long long q_batch_stride, q_row_stride, q_head_stride;
  long long k_batch_stride, k_row_stride, k_head_stride;
  long long v_batch_stride, v_row_stride, v_head_stride;
  long long o_batch_stride, o_row_stride, o_head_stride;
  int batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim;
  float softmax_scale;  // finite and positive
  int is_causal;        // whether mask has a limit on the right: all that plain kernels ask of it
  Mask mask;
  int head_dim_v;
  Terms terms;
  Sequences sequences;
};

}  // namespace flashmoe
