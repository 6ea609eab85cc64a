#include "fwd_sm90_counters.h"

#include <array>
#include <atomic>
#include <mutex>

namespace flashmoe::sm90 {
namespace {

// Launches take the slots of a ring in turn: far more than can be queued on a device at once. A
// launch that is captured into a graph may run at any later time, so its slot is never given away
// again; a graph does not run twice at once, unless it was instantiated twice.
constexpr unsigned RING = 1 << 14;
constexpr unsigned CAPTURED = 1 << 16;

struct Pool {
  std::atomic<int*> memory{nullptr};
  std::atomic<unsigned> launched{0}, captured{0};
  std::mutex mutex;
  bool failed = false;
};

// Zeroed memory, without a synchronization of the device and without disturbing a capture that
// another thread has begun.
int* allocate() {
  constexpr size_t BYTES = (RING + CAPTURED) * sizeof(int);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* memory = nullptr;
  cudaStream_t stream = nullptr;
  bool ok = cudaMalloc(&memory, BYTES) == cudaSuccess &&
            cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess &&
            cudaMemsetAsync(memory, 0, BYTES, stream) == cudaSuccess;
  if (stream != nullptr) {
    ok = cudaStreamSynchronize(stream) == cudaSuccess && ok;
    cudaStreamDestroy(stream);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (ok) return static_cast<int*>(memory);
  if (memory != nullptr) cudaFree(memory);
  cudaGetLastError();
  return nullptr;
}

}  // namespace

int* next_counter(int device, cudaStream_t stream) {
  static std::array<Pool, 64> pools;
  if (device < 0 || device >= static_cast<int>(pools.size())) return nullptr;
  Pool& pool = pools[device];
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();  // the default stream beside a capture: no error of this launch
    return nullptr;
  }
  const bool capturing = status != cudaStreamCaptureStatusNone;
  int* memory = pool.memory.load(std::memory_order_acquire);
  if (memory == nullptr) {
    if (capturing) return nullptr;
    const std::lock_guard<std::mutex> lock(pool.mutex);
    memory = pool.memory.load(std::memory_order_relaxed);
    if (memory == nullptr && !pool.failed) {
      memory = allocate();
      pool.failed = memory == nullptr;
      pool.memory.store(memory, std::memory_order_release);
    }
    if (memory == nullptr) return nullptr;
  }
  if (!capturing) return memory + pool.launched.fetch_add(1, std::memory_order_relaxed) % RING;
  const unsigned slot = pool.captured.fetch_add(1, std::memory_order_relaxed);
  if (slot < CAPTURED) return memory + RING + slot;
  pool.captured.store(CAPTURED, std::memory_order_relaxed);  // or else it would wrap around
  return nullptr;
}

}  // namespace flashmoe::sm90
