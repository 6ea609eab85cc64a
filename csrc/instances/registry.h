// The kernels that were compiled in. registry.cpp is generated from the lists in this folder.
#pragma once

#ifdef FLASHMOE_WITH_CUDA
#include <vector>

#include "backward/cuda.h"
#include "decode/cuda.h"
#include "forward/cuda.h"
#endif

namespace flashmoe {

#ifdef FLASHMOE_WITH_CUDA
// In the order of build_info's instances.
const std::vector<Kernel>& compiled_kernels();
// In the order of its backward_instances.
const std::vector<BackwardKernel>& compiled_backward_kernels();
// In the order of its decode_instances.
const std::vector<DecodeKernel>& compiled_decode_kernels();
#endif

extern const char build_info[];  // JSON: see flashmoe/_extension.py

}  // namespace flashmoe
