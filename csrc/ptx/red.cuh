// red: reductions into memory that return nothing.
#pragma once

namespace flashmoe::ptx {

// 16-byte aligned (sm_90). Each element is added atomically, in no particular order.
__device__ __forceinline__ void red_global_add_v4(float* dst_gmem, float x, float y, float z,
                                                  float w) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(dst_gmem),
               "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}

// What this thread did before, and what it has seen others do, is visible to whoever acquires the
// sum.
__device__ __forceinline__ void red_release_gpu_add(int* dst_gmem, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(dst_gmem), "r"(x) : "memory");
}

}  // namespace flashmoe::ptx
