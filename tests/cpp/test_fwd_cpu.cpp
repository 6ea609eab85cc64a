// The CPU forward kernel against plain computations in float64 and float32: odd sizes, dtypes, GQA,
// causal, windows, terms of scores, packed, cached and paged sequences, strides, tiles, instruction
// sets and thread counts. Every buffer, and the padding between its rows, is NaN where nothing may
// be read, and outputs are poisoned first.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/forward/cpu/forward.h"
#include "attention_reference.h"

using namespace flashmoe;

namespace {

int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      ++failures;                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

constexpr Mask FULL{-1, -1}, CAUSAL{-1, 0};

struct Case {
  int batch, seqlen_q, seqlen_kv, heads_q, heads_kv, head_dim;
  Mask mask;
  DType dtype = DType::float32;
  int block_m = 64, block_n = 64, threads = 2, pad = 0;
  bool heads_first = false;
  float scale = 0;  // 0: 1 / sqrt(head_dim)
  CpuIsa isa = CpuIsa::generic;
  float softcap = 0;
  bool alibi = false, sink = false, dropout = false;
  int head_dim_v = 0;  // 0: head_dim

  int value_dim() const { return head_dim_v != 0 ? head_dim_v : head_dim; }
  std::string name() const {
    char text[256];
    std::snprintf(text, sizeof(text),
                  "b%d sq%d skv%d hq%d hkv%d d%d,%d window%d,%d dtype%d tile%dx%d threads%d pad%d "
                  "heads_first%d isa%d softcap%g alibi%d sink%d dropout%d",
                  batch, seqlen_q, seqlen_kv, heads_q, heads_kv, head_dim, value_dim(), mask.left,
                  mask.right, static_cast<int>(dtype), block_m, block_n, threads, pad, heads_first,
                  static_cast<int>(isa), softcap, alibi, sink, dropout);
    return text;
  }
};

void parallel_for_threads(long long begin, long long end, long long grain, ParallelRange body,
                          void* context) {
  std::vector<std::thread> threads;
  for (long long i = begin; i < end; i += grain) {
    threads.emplace_back(body, i, std::min(i + grain, end), context);
  }
  for (std::thread& thread : threads) thread.join();
}

// Over what is finite: close() wants the rest to be equal.
double largest_error(const std::vector<float>& got, const std::vector<double>& want) {
  double largest = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]);
    if (std::isfinite(error)) largest = std::fmax(largest, error);
  }
  return largest;
}

// At least 1.
double largest_magnitude(const std::vector<double>& values) {
  double largest = 1;
  for (double x : values) {
    if (std::isfinite(x)) largest = std::fmax(largest, std::fabs(x));
  }
  return largest;
}

bool close(double got, double want, double bound) {
  if (std::isfinite(want)) return std::fabs(got - want) <= bound;
  return got == want || (std::isnan(got) && std::isnan(want));
}

struct Problem {
  Case c;
  Tensor q, k, v, out;
  std::vector<float> lse, slopes, sinks;
  long long rng_state[2];

