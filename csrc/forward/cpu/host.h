// What the dispatchers of the CPU kernels share: checks, scratch and where sequences are.
#pragma once

#include <cmath>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "forward/cpu/forward.h"
#include "forward/cpu/mask.h"

namespace flashmoe {

// The widest instruction set that this CPU and its operating system support.
CpuIsa detected_cpu_isa();

template <typename T>
inline void check(bool ok, const char* what, T got) {
  if (!ok) throw std::invalid_argument(std::string(what) + ", got " + std::to_string(got));
}

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

// Kept per thread between calls: fresh pages would cost more than a small problem. PURPOSE: one
// for what is needed at the same time.
template <int PURPOSE = 0>
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

// Whether lengths differ between sequences, or lie elsewhere than in a dense batch.
inline bool has_lengths(const Sequences& s) {
  return s.cu_seqlens_q != nullptr || s.cu_seqlens_k != nullptr || s.seqused_k != nullptr ||
         s.leftpad_k != nullptr || s.cache_batch_idx != nullptr || s.block_table != nullptr;
}

// Whether attn_mask is the same for all queries of a sequence, and nothing but it depends on where
// keys are: what it hides in front and behind need not be there.
inline bool is_padding(const AttentionParams& p) {
  const AttnMask& mask = p.terms.attn_mask;
  return mask.is_given() && mask.head_stride == 0 && mask.row_stride == 0 && p.mask.is_full() &&
         p.terms.alibi_slopes == nullptr && p.terms.rng_state == nullptr;
}

// Cuts what such a mask hides in front and behind. Returns whether it says more than that.
inline bool cut_padding(const AttnMask& mask, int batch, Sequence& sequence) {
  const MaskRow row = mask_row(mask, batch, 0, 0);
  int begin = 0, end = sequence.seqlen_kv;
  while (begin < end && row[begin] == -INFINITY) ++begin;
  while (begin < end && row[end - 1] == -INFINITY) --end;
  sequence.k_begin += begin;
  sequence.seqlen_kv = end - begin;
  for (; begin < end; ++begin) {
    if (row[begin] != 0) return true;
  }
  return false;
}

// A sequence, the batch of k and v that it reads unless they are packed or in pages, and whether
// attn_mask says more of it than which keys in front and behind are not there.
struct FoundSequence {
  Sequence sequence;
  int kv_batch;
  bool is_masked;
};
inline FoundSequence sequence_of(const AttentionParams& params, int index) {
  const Sequences& s = params.sequences;
  FoundSequence found{sequence_at(s, index, params.seqlen_q, params.seqlen_kv), 0, false};
  if (!has_lengths(s)) {
    found.kv_batch = index;
    found.is_masked = params.terms.attn_mask.is_given();
    if (is_padding(params)) {
      found.is_masked = cut_padding(params.terms.attn_mask, index, found.sequence);
    }
  } else if (s.cu_seqlens_k == nullptr) {
    if (s.num_pages == 0) found.sequence.seqlen_kv = 0;
    const int wanted = s.cache_batch_idx != nullptr ? s.cache_batch_idx[index] : index;
    if (s.block_table == nullptr) found.kv_batch = clamped(wanted, 0, s.num_pages - 1);
  }
  return found;
}

inline void check_problem(const AttentionParams& params, DType dtype, int block_m, int block_n) {
  for (const int head_dim : {params.head_dim, params.head_dim_v}) {
    check(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 256,
          "head_dim and head_dim_v must be multiples of 8 from 8 to 256", head_dim);
  }
  check(params.heads_kv > 0, "heads_kv must be positive", params.heads_kv);
  check(params.heads_q % params.heads_kv == 0, "heads_q must be a multiple of heads_kv",
        params.heads_q);
  check(dtype >= DType::float32 && dtype <= DType::bfloat16, "dtype must be 0, 1 or 2",
        static_cast<int>(dtype));
  check(std::isfinite(params.softmax_scale) && params.softmax_scale > 0,
        "softmax_scale must be finite and positive", params.softmax_scale);
  check(std::isfinite(params.terms.softcap) && params.terms.softcap >= 0,
        "softcap must be finite and 0 or positive", params.terms.softcap);
  check(block_m > 0, "block_m must be positive", block_m);
  check(block_n > 0, "block_n must be positive", block_n);
}

}  // namespace flashmoe
