// The backward kernels for CUDA devices, compiled in or loaded later, behind one call. Host side;
// knows no torch.
#pragma once

#include <cuda_runtime.h>

#include "backward/params.h"
#include "backward/sm90/host.h"
#include "common/variant.h"

namespace flashmoe {

// One tile, for problems of at most its head_dim: columns past theirs are zero-filled.
struct BackwardKernel {
  Sm90BackwardTile tile;
  Variant variant;                    // what it can do
  sm90_backward::Entries entries[2];  // float16, bfloat16; null where it was not compiled
};

// The kernel of a handle; null when there is none. Handles count the compiled-in kernels in the
// order of build_info's backward_instances, then those loaded.
const BackwardKernel* find_backward_kernel(long long handle);

// The handle of the kernels of `tile`, `variant` and `dtype` in a cubin. Throws std::runtime_error
// when the CUDA runtime cannot load it.
long long load_backward_kernel(const void* cubin, const Sm90BackwardTile& tile, Variant variant,
                               DType dtype);

// Needs sm90_backward::can_run, 16-bit tensors, and no dimension of 0. `workspace` as
// sm90_backward::launch wants it. A window needs a local variant, and terms need theirs:
// cudaErrorInvalidValue without.
cudaError_t launch_backward(const BackwardKernel& kernel, const BackwardParams& params, DType dtype,
                            int device, cudaStream_t stream, void* workspace);

}  // namespace flashmoe
