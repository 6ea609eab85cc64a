#include "include/cuda.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "gpu.h"
#include "include/cuda_runtime.h"

FakeDevice fake_device;

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult*) {
  if (std::strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  return cudaSuccess;
}

// Device 0 has the L2 of a large GPU, others hardly any, so that sections of heads are small.
// Device 2 has as many SMs as a problem has blocks of rows.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device == 2 ? 1 << 20 : fake_device.sm_count;
      break;
    case cudaDevAttrL2CacheSize:
      *value = device == 0 ? 50 << 20 : 1 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t smem_bytes, cudaStream_t) {
  const emulator::Launch launch{static_cast<int>(grid.x), static_cast<int>(block.x),
                                static_cast<int>(smem_bytes), 2 * fake_device.sm_count,
                                [&] { fake_device.call(kernel, arguments); }};
  fake_device.failure = emulator::run(launch, fake_device.seed);
  return fake_device.failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, arguments,
                          config->dynamicSmemBytes, config->stream);
}

namespace {

// The kernel of this machine refuses to read what is not.
bool is_mapped(const void* data) {
  int ends[2];
  if (pipe(ends) != 0) return false;
  const bool readable = write(ends[1], data, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return readable;
}

}  // namespace

// Refuses what the driver does (CUDA driver API, cuTensorMapEncodeTiled), and a base that is not
// mapped: it faults on an H200 even if boxes hold none of it.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const uint32_t row_bytes = box[0] * element_bytes;
  const bool is_swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  bool legal = rank >= 4 && rank <= 5 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
               row_bytes % 16 == 0 && is_mapped(data);
  // As much as the emulator does of what the driver allows.
  legal = legal && (is_swizzled ? row_bytes == 128 : box[1] == 1);
  for (cuuint32_t d = 0; d < rank; ++d) {
    legal = legal && sizes[d] >= 1 && sizes[d] <= 1ull << 32;
    legal = legal && box[d] >= 1 && box[d] <= 256 && element_strides[d] == 1;
    if (d + 1 < rank) legal = legal && strides[d] % 16 == 0 && strides[d] < 1ull << 40;
    if (d > 1) legal = legal && box[d] == 1;
  }
  if (!legal) return CUDA_ERROR_INVALID_VALUE;
  emulator::TensorMap written{
      static_cast<uint8_t*>(data), {}, {}, box[1], rank, element_bytes, row_bytes, is_swizzled};
  std::copy_n(sizes, rank, written.sizes);
  std::copy_n(strides, rank - 1, written.strides);
  static_assert(sizeof written <= sizeof *map);
  std::memcpy(map->opaque, &written, sizeof written);
  return CUDA_SUCCESS;
}
