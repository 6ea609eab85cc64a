// AVX-512 F + DQ + BW + VL: 32 registers of 16 floats.
#if defined(__x86_64__)

#include <immintrin.h>  // before the target region, which must hold nothing but our own code

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"))), \
    apply_to = function)
#else
// Never popped: templates are compiled for the target in force at the end of the file.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
#endif

#include "backward/cpu/kernel.h"
#include "forward/cpu/x86.h"

namespace flashmoe {
namespace {

struct Avx512 : X86Eight {
  using Reg = __m512;
  static constexpr int WIDTH = 16;
  static constexpr int PANEL = 48;
  static constexpr int PV_ROWS = 12;  // x 2 vectors = 24 accumulators
  static constexpr int V_COLUMNS = 32;
  static constexpr int QK_KEYS[] = {0, 12, 12, 8};  // x NV vectors, by NV

  static FLASHMOE_INLINE Reg set1(float x) { return _mm512_set1_ps(x); }
  static FLASHMOE_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static FLASHMOE_INLINE void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static FLASHMOE_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static FLASHMOE_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static FLASHMOE_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static FLASHMOE_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static FLASHMOE_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // b when either is NaN. The maskz form with a full mask is the plain instruction; gcc 12 warns of
  // an uninitialized operand inside its own _mm512_max_ps and _mm512_slli_epi32 (PR 105593).
  static FLASHMOE_INLINE Reg max(Reg a, Reg b) { return _mm512_maskz_max_ps(0xffff, a, b); }
  // a > b ? x : y
  static FLASHMOE_INLINE Reg select_greater(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
  }
  static FLASHMOE_INLINE bool any_not_equal(Reg a, Reg b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0;
  }
  // The float whose exponent field is the low bits of x.
  static FLASHMOE_INLINE Reg exponent_from_low_bits(Reg x) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_castps_si512(x), 23));
  }
};

}  // namespace

const CpuKernel cpu_kernel_avx512 = {scratch_floats<Avx512>, run_task<Avx512>};
const CpuBackwardKernel cpu_backward_avx512 = cpu_backward_of<Avx512>();

}  // namespace flashmoe

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
