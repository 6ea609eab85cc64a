#include "decode/cuda.h"

#include <algorithm>
#include <atomic>
#include <random>

#include "common/sm90_launch.h"
#include "instances/registry.h"

namespace flashmoe {
namespace {

// No two launches of a process have the same one soon, and those of others hardly ever.
unsigned long long next_tag() {
  static std::atomic<unsigned long long> next{[] {
    std::random_device random;
    return static_cast<unsigned long long>(random()) << 32 | random();
  }()};
  const unsigned long long tag =
      next.fetch_add(1, std::memory_order_relaxed) & ((1ull << (64 - decoding::COUNT_BITS)) - 1);
  return tag != 0 ? tag : 1;
}

// Thread blocks of a kernel that run at a time.
int slots_of(const DecodeKernel& kernel, int device) {
  const sm90::Device& here = sm90::device_properties(device);
  const int fitting = here.smem_per_sm / (kernel.smem_bytes + 1024);
  return here.sm_count * std::clamp(fitting, 1, kernel.ctas_per_sm);
}

}  // namespace

const DecodeKernel* find_decode_kernel(long long handle) {
  const auto& compiled = compiled_decode_kernels();
  const bool found = handle >= 0 && handle < static_cast<long long>(compiled.size());
  return found ? &compiled[static_cast<size_t>(handle)] : nullptr;
}

decoding::DecodeParams prepare_decode(const DecodeKernel& kernel, const AttentionParams& params,
                                      long long num_splits, int device) {
  decoding::DecodeParams decode{};
  decode.attention = params;
  decode.batch_invariant = num_splits < 0;
  decode.evict_first = decoding::should_evict_first(params, kernel.block_m,
                                                    sm90::device_properties(device).l2_bytes);
  if (num_splits < 0) {
    decode.num_splits = decoding::invariant_splits(params.seqlen_kv, kernel.block_n);
  } else if (num_splits == 0) {
    decode.num_splits =
        decoding::choose_splits(params, kernel.block_m, kernel.block_n, slots_of(kernel, device));
  } else {
    // No sequence has more steps, the first of which may begin 15 keys early.
    const int steps = decoding::ceil_div(params.seqlen_kv + 15, kernel.block_n);
    decode.num_splits = static_cast<int>(
        std::min<long long>({num_splits, decoding::MAX_SPLITS, std::max(steps, 1)}));
  }
  return decode;
}

long long decode_workspace_bytes(const DecodeKernel& kernel, const decoding::DecodeParams& params) {
  return decoding::Workspace(params.attention, kernel.block_m, kernel.head_dim, params.num_splits)
      .bytes();
}

cudaError_t launch_decode(const DecodeKernel& kernel, decoding::DecodeParams params, DType dtype,
                          int device, cudaStream_t stream, void* workspace) {
  if (params.attention.head_dim > kernel.head_dim || dtype == DType::float32) {
    return cudaErrorInvalidValue;
  }
  params.workspace = workspace;
  params.tag = next_tag();
  return kernel.launch(params, dtype, device, stream);
}

}  // namespace flashmoe
