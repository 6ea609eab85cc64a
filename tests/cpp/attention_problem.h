// Random attention problems on emulator::run, and what comes out against float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/common/variant.h"
#include "attention_reference.h"
#include "emulator/include/cuda_runtime.h"

namespace flashmoe {

struct Problem {
  int batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim;
  Mask mask;
  float softcap;
  bool alibi, sink, masked;
  float dropout_p = 0;
  int head_dim_v = 0;  // 0: head_dim

  int value_dim() const { return head_dim_v > 0 ? head_dim_v : head_dim; }
  std::string text() const {
    std::string text;
    for (const int n : {batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim}) {
      text += std::to_string(n) + " ";
    }
    if (head_dim_v > 0) text += "head_dim_v " + std::to_string(head_dim_v) + " ";
    text += "window " + std::to_string(mask.left) + " " + std::to_string(mask.right);
    if (softcap > 0) text += ", softcap " + std::to_string(softcap);
    if (dropout_p > 0) text += ", dropout " + std::to_string(dropout_p);
    return text + (alibi ? ", alibi" : "") + (sink ? ", sinks" : "") + (masked ? ", mask" : "");
  }
};

// A mask that broadcasts to (batch, heads_q, seqlen_q, seqlen_kv), of any strides: its last element
// is the last that may be read.
class RandomMask {
 public:
  RandomMask(const Problem& x, DType dtype, std::mt19937_64& random) : mask_() {
    if (!x.masked) return;
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    const bool is_bias = below(3) == 0;                 // seen everywhere
    const bool is_padding = !is_bias && below(3) == 0;  // of keys
    int sizes[4] = {x.batch, x.heads_q, x.seqlen_q, x.seqlen_kv};
    for (int d = 0; d < 4; ++d) {
      if (d < 3 && (is_padding ? d > 0 : below(3) == 0)) sizes[d] = 1;
    }
    if (below(8) == 0) sizes[3] = 1;
    using Kind = AttnMask::Kind;
    const Kind own = dtype == DType::float16 ? Kind::float16 : Kind::bfloat16;
    mask_.kind = below(2) && !is_bias ? Kind::boolean : below(2) ? own : Kind::float32;
    const DType stored = mask_.kind == Kind::float32 ? DType::float32 : dtype;
    const int bytes = mask_.is_boolean() ? 1 : size_of(stored);
    // Keys side by side or rows, and a gap behind them, which may align the next.
    const int slow = below(4) == 0 ? 3 : 2;
    const bool is_aligned = below(4) > 0;
    long long stride = 1, strides[4] = {};
    for (const int d : {5 - slow, slow, 1, 0}) {
      strides[d] = sizes[d] > 1 ? stride : 0;
      stride *= sizes[d];
      if (d == 5 - slow) stride += is_aligned ? -stride & 15 : below(2) * below(3);
    }
    mask_.batch_stride = strides[0], mask_.head_stride = strides[1];
    mask_.row_stride = strides[2], mask_.key_stride = strides[3];
    const long long last = at(sizes[0] - 1, sizes[1] - 1, sizes[2] - 1, sizes[3] - 1);
    const long long size = bytes * (1 + last);
    bytes_.emplace(static_cast<size_t>(is_aligned ? (size + 15) & ~15 : size));
    std::fill(bytes_->begin(), bytes_->end(), uint8_t{0xff});  // a NaN, between the rows
    mask_.data = bytes_->data();
    const double density[] = {0, 0.03, 0.5, 0.97, 1};
    const double dense = is_bias ? 1 : density[below(5)];
    const int block_m = 1 << below(8), block_n = 1 << below(8), pattern = is_bias ? 0 : below(3);
    const int begin = below(x.seqlen_kv + 1), end = below(4) ? x.seqlen_kv : below(x.seqlen_kv + 1);
    const bool lowest = below(2);
    const bool poisons = sizes[2] > 1 && sizes[3] > 1 && below(2);  // what the window hides
    std::uniform_real_distribution<double> uniform;
    std::normal_distribution<double> normal;
    for (int b = 0; b < sizes[0]; ++b)
      for (int h = 0; h < sizes[1]; ++h)
        for (int i = 0; i < sizes[2]; ++i) {
          const auto [first, count] = seen_keys(x.mask, i, x.seqlen_q, x.seqlen_kv);
          for (int j = 0; j < sizes[3]; ++j) {
            const bool seen = pattern == 0   ? uniform(random) < dense
                              : pattern == 1 ? (i / block_m + j / block_n + h + b) % 3 == 0
                                             : j >= begin / (1 + b) && j < end;
            uint8_t* element = &(*bytes_)[static_cast<size_t>(bytes * at(b, h, i, j))];
            if (mask_.is_boolean()) {
              *element = seen;
            } else {
              const double low = lowest ? -format_of(stored).max : -INFINITY;
              if (poisons && (j < first || j >= first + count)) {
                encode(stored, (i + j) % 2 ? NAN : INFINITY, element);
                continue;
              }
              encode(stored, seen ? (dense == 1 && !is_bias ? 0 : normal(random)) : low, element);
            }
          }
        }
  }
  const AttnMask& get() const { return mask_; }

