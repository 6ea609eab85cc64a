// The Hopper backward kernel and its launches, on emulator::run: tiles, shapes and orders of
// execution.
#include <cstring>

#include "emulator/device.h"
// The kernel, with tests/cpp/emulator/ptx in the place of csrc/ptx.
#include "backward/sm90/host.h"
#include "backward/sm90/kernel.cuh"
#include "packed_problem.h"

using namespace flashmoe;

namespace {

template <typename T, Sm90BackwardTile TILE, Variant VARIANT>
void prepare(const Sm90BackwardParams& params) {
  sm90_backward::prepare<T, TILE, VARIANT>(params);
}
template <typename T, Sm90BackwardTile TILE, Variant VARIANT>
void kernel(const Sm90BackwardParams& params) {
  sm90_backward::attention_backward<T, TILE, VARIANT>(params);
}
template <typename T, Sm90BackwardTile TILE, Variant VARIANT>
void finish(const Sm90BackwardParams& params) {
  sm90_backward::finish<T, TILE, VARIANT>(params);
}

// What is wrong with a gradient's values, or nothing: `want` and what each element may be off by,
// in the order of its elements.
std::string compare_values(const char* name, Tensor& got, const std::vector<double>& want,
                           const std::vector<double>& allowed) {
  size_t index = 0;
  for (int b = 0; b < got.batch; ++b)
    for (int s = 0; s < got.seqlen; ++s)
      for (int h = 0; h < got.heads; ++h)
        for (int d = 0; d < got.head_dim; ++d, ++index) {
          const double x = got.get(b, s, h, d);
          if (std::fabs(x - want[index]) <= allowed[index]) continue;
          return std::string(name) + " of batch " + std::to_string(b) + ", row " +
                 std::to_string(s) + ", head " + std::to_string(h) + ", column " +
                 std::to_string(d) + ": " + std::to_string(x) + ", not " +
                 std::to_string(want[index]);
        }
  return "";
}

std::string compare_gradient(const char* name, Tensor& got, const std::vector<double>& want,
                             const std::vector<double>& allowed) {
  const std::string wrong = compare_values(name, got, want, allowed);
  if (!wrong.empty()) return wrong;
  if (const long long touched = written_outside(got)) {
    return std::to_string(touched) + " bytes written outside the rows of " + name;
  }
  return "";
}

// NaN where no kernel may look: in blocks of queries that see no key, and of keys that none sees.
void poison_unseen(Tensor& x, int block, int other_seqlen, Mask mask) {
  for (int start = 0; start < x.seqlen; start += block) {
    const int end = std::min(start + block, x.seqlen);
    const KeyRange seen = visible(mask, start, end, x.seqlen, other_seqlen);
    if (seen.begin < seen.end) continue;
    for (int b = 0; b < x.batch; ++b)
      for (int s = start; s < end; ++s)
        for (int h = 0; h < x.heads; ++h)
          for (int d = 0; d < x.head_dim; ++d) x.set(b, s, h, d, NAN);
  }
}

struct Gradients {
  std::vector<double> dq, dk, dv;
  explicit Gradients(size_t q_size, size_t k_size) : dq(q_size), dk(k_size), dv(k_size) {}
};

// By definition, in float64; and how much rounding P, dS, out and the gradients to the dtype may
// change each element.
void reference_gradients(Tensor& q, Tensor& k, Tensor& v, Tensor& out, Tensor& dout,
                         const std::vector<float>& lse, const float* dlse, double scale, Mask mask,
                         const Terms& terms, Gradients& want, Gradients& allowed,
                         int first_batch = 0) {
  const double unit = q.dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
  // A P below 2^-14 is off by this in float16, in which it may be handed on.
  const double tiny = 0x1p-25;
  const int group = q.heads / k.heads, dims = q.head_dim;
  const Values<double> qs(q), ks(k), vs(v), os(out), dos(dout);
  for (int b = 0; b < q.batch; ++b)
    for (int h = 0; h < q.heads; ++h)
      for (int i = 0; i < q.seqlen; ++i) {
        const double *qi = qs.row(b, i, h), *oi = os.row(b, i, h), *di = dos.row(b, i, h);
        const size_t row = (static_cast<size_t>(b) * q.heads + h) * q.seqlen + i;
        const double row_lse = lse[row], row_dlse = dlse == nullptr ? 0. : dlse[row];
        const auto [first, visible] = seen_keys(mask, i, q.seqlen, k.seqlen);
        double delta = 0, delta_terms = 0;
        for (int d = 0; d < dims; ++d)
          delta += di[d] * oi[d], delta_terms += std::fabs(di[d] * oi[d]);
        const size_t q_at = ((static_cast<size_t>(b) * q.seqlen + i) * q.heads + h) * dims;
        for (int j = first; j < first + visible; ++j) {
          const double *kj = ks.row(b, j, h / group), *vj = vs.row(b, j, h / group);
          double s = 0, dp = 0;
          for (int d = 0; d < dims; ++d) s += qi[d] * kj[d], dp += di[d] * vj[d];
          s *= scale;
          double tanh = 0;
          if (terms.softcap > 0) tanh = std::tanh(s / terms.softcap), s = terms.softcap * tanh;
          if (terms.alibi_slopes != nullptr) {
            s -= terms.alibi_slopes[b * terms.alibi_batch_stride + h] *
                 std::abs(i + k.seqlen - q.seqlen - j);
          }
          double off_p = 0;  // of a score, by what a mask adds
          if (terms.attn_mask.is_given()) {
            const double added = mask_at(terms.attn_mask, b, h, i, j);
            if (added == -INFINITY || added <= LOWEST_VALUES) continue;
            s += added, off_p = (std::fabs(added) + std::fabs(row_lse)) * 0x1p-23;
          }
          // Not told apart by so large a softmax_lse.
          if (terms.attn_mask.is_given() && std::fabs(row_lse) >= sm90_backward::LARGEST_LSE) {
            continue;
          }
          const double p = std::exp(s - row_lse), slope = scale * (1 - tanh * tanh);
          const double factor = dropout_factor(terms, first_batch + b, h, i, j);
          dp *= factor;
          // d out / d s = p (v - out), d softmax_lse / d s = p.
          const double dp_centered = dp - delta + row_dlse, ds = p * dp_centered * slope;
          const double capped = terms.softcap > 0 ? cap_error(terms) : 0;
          const double off =
              2 * unit * (std::fabs(ds) + p * slope * (delta_terms + 1e-4 * std::fabs(dp))) +
              tiny * scale * std::fabs(dp_centered) +
              std::fabs(dp_centered) * p *
                  ((capped + off_p) * slope + 0x1p-10 * tanh * tanh * scale);
          const size_t k_at =
              ((static_cast<size_t>(b) * k.seqlen + j) * k.heads + h / group) * dims;
          for (int d = 0; d < dims; ++d) {
            want.dq[q_at + d] += ds * kj[d], allowed.dq[q_at + d] += off * std::fabs(kj[d]);
            want.dk[k_at + d] += ds * qi[d], allowed.dk[k_at + d] += off * std::fabs(qi[d]);
            want.dv[k_at + d] += p * factor * di[d];
            allowed.dv[k_at + d] +=
                ((2 * unit + capped + off_p) * p + tiny) * factor * std::fabs(di[d]);
          }
        }
      }
  const auto add_last_rounding = [&](std::vector<double>& allowed,
                                     const std::vector<double>& want) {
    for (size_t i = 0; i < want.size(); ++i) allowed[i] += unit * std::fabs(want[i]) + 1e-6;
  };
  add_last_rounding(allowed.dq, want.dq);
  add_last_rounding(allowed.dk, want.dk);
  add_last_rounding(allowed.dv, want.dv);
}

struct Instance {
  const char* name;
  Sm90BackwardTile tile;
  Variant variant;
  using Entry = void (*)(const Sm90BackwardParams&);
  Entry entries[2][3];  // float16, bfloat16

