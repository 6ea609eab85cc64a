// Softmax of the rows that a thread of a consumer warpgroup holds, and S, P and O in its registers.
#pragma once

#include "common/dropout.h"
#include "common/mask_tiles.cuh"
#include "forward/sm90/work.cuh"
#include "ptx/mma.cuh"
#include "ptx/registers.cuh"

namespace flashmoe::sm90 {

// Whether P of a tile that all rows see is computed relative to the maximum of the tiles before,
// without looking for its own. bfloat16 reaches as far as float32, so nothing is lost where P is
// large: rows whose O overflowed are computed again, with their own maximum
// (recompute.cuh).
template <typename T>
constexpr bool MAXIMUM_MAY_LAG = ptx::IS_BFLOAT16<T>;
template <typename T>
constexpr float MAX_SHIFT = max_shift(ptx::IS_BFLOAT16<T>);
// A thread's share of a row's sum below which O, at most the sum times the largest value, is finite
// whatever the values are: those of four threads make less than 1. From there on O is looked at,
// which long rows can afford. float16's largest value is 2^16.
template <typename T>
constexpr float SAFE_SUM = MAXIMUM_MAY_LAG<T> ? 0x1p-3f : 0x1p100f;
// From here on 2^(S - maximum) itself may have overflowed, or a clamped exponential been added.
constexpr float TOO_LARGE = 0x1p100f;
// From here on (in units of log 2) the rounding of a row's maximum can exceed the exponent's range:
// it is a whole unit, and P in float16 has room for some eight.
constexpr float COARSE_MAXIMUM = 0x1p24f;

// 2^x without the MUFU; 0 below -125, 2^127 from 127 on. Cody-Waite split and the minimax
// polynomial of degree 4 on [-1/2, 1/2], relative error 2.7e-6: one of degree 3 is off by 7.5e-5,
// which shows in softmax_lse.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = fminf(fmaxf(x, -125.f), 127.f);
  const float rounded = clamped + ROUND;
  const float f = clamped - (rounded - ROUND);
  float p = fmaf(0.00957010f, f, 0.05591786f);
  p = fmaf(fmaf(fmaf(p, f, 0.24024745f), f, 0.69312181f), f, 0.99999926f);
  // A hidden key's value may be larger than 2^125.
  return ptx::add_to_exponent(p, rounded, x, -125.f);
}

// The running maximum and sum of a thread's two rows, 8 apart. Of the maximum what is added to
// scaled scores is kept: minus the maximum, scaled, and minus MAX_SHIFT; or NO_MAXIMUM where all so
// far were -infinity. Then the next such one gives a P of 0 still, and a finite one that is seen
// while the maximum lags is TOO_LARGE. Thread t of a warpgroup holds of S (64 x BLOCK_N) what wgmma
// gives it: element 4 * n + 2 * half + i is row t / 32 * 16 + t % 32 / 4 + 8 * half, column
// 8 * n + t % 4 * 2 + i.
template <typename T, Sm90Tile TILE>
struct Softmax {
  static constexpr int BLOCK_N = TILE.block_n;
  // How the arithmetic is spread over chains of dependent instructions, where ptxas makes more of
  // one way than of the other: 1 to 3 % (H100, docs/dev/hopper-forward.md).
  static constexpr bool ROWS_APART = TILE.head_dim <= 64 && BLOCK_N >= 128;
  using Scores = float[BLOCK_N / 2];

  const Sm90Params& params;
  float minus_max[2] = {NO_MAXIMUM, NO_MAXIMUM}, row_sum[2] = {0.f, 0.f};
  // Whether a row's limit is negative, where the integer maximum does not order: told when the
  // maximum changes, off the path from S to its exponentials (docs/dev/hopper-forward.md).
  bool negative_limit = false;

