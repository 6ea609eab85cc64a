// Eight-wide loads, stores and the transpose, shared by AVX2 and AVX-512: head_dim is a multiple of
// eight, so these never touch an element behind a row.
#pragma once

#include <immintrin.h>

#include "forward/cpu/kernel.h"

namespace flashmoe {
namespace {

struct X86Eight {
  static FLASHMOE_INLINE __m256 eight_set1(float x) { return _mm256_set1_ps(x); }
  static FLASHMOE_INLINE __m256 eight_mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }

  static FLASHMOE_INLINE __m256 eight_load(const float* p) { return _mm256_loadu_ps(p); }
  static FLASHMOE_INLINE __m256 eight_load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static FLASHMOE_INLINE __m256 eight_load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  static FLASHMOE_INLINE void eight_store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
  static FLASHMOE_INLINE void eight_store(Half* p, __m256 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static FLASHMOE_INLINE void eight_store(BFloat16* p, __m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    // Round to nearest even: add 0x7fff plus the lowest bit that stays. NaN would round to inf.
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high =
        _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  // dst[4 * d + i] = r_i[d]
  static FLASHMOE_INLINE void store_interleaved(__m256 r0, __m256 r1, __m256 r2, __m256 r3,
                                                float* dst) {
    const __m256 t0 = _mm256_unpacklo_ps(r0, r1), t1 = _mm256_unpackhi_ps(r0, r1);
    const __m256 t2 = _mm256_unpacklo_ps(r2, r3), t3 = _mm256_unpackhi_ps(r2, r3);
    const __m256 d04 = _mm256_shuffle_ps(t0, t2, 0x44), d15 = _mm256_shuffle_ps(t0, t2, 0xee);
    const __m256 d26 = _mm256_shuffle_ps(t1, t3, 0x44), d37 = _mm256_shuffle_ps(t1, t3, 0xee);
    _mm256_storeu_ps(dst, _mm256_permute2f128_ps(d04, d15, 0x20));
    _mm256_storeu_ps(dst + 8, _mm256_permute2f128_ps(d26, d37, 0x20));
    _mm256_storeu_ps(dst + 16, _mm256_permute2f128_ps(d04, d15, 0x31));
    _mm256_storeu_ps(dst + 24, _mm256_permute2f128_ps(d26, d37, 0x31));
  }

  static FLASHMOE_INLINE void transpose_8x8(const float* src, long long src_stride, float* dst,
                                            long long dst_stride) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * src_stride);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
};

}  // namespace
}  // namespace flashmoe