 private:
  long long at(int b, int h, int i, int j) const {
    return b * mask_.batch_stride + h * mask_.head_stride + i * mask_.row_stride +
           j * mask_.key_stride;
  }
  AttnMask mask_;
  std::optional<GuardedBytes> bytes_;
};

// Slopes and sinks of a problem: its last one is the last that may be read.
class RandomTerms {
 public:
  RandomTerms(const Problem& x, std::mt19937_64& random)
      : softcap_(x.softcap),
        by_batch_(random() % 2 ? x.heads_q : 0),
        slopes_(fill(x.alibi ? (by_batch_ ? x.batch : 1) * x.heads_q : 0,
                     [&] {
                       // Usual ones; a few that leave a row little but its own key; and growth.
                       const int kind = static_cast<int>(random() % 8);
                       return kind == 0   ? 40.f
                              : kind == 1 ? -0.25f
                                          : std::ldexp(1.f, -static_cast<int>(random() % 9));
                     })),
        sinks_(fill(x.sink ? x.heads_q : 0,
                    [&] {
                      const float far[] = {-INFINITY, -300, 300};
                      std::normal_distribution<float> normal;
                      return random() % 4 == 0 ? far[random() % 3] : 3 * normal(random);
                    })),
        dropout_limit_(static_cast<unsigned>((1 - x.dropout_p) * 65536) - 1),
        rng_state_(x.dropout_p > 0 ? 16 : 0) {
    // One half of them with an offset whose high half a batch changes.
    const uint64_t state[] = {random(), random() | (random() % 2 ? 0xffffffff : 0)};
    std::memcpy(rng_state_.data(), state, rng_state_.size());
  }

  Terms get() const {
    return {reinterpret_cast<const float*>(slopes_.size() ? slopes_.data() : nullptr),
            by_batch_,
            reinterpret_cast<const float*>(sinks_.size() ? sinks_.data() : nullptr),
            reinterpret_cast<const long long*>(rng_state_.size() ? rng_state_.data() : nullptr),
            dropout_limit_,
            softcap_,
            {}};
  }

