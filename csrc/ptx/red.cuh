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

}  // namespace flashmoe::ptx
