// AVX2 + FMA + F16C: 16 registers of 8 floats.
#if defined(__x86_64__)

#include <immintrin.h>  // before the target region, which must hold nothing but our own code

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
// Never popped: templates are compiled for the target in force at the end of the file.
#pragma GCC target("avx2,fma,f16c")
#endif

#include "backward/cpu/kernel.h"
#include "forward/cpu/x86.h"

namespace flashmoe {
namespace {

struct Avx2 : X86Eight {
  using Reg = __m256;
  static constexpr int WIDTH = 8;
  static constexpr int PANEL = 24;
  static constexpr int PV_ROWS = 6;  // x 2 vectors = 12 accumulators
  static constexpr int V_COLUMNS = 16;
  static constexpr int QK_KEYS[] = {0, 8, 4, 4};  // x NV vectors, by NV

  static FLASHMOE_INLINE Reg set1(float x) { return _mm256_set1_ps(x); }
  static FLASHMOE_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static FLASHMOE_INLINE void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static FLASHMOE_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static FLASHMOE_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static FLASHMOE_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static FLASHMOE_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static FLASHMOE_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  // b when either is NaN.
  static FLASHMOE_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  // a > b ? x : y
  static FLASHMOE_INLINE Reg select_greater(Reg a, Reg b, Reg x, Reg y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static FLASHMOE_INLINE bool any_not_equal(Reg a, Reg b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0;
  }
  // The float whose exponent field is the low bits of x.
  static FLASHMOE_INLINE Reg exponent_from_low_bits(Reg x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
  }
};

}  // namespace

const CpuKernel cpu_kernel_avx2 = {scratch_floats<Avx2>, run_task<Avx2>};
const CpuBackwardKernel cpu_backward_avx2 = cpu_backward_of<Avx2>();

}  // namespace flashmoe

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
