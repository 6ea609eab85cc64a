// What is done to scores besides scaling and masking. Plain C++, no std headers: NVRTC has none.
#pragma once

namespace flashmoe {

// What is added to scores, or says which keys a query sees: of query i, key j and query head h of
// batch b the element b * batch_stride + h * head_stride + i * row_stride + j * key_stride, where a
// stride of 0 says that all have the same.
struct AttnMask {
  // boolean: a byte, 0 where the query does not see the key.
  enum class Kind : int { boolean, float32, float16, bfloat16 };
  const void* data;  // null: there is none
  long long batch_stride, head_stride, row_stride, key_stride;
  Kind kind;

  constexpr bool is_given() const { return data != nullptr; }
  constexpr bool is_boolean() const { return kind == Kind::boolean; }
};

// In this order: score = softmax_scale * q k^T, then softcap, then ALiBi, then the mask; the
// softmax's sum then has the sink's exponential, too, and so has softmax_lse.
struct Terms {
  // Null, or by (batch, query head), of stride 0 where batches share them:
  // -slope * |i + seqlen_kv - seqlen_q - j| is added to the score of query i and key j.
  const float* alibi_slopes;
  long long alibi_batch_stride;
  // Null, or by query head: the score of a key without value. A row that sees no key has out 0 and
  // the sink as its softmax_lse.
  const float* sinks;
  // Null, or seed and offset of dropout (common/dropout.h): weights, which softmax_lse is of,
  // become 0 or are divided by the share of those that stay.
  const long long* rng_state;
  unsigned dropout_limit;  // the share of weights that stay, times 2^16, minus 1
  float softcap;           // above 0: a score becomes softcap * tanh(score / softcap). 0: it stays
  AttnMask attn_mask;
};

}  // namespace flashmoe
