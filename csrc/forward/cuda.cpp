#include "forward/cuda.h"

#include <deque>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>

#include "forward/sm90/counters.h"
#include "forward/sm90/host.h"
#include "instances/registry.h"

namespace flashmoe {
namespace {

// A deque, because its elements stay where they are.
std::deque<Kernel> loaded_kernels;
std::shared_mutex loaded_mutex;

bool rows_aligned(const AttentionParams& p) {
  const auto aligned = [](const void* pointer, long long batch, long long row, long long head) {
    return reinterpret_cast<unsigned long long>(pointer) % 16 == 0 && (batch | row | head) % 8 == 0;
  };
  return aligned(p.q, p.q_batch_stride, p.q_row_stride, p.q_head_stride) &&
         aligned(p.k, p.k_batch_stride, p.k_row_stride, p.k_head_stride) &&
         aligned(p.v, p.v_batch_stride, p.v_row_stride, p.v_head_stride);
}

// The first sm80 kernel of the smallest head_dim that computes the call.
const Kernel* sm80_default(const AttentionParams& params) {
  const Kernel* found = nullptr;
  for (const Kernel& kernel : compiled_kernels()) {
    if (kernel.launch != nullptr && kernel.head_dim >= params.head_dim &&
        kernel.variant.covers(params) && (found == nullptr || kernel.head_dim < found->head_dim)) {
      found = &kernel;
    }
  }
  return found;
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
  }
}

}  // namespace

const Kernel* find_kernel(long long handle) {
  const auto& compiled = compiled_kernels();
  const auto count = static_cast<long long>(compiled.size());
  if (handle < 0) return nullptr;
  if (handle < count) return &compiled[handle];
  const std::shared_lock<std::shared_mutex> lock(loaded_mutex);
  const auto index = static_cast<size_t>(handle - count);
  return index < loaded_kernels.size() ? &loaded_kernels[index] : nullptr;
}

long long load_kernel(const void* cubin, const Sm90Tile& tile, Variant variant, DType dtype) {
  cudaLibrary_t library;
  check(cudaLibraryLoadData(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0),
        "cudaLibraryLoadData");
  cudaKernel_t entry;
  check(cudaLibraryGetKernel(&entry, library, "attention"), "cudaLibraryGetKernel");
  Kernel kernel{tile.head_dim, nullptr, nullptr, tile, variant, {nullptr, nullptr}};
  kernel.entries[dtype == DType::bfloat16] = reinterpret_cast<const void*>(entry);
  const std::unique_lock<std::shared_mutex> lock(loaded_mutex);
  loaded_kernels.push_back(kernel);
  return static_cast<long long>(compiled_kernels().size() + loaded_kernels.size()) - 1;
}

long long forward_workspace_bytes(const Kernel& kernel, const AttentionParams& params) {
  return kernel.launch != nullptr ? 0 : sm90::workspace_bytes(kernel.tile, params);
}

cudaError_t launch_forward(const Kernel& kernel, const AttentionParams& params, DType dtype,
                           int device, cudaStream_t stream, void* workspace) {
  // Hopper's kernels with softcap have no way to do without.
  const bool uncapped = kernel.launch == nullptr && kernel.variant.softcap;
  if (params.head_dim > kernel.head_dim || dtype == DType::float32 ||
      !kernel.variant.covers(params) || (uncapped && params.terms.softcap == 0)) {
    return cudaErrorInvalidValue;
  }
  if (kernel.launch != nullptr) {
    const auto launch = rows_aligned(params) ? kernel.launch : kernel.launch_unaligned;
    return launch(params, dtype, device, stream);
  }
  const bool packed = params.sequences.is_packed();
  // Keys that do not exist have no address to describe to the TMA.
  if ((params.seqlen_kv == 0 && !packed) || !sm90::can_run(params)) {
    const Kernel* fallback = sm80_default(params);
    if (fallback == nullptr) return cudaErrorNotSupported;
    return launch_forward(*fallback, params, dtype, device, stream, nullptr);
  }
  const void* entry = kernel.entries[dtype == DType::bfloat16];
  if (entry == nullptr) return cudaErrorInvalidValue;
  // Only blocks of rows that differ in length are drawn from a counter. Packed batches have one in
  // their workspace.
  const bool draws = !packed && !params.mask.is_full();
  unsigned* counter = draws ? sm90::next_counter(device, stream) : nullptr;
  return sm90::launch(kernel.tile, entry, params, dtype, device, stream, counter, workspace);
}

}  // namespace flashmoe
