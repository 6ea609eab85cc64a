#include "forward/cuda.h"

#include "common/loaded.h"
#include "forward/sm90/counters.h"
#include "forward/sm90/host.h"
#include "instances/registry.h"

namespace flashmoe {
namespace {

Loaded<Kernel> loaded_kernels;

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

}  // namespace

const Kernel* find_kernel(long long handle) {
  return loaded_kernels.find(handle, compiled_kernels());
}

long long load_kernel(const void* cubin, const Sm90Tile& tile, Variant variant, DType dtype) {
  Kernel kernel{tile.head_dim, nullptr, nullptr, tile, variant, {nullptr, nullptr}};
  kernel.entries[dtype == DType::bfloat16] = Cubin(cubin).entry("attention");
  return loaded_kernels.add(kernel, compiled_kernels().size());
}

long long forward_workspace_bytes(const Kernel& kernel, const AttentionParams& params, int device) {
  return kernel.launch != nullptr ? 0 : sm90::workspace_bytes(kernel.tile, params, device);
}

cudaError_t launch_forward(const Kernel& kernel, const AttentionParams& params, DType dtype,
                           int device, cudaStream_t stream, void* workspace) {
  // Hopper's kernels with softcap or dropout have no way to do without.
  const bool lacks =
      kernel.launch == nullptr && ((kernel.variant.softcap && params.terms.softcap == 0) ||
                                   (kernel.variant.dropout && params.terms.rng_state == nullptr));
  const int head_dim_v = kernel.tile.head_dim_v;
  const bool fits_v =
      head_dim_v > 0 ? params.head_dim_v <= head_dim_v : params.head_dim_v == params.head_dim;
  if (params.head_dim > kernel.head_dim || !fits_v || dtype == DType::float32 ||
      !kernel.variant.covers(params) || lacks) {
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
    if (fallback == nullptr || params.head_dim_v != params.head_dim) return cudaErrorNotSupported;
    return launch_forward(*fallback, params, dtype, device, stream, nullptr);
  }
  const void* entry = kernel.entries[dtype == DType::bfloat16];
  if (entry == nullptr) return cudaErrorInvalidValue;
  // Only blocks of rows that differ in length are drawn from a counter. Packed batches have one in
  // their workspace.
  const bool draws = !packed && (!params.mask.is_full() || params.terms.attn_mask.is_given());
  unsigned* counter = draws ? sm90::next_counter(device, stream) : nullptr;
  return sm90::launch(kernel.tile, entry, params, dtype, device, stream, counter, workspace);
}

}  // namespace flashmoe
