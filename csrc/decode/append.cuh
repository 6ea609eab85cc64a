// Appends to a KV cache what a step brought: new keys, rotated, and new values to their places, the
// rotated queries beside it, and the lengths that follow. One launch, bound by its latency.
#pragma once

#include "decode/append.h"
#include "ptx/mma.cuh"

namespace flashmoe::appending {

constexpr int THREADS = 256;

// How T is read and written: in 16-bit types by bits, which emulators and GPUs spell alike.
template <typename T>
struct Format {
  using Bits = unsigned short;
  __device__ __forceinline__ static float widen(Bits x) { return ptx::cvt_f32_x2<T>(x).x; }
  __device__ __forceinline__ static Bits round(float x) {
    return static_cast<Bits>(ptx::cvt_rn_x2<T>(x, 0.f));
  }
};
template <>
struct Format<float> {
  using Bits = float;
  __device__ __forceinline__ static float widen(float x) { return x; }
  __device__ __forceinline__ static float round(float x) { return x; }
};

// Of one or two elements, which are all that PAIRS 1 moves, it is aligned as one: rows may begin
// anywhere.
template <typename Bits, int N>
struct alignas(N <= 2                  ? sizeof(Bits)
               : sizeof(Bits) * N < 16 ? sizeof(Bits) * N
                                       : 16) Vector {
  Bits x[N];
};
template <int N, typename Bits>
__device__ __forceinline__ Vector<Bits, N> load(const Bits* src) {
  return *reinterpret_cast<const Vector<Bits, N>*>(src);
}
template <int N, typename Bits>
__device__ __forceinline__ void store(Bits* dst, const Vector<Bits, N>& x) {
  *reinterpret_cast<Vector<Bits, N>*>(dst) = x;
}

// The sequence that a row belongs to, and which of its rows it is. A row of no sequence gets one of
// them, and is not there.
struct Place {
  int sequence, step;
  bool exists;
};

__device__ __forceinline__ Place place_of(const NewRows& x, const FastDivisor& seqlen, int row,
                                          int batch) {
  if (x.cu_seqlens == nullptr) {
    const int sequence = seqlen.divide(row);
    return {sequence, row - sequence * x.seqlen, true};
  }
  int first = 0, last = batch;  // the last one that begins at or before the row
  while (last - first > 1) {
    const int middle = (first + last) / 2;
    if (x.cu_seqlens[middle] <= row) {
      first = middle;
    } else {
      last = middle;
    }
  }
  return {first, row - x.cu_seqlens[first], row >= x.cu_seqlens[0] && row < x.cu_seqlens[batch]};
}

__device__ __forceinline__ float table_value(const void* table, DType dtype, long long i) {
  if (dtype == DType::float32) return static_cast<const float*>(table)[i];
  const unsigned short bits = static_cast<const unsigned short*>(table)[i];
  return dtype == DType::float16 ? ptx::cvt_f32_x2<__half>(bits).x
                                 : ptx::cvt_f32_x2<__nv_bfloat16>(bits).x;
}

// Chunk `chunk` of a row from src to dst: 2 * PAIRS columns, those of PAIRS pairs where they are
// rotated, by the row of cos and sin at `position`.
template <typename T, int PAIRS>
__device__ __forceinline__ void move(const AppendParams& p, const typename Format<T>::Bits* src,
                                     typename Format<T>::Bits* dst, int head_dim, int chunk,
                                     bool rotates, long long position) {
  const int half = rotates ? p.rotary_dim / 2 : 0, first = chunk * PAIRS;
  if (first >= half) {
    const int column = 2 * first;
    if (column + 2 * PAIRS <= head_dim) {
      store<2 * PAIRS>(dst + column, load<2 * PAIRS>(src + column));
    } else if (column < head_dim) {  // the last one of an odd number, with PAIRS 1
      dst[column] = src[column];
    }
    return;
  }
  Vector<typename Format<T>::Bits, PAIRS> a, b;
  if (p.interleaved) {
    const auto x = load<2 * PAIRS>(src + 2 * first);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) a.x[i] = x.x[2 * i], b.x[i] = x.x[2 * i + 1];
  } else {
    a = load<PAIRS>(src + first), b = load<PAIRS>(src + half + first);
  }
  const long long row = position < 0 ? 0 : min(position, p.rotary_rows - 1ll);
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const float cos = table_value(p.cos, p.table_dtype, row * half + first + i);
    const float sin = table_value(p.sin, p.table_dtype, row * half + first + i);
    const float x = Format<T>::widen(a.x[i]), y = Format<T>::widen(b.x[i]);
    a.x[i] = Format<T>::round(x * cos - y * sin);
    b.x[i] = Format<T>::round(x * sin + y * cos);
  }
  if (p.interleaved) {
    Vector<typename Format<T>::Bits, 2 * PAIRS> x;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) x.x[2 * i] = a.x[i], x.x[2 * i + 1] = b.x[i];
    store(dst + 2 * first, x);
  } else {
    store(dst + first, a), store(dst + half + first, b);
  }
}

