// The description of an attention backward call. Plain C++, no std headers.
#pragma once

#include "common/params.h"

namespace flashmoe {

// `attention` is the forward's call: its out and softmax_lse are inputs here. dout is laid out like
// out, with strides of its own. dq, dk and dv are contiguous, shaped as q, k and v. dlse is the
// gradient of softmax_lse, laid out like it, or null: there is none.
struct BackwardParams {
  AttentionParams attention;
  const void* dout;
  const float* dlse;
  long long do_batch_stride, do_row_stride, do_head_stride;
  void *dq, *dk, *dv;
};

}  // namespace flashmoe
