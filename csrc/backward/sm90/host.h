// Host side of the Hopper backward kernel: describes its tensors to the TMA, plans its workspace
// and launches. Knows no torch, and no kernel.
#pragma once

#include <cuda_runtime.h>

#include "backward/sm90/tile.h"
#include "common/variant.h"

namespace flashmoe::sm90_backward {

// What runs one after the other, of one tile and dtype: prepare, attention_backward, finish (which
// whole kernels do without).
using Entries = const void* [3];

// Whether the TMA can fetch q, k, v and dout, and out can be read: 16-byte aligned rows at positive
// strides.
bool can_run(const BackwardParams& params);

// Bytes of device memory that a launch needs besides its tensors.
long long workspace_bytes(const Sm90BackwardTile& tile, const Variant& variant,
                          const AttentionParams& params);

// Needs can_run(params), batch, heads_q, heads_kv, seqlen_q and seqlen_kv above 0, and a workspace
// of workspace_bytes, aligned to 16. `variant` is what the entries were compiled for; a whole one
// needs a seqlen_kv of at most the tile's block_n.
cudaError_t launch(const Sm90BackwardTile& tile, const Variant& variant, const Entries& entries,
                   const BackwardParams& params, DType dtype, int device, cudaStream_t stream,
                   void* workspace);

}  // namespace flashmoe::sm90_backward
