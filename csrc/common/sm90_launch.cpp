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
  static const Encode encode_tiled = encoder();
  if (encode_tiled == nullptr) return false;
  // The driver refuses sizes of 0 (nothing is loaded from those) and looks at strides of size 1.
  const auto size = [](int n) { return cuuint64_t(std::max(n, 1)); };
  const auto stride = [](long long elements, int n) {
    return n > 1 ? cuuint64_t(elements) * 2 : cuuint64_t(16);
  };
  const cuuint64_t sizes[4] = {size(x.head_dim), size(x.seqlen), size(x.heads), size(x.batch)};
  const cuuint64_t strides[3] = {stride(x.row_stride, x.seqlen), stride(x.head_stride, x.heads),
                                 stride(x.batch_stride, x.batch)};
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const auto type =
      dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto encoded = [&] {
    return encode_tiled(reinterpret_cast<CUtensorMap*>(map), type, 4, const_cast<void*>(x.data),
                        sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  if (encoded()) return true;
  // The driver needs a current context, which a thread gets with its first call of the runtime that
  // does: autograd's threads may come here before.
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess && encoded();
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
