// Launches one compiled tile of the decode kernel. Host side; knows no torch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "decode/kernel.cuh"

namespace flashmoe::decoding {

template <typename T, typename Tile, bool PLAIN>
cudaError_t launch(const DecodeParams& params, int device, cudaStream_t stream) {
  const auto kernel = attention_decode_kernel<T, Tile, PLAIN>;
  // The opt-in to more than 48 KiB is per device and kernel, and costs a driver call: once only.
  static std::atomic<unsigned long long> opted_in{0};
  const unsigned long long bit = 1ull << (device & 63);
  if (!(opted_in.load(std::memory_order_relaxed) & bit)) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::SMEM_BYTES);
    if (error != cudaSuccess) return error;
    opted_in.fetch_or(bit, std::memory_order_relaxed);
  }
  const AttentionParams& p = params.attention;
  const long long blocks = static_cast<long long>(num_m_blocks(p, Tile::BLOCK_M)) * p.batch *
                           p.heads_kv * params.num_splits;
  if (blocks > 0x7fffffffll) return cudaErrorInvalidConfiguration;
  DecodeParams divisible = params;
  divisible.heads_kv = FastDivisor::of(p.heads_kv);
  divisible.group = FastDivisor::of(p.heads_q / p.heads_kv);
  divisible.m_blocks = FastDivisor::of(num_m_blocks(p, Tile::BLOCK_M));
  divisible.splits = FastDivisor::of(params.num_splits);
  const int page_size = p.sequences.page_size;
  divisible.page_size = FastDivisor::of(page_size > 0 ? page_size : 1);
  void* arguments[] = {&divisible};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(Tile::NUM_THREADS), arguments,
                          Tile::SMEM_BYTES, stream);
}

template <typename T, typename Tile>
cudaError_t launch(const DecodeParams& params, int device, cudaStream_t stream) {
  if constexpr (Tile::HAS_PLAIN) {
    // Where K and V are many the general kernel is as fast, or faster (docs/dev/decode.md).
    if (params.evict_first && is_plain(params.attention)) {
      return launch<T, Tile, true>(params, device, stream);
    }
  }
  return launch<T, Tile, false>(params, device, stream);
}

template <typename Tile>
cudaError_t launch_dtype(const DecodeParams& params, DType dtype, int device, cudaStream_t stream) {
  if (dtype == DType::float16) return launch<__half, Tile>(params, device, stream);
  if (dtype == DType::bfloat16) return launch<__nv_bfloat16, Tile>(params, device, stream);
  return cudaErrorInvalidValue;
}

}  // namespace flashmoe::decoding
