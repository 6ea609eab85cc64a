// Which keys a query sees, for every kernel and its host side. flashmoe/spec/mask.py says the same
// in Python. Plain C++, no std headers: NVRTC has none.
#pragma once

namespace flashmoe {

// Query i sees key j when -left <= j - (i + seqlen_kv - seqlen_q) <= right: aligned bottom-right,
// so that the last query is level with the last key. -1: no limit on that side. Causal is {-1, 0}.
// Needs left < seqlen_kv, right < seqlen_q and seqlen_q + seqlen_kv < 2^31.
struct Mask {
  int left, right;

  constexpr bool is_full() const { return left < 0 && right < 0; }
  // What plain kernels compute: the others need the variant for windows.
  constexpr bool is_local() const { return left >= 0 || right > 0; }
};

struct KeyRange {
  int begin, end;  // equal where there is none
};

// The keys that any of the rows from row_begin to row_end - 1 sees.
constexpr KeyRange visible(Mask mask, int row_begin, int row_end, int seqlen_q, int seqlen_kv) {
  const int diagonal = seqlen_kv - seqlen_q;
  int begin = 0, end = seqlen_kv;
  if (mask.right >= 0 && row_end + diagonal + mask.right < end) {
    end = row_end + diagonal + mask.right;
  }
  if (mask.left >= 0 && row_begin + diagonal - mask.left > 0) {
    begin = row_begin + diagonal - mask.left;
  }
  return {begin, end > begin ? end : begin};
}

// The queries that see any of the keys from key_begin to key_end - 1.
constexpr KeyRange seen_by(Mask mask, int key_begin, int key_end, int seqlen_q, int seqlen_kv) {
  return visible({mask.right, mask.left}, key_begin, key_end, seqlen_kv, seqlen_q);
}

}  // namespace flashmoe
