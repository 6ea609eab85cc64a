// What is done to scores besides scaling and masking. Plain C++, no std headers: NVRTC has none.
#pragma once

namespace flashmoe {

// In this order: score = softmax_scale * q k^T, then softcap, then ALiBi; the softmax's sum then
// has the sink's exponential, too, and so has softmax_lse.
struct Terms {
  float softcap;  // above 0: a score becomes softcap * tanh(score / softcap). 0: it stays
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

  constexpr bool any() const {
    return softcap > 0 || alibi_slopes != nullptr || sinks != nullptr || rng_state != nullptr;
  }
};

}  // namespace flashmoe