  // What an element of S may be before the maximum must grow.
  __device__ __forceinline__ float limit_of(float minus_max) const {
    return minus_max == NO_MAXIMUM ? -INFINITY
                                   : fmaf(-minus_max, params.inverse_scale_log2, params.slack);
  }
  __device__ __forceinline__ void check_limit() {
    const float least = limit_of(fmaxf(minus_max[0], minus_max[1]));
    negative_limit = __any_sync(0xffffffff, !(least >= 0.f));
  }
  __device__ __forceinline__ static float local_max(const Scores& S_rmem, int half) {
    float x[4];  // one chain would wait for itself
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; ++n) {
      const float y = fmaxf(S_rmem[4 * n + 2 * half], S_rmem[4 * n + 2 * half + 1]);
      x[n % 4] = n < 4 ? y : fmaxf(x[n % 4], y);
    }
    return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
  }
  // Whether an element of S in this thread exceeds its row's limit, for rows FIRST to LAST of its
  // two. Floats order as integers once one side is positive, and the integer maximum takes three
  // operands.
  template <int FIRST, int LAST>
  __device__ __forceinline__ bool exceeds(const Scores& S_rmem, const float (&limit)[2]) const {
    if (negative_limit) {
      return bool((local_max(S_rmem, FIRST) > limit[FIRST]) |
                  (local_max(S_rmem, LAST) > limit[LAST]));
    }
    int x[2][2];  // two chains a row: one would wait for itself
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
      for (int half = FIRST; half <= LAST; ++half) {
        int& chain = x[half][n % 2];
        const int s0 = __float_as_int(S_rmem[4 * n + 2 * half]);
        const int s1 = __float_as_int(S_rmem[4 * n + 2 * half + 1]);
        chain = n < 2 ? max(s0, s1) : __vimax3_s32(chain, s0, s1);
      }
    }
    bool any = false;
#pragma unroll
    for (int half = FIRST; half <= LAST; ++half) {
      any |= max(x[half][0], x[half][1]) > __float_as_int(limit[half]);
    }
    return any;
  }
  // The row's maximum from what its four threads hold.
  __device__ __forceinline__ void update_max(float mine, int half) {
    float x = mine;
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
    minus_max[half] = fminf(minus_max[half], fmaf(-x, params.scale_log2, -MAX_SHIFT<T>));
  }
  __device__ __forceinline__ void update_max(const Scores& S_rmem, int half) {
    update_max(local_max(S_rmem, half), half);
  }
  // Brings the maximum up to date with S. FIRST tile of a block of rows, or not; then returns
  // whether the maximum of a row of this warp grew too far, and by what O must be multiplied.
  template <bool FIRST>
  __device__ __forceinline__ bool update(const Scores& S_rmem, float (&rescale)[2]) {
    if constexpr (FIRST) {
      minus_max[0] = minus_max[1] = NO_MAXIMUM;
      row_sum[0] = row_sum[1] = 0.f;
      update_max(S_rmem, 0);
      update_max(S_rmem, 1);
      check_limit();
      return false;
    } else {
      const float limit[2] = {limit_of(minus_max[0]), limit_of(minus_max[1])};
      bool mine;
      if constexpr (ROWS_APART) {
        mine = exceeds<0, 0>(S_rmem, limit) | exceeds<1, 1>(S_rmem, limit);
      } else {
        mine = exceeds<0, 1>(S_rmem, limit);
      }
      const bool grew = __any_sync(0xffffffff, mine);
      if (grew) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float before = minus_max[half];
          update_max(S_rmem, half);
          rescale[half] = ptx::ex2_approx_ftz(minus_max[half] - before);
          row_sum[half] *= rescale[half];
        }
        check_limit();
      }
      return grew;
    }
  }
  // P in 16 bits from S; its sums are added. In chunks that ptxas keeps in order, since it moves
  // nothing across a pmevent: between the exponentials of a chunk stand the FFMAs of the next one,
  // and the sums and conversions of the one LAG before. All of it fits into the time that the MUFU
  // leaves between two exponentials.
  __device__ __forceinline__ void exponentiate(Scores& S_rmem,
                                               unsigned (&P_rmem)[BLOCK_N / 16][4]) {
    constexpr int CHUNK = 4, CHUNKS = BLOCK_N / 2 / CHUNK;
    constexpr int LAG = TILE.serial || TILE.head_dim <= 96 ? 1 : 2;
    auto scale = [&](int chunk) {
#pragma unroll
      for (int e = chunk * CHUNK; e < (chunk + 1) * CHUNK; ++e) {
        S_rmem[e] = fmaf(S_rmem[e], params.scale_log2, minus_max[e / 2 % 2]);
      }
    };
    auto exponentials = [&](int chunk) {
#pragma unroll
      for (int e = chunk * CHUNK; e < (chunk + 1) * CHUNK; ++e) {
        // A share of exp2_fma in 16, spread evenly.
        if (e * TILE.exp2_fma / 16 != (e + 1) * TILE.exp2_fma / 16) {
          S_rmem[e] = exp2_polynomial(S_rmem[e]);
        } else {
          S_rmem[e] = ptx::ex2_approx_ftz(S_rmem[e]);
        }
      }
    };
    float sum[2];
    auto sum_and_pack = [&](int chunk) {
#pragma unroll
      for (int e = chunk * CHUNK; e < (chunk + 1) * CHUNK; e += 2) {
        float& row = sum[e / 2 % 2];
        row = e < 4 ? S_rmem[e] : row + S_rmem[e];
        row += S_rmem[e + 1];
        P_rmem[e / 8][e / 2 % 4] = ptx::cvt_rn_x2<T>(S_rmem[e], S_rmem[e + 1]);
      }
    };
    scale(0);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS + LAG; ++chunk) {
      if (chunk + 1 < CHUNKS) scale(chunk + 1);
      if (chunk < CHUNKS) exponentials(chunk);
      if (chunk >= LAG) sum_and_pack(chunk - LAG);
      if (chunk < CHUNKS) ptx::pmevent();
    }
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
  }
};

