#include "backward/cuda.h"

#include "instances/registry.h"

namespace flashmoe {

const BackwardKernel* find_backward_kernel(long long handle) {
  const auto& compiled = compiled_backward_kernels();
  const bool found = handle >= 0 && handle < static_cast<long long>(compiled.size());
  return found ? &compiled[static_cast<size_t>(handle)] : nullptr;
}

cudaError_t launch_backward(const BackwardKernel& kernel, const BackwardParams& params, DType dtype,
                            int device, cudaStream_t stream, void* workspace) {
  if (params.attention.head_dim > kernel.tile.head_dim || dtype == DType::float32 ||
      !kernel.variant.covers(params.attention) ||
      kernel.variant.softcap != (params.attention.terms.softcap > 0)) {
    return cudaErrorInvalidValue;
  }
  return sm90_backward::launch(kernel.tile, kernel.entries[dtype == DType::bfloat16], params, dtype,
                               device, stream, workspace);
}

}  // namespace flashmoe