  Problem(const Case& c, unsigned seed)
      : c(c),
        q(c.dtype, c.batch, c.seqlen_q, c.heads_q, c.head_dim, c.pad, c.heads_first),
        k(c.dtype, c.batch, c.seqlen_kv, c.heads_kv, c.head_dim, c.pad, c.heads_first),
        v(c.dtype, c.batch, c.seqlen_kv, c.heads_kv, c.value_dim(), c.pad, !c.heads_first),
        out(c.dtype, c.batch, c.seqlen_q, c.heads_q, c.value_dim(), c.pad, c.heads_first) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    for (Tensor* tensor : {&q, &k, &v}) tensor->fill([&] { return normal(engine); });
    for (int i = 0; i < c.batch * c.heads_q; ++i) {
      slopes.push_back(std::ldexp(1.0f, -static_cast<int>(engine() % 9)));
    }
    for (int i = 0; i < c.heads_q; ++i) sinks.push_back(static_cast<float>(3 * normal(engine)));
    for (long long& x : rng_state) x = static_cast<long long>(engine()) << 32 | engine();
  }

  float scale() const {
    return c.scale != 0 ? c.scale : 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  }

  Terms terms() const {
    return {c.alibi ? slopes.data() : nullptr,
            c.heads_q,
            c.sink ? sinks.data() : nullptr,
            c.dropout ? rng_state : nullptr,
            45000,
            c.softcap,
            {}};
  }

  AttentionParams params() {
    AttentionParams params = forward_params(q, k, v, out, lse, scale(), c.mask);
    params.terms = terms();
    return params;
  }

  void poison_outputs() {
    std::fill(out.bytes.begin(), out.bytes.end(), POISON);
    lse.assign(static_cast<size_t>(c.batch) * c.heads_q * c.seqlen_q + 16, -12345.0f);
  }

  void run() {
    poison_outputs();
    fwd_cpu(params(), c.dtype, c.block_m, c.block_n, c.isa, parallel_for_threads, c.threads);
  }

  // Against float64, the kernel may err twice as much as the plain computation in float32, and by
  // the rounding of the reference. The largest of few errors is a matter of luck, and one
  // computation may be lucky throughout, so the plain one is made with head_dim in several orders.
  void check() {
    std::vector<int> order(c.head_dim);
    std::iota(order.begin(), order.end(), 0);
    const Result<double> want = reference<double>(q, k, v, scale(), c.mask, order, terms());
    double out_error = 0, lse_error = 0;
    std::mt19937 engine(0);
    for (int i = 0; i < 8; ++i) {
      const Result<float> plain = reference<float>(q, k, v, scale(), c.mask, order, terms());
      out_error = std::fmax(out_error, largest_error(plain.out, want.out));
      lse_error = std::fmax(lse_error, largest_error(plain.lse, want.lse));
      std::shuffle(order.begin(), order.end(), engine);
    }
    const double out_bound = 2 * out_error + 0x1p-23 * largest_magnitude(want.out);
    const double lse_bound = 2 * lse_error + 0x1p-23 * largest_magnitude(want.lse);

    const Values<double> got(out);
    for (size_t r = 0; r < want.lse.size(); ++r) {
      const int i = r % c.seqlen_q, h = r / c.seqlen_q % c.heads_q, b = r / c.seqlen_q / c.heads_q;
      CHECK(close(lse[r], want.lse[r], lse_bound),
            "lse %.9g, want %.9g within %.3g at b%d h%d i%d of %s", lse[r], want.lse[r], lse_bound,
            b, h, i, c.name().c_str());
      for (int d = 0; d < c.value_dim(); ++d) {
        const double want_d = want.out[r * c.value_dim() + d], got_d = got.row(b, i, h)[d];
        CHECK(close(got_d, want_d, out_bound + half_ulp(c.dtype, want_d)),
              "out %.9g, want %.9g within %.3g at b%d h%d i%d d%d of %s", got_d, want_d, out_bound,
              b, h, i, d, c.name().c_str());
        if (failures > 20) std::exit(1);
      }
    }
    check_nothing_else_written();
  }

  // What is not an output element still holds the poison.
  void check_nothing_else_written() {
    const long long touched = written_outside(out);
    CHECK(touched == 0, "%lld bytes outside the output rows of %s", touched, c.name().c_str());
    for (size_t i = lse.size() - 16; i < lse.size(); ++i) {
      CHECK(lse[i] == -12345.0f, "lse written behind its end in %s", c.name().c_str());
    }
  }
};

std::vector<CpuIsa> available_isas() {
  std::vector<CpuIsa> isas;
  for (int isa = 0; isa <= static_cast<int>(best_cpu_isa()); ++isa) {
    isas.push_back(static_cast<CpuIsa>(isa));
  }
  return isas;
}

using Random = std::mt19937;
int below(Random& random, int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); }

// A mask narrower than a register tile or wider than a block, open on one side or on none.
Mask random_mask(Random& random, int seqlen_q, int seqlen_kv) {
  const auto limit = [&](int seqlen) {
    if (below(random, 4) == 0 || seqlen == 0) return -1;
    return below(random, std::min(seqlen, below(random, 2) ? 10 : 160));
  };
  return {limit(seqlen_kv), limit(seqlen_q)};
}

