// Loads and launches cubins of the Hopper forward kernel by C functions, for probe.py.
#include "forward/sm90/host.h"

extern "C" int load_kernel(const char* path, void** kernel) {
  cudaLibrary_t library;
  if (const cudaError_t error =
          cudaLibraryLoadFromFile(&library, path, nullptr, nullptr, 0, nullptr, nullptr, 0)) {
    return error;
  }
  return cudaLibraryGetKernel(reinterpret_cast<cudaKernel_t*>(kernel), library, "attention");
}

extern "C" int launch(const flashmoe::Sm90Tile* tile, const void* kernel,
                      const flashmoe::AttentionParams* params, void* stream) {
  if (!flashmoe::sm90::can_run(*params)) return cudaErrorNotSupported;
  static int* counter = [] {
    void* memory = nullptr;
    cudaMalloc(&memory, sizeof(int));
    cudaMemset(memory, 0, sizeof(int));
    return static_cast<int*>(memory);
  }();
  return flashmoe::sm90::launch(*tile, kernel, *params, flashmoe::DType::bfloat16, 0,
                                static_cast<cudaStream_t>(stream), counter);
}

// Runs the kernel of a cubin compiled with FLASHMOE_TRACE twice and copies what it recorded.
extern "C" int read_trace(const char* path, const flashmoe::Sm90Tile* tile,
                          const flashmoe::AttentionParams* params, void* data, size_t bytes) {
  cudaLibrary_t library;
  if (const cudaError_t error =
          cudaLibraryLoadFromFile(&library, path, nullptr, nullptr, 0, nullptr, nullptr, 0)) {
    return error;
  }
  cudaKernel_t kernel;
  if (const cudaError_t error = cudaLibraryGetKernel(&kernel, library, "attention")) return error;
  void* source = nullptr;
  size_t size = 0;
  if (const cudaError_t error = cudaLibraryGetGlobal(&source, &size, library, "flashmoe_trace")) {
    return error;
  }
  for (int i = 0; i < 2; ++i) {
    if (const int error = launch(tile, reinterpret_cast<const void*>(kernel), params, nullptr)) {
      return error;
    }
  }
  if (const cudaError_t error = cudaDeviceSynchronize()) return error;
  return cudaMemcpy(data, source, bytes < size ? bytes : size, cudaMemcpyDeviceToHost);
}
