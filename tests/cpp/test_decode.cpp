// The decode kernel and its launch, on emulator::run: tiles, caches, pages, lengths, masks, terms,
// splits and orders of execution.
#include "emulator/device.h"
// The kernel, with tests/cpp/emulator/ptx in the place of csrc/ptx.
#include "attention_problem.h"
#include "decode/launch.cuh"

using namespace flashmoe;
using namespace flashmoe::decoding;

namespace {

using Random = std::mt19937_64;

int below(Random& random, int n) {
  return static_cast<int>(random() % static_cast<unsigned>(std::max(n, 1)));
}

enum class Keys { dense, cache, paged, packed };

// A call and what it reads. Keys that do not exist, pages that no table names and rows of no
// sequence are NaN; so are the entries of tables behind a sequence's last key, as far as int goes.
struct Case {
  Keys keys;
  bool ragged;  // queries in a packed tensor
  int batch, heads_kv, group, seqlen_q, seqlen_kv, head_dim, page_size, num_splits;
  bool batch_invariant;
  Mask mask;
  std::vector<int> cu_seqlens_q, cu_seqlens_k, seqused, leftpad, batch_idx, table;
  float softcap = 0;
  std::vector<float> slopes, sinks;

  std::string text() const {
    const char* names[] = {"dense", "cache", "paged", "packed"};
    std::string text = std::string(names[static_cast<int>(keys)]) + (ragged ? " ragged" : "");
    for (const int n : {batch, heads_kv * group, heads_kv, seqlen_q, seqlen_kv, head_dim}) {
      text += " " + std::to_string(n);
    }
    text += ", window " + std::to_string(mask.left) + " " + std::to_string(mask.right);
    text += ", splits " + std::to_string(num_splits) + (batch_invariant ? " invariant" : "");
    if (keys == Keys::paged) text += ", pages of " + std::to_string(page_size);
    if (softcap > 0) text += ", softcap";
    if (!slopes.empty()) text += ", alibi";
    if (!sinks.empty()) text += ", sink";
    return text;
  }
};

Case random_case(int head_dim, int block_m, int block_n, Random& random) {
  const auto n = [&](int count) { return below(random, count); };
  Case x{};
  x.keys = static_cast<Keys>(n(4));
  x.ragged = n(3) == 0 || x.keys == Keys::packed;
  x.batch = 1 + n(3);
  x.heads_kv = 1 + n(2);
  x.group = 1 << n(4);
  x.seqlen_q = 1 + (n(2) ? n(std::max(2 * block_m / x.group, 1)) : 0);
  x.seqlen_kv = 1 + n(n(3) ? 4 * block_n : 12 * block_n);
  x.head_dim = head_dim - 8 * n(3);
  x.page_size = n(4) ? 16 * (1 + n(3)) : 1 + n(40);
  x.batch_invariant = n(4) == 0;
  // More parts than are merged at once, now and then.
  x.num_splits = n(5) == 0 ? MERGE_ALL + n(20) : 1 + n(8);
  if (x.batch_invariant) x.num_splits = INVARIANT_SPLITS;
  const auto limit = [&](int seqlen) { return n(3) ? -1 : n(seqlen); };
  x.mask = {limit(x.seqlen_kv), n(2) ? 0 : limit(x.seqlen_q)};
  if (x.ragged) {
    x.cu_seqlens_q = {0};
    for (int b = 0; b < x.batch; ++b) {
      x.cu_seqlens_q.push_back(x.cu_seqlens_q.back() + n(x.seqlen_q + 1));
    }
  }
  if (x.keys == Keys::packed) {
    x.cu_seqlens_k = {0};
    for (int b = 0; b < x.batch; ++b) {
      x.cu_seqlens_k.push_back(x.cu_seqlens_k.back() + n(x.seqlen_kv + 1));
    }
  } else if (x.keys != Keys::dense || n(2)) {
    // Some beyond what there is, or negative: they are clamped.
    for (int b = 0; b < x.batch; ++b) x.seqused.push_back(n(x.seqlen_kv + 8) - 3);
  }
  if (n(3) == 0) {
    for (int b = 0; b < x.batch; ++b) x.leftpad.push_back(n(x.seqlen_kv / 2 + 1) - 1);
  }
  if (n(4) == 0) x.softcap = 1 + n(20);
  if (n(4) == 0) {
    for (int i = 0; i < x.batch * x.heads_kv * x.group; ++i) x.slopes.push_back(0.02f * n(50));
  }
  if (n(4) == 0) {
    for (int i = 0; i < x.heads_kv * x.group; ++i) x.sinks.push_back(-3 + 0.1f * n(60));
    if (n(4) == 0) x.sinks[0] = -INFINITY;
  }
  return x;
}

const int* pointer(const std::vector<int>& x) { return x.empty() ? nullptr : x.data(); }

// Where key j of sequence b is in k and v: batch (or page) and row.
std::pair<int, int> place(const Case& x, const Sequence& sequence, int b, int j) {
  const int position = sequence.k_begin + j;
  if (x.keys == Keys::packed) return {0, position};
  if (x.keys == Keys::dense) return {b, position};
  if (x.keys == Keys::cache) return {x.batch_idx[b], position};
  const int pages = static_cast<int>(x.table.size()) / x.batch;
  return {x.table[b * pages + position / x.page_size], position % x.page_size};
}

// What is wrong with out and softmax_lse, or nothing.
std::string compare(const Case& x, const AttentionParams& p, Tensor& q, Tensor& k, Tensor& v,
                    Tensor& out, const std::vector<float>& lse) {
  const double unit = q.dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
  const int heads_q = x.heads_kv * x.group;
  for (int b = 0; b < x.batch; ++b) {
    const Sequence sequence = sequence_at(p.sequences, b, x.seqlen_q, p.seqlen_kv);
    for (int h = 0; h < heads_q; ++h) {
      for (int i = 0; i < sequence.seqlen_q; ++i) {
        const int qb = x.ragged ? 0 : b, row = sequence.q_begin + i;
        const int level = i + sequence.seqlen_kv - sequence.seqlen_q;
        std::vector<double> scores;
        std::vector<std::pair<int, int>> places;
        double max = -INFINITY;
        for (int j = 0; j < sequence.seqlen_kv; ++j) {
          if ((x.mask.left >= 0 && j < level - x.mask.left) ||
              (x.mask.right >= 0 && j > level + x.mask.right)) {
            continue;
          }
          const auto [kb, key] = place(x, sequence, b, j);
          double score = 0;
          for (int d = 0; d < x.head_dim; ++d) {
            score += q.get(qb, row, h, d) * k.get(kb, key, h / x.group, d);
          }
          score *= p.softmax_scale;
          if (x.softcap > 0) score = x.softcap * std::tanh(score / x.softcap);
          if (!x.slopes.empty()) score -= x.slopes[b * heads_q + h] * std::abs(level - j);
          scores.push_back(score);
          places.emplace_back(kb, key);
          max = std::max(max, score);
        }
        if (!x.sinks.empty()) max = std::max(max, static_cast<double>(x.sinks[h]));
        double sum = x.sinks.empty() || max == -INFINITY ? 0 : std::exp(x.sinks[h] - max);
        for (double& score : scores) sum += score = score == -INFINITY ? 0 : std::exp(score - max);
        const double want_lse = sum == 0 ? -INFINITY : max + std::log(sum);
        const size_t at = x.ragged ? static_cast<size_t>(h) * q.seqlen + row
                                   : (static_cast<size_t>(b) * heads_q + h) * x.seqlen_q + i;
        const std::string where = "sequence " + std::to_string(b) + ", head " + std::to_string(h) +
                                  ", row " + std::to_string(i);
        const bool right = want_lse == -INFINITY ? lse[at] == want_lse
                                                 : std::fabs(lse[at] - want_lse) <=
                                                       std::max(1e-4, 1e-6 * std::fabs(want_lse));
        if (!right) {
          return where + ": softmax_lse " + std::to_string(lse[at]) + ", not " +
                 std::to_string(want_lse);
        }
        for (int d = 0; d < x.head_dim; ++d) {
          double want = 0, magnitude = 0;
          for (size_t n = 0; n < scores.size() && sum > 0; ++n) {
            const double value = v.get(places[n].first, places[n].second, h / x.group, d);
            want += scores[n] / sum * value;
            magnitude += scores[n] / sum * std::fabs(value);
          }
          const double got = out.get(qb, row, h, d);
          const double allowed = scores.empty() ? 0 : 2 * unit * magnitude + 1e-6;
          if (!(std::fabs(got - want) <= allowed)) {
            return where + ", column " + std::to_string(d) + ": " + std::to_string(got) + ", not " +
                   std::to_string(want);
          }
        }
      }
    }
  }
  if (const long long touched = written_outside(out)) {
    return std::to_string(touched) + " bytes written outside the rows of out";
  }
  return "";
}

struct Instance {
  const char* name;
  int shape[3];
  cudaError_t (*launch)(const DecodeParams&, DType, int, cudaStream_t);

