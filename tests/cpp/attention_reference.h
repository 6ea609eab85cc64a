// What the tests of forward kernels share: tensors with guard pages, whose dtypes are converted by
// arithmetic, and attention as its definition has it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/common/dropout.h"
#include "../../csrc/common/params.h"

namespace flashmoe {

const float NAN32 = std::numeric_limits<float>::quiet_NaN();
const uint8_t POISON = 0xcd;  // in outputs: no NaN in any of the dtypes, and no likely result

// Conversions by arithmetic, not by the kernel's bit tricks.
struct Format {
  int mantissa_bits, min_exponent;
  double max;
};
inline Format format_of(DType dtype) {
  if (dtype == DType::float16) return {10, -14, 65504.0};
  if (dtype == DType::bfloat16) return {7, -126, 0x1.fep127};
  return {23, -126, 0x1.fffffep127};
}

inline double half_ulp(DType dtype, double x) {
  const Format format = format_of(dtype);
  int exponent = format.min_exponent + 1;
  if (x != 0) std::frexp(x, &exponent);
  return std::ldexp(0.5, std::max(exponent - 1, format.min_exponent) - format.mantissa_bits);
}

inline double round_to(DType dtype, double x) {
  if (!std::isfinite(x)) return x;
  const double ulp = 2 * half_ulp(dtype, x), rounded = std::nearbyint(x / ulp) * ulp;
  return std::fabs(rounded) > format_of(dtype).max ? std::copysign(INFINITY, x) : rounded;
}

inline int size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline void encode(DType dtype, double x, uint8_t* dst) {
  const float rounded = static_cast<float>(round_to(dtype, x));
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  if (dtype == DType::float32) {
    std::memcpy(dst, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::float16) {
    const uint16_t sign = half & 0x8000;
    const double magnitude = std::fabs(rounded);
    if (std::isnan(rounded)) {
      half = 0x7e00;
    } else if (std::isinf(rounded)) {
      half = sign | 0x7c00;
    } else if (magnitude < 0x1p-14) {
      half = sign | static_cast<uint16_t>(magnitude * 0x1p24);
    } else {
      int exponent;
      const double fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
      half = sign | static_cast<uint16_t>((exponent + 14) << 10) |
             static_cast<uint16_t>((fraction * 2 - 1) * 1024);
    }
  }
  std::memcpy(dst, &half, 2);
}

inline double decode(DType dtype, const uint8_t* src) {
  uint16_t half;
  uint32_t bits;
  if (dtype == DType::float32) {
    std::memcpy(&bits, src, 4);
  } else {
    std::memcpy(&half, src, 2);
    if (dtype == DType::float16) {
      const int exponent = half >> 10 & 31, mantissa = half & 1023;
      const double sign = half & 0x8000 ? -1 : 1;
      if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
      if (exponent == 0) return sign * std::ldexp(mantissa, -24);
      return sign * std::ldexp(1024 + mantissa, exponent - 25);
    }
    bits = static_cast<uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Bytes that end where an unreadable page begins.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t size) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (size + page - 1) / page * page;
    mapped_ = usable + page;
    void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(static_cast<char*>(base) + usable, page, PROT_NONE) != 0) {
      std::perror("guard page");
      std::exit(1);
    }
    base_ = static_cast<uint8_t*>(base);
    data_ = base_ + usable - size;
  }
  ~GuardedBytes() { munmap(base_, mapped_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  uint8_t& operator[](size_t i) const { return data_[i]; }
  uint8_t* begin() const { return data_; }
  uint8_t* end() const { return data_ + size_; }

 private:
  size_t size_, mapped_;
  uint8_t *base_, *data_;
};

// (batch, seqlen, heads, head_dim), each head's row followed by `pad` elements that are not its
// own. Exactly as long as the last row needs plus a guard, all NaN outside the rows.
struct Tensor {
  DType dtype;
  int batch, seqlen, heads, head_dim;
  long long row_stride, head_stride, batch_stride;
  GuardedBytes bytes;

  Tensor(DType dtype, int batch, int seqlen, int heads, int head_dim, int pad, bool heads_first)
      : dtype(dtype),
        batch(batch),
        seqlen(seqlen),
        heads(heads),
        head_dim(head_dim),
        row_stride(heads_first ? head_dim + pad : (head_dim + pad) * heads + pad),
        head_stride(heads_first ? (head_dim + pad) * seqlen + pad : head_dim + pad),
        batch_stride(heads_first ? head_stride * heads : row_stride * seqlen),
        bytes(size_of(dtype) * (batch * seqlen * heads == 0
                                    ? 0
                                    : offset(batch - 1, seqlen - 1, heads - 1) + head_dim)) {
    for (size_t i = 0; i < bytes.size(); i += size_of(dtype)) encode(dtype, NAN32, &bytes[i]);
  }
  long long offset(int b, int s, int h) const {
    return b * batch_stride + s * row_stride + h * head_stride;
  }
  uint8_t* at(int b, int s, int h, int d) { return &bytes[(offset(b, s, h) + d) * size_of(dtype)]; }
  double get(int b, int s, int h, int d) { return decode(dtype, at(b, s, h, d)); }
  void set(int b, int s, int h, int d, double x) { encode(dtype, x, at(b, s, h, d)); }
  template <typename F>
  void fill(F value) {
    for (int b = 0; b < batch; ++b)
      for (int s = 0; s < seqlen; ++s)
        for (int h = 0; h < heads; ++h)
          for (int d = 0; d < head_dim; ++d) set(b, s, h, d, value());
  }
};

// A tensor's elements as Float, which holds them exactly.
template <typename Float>
class Values {
 public:
  explicit Values(Tensor& tensor) : tensor_(tensor) {
    for (int b = 0; b < tensor.batch; ++b)
      for (int s = 0; s < tensor.seqlen; ++s)
        for (int h = 0; h < tensor.heads; ++h)
          for (int d = 0; d < tensor.head_dim; ++d)
            values_.push_back(static_cast<Float>(tensor.get(b, s, h, d)));
  }
  const Float* row(int b, int s, int h) const {
    return &values_[((static_cast<size_t>(b) * tensor_.seqlen + s) * tensor_.heads + h) *
                    tensor_.head_dim];
  }

 private:
  const Tensor& tensor_;
  std::vector<Float> values_;
};

// out (batch, heads_q, seqlen_q, v's head_dim) and lse (batch, heads_q, seqlen_q).
template <typename Float>
struct Result {
  std::vector<Float> out, lse;
};

inline AttentionParams forward_params(Tensor& q, Tensor& k, Tensor& v, Tensor& out,
                                      std::vector<float>& lse, float scale, Mask mask) {
  AttentionParams p{};
  p.q = q.bytes.data(), p.k = k.bytes.data(), p.v = v.bytes.data(), p.out = out.bytes.data();
  p.softmax_lse = lse.data();
  p.q_batch_stride = q.batch_stride, p.q_row_stride = q.row_stride;
  p.k_batch_stride = k.batch_stride, p.k_row_stride = k.row_stride;
  p.v_batch_stride = v.batch_stride, p.v_row_stride = v.row_stride;
  p.o_batch_stride = out.batch_stride, p.o_row_stride = out.row_stride;
  p.q_head_stride = q.head_stride, p.k_head_stride = k.head_stride;
  p.v_head_stride = v.head_stride, p.o_head_stride = out.head_stride;
  p.batch = q.batch, p.heads_q = q.heads, p.heads_kv = k.heads;
  p.seqlen_q = q.seqlen, p.seqlen_kv = k.seqlen;
  p.head_dim = q.head_dim, p.head_dim_v = v.head_dim;
  p.softmax_scale = scale, p.mask = mask, p.is_causal = mask.right >= 0;
  return p;
}

// The first key that query i sees, and how many, by trying each.
inline std::pair<int, int> seen_keys(Mask mask, int i, int seqlen_q, int seqlen_kv) {
  int first = 0, count = 0;
  for (int j = 0; j < seqlen_kv; ++j) {
    const int ahead = j - (i + seqlen_kv - seqlen_q);
    if ((mask.left >= 0 && ahead < -mask.left) || (mask.right >= 0 && ahead > mask.right)) continue;
    if (count++ == 0) first = j;
  }
  return {first, count};
}

// What dropout multiplies a weight by, as common/dropout.h says it.
inline double dropout_factor(const Terms& terms, int batch, int head, int row, int column) {
  if (terms.rng_state == nullptr) return 1;
  const auto seed = static_cast<uint64_t>(terms.rng_state[0]);
  const uint64_t offset = static_cast<uint64_t>(terms.rng_state[1]) + static_cast<uint64_t>(batch);
  const auto low = [](uint64_t x) { return static_cast<unsigned>(x); };
  const Philox bits = philox({{low(row / 16 * 8 + row % 8), low(column / 16 * 4 + column % 8 / 2),
                               low(offset), low((offset >> 32) + static_cast<uint64_t>(head))}},
                             low(seed), low(seed >> 32));
  const unsigned word = bits.x[column / 8 % 2 * 2 + row / 8 % 2];
  const unsigned mine = column % 2 ? word >> 16 : word & 0xffff;
  return mine <= terms.dropout_limit ? 65536. / (terms.dropout_limit + 1) : 0;
}

// What a mask adds to a score: of a boolean one 0, or -infinity.
inline double mask_at(const AttnMask& mask, int b, int h, int i, int j) {
  const long long offset =
      b * mask.batch_stride + h * mask.head_stride + i * mask.row_stride + j * mask.key_stride;
  const uint8_t* data = static_cast<const uint8_t*>(mask.data);
  if (mask.is_boolean()) return data[offset] ? 0 : -INFINITY;
  const DType dtype = mask.kind == AttnMask::Kind::float32   ? DType::float32
                      : mask.kind == AttnMask::Kind::float16 ? DType::float16
                                                             : DType::bfloat16;
  return decode(dtype, data + offset * size_of(dtype));
}

// softmax(scale * Q K^T) V row by row in Float arithmetic, every sum in the order it is written
// but those over head_dim, which run through `order`.
template <typename Float>
Result<Float> reference(Tensor& q, Tensor& k, Tensor& v, float scale, Mask mask,
                        const std::vector<int>& order, const Terms& terms = {},
                        int first_batch = 0) {
  const Values<Float> q_values(q), k_values(k), v_values(v);
  const size_t rows = static_cast<size_t>(q.batch) * q.heads * q.seqlen;
  Result<Float> result{std::vector<Float>(rows * v.head_dim), std::vector<Float>(rows)};
  std::vector<Float> scores;
  for (size_t r = 0; r < rows; ++r) {
    const int i = r % q.seqlen, h = r / q.seqlen % q.heads, b = r / q.seqlen / q.heads;
    const int kv_head = h / (q.heads / k.heads);
    const auto [first, visible] = seen_keys(mask, i, q.seqlen, k.seqlen);
    scores.assign(visible, 0);
    Float max = -INFINITY, sum = 0;
    for (int n = 0; n < visible; ++n) {
      const Float *q_row = q_values.row(b, i, h), *k_row = k_values.row(b, first + n, kv_head);
      for (int d : order) scores[n] += q_row[d] * k_row[d];
      scores[n] *= static_cast<Float>(scale);
      if (terms.softcap > 0) {
        scores[n] = terms.softcap * std::tanh(scores[n] / static_cast<Float>(terms.softcap));
      }
      if (terms.alibi_slopes != nullptr) {
        const int distance = std::abs(i + k.seqlen - q.seqlen - first - n);
        scores[n] -= terms.alibi_slopes[b * terms.alibi_batch_stride + h] * Float(distance);
      }
      if (terms.attn_mask.is_given()) {
        const Float added = static_cast<Float>(mask_at(terms.attn_mask, b, h, i, first + n));
        scores[n] = added == -INFINITY ? added : scores[n] + added;
      }
      max = std::fmax(max, scores[n]);
    }
    const Float sink = terms.sinks != nullptr ? terms.sinks[h] : -INFINITY;
    max = std::fmax(max, sink);
    if (max == -INFINITY) max = 0;
    sum += std::exp(sink - max);
    Float* out_row = &result.out[r * v.head_dim];
    for (int n = 0; n < visible; ++n) {
      const Float p = std::exp(scores[n] - max);
      if (scores[n] == -INFINITY) continue;
      const Float* v_row = v_values.row(b, first + n, kv_head);
      sum += p;
      const auto factor =
          static_cast<Float>(dropout_factor(terms, first_batch + b, h, i, first + n));
      for (int d = 0; d < v.head_dim && factor != 0; ++d) out_row[d] += p * factor * v_row[d];
    }
    result.lse[r] = sum == 0 ? -INFINITY : max + std::log(sum);
    for (int d = 0; d < v.head_dim; ++d) out_row[d] = sum == 0 ? 0 : out_row[d] / sum;
  }
  return result;
}

// How many bytes of `out`, POISON before, were written outside its rows.
inline long long written_outside(Tensor& out) {
  std::vector<bool> written(out.bytes.size());
  for (int b = 0; b < out.batch; ++b)
    for (int s = 0; s < out.seqlen; ++s)
      for (int h = 0; h < out.heads; ++h)
        for (int byte = 0; byte < out.head_dim * size_of(out.dtype); ++byte)
          written[out.offset(b, s, h) * size_of(out.dtype) + byte] = true;
  long long touched = 0;
  for (size_t i = 0; i < written.size(); ++i) touched += !written[i] && out.bytes[i] != POISON;
  return touched;
}

}  // namespace flashmoe
