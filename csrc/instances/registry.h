// The kernels that were compiled in. registry.cpp is generated from the lists in this folder.
#pragma once

#ifdef FLASHMOE_WITH_CUDA
#include <cuda_runtime.h>
#endif

#include "attention/params.h"

namespace flashmoe {

#ifdef FLASHMOE_WITH_CUDA
using ForwardLauncher = cudaError_t (*)(const AttentionParams& params, DType dtype, int device,
                                        cudaStream_t stream);

struct Instance {
  int head_dim, block_m, block_n, num_stages, num_warps;
  ForwardLauncher launch;
  ForwardLauncher launch_unaligned;  // the head_dim's default tile, for rows not 16-byte aligned
};

extern const Instance instances[];
extern const int num_instances;
#endif

extern const char build_info[];  // JSON: cuda_archs, cuda_version, instances, source_hashes

}  // namespace flashmoe