  int head_dim() const { return tile.head_dim; }
  int head_dim_v() const { return 0; }
  int block_m() const { return tile.block_m; }
  int block_n() const { return tile.block_n; }
  // Sinks are in softmax_lse.
  Variant may() const {
    Variant may = variant;
    may.sink = true;
    return may;
  }

  // A deterministic kernel counts in its workspace who has added to each block of queries: those
  // blocks of keys and no others that some of its queries see. What is wrong with that, or nothing.
  std::string compare_turns(const Problem& x, const AttnMask& mask,
                            const uint8_t* workspace) const {
    const int m_blocks = (x.seqlen_q + block_m() - 1) / block_m();
    const size_t blocks = static_cast<size_t>(m_blocks) * x.batch * x.heads_q;
    const size_t sum_bytes = static_cast<size_t>(tile.dq_elements()) * 4;
    std::vector<int> turns(blocks);
    std::memcpy(turns.data(),
                workspace + blocks * (static_cast<size_t>(tile.stats_bytes()) + sum_bytes),
                blocks * sizeof(int));
    for (size_t block = 0; block < blocks; ++block) {
      const int m = static_cast<int>(block) % m_blocks;
      const int b = static_cast<int>(block) / m_blocks / x.heads_q;
      const int h = static_cast<int>(block) / m_blocks % x.heads_q;
      std::vector<bool> seen(static_cast<size_t>((x.seqlen_kv + block_n() - 1) / block_n()));
      for (int i = m * block_m(); i < std::min((m + 1) * block_m(), x.seqlen_q); ++i) {
        const auto [first, count] = seen_keys(x.mask, i, x.seqlen_q, x.seqlen_kv);
        for (int j = first; j < first + count; ++j) {
          if (mask.is_given() && mask_at(mask, b, h, i, j) <= LOWEST_VALUES) continue;
          seen[static_cast<size_t>(j / block_n())] = true;
        }
      }
      const auto wanted = std::count(seen.begin(), seen.end(), true);
      if (turns[block] == wanted) continue;
      return std::to_string(turns[block]) + " blocks of keys visited block " + std::to_string(m) +
             " of queries, not " + std::to_string(wanted);
    }
    return "";
  }

