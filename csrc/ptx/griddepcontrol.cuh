// griddepcontrol: a kernel that was launched with programmatic stream serialization, and the one
// before it (sm_90).
#pragma once

namespace flashmoe::ptx {

// Waits until the kernel before has ended and its writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}

// Lets the kernel behind begin, once every thread block has said so or ended.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

}  // namespace flashmoe::ptx
