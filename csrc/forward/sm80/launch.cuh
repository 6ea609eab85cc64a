// Launches one compiled tile of the mma.sync forward kernel. Host side; knows no torch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "forward/sm80/kernel.cuh"

namespace flashmoe::sm80 {

template <typename T, typename Tile, bool ALIGNED, bool GENERAL>
cudaError_t launch(const AttentionParams& params, int device, cudaStream_t stream) {
  const auto kernel = attention_forward_kernel<T, Tile, ALIGNED, GENERAL>;
  // The opt-in to more than 48 KiB is per device and kernel, and costs a driver call: once only.
  static std::atomic<unsigned long long> opted_in{0};
  const unsigned long long bit = 1ull << (device & 63);
  if (!(opted_in.load(std::memory_order_relaxed) & bit)) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::SMEM_BYTES);
    if (error != cudaSuccess) return error;
    opted_in.fetch_or(bit, std::memory_order_relaxed);
  }
  const int num_m_blocks = (params.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
  const long long blocks = static_cast<long long>(num_m_blocks) * params.batch * params.heads_q;
  if (blocks > 0x7fffffffll) return cudaErrorInvalidConfiguration;
  void* arguments[] = {const_cast<AttentionParams*>(&params), const_cast<int*>(&num_m_blocks)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(Tile::NUM_THREADS), arguments,
                          Tile::SMEM_BYTES, stream);
}

template <typename Tile, bool ALIGNED, bool GENERAL>
cudaError_t launch_dtype(const AttentionParams& params, DType dtype, int device,
                         cudaStream_t stream) {
  if (dtype == DType::float16) {
    return launch<__half, Tile, ALIGNED, GENERAL>(params, device, stream);
  }
  if (dtype == DType::bfloat16) {
    return launch<__nv_bfloat16, Tile, ALIGNED, GENERAL>(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashmoe::sm80
