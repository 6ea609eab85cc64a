// The backward kernels for CUDA devices that were compiled in, behind one call. Host side; knows no
// torch.
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
  sm90_backward::Entries entries[2];  // float16, bfloat16
};

// The kernel of a handle; null when there is none. Handles count the compiled-in kernels in the
// order of build_info's backward_instances.
const BackwardKernel* find_backward_kernel(long long handle);

// Needs sm90_backward::can_run, 16-bit tensors, and no dimension of 0. `workspace` as
// sm90_backward::launch wants it. A window needs a local variant, and terms need theirs:
// cudaErrorInvalidValue without.
cudaError_t launch_backward(const BackwardKernel& kernel, const BackwardParams& params, DType dtype,
                            int device, cudaStream_t stream, void* workspace);

}  // namespace flashmoe
