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

// y with the low bits of the integer in n's register added to its exponent. In PTX: when the
// compiler sees an integer become an element of an accumulator, it takes that out of the registers
// that wgmma accumulates in, and serializes (C7511).
__device__ __forceinline__ float add_to_exponent(float y, float n) {
  float scaled;
  asm("{\n.reg .b32 i, j;\nmov.b32 i, %1;\nmov.b32 j, %2;\nshl.b32 i, i, 23;\nadd.s32 i, i, j;\n"
      "mov.b32 %0, i;\n}\n"
      : "=f"(scaled)
      : "f"(n), "f"(y));
  return scaled;
}

// Adds 1 to a counter of profilers. ptxas moves nothing across it.
__device__ __forceinline__ void pmevent() { asm volatile("pmevent 0;" ::: "memory"); }

}  // namespace flashmoe::ptx
