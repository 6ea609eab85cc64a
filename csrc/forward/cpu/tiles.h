// The register tiles and the exponential of the CPU forward kernel, over a vector type Vec of one
// instruction set. Everything here has internal linkage and nothing comes from std: an inline
// function compiled for AVX-512 must never be the copy that the linker keeps for everyone.
#pragma once

namespace flashmoe {
namespace {

#define FLASHMOE_INLINE inline __attribute__((always_inline))
#define FLASHMOE_NOINLINE __attribute__((noinline))

// K is staged in groups of KEY_GROUP keys, the keys of a group interleaved: [group][head_dim][4].
constexpr int KEY_GROUP = 4;

// 2^(x - shift) for x <= 0 and a whole shift, within 3 * 2^-24 relative. Below 2^-126.5 it is
// exactly 0 (x of -inf included); NaN gives NaN. Polynomial: minimax for the relative error of 2^f
// on [-0.5, 0.5] with p(0) = 1.
template <class Vec>
FLASHMOE_INLINE typename Vec::Reg exp2_nonpositive(typename Vec::Reg x, float shift = 0.0f) {
  // Adding 1.5 * 2^23 rounds to an integer; the extra 127 leaves the biased exponent in the low
  // bits.
  const auto magic = Vec::set1(12582912.0f + 127.0f - shift);
  x = Vec::max(Vec::set1(shift - 127.0f), x);
  const auto biased = Vec::add(x, magic);
  const auto f = Vec::sub(x, Vec::sub(biased, magic));
  auto p = Vec::set1(0x1.5bba14p-10f);
  p = Vec::fma(p, f, Vec::set1(0x1.3cea88p-7f));
  p = Vec::fma(p, f, Vec::set1(0x1.c6b752p-5f));
  p = Vec::fma(p, f, Vec::set1(0x1.ebf9bcp-3f));
  p = Vec::fma(p, f, Vec::set1(0x1.62e42ap-1f));
  p = Vec::fma(p, f, Vec::set1(1.0f));
  return Vec::mul(p, Vec::exponent_from_low_bits(biased));
}

// tanh, within 2 * 2^-24 relative. Polynomial: minimax for the relative error of tanh(x) on
// [-0.625, 0.625], where 1 - exp(-2 |x|) would cancel.
template <class Vec>
FLASHMOE_INLINE typename Vec::Reg tanh(typename Vec::Reg x) {
  const auto zero = Vec::set1(0.0f), one = Vec::set1(1.0f);
  const auto magnitude = Vec::max(Vec::sub(zero, x), x);
  const auto square = Vec::mul(x, x);
  auto p = Vec::set1(-0x1.75e1cap-8f);
  p = Vec::fma(p, square, Vec::set1(0x1.52269ap-6f));
  p = Vec::fma(p, square, Vec::set1(-0x1.b83c5ap-5f));
  p = Vec::fma(p, square, Vec::set1(0x1.110726p-3f));
  p = Vec::fma(p, square, Vec::set1(-0x1.555532p-2f));
  const auto small = Vec::fma(Vec::mul(x, square), p, x);
  // exp(-2 |x|): 2 * log2(e) = 2.885...
  const auto e = exp2_nonpositive<Vec>(Vec::mul(magnitude, Vec::set1(-2.88539008177792681f)));
  const auto large = Vec::div(Vec::sub(one, e), Vec::add(one, e));
  const auto with_sign = Vec::select_greater(x, zero, large, Vec::sub(zero, large));
  return Vec::select_greater(Vec::set1(0.625f), magnitude, small, with_sign);
}

// S^T[keys][NV vectors of rows] = softcap * tanh(scale * S^T)
template <class Vec, int NV>
FLASHMOE_NOINLINE void softcap_panel(int keys, float scale, float softcap, float* s_t) {
  for (int n = 0; n < keys; ++n) {
    for (int j = 0; j < NV; ++j) {
      float* s = s_t + n * Vec::PANEL + j * Vec::WIDTH;
      const auto x = Vec::mul(Vec::load(s), Vec::set1(scale));
      Vec::store(s, Vec::mul(Vec::set1(softcap), tanh<Vec>(x)));
    }
  }
}

// S^T[keys][NV vectors of rows] = scale * S^T
template <class Vec, int NV>
FLASHMOE_NOINLINE void scale_panel(int keys, float scale, float* s_t) {
  for (int n = 0; n < keys; ++n) {
    for (int j = 0; j < NV; ++j) {
      float* s = s_t + n * Vec::PANEL + j * Vec::WIDTH;
      Vec::store(s, Vec::mul(Vec::load(s), Vec::set1(scale)));
    }
  }
}

// S^T[keys][NV vectors of rows] = scale * S^T - slopes[row] * |positions[row] - key|
template <class Vec, int NV>
FLASHMOE_NOINLINE void alibi_panel(int keys, float scale, const float* slopes,
                                   const float* positions, float* s_t) {
  for (int n = 0; n < keys; ++n) {
    const auto key = Vec::set1(static_cast<float>(n));
    for (int j = 0; j < NV; ++j) {
      float* s = s_t + n * Vec::PANEL + j * Vec::WIDTH;
      const auto ahead = Vec::sub(key, Vec::load(positions + j * Vec::WIDTH));
      const auto nearness =
          Vec::sub(Vec::set1(0.0f), Vec::max(ahead, Vec::sub(Vec::set1(0.0f), ahead)));
      const auto x = Vec::mul(Vec::load(s), Vec::set1(scale));
      Vec::store(s, Vec::fma(Vec::load(slopes + j * Vec::WIDTH), nearness, x));
    }
  }
}

// Products added up in one chain before the chain is added to S. The rounding error of a chain
// grows with its length: one chain of 256 exceeds PyTorch's. Each chain costs a pass over S.
FLASHMOE_INLINE int chain_length(int head_dim) { return head_dim <= 64 ? 32 : 64; }

// S^T[KEYS][NV vectors of rows] (+)= K[KEYS][0:depth] . Q^T[0:depth][rows]
template <class Vec, int KEYS, int NV, bool ADD>
FLASHMOE_INLINE void qk_chain(const float* k, long long group_stride, const float* q_t, int depth,
                              float* s_t) {
  static_assert(KEYS % KEY_GROUP == 0, "keys are staged in whole groups");
  typename Vec::Reg acc[KEYS][NV];
#pragma GCC unroll 16
  for (int i = 0; i < KEYS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec::set1(0.0f);
  }
#pragma GCC unroll 2
  for (int d = 0; d < depth; ++d) {
    typename Vec::Reg q[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) q[j] = Vec::load(q_t + d * Vec::PANEL + j * Vec::WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) {
      const auto k_i = Vec::set1(k[i / KEY_GROUP * group_stride + d * KEY_GROUP + i % KEY_GROUP]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = Vec::fma(k_i, q[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < KEYS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* s = s_t + i * Vec::PANEL + j * Vec::WIDTH;
      if constexpr (ADD) acc[i][j] = Vec::add(acc[i][j], Vec::load(s));
      Vec::store(s, acc[i][j]);
    }
  }
}

// S^T[KEYS][NV vectors of rows] = K[KEYS][head_dim] . Q^T[head_dim][rows]
template <class Vec, int KEYS, int NV>
FLASHMOE_INLINE void qk_tile(const float* k, const float* q_t, int head_dim, float* s_t) {
  const long long group_stride = static_cast<long long>(head_dim) * KEY_GROUP;
  const int chain = chain_length(head_dim);
  const auto depth = [&](int d) { return head_dim - d < chain ? head_dim - d : chain; };
  qk_chain<Vec, KEYS, NV, false>(k, group_stride, q_t, depth(0), s_t);
  for (int d = chain; d < head_dim; d += chain) {
    qk_chain<Vec, KEYS, NV, true>(k + d * KEY_GROUP, group_stride, q_t + d * Vec::PANEL, depth(d),
                                  s_t);
  }
}

// `keys` is rounded up to whole groups; the scores of the excess are written and mean nothing.
template <class Vec, int NV>
FLASHMOE_NOINLINE void qk_panel(int keys, const float* k, const float* q_t, int head_dim,
                                float* s_t) {
  constexpr int KEYS = Vec::QK_KEYS[NV];
  int n = 0;
  for (; n + KEYS <= keys; n += KEYS) {
    qk_tile<Vec, KEYS, NV>(k + n * head_dim, q_t, head_dim, s_t + n * Vec::PANEL);
  }
  for (; n < keys; n += KEY_GROUP) {
    qk_tile<Vec, KEY_GROUP, NV>(k + n * head_dim, q_t, head_dim, s_t + n * Vec::PANEL);
  }
}

// What becomes of the old O when a tile is added to it.
enum class Accumulate : int { overwrite, rescale, add };

// How P is stored: a line of PANEL for each key that is summed over, or for each row of the result.
enum class Lines : int { of_sum, of_result };

// O[ROWS][NV vectors] = alpha[row] * O + sum over keys of P^T[key][row] * V[key][:]
template <class Vec, int ROWS, int NV, Lines LINES = Lines::of_sum>
FLASHMOE_INLINE void pv_tile(int keys, const float* p_t, const float* v, Accumulate accumulate,
                             const float* alpha, float* o, long long o_stride) {
  constexpr int OF_KEY = LINES == Lines::of_sum ? Vec::PANEL : 1;
  constexpr int OF_ROW = LINES == Lines::of_sum ? 1 : Vec::PANEL;
  typename Vec::Reg acc[ROWS][NV];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec::set1(0.0f);
  }
#pragma GCC unroll 2
  for (int n = 0; n < keys; ++n) {
    typename Vec::Reg v_n[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) v_n[j] = Vec::load(v + n * Vec::V_COLUMNS + j * Vec::WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const auto p_i = Vec::set1(p_t[n * OF_KEY + i * OF_ROW]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = Vec::fma(p_i, v_n[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    float* o_i = o + i * o_stride;
    const auto alpha_i = Vec::set1(accumulate == Accumulate::rescale ? alpha[i] : 1.0f);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      if (accumulate != Accumulate::overwrite) {
        acc[i][j] = Vec::fma(alpha_i, Vec::load(o_i + j * Vec::WIDTH), acc[i][j]);
      }
      Vec::store(o_i + j * Vec::WIDTH, acc[i][j]);
    }
  }
}

template <class Vec, int ROWS, int NV, Lines LINES = Lines::of_sum>
FLASHMOE_NOINLINE void pv_rows(int rows, int keys, const float* p_t, const float* v,
                               Accumulate accumulate, const float* alpha, float* o,
                               long long o_stride) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      pv_tile<Vec, ROWS, NV, LINES>(keys, p_t, v, accumulate, alpha, o, o_stride);
    } else {
      pv_rows<Vec, ROWS - 1, NV, LINES>(rows, keys, p_t, v, accumulate, alpha, o, o_stride);
    }
  }
}

}  // namespace
}  // namespace flashmoe
