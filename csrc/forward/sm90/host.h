// Host side of the Hopper forward kernel: describes Q, K and V to the TMA, decides the grid and
// launches. Knows no torch, and no kernel: a compiled-in and a runtime-compiled one look the same.
#pragma once

#include <cuda_runtime.h>

#include "common/params.h"
#include "forward/sm90/tile.h"

namespace flashmoe::sm90 {

// Whether the TMA can fetch q, k and v: 16-byte aligned rows at positive strides.
bool can_run(const AttentionParams& params);

// Bytes of device memory that a launch needs besides its tensors: for a packed batch whose blocks
// of rows are listed, or a mask.
long long workspace_bytes(const Sm90Tile& tile, const AttentionParams& params, int device);

// `kernel` is attention_forward of this tile and dtype, and of a variant that computes this mask:
// the address of a compiled-in one, or a cudaKernel_t. Needs can_run(params), and batch, heads_q
// and seqlen_q above 0. `counter` is an int in device memory that is 0, and left at 0; no other
// launch may use it meanwhile. With null, blocks of rows are dealt in turn, and masked problems are
// less well balanced. Packed batches take no counter. `workspace` has workspace_bytes, aligned to
// 16; where that is 0 it may be null.
cudaError_t launch(const Sm90Tile& tile, const void* kernel, const AttentionParams& params,
                   DType dtype, int device, cudaStream_t stream, unsigned* counter,
                   void* workspace);

}  // namespace flashmoe::sm90
