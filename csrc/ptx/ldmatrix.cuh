// ldmatrix, stmatrix: four 8x8 matrices of 16-bit elements between shared memory and mma fragments
// (sm_75). Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes aligned.
#pragma once

namespace flashmoe::ptx {

__device__ __forceinline__ void ldmatrix_x4(unsigned (&rmem)[4], unsigned src_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(rmem[0]), "=r"(rmem[1]), "=r"(rmem[2]), "=r"(rmem[3])
               : "r"(src_smem));
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&rmem)[4], unsigned src_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(rmem[0]), "=r"(rmem[1]), "=r"(rmem[2]), "=r"(rmem[3])
               : "r"(src_smem));
}

// An 8x8 matrix of which lane l holds row l / 4, elements l % 4 * 2 and the next, transposed.
__device__ __forceinline__ unsigned movmatrix_trans(unsigned x) {
  unsigned y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// The other way round (sm_90).
__device__ __forceinline__ void stmatrix_x4(unsigned dst_smem, const unsigned (&rmem)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(dst_smem),
               "r"(rmem[0]), "r"(rmem[1]), "r"(rmem[2]), "r"(rmem[3])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(unsigned dst_smem, const unsigned (&rmem)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(dst_smem),
      "r"(rmem[0]), "r"(rmem[1]), "r"(rmem[2]), "r"(rmem[3])
      : "memory");
}

}  // namespace flashmoe::ptx
