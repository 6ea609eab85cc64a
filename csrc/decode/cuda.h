// The decode kernels for CUDA devices that were compiled in, behind one call. Host side; knows no
// torch.
#pragma once

#include <cuda_runtime.h>

#include "decode/append.h"
#include "decode/split.h"

namespace flashmoe {

using DecodeLauncher = cudaError_t (*)(const decoding::DecodeParams& params, DType dtype,
                                       int device, cudaStream_t stream);

// One tile, for problems of at most its head_dim: columns past theirs are zero-filled.
struct DecodeKernel {
  int head_dim, block_m, block_n, ctas_per_sm, smem_bytes;
  DecodeLauncher launch;
};

template <typename Tile>
DecodeKernel decode_kernel(DecodeLauncher launch) {
  return {Tile::HEAD_DIM,    Tile::BLOCK_M,    Tile::BLOCK_N,
          Tile::CTAS_PER_SM, Tile::SMEM_BYTES, launch};
}

// The kernel of a handle; null when there is none. Handles count the compiled-in kernels in the
// order of build_info's decode_instances.
const DecodeKernel* find_decode_kernel(long long handle);

// A call that lacks workspace and tag. num_splits: thread blocks for the keys of a sequence, at
// most, or 0 for as many as fill the GPU, or -1 for parts that depend on a sequence's own length
// alone, so that its result has the same bits whatever else is in the batch.
decoding::DecodeParams prepare_decode(const DecodeKernel& kernel, const AttentionParams& params,
                                      long long num_splits, int device);

// Bytes of workspace that it needs; 0: none.
long long decode_workspace_bytes(const DecodeKernel& kernel, const decoding::DecodeParams& params);

// Needs 16-byte aligned rows of q, k and v, and batch, heads_q and seqlen_q above 0. The workspace,
// 16-byte aligned, may hold anything.
cudaError_t launch_decode(const DecodeKernel& kernel, decoding::DecodeParams params, DType dtype,
                          int device, cudaStream_t stream, void* workspace);

// Needs k, v and the caches to have one count of heads, q's rows and k's their own sequences each.
cudaError_t launch_append(const AppendParams& params, DType dtype, cudaStream_t stream);

}  // namespace flashmoe
