// A GPU on a CPU, as far as the kernels in csrc need one: threads, warps and thread
// blocks, shared memory, cp.async, mbarriers and named barriers, TMA copies, mma and wgmma. It is
// no model of speed, but an adversary of synchronization: a seed decides which warp runs next, and
// when what is asynchronous happens, anywhere between its start and the wait for it.
//
// - A copy to shared memory (cp.async, TMA) makes its destination NaN when it starts, and brings
// the
//   data later, after or before others that started earlier. A TMA store reads its source later.
// - A wgmma reads its operands, registers too, and writes its accumulators later, in order with the
//   others of its warp. Lanes of a warp run in step, warps of a warpgroup do not.
// - Thread blocks begin in the order of their numbers, or in any.
// - Threads that wait for one another for ever are reported, with what each waits for.
//
// Not modelled: the order of memory (an access happens when it is executed; fences do nothing),
// registers (setmaxnreg, spills), and what wgmma.fence orders.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>

namespace emulator {

struct Dim3 {
  int x = 1, y = 1, z = 1;
};

// What the kernel knows of the thread that runs.
extern Dim3 thread_index, block_index, grid_dim;

constexpr uint32_t SMEM_BASE = 1024;  // a device's, too, is not at address 0

struct Launch {
  int grid, threads, smem_bytes;
  int resident;  // thread blocks at once; the others begin as these end
  std::function<void()> kernel;
};

// Runs a grid. Returns what went wrong, or nothing.
std::string run(const Launch& launch, uint64_t seed);

// For the kernel's primitives, called by its threads.

// A point at which another warp may run.
void preempt();
// Stops the run with `message` unless `condition`.
void require(bool condition, const char* message);
// `size` bytes at a shared memory address of this thread block.
uint8_t* shared(uint32_t address, int size);

// Waits for the other 31 lanes to come here with `what`. The last one calls `act` with what each
// gave as `mine`.
using Slots = void* const (&)[32];
void collective(const char* what, void* mine, const std::function<void(Slots)>& act);

void mbarrier_init(uint32_t address, int arrivals);
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes);
bool mbarrier_test(uint32_t address, uint32_t parity);
void mbarrier_wait(uint32_t address, uint32_t parity);
// Until `*address` is `value`.
void device_memory_wait(const int* address, int value);
void bar(int id, int threads, bool wait);
void syncthreads();

// 16 bytes to shared memory, or zeros for `source` null.
void cp_async(uint32_t destination, const void* source);
void cp_async_commit_group();
void cp_async_wait_group(int pending);

// What cuTensorMapEncodeTiled writes: four or five dimensions, boxes of two: 128 swizzled bytes by
// box_rows, or a row of any width as it is. Coordinates are as many as dimensions.
struct TensorMap {
  uint8_t* data;
  uint64_t sizes[5];
  uint64_t strides[4];  // bytes, of the dimensions behind the first
  uint32_t box_rows, rank;
  uint32_t element_bytes, row_bytes;  // of a box
  bool is_swizzled;
};
void tma_load(uint32_t destination, const TensorMap& map, uint32_t barrier,
              std::initializer_list<int> start);
extern long long tma_loads;  // how many there have been
void tma_store(const TensorMap& map, uint32_t source, std::initializer_list<int> start);
void tma_commit_group();
void tma_wait_group_read();  // all groups of this thread

enum class Format { float16, bfloat16 };
float number(Format format, unsigned bits);

struct WgmmaOperands {
  float* d;
  const unsigned* a_registers;  // null: a in shared memory
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool accumulate, b_mn_major;
  Format format;
};
void wgmma(const WgmmaOperands& operands);
void wgmma_commit_group();
void wgmma_wait_group(int pending);

}  // namespace emulator