template <typename T, int PAIRS>
__device__ __forceinline__ void append_keys(const AppendParams& p, int item) {
  using Bits = typename Format<T>::Bits;
  const int past_chunk = p.k_chunks.divide(item), chunk = item - past_chunk * p.k_chunks.divisor;
  const int row = p.k_heads.divide(past_chunk), head = past_chunk - row * p.k.heads;
  const Place place = place_of(p.k, p.k_seqlen, row, p.batch);
  const long long position = static_cast<long long>(p.lengths[place.sequence]) + place.step;
  if (!place.exists || position < 0 || position >= p.room) return;
  int page = place.sequence, slot = static_cast<int>(position);
  if (p.block_table != nullptr) {
    const int index = p.page.divide(slot);
    page = p.block_table[place.sequence * p.block_table_stride + index];
    slot -= index * p.page_size;
  } else if (p.cache_batch_idx != nullptr) {
    page = p.cache_batch_idx[place.sequence];
  }
  if (page < 0 || page >= p.num_pages) return;
  const auto from = [&](const NewRows& x) {
    const bool packed = x.cu_seqlens != nullptr;
    return static_cast<const Bits*>(x.data) + head * x.head_stride +
           (packed ? row * x.row_stride
                   : place.sequence * x.batch_stride + place.step * x.row_stride);
  };
  const auto to = [&](const CacheView& x) {
    return static_cast<Bits*>(x.data) + page * x.page_stride + slot * x.row_stride +
           head * x.head_stride;
  };
  move<T, PAIRS>(p, from(p.k), to(p.k_cache), p.k.head_dim, chunk, p.cos != nullptr, position);
  move<T, PAIRS>(p, from(p.v), to(p.v_cache), p.v.head_dim, chunk, false, position);
}

template <typename T, int PAIRS>
__device__ __forceinline__ void rotate_query(const AppendParams& p, int item) {
  using Bits = typename Format<T>::Bits;
  const int past_chunk = p.q_chunks.divide(item), chunk = item - past_chunk * p.q_chunks.divisor;
  const int row = p.q_heads.divide(past_chunk), head = past_chunk - row * p.q.heads;
  const Place place = place_of(p.q, p.q_seqlen, row, p.batch);
  const long long position =
      static_cast<long long>(p.lengths[place.sequence]) + (p.rotate_by_row ? place.step : 0);
  const bool packed = p.q.cu_seqlens != nullptr;
  const Bits* src = static_cast<const Bits*>(p.q.data) + head * p.q.head_stride +
                    (packed ? row * p.q.row_stride
                            : place.sequence * p.q.batch_stride + place.step * p.q.row_stride);
  Bits* dst =
      static_cast<Bits*>(p.q_out) + (static_cast<long long>(row) * p.q.heads + head) * p.q.head_dim;
  move<T, PAIRS>(p, src, dst, p.q.head_dim, chunk, true, position);
}

template <typename T, int PAIRS>
__global__ void __launch_bounds__(THREADS)
    append_kernel(const __grid_constant__ AppendParams params) {
  const int index = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  if (index < params.batch) {
    const int* cu_seqlens = params.k.cu_seqlens;
    params.lengths_out[index] =
        params.lengths[index] +
        (cu_seqlens == nullptr ? params.k.seqlen : cu_seqlens[index + 1] - cu_seqlens[index]);
  }
  const int key_items = params.k.rows * params.k.heads * params.k_chunks.divisor;
  const int query_items = params.q.rows * params.q.heads * params.q_chunks.divisor;
  if (index < key_items) {
    append_keys<T, PAIRS>(params, index);
  } else if (index - key_items < query_items) {
    rotate_query<T, PAIRS>(params, index - key_items);
  }
}

}  // namespace flashmoe::appending