// What ALiBi takes from a score for each key between its query and its key, in units of S.
template <Variant VARIANT>
__device__ __forceinline__ float alibi_slope(const Sm90Params& params, int batch, int head) {
  const Terms& terms = params.attention.terms;
  if (!VARIANT.alibi || terms.alibi_slopes == nullptr) return 0.f;
  return terms.alibi_slopes[batch * terms.alibi_batch_stride + head] * 1.4426950408889634f *
         params.inverse_scale_log2;
}
// A score with the variant's terms, in units of Q K^T as before, or with softcap in those of tanh:
// scale_log2 is that of softcap then. `distance` is how many keys lie between its query and it.
template <Variant VARIANT>
__device__ __forceinline__ float with_terms(const Sm90Params& params, float s, float slope,
                                            float distance) {
  if constexpr (VARIANT.softcap) s = ptx::tanh_approx(s * params.cap_scale);
  if constexpr (VARIANT.alibi) s = fmaf(-slope, fabsf(distance), s);
  return s;
}
// S of a thread's two rows: the first one is level with the key `level` columns behind the thread's
// first.
template <int BLOCK_N, Variant VARIANT>
__device__ __forceinline__ void add_terms(float (&S_rmem)[BLOCK_N / 2], const Sm90Params& params,
                                          float slope, int level) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float first = static_cast<float>(level + half * 8);
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& s = S_rmem[4 * n + 2 * half + i];
        s = with_terms<VARIANT>(params, s, slope, first - (8 * n + i));
      }
    }
  }
}

// -infinity for the keys that a thread's rows do not see: of row `row0` and the one 8 below,
// columns from `column0` on.
template <int BLOCK_N, Variant VARIANT, bool LEFT_ONLY>
__device__ __forceinline__ void mask_S(float (&S_rmem)[BLOCK_N / 2],
                                       const VisibleKeys<VARIANT>& visible_keys, int row0,
                                       int column0) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + half * 8;
    const KeyRange keys = visible_keys(row, row);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // A bit for each element of the row in this thread, 8 columns apart: those before `key`.
      const auto before = [&](int key) {
        const int count = (key - column0 - i + 7) >> 3;
        return count <= 0 ? 0 : count >= 32 ? 0xffffffff : (1u << count) - 1;
      };
      unsigned bits = LEFT_ONLY ? 0xffffffff : before(keys.end);
      if constexpr (VARIANT.local) bits &= ~before(keys.begin);
#pragma unroll
      for (int n = 0; n < BLOCK_N / 8; ++n) {
        float& s = S_rmem[4 * n + 2 * half + i];
        s = bits >> n & 1 ? s : -INFINITY;
      }
    }
  }
}