  // What went wrong in a launch, or nothing. Each one on a device and in an order of its own.
  std::string launch(const BackwardParams& params, DType dtype, GuardedBytes& workspace,
                     std::mt19937_64& random) const {
    sm90_backward::Entries addresses;
    for (int i = 0; i < 3; ++i) {
      addresses[i] = reinterpret_cast<const void*>(entries[dtype == DType::bfloat16][i]);
    }
    fake_device.call = run_kernel<Sm90BackwardParams>;
    std::fill(workspace.begin(), workspace.end(), uint8_t{0xff});
    fake_device.sm_count = 1 + static_cast<int>(random() % 3);
    fake_device.seed = random();
    // The same one for the same problem: the order of a deterministic kernel depends on its L2.
    const int device = (params.attention.seqlen_q + params.attention.seqlen_kv) % 2;
    if (!sm90_backward::can_run(params)) return "can_run refuses";
    return launch_error(sm90_backward::launch(tile, variant, addresses, params, dtype, device,
                                              nullptr, workspace.data()));
  }

  // Whether two more launches give the same bits: what is wrong, or nothing.
  template <typename Launch>
  static std::string compare_bits(Tensor& dq, Tensor& dk, Tensor& dv, const Launch& launch) {
    const auto bits = [](Tensor& x) {
      return std::vector<uint8_t>(x.bytes.begin(), x.bytes.end());
    };
    const std::vector<uint8_t> first[] = {bits(dq), bits(dk), bits(dv)};
    std::string wrong;
    for (int again = 0; again < 2 && wrong.empty(); ++again) {
      wrong = launch();
      if (bits(dk) != first[1] || bits(dv) != first[2]) wrong = "dk or dv has other bits now";
      if (bits(dq) != first[0]) wrong = "dq has other bits now";
    }
    return wrong;
  }

