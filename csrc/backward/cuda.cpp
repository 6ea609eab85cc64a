#include "backward/cuda.h"

#include "common/loaded.h"
#include "instances/registry.h"

namespace flashmoe {
namespace {

Loaded<BackwardKernel> loaded_kernels;

}  // namespace

const BackwardKernel* find_backward_kernel(long long handle) {
  return loaded_kernels.find(handle, compiled_backward_kernels());
}

long long load_backward_kernel(const void* cubin, const Sm90BackwardTile& tile, Variant variant,
                               DType dtype) {
  BackwardKernel kernel{tile, variant, {}};
  const Cubin code(cubin);
  auto& entries = kernel.entries[dtype == DType::bfloat16];
  entries[0] = code.entry("prepare");
  entries[1] = code.entry("attention_backward");
  entries[2] = code.entry("finish");
  return loaded_kernels.add(kernel, compiled_backward_kernels().size());
}

cudaError_t launch_backward(const BackwardKernel& kernel, const BackwardParams& params, DType dtype,
                            int device, cudaStream_t stream, void* workspace) {
  if (params.attention.head_dim > kernel.tile.head_dim || dtype == DType::float32 ||
      !kernel.variant.covers(params.attention) ||
      kernel.variant.softcap != (params.attention.terms.softcap > 0) ||
      kernel.variant.dropout != (params.attention.terms.rng_state != nullptr) ||
      (kernel.variant.whole && params.attention.seqlen_kv > kernel.tile.block_n)) {
    return cudaErrorInvalidValue;
  }
  const sm90_backward::Entries& entries = kernel.entries[dtype == DType::bfloat16];
  if (entries[0] == nullptr) return cudaErrorInvalidValue;
  return sm90_backward::launch(kernel.tile, kernel.variant, entries, params, dtype, device, stream,
                               workspace);
}

}  // namespace flashmoe
