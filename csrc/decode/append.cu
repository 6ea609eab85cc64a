#include "decode/append.cuh"
#include "decode/cuda.h"

namespace flashmoe {
namespace {

// Whether chunks of 8 columns of rotated rows are whole vectors, aligned to 16 bytes.
bool fits_vectors(const AppendParams& p, int element_bytes) {
  bool fits = p.rotary_dim % 8 == 0;
  const auto check = [&](const void* data, long long batch, long long row, long long head) {
    fits = fits && reinterpret_cast<unsigned long long>(data) % 16 == 0;
    for (const long long stride : {batch, row, head}) {
      fits = fits && stride * element_bytes % 16 == 0;
    }
  };
  for (const NewRows* x : {&p.k, &p.v, &p.q}) {
    if (x->rows == 0) continue;
    fits = fits && x->head_dim % 8 == 0;
    check(x->data, x->batch_stride, x->row_stride, x->head_stride);
  }
  for (const CacheView* x : {&p.k_cache, &p.v_cache}) {
    check(x->data, x->page_stride, x->row_stride, x->head_stride);
  }
  return fits;
}

template <typename T, int PAIRS>
cudaError_t launch(AppendParams params, cudaStream_t stream) {
  const auto chunks = [](int head_dim) {
    return FastDivisor::of(head_dim > 2 * PAIRS ? (head_dim + 2 * PAIRS - 1) / (2 * PAIRS) : 1);
  };
  const auto divisor = [](int n) { return FastDivisor::of(n > 0 ? n : 1); };
  params.k_chunks =
      chunks(params.k.head_dim > params.v.head_dim ? params.k.head_dim : params.v.head_dim);
  params.k_heads = divisor(params.k.heads), params.k_seqlen = divisor(params.k.seqlen);
  params.q_chunks = chunks(params.q.head_dim);
  params.q_heads = divisor(params.q.heads), params.q_seqlen = divisor(params.q.seqlen);
  params.page = divisor(params.page_size);
  const auto items = [](const NewRows& x, const FastDivisor& chunks) {
    return static_cast<long long>(x.rows) * x.heads * chunks.divisor;
  };
  const long long chunked = items(params.k, params.k_chunks) + items(params.q, params.q_chunks);
  const long long threads = chunked > params.batch ? chunked : params.batch;
  if (threads > 0x7fffffffll - appending::THREADS) return cudaErrorInvalidConfiguration;
  const unsigned blocks =
      static_cast<unsigned>((threads + appending::THREADS - 1) / appending::THREADS);
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(appending::append_kernel<T, PAIRS>),
                          dim3(blocks), dim3(appending::THREADS), arguments, 0, stream);
}

template <typename T>
cudaError_t launch(const AppendParams& params, cudaStream_t stream) {
  const bool vectors = fits_vectors(params, static_cast<int>(sizeof(T)));
  return vectors ? launch<T, 4>(params, stream) : launch<T, 1>(params, stream);
}

}  // namespace

cudaError_t launch_append(const AppendParams& params, DType dtype, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  switch (dtype) {
    case DType::float16:
      return launch<__half>(params, stream);
    case DType::bfloat16:
      return launch<__nv_bfloat16>(params, stream);
    default:
      return launch<float>(params, stream);
  }
}

}  // namespace flashmoe