// Of a head that a warp agrees on, which the shuffles tell the compiler.
__device__ __forceinline__ Dropout warp_dropout(const Terms& terms, int batch, int head) {
  Dropout dropout = Dropout::of(terms, batch, head);
  for (unsigned* x : {&dropout.key0, &dropout.key1, &dropout.counter2, &dropout.counter3}) {
    *x = __shfl_sync(0xffffffff, *x, 0);
  }
  return dropout;
}
// 0 for the weights of P that dropout drops, of a warp's 16 rows from `row` on and the columns from
// `column` on.
template <int TILES>
__device__ __forceinline__ void drop_weights(unsigned (&P_rmem)[TILES][4], const Dropout& dropout,
                                             int row, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < TILES; ++k) {
    const Philox bits = dropout.bits(row + lane / 4, column + k * 16 + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) P_rmem[k][i] &= dropout.kept_halves(bits.x[i]);
  }
}

constexpr float LOG2_E = 1.4426950408889634f;

// What attn_mask adds to a score, in its units. Finite ones stay so, and are what P can still be
// computed from: scaled at least -1e38, which makes minus a maximum less than NO_MAXIMUM.
__device__ __forceinline__ float mask_term(const Sm90Params& params, float value) {
  return fmaxf(value * (params.inverse_scale_log2 * LOG2_E),
               -1e38f * fminf(params.inverse_scale_log2, 1.f));
}

// The mask of a thread's part of a tile of S.
template <typename T, Sm90Tile TILE>
struct TileMask {
  static constexpr int WORDS = MaskTiles::words(TILE.block_n);
  using S = float[TILE.block_n / 2];

  unsigned list = 0;  // of the block of rows
  ListedTile listed;
  unsigned bits[2][WORDS];