// Known answers of the authors' library (Random123, kat_vectors).
void test_philox() {
  const unsigned f = 0xffffffff;
  const Philox zeros = philox({{0, 0, 0, 0}}, 0, 0), ones = philox({{f, f, f, f}}, f, f);
  const Philox pi =
      philox({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0);
  const unsigned want[3][4] = {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48},
                               {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662},
                               {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}};
  for (int i = 0; i < 4; ++i) {
    CHECK(zeros.x[i] == want[0][i] && ones.x[i] == want[1][i] && pi.x[i] == want[2][i], "word %d",
          i);
  }
}

// Each term in two cases of three.
void add_random_terms(Random& random, Case& c) {
  const float softcaps[] = {0, 0.5f, 15};
  c.softcap = softcaps[below(random, 3)];
  c.alibi = below(random, 3) > 0;
  c.sink = below(random, 3) > 0;
  c.dropout = below(random, 3) > 0;
}

void test_against_reference(CpuIsa isa) {
  const DType f32 = DType::float32, f16 = DType::float16, bf16 = DType::bfloat16;
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 1, 8, FULL},
      {1, 1, 1, 1, 1, 8, CAUSAL},
      {2, 7, 13, 3, 3, 8, FULL, f32, 5, 3},
      {1, 13, 7, 2, 1, 16, CAUSAL, f32, 5, 3},  // the first six rows see nothing
      {1, 64, 64, 2, 2, 64, FULL, f32, 64, 64},
      {1, 65, 129, 2, 2, 64, CAUSAL, f32, 64, 64, 5, 8},
      {2, 127, 131, 4, 2, 40, CAUSAL, f32, 24, 16, 1, 3, true},
      {1, 50, 50, 8, 1, 24, CAUSAL, f32, 7, 9, 2, 1},
      {1, 1, 257, 8, 2, 128, CAUSAL, f32, 32, 48, 5},
      {1, 3, 300, 6, 6, 128, FULL, f32, 1000, 1000, 2},
      {1, 100, 100, 1, 1, 256, CAUSAL, f32, 48, 1, 2, 0, true},
      {1, 77, 66, 2, 2, 248, FULL, f32, 1, 64, 2, 5},
      {3, 33, 47, 2, 1, 72, CAUSAL, f32, 1 << 30, 1 << 30, 2},
      {1, 96, 200, 2, 2, 64, FULL, f16, 48, 32, 2, 8},
      {1, 61, 61, 4, 2, 88, CAUSAL, f16, 30, 20, 5, 1, true},
      {1, 96, 200, 2, 2, 64, FULL, bf16, 48, 32, 2, 8},
      {2, 61, 62, 4, 2, 136, CAUSAL, bf16, 30, 20, 5, 1, true},
      {1, 40, 40, 1, 1, 32, CAUSAL, f32, 16, 16, 2, 0, false, 3.0f},  // peaked rows, rescaling
      {1, 200, 200, 2, 2, 64, {31, 0}, f32, 64, 64},
      {1, 131, 131, 2, 1, 40, {0, 0}, f32, 64, 16, 3, 3},  // the diagonal
      {1, 150, 150, 1, 1, 64, {3, 5}, f32, 96, 32},        // narrower than a register tile
      {1, 90, 170, 6, 2, 32, {37, 11}, f16, 50, 24, 2, 1, true},
      {1, 170, 90, 2, 2, 64, {20, 7}, f32, 64, 64},  // the first 73 rows see nothing
      {2, 170, 31, 4, 2, 48, {-1, 5}, bf16, 30, 20, 5, 1},
      {1, 64, 300, 3, 1, 72, {45, -1}, f32, 48, 40},  // the first keys are seen by nobody
      {1, 300, 300, 1, 1, 64, {200, 150}, f32, 128, 48},
      {1, 1, 257, 8, 2, 128, {100, 0}, f32, 32, 48, 5},
      {1, 100, 100, 1, 1, 32, {9, 2}, f32, 64, 16, 2, 0, false, 3.0f},
  };
  unsigned seed = 1;
  for (Case c : cases) {
    c.isa = isa;
    Problem problem(c, seed++);
    problem.run();
    problem.check();
  }
}

