// Random packed batches on emulator::run, and what comes out against float64, one sequence at a
// time.
#pragma once

#include <climits>

#include "attention_problem.h"
#include "common/mask_tiles.cuh"
#include "common/schedule.cuh"
#include "common/sm90_launch.h"

namespace flashmoe {

inline void run_list_blocks(const ScheduleParams& params) { schedule::list_blocks(params); }
const void* const sm90::schedule_entry = reinterpret_cast<const void*>(run_list_blocks);
inline void run_list_tiles(const MaskTilesParams& params) { sm90::list_tiles(params); }
const void* const sm90::mask_tiles_entry = reinterpret_cast<const void*>(run_list_tiles);

// What a thread of a kernel does.
template <typename Params>
void run_kernel(const void* kernel, void** arguments) {
  if (kernel == sm90::schedule_entry) {
    run_list_blocks(*static_cast<const ScheduleParams*>(arguments[0]));
  } else if (kernel == sm90::mask_tiles_entry) {
    run_list_tiles(*static_cast<const MaskTilesParams*>(arguments[0]));
  } else {
    reinterpret_cast<void (*)(const Params&)>(const_cast<void*>(kernel))(
        *static_cast<const Params*>(arguments[0]));
  }
}

// Integers behind which is a guard page.
struct GuardedInts {
  GuardedBytes bytes;
  explicit GuardedInts(const std::vector<int>& values) : bytes(values.size() * sizeof(int)) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
  }
  const int* data() const { return reinterpret_cast<const int*>(bytes.data()); }
};

struct PackedProblem {
  Problem all;  // but for its lengths
  // batch + 1 each; keys that count, or empty for all.
  std::vector<int> cu_seqlens_q, cu_seqlens_k, seqused_k;
  int total_q, total_k, max_seqlen_q, max_seqlen_k;

  int batch() const { return all.batch; }
  int q_begin(int b) const { return cu_seqlens_q[b]; }
  int k_begin(int b) const { return cu_seqlens_k[b]; }
  int seqlen_q(int b) const { return cu_seqlens_q[b + 1] - cu_seqlens_q[b]; }
  int seqlen_kv(int b) const {
    return seqused_k.empty() ? cu_seqlens_k[b + 1] - cu_seqlens_k[b] : seqused_k[b];
  }
  std::string text() const {
    std::string text = all.text() + ", lengths";
    for (int b = 0; b < batch(); ++b) {
      text.append(" ").append(std::to_string(seqlen_q(b)));
      text.append("x").append(std::to_string(seqlen_kv(b)));
    }
    return text;
  }
};

// Sequences of no row, of one, of about a tile; few, or more than a warp has lanes. With rows
// behind the last one, unless `exact`; with keys that do not count where there is `seqused_k`.
inline PackedProblem random_packed_problem(int head_dim, int block_m, int block_n, Variant variant,
                                           bool seqused_k, std::mt19937_64& random,
                                           int head_dim_v = 0) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  PackedProblem x;
  x.all = random_problem(head_dim, block_m, block_n, variant, random, head_dim_v);
  const bool many = below(4) == 0;
  x.all.batch = many ? 30 + below(40) : 1 + below(5);
  const auto length = [&](int block) {
    const int kind = below(6);
    return kind < 2 ? kind : many ? below(9) : kind == 2 ? block : below(2 * block + 9);
  };
  x.cu_seqlens_q = x.cu_seqlens_k = {0};
  const bool used = seqused_k && below(2) == 0;
  x.max_seqlen_q = x.max_seqlen_k = 0;
  for (int b = 0; b < x.all.batch; ++b) {
    const int q = length(block_m), kv = below(3) == 0 ? q : length(block_n);
    x.cu_seqlens_q.push_back(x.cu_seqlens_q.back() + q);
    x.cu_seqlens_k.push_back(x.cu_seqlens_k.back() + kv);
    if (used) x.seqused_k.push_back(below(kv + 1));
    x.max_seqlen_q = std::max(x.max_seqlen_q, q);
    x.max_seqlen_k = std::max(x.max_seqlen_k, kv);
  }
  if (x.cu_seqlens_q.back() == 0) x.cu_seqlens_q.back() = x.max_seqlen_q = 1;
  const auto rest = [&] { return below(2) == 0 ? 0 : below(20); };
  x.total_q = x.cu_seqlens_q.back() + rest(), x.total_k = x.cu_seqlens_k.back() + rest();
  // Upper bounds need not be exact.
  if (below(3) == 0) x.max_seqlen_q += below(100), x.max_seqlen_k += below(100);
  x.max_seqlen_q = std::min(x.max_seqlen_q, x.total_q);
  x.max_seqlen_k = std::min(x.max_seqlen_k, x.total_k);
  x.all.seqlen_q = x.max_seqlen_q, x.all.seqlen_kv = x.max_seqlen_k;
  Mask& mask = x.all.mask;
  if (mask.left >= x.max_seqlen_k) mask.left = -1;
  if (mask.right >= x.max_seqlen_q) mask.right = -1;
  return x;
}