  // The same for a packed batch, one sequence after the other.
  bool check_packed(const PackedProblem& x, uint64_t seed) const {
    std::mt19937_64 random(seed);
    const DType dtype = random() % 2 ? DType::float16 : DType::bfloat16;
    const bool heads_first = random() % 2;
    Tensor q(dtype, 1, x.total_q, x.all.heads_q, x.all.head_dim, 8, heads_first);
    Tensor k(dtype, 1, x.total_k, x.all.heads_kv, x.all.head_dim, 8, heads_first);
    Tensor v(dtype, 1, x.total_k, x.all.heads_kv, x.all.head_dim, 8, !heads_first);
    Tensor out(dtype, 1, x.total_q, x.all.heads_q, x.all.head_dim, 8, heads_first);
    Tensor dout(dtype, 1, x.total_q, x.all.heads_q, x.all.head_dim, 8, !heads_first);
    Tensor dq(dtype, 1, x.total_q, x.all.heads_q, x.all.head_dim, 0, false);
    Tensor dk(dtype, 1, x.total_k, x.all.heads_kv, x.all.head_dim, 0, false);
    Tensor dv(dtype, 1, x.total_k, x.all.heads_kv, x.all.head_dim, 0, false);
    for (Tensor* tensor : {&q, &dout}) fill_rows(*tensor, x, false, random);
    for (Tensor* tensor : {&k, &v}) fill_rows(*tensor, x, true, random);
    for (Tensor* tensor : {&dq, &dk, &dv})
      std::fill(tensor->bytes.begin(), tensor->bytes.end(), POISON);
    const float scale = 1 / std::sqrt(static_cast<float>(x.all.head_dim));
    const size_t rows = static_cast<size_t>(x.all.heads_q) * x.total_q;
    std::vector<float> lse(rows, NAN), dlse(rows, NAN);
    const bool has_dlse = random() % 2;
    // The forward of each sequence; of one of them everything is NaN.
    struct Expected {
      Gradients want, allowed;
    };
    std::vector<Expected> expected;
    const int poisoned = static_cast<int>(random() % (2u * static_cast<unsigned>(x.batch())));
    std::vector<int> order(x.all.head_dim);
    std::iota(order.begin(), order.end(), 0);
    std::normal_distribution<double> normal;
    const RandomTerms terms(x.all, random);
    for (int b = 0; b < x.batch(); ++b) {
      OneSequence mine(x, b, q, k, v);
      const int seqlen_q = x.seqlen_q(b);
      Tensor mine_out(dtype, 1, seqlen_q, x.all.heads_q, x.all.head_dim, 0, false);
      Tensor mine_dout(dtype, 1, seqlen_q, x.all.heads_q, x.all.head_dim, 0, false);
      copy_rows(dout, x.q_begin(b), mine_dout);
      const auto forward = reference<double>(mine.q, mine.k, mine.v, scale, x.all.mask, order,
                                             terms_of(terms, b), b);
      std::vector<float> mine_lse(forward.lse.begin(), forward.lse.end()), mine_dlse;
      for (size_t r = 0; r < mine_lse.size(); ++r) {
        const int i = static_cast<int>(r) % seqlen_q, h = static_cast<int>(r) / seqlen_q;
        mine_dlse.push_back(mine_lse[r] == -INFINITY ? NAN : static_cast<float>(normal(random)));
        const size_t at = static_cast<size_t>(h) * x.total_q + x.q_begin(b) + i;
        lse[at] = mine_lse[r], dlse[at] = mine_dlse[r];
        for (int d = 0; d < x.all.head_dim; ++d) {
          mine_out.set(0, i, h, d, forward.out[r * x.all.head_dim + d]);
          out.set(0, x.q_begin(b) + i, h, d, forward.out[r * x.all.head_dim + d]);
        }
      }
      Gradients zero(forward.out.size(),
                     static_cast<size_t>(x.seqlen_kv(b)) * x.all.heads_kv * x.all.head_dim);
      expected.push_back({zero, zero});
      reference_gradients(mine.q, mine.k, mine.v, mine_out, mine_dout, mine_lse,
                          has_dlse ? mine_dlse.data() : nullptr, scale, x.all.mask,
                          terms_of(terms, b), expected.back().want, expected.back().allowed, b);
    }
    if (poisoned < x.batch()) {
      for (Tensor* tensor : {&q, &dout, &k, &v}) {
        const bool keys = tensor == &k || tensor == &v;
        const int begin = keys ? x.k_begin(poisoned) : x.q_begin(poisoned);
        const int end = begin + (keys ? x.seqlen_kv(poisoned) : x.seqlen_q(poisoned));
        for (int s = begin; s < end; ++s)
          for (int h = 0; h < tensor->heads; ++h)
            for (int d = 0; d < x.all.head_dim; ++d) tensor->set(0, s, h, d, NAN);
      }
    }
    const bool bad = random() % 6 == 0;  // as in check_packed of packed_problem.h
    const GuardedInts cu_seqlens_q(maybe_bad(x.cu_seqlens_q, bad, x.total_q, random));
    const GuardedInts cu_seqlens_k(maybe_bad(x.cu_seqlens_k, bad, x.total_k, random));
    BackwardParams params{};
    params.attention = packed_params(x, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k,
                                     forward_params(q, k, v, out, lse, scale, x.all.mask));
    params.attention.terms = terms.get();
    params.attention.terms.sinks = nullptr;
    params.dout = dout.bytes.data();
    params.dlse = has_dlse ? dlse.data() : nullptr;
    params.do_row_stride = dout.row_stride, params.do_head_stride = dout.head_stride;
    params.dq = dq.bytes.data(), params.dk = dk.bytes.data(), params.dv = dv.bytes.data();
    // NaN, with a guard page behind it.
    GuardedBytes workspace(
        static_cast<size_t>(sm90_backward::workspace_bytes(tile, variant, params.attention)));
    // Without keys there is nothing to launch for.
    if (x.total_k == 0 || x.max_seqlen_k == 0) return true;
    std::string wrong = launch(params, dtype, workspace, random);
    const auto compare_rows = [&](const char* gradient, Tensor& got, bool keys, int b,
                                  const std::vector<double>& want,
                                  const std::vector<double>& allowed) {
      if (!wrong.empty()) return;
      Tensor mine(dtype, 1, keys ? x.seqlen_kv(b) : x.seqlen_q(b), got.heads, x.all.head_dim, 0,
                  false);
      copy_rows(got, keys ? x.k_begin(b) : x.q_begin(b), mine);
      // Copied rows have no bytes outside them.
      wrong = compare_values(gradient, mine, want, allowed);
      if (!wrong.empty()) wrong = "sequence " + std::to_string(b) + ": " + wrong;
    };
    for (int b = 0; b < x.batch() && !bad; ++b) {
      if (b == poisoned) continue;
      const Expected& mine = expected[static_cast<size_t>(b)];
      compare_rows("dv", dv, true, b, mine.want.dv, mine.allowed.dv);
      compare_rows("dk", dk, true, b, mine.want.dk, mine.allowed.dk);
      compare_rows("dq", dq, false, b, mine.want.dq, mine.allowed.dq);
    }
    for (Tensor* tensor : {&dq, &dk, &dv}) {
      const int end = tensor == &dq ? x.cu_seqlens_q.back() : x.cu_seqlens_k.back();
      for (int s = end; s < tensor->seqlen && wrong.empty() && !bad; ++s)
        for (int h = 0; h < tensor->heads; ++h)
          for (int d = 0; d < x.all.head_dim; ++d)
            if (tensor->get(0, s, h, d) != 0) wrong = "a row of no sequence has a gradient";
    }
    const auto again = [&] { return launch(params, dtype, workspace, random); };
    if (wrong.empty() && variant.deterministic && !bad) wrong = compare_bits(dq, dk, dv, again);
    if (wrong.empty()) return true;
    std::printf("%s, %s, %s, seed %llu: %s\n", name, x.text().c_str(),
                dtype == DType::float16 ? "float16" : "bfloat16",
                static_cast<unsigned long long>(seed), wrong.c_str());
    return false;
  }

