// Features that are compiled into a kernel. The plain variant has none of them, and does not pay
// for them.
#pragma once

#include "common/params.h"

namespace flashmoe {

struct Variant {
  bool local = false;  // any window; the plain variant has none, or is causal
  // Of a backward: dQ is the same bits every time.
  bool deterministic = false;
  // common/terms.h
  bool softcap = false, alibi = false, sink = false, dropout = false, mask = false;
  // Of a backward: a thread block has all keys of a head, so it needs no sums of dQ, and repeats.
  bool whole = false;
  bool packed = false;  // lengths of sequences are read on the device (common/sequence.h)

  // Whether a score is other than its scaled product before a mask is added to it.
  constexpr bool changes_scores() const { return softcap || alibi; }

  // Whether a kernel compiled for it computes the call.
  constexpr bool covers(const AttentionParams& p) const {
    const Sequences& s = p.sequences;
    return (local || !p.mask.is_local()) && (softcap || p.terms.softcap == 0) &&
           (alibi || p.terms.alibi_slopes == nullptr) && (sink || p.terms.sinks == nullptr) &&
           (dropout || p.terms.rng_state == nullptr) && mask == p.terms.attn_mask.is_given() &&
           packed == s.is_packed() && packed == (s.cu_seqlens_k != nullptr) &&
           (packed || s.seqused_k == nullptr) && s.leftpad_k == nullptr &&
           s.cache_batch_idx == nullptr && s.block_table == nullptr;
  }
};

}  // namespace flashmoe