 private:
  struct Floats : GuardedBytes {
    Floats(int count, const std::function<float()>& value) : GuardedBytes(4u * count) {
      for (int i = 0; i < count; ++i) {
        const float x = value();
        std::memcpy(data() + 4 * i, &x, 4);
      }
    }
  };
  static Floats fill(int count, const std::function<float()>& value) { return {count, value}; }
  float softcap_;
  long long by_batch_;
  Floats slopes_, sinks_;
  unsigned dropout_limit_;
  GuardedBytes rng_state_;
};

// By how much the tanh of softcap may be off.
inline double cap_error(const Terms& terms) { return terms.softcap * 0x1p-11; }

// What is wrong with out and softmax_lse, or nothing.
inline std::string compare(Tensor& q, Tensor& k, Tensor& v, Tensor& out,
                           const std::vector<float>& lse, float scale, Mask mask,
                           const Terms& terms = {}, int first_batch = 0) {
  Tensor magnitude(v.dtype, v.batch, v.seqlen, v.heads, v.head_dim, 0, false);
  for (int b = 0; b < v.batch; ++b)
    for (int s = 0; s < v.seqlen; ++s)
      for (int h = 0; h < v.heads; ++h)
        for (int d = 0; d < v.head_dim; ++d)
          magnitude.set(b, s, h, d, std::fabs(v.get(b, s, h, d)));
  std::vector<int> order(q.head_dim);
  std::iota(order.begin(), order.end(), 0);
  const auto want = reference<double>(q, k, v, scale, mask, order, terms, first_batch);
  // P and O are rounded to the dtype: relative to the terms of the sum, not to the sum.
  const auto summands = reference<double>(q, k, magnitude, scale, mask, order, terms, first_batch);
  const double unit = q.dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
  // What the smallest weights are rounded by is multiplied, too.
  const double rescale = terms.rng_state != nullptr ? dropout_scale(terms.dropout_limit) : 1;
  for (size_t r = 0; r < want.lse.size(); ++r) {
    const int i = r % q.seqlen, h = r / q.seqlen % q.heads, b = r / q.seqlen / q.heads;
    const std::string where =
        "batch " + std::to_string(b) + ", head " + std::to_string(h) + ", row " + std::to_string(i);
    const bool empty = want.lse[r] == -INFINITY;
    // Of a row that sees only what a mask makes as low as can be a kernel may keep less.
    const bool low = want.lse[r] < -1e30 && lse[r] < -1e30 && !empty && lse[r] != -INFINITY;
    if (!low && !(empty ? lse[r] == want.lse[r]
                        : std::fabs(lse[r] - want.lse[r]) <=
                              std::max(1e-4, 1e-6 * std::fabs(want.lse[r])) + cap_error(terms))) {
      return where + ": softmax_lse " + std::to_string(lse[r]) + ", not " +
             std::to_string(want.lse[r]);
    }
    for (int d = 0; d < v.head_dim; ++d) {
      const double got = out.get(b, i, h, d), wanted = want.out[r * v.head_dim + d];
      const double summed = summands.out[r * v.head_dim + d];
      // Scores as low as a mask may make them are rounded by their magnitude.
      const double rounding = terms.attn_mask.is_given() ? std::fabs(want.lse[r]) * 0x1p-23 : 0;
      const double error = unit + cap_error(terms) + std::min(rounding, 1e-2);
      const double allowed = summed == 0 ? 0 : 2 * error * summed + 1e-6 * rescale;
      if (!(std::fabs(got - wanted) <= allowed)) {
        return where + ", column " + std::to_string(d) + ": " + std::to_string(got) + ", not " +
               std::to_string(wanted);
      }
    }
  }
  if (const long long touched = written_outside(out)) {
    return std::to_string(touched) + " bytes written outside the rows of out";
  }
  return "";
}

// Shapes around a tile's, where blocks of rows see all, some or none of the keys; with windows and
// terms where the variant has them. `head_dim_v`: the tile's, 0 where it has none of its own.
inline Problem random_problem(int head_dim, int block_m, int block_n, Variant variant,
                              std::mt19937_64& random, int head_dim_v = 0) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  Problem x;
  x.head_dim = head_dim - 8 * below(3);
  if (head_dim_v > 0) x.head_dim_v = head_dim_v - 8 * below(std::min(3, head_dim_v / 8));
  x.batch = 1 + below(2);
  x.heads_kv = 1 + below(2);
  x.heads_q = x.heads_kv * (1 + below(2));
  x.mask = {-1, below(3) > 0 ? 0 : -1};
  x.seqlen_q = 1 + below(3 * block_m);
  x.seqlen_kv = 1 + below(4 * block_n);
  if (below(2) == 0) x.seqlen_q = x.seqlen_kv;
  x.softcap = 0;
  if (variant.softcap) {
    const float caps[] = {0.5f, 4, 30};
    x.softcap = caps[below(3)];
  }
  x.alibi = variant.alibi && below(8) > 0;
  x.sink = variant.sink && below(8) > 0;
  if (variant.dropout) {
    const float shares[] = {0.0625f, 0.25f, 0.875f};
    x.dropout_p = shares[below(3)];
  }
  x.masked = variant.mask;
  if (variant.local) {
    // Narrower than a tile, or several; one side may be open, and may hide nothing.
    const auto limit = [&](int seqlen) {
      return below(4) == 0 ? -1 : below(std::min(seqlen, below(2) ? block_n / 2 : 3 * block_n));
    };
    x.mask = {limit(x.seqlen_kv), below(2) ? 0 : limit(x.seqlen_q)};
    if (!x.mask.is_local()) x.mask.left = below(x.seqlen_kv);
  }
  return x;
}