// Every head_dim, and every remainder of rows and keys by the register tiles.
void test_sweeps(CpuIsa isa) {
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    const DType dtype = static_cast<DType>(head_dim / 8 % 3);
    Problem problem({1, 29, 31, 1, 1, head_dim, head_dim % 16 == 0 ? CAUSAL : FULL, dtype, 17, 12,
                     2, 8, false, 0, isa},
                    head_dim);
    problem.run();
    problem.check();
    Case narrow{1, 9, 21, 2, 1, head_dim, CAUSAL, dtype, 17, 12, 2, 8, false, 0, isa};
    narrow.head_dim_v = 264 - head_dim;
    Problem of_two(narrow, head_dim);
    of_two.run();
    of_two.check();
  }
  for (int seqlen = 1; seqlen <= 100; ++seqlen) {
    Problem problem({1, seqlen, 101 - seqlen, 2, 1, 24, seqlen % 2 ? FULL : CAUSAL, DType::float32,
                     1000, 40, 1, 0, true, 0, isa},
                    seqlen);
    problem.run();
    problem.check();
  }
}

void test_random_problems(CpuIsa isa) {
  Random random(17);
  for (int round = 0; round < 300; ++round) {
    Case c{1 + below(random, 2),
           1 + below(random, 160),
           1 + below(random, 160),
           1 + below(random, 5),
           1,
           8 * (1 + below(random, 5)),
           FULL};
    if (below(random, 3) == 0) c.seqlen_q = c.seqlen_kv;
    c.mask = random_mask(random, c.seqlen_q, c.seqlen_kv);
    c.heads_kv += below(random, 2);
    c.heads_q *= c.heads_kv;
    c.dtype = static_cast<DType>(below(random, 3));
    c.block_m = 1 + below(random, 130), c.block_n = 1 + below(random, 60);
    c.threads = 1 + below(random, 3), c.pad = below(random, 3);
    c.heads_first = below(random, 2) == 0;
    if (below(random, 4) == 0) c.scale = 3;
    if (round % 2) add_random_terms(random, c);
    c.isa = isa;
    Problem problem(c, 1000 + round);
    problem.run();
    problem.check();
  }
}

enum class Keys { packed, cache, paged };

// A dense problem for each sequence, and one call whose tensors hold them all: NaN but for their
// rows. What it gives them is checked as if they had been computed alone.
struct Batch {
  std::vector<Problem*> problems;
  bool packed_q;
  Keys keys;

