#include "include/cuda.h"

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

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? fake_device.sm_count : 50 << 20;
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

// Refuses what the driver does (CUDA driver API, cuTensorMapEncodeTiled).
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  bool legal = rank == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * 2 == 128;
  for (int d = 0; d < 4; ++d) {
    legal = legal && sizes[d] >= 1 && sizes[d] <= 1ull << 32;
    legal = legal && box[d] >= 1 && box[d] <= 256 && element_strides[d] == 1;
    if (d < 3) legal = legal && strides[d] % 16 == 0 && strides[d] < 1ull << 40;
  }
  if (!legal || box[2] != 1 || box[3] != 1) return CUDA_ERROR_INVALID_VALUE;
  emulator::TensorMap written{static_cast<uint8_t*>(data), {}, {}, box[1]};
  std::memcpy(written.sizes, sizes, sizeof written.sizes);
  std::memcpy(written.strides, strides, sizeof written.strides);
  static_assert(sizeof written <= sizeof *map);
  std::memcpy(map->opaque, &written, sizeof written);
  return CUDA_SUCCESS;
}
