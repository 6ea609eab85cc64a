// The forward kernels for CUDA devices, compiled in or loaded later, behind one call. Host side;
// knows no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "common/params.h"
#include "common/variant.h"
#include "forward/sm90/tile.h"

namespace flashmoe {

using ForwardLauncher = cudaError_t (*)(const AttentionParams& params, DType dtype, int device,
                                        cudaStream_t stream);

// One tile that can run problems of at most head_dim: columns past theirs are zero-filled. Either
// sm80, by two launchers, or sm90, by the kernels of both dtypes. Of a head_dim_v other than
// head_dim only an sm90 tile that has one runs.
struct Kernel {
  int head_dim;
  ForwardLauncher launch;
  ForwardLauncher launch_unaligned;  // the head_dim's default tile, for rows not 16-byte aligned
  Sm90Tile tile;
  Variant variant;         // what it can do
  const void* entries[2];  // float16, bfloat16; null where the dtype was not compiled
};

// The kernel of a handle; null when there is none. Handles count the compiled-in kernels in the
// order of build_info's instances, then those loaded.
const Kernel* find_kernel(long long handle);

// The handle of a kernel of `tile`, `variant` and `dtype` in a cubin. Throws std::runtime_error
// when the CUDA runtime cannot load it.
long long load_kernel(const void* cubin, const Sm90Tile& tile, Variant variant, DType dtype);

// Bytes of device memory that a launch needs besides its tensors: for a packed batch, or a mask.
long long forward_workspace_bytes(const Kernel& kernel, const AttentionParams& params, int device);

// Launches `kernel`, or the default sm80 kernel where the TMA cannot fetch the tensors, unless they
// are packed, or head_dim_v is not head_dim: cudaErrorNotSupported. Needs batch, heads_q and
// seqlen_q above 0, and a `workspace` of forward_workspace_bytes, aligned to 16. A window needs a
// local variant, terms and packed batches need theirs: cudaErrorInvalidValue without.
cudaError_t launch_forward(const Kernel& kernel, const AttentionParams& params, DType dtype,
                           int device, cudaStream_t stream, void* workspace);

}  // namespace flashmoe
