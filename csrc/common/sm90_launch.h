// What the launches of the Hopper kernels share: tensors described to the TMA, and what a device
// is like.
#pragma once

#include <cuda_runtime.h>

#include "common/mask_tiles.h"
#include "common/params.h"
#include "common/schedule.h"
#include "ptx/tensor_map.h"

namespace flashmoe::sm90 {

// A (batch, seqlen, heads, head_dim) tensor of 16-bit elements, in boxes of 64 columns by box_rows.
//
// Or a packed one (total, heads, head_dim): seqlen is PACKED_ROWS then, batches are its rows once
// more, and a fifth dimension takes PACKED_ROWS rows off the address again. Row i of a sequence
// that begins at `begin` and has `rows` is row PACKED_ROWS - rows + i of "batch" begin + rows. So
// the bound of the second dimension is the sequence's end, and boxes neither read nor write what
// follows. The fifth dimension does so by wrapping around: 2^30 times (2^34 bytes - a row) is minus
// 2^30 rows modulo 2^64. A base in front of the tensor would do without, but the TMA needs one that
// is mapped, even if it reads nothing there. (As Triton's ragged_tma and quack have it.)
struct TensorView {
  const void* data;
  long long batch_stride, row_stride, head_stride;  // in elements
  int batch, seqlen, heads, head_dim;

  bool is_packed() const { return seqlen == PACKED_ROWS; }
};

inline TensorView packed_view(const void* data, long long row_stride, long long head_stride,
                              int total, int heads, int head_dim) {
  if (total == 1) row_stride = 8;  // of a single row it may be anything
  return {data, row_stride, row_stride, head_stride, total + 1, PACKED_ROWS, heads, head_dim};
}

// Tensors that are laid out like q, and like k.
inline TensorView queries_view(const AttentionParams& p, const void* data, long long batch_stride,
                               long long row_stride, long long head_stride) {
  if (p.sequences.is_packed()) {
    const int total = p.sequences.total_q;
    return packed_view(data, row_stride, head_stride, total, p.heads_q, p.head_dim);
  }
  return {data, batch_stride, row_stride, head_stride, p.batch, p.seqlen_q, p.heads_q, p.head_dim};
}
inline TensorView keys_view(const AttentionParams& p, const void* data, long long batch_stride,
                            long long row_stride, long long head_stride) {
  if (p.sequences.is_packed()) {
    const int total = p.sequences.total_k;
    // Keys that do not exist have no address.
    if (total == 0) data = p.q;
    return packed_view(data, row_stride, head_stride, total, p.heads_kv, p.head_dim);
  }
  return {data,    batch_stride, row_stride, head_stride,
          p.batch, p.seqlen_kv,  p.heads_kv, p.head_dim};
}

inline TensorView q_view(const AttentionParams& p) {
  return queries_view(p, p.q, p.q_batch_stride, p.q_row_stride, p.q_head_stride);
}
inline TensorView k_view(const AttentionParams& p) {
  return keys_view(p, p.k, p.k_batch_stride, p.k_row_stride, p.k_head_stride);
}
inline TensorView v_view(const AttentionParams& p) {
  TensorView v = keys_view(p, p.v, p.v_batch_stride, p.v_row_stride, p.v_head_stride);
  v.head_dim = p.head_dim_v;
  return v;
}
inline TensorView out_view(const AttentionParams& p) {
  TensorView out = queries_view(p, p.out, p.o_batch_stride, p.o_row_stride, p.o_head_stride);
  out.head_dim = p.head_dim_v;
  return out;
}

// Whether the TMA can fetch it: aligned to 16 bytes, at positive strides that are.
bool is_fetchable(const TensorView& x);

// Whether the driver took it.
bool encode(ptx::TensorMap* map, const TensorView& x, int box_rows, DType dtype);

// The same for contiguous rows of float32, at most 256 columns, of which a box has one: its second
// coordinate.
bool encode_rows(ptx::TensorMap* map, const float* data, int columns, long long rows);

struct Device {
  int sm_count = 0, l2_bytes = 0, smem_per_sm = 0;
};
const Device& device_properties(int device);

// How many blocks of rows the sequences of a packed tensor have at most; 0 of blocks of 0 rows.
long long packed_blocks(int total, int batch, int max_seqlen, int block);

// A Schedule of p's packed batch in `memory`, by blocks of so many queries and keys (0: these are
// not listed); and the bytes that it takes there, a multiple of 16.
Schedule plan_schedule(const AttentionParams& p, int block_queries, int block_keys, void* memory);
long long schedule_bytes(const AttentionParams& p, int block_queries, int block_keys);

// The kernel that fills it, list_blocks of common/schedule.cuh: its address.
extern const void* const schedule_entry;

// Launches that. What reads the schedule may be launched to overlap it, and waits for it.
cudaError_t launch_schedule(const AttentionParams& p, const Schedule& schedule,
                            cudaStream_t stream);

// The tiles of p's attn_mask in `memory`, by blocks of so many queries and keys: listed for each
// block of queries, or with `of_keys` of keys, and with `seen` then if `has_seen`. Nothing is
// allocated or waited for. And the bytes that they take there, a multiple of 16.
MaskTilesParams plan_mask_tiles(const AttentionParams& p, int block_queries, int block_keys,
                                bool of_keys, bool has_seen, void* memory);
long long mask_tiles_bytes(const AttentionParams& p, int block_queries, int block_keys,
                           bool of_keys, bool has_seen);

// The kernel that fills them, list_tiles of common/mask_tiles.cuh: its address.
extern const void* const mask_tiles_entry;

cudaError_t launch_mask_tiles(const MaskTilesParams& params, cudaStream_t stream);

// Launches a kernel that may begin while the one before it ends.
cudaError_t launch_overlapping(const void* kernel, long long grid, int threads, int smem_bytes,
                               void** arguments, cudaStream_t stream);

// Opts a kernel in to more than 48 KiB of shared memory.
cudaError_t allow_smem(const void* kernel, int bytes, int device);

}  // namespace flashmoe::sm90
