// The Hopper forward kernel by itself, a handful of tiles, behind two C functions: see probe.py.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "attention/fwd_sm90.cuh"

namespace flashmoe::sm90 {
namespace {

static_assert(sizeof(ptx::TensorMap) == sizeof(CUtensorMap), "TensorMap must be a CUtensorMap");

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                   &result);
  return reinterpret_cast<Encode>(function);
}

// Boxes of 64 columns by `rows` of a (batch, seqlen, heads, head_dim) bfloat16 tensor.
CUresult encode(ptx::TensorMap* map, const void* data, long long batch_stride, long long row_stride,
                long long head_stride, int batch, int seqlen, int heads, int head_dim, int rows) {
  static const Encode encode_tiled = encoder();
  const cuuint64_t sizes[4] = {cuuint64_t(head_dim), cuuint64_t(seqlen), cuuint64_t(heads),
                               cuuint64_t(batch)};
  const cuuint64_t strides[3] = {cuuint64_t(row_stride) * 2, cuuint64_t(head_stride) * 2,
                                 cuuint64_t(batch_stride) * 2};
  const cuuint32_t box[4] = {64, cuuint32_t(rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  return encode_tiled(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                      const_cast<void*>(data), sizes, strides, box, element_strides,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// K and V of the heads of one section stay in L2 (H200: 60 MB, half of it for each side).
constexpr long long L2_BYTES = 32ll << 20;

template <typename Tile>
int launch_tile(const AttentionParams& a, cudaStream_t stream) {
  Params params;
  std::memset(&params, 0, sizeof params);
  params.attention = a;
  params.num_m_blocks = (a.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
  params.num_work = params.num_m_blocks * a.batch * a.heads_q;
  const long long kv_bytes = 4ll * a.seqlen_kv * a.head_dim;
  const long long heads = L2_BYTES / (kv_bytes > 0 ? kv_bytes : 1);
  const long long section = (heads > 0 ? heads : 1) * (a.heads_q / a.heads_kv);
  const long long all = static_cast<long long>(a.batch) * a.heads_q;
  params.section = static_cast<int>(section < all ? section : all);
  const CUresult results[] = {
      encode(&params.q, a.q, a.q_batch_stride, a.q_row_stride, a.q_head_stride, a.batch, a.seqlen_q,
             a.heads_q, a.head_dim, 64),
      encode(&params.k, a.k, a.k_batch_stride, a.k_row_stride, a.k_head_stride, a.batch,
             a.seqlen_kv, a.heads_kv, a.head_dim, Tile::BLOCK_N),
      encode(&params.v, a.v, a.v_batch_stride, a.v_row_stride, a.v_head_stride, a.batch,
             a.seqlen_kv, a.heads_kv, a.head_dim, Tile::BLOCK_N)};
  for (const CUresult result : results) {
    if (result != CUDA_SUCCESS) return 1000 + static_cast<int>(result);
  }
  const auto kernel = attention_forward_kernel<__nv_bfloat16, Tile>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::SMEM_BYTES);
  if (error != cudaSuccess) return error;
  int device = 0, sm_count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  int grid = Tile::PERSISTENT ? sm_count * Tile::MIN_BLOCKS : params.num_work;
  if (grid > params.num_work) grid = params.num_work;
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid),
                          dim3(Tile::NUM_THREADS), arguments, Tile::SMEM_BYTES, stream);
}

// HEAD_DIM, BLOCK_M, BLOCK_N, NUM_STAGES, PINGPONG, PERSISTENT
#define FLASHMOE_TILES(X)      \
  X(0, 64, 192, 128, 2, 1, 0)  \
  X(1, 64, 192, 128, 2, 1, 1)  \
  X(2, 64, 128, 128, 2, 1, 1)  \
  X(3, 64, 64, 128, 2, 0, 1)   \
  X(4, 128, 128, 128, 2, 1, 0) \
  X(5, 128, 128, 128, 2, 1, 1) \
  X(6, 128, 128, 176, 2, 1, 0) \
  X(7, 128, 128, 176, 2, 1, 1) \
  X(8, 256, 128, 80, 2, 1, 0)  \
  X(9, 256, 128, 80, 2, 1, 1)

}  // namespace
}  // namespace flashmoe::sm90

extern "C" int launch(int tile, const flashmoe::AttentionParams* params, void* stream) {
  using namespace flashmoe::sm90;
  switch (tile) {
#define FLASHMOE_CASE(i, D, M, N, S, PING, PERSIST) \
  case i:                                           \
    return launch_tile<Tile<D, M, N, S, PING, PERSIST>>(*params, static_cast<cudaStream_t>(stream));
    FLASHMOE_TILES(FLASHMOE_CASE)
  }
  return -1;
}

// head_dim:BLOCK_MxBLOCK_N-...; null past the last tile.
extern "C" const char* tile_name(int tile) {
  switch (tile) {
#define FLASHMOE_NAME(i, D, M, N, S, PING, PERSIST) \
  case i:                                           \
    return #D ":" #M "x" #N "-stages" #S "-pingpong" #PING "-persistent" #PERSIST;
    FLASHMOE_TILES(FLASHMOE_NAME)
  }
  return nullptr;
}
