// Kernels that were compiled on the user's machine: cubins, and the tables that their handles
// count.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <deque>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>

namespace flashmoe {

// A cubin, for the life of the process. All throw std::runtime_error when the CUDA runtime cannot.
class Cubin {
 public:
  explicit Cubin(const void* code) {
    check(cudaLibraryLoadData(&library_, code, nullptr, nullptr, 0, nullptr, nullptr, 0),
          "cudaLibraryLoadData");
  }
  const void* entry(const char* name) const {
    cudaKernel_t found;
    check(cudaLibraryGetKernel(&found, library_, name), "cudaLibraryGetKernel");
    return reinterpret_cast<const void*>(found);
  }

 private:
  static void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
    }
  }
  cudaLibrary_t library_;
};

// Loaded kernels, whose handles follow those of `compiled` ones.
template <typename Kernel>
class Loaded {
 public:
  long long add(const Kernel& kernel, size_t compiled) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    kernels_.push_back(kernel);
    return static_cast<long long>(compiled + kernels_.size()) - 1;
  }
  // Null when there is none.
  template <typename Compiled>
  const Kernel* find(long long handle, const Compiled& compiled) {
    const auto count = static_cast<long long>(compiled.size());
    if (handle < 0) return nullptr;
    if (handle < count) return &compiled[static_cast<size_t>(handle)];
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto index = static_cast<size_t>(handle - count);
    return index < kernels_.size() ? &kernels_[index] : nullptr;
  }

 private:
  std::deque<Kernel> kernels_;  // its elements stay where they are
  std::shared_mutex mutex_;
};

}  // namespace flashmoe
