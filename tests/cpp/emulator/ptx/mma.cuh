// csrc/ptx/mma.cuh on emulator::run.
#pragma once

#include <type_traits>

#include "device.h"

namespace flashmoe::ptx {

template <typename T>
constexpr bool IS_BFLOAT16 = std::is_same_v<T, __nv_bfloat16>;
template <typename T>
constexpr auto FORMAT = IS_BFLOAT16<T> ? emulator::Format::bfloat16 : emulator::Format::float16;

// One 16x8 tile of K columns of A: registers a[K / 4] and b[K / 8] of each lane.
template <typename T, int K>
void mma_m16n8(float (&d)[4], const unsigned* a, const unsigned* b) {
  struct Mine {
    float* d;
    const unsigned *a, *b;
  } mine{d, a, b};
  emulator::collective("mma", &mine, [](emulator::Slots slots) {
    float A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<const Mine*>(slots[lane]);
      const auto number = [](unsigned packed, int i) {
        return emulator::number(FORMAT<T>, packed >> (i % 2 * 16) & 0xffff);
      };
      for (int i = 0; i < K / 2; ++i) {
        A[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2] = number(from->a[i / 2], i);
      }
      for (int i = 0; i < K / 4; ++i) {
        B[lane % 4 * 2 + i / 2 * 8 + i % 2][lane / 4] = number(from->b[i / 2], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int k = 0; k < K; ++k) sum += A[lane / 4 + i / 2 * 8][k] * B[k][lane % 4 * 2 + i % 2];
        static_cast<Mine*>(slots[lane])->d[i] += sum;
      }
    }
  });
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned b[2] = {b0, b1};
  mma_m16n8<T, 16>(d, a, b);
}

template <typename T>
void mma_m16n8k8(float (&d)[4], const unsigned (&a)[2], unsigned b) {
  mma_m16n8<T, 8>(d, a, &b);
}

template <typename T>
unsigned cvt_rn_x2(float low, float high);

template <>
inline unsigned cvt_rn_x2<__half>(float low, float high) {
  return emulator::to_float16(low) | unsigned{emulator::to_float16(high)} << 16;
}

template <>
inline unsigned cvt_rn_x2<__nv_bfloat16>(float low, float high) {
  return emulator::to_bfloat16(low) | unsigned{emulator::to_bfloat16(high)} << 16;
}

template <typename T>
float2 cvt_f32_x2(unsigned packed) {
  return {emulator::number(FORMAT<T>, packed & 0xffff), emulator::number(FORMAT<T>, packed >> 16)};
}

inline float ex2_approx_ftz(float x) { return std::exp2(x); }
inline float rcp_approx_ftz(float x) { return 1.f / x; }
inline float lg2_approx_ftz(float x) { return std::log2(x); }
// As wrong as it may be: 11 bits are left.
inline float tanh_approx(float x) {
  int exponent;
  const float fraction = std::frexp(std::tanh(x), &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, 11)), exponent - 11);
}
inline float fma_sat(float a, float b, float c) {
  const float x = std::fma(a, b, c);
  return x > 0 ? std::min(x, 1.f) : 0.f;
}

}  // namespace flashmoe::ptx
