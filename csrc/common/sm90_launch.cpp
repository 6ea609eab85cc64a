#include "common/sm90_launch.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_set>
#include <utility>

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

// Of `rank` dimensions, in boxes of the first two. Whether the driver took it.
bool encode_boxes(ptx::TensorMap* map, CUtensorMapDataType type, int rank, const void* data,
                  const cuuint64_t (&sizes)[5], const cuuint64_t (&strides)[4], int box_columns,
                  int box_rows, CUtensorMapSwizzle swizzle) {
  static const Encode encode_tiled = encoder();
  if (encode_tiled == nullptr) return false;
  const cuuint32_t box[5] = {cuuint32_t(box_columns), cuuint32_t(box_rows), 1, 1, 1};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const auto encoded = [&] {
    return encode_tiled(reinterpret_cast<CUtensorMap*>(map), type, rank, const_cast<void*>(data),
                        sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  if (encoded()) return true;
  // The driver needs a current context, which a thread gets with its first call of the runtime that
  // does: autograd's threads may come here before.
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess && encoded();
}

}  // namespace

bool is_fetchable(const TensorView& x) {
  if (reinterpret_cast<unsigned long long>(x.data) % 16 != 0) return false;
  const std::pair<long long, int> strides[] = {
      {x.row_stride, x.seqlen}, {x.head_stride, x.heads}, {x.batch_stride, x.batch}};
  for (const auto& [stride, size] : strides) {
    if (size > 1 && (stride <= 0 || stride % 8 != 0 || stride >= 1ll << 39)) return false;
  }
  return true;
}

bool encode(ptx::TensorMap* map, const TensorView& x, int box_rows, DType dtype) {
  // The driver refuses sizes of 0 (nothing is loaded from those) and looks at strides of size 1.
  const auto size = [](int n) { return cuuint64_t(std::max(n, 1)); };
  const auto stride = [](long long elements, int n) {
    return n > 1 ? cuuint64_t(elements) * 2 : cuuint64_t(16);
  };
  const cuuint64_t row = stride(x.row_stride, x.seqlen);
  const cuuint64_t sizes[5] = {size(x.head_dim), size(x.seqlen), size(x.heads), size(x.batch),
                               PACKED_ROWS + 1};
  const cuuint64_t strides[4] = {row, stride(x.head_stride, x.heads),
                                 stride(x.batch_stride, x.batch), (1ull << 34) - row};
  const auto type =
      dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_boxes(map, type, x.is_packed() ? 5 : 4, x.data, sizes, strides, 64, box_rows,
                      CU_TENSOR_MAP_SWIZZLE_128B);
}

bool encode_rows(ptx::TensorMap* map, const float* data, int columns, long long rows) {
  const cuuint64_t sizes[5] = {cuuint64_t(columns), cuuint64_t(rows), 1, 1};
  const cuuint64_t strides[4] = {cuuint64_t(columns) * 4, 16, 16};
  return encode_boxes(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, data, sizes, strides, columns, 1,
                      CU_TENSOR_MAP_SWIZZLE_NONE);
}

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

namespace {

// How many blocks a packed batch has at most.
long long packed_blocks(int total, int batch, int max_seqlen, int block) {
  if (block == 0) return 0;
  const long long by_rows = total / block + std::min(batch, total);
  return std::min(by_rows, static_cast<long long>(batch) * ((max_seqlen + block - 1) / block));
}

}  // namespace

Schedule plan_schedule(const AttentionParams& p, int block_queries, int block_keys, void* memory) {
  const Sequences& s = p.sequences;
  Schedule schedule{};
  schedule.block_queries = block_queries, schedule.block_keys = block_keys;
  schedule.room_queries =
      static_cast<int>(packed_blocks(s.total_q, p.batch, p.seqlen_q, block_queries));
  schedule.room_keys = static_cast<int>(packed_blocks(s.total_k, p.batch, p.seqlen_kv, block_keys));
  schedule.counts = static_cast<int*>(memory);
  schedule.sequences = reinterpret_cast<PackedBlock*>(schedule.counts + 4);
  schedule.queries = schedule.sequences + p.batch;
  schedule.keys = block_keys == 0 ? nullptr : schedule.queries + schedule.room_queries;
  return schedule;
}

long long schedule_bytes(const AttentionParams& p, int block_queries, int block_keys) {
  const Sequences& s = p.sequences;
  const long long blocks = packed_blocks(s.total_q, p.batch, p.seqlen_q, block_queries) +
                           packed_blocks(s.total_k, p.batch, p.seqlen_kv, block_keys);
  return 16 + (p.batch + blocks) * static_cast<long long>(sizeof(PackedBlock));
}

cudaError_t launch_schedule(const AttentionParams& p, const Schedule& schedule,
                            cudaStream_t stream) {
  ScheduleParams params{p.sequences, p.batch, p.seqlen_q, p.seqlen_kv, schedule};
  void* arguments[] = {&params};
  return cudaLaunchKernel(schedule_entry, dim3(1), dim3(SCHEDULE_THREADS), arguments,
                          SCHEDULE_SMEM_BYTES, stream);
}

cudaError_t launch_overlapping(const void* kernel, long long grid, int threads, int smem_bytes,
                               void** arguments, cudaStream_t stream) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

// Per device and kernel, and costs a driver call: once only.
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

}  // namespace flashmoe::sm90
