// Attention problems on emulator::run: random tensors, and what comes out against float64. What is
// between rows is NaN, outputs are poisoned first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/attention/params.h"
#include "emulator/include/cuda_runtime.h"
#include "emulator/number.h"

namespace flashmoe {

struct Problem {
  int batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim;
  bool causal;

  std::string text() const {
    std::string text;
    for (const int n : {batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim}) {
      text += std::to_string(n) + " ";
    }
    return text + (causal ? "causal" : "full");
  }
};

inline uint16_t to_bits(DType dtype, float x) {
  return dtype == DType::float16 ? emulator::to_float16(x) : emulator::to_bfloat16(x);
}
inline float from_bits(DType dtype, uint16_t bits) {
  return dtype == DType::float16 ? emulator::from_float16(bits) : emulator::from_bfloat16(bits);
}

constexpr uint16_t POISON = 0x5a5a;  // about 1.5e16 in bfloat16, 203 in float16

// (batch, seqlen, heads, head_dim) with more elements between heads than there need be: 8, or where
// rows are not to be aligned, 5.
struct Tensor {
  int batch, seqlen, heads, head_dim, between;
  std::vector<uint16_t> memory;
  uint16_t* data;

  Tensor(int batch, int seqlen, int heads, int head_dim, bool aligned, uint16_t fill)
      : batch(batch), seqlen(seqlen), heads(heads), head_dim(head_dim), between(aligned ? 8 : 5) {
    memory.assign(static_cast<size_t>(batch_stride()) * batch + 8, fill);
    data = memory.data();
    while (reinterpret_cast<uintptr_t>(data) % 16 != 0) ++data;
  }
  long long head_stride() const { return head_dim + between; }
  long long row_stride() const { return head_stride() * heads; }
  long long batch_stride() const { return row_stride() * seqlen; }
  uint16_t& at(int b, int s, int h, int d) {
    return data[b * batch_stride() + s * row_stride() + h * head_stride() + d];
  }
};

inline Tensor random_tensor(int batch, int seqlen, int heads, int head_dim, bool aligned,
                            DType dtype, std::mt19937_64& random) {
  Tensor tensor(batch, seqlen, heads, head_dim, aligned, 0xffff);  // NaN
  std::normal_distribution<float> normal;
  for (int b = 0; b < batch; ++b) {
    for (int s = 0; s < seqlen; ++s) {
      // Some rows are large, so that maxima grow late and by much.
      const float scale = random() % 8 == 0 ? 4.f : 1.f;
      for (int h = 0; h < heads; ++h) {
        for (int d = 0; d < head_dim; ++d) {
          tensor.at(b, s, h, d) = to_bits(dtype, scale * normal(random));
        }
      }
    }
  }
  return tensor;
}

// What is wrong with out and softmax_lse, or nothing.
inline std::string compare(const Problem& x, DType dtype, float scale, Tensor& q, Tensor& k,
                           Tensor& v, Tensor& out, const std::vector<float>& lse) {
  // P and O are rounded to the dtype; V's large rows are 4 times the others.
  const double unit = dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
  std::vector<double> p(x.seqlen_kv), expected(x.head_dim), magnitude(x.head_dim);
  for (int b = 0; b < x.batch; ++b) {
    for (int h = 0; h < x.heads_q; ++h) {
      const int h_kv = h / (x.heads_q / x.heads_kv);
      for (int i = 0; i < x.seqlen_q; ++i) {
        int keys = x.seqlen_kv;
        if (x.causal) keys = std::clamp(i + x.seqlen_kv - x.seqlen_q + 1, 0, x.seqlen_kv);
        double most = -INFINITY, sum = 0;
        for (int j = 0; j < keys; ++j) {
          p[j] = 0;
          for (int d = 0; d < x.head_dim; ++d) {
            p[j] += static_cast<double>(from_bits(dtype, q.at(b, i, h, d))) *
                    from_bits(dtype, k.at(b, j, h_kv, d));
          }
          p[j] *= scale;
          most = std::max(most, p[j]);
        }
        std::fill(expected.begin(), expected.end(), 0);
        std::fill(magnitude.begin(), magnitude.end(), 0);
        for (int j = 0; j < keys; ++j) {
          p[j] = std::exp(p[j] - most);
          sum += p[j];
          for (int d = 0; d < x.head_dim; ++d) {
            const double term = p[j] * from_bits(dtype, v.at(b, j, h_kv, d));
            expected[d] += term;
            magnitude[d] += std::abs(term);
          }
        }
        const std::string where = "batch " + std::to_string(b) + ", head " + std::to_string(h) +
                                  ", row " + std::to_string(i);
        for (int d = 0; d < x.head_dim + out.between; ++d) {
          const uint16_t bits = out.at(b, i, h, d);
          if (d >= x.head_dim) {
            if (bits != POISON) return where + ": written past head_dim";
            continue;
          }
          const double wanted = keys == 0 ? 0 : expected[d] / sum;
          const double allowed = keys == 0 ? 0 : 2 * unit * magnitude[d] / sum + 1e-6;
          if (!(std::abs(from_bits(dtype, bits) - wanted) <= allowed)) {
            return where + ", column " + std::to_string(d) + ": " +
                   std::to_string(from_bits(dtype, bits)) + ", not " + std::to_string(wanted);
          }
        }
        const double wanted = keys == 0 ? -INFINITY : most + std::log(sum);
        const float mine = lse[(static_cast<size_t>(b) * x.heads_q + h) * x.seqlen_q + i];
        if (!(keys == 0 ? mine == -INFINITY : std::abs(mine - wanted) <= 1e-4)) {
          return where + ": softmax_lse " + std::to_string(mine) + ", not " +
                 std::to_string(wanted);
        }
      }
    }
  }
  return "";
}

// Shapes around a tile's, where blocks of rows see all, some or none of the keys.
inline Problem random_problem(int head_dim, int block_m, int block_n, std::mt19937_64& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  Problem x;
  x.head_dim = head_dim - 8 * below(3);
  x.batch = 1 + below(2);
  x.heads_kv = 1 + below(2);
  x.heads_q = x.heads_kv * (1 + below(2));
  x.causal = below(3) > 0;
  x.seqlen_q = 1 + below(3 * block_m);
  x.seqlen_kv = 1 + below(4 * block_n);
  if (below(2) == 0) x.seqlen_q = x.seqlen_kv;
  return x;
}

// Whether a problem comes out right: with tensors of the seed's, on a device of the seed's. Says
// what does not. `launch` returns what went wrong there, or nothing.
using LaunchForward = std::function<std::string(const AttentionParams&, DType, std::mt19937_64&)>;
inline bool check(const std::string& name, const Problem& x, bool aligned, uint64_t seed,
                  const LaunchForward& launch) {
  std::mt19937_64 random(seed);
  const DType dtype = random() % 2 ? DType::float16 : DType::bfloat16;
  Tensor q = random_tensor(x.batch, x.seqlen_q, x.heads_q, x.head_dim, aligned, dtype, random);
  Tensor k = random_tensor(x.batch, x.seqlen_kv, x.heads_kv, x.head_dim, aligned, dtype, random);
  Tensor v = random_tensor(x.batch, x.seqlen_kv, x.heads_kv, x.head_dim, aligned, dtype, random);
  Tensor out(x.batch, x.seqlen_q, x.heads_q, x.head_dim, true, POISON);
  std::vector<float> lse(static_cast<size_t>(x.batch) * x.heads_q * x.seqlen_q, NAN);
  AttentionParams params{};
  params.q = q.data, params.k = k.data, params.v = v.data, params.out = out.data;
  params.softmax_lse = lse.data();
  params.q_batch_stride = q.batch_stride(), params.q_row_stride = q.row_stride();
  params.k_batch_stride = k.batch_stride(), params.k_row_stride = k.row_stride();
  params.v_batch_stride = v.batch_stride(), params.v_row_stride = v.row_stride();
  params.o_batch_stride = out.batch_stride(), params.o_row_stride = out.row_stride();
  params.q_head_stride = q.head_stride(), params.k_head_stride = k.head_stride();
  params.v_head_stride = v.head_stride(), params.o_head_stride = out.head_stride();
  params.batch = x.batch, params.heads_q = x.heads_q, params.heads_kv = x.heads_kv;
  params.seqlen_q = x.seqlen_q, params.seqlen_kv = x.seqlen_kv, params.head_dim = x.head_dim;
  params.softmax_scale = 1 / std::sqrt(static_cast<float>(x.head_dim));
  params.causal = x.causal;

  fake_device.sm_count = 1 + static_cast<int>(random() % 3);
  fake_device.seed = random();
  std::string wrong = launch(params, dtype, random);
  if (wrong.empty()) wrong = compare(x, dtype, params.softmax_scale, q, k, v, out, lse);
  if (wrong.empty()) return true;
  std::printf("%s, %s, %s, seed %llu: %s\n", name.c_str(), x.text().c_str(),
              dtype == DType::float16 ? "float16" : "bfloat16",
              static_cast<unsigned long long>(seed), wrong.c_str());
  return false;
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
      const Problem x =
          random_problem(instance.head_dim(), instance.block_m(), instance.block_n(), random);
      failures += !instance.check(x, random());
      ++runs;
    }
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0 || runs == 0;
}

}  // namespace flashmoe
