// Division by numbers that the host knows. Plain C++, no std headers: NVRTC has none.
#pragma once

namespace flashmoe {

// Division of an int from 0 on by one above 0, by multiplication (Granlund and Montgomery, 1994).
struct FastDivisor {
  int divisor;
  unsigned multiplier, shift;

  static FastDivisor of(int divisor) {
    unsigned shift = 0;
    while ((1ll << shift) < divisor) ++shift;
    const unsigned long long power = 1ull << (31 + shift);
    return {divisor, static_cast<unsigned>((power + divisor - 1) / divisor), shift};
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int n) const {
    return divisor == 1 ? n : static_cast<int>(__umulhi(n, multiplier) >> (shift - 1));
  }
#endif
};

}  // namespace flashmoe
