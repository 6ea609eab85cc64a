#include "forward/sm90/counters.h"

#include <array>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace flashmoe::sm90 {
namespace {

// Launches of one stream follow one another, however long they wait for others: a counter for each
// stream. A launch that is captured into a graph may run beside any other, so its counter is its
// own; beside itself, where a graph was instantiated twice, it draws the same work from it.
constexpr unsigned STREAMS = 1 << 12, CAPTURED = 1 << 16;

struct Pool {
  std::shared_mutex mutex;
  unsigned* memory = nullptr;
  bool failed = false;
  std::unordered_map<unsigned long long, unsigned*> of_stream;  // by an id that is never used again
  unsigned captured = 0;
};

// Zeroed memory, without a synchronization of the device and without disturbing a capture that
// another thread has begun.
unsigned* allocate() {
  constexpr size_t BYTES = (STREAMS + CAPTURED) * sizeof(unsigned);
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
  if (ok) return static_cast<unsigned*>(memory);
  if (memory != nullptr) cudaFree(memory);
  cudaGetLastError();
  return nullptr;
}

}  // namespace

unsigned* next_counter(int device, cudaStream_t stream) {
  static std::array<Pool, 64> pools;
  if (device < 0 || device >= static_cast<int>(pools.size())) return nullptr;
  Pool& pool = pools[device];
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();  // the default stream beside a capture: no error of this launch
    return nullptr;
  }
  const bool capturing = status != cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (!capturing) {
    // Relaxed: to be asked for its id would end a capture that this or another thread has begun.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    const cudaError_t error = cudaStreamGetId(stream, &id);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    const std::shared_lock<std::shared_mutex> lock(pool.mutex);
    const auto found = pool.of_stream.find(id);
    if (found != pool.of_stream.end()) return found->second;
  }
  const std::unique_lock<std::shared_mutex> lock(pool.mutex);
  if (pool.memory == nullptr) {
    if (capturing || pool.failed) return nullptr;
    pool.memory = allocate();
    pool.failed = pool.memory == nullptr;
    if (pool.failed) return nullptr;
  }
  if (capturing) {
    return pool.captured < CAPTURED ? pool.memory + STREAMS + pool.captured++ : nullptr;
  }
  // Another thread may have launched on this stream meanwhile.
  const auto found = pool.of_stream.find(id);
  if (found != pool.of_stream.end()) return found->second;
  if (pool.of_stream.size() == STREAMS) return nullptr;
  return pool.of_stream[id] = pool.memory + pool.of_stream.size();
}

}  // namespace flashmoe::sm90
