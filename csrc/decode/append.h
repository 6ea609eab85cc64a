// New keys and values on their way into a KV cache, and the queries that are rotated with them:
// what the kernel and its host side must agree on. Plain C++.
#pragma once

#include "common/fast_divisor.h"
#include "common/params.h"

namespace flashmoe {

// Rows (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens [batch + 1],
// of which those behind the last sequence are no sequence's. Strides are in elements; the last
// dimension is contiguous.
struct NewRows {
  const void* data;
  long long batch_stride, row_stride, head_stride;
  const int* cu_seqlens;
  int rows, seqlen, heads, head_dim;  // rows of all sequences, and of each without cu_seqlens
};

// A cache (num_pages, page_size, heads, head_dim), or (batches, rows, ..).
struct CacheView {
  void* data;
  long long page_stride, row_stride, head_stride;
};

struct AppendParams {
  NewRows k, v;  // of one shape, but for head_dim
  NewRows q;     // 0 rows: nothing is rotated
  void* q_out;   // as q, contiguous
  CacheView k_cache, v_cache;
  int* lengths_out;    // [batch]: keys of each sequence when the new ones are there
  const int* lengths;  // [batch]: before; a new key's position is behind those
  // As in Sequences: where each sequence's positions are in the cache.
  const int* cache_batch_idx;
  const int* block_table;
  long long block_table_stride;
  int page_size, num_pages;  // without pages num_pages is the cache's batch
  int batch, room;           // positions from 0 to room - 1 have a place
  // (rotary_rows, rotary_dim / 2), contiguous; null: nothing is rotated. A position past the last
  // row takes that.
  const void *cos, *sin;
  DType table_dtype;
  int rotary_rows, rotary_dim;
  bool interleaved;    // columns 2 i and 2 i + 1 are a pair, not i and i + rotary_dim / 2
  bool rotate_by_row;  // row i of q has position lengths + i, not lengths
  // Which the launch fills in: chunks of a row of k and v, and of q; heads, rows of a sequence.
  FastDivisor k_chunks, k_heads, k_seqlen, q_chunks, q_heads, q_seqlen, page;
};

}  // namespace flashmoe
