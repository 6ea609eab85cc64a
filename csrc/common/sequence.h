// Where the rows of each sequence are, for kernels that compute packed batches and caches. Plain
// C++, no std headers: NVRTC has none.
#pragma once

namespace flashmoe {

// Lengths that kernels read on the device. In a packed batch q, out and k, v are (total, heads,
// head_dim), one sequence behind the other, and softmax_lse is (heads_q, total_q); batch counts the
// sequences, seqlen_q and seqlen_kv are upper bounds of their lengths, and batch strides are
// unused. Lengths may be anything: what they say is clamped to the tensors.
struct Sequences {
  const int* cu_seqlens_q;     // [batch + 1]: where each begins, and the end; null: q is dense
  const int* cu_seqlens_k;     // likewise; null: k and v are dense, or in pages
  const int* seqused_k;        // [batch]: how many keys each has, if not all; or null
  const int* leftpad_k;        // [batch]: how many of them, the first ones, are padding; or null
  const int* cache_batch_idx;  // [batch]: which batch of k and v each reads; or null
  // [batch][pages]: which page of k and v (num_pages, page_size, heads_kv, head_dim) holds each
  // page_size keys; or null.
  const int* block_table;
  long long block_table_stride;
  int page_size, num_pages;  // of the table's pages; num_pages is that of k, or its batch
  int total_q, total_k;      // rows of packed tensors

  constexpr bool is_packed() const { return cu_seqlens_q != nullptr; }
};

// How many rows the TMA knows a packed tensor to have (sm90_launch.h, TensorView).
constexpr int PACKED_ROWS = 1 << 30;

// One sequence: its rows, and where they begin in packed tensors (0 in dense ones).
struct Sequence {
  int q_begin, k_begin, seqlen_q, seqlen_kv;
};

constexpr int clamped(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// Sequence `index`, whose lengths are at most seqlen_q and seqlen_kv. Keys in front of leftpad_k
// are not counted; k_begin is past them, in pages and dense caches, too.
constexpr Sequence sequence_at(const Sequences& s, int index, int seqlen_q, int seqlen_kv) {
  Sequence found{0, 0, seqlen_q, seqlen_kv};
  if (s.cu_seqlens_q != nullptr) {
    found.q_begin = clamped(s.cu_seqlens_q[index], 0, s.total_q);
    const int end = clamped(s.cu_seqlens_q[index + 1], found.q_begin, s.total_q);
    found.seqlen_q = clamped(end - found.q_begin, 0, seqlen_q);
  }
  if (s.cu_seqlens_k != nullptr) {
    found.k_begin = clamped(s.cu_seqlens_k[index], 0, s.total_k);
    const int end = clamped(s.cu_seqlens_k[index + 1], found.k_begin, s.total_k);
    found.seqlen_kv = clamped(end - found.k_begin, 0, seqlen_kv);
  }
  if (s.seqused_k != nullptr) {
    found.seqlen_kv = clamped(s.seqused_k[index], 0, found.seqlen_kv);
  }
  if (s.leftpad_k != nullptr) {
    const int padding = clamped(s.leftpad_k[index], 0, found.seqlen_kv);
    found.k_begin += padding;
    found.seqlen_kv -= padding;
  }
  return found;
}

}  // namespace flashmoe