  // Sets what is described of sequences and runs them. Some keys in front and behind are not used,
  // batches and pages are in any order, and what a table holds behind them is no page.
  void run(Random& random) {
    const int batch = static_cast<int>(problems.size());
    const Case& c = problems[0]->c;
    int max_seqlen_q = 0, max_seqlen_k = 0;
    std::vector<int> cu_seqlens_q{packed_q ? below(random, 4) : 0}, cu_seqlens_k{below(random, 4)};
    std::vector<int> seqused_k, leftpad_k, cache_batch_idx, block_table;
    for (const Problem* problem : problems) {
      const int pad = below(random, 2) * below(random, 20), used = pad + problem->c.seqlen_kv;
      leftpad_k.push_back(pad);
      seqused_k.push_back(used);
      cu_seqlens_q.push_back(cu_seqlens_q.back() + problem->c.seqlen_q);
      cu_seqlens_k.push_back(cu_seqlens_k.back() + used + below(random, 2) * below(random, 9));
      max_seqlen_q = std::max(max_seqlen_q, problem->c.seqlen_q);
      max_seqlen_k = std::max(max_seqlen_k, cu_seqlens_k.back() - *(cu_seqlens_k.end() - 2));
    }
    const int total_q = cu_seqlens_q.back() + below(random, 5);
    const int total_k = cu_seqlens_k.back() + below(random, 5);
    const int page_size = 1 + below(random, 40);
    const int pages = (max_seqlen_k + page_size - 1) / page_size + below(random, 3);
    const int batches = batch + below(random, 3);
    std::vector<int> numbers(keys == Keys::paged ? pages * batch + 2 : batches);
    std::iota(numbers.begin(), numbers.end(), 0);
    std::shuffle(numbers.begin(), numbers.end(), random);
    cache_batch_idx.assign(numbers.begin(), numbers.begin() + batch);
    for (int i = 0; i < batch; ++i) {
      for (int page = 0; keys == Keys::paged && page < pages; ++page) {
        const bool used = page * page_size < seqused_k[i] && (page + 1) * page_size > leftpad_k[i];
        block_table.push_back(used ? numbers[i * pages + page] : below(random, 2) ? -1 : 1 << 30);
      }
    }

    Tensor q(c.dtype, packed_q ? 1 : batch, packed_q ? total_q : max_seqlen_q, c.heads_q,
             c.head_dim, c.pad, c.heads_first);
    Tensor out(c.dtype, q.batch, q.seqlen, q.heads, q.head_dim, c.pad, !c.heads_first);
    const int k_batches = keys == Keys::packed ? 1 : static_cast<int>(numbers.size());
    const int k_rows = keys == Keys::packed  ? total_k
                       : keys == Keys::cache ? max_seqlen_k
                                             : page_size;
    Tensor k(c.dtype, k_batches, k_rows, c.heads_kv, c.head_dim, c.pad, c.heads_first);
    Tensor v(c.dtype, k_batches, k_rows, c.heads_kv, c.head_dim, c.pad, !c.heads_first);
    std::fill(out.bytes.begin(), out.bytes.end(), POISON);

    const auto copy_row = [&](Tensor& from, int b, int s, Tensor& to, int to_b, int to_s) {
      for (int h = 0; h < from.heads; ++h) {
        std::memcpy(to.at(to_b, to_s, h, 0), from.at(b, s, h, 0), c.head_dim * size_of(c.dtype));
      }
    };
    std::vector<float> slopes;
    for (int i = 0; i < batch; ++i) {
      Problem& problem = *problems[i];
      for (int row = 0; row < problem.c.seqlen_q; ++row) {
        copy_row(problem.q, 0, row, q, packed_q ? 0 : i, (packed_q ? cu_seqlens_q[i] : 0) + row);
      }
      for (int key = 0; key < problem.c.seqlen_kv; ++key) {
        const int position = leftpad_k[i] + key;
        int b = 0, s = cu_seqlens_k[i] + position;
        if (keys == Keys::cache) b = cache_batch_idx[i], s = position;
        if (keys == Keys::paged) {
          b = block_table[i * pages + position / page_size], s = position % page_size;
        }
        copy_row(problem.k, 0, key, k, b, s);
        copy_row(problem.v, 0, key, v, b, s);
      }
      problem.sinks = problems[0]->sinks;
      problem.rng_state[0] = problems[0]->rng_state[0];
      problem.rng_state[1] = problems[0]->rng_state[1] + i;
      slopes.insert(slopes.end(), problem.slopes.begin(), problem.slopes.end());
    }

    std::vector<float> lse(static_cast<size_t>(q.batch) * q.heads * q.seqlen, -12345.0f);
    AttentionParams params = forward_params(q, k, v, out, lse, problems[0]->scale(), c.mask);
    params.terms = problems[0]->terms();
    params.terms.alibi_slopes = c.alibi ? slopes.data() : nullptr;
    params.batch = batch;
    params.seqlen_q = max_seqlen_q;
    params.seqlen_kv = keys == Keys::paged ? pages * page_size : max_seqlen_k;
    Sequences& sequences = params.sequences;
    sequences.total_q = packed_q ? total_q : max_seqlen_q;
    sequences.total_k = total_k;
    sequences.num_pages = k_batches;
    sequences.page_size = k_rows;
    sequences.leftpad_k = leftpad_k.data();
    sequences.seqused_k = seqused_k.data();
    if (packed_q) {
      sequences.cu_seqlens_q = cu_seqlens_q.data();
      params.q_batch_stride = params.o_batch_stride = 1 << 30;  // not used
    }
    if (keys == Keys::packed) {
      sequences.cu_seqlens_k = cu_seqlens_k.data();
      params.k_batch_stride = params.v_batch_stride = 1 << 30;
    }
    if (keys == Keys::cache) sequences.cache_batch_idx = cache_batch_idx.data();
    if (keys == Keys::paged) {
      sequences.block_table = block_table.data();
      sequences.block_table_stride = pages;
    }
    fwd_cpu(params, c.dtype, c.block_m, c.block_n, c.isa, parallel_for_threads, c.threads);

    const long long touched = written_outside(out);
    CHECK(touched == 0, "%lld bytes outside the output rows of %s", touched, c.name().c_str());
    for (int i = 0; i < batch; ++i) {
      Problem& problem = *problems[i];
      problem.poison_outputs();
      for (int row = 0; row < problem.c.seqlen_q; ++row) {
        const int b = packed_q ? 0 : i, s = (packed_q ? cu_seqlens_q[i] : 0) + row;
        copy_row(out, b, s, problem.out, 0, row);
        for (int h = 0; h < q.heads; ++h) {
          problem.lse[h * problem.c.seqlen_q + row] = lse[(b * q.heads + h) * q.seqlen + s];
        }
      }
      problem.check();
    }
    for (int row = 0; packed_q && row < total_q; ++row) {
      if (row >= cu_seqlens_q[0] && row < cu_seqlens_q[batch]) continue;
      for (int h = 0; h < q.heads; ++h) {
        CHECK(lse[h * total_q + row] == -INFINITY, "lse %g of row %d in no sequence of %s",
              lse[h * total_q + row], row, c.name().c_str());
        for (int d = 0; d < q.head_dim; ++d) {
          CHECK(out.get(0, row, h, d) == 0, "out %g of row %d in no sequence of %s",
                out.get(0, row, h, d), row, c.name().c_str());
        }
      }
    }
  }
};

