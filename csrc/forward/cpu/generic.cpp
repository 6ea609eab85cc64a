// Any CPU: four floats with the compiler's vector extension, which becomes SSE2, NEON, ... by
// itself.
#include "backward/cpu/kernel.h"

namespace flashmoe {
namespace {

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int __attribute__((vector_size(16)));

FLASHMOE_INLINE unsigned bits_of(float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FLASHMOE_INLINE float from_bits(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

FLASHMOE_INLINE float to_float(float x) { return x; }
FLASHMOE_INLINE float to_float(BFloat16 x) {
  return from_bits(static_cast<unsigned>(x.bits) << 16);
}
FLASHMOE_INLINE float to_float(Half x) {
  const unsigned sign = static_cast<unsigned>(x.bits & 0x8000) << 16;
  const unsigned magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Exact, subnormals included: the exponent is rebiased by a multiplication.
  const float value = from_bits(magnitude << 13) * 0x1p112f;
  return from_bits(sign | bits_of(value));
}

FLASHMOE_INLINE void from_float(float x, float* dst) { *dst = x; }
FLASHMOE_INLINE void from_float(float x, BFloat16* dst) {
  const unsigned bits = bits_of(x);
  const unsigned rounded = x != x ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
  dst->bits = static_cast<unsigned short>(rounded >> 16);
}
FLASHMOE_INLINE void from_float(float x, Half* dst) {
  const unsigned sign = bits_of(x) >> 16 & 0x8000;
  const unsigned magnitude = bits_of(x) & 0x7fffffff;
  unsigned half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above rounds to inf
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 aligns the subnormal's last bit
    half = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  dst->bits = static_cast<unsigned short>(sign | half);
}

struct Generic {
  using Reg = Float4;
  static constexpr int WIDTH = 4;
  static constexpr int PANEL = 8;
  static constexpr int PV_ROWS = 4;  // x 2 vectors = 8 accumulators
  static constexpr int V_COLUMNS = 8;
  static constexpr int QK_KEYS[] = {0, 4, 4};  // x NV vectors, by NV

  static FLASHMOE_INLINE Reg set1(float x) { return Reg{x, x, x, x}; }
  static FLASHMOE_INLINE Reg load(const float* p) {
    Reg x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  static FLASHMOE_INLINE void store(float* p, Reg x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static FLASHMOE_INLINE Reg add(Reg a, Reg b) { return a + b; }
  static FLASHMOE_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  static FLASHMOE_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  static FLASHMOE_INLINE Reg div(Reg a, Reg b) { return a / b; }
  static FLASHMOE_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  // b when either is NaN.
  static FLASHMOE_INLINE Reg max(Reg a, Reg b) { return select_greater(a, b, a, b); }
  // a > b ? x : y
  static FLASHMOE_INLINE Reg select_greater(Reg a, Reg b, Reg x, Reg y) {
    const Int4 mask = a > b;
    return reinterpret_cast<Reg>((mask & reinterpret_cast<Int4>(x)) |
                                 (~mask & reinterpret_cast<Int4>(y)));
  }
  static FLASHMOE_INLINE bool any_not_equal(Reg a, Reg b) {
    const Int4 mask = a != b;
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
  }
  // The float whose exponent field is the low bits of x.
  static FLASHMOE_INLINE Reg exponent_from_low_bits(Reg x) {
    return reinterpret_cast<Reg>(reinterpret_cast<Int4>(x) << 23);
  }

  struct Eight {
    float x[8];
  };
  static FLASHMOE_INLINE Eight eight_set1(float x) { return {{x, x, x, x, x, x, x, x}}; }
  static FLASHMOE_INLINE Eight eight_mul(const Eight& a, const Eight& b) {
    Eight product;
    for (int i = 0; i < 8; ++i) product.x[i] = a.x[i] * b.x[i];
    return product;
  }
  template <typename T>
  static FLASHMOE_INLINE Eight eight_load(const T* p) {
    Eight value;
    for (int i = 0; i < 8; ++i) value.x[i] = to_float(p[i]);
    return value;
  }
  template <typename T>
  static FLASHMOE_INLINE void eight_store(T* p, const Eight& value) {
    for (int i = 0; i < 8; ++i) from_float(value.x[i], p + i);
  }
  static FLASHMOE_INLINE void store_interleaved(const Eight& r0, const Eight& r1, const Eight& r2,
                                                const Eight& r3, float* dst) {
    for (int d = 0; d < 8; ++d) store(dst + 4 * d, Reg{r0.x[d], r1.x[d], r2.x[d], r3.x[d]});
  }
  static FLASHMOE_INLINE void transpose_8x8(const float* src, long long src_stride, float* dst,
                                            long long dst_stride) {
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
    }
  }
};

}  // namespace

const CpuKernel cpu_kernel_generic = {scratch_floats<Generic>, run_task<Generic>};
const CpuBackwardKernel cpu_backward_generic = cpu_backward_of<Generic>();

}  // namespace flashmoe