// Lengths, or where `bad` numbers that are none: below 0, past the tensors, in any order.
inline std::vector<int> maybe_bad(const std::vector<int>& lengths, bool bad, int total,
                                  std::mt19937_64& random) {
  std::vector<int> given = lengths;
  for (int& x : given) {
    const int any[] = {INT_MIN, INT_MAX, static_cast<int>(random() % (total + 100u)) - 50};
    if (bad) x = any[random() % 16 < 2 ? random() % 2 : 2];
  }
  return given;
}

// The terms of one sequence of a batch.
inline Terms terms_of(const RandomTerms& terms, int b) {
  Terms mine = terms.get();
  if (mine.alibi_slopes != nullptr) mine.alibi_slopes += b * mine.alibi_batch_stride;
  return mine;
}

// One sequence's rows of a packed tensor.
inline void copy_rows(Tensor& from, int begin, Tensor& to) {
  for (int s = 0; s < to.seqlen; ++s)
    for (int h = 0; h < to.heads; ++h)
      for (int d = 0; d < to.head_dim; ++d) to.set(0, s, h, d, from.get(0, begin + s, h, d));
}
struct OneSequence {
  Tensor q, k, v;
  OneSequence(const PackedProblem& x, int b, Tensor& packed_q, Tensor& packed_k, Tensor& packed_v)
      : q(packed_q.dtype, 1, x.seqlen_q(b), x.all.heads_q, x.all.head_dim, 0, false),
        k(packed_q.dtype, 1, x.seqlen_kv(b), x.all.heads_kv, x.all.head_dim, 0, false),
        v(packed_q.dtype, 1, x.seqlen_kv(b), x.all.heads_kv, x.all.value_dim(), 0, false) {
    copy_rows(packed_q, x.q_begin(b), q);
    copy_rows(packed_k, x.k_begin(b), k);
    copy_rows(packed_v, x.k_begin(b), v);
  }
};

// Standard normal in the rows that count, NaN in all others.
inline void fill_rows(Tensor& tensor, const PackedProblem& x, bool keys, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  for (int b = 0; b < x.batch(); ++b) {
    const int begin = keys ? x.k_begin(b) : x.q_begin(b);
    const int rows = keys ? x.seqlen_kv(b) : x.seqlen_q(b);
    for (int s = begin; s < begin + rows; ++s)
      for (int h = 0; h < tensor.heads; ++h) {
        const int size = random() % 8 != 0 ? 1 : 4;
        for (int d = 0; d < tensor.head_dim; ++d) tensor.set(0, s, h, d, size * normal(random));
      }
  }
}

inline AttentionParams packed_params(const PackedProblem& x, const GuardedInts& cu_seqlens_q,
                                     const GuardedInts& cu_seqlens_k, const GuardedInts& seqused_k,
                                     AttentionParams p) {
  p.batch = x.batch();
  p.seqlen_q = x.max_seqlen_q, p.seqlen_kv = x.max_seqlen_k;
  p.q_batch_stride = p.k_batch_stride = p.v_batch_stride = p.o_batch_stride = 0;
  p.sequences.cu_seqlens_q = cu_seqlens_q.data();
  p.sequences.cu_seqlens_k = cu_seqlens_k.data();
  p.sequences.seqused_k = x.seqused_k.empty() ? nullptr : seqused_k.data();
  p.sequences.total_q = x.total_q, p.sequences.total_k = x.total_k;
  return p;
}