// Inputs at the edge of what the dtype holds, whose results are finite: scores that grow steadily
// towards the first key (which is visited last) under large values, or equal scores so large that
// one rounding of a score exceeds the exponent's range.
inline void make_extreme(Tensor& q, Tensor& k, Tensor& v, float scale, std::mt19937_64& random) {
  const bool wide = q.dtype == DType::bfloat16;
  if (random() % 2 == 0) {
    const double growth = static_cast<double>(random() % 100);
    const double size = wide ? std::ldexp(1.0, static_cast<int>(random() % 126)) : 3e4;
    const auto unit = [](Tensor& x, auto first) {
      for (int b = 0; b < x.batch; ++b)
        for (int s = 0; s < x.seqlen; ++s)
          for (int h = 0; h < x.heads; ++h)
            for (int d = 0; d < x.head_dim; ++d) x.set(b, s, h, d, d == 0 ? first(s) : 0);
    };
    unit(q, [](int) { return 1; });
    unit(k, [&](int s) { return growth / scale * (k.seqlen - 1 - s) / std::max(k.seqlen - 1, 1); });
    v.fill([&] { return size * (1 + (random() % 64) / 64.); });
  } else {
    const double size = wide ? 133120 : 65504;
    for (Tensor* tensor : {&q, &k, &v}) tensor->fill([&] { return size; });
  }
}

// Whether a problem comes out right: with tensors of the seed's, on a device of the seed's. Says
// what does not. Rows of q, k and v are 16-byte aligned or not. `launch` returns what went wrong
// there, or nothing.
using LaunchForward = std::function<std::string(const AttentionParams&, DType, std::mt19937_64&)>;
inline bool check(const std::string& name, const Problem& x, bool aligned, uint64_t seed,
                  const LaunchForward& launch) {
  std::mt19937_64 random(seed);
  const DType dtype = random() % 2 ? DType::float16 : DType::bfloat16;
  const bool heads_first = random() % 2;
  const int pad = aligned ? 8 : 5;
  Tensor q(dtype, x.batch, x.seqlen_q, x.heads_q, x.head_dim, pad, heads_first);
  Tensor k(dtype, x.batch, x.seqlen_kv, x.heads_kv, x.head_dim, pad, heads_first);
  Tensor v(dtype, x.batch, x.seqlen_kv, x.heads_kv, x.value_dim(), pad, !heads_first);
  Tensor out(dtype, x.batch, x.seqlen_q, x.heads_q, x.value_dim(), 8, heads_first);
  const float scale = 1 / std::sqrt(static_cast<float>(x.head_dim));
  std::normal_distribution<double> normal;
  // Some rows are large, so that maxima grow late and by much: by more than 2^80 where they are
  // very large, in bfloat16, whose P reaches so far.
  const int large = dtype == DType::bfloat16 && random() % 4 == 0 ? 24 : 4;
  for (Tensor* tensor : {&q, &k, &v}) {
    int element = 0, size = 1;
    tensor->fill([&] {
      if (element++ % tensor->head_dim == 0) {
        size = random() % 8 != 0 ? 1 : tensor == &v ? 4 : large;
      }
      return size * normal(random);
    });
  }
  // Or the last keys score -infinity, as padding by a bias does: those come first.
  if (random() % 6 == 0) {
    const int first = 1 + static_cast<int>(random() % static_cast<unsigned>(x.seqlen_kv));
    for (int b = 0; b < x.batch; ++b) {
      for (int h = 0; h < x.heads_q; ++h)
        for (int i = 0; i < x.seqlen_q; ++i) q.set(b, i, h, x.head_dim - 1, 1);
      for (int h = 0; h < x.heads_kv; ++h)
        for (int i = first; i < x.seqlen_kv; ++i) k.set(b, i, h, x.head_dim - 1, -INFINITY);
    }
  }
  // Beside the largest scores float32 has no room for a bias.
  if (random() % 5 == 0 && !x.alibi && !x.masked) {
    make_extreme(q, k, v, scale, random);
    // What dropout multiplies is to stay in the dtype's range.
    for (int b = 0; b < x.batch; ++b)
      for (int s = 0; s < x.seqlen_kv; ++s)
        for (int h = 0; h < x.heads_kv; ++h)
          for (int d = 0; d < x.value_dim(); ++d)
            v.set(b, s, h, d, v.get(b, s, h, d) * (1 - x.dropout_p));
  }
  const RandomTerms terms_but_mask(x, random);
  const RandomMask attn_mask(x, dtype, random);
  Terms terms = terms_but_mask.get();
  terms.attn_mask = attn_mask.get();
  std::fill(out.bytes.begin(), out.bytes.end(), POISON);
  std::vector<float> lse(static_cast<size_t>(x.batch) * x.heads_q * x.seqlen_q, NAN);

  fake_device.sm_count = 1 + static_cast<int>(random() % 3);
  fake_device.seed = random();
  AttentionParams params = forward_params(q, k, v, out, lse, scale, x.mask);
  params.terms = terms;
  std::string wrong = launch(params, dtype, random);
  if (wrong.empty()) wrong = compare(q, k, v, out, lse, scale, x.mask, terms);
  if (wrong.empty()) return true;
  std::printf("%s, %s, %s, seed %llu: %s\n", name.c_str(), x.text().c_str(),
              dtype == DType::float16 ? "float16" : "bfloat16",
              static_cast<unsigned long long>(seed), wrong.c_str());
  return false;
}