  bool check(Problem x, uint64_t seed) const {
    std::mt19937_64 random(seed);
    if (variant.whole) x.seqlen_kv = std::min(x.seqlen_kv, 1 + (x.seqlen_kv - 1) % block_n());
    if (variant.packed) {
      const PackedProblem packed =
          random_packed_problem(tile.head_dim, tile.block_m, tile.block_n, may(), false, random);
      return check_packed(packed, random());
    }
    const DType dtype = random() % 2 ? DType::float16 : DType::bfloat16;
    const bool heads_first = random() % 2;
    Tensor q(dtype, x.batch, x.seqlen_q, x.heads_q, x.head_dim, 8, heads_first);
    Tensor k(dtype, x.batch, x.seqlen_kv, x.heads_kv, x.head_dim, 8, heads_first);
    Tensor v(dtype, x.batch, x.seqlen_kv, x.heads_kv, x.head_dim, 8, !heads_first);
    Tensor out(dtype, x.batch, x.seqlen_q, x.heads_q, x.head_dim, 8, heads_first);
    Tensor dout(dtype, x.batch, x.seqlen_q, x.heads_q, x.head_dim, 8, !heads_first);
    Tensor dq(dtype, x.batch, x.seqlen_q, x.heads_q, x.head_dim, 0, false);
    Tensor dk(dtype, x.batch, x.seqlen_kv, x.heads_kv, x.head_dim, 0, false);
    Tensor dv(dtype, x.batch, x.seqlen_kv, x.heads_kv, x.head_dim, 0, false);
    std::normal_distribution<double> normal;
    for (Tensor* tensor : {&q, &k, &v, &dout}) {
      int element = 0, size = 1;
      tensor->fill([&] {
        if (element++ % x.head_dim == 0) size = random() % 8 != 0 ? 1 : 4;
        return size * normal(random);
      });
    }
    for (Tensor* tensor : {&q, &dout}) poison_unseen(*tensor, block_m(), x.seqlen_kv, x.mask);
    for (Tensor* tensor : {&k, &v})
      poison_unseen(*tensor, block_n(), x.seqlen_q, {x.mask.right, x.mask.left});
    for (Tensor* tensor : {&dq, &dk, &dv})
      std::fill(tensor->bytes.begin(), tensor->bytes.end(), POISON);
    const float scale = 1 / std::sqrt(static_cast<float>(x.head_dim));
    std::vector<int> order(x.head_dim);
    std::iota(order.begin(), order.end(), 0);
    const RandomTerms terms_but_mask(x, random);
    const RandomMask attn_mask(x, dtype, random);
    Terms terms = terms_but_mask.get();
    terms.attn_mask = attn_mask.get();
    const auto forward = reference<double>(q, k, v, scale, x.mask, order, terms);
    std::vector<float> lse(forward.lse.begin(), forward.lse.end());
    for (size_t r = 0; r < forward.lse.size(); ++r) {
      const int i = r % x.seqlen_q, h = r / x.seqlen_q % x.heads_q, b = r / x.seqlen_q / x.heads_q;
      for (int d = 0; d < x.head_dim; ++d) out.set(b, i, h, d, forward.out[r * x.head_dim + d]);
    }

    // NaN where softmax_lse is -infinity: there it is a constant.
    std::vector<float> dlse(lse.size());
    for (size_t r = 0; r < lse.size(); ++r)
      dlse[r] = lse[r] == -INFINITY ? NAN : static_cast<float>(normal(random));
    const float* given_dlse = random() % 2 ? dlse.data() : nullptr;

    BackwardParams params{};
    params.attention = forward_params(q, k, v, out, lse, scale, x.mask);
    params.attention.terms = terms;
    params.attention.terms.sinks = nullptr;
    params.dout = dout.bytes.data();
    params.dlse = given_dlse;
    params.do_batch_stride = dout.batch_stride, params.do_row_stride = dout.row_stride;
    params.do_head_stride = dout.head_stride;
    params.dq = dq.bytes.data(), params.dk = dk.bytes.data(), params.dv = dv.bytes.data();
    // NaN, with a guard page behind it.
    GuardedBytes workspace(
        static_cast<size_t>(sm90_backward::workspace_bytes(tile, variant, params.attention)));
    std::string wrong = launch(params, dtype, workspace, random);
    Gradients want(forward.out.size(),
                   static_cast<size_t>(x.batch) * x.seqlen_kv * x.heads_kv * x.head_dim);
    Gradients allowed = want;
    reference_gradients(q, k, v, out, dout, lse, given_dlse, scale, x.mask, terms, want, allowed);
    if (wrong.empty()) wrong = compare_gradient("dv", dv, want.dv, allowed.dv);
    if (wrong.empty()) wrong = compare_gradient("dk", dk, want.dk, allowed.dk);
    if (wrong.empty()) wrong = compare_gradient("dq", dq, want.dq, allowed.dq);
    if (wrong.empty() && variant.deterministic) {
      wrong = compare_turns(x, terms.attn_mask, workspace.data());
    }
    const auto again = [&] { return launch(params, dtype, workspace, random); };
    if (wrong.empty() && (variant.deterministic || variant.whole)) {
      wrong = compare_bits(dq, dk, dv, again);
    }
    if (wrong.empty()) return true;
    std::printf("%s, %s, %s, seed %llu: %s\n", name, x.text().c_str(),
                dtype == DType::float16 ? "float16" : "bfloat16",
                static_cast<unsigned long long>(seed), wrong.c_str());
    return false;
  }
};

// Boxes that an instance loads for a problem besides K and V, which each thread block does.
long long loads_of(const Instance& x, const Problem& problem, const AttnMask& mask) {
  const Problem& p = problem;
  const auto queries = [&] {
    return Tensor(DType::bfloat16, p.batch, p.seqlen_q, p.heads_q, p.head_dim, 0, false);
  };
  const auto keys = [&] {
    return Tensor(DType::bfloat16, p.batch, p.seqlen_kv, p.heads_kv, p.head_dim, 0, false);
  };
  Tensor q = queries(), out = queries(), dout = queries(), dq = queries();
  Tensor k = keys(), v = keys(), dk = keys(), dv = keys();
  for (Tensor* tensor : {&q, &out, &dout, &k, &v}) tensor->fill([] { return 1.; });
  std::vector<float> lse(static_cast<size_t>(p.batch) * p.heads_q * p.seqlen_q);
  BackwardParams params{};
  params.attention = forward_params(q, k, v, out, lse, 0.1f, p.mask);
  params.attention.terms.attn_mask = mask;
  params.dout = dout.bytes.data(), params.do_batch_stride = dout.batch_stride;
  params.do_row_stride = dout.row_stride, params.do_head_stride = dout.head_stride;
  params.dq = dq.bytes.data(), params.dk = dk.bytes.data(), params.dv = dv.bytes.data();
  GuardedBytes workspace(
      static_cast<size_t>(sm90_backward::workspace_bytes(x.tile, x.variant, params.attention)));
  std::mt19937_64 random(0);
  const long long before = emulator::tma_loads;
  if (!x.launch(params, DType::bfloat16, workspace, random).empty()) return -1;
  const int n_blocks = (p.seqlen_kv + x.block_n() - 1) / x.block_n();
  return emulator::tma_loads - before - 2ll * n_blocks * p.heads_kv * p.batch * x.tile.panels();
}

template <Sm90BackwardTile TILE, Variant VARIANT = Variant{}>
Instance instance(const char* name) {
  (void)LegalSm90BackwardTile<TILE>{};
  using F = __half;
  using B = __nv_bfloat16;
  return {name,
          TILE,
          VARIANT,
          {{prepare<F, TILE, VARIANT>, kernel<F, TILE, VARIANT>, finish<F, TILE, VARIANT>},
           {prepare<B, TILE, VARIANT>, kernel<B, TILE, VARIANT>, finish<B, TILE, VARIANT>}}};
}

constexpr Variant LOCAL{true}, DETERMINISTIC{false, true}, BOTH{true, true},
    SOFTCAP{.softcap = true}, ALIBI{.alibi = true}, DROPOUT{.dropout = true},
    ALL{.local = true, .deterministic = true, .softcap = true, .alibi = true, .dropout = true};
constexpr Variant WHOLE{.whole = true}, LOCAL_WHOLE{.local = true, .whole = true};
constexpr Variant MASK{.mask = true}, LOCAL_MASK{.local = true, .mask = true},
    DETERMINISTIC_MASK{.deterministic = true, .mask = true},
    SOFTCAP_MASK{.softcap = true, .mask = true}, DROPOUT_MASK{.dropout = true, .mask = true},
    ALL_MASK{.local = true,
             .deterministic = true,
             .softcap = true,
             .alibi = true,
             .dropout = true,
             .mask = true};
constexpr Variant PACKED{.packed = true}, LOCAL_PACKED{.local = true, .packed = true};
constexpr Variant DETERMINISTIC_PACKED{.deterministic = true, .packed = true},
    ALL_PACKED{.local = true,
               .deterministic = true,
               .softcap = true,
               .alibi = true,
               .dropout = true,
               .packed = true};

// head_dim, block_m, block_n, num_stages, do_stages, ds_stages, late_dq
const Instance INSTANCES[] = {
    instance<{64, 128, 128, 2, 2, 2, false}>("64:128x128-q2-do2-ds2"),
    instance<{64, 128, 128, 3, 3, 2, true}>("64:128x128-q3-do3-ds2-late"),
    instance<{96, 64, 128, 3, 2, 1, false}>("96:64x128-q3-do2-ds1"),
    instance<{128, 64, 128, 2, 1, 2, true}>("128:64x128-q2-do1-ds2-late"),
    instance<{256, 64, 64, 2, 2, 1, false}>("256:64x64-q2-do2-ds1"),
    instance<{64, 128, 128, 2, 2, 2, false}, LOCAL>("64:128x128-q2-do2-ds2-local"),
    instance<{64, 128, 128, 3, 3, 2, true}, LOCAL>("64:128x128-q3-do3-ds2-late-local"),
    instance<{96, 64, 128, 3, 2, 1, false}, LOCAL>("96:64x128-q3-do2-ds1-local"),
    instance<{128, 64, 128, 2, 1, 2, true}, LOCAL>("128:64x128-q2-do1-ds2-late-local"),
    instance<{256, 64, 64, 2, 2, 1, false}, LOCAL>("256:64x64-q2-do2-ds1-local"),
    instance<{64, 128, 128, 2, 2, 2, false}, DETERMINISTIC>("64:128x128-q2-do2-ds2-det"),
    instance<{96, 64, 128, 3, 2, 1, false}, BOTH>("96:64x128-q3-do2-ds1-local-det"),
    instance<{128, 64, 128, 2, 1, 2, true}, DETERMINISTIC>("128:64x128-q2-do1-ds2-late-det"),
    instance<{64, 128, 128, 3, 3, 2, true}, BOTH>("64:128x128-q3-do3-ds2-late-local-det"),
    instance<{256, 64, 64, 2, 2, 1, false}, DETERMINISTIC>("256:64x64-q2-do2-ds1-det"),
    instance<{256, 64, 64, 2, 2, 1, false}, BOTH>("256:64x64-q2-do2-ds1-local-det"),
    instance<{64, 128, 128, 3, 3, 2, true}, WHOLE>("64:128x128-q3-do3-ds2-late-whole"),
    instance<{96, 64, 128, 3, 2, 1, false}, LOCAL_WHOLE>("96:64x128-q3-do2-ds1-local-whole"),
    instance<{128, 64, 128, 2, 1, 2, true}, WHOLE>("128:64x128-q2-do1-ds2-late-whole"),
    instance<{256, 64, 64, 2, 2, 1, false}, WHOLE>("256:64x64-q2-do2-ds1-whole"),
    instance<{64, 128, 128, 3, 3, 2, true}, SOFTCAP>("64:128x128-q3-do3-ds2-late-softcap"),
    instance<{96, 64, 128, 3, 2, 1, false}, SOFTCAP>("96:64x128-q3-do2-ds1-softcap"),
    instance<{256, 64, 64, 2, 2, 1, false}, SOFTCAP>("256:64x64-q2-do2-ds1-softcap"),
    instance<{128, 64, 128, 2, 1, 2, true}, ALIBI>("128:64x128-q2-do1-ds2-late-alibi"),
    instance<{96, 64, 128, 3, 2, 1, false}, ALIBI>("96:64x128-q3-do2-ds1-alibi"),
    instance<{256, 64, 64, 2, 2, 1, false}, ALIBI>("256:64x64-q2-do2-ds1-alibi"),
    instance<{64, 128, 128, 3, 3, 2, true}, DROPOUT>("64:128x128-q3-do3-ds2-late-dropout"),
    instance<{96, 64, 128, 3, 2, 1, false}, DROPOUT>("96:64x128-q3-do2-ds1-dropout"),
    instance<{128, 64, 128, 2, 1, 2, true}, DROPOUT>("128:64x128-q2-do1-ds2-late-dropout"),
    instance<{256, 64, 64, 2, 2, 1, false}, DROPOUT>("256:64x64-q2-do2-ds1-dropout"),
    instance<{64, 128, 128, 2, 2, 2, false}, ALL>("64:128x128-q2-do2-ds2-all"),
    instance<{128, 64, 128, 2, 1, 2, true}, ALL>("128:64x128-q2-do1-ds2-late-all"),
    instance<{256, 64, 64, 2, 2, 1, false}, ALL>("256:64x64-q2-do2-ds1-all"),
    instance<{64, 128, 128, 3, 3, 2, true}, PACKED>("64:128x128-q3-do3-ds2-late-packed"),
    instance<{96, 64, 128, 3, 2, 1, false}, PACKED>("96:64x128-q3-do2-ds1-packed"),
    instance<{256, 64, 64, 2, 2, 1, false}, PACKED>("256:64x64-q2-do2-ds1-packed"),
    instance<{64, 128, 128, 2, 2, 2, false}, LOCAL_PACKED>("64:128x128-q2-do2-ds2-local-packed"),
    instance<{128, 64, 128, 2, 1, 2, true}, LOCAL_PACKED>(
        "128:64x128-q2-do1-ds2-late-local-packed"),
    instance<{128, 64, 128, 2, 1, 2, true}, DETERMINISTIC_PACKED>(
        "128:64x128-q2-do1-ds2-late-det-packed"),
    instance<{64, 128, 128, 2, 2, 2, false}, ALL_PACKED>("64:128x128-q2-do2-ds2-all-packed"),
    instance<{64, 128, 128, 3, 3, 2, true}, MASK>("64:128x128-q3-do3-ds2-late-mask"),
    instance<{96, 64, 128, 3, 2, 1, false}, MASK>("96:64x128-q3-do2-ds1-mask"),
    instance<{128, 64, 128, 3, 2, 2, true}, MASK>("128:64x128-q3-do2-ds2-late-mask"),
    instance<{256, 64, 64, 2, 2, 1, false}, MASK>("256:64x64-q2-do2-ds1-mask"),
    instance<{64, 128, 128, 2, 2, 2, false}, LOCAL_MASK>("64:128x128-q2-do2-ds2-local-mask"),
    instance<{128, 64, 128, 2, 1, 2, true}, DETERMINISTIC_MASK>(
        "128:64x128-q2-do1-ds2-late-det-mask"),
    instance<{64, 128, 128, 3, 3, 2, true}, SOFTCAP_MASK>(
        "64:128x128-q3-do3-ds2-late-softcap-mask"),
    instance<{128, 64, 128, 2, 1, 2, true}, DROPOUT_MASK>(
        "128:64x128-q2-do1-ds2-late-dropout-mask"),
    instance<{96, 64, 128, 3, 2, 1, false}, ALL_MASK>("96:64x128-q3-do2-ds1-all-mask"),
    instance<{256, 64, 64, 2, 2, 1, false}, ALL_MASK>("256:64x64-q2-do2-ds1-all-mask"),
};

}  // namespace

int main(int argc, char** argv) {
  constexpr Sm90BackwardTile TILE{64, 128, 128, 2, 2, 2, false};
  const Instance plain = instance<TILE>("plain"), masked = instance<TILE, MASK>("a mask");
  const bool is_cheap =
      padding_costs_lengths("backward", {1, 2, 1, 300, 600, 64, {-1, -1}, 0, false, false, true, 0},
                            [&](const Problem& x, const AttnMask& mask) {
                              return loads_of(mask.is_given() ? masked : plain, x, mask);
                            });
  return run_all(INSTANCES, argc, argv) || !is_cheap;
}
