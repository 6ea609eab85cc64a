// Elements of an attention mask (common/terms.h) for the CPU forward kernel. Like tiles.h it has
// internal linkage and uses nothing of std.
#pragma once

#include "common/terms.h"

namespace flashmoe {
namespace {

using MaskKind = AttnMask::Kind;

inline long long element_size(MaskKind kind) {
  return kind == MaskKind::boolean ? 1 : kind == MaskKind::float32 ? 4 : 2;
}

// What is added to a score: of a boolean mask 0, or -infinity.
inline float mask_value(MaskKind kind, const unsigned char* p) {
  unsigned bits = 0;
  if (kind == MaskKind::boolean) {
    bits = *p != 0 ? 0 : 0xff800000u;
  } else if (kind == MaskKind::float32) {
    __builtin_memcpy(&bits, p, 4);
  } else {
    unsigned short half;
    __builtin_memcpy(&half, p, 2);
    bits = static_cast<unsigned>(half) << 16;
    if (kind == MaskKind::float16) {
      const unsigned sign = bits & 0x80000000u, magnitude = half & 0x7fffu;
      const unsigned shifted = magnitude << 13;
      float value;
      __builtin_memcpy(&value, &shifted, 4);
      value *= 0x1p112f;  // exact, subnormals included
      __builtin_memcpy(&bits, &value, 4);
      if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
      bits |= sign;
    }
  }
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// One row of a mask.
struct MaskRow {
  const unsigned char* first;
  long long step;  // bytes from key to key
  MaskKind kind;

  float operator[](long long key) const { return mask_value(kind, first + key * step); }

  // Eight keys of a boolean mask that lie side by side, as one number.
  bool has_words() const { return kind == MaskKind::boolean && step == 1; }
  unsigned long long word(long long key) const {
    unsigned long long eight;
    __builtin_memcpy(&eight, first + key, 8);
    return eight;
  }

  // Whether it lets any of the keys from `begin` to `end` - 1 through.
  bool sees_any(long long begin, long long end) const {
    long long key = begin;
    if (has_words()) {
      for (; key + 8 <= end; key += 8) {
        if (word(key) != 0) return true;
      }
    }
    for (; key < end; ++key) {
      if ((*this)[key] != -__builtin_inff()) return true;
    }
    return false;
  }

  // Adds it, times `factor`, to the scores of the keys from `begin` on, of which `scores` has one
  // every `stride`.
  void add_to(long long begin, int keys, float factor, float* scores, int stride) const {
    constexpr unsigned long long ALL_SEEN = 0x0101010101010101ull;
    for (int n = 0; n < keys; ++n) {
      while (has_words() && n + 8 <= keys && word(begin + n) == ALL_SEEN) n += 8;
      if (n == keys) return;
      const float value = (*this)[begin + n];
      float& score = scores[static_cast<long long>(n) * stride];
      // What is hidden may be no number.
      score = value == -__builtin_inff() ? value : score + value * factor;
    }
  }
};

inline MaskRow mask_row(const AttnMask& mask, long long batch, long long head, long long row) {
  const long long size = element_size(mask.kind);
  const long long offset =
      batch * mask.batch_stride + head * mask.head_stride + row * mask.row_stride;
  return {static_cast<const unsigned char*>(mask.data) + offset * size, mask.key_stride * size,
          mask.kind};
}

}  // namespace
}  // namespace flashmoe