  bool check(uint64_t seed) const {
    Random random(seed);
    Case x = random_case(shape[0], shape[1], shape[2], random);
    const auto n = [&](int count) { return below(random, count); };
    const DType dtype = n(2) ? DType::float16 : DType::bfloat16;
    const int heads_q = x.heads_kv * x.group;
    const int total_q = x.ragged ? x.cu_seqlens_q.back() + n(3) : 0;
    int kv_batch = x.batch, kv_rows = x.seqlen_kv;
    if (x.keys == Keys::packed) {
      kv_batch = 1, kv_rows = x.cu_seqlens_k.back();
    } else if (x.keys == Keys::cache) {
      kv_batch = x.batch + 2;
      std::vector<int> order(kv_batch);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      x.batch_idx.assign(order.begin(), order.begin() + x.batch);
    } else if (x.keys == Keys::paged) {
      const int pages = ceil_div(x.seqlen_kv, x.page_size);
      kv_rows = x.page_size, kv_batch = pages * x.batch + 2;
      std::vector<int> order(kv_batch);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      x.table.assign(order.begin(), order.begin() + pages * x.batch);
      x.seqlen_kv = pages * x.page_size;
    }
    const bool heads_first = n(2) != 0;
    Tensor q(dtype, x.ragged ? 1 : x.batch, x.ragged ? total_q : x.seqlen_q, heads_q, x.head_dim, 8,
             heads_first);
    Tensor k(dtype, kv_batch, kv_rows, x.heads_kv, x.head_dim, 8, heads_first);
    Tensor v(dtype, kv_batch, kv_rows, x.heads_kv, x.head_dim, 8, !heads_first);
    Tensor out(dtype, q.batch, q.seqlen, heads_q, x.head_dim, 8, heads_first);
    std::vector<float> lse(static_cast<size_t>(q.batch) * q.seqlen * heads_q);

    DecodeParams params{};
    AttentionParams& p = params.attention;
    p = forward_params(q, k, v, out, lse, 1 / std::sqrt(static_cast<float>(x.head_dim)), x.mask);
    p.batch = x.batch, p.seqlen_q = x.seqlen_q, p.seqlen_kv = x.seqlen_kv;
    p.mask.left = x.mask.left < x.seqlen_kv ? x.mask.left : -1;
    p.mask.right = x.mask.right < x.seqlen_q ? x.mask.right : -1;
    p.terms = {x.slopes.empty() ? nullptr : x.slopes.data(),
               heads_q,
               x.sinks.empty() ? nullptr : x.sinks.data(),
               nullptr,
               0,
               x.softcap,
               {}};
    p.sequences = {pointer(x.cu_seqlens_q),
                   pointer(x.cu_seqlens_k),
                   pointer(x.seqused),
                   pointer(x.leftpad),
                   pointer(x.batch_idx),
                   pointer(x.table),
                   0,
                   x.page_size,
                   kv_batch,
                   q.seqlen,
                   kv_rows};
    p.sequences.block_table_stride = static_cast<long long>(x.table.size()) / x.batch;

    std::normal_distribution<double> normal;
    const int large = dtype == DType::bfloat16 && n(4) == 0 ? 24 : 4;
    const auto row = [&](Tensor& tensor, int b, int s, int size) {
      for (int h = 0; h < tensor.heads; ++h) {
        const int factor = n(8) == 0 ? size : 1;
        for (int d = 0; d < x.head_dim; ++d) tensor.set(b, s, h, d, factor * normal(random));
      }
    };
    // Past a left limit no row sees keys: what is before the first tile of any is never read.
    for (int b = 0; b < x.batch; ++b) {
      const Sequence sequence = sequence_at(p.sequences, b, x.seqlen_q, x.seqlen_kv);
      const KeyRange seen =
          visible(p.mask, 0, sequence.seqlen_q, sequence.seqlen_q, sequence.seqlen_kv);
      for (int i = 0; i < sequence.seqlen_q; ++i)
        row(q, x.ragged ? 0 : b, sequence.q_begin + i, large);
      for (int j = seen.begin; j < seen.end; ++j) {
        const auto [kb, key] = place(x, sequence, b, j);
        row(k, kb, key, large);
        row(v, kb, key, 4);
      }
    }
    const auto table = x.table;  // with nonsense where no key is
    for (int b = 0; b < x.batch && !table.empty(); ++b) {
      const Sequence sequence = sequence_at(p.sequences, b, x.seqlen_q, x.seqlen_kv);
      const int pages = static_cast<int>(table.size()) / x.batch;
      for (int i = ceil_div(sequence.k_begin + sequence.seqlen_kv, x.page_size); i < pages; ++i) {
        x.table[b * pages + i] = static_cast<int>(random());
      }
    }
    p.sequences.block_table = pointer(x.table);
    if (x.keys == Keys::dense && !x.ragged && x.seqused.empty() && x.leftpad.empty() &&
        x.softcap == 0 && x.slopes.empty() && x.sinks.empty() && n(3) == 0) {
      make_extreme(q, k, v, p.softmax_scale, random);
    }

    params.num_splits = x.num_splits;
    params.batch_invariant = x.batch_invariant;
    params.evict_first = n(2);
    params.tag = 1 + random() % ((1ull << (64 - COUNT_BITS)) - 1);
    const Workspace space(p, shape[1], shape[0], x.num_splits);
    const GuardedBytes workspace(static_cast<size_t>(space.bytes() + 15) / 16 * 16);
    for (uint8_t& byte : workspace) byte = static_cast<uint8_t>(random());
    params.workspace = workspace.data();
    fake_device.call = [](const void* kernel, void** arguments) {
      const auto entry = reinterpret_cast<void (*)(DecodeParams)>(kernel);
      entry(*static_cast<DecodeParams*>(arguments[0]));
    };
    std::string wrong;
    std::vector<uint8_t> first;
    // Twice, as a graph is replayed: the counters must be as they were, and the bits the same.
    for (int replay = 0; replay < 2 && wrong.empty(); ++replay) {
      std::fill(out.bytes.begin(), out.bytes.end(), POISON);
      std::fill(lse.begin(), lse.end(), NAN32);
      fake_device.sm_count = 1 + n(3);
      fake_device.seed = random();
      wrong = launch_error(launch(params, dtype, 0, nullptr));
      if (wrong.empty()) wrong = compare(x, p, q, k, v, out, lse);
      const std::vector<uint8_t> bytes(out.bytes.begin(), out.bytes.end());
      if (replay > 0 && wrong.empty() && bytes != first) wrong = "other bits the second time";
      first = bytes;
    }
    if (wrong.empty()) return true;
    std::printf("%s, %s, %s, seed %llu: %s\n", name, x.text().c_str(),
                dtype == DType::float16 ? "float16" : "bfloat16",
                static_cast<unsigned long long>(seed), wrong.c_str());
    return false;
  }
};

template <typename Tile>
Instance instance(const char* name) {
  return {name, {Tile::HEAD_DIM, Tile::BLOCK_M, Tile::BLOCK_N}, launch_dtype<Tile>};
}

const Instance INSTANCES[] = {
    instance<DecodeTile<64, 16, 64, 2, 2, 2>>("64:16x64-stages2-warps2"),
    instance<DecodeTile<64, 32, 32, 3, 2, 2>>("64:32x32-stages3-warps2"),
    instance<DecodeTile<64, 64, 64, 5, 4, 2>>("64:64x64-stages5-warps4"),
    instance<DecodeTile<96, 16, 64, 4, 4, 2>>("96:16x64-stages4-warps4"),
    instance<DecodeTile<128, 16, 32, 3, 2, 2>>("128:16x32-stages3-warps2"),
    instance<DecodeTile<128, 32, 64, 3, 4, 2>>("128:32x64-stages3-warps4"),
    instance<DecodeTile<256, 16, 32, 2, 2, 1>>("256:16x32-stages2-warps2"),
};

// Batch invariance: each sequence alone, with a bound of its own, has the bits that it has among
// others.
template <typename Tile>
int check_invariance(uint64_t seed) {
  Random random(seed);
  const auto n = [&](int count) { return below(random, count); };
  const int batch = 2 + n(3), heads = 2, group = 2, seqlen_q = 1 + n(3), D = Tile::HEAD_DIM;
  std::vector<int> lengths;
  for (int b = 0; b < batch; ++b) lengths.push_back(1 + n(n(2) ? 200 : 3 * INVARIANT_KEYS));
  const int seqlen_kv = *std::max_element(lengths.begin(), lengths.end()) + n(100);
  Tensor q(DType::float16, batch, seqlen_q, heads * group, D, 0, false);
  Tensor k(DType::float16, batch, seqlen_kv, heads, D, 0, false),
      v = {DType::float16, batch, seqlen_kv, heads, D, 0, false};
  std::normal_distribution<double> normal;
  for (Tensor* x : {&q, &k, &v}) x->fill([&] { return normal(random); });
  const auto run = [&](int first, int count, int bound) {
    Tensor out(DType::float16, batch, seqlen_q, heads * group, D, 0, false);
    std::vector<float> lse(static_cast<size_t>(batch) * heads * group * seqlen_q);
    DecodeParams params{};
    AttentionParams& p = params.attention;
    p = forward_params(q, k, v, out, lse, 0.1f, {-1, 0});
    p.q = q.at(first, 0, 0, 0), p.k = k.at(first, 0, 0, 0), p.v = v.at(first, 0, 0, 0);
    p.batch = count, p.seqlen_kv = bound;
    p.sequences.seqused_k = lengths.data() + first;
    params.batch_invariant = true;
    params.num_splits = invariant_splits(bound, Tile::BLOCK_N);
    params.tag = 1 + random() % 1000;
    const Workspace space(p, Tile::BLOCK_M, D, params.num_splits);
    const GuardedBytes workspace(static_cast<size_t>(space.bytes() + 15) / 16 * 16);
    params.workspace = workspace.data();
    fake_device.call = [](const void* kernel, void** arguments) {
      const auto entry = reinterpret_cast<void (*)(DecodeParams)>(kernel);
      entry(*static_cast<DecodeParams*>(arguments[0]));
    };
    fake_device.sm_count = 1 + n(3), fake_device.seed = random();
    const std::string wrong = launch_error(launch_dtype<Tile>(params, DType::float16, 0, nullptr));
    if (!wrong.empty()) std::printf("invariance: %s\n", wrong.c_str());
    const auto end = out.bytes.begin() + out.batch_stride * count * 2;
    return std::vector<uint8_t>(out.bytes.begin(), end);
  };
  const auto all = run(0, batch, seqlen_kv);
  const size_t each = all.size() / static_cast<size_t>(batch);
  int failures = 0;
  for (int b = 0; b < batch; ++b) {
    const auto alone = run(b, 1, lengths[b]);
    const bool same = std::equal(alone.begin(), alone.end(), all.begin() + each * b);
    if (!same) std::printf("invariance: sequence %d of %d keys has other bits\n", b, lengths[b]);
    failures += !same;
  }
  return failures;
}

// What the host promises: a choice that fills the slots, and never more parts than steps.
int check_choices() {
  int failures = 0;
  const auto expect = [&](const char* what, bool right) {
    if (!right) std::printf("choose_splits: %s\n", what);
    failures += !right;
  };
  const auto splits = [](int batch, int heads_q, int heads_kv, int seqlen_kv, int window = -1) {
    AttentionParams p{};
    p.batch = batch, p.heads_q = heads_q, p.heads_kv = heads_kv;
    p.seqlen_q = 1, p.seqlen_kv = seqlen_kv, p.mask = {window, -1};
    return choose_splits(p, 16, 64, 264);
  };
  expect("one sequence fills the GPU",
         splits(1, 32, 8, 8192) >= 30 && splits(1, 32, 8, 8192) <= 33);
  expect("a full GPU is not split", splits(64, 32, 8, 4096) == 1);
  expect("keys that are one step", splits(1, 32, 8, 64) == 1);
  expect("no keys", splits(1, 32, 8, 0) == 1);
  expect("a window of one step", splits(1, 32, 8, 8192, 63) == 1);
  expect("one head", splits(1, 8, 1, 65536) > 200);
  return failures;
}

}  // namespace

// [ROUNDS [SEED [NAME]]], as run_all.
int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 10;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 0) : 0);
  const std::string only = argc > 3 ? argv[3] : "";
  int failures = check_choices(), runs = 0;
  for (int round = 0; round < rounds; ++round) {
    for (const Instance& instance : INSTANCES) {
      if (std::string(instance.name).find(only) == std::string::npos) continue;
      failures += !instance.check(random());
      ++runs;
    }
    if (only.empty()) failures += check_invariance<DecodeTile<64, 16, 64, 2, 2, 2>>(random());
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0 || runs == 0;
}