// A mask of keys, (batch, 1, 1, seqlen_kv), that lets batch b see the first lengths[b]; of the
// others an added one has `low`. Owns its elements.
class PaddingMask {
 public:
  PaddingMask(AttnMask::Kind kind, const std::vector<int>& lengths, int seqlen_kv, float low)
      : mask_() {
    const bool boolean = kind == AttnMask::Kind::boolean;
    const DType stored = kind == AttnMask::Kind::float32   ? DType::float32
                         : kind == AttnMask::Kind::float16 ? DType::float16
                                                           : DType::bfloat16;
    const size_t bytes = boolean ? 1 : static_cast<size_t>(size_of(stored));
    bytes_.resize(lengths.size() * static_cast<size_t>(seqlen_kv) * bytes);
    size_t at = 0;
    for (const int length : lengths)
      for (int j = 0; j < seqlen_kv; ++j, at += bytes) {
        if (boolean) {
          bytes_[at] = j < length;
        } else {
          encode(stored, j < length ? 0 : low, &bytes_[at]);
        }
      }
    mask_.data = bytes_.data(), mask_.kind = kind;
    mask_.batch_stride = seqlen_kv, mask_.key_stride = 1;
  }
  const AttnMask& get() const { return mask_; }

 private:
  AttnMask mask_;
  std::vector<uint8_t> bytes_;
};

// Whether a batch under a padding mask loads as many boxes as its sequences do by themselves, at
// their lengths: `loads` runs a problem with this mask, or none. Says what is off.
inline bool padding_costs_lengths(
    const char* name, const Problem& one,
    const std::function<long long(const Problem&, const AttnMask&)>& loads) {
  const std::vector<int> lengths = {one.seqlen_kv, one.seqlen_kv / 3, 1};
  long long wanted = 0;
  for (const int length : lengths) {
    Problem shorter = one;
    shorter.seqlen_kv = length;
    wanted += loads(shorter, {});
  }
  Problem all = one;
  all.batch = static_cast<int>(lengths.size());
  const float finite = -3.38e38f;  // about the lowest of bfloat16
  using Kind = AttnMask::Kind;
  for (const auto& [kind, low] :
       {std::pair{Kind::boolean, 0.f}, std::pair{Kind::float32, -INFINITY},
        std::pair{Kind::float32, finite}, std::pair{Kind::bfloat16, finite},
        std::pair{Kind::float16, -INFINITY}}) {
    const PaddingMask mask(kind, lengths, one.seqlen_kv, low);
    const long long got = loads(all, mask.get());
    if (got == wanted) continue;
    std::printf("%s: %lld boxes loaded under a padding mask of kind %d, not %lld\n", name, got,
                static_cast<int>(kind), wanted);
    return false;
  }
  return true;
}

// What a launch returned, in words; nothing for success.
inline std::string launch_error(cudaError_t error) {
  if (error == cudaSuccess) return "";
  return "error " + std::to_string(error) + ": " + fake_device.failure;
}

// The main program of a kernel's test: [ROUNDS [SEED [NAME]]] tries more shapes and orders of
// execution, of the instances whose name contains NAME.
template <typename Instances>
int run_all(const Instances& instances, int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 10;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 0) : 0);
  const std::string only = argc > 3 ? argv[3] : "";
  int failures = 0, runs = 0;
  for (int round = 0; round < rounds; ++round) {
    for (const auto& instance : instances) {
      if (std::string(instance.name).find(only) == std::string::npos) continue;
      const Problem x = random_problem(instance.head_dim(), instance.block_m(), instance.block_n(),
                                       instance.may(), random, instance.head_dim_v());
      failures += !instance.check(x, random());
      ++runs;
    }
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0 || runs == 0;
}

}  // namespace flashmoe