void test_random_sequences(CpuIsa isa) {
  Random random(23);
  for (int round = 0; round < 240; ++round) {
    Case c{1, 0, 0, 1 + below(random, 4), 1 + below(random, 2), 8 * (1 + below(random, 9)), FULL};
    c.heads_q *= c.heads_kv;
    c.dtype = static_cast<DType>(below(random, 3));
    c.block_m = 1 + below(random, 130), c.block_n = 1 + below(random, 60);
    c.threads = 1 + below(random, 3), c.pad = below(random, 3);
    c.heads_first = below(random, 2) == 0;
    if (below(random, 2)) c.mask = random_mask(random, 100, 100);
    if (below(random, 2)) add_random_terms(random, c);
    c.isa = isa;
    Batch all{{}, below(random, 3) > 0, static_cast<Keys>(round % 3)};
    std::vector<std::unique_ptr<Problem>> problems;
    const int longest = below(random, 3) ? 90 : 3;
    const int batch = 1 + below(random, 5), same_q = 1 + below(random, longest);
    for (int i = 0; i < batch; ++i) {
      const auto length = [&] {
        return below(random, 4) ? 1 + below(random, longest) : below(random, 2);
      };
      c.seqlen_q = all.packed_q ? length() : same_q;
      c.seqlen_kv = length();
      problems.push_back(std::make_unique<Problem>(c, 5000 + 10 * round + i));
      all.problems.push_back(problems.back().get());
    }
    all.run(random);
  }
}

// Keys before the first row's window lie on pages that cannot be read.
void test_keys_outside_the_window_are_not_read(CpuIsa isa) {
  Case c{1, 40, 2000, 2, 1, 64, {31, 0}, DType::float32, 16, 64, 2, 0, false, 0, isa};
  Problem problem(c, 5);
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto protect = [&](int protection) {
    for (Tensor* tensor : {&problem.k, &problem.v}) {
      const auto address = [&](int key) {
        return reinterpret_cast<uintptr_t>(tensor->at(0, key, 0, 0));
      };
      const uintptr_t begin = (address(0) + page - 1) / page * page;
      const uintptr_t end = address(c.seqlen_kv - c.seqlen_q - c.mask.left) / page * page;
      CHECK(end > begin, "no page lies before the window");
      CHECK(mprotect(reinterpret_cast<void*>(begin), end - begin, protection) == 0, "of %zu bytes",
            static_cast<size_t>(end - begin));
    }
  };
  protect(PROT_NONE);
  problem.run();
  protect(PROT_READ | PROT_WRITE);
  problem.check();
}

