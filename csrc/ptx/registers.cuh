// What is asked of registers alone: where the compiler may move their uses, and arithmetic on their
// bits.
#pragma once

namespace flashmoe::ptx {

// Hides from the compiler what x is.
__device__ __forceinline__ void hide(unsigned& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void hide(long long& x) { asm volatile("" : "+l"(x)); }

// Keeps the compiler from moving accesses of registers that a wgmma reads or writes.
template <int N>
__device__ __forceinline__ void fence_registers(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// y with the low bits of the integer in n's register added to its exponent, or 0 where x is below
// `least`. In PTX: when the compiler sees an integer or a constant become an element of an
// accumulator, it takes that out of the registers that wgmma accumulates in, and serializes
// (C7511).
__device__ __forceinline__ float add_to_exponent(float y, float n, float x, float least) {
  float scaled;
  asm("{\n.reg .b32 i, j;\n.reg .pred p;\nmov.b32 i, %1;\nmov.b32 j, %2;\nshl.b32 i, i, 23;\n"
      "add.s32 i, i, j;\nsetp.lt.f32 p, %3, %4;\nselp.b32 i, 0, i, p;\nmov.b32 %0, i;\n}\n"
      : "=f"(scaled)
      : "f"(n), "f"(y), "f"(x), "f"(least));
  return scaled;
}

// Adds 1 to a counter of profilers. ptxas moves nothing across it.
__device__ __forceinline__ void pmevent() { asm volatile("pmevent 0;" ::: "memory"); }

}  // namespace flashmoe::ptx
