// ld and st: plain loads and stores in the forms that C++ does not spell.
#pragma once

namespace flashmoe::ptx {

__device__ __forceinline__ int4 ld_shared_v4(unsigned src_smem) {
  int4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(src_smem)
               : "memory");
  return x;
}

__device__ __forceinline__ int ld_shared_b32(unsigned src_smem) {
  int x;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(x) : "r"(src_smem) : "memory");
  return x;
}

__device__ __forceinline__ float2 ld_shared_v2(unsigned src_smem) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(x.x), "=f"(x.y)
               : "r"(src_smem)
               : "memory");
  return x;
}

__device__ __forceinline__ void st_shared_v4(unsigned dst_smem, int4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(dst_smem), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void st_shared_v2(unsigned dst_smem, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(dst_smem), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ void st_shared_b32(unsigned dst_smem, unsigned x) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(dst_smem), "r"(x) : "memory");
}

// Past L1: what a kernel before has written, where the compiler may not know it.
__device__ __forceinline__ int4 ld_global_cg_v4(const void* src_gmem) {
  int4 x;
  asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(src_gmem)
               : "memory");
  return x;
}

// Predicated, where the compiler would branch.
__device__ __forceinline__ void st_global_b32_if(bool condition, void* dst_gmem, unsigned x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}\n" ::"r"(
                   int(condition)),
               "l"(dst_gmem), "r"(x)
               : "memory");
}

__device__ __forceinline__ void st_global_v2_if(bool condition, void* dst_gmem, unsigned x,
                                                unsigned y) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v2.b32 [%1], {%2, %3};\n}\n" ::"r"(
          int(condition)),
      "l"(dst_gmem), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void st_global_v4_if(bool condition, void* dst_gmem, unsigned x,
                                                unsigned y, unsigned z, unsigned w) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}\n" ::
          "r"(int(condition)),
      "l"(dst_gmem), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// Returns when the value in device memory is x: what was released with it is visible then.
__device__ __forceinline__ void ld_acquire_gpu_until(const int* src_gmem, int x) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      ".reg .b32 value;\n"
      "WAIT:\n"
      "ld.acquire.gpu.global.b32 value, [%0];\n"
      "setp.eq.s32 done, value, %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"l"(src_gmem),
      "r"(x)
      : "memory");
}

}  // namespace flashmoe::ptx