// Values so large that their sum overflows before it is divided: keys are visited a second time.
void test_large_values(CpuIsa isa) {
  for (Mask mask : {FULL, CAUSAL, Mask{20, 3}, Mask{-1, 9}, Mask{50, -1}}) {
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      Case c{1, 70, 60, 2, 1, 24, mask, dtype, 48, 16, 2, 0, false, 0, isa};
      Problem problem(c, 3);
      std::mt19937 engine(4);
      problem.v.fill([&] { return std::ldexp(1 + engine() % 32 / 64., 127); });
      problem.run();
      std::vector<int> order(c.head_dim);
      std::iota(order.begin(), order.end(), 0);
      const auto want =
          reference<double>(problem.q, problem.k, problem.v, problem.scale(), mask, order);
      const Values<double> got(problem.out);
      for (size_t r = 0; r < want.lse.size(); ++r) {
        const int i = r % c.seqlen_q, h = r / c.seqlen_q;
        CHECK(close(problem.lse[r], want.lse[r], 1e-5), "lse %.9g, want %.9g at h%d i%d of %s",
              problem.lse[r], want.lse[r], h, i, c.name().c_str());
        for (int d = 0; d < c.head_dim; ++d) {
          const double want_d = want.out[r * c.head_dim + d], got_d = got.row(0, i, h)[d];
          CHECK(close(got_d, want_d, 0x1p-20 * want_d + half_ulp(dtype, want_d)),
                "out %.9g, want %.9g at h%d i%d d%d of %s", got_d, want_d, h, i, d,
                c.name().c_str());
          if (failures > 20) std::exit(1);
        }
      }
    }
  }
}

void test_empty(CpuIsa isa) {
  const std::vector<Case> cases = {
      {0, 4, 4, 2, 1, 16, FULL},   {1, 0, 4, 2, 1, 16, CAUSAL}, {2, 5, 0, 2, 1, 16, FULL},
      {2, 5, 0, 2, 1, 16, CAUSAL}, {0, 0, 0, 1, 1, 8, FULL},
  };
  for (Case c : cases) {
    c.isa = isa;
    Problem problem(c, 1);
    problem.run();
    problem.check();
  }
}

// NaN and inf reach exactly the rows that see them: the reference reads nothing else.
void test_special_values(CpuIsa isa) {
  const double special[] = {NAN, INFINITY, -INFINITY};
  for (DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (int position = 0; position < 60; position += 7) {
      for (int which = 0; which < 9; ++which) {
        const Mask mask = position % 2 ? CAUSAL : Mask{17, 4};
        Case c{1, 70, 61, 2, 1, 40, mask, dtype, 48, 16, 2, 3, false, 0, isa};
        Problem problem(c, 100 + position);
        Tensor& tensor = which < 3 ? problem.q : which < 6 ? problem.k : problem.v;
        tensor.set(0, position, 0, position % 40, special[which % 3]);
        problem.run();
        problem.check();
      }
    }
  }
  // Everything from one key on is NaN, or up to it: rows that see none of it stay finite.
  for (Mask mask : {CAUSAL, Mask{13, 2}}) {
    Case c{1, 64, 64, 1, 1, 64, mask, DType::float32, 24, 16, 2, 0, false, 0, isa};
    for (int first = 0; first < 64; ++first) {
      Problem problem(c, first);
      const bool up_to = mask.left >= 0 && first % 2;
      for (int n = up_to ? 0 : first; n < (up_to ? first : 64); ++n) {
        for (int d = 0; d < 64; ++d) problem.k.set(0, n, 0, d, NAN), problem.v.set(0, n, 0, d, NAN);
      }
      problem.run();
      problem.check();
    }
  }
}

// With one key of score 0, out is v: every 16-bit value must come back. With two adjacent values,
// out is their midpoint: it must go to the even one.
void test_conversions(CpuIsa isa) {
  for (DType dtype : {DType::float16, DType::bfloat16}) {
    for (int keys = 1; keys <= 2; ++keys) {
      Case c{1024, 1, keys, 1, 1, 64, FULL, dtype, 8, 8, 2, 0, false, 0, isa};
      Problem problem(c, 1);
      problem.q.fill([] { return 0.0; });
      problem.k.fill([] { return 0.0; });
      for (int i = 0; i < 65536; ++i) {
        for (int n = 0; n < keys; ++n) {
          const uint16_t bits = static_cast<uint16_t>(i + n);
          std::memcpy(problem.v.at(i / 64, n, 0, i % 64), &bits, 2);
        }
      }
      problem.run();
      const int infinity = dtype == DType::float16 ? 0x7c00 : 0x7f80;
      // The sum of the two largest bfloat16 values is not a float32.
      const int last = keys == 1 ? infinity : dtype == DType::float16 ? infinity - 2 : 0x7effu;
      for (int i = 0; i < 65536; ++i) {
        uint16_t got;
        std::memcpy(&got, problem.out.at(i / 64, 0, 0, i % 64), 2);
        const int magnitude = i & 0x7fff;
        if (magnitude > infinity) {
          CHECK((got & 0x7fff) > infinity, "NaN 0x%04x gave 0x%04x, dtype %d", i, got,
                static_cast<int>(dtype));
        } else if (magnitude <= last) {
          const int want = keys == 1 ? i : i + (i & 1);
          // 0 * x + v turns -0 into +0.
          CHECK(got == want || (got == 0 && want == 0x8000), "0x%04x gave 0x%04x, want 0x%04x", i,
                got, want);
        }
        if (failures > 20) std::exit(1);
      }
    }
  }
}

