// The append kernel and its launch, on emulator::run: caches, pages, lengths that lead nowhere,
// packed rows, rotary tables and strides by chance, against loops.
#include "emulator/device.h"
// The kernel, with tests/cpp/emulator/ptx in the place of csrc/ptx.
#include "attention_problem.h"
#include "decode/append.cu"

using namespace flashmoe;

namespace {

using Random = std::mt19937_64;

const int* pointer(const std::vector<int>& x) { return x.empty() ? nullptr : x.data(); }

NewRows rows_of(Tensor& x, const std::vector<int>& cu_seqlens) {
  const int rows = cu_seqlens.empty() ? x.batch * x.seqlen : x.seqlen;
  return {x.bytes.data(), x.batch_stride, x.row_stride, x.head_stride, pointer(cu_seqlens),
          rows,           x.seqlen,       x.heads,      x.head_dim};
}

CacheView view(Tensor& x) { return {x.bytes.data(), x.batch_stride, x.row_stride, x.head_stride}; }

// Columns of a row at `position`, by their definition; those past rotary_dim as they are.
std::vector<double> rotated(Tensor& x, int b, int s, int h, const AppendParams& p, Tensor& cos,
                            Tensor& sin, long long position) {
  std::vector<double> row(x.head_dim);
  for (int d = 0; d < x.head_dim; ++d) row[d] = x.get(b, s, h, d);
  const int at = static_cast<int>(std::clamp<long long>(position, 0, p.rotary_rows - 1));
  for (int i = 0; i < p.rotary_dim / 2; ++i) {
    const int first = p.interleaved ? 2 * i : i,
              second = first + (p.interleaved ? 1 : p.rotary_dim / 2);
    const double a = row[first], b0 = row[second], c = cos.get(0, at, 0, i),
                 s0 = sin.get(0, at, 0, i);
    row[first] = a * c - b0 * s0, row[second] = a * s0 + b0 * c;
  }
  return row;
}

bool check(uint64_t seed) {
  Random random(seed);
  const auto n = [&](int count) {
    return static_cast<int>(random() % static_cast<unsigned>(count));
  };
  const DType dtype = static_cast<DType>(n(3));
  const int batch = 1 + n(4), heads = 1 + n(3), group = 1 + n(3), pad = n(2) ? 16 : n(4);
  const int unit = n(3) ? 8 : 1, head_dim = unit * (1 + n(6)), head_dim_v = unit * (1 + n(6));
  const int rotary_dim =
      n(3) ? 2 * (unit == 8 && n(2) ? 4 * (1 + n(head_dim / 8)) : n(head_dim / 2 + 1)) : 0;
  const bool ragged_k = n(2), ragged_q = n(2), paged = n(2), indexed = !paged && n(2);
  const int seqlen_new = n(5), seqlen_q = n(5), page_size = 1 + n(9), pages = paged ? 1 + n(3) : 1;
  const int room = page_size * pages;
  const auto cumulative = [&](int longest) {
    std::vector<int> found = {n(2)};
    for (int b = 0; b < batch; ++b) found.push_back(found.back() + n(longest + 1));
    return found;
  };
  const std::vector<int> cu_k = ragged_k ? cumulative(seqlen_new) : std::vector<int>();
  const std::vector<int> cu_q = ragged_q ? cumulative(seqlen_q) : std::vector<int>();
  const int total_k = ragged_k ? cu_k.back() + n(3) : seqlen_new;
  const int total_q = ragged_q ? cu_q.back() + n(3) : seqlen_q;
  const int num_pages = batch * pages + n(2);
  std::vector<int> order(num_pages), lengths, lengths_out(batch, -7);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  order.resize(batch * pages);
  for (int& page : order) {
    if (n(8) == 0) page = n(2) ? -1 - n(5) : num_pages + n(1000);  // which there are not
  }
  for (int b = 0; b < batch; ++b) lengths.push_back(n(room + 4) - 2);

  const bool heads_first = n(2);
  Tensor q(dtype, ragged_q ? 1 : batch, total_q, heads * group, head_dim, pad, heads_first);
  Tensor k(dtype, ragged_k ? 1 : batch, total_k, heads, head_dim, pad, heads_first);
  Tensor v(dtype, k.batch, total_k, heads, head_dim_v, pad, !heads_first);
  Tensor q_out(dtype, q.batch, total_q, heads * group, head_dim, 0, false);
  Tensor k_cache(dtype, num_pages, page_size, heads, head_dim, pad, heads_first);
  Tensor v_cache(dtype, num_pages, page_size, heads, head_dim_v, pad, !heads_first);
  const DType table_dtype = static_cast<DType>(n(3));
  const int half = rotary_dim / 2, rotary_rows = 1 + n(room + 3);
  Tensor cos(table_dtype, 1, rotary_rows, 1, half, 0, false),
      sin(table_dtype, 1, rotary_rows, 1, half, 0, false);
  std::normal_distribution<double> normal;
  for (Tensor* x : {&q, &k, &v, &k_cache, &v_cache}) {
    for (int b = 0; b < x->batch; ++b)
      for (int s = 0; s < x->seqlen; ++s)
        for (int h = 0; h < x->heads; ++h)
          for (int d = 0; d < x->head_dim; ++d) x->set(b, s, h, d, normal(random));
  }
  for (int r = 0; r < rotary_rows; ++r) {
    for (int i = 0; i < half; ++i) {
      const double angle = 6 * normal(random);
      cos.set(0, r, 0, i, std::cos(angle)), sin.set(0, r, 0, i, std::sin(angle));
    }
  }

  AppendParams p{};
  p.k = rows_of(k, cu_k), p.v = rows_of(v, cu_k);
  p.k_cache = view(k_cache), p.v_cache = view(v_cache);
  p.lengths = lengths.data(), p.lengths_out = lengths_out.data();
  if (paged) p.block_table = order.data(), p.block_table_stride = pages;
  if (indexed) p.cache_batch_idx = order.data();
  p.page_size = page_size, p.num_pages = num_pages, p.batch = batch, p.room = room;
  p.interleaved = n(2), p.rotate_by_row = n(2);
  if (half > 0) {
    p.q = rows_of(q, cu_q), p.q_out = q_out.bytes.data();
    p.cos = cos.bytes.data(), p.sin = sin.bytes.data(), p.table_dtype = table_dtype;
    p.rotary_rows = rotary_rows, p.rotary_dim = rotary_dim;
  }

  const auto copy = [](Tensor& x) { return std::vector<uint8_t>(x.bytes.begin(), x.bytes.end()); };
  const auto before_k = copy(k_cache), before_v = copy(v_cache);
  fake_device.call = [](const void* kernel, void** arguments) {
    const auto entry = reinterpret_cast<void (*)(AppendParams)>(kernel);
    entry(*static_cast<AppendParams*>(arguments[0]));
  };
  fake_device.sm_count = 1 + n(3);
  fake_device.seed = random();
  std::string wrong = launch_error(launch_append(p, dtype, nullptr));
  const auto differs = [&](const char* what, double got, double want, double magnitude) {
    const double allowed = 2 * half_ulp(dtype, want) + 0x1p-21 * magnitude;
    if (wrong.empty() && !(std::fabs(got - want) <= allowed)) {
      wrong = std::string(what) + ": " + std::to_string(got) + ", not " + std::to_string(want);
    }
  };
  const auto restore = [](Tensor& x, const std::vector<uint8_t>& before, int b, int s, int h) {
    const size_t at = x.offset(b, s, h) * size_of(x.dtype);
    std::memcpy(&x.bytes[at], &before[at], static_cast<size_t>(x.head_dim) * size_of(x.dtype));
  };
  // What was appended, then everything else must be what it was.
  const auto sequence_of = [&](const std::vector<int>& cu, int b, int s, int& step) {
    step = s;
    if (cu.empty()) return b;
    const int found = static_cast<int>(std::upper_bound(cu.begin(), cu.end(), s) - cu.begin()) - 1;
    step = s - cu[std::clamp(found, 0, batch - 1)];
    return s < cu[0] || s >= cu[batch] ? -1 : std::clamp(found, 0, batch - 1);
  };
  for (int b = 0; b < k.batch && wrong.empty(); ++b) {
    for (int s = 0; s < k.seqlen; ++s) {
      int step;
      const int sequence = sequence_of(cu_k, b, s, step);
      if (sequence < 0) continue;
      const long long position = static_cast<long long>(lengths[sequence]) + step;
      if (position < 0 || position >= room) continue;
      const int page = paged     ? order[sequence * pages + position / page_size]
                       : indexed ? order[sequence]
                                 : sequence;
      const int slot = static_cast<int>(paged ? position % page_size : position);
      if (page < 0 || page >= num_pages) continue;
      for (int h = 0; h < heads; ++h) {
        const auto want = rotated(k, b, s, h, p, cos, sin, position);
        for (int d = 0; d < head_dim; ++d) {
          differs("k_cache", k_cache.get(page, slot, h, d), want[d], 8);
        }
        for (int d = 0; d < head_dim_v; ++d) {
          differs("v_cache", v_cache.get(page, slot, h, d), v.get(b, s, h, d), 0);
        }
        restore(k_cache, before_k, page, slot, h);
        restore(v_cache, before_v, page, slot, h);
      }
    }
  }
  if (wrong.empty() && (copy(k_cache) != before_k || copy(v_cache) != before_v)) {
    wrong = "something else in a cache was written";
  }
  for (int b = 0; b < q.batch && half > 0 && wrong.empty(); ++b) {
    for (int s = 0; s < q.seqlen; ++s) {
      int step;
      const int sequence = sequence_of(cu_q, b, s, step);
      if (sequence < 0) continue;
      const long long position = lengths[sequence] + (p.rotate_by_row ? step : 0);
      for (int h = 0; h < q.heads; ++h) {
        const auto want = rotated(q, b, s, h, p, cos, sin, position);
        for (int d = 0; d < head_dim; ++d) differs("q", q_out.get(b, s, h, d), want[d], 8);
      }
    }
  }
  for (int b = 0; b < batch && wrong.empty(); ++b) {
    const int want = lengths[b] + (ragged_k ? cu_k[b + 1] - cu_k[b] : seqlen_new);
    if (lengths_out[b] != want) wrong = "lengths_out";
  }
  if (wrong.empty()) return true;
  std::printf("seed %llu, dtype %d, batch %d, heads %d, head_dim %d %d, rotary %d: %s\n",
              static_cast<unsigned long long>(seed), static_cast<int>(dtype), batch, heads,
              head_dim, head_dim_v, rotary_dim, wrong.c_str());
  return false;
}

}  // namespace

// [ROUNDS [SEED]]
int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 0) : 0);
  int failures = 0;
  for (int round = 0; round < rounds; ++round) failures += !check(random());
  std::printf("%d runs, %d failures\n", rounds, failures);
  return failures != 0 || rounds <= 0;
}
