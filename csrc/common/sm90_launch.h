// What the launches of the Hopper kernels share: tensors described to the TMA, and what a device
// is like.
#pragma once

#include <cuda_runtime.h>

#include "common/params.h"
#include "ptx/tensor_map.h"

namespace flashmoe::sm90 {

// A (batch, seqlen, heads, head_dim) tensor of 16-bit elements, in boxes of 64 columns by box_rows.
struct TensorView {
  const void* data;
  long long batch_stride, row_stride, head_stride;  // in elements
  int batch, seqlen, heads, head_dim;
};

inline TensorView q_view(const AttentionParams& p) {
  return {p.q,     p.q_batch_stride, p.q_row_stride, p.q_head_stride,
          p.batch, p.seqlen_q,       p.heads_q,      p.head_dim};
}
inline TensorView k_view(const AttentionParams& p) {
  return {p.k,     p.k_batch_stride, p.k_row_stride, p.k_head_stride,
          p.batch, p.seqlen_kv,      p.heads_kv,     p.head_dim};
}
inline TensorView v_view(const AttentionParams& p) {
  return {p.v,     p.v_batch_stride, p.v_row_stride, p.v_head_stride,
          p.batch, p.seqlen_kv,      p.heads_kv,     p.head_dim};
}

// Whether the TMA can fetch it: aligned to 16 bytes, at positive strides that are.
bool is_fetchable(const TensorView& x);

// Whether the driver took it.
bool encode(ptx::TensorMap* map, const TensorView& x, int box_rows, DType dtype);

struct Device {
  int sm_count = 0, l2_bytes = 0;
};
const Device& device_properties(int device);

// Opts a kernel in to more than 48 KiB of shared memory.
cudaError_t allow_smem(const void* kernel, int bytes, int device);

}  // namespace flashmoe::sm90
