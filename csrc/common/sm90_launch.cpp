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
    cudaDeviceGetAttribute(&d.smem_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  });
  return devices[device & 63];
}

long long packed_blocks(int total, int batch, int max_seqlen, int block) {
  if (block == 0) return 0;
  const long long by_rows = total / block + std::min(batch, total);
  return std::min(by_rows, static_cast<long long>(batch) * ((max_seqlen + block - 1) / block));
}

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

namespace {

// Of what MaskTiles points to: 32-bit entries and words, and bytes.
struct MaskSizes {
  long long lists, entries, words, seen;
  long long bytes() const { return 4 * (entries + words) + seen; }
};

long long rounded_up(long long n, long long unit) { return (n + unit - 1) / unit * unit; }

MaskSizes mask_sizes(const MaskTilesParams& x, bool has_seen) {
  const long long lists = x.lists, tiles = lists * x.out.room;
  return {lists, rounded_up(lists + tiles, 4),
          rounded_up(tiles * x.out.rows * 4 * MaskTiles::words(x.block_n), 4),
          has_seen ? rounded_up(tiles, 16) : 0};
}

void describe_lines(const AttentionParams& p, MaskTilesParams& x) {
  const AttnMask& mask = x.attn_mask;
  const int size = mask.is_boolean() ? 1 : mask.kind == AttnMask::Kind::float32 ? 4 : 2;
  x.lines_are_rows = mask.key_stride == 1;
  x.line_stride = x.lines_are_rows ? mask.row_stride : mask.key_stride;
  const long long strides = x.line_stride | mask.batch_stride | mask.head_stride;
  const bool is_aligned =
      (reinterpret_cast<unsigned long long>(mask.data) | strides * size) % 16 == 0;
  const int length = x.lines_are_rows ? x.block_n : x.block_m;
  if (mask.row_stride * mask.key_stride != x.line_stride || x.line_stride == 0 || !is_aligned ||
      length * size % 16 != 0) {
    return;
  }
  x.lines = x.lines_are_rows ? x.block_m : x.block_n;
  x.vectors = FastDivisor::of(length * size / 16);
  // Not where a value in units of scores might be infinite, nor where vectors would not help.
  const float scale = p.terms.softcap > 0 ? p.terms.softcap : p.softmax_scale;
  x.adds = (size == 2 || (size == 4 && !x.rows_are_keys)) && x.lines_are_rows != x.rows_are_keys &&
           scale > 1e-6f;
}

MaskTilesParams describe_mask_tiles(const AttentionParams& p, int block_queries, int block_keys,
                                    bool of_keys) {
  MaskTilesParams x{};
  x.attn_mask = p.terms.attn_mask, x.window = p.mask;
  x.num_rows = p.seqlen_q, x.num_columns = p.seqlen_kv;
  x.block_m = block_queries, x.block_n = block_keys;
  if (of_keys) {
    std::swap(x.attn_mask.row_stride, x.attn_mask.key_stride);
    std::swap(x.window.left, x.window.right);  // as seen_by of common/mask.h
    std::swap(x.num_rows, x.num_columns);
    std::swap(x.block_m, x.block_n);
  }
  x.rows_are_keys = of_keys;
  // What is past the end may pass for what is not where rows are queries, not where they are keys.
  const bool rows_alike = !of_keys && x.attn_mask.row_stride == 0 && x.window.is_full();
  const bool columns_alike = of_keys && x.attn_mask.key_stride == 0 && x.window.is_full();
  describe_lines(p, x);
  const int batches = x.attn_mask.batch_stride == 0 ? 1 : p.batch;
  x.heads = x.attn_mask.head_stride == 0 ? 1 : p.heads_q;
  x.blocks = rows_alike ? 1 : (x.num_rows + x.block_m - 1) / x.block_m;
  x.out.tiles = (x.num_columns + x.block_n - 1) / x.block_n;
  x.out.room = columns_alike ? 1 : x.out.tiles;
  x.out.rows = rows_alike ? 1 : x.block_m;
  x.out.block_stride = x.blocks > 1 ? 1 : 0;
  x.out.head_stride = x.heads > 1 ? x.blocks : 0;
  x.out.batch_stride = batches > 1 ? x.heads * x.blocks : 0;
  const long long lists = static_cast<long long>(batches) * x.heads * x.blocks;
  x.lists = static_cast<int>(std::min(lists, 0x7fffffffll));  // launch_mask_tiles refuses these
  return x;
}

}  // namespace

MaskTilesParams plan_mask_tiles(const AttentionParams& p, int block_queries, int block_keys,
                                bool of_keys, bool has_seen, void* memory) {
  MaskTilesParams x = describe_mask_tiles(p, block_queries, block_keys, of_keys);
  const MaskSizes sizes = mask_sizes(x, has_seen);
  x.out.lists = static_cast<int*>(memory);
  x.out.bits = reinterpret_cast<unsigned*>(x.out.lists + sizes.entries);
  if (has_seen) x.out.seen = reinterpret_cast<unsigned char*>(x.out.bits + sizes.words);
  return x;
}

long long mask_tiles_bytes(const AttentionParams& p, int block_queries, int block_keys,
                           bool of_keys, bool has_seen) {
  const MaskTilesParams x = describe_mask_tiles(p, block_queries, block_keys, of_keys);
  return mask_sizes(x, has_seen).bytes();
}

cudaError_t launch_mask_tiles(const MaskTilesParams& params, cudaStream_t stream) {
  const MaskSizes sizes = mask_sizes(params, false);
  // They are counted in 32 bits.
  if (sizes.entries > 0x7fffffffll || sizes.words > 0x7fffffffll) {
    return cudaErrorInvalidConfiguration;
  }
  MaskTilesParams copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernel(mask_tiles_entry, dim3(static_cast<unsigned>(sizes.lists)),
                          dim3(MASK_THREADS), arguments, MASK_SMEM_BYTES, stream);
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