  // Of the n-th tile of the list; `row` is the thread's first in the block of rows.
  __device__ __forceinline__ void fetch(const MaskTiles& tiles, int n, int row) {
    listed.entry = listed_at(tiles, list, n + 1);
    if (!listed.is_partial()) return;
    const bool alike = tiles.rows == 1;
    const unsigned index =
        ((list * tiles.tiles + listed.tile()) * tiles.rows + (alike ? 0 : row)) * 4 +
        threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int word = 0; word < WORDS; ++word) {
        bits[half][word] = tiles.bits[(index + (alike ? 0 : half * 32)) * WORDS + word];
      }
    }
  }
  // To S, whose first row is `row` in this thread.
  __device__ __forceinline__ void apply(S& S_rmem, const Sm90Params& params, const Work& work,
                                        int row) const {
    const AttnMask& mask = params.attention.terms.attn_mask;
    const int tile_column = listed.tile() * TILE.block_n,
              column = tile_column + threadIdx.x % 4 * 2;
    const long long row_first =
        work.batch * mask.batch_stride + work.head * mask.head_stride + row * mask.row_stride;
    if (listed.is_added()) {
      // Finite values, which never overflow in units of scores.
      const float scale = params.inverse_scale_log2 * LOG2_E;
      const long long first = row_first + tile_column;
      if (mask.kind == AttnMask::Kind::float32) {
        add(S_rmem, static_cast<const float*>(mask.data) + first, mask.row_stride, scale);
      } else {
        add(S_rmem, static_cast<const unsigned short*>(mask.data) + first, mask.row_stride, scale);
      }
      return;
    }
    const long long first = row_first + column * mask.key_stride;
    if (mask.is_boolean()) {
      each<true>(S_rmem, [](int, int) { return -0.f; });  // which leaves all as they are
    } else if (mask.row_stride == 0) {
      each<true>(S_rmem, [&](int, int column) {
        return mask_term(params,
                         mask_value(mask.kind, mask_bits(mask, first + column * mask.key_stride)));
      });
    } else if (mask.kind == AttnMask::Kind::float32) {
      each<false>(S_rmem, [&](int half, int column) {
        const float* const data = static_cast<const float*>(mask.data) + first;
        return mask_term(params, data[half * 8 * mask.row_stride + column * mask.key_stride]);
      });
    } else {
      each<false>(S_rmem, [&](int half, int column) {
        const auto* const data = static_cast<const unsigned short*>(mask.data) + first;
        const unsigned x = data[half * 8 * mask.row_stride + column * mask.key_stride];
        return mask_term(params, ptx::cvt_f32_x2<T>(x).x);
      });
    }
  }

 private:
  // To both of a thread's rows, of which the first one's mask of this tile is at `row`.
  __device__ __forceinline__ static void add(S& S_rmem, const float* row, long long row_stride,
                                             float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const mine = row + half * 8 * row_stride + threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < TILE.block_n / 8; ++n) {
        const float2 x = *reinterpret_cast<const float2*>(mine + 8 * n);
        S_rmem[4 * n + 2 * half] = fmaf(x.x, scale, S_rmem[4 * n + 2 * half]);
        S_rmem[4 * n + 2 * half + 1] = fmaf(x.y, scale, S_rmem[4 * n + 2 * half + 1]);
        if (n % 4 == 3) ptx::pmevent();  // or ptxas would load more ahead than it has registers for
      }
    }
  }
  // A thread of a quad reads 8 columns of 32 at once, which is what memory is fast at; then they
  // trade, so that each has its 2 columns of every 8.
  __device__ __forceinline__ static void add(S& S_rmem, const unsigned short* row,
                                             long long row_stride, float scale) {
    const int thread = threadIdx.x % 4;
    const auto add_pair = [&](int n, int half, unsigned pair) {
      const float2 x = ptx::cvt_f32_x2<T>(pair);
      S_rmem[4 * n + 2 * half] = fmaf(x.x, scale, S_rmem[4 * n + 2 * half]);
      S_rmem[4 * n + 2 * half + 1] = fmaf(x.y, scale, S_rmem[4 * n + 2 * half + 1]);
    };
    constexpr int GROUPS = TILE.block_n / 32;
    constexpr int AT_ONCE = 4;  // loads that are under way together: registers are few
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned short* const mine = row + half * 8 * row_stride;
#pragma unroll
      for (int first = 0; first < GROUPS; first += AT_ONCE) {
        int4 loaded[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE && first + i < GROUPS; ++i) {
          const unsigned short* const source = mine + (first + i) * 32 + thread * 8;
          loaded[i] = *reinterpret_cast<const int4*>(source);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE && first + i < GROUPS; ++i) {
          unsigned x[4] = {unsigned(loaded[i].x), unsigned(loaded[i].y), unsigned(loaded[i].z),
                           unsigned(loaded[i].w)};
          transpose_quad(x);
#pragma unroll
          for (int n = 0; n < 4; ++n) add_pair(4 * (first + i) + n, half, x[n]);
        }
        ptx::pmevent();  // or ptxas would load more ahead than there are registers for
      }
      if constexpr (TILE.block_n % 32 != 0) {
        const unsigned short* const rest = mine + GROUPS * 32 + thread * 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          add_pair(4 * GROUPS + i, half, *reinterpret_cast<const unsigned*>(rest + 8 * i));
        }
      }
    }
  }
  // Element i of thread j for element j of thread i, of a quad.
  __device__ __forceinline__ static void transpose_quad(unsigned (&x)[4]) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
      const bool upper = threadIdx.x & bit;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int low = bit == 1 ? 2 * i : i, high = low + bit;
        const unsigned received = __shfl_xor_sync(0xffffffff, upper ? x[low] : x[high], bit);
        x[low] = upper ? received : x[low];
        x[high] = upper ? x[high] : received;
      }
    }
  }
  // -infinity for keys that are not seen, whose elements are not read, and to the others what
  // `added` says: of both rows at once where they are ALIKE.
  template <bool ALIKE, typename Added>
  __device__ __forceinline__ void each(float (&S_rmem)[TILE.block_n / 2],
                                       const Added& added) const {
#pragma unroll
    for (int n = 0; n < TILE.block_n / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto sees = [&](int half) { return bits[half][n / 16] >> (n % 16 * 2 + i) & 1; };
        float both = -0.f;
        if (ALIKE && (sees(0) | sees(1))) both = added(0, 8 * n + i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& s = S_rmem[4 * n + 2 * half + i];
          if (sees(half)) {
            s += ALIKE ? both : added(half, 8 * n + i);
          } else {
            s = -INFINITY;
          }
        }
      }
      if (!ALIKE && n % 2 == 1) ptx::pmevent();
    }
  }
};

template <int O_COLUMNS>
__device__ __forceinline__ void rescale_O(float (&O_rmem)[O_COLUMNS / 2],
                                          const float (&rescale)[2]) {
#pragma unroll
  for (int d = 0; d < O_COLUMNS / 8; ++d) {
    O_rmem[4 * d] *= rescale[0];
    O_rmem[4 * d + 1] *= rescale[0];
    O_rmem[4 * d + 2] *= rescale[1];
    O_rmem[4 * d + 3] *= rescale[1];
  }
}

}  // namespace flashmoe::sm90