// Like check of attention_problem.h.
inline bool check_packed(const std::string& name, const PackedProblem& x, uint64_t seed,
                         const LaunchForward& launch) {
  std::mt19937_64 random(seed);
  const DType dtype = random() % 2 ? DType::float16 : DType::bfloat16;
  const bool heads_first = random() % 2;
  Tensor q(dtype, 1, x.total_q, x.all.heads_q, x.all.head_dim, 8, heads_first);
  Tensor k(dtype, 1, x.total_k, x.all.heads_kv, x.all.head_dim, 8, heads_first);
  Tensor v(dtype, 1, x.total_k, x.all.heads_kv, x.all.value_dim(), 8, !heads_first);
  Tensor out(dtype, 1, x.total_q, x.all.heads_q, x.all.value_dim(), 8, heads_first);
  fill_rows(q, x, false, random), fill_rows(k, x, true, random), fill_rows(v, x, true, random);
  // Nobody may see more of a sequence than it has: in one of them everything is NaN.
  const int poisoned = static_cast<int>(random() % (2u * static_cast<unsigned>(x.batch())));
  if (poisoned < x.batch()) {
    for (int s = x.q_begin(poisoned); s < x.q_begin(poisoned) + x.seqlen_q(poisoned); ++s)
      for (int h = 0; h < x.all.heads_q; ++h)
        for (int d = 0; d < x.all.head_dim; ++d) q.set(0, s, h, d, NAN);
    for (int s = x.k_begin(poisoned); s < x.k_begin(poisoned) + x.seqlen_kv(poisoned); ++s)
      for (int h = 0; h < x.all.heads_kv; ++h)
        for (Tensor* tensor : {&k, &v})
          for (int d = 0; d < tensor->head_dim; ++d) tensor->set(0, s, h, d, NAN);
  }
  std::fill(out.bytes.begin(), out.bytes.end(), POISON);
  std::vector<float> lse(static_cast<size_t>(x.all.heads_q) * x.total_q, NAN);
  const float scale = 1 / std::sqrt(static_cast<float>(x.all.head_dim));
  // Of bad lengths nothing is asked but that nobody reads or writes elsewhere, and that it ends.
  const bool bad = random() % 6 == 0;
  const GuardedInts cu_seqlens_q(maybe_bad(x.cu_seqlens_q, bad, x.total_q, random));
  const GuardedInts cu_seqlens_k(maybe_bad(x.cu_seqlens_k, bad, x.total_k, random));
  const GuardedInts seqused_k(maybe_bad(x.seqused_k, bad, x.total_k, random));
  const RandomTerms terms(x.all, random);
  fake_device.sm_count = 1 + static_cast<int>(random() % 3);
  fake_device.seed = random();
  AttentionParams params = packed_params(x, cu_seqlens_q, cu_seqlens_k, seqused_k,
                                         forward_params(q, k, v, out, lse, scale, x.all.mask));
  params.terms = terms.get();
  std::string wrong = launch(params, dtype, random);
  for (int b = 0; b < x.batch() && wrong.empty() && !bad; ++b) {
    if (b == poisoned) continue;
    OneSequence mine(x, b, q, k, v);
    Tensor mine_out(dtype, 1, x.seqlen_q(b), x.all.heads_q, x.all.value_dim(), 0, false);
    copy_rows(out, x.q_begin(b), mine_out);
    std::vector<float> mine_lse;
    for (int h = 0; h < x.all.heads_q; ++h)
      for (int s = 0; s < x.seqlen_q(b); ++s)
        mine_lse.push_back(lse[static_cast<size_t>(h) * x.total_q + x.q_begin(b) + s]);
    wrong = compare(mine.q, mine.k, mine.v, mine_out, mine_lse, scale, x.all.mask,
                    terms_of(terms, b), b);
    if (!wrong.empty()) wrong = "sequence " + std::to_string(b) + ": " + wrong;
  }
  for (int s = x.cu_seqlens_q.back(); s < x.total_q && wrong.empty() && !bad; ++s)
    for (int h = 0; h < x.all.heads_q; ++h) {
      bool zero = lse[static_cast<size_t>(h) * x.total_q + s] == -INFINITY;
      for (int d = 0; d < x.all.value_dim(); ++d) zero = zero && out.get(0, s, h, d) == 0;
      if (!zero) wrong = "row " + std::to_string(s) + " is in no sequence, and not 0 and -infinity";
    }
  const long long touched = wrong.empty() ? written_outside(out) : 0;
  if (touched > 0) wrong = std::to_string(touched) + " bytes written outside the rows of out";
  if (wrong.empty()) return true;
  std::printf("%s, %s, %s, seed %llu: %s\n", name.c_str(), x.text().c_str(),
              dtype == DType::float16 ? "float16" : "bfloat16",
              static_cast<unsigned long long>(seed), wrong.c_str());
  return false;
}

}  // namespace flashmoe
