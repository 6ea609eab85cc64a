#include "fwd_sm90_host.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <unordered_set>

namespace flashmoe::sm90 {
namespace {

static_assert(sizeof(ptx::TensorMap) == sizeof(CUtensorMap), "TensorMap must be a CUtensorMap");

using Encode = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that nothing links libcuda and the library loads without a driver.
Encode encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                   &result);
  return reinterpret_cast<Encode>(function);
}

struct Operand {
  const void* data;
  long long batch_stride, row_stride, head_stride;  // in elements
  int seqlen, heads, rows;                          // rows of a box
};

// Boxes of 64 columns by `rows` of a (batch, seqlen, heads, head_dim) tensor of 16-bit elements.
bool encode(ptx::TensorMap* map, const Operand& x, int batch, int head_dim, DType dtype) {
  static const Encode encode_tiled = encoder();
  if (encode_tiled == nullptr) return false;
  // The driver refuses sizes of 0 (nothing is loaded from those) and looks at strides of size 1.
  const auto size = [](int n) { return cuuint64_t(std::max(n, 1)); };
  const auto stride = [](long long elements, int n) {
    return n > 1 ? cuuint64_t(elements) * 2 : cuuint64_t(16);
  };
  const cuuint64_t sizes[4] = {size(head_dim), size(x.seqlen), size(x.heads), size(batch)};
  const cuuint64_t strides[3] = {stride(x.row_stride, x.seqlen), stride(x.head_stride, x.heads),
                                 stride(x.batch_stride, batch)};
  const cuuint32_t box[4] = {64, cuuint32_t(x.rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const auto type =
      dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_tiled(reinterpret_cast<CUtensorMap*>(map), type, 4, const_cast<void*>(x.data),
                      sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

struct Device {
  int sm_count = 0, l2_bytes = 0;
};

const Device& device_properties(int device) {
  static std::array<Device, 64> devices;
  static std::array<std::once_flag, 64> flags;
  std::call_once(flags[device & 63], [device] {
    Device& d = devices[device & 63];
    cudaDeviceGetAttribute(&d.sm_count, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&d.l2_bytes, cudaDevAttrL2CacheSize, device);
  });
  return devices[device & 63];
}

// The opt-in to more than 48 KiB is per device and kernel, and costs a driver call: once only.
cudaError_t allow_smem(const void* kernel, int bytes, int device) {
  static std::mutex mutex;
  static std::array<std::unordered_set<const void*>, 64> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& here = allowed[device & 63];
  if (here.count(kernel)) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) here.insert(kernel);
  return error;
}

// How many (batch, head) pairs of a causal problem are worked on together: few, so that what they
// read stays in L2; enough blocks to level out their lengths; and as many in every section, since
// the last one ends it all. The factors were measured (H100, docs/hopper-forward.md).
int section_heads(const AttentionParams& a, long long num_m_blocks, long long grid, int l2_bytes) {
  const double batch_heads = static_cast<double>(a.batch) * a.heads_q;
  const double group = a.heads_q / a.heads_kv;
  const double group_bytes = 4. * a.head_dim * (a.seqlen_kv + a.seqlen_q * group);
  const double in_l2 = l2_bytes / 3. / std::max(group_bytes, 1.) * group;
  const double leveled = std::min(2., num_m_blocks / 4.) * grid / num_m_blocks;
  const double wanted = std::min(std::max(in_l2, leveled), batch_heads);
  int best = 1;
  const int all = static_cast<int>(batch_heads);
  for (int divisor = 1; divisor <= all / divisor; ++divisor) {
    if (all % divisor != 0) continue;
    for (const int section : {divisor, all / divisor}) {
      const auto off = [&](int heads) { return std::max(heads / wanted, wanted / heads); };
      if (off(section) < off(best)) best = section;
    }
  }
  return best;
}

}  // namespace

bool can_run(const AttentionParams& p) {
  const auto fits = [](const void* data, std::initializer_list<std::pair<long long, int>> strides) {
    if (reinterpret_cast<unsigned long long>(data) % 16 != 0) return false;
    for (const auto& [stride, size] : strides) {
      if (size > 1 && (stride <= 0 || stride % 8 != 0 || stride >= 1ll << 39)) return false;
    }
    return true;
  };
  return fits(p.q, {{p.q_row_stride, p.seqlen_q},
                    {p.q_head_stride, p.heads_q},
                    {p.q_batch_stride, p.batch}}) &&
         fits(p.k, {{p.k_row_stride, p.seqlen_kv},
                    {p.k_head_stride, p.heads_kv},
                    {p.k_batch_stride, p.batch}}) &&
         fits(p.v, {{p.v_row_stride, p.seqlen_kv},
                    {p.v_head_stride, p.heads_kv},
                    {p.v_batch_stride, p.batch}});
}

cudaError_t launch(const Sm90Tile& tile, const void* kernel, const AttentionParams& a, DType dtype,
                   int device, cudaStream_t stream, unsigned* counter) {
  const long long batch_heads = static_cast<long long>(a.batch) * a.heads_q;
  const long long num_m_blocks = (a.seqlen_q + tile.block_m - 1) / tile.block_m;
  const long long num_work = num_m_blocks * batch_heads;
  if (num_work > 0x7fffffffll) return cudaErrorInvalidConfiguration;
  const Device& here = device_properties(device);
  const long long grid =
      std::min<long long>(num_work, static_cast<long long>(here.sm_count) * tile.ctas_per_sm);

  Sm90Params params;
  std::memset(&params, 0, sizeof params);
  params.attention = a;
  params.scale_log2 = a.softmax_scale * 1.4426950408889634f;
  params.inverse_scale_log2 = 1.f / params.scale_log2;
  // P is at most 2^8 then, in float16: far from overflow, and its precision does not depend on it.
  params.slack = (8.f - max_shift(dtype == DType::bfloat16)) / params.scale_log2;
  params.num_work = static_cast<int>(num_work);
  params.m_blocks = FastDivisor::of(static_cast<int>(num_m_blocks));
  params.heads_q = FastDivisor::of(a.heads_q);
  params.group = FastDivisor::of(a.heads_q / a.heads_kv);
  if (a.causal) {
    const int section = section_heads(a, num_m_blocks, grid, here.l2_bytes);
    params.section_heads = FastDivisor::of(section);
    params.per_section = FastDivisor::of(static_cast<int>(section * num_m_blocks));
    // Other blocks are of one length, and dealt evenly as they are.
    if (num_work > grid) params.counter = counter;
  }

  const Operand q{a.q, a.q_batch_stride, a.q_row_stride, a.q_head_stride, a.seqlen_q, a.heads_q,
                  64};
  const Operand k{a.k,         a.k_batch_stride, a.k_row_stride, a.k_head_stride,
                  a.seqlen_kv, a.heads_kv,       tile.block_n};
  const Operand v{a.v,         a.v_batch_stride, a.v_row_stride, a.v_head_stride,
                  a.seqlen_kv, a.heads_kv,       tile.block_n};
  const Operand o{a.out, a.o_batch_stride, a.o_row_stride, a.o_head_stride, a.seqlen_q, a.heads_q,
                  64};
  if (!encode(&params.q, q, a.batch, a.head_dim, dtype) ||
      !encode(&params.k, k, a.batch, a.head_dim, dtype) ||
      !encode(&params.v, v, a.batch, a.head_dim, dtype) ||
      (tile.stages_output() && !encode(&params.o, o, a.batch, a.head_dim, dtype))) {
    return cudaErrorNotSupported;
  }
  if (const cudaError_t error = allow_smem(kernel, tile.smem_bytes(), device)) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid)),
                          dim3(static_cast<unsigned>(tile.num_threads())), arguments,
                          static_cast<size_t>(tile.smem_bytes()), stream);
}

}  // namespace flashmoe::sm90
