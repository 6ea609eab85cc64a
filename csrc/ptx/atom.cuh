// atom: reductions into memory that return what was there.
#pragma once

namespace flashmoe::ptx {

__device__ __forceinline__ int atom_shared_add(unsigned dst_smem, int x) {
  int before;
  asm volatile("atom.shared.add.s32 %0, [%1], %2;\n"
               : "=r"(before)
               : "r"(dst_smem), "r"(x)
               : "memory");
  return before;
}

}  // namespace flashmoe::ptx