void test_threads_do_not_change_the_result(CpuIsa isa) {
  for (Mask mask : {CAUSAL, Mask{40, -1}, Mask{40, 10}}) {
    Case c{2, 150, 170, 4, 2, 64, mask, DType::float32, 32, 48, 1, 0, false, 0, isa};
    Problem problem(c, 9);
    problem.run();
    const std::vector<uint8_t> out(problem.out.bytes.begin(), problem.out.bytes.end());
    const auto lse = problem.lse;
    for (int threads : {2, 5}) {
      problem.c.threads = threads;
      problem.run();
      CHECK(std::equal(out.begin(), out.end(), problem.out.bytes.begin()) && lse == problem.lse,
            "%s", problem.c.name().c_str());
    }
  }
}

void test_bad_arguments() {
  const Case good{1, 4, 4, 2, 1, 16, FULL};
  std::vector<std::pair<Case, const char*>> bad(11, {good, "got 12"});
  bad[0].first.head_dim = 12;
  bad[1].first.head_dim = 264, bad[1].second = "got 264";
  bad[2].first.heads_kv = 3, bad[2].second = "heads_kv";
  bad[3].first.block_m = 0, bad[3].second = "block_m";
  bad[4].first.block_n = -5, bad[4].second = "got -5";
  bad[5].first.isa = static_cast<CpuIsa>(7), bad[5].second = "isa";
  bad[6].first.dtype = static_cast<DType>(9), bad[6].second = "dtype";
  bad[7].first.scale = -0.5f, bad[7].second = "softmax_scale must be finite and positive, got -0.5";
  bad[8].first.scale = INFINITY, bad[8].second = "softmax_scale";
  bad[9].first.scale = NAN, bad[9].second = "softmax_scale";
  bad[10].first.head_dim_v = 20, bad[10].second = "got 20";
  for (const auto& [c, expected] : bad) {
    Case shape = c;
    shape.dtype = DType::float32;
    Problem problem(shape, 1);
    problem.c = c;
    std::string message;
    try {
      problem.run();
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    CHECK(message.find(expected) != std::string::npos, "message '%s' lacks '%s'", message.c_str(),
          expected);
  }
}

// Before anything else asks for the instruction set, which is detected once.
void test_isa_variable() {
  for (const char* value : {"avx9", "AVX2"}) {
    setenv("FLASHMOE_CPU_ISA", value, 1);
    std::string message;
    try {
      best_cpu_isa();
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    const std::string quoted = "'" + std::string(value) + "'";
    CHECK(message.find(quoted) != std::string::npos, "message '%s' lacks %s", message.c_str(),
          quoted.c_str());
  }
  setenv("FLASHMOE_CPU_ISA", "", 1);  // as good as not set
  best_cpu_isa();
  unsetenv("FLASHMOE_CPU_ISA");
}

}  // namespace

int main() {
  test_philox();
  test_isa_variable();
  test_bad_arguments();
  for (CpuIsa isa : available_isas()) {
    test_against_reference(isa);
    test_sweeps(isa);
    test_random_problems(isa);
    test_random_sequences(isa);
    test_keys_outside_the_window_are_not_read(isa);
    test_large_values(isa);
    test_empty(isa);
    test_special_values(isa);
    test_conversions(isa);
    test_threads_do_not_change_the_result(isa);
  }
  std::printf("%d failures, instruction sets up to %d\n", failures,
              static_cast<int>(best_cpu_isa()));
  return failures != 0;
}
