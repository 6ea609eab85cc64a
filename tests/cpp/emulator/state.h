// The state of a run, and what gpu.cpp and asynchronous.cpp ask of one another.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "gpu.h"

namespace emulator {

struct Wait {
  enum Kind { NOTHING, COLLECTIVE, NAMED, MBARRIER, DEVICE_MEMORY } kind = NOTHING;
  uint32_t where = 0;            // address of the mbarrier, or number of the barrier
  uint64_t generation = 0;       // what must have passed; of an mbarrier the parity
  const int* address = nullptr;  // in device memory, and what must be there
  int value = 0;
};

struct CpAsync {
  uint32_t destination;
  const void* source;
  int group;
};

struct Lane {
  ucontext_t context;
  Wait wait;
  bool done = false;
  int uncommitted_stores = 0;  // of TMA
  std::deque<CpAsync> cp_asyncs;
  int cp_async_groups = 0;
};

struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Wgmma {
  std::array<WgmmaOperands, 32> lanes;
  int group = 0;
};

struct Warp {
  std::array<Lane, 32> lanes;
  // The collective that is gathering.
  const char* what = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  void* slots[32] = {};
  std::deque<Wgmma> wgmmas;
  int committed = 0;
  double weight = 1;
};

struct Copy {
  bool load;
  uint32_t smem, barrier;
  TensorMap map;
  std::array<int, 5> start;
  int thread;
};

struct Cta {
  int index = 0;
  size_t stacks = 0;  // the first of its threads' stacks
  std::vector<uint8_t> memory;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::array<NamedBarrier, 16> named;
  std::deque<Warp> warps;  // which does not move them: a context holds its own address
  std::deque<Copy> copies;
};

// How the run treats warps and asynchronous work; drawn from the seed.
struct Policy {
  int operations, passes;  // at most, before another warp runs
  double asynchronous;     // share of steps that do a piece of asynchronous work
  double slow_share;       // of the warps, which then hardly run
  bool shuffled;           // thread blocks begin in any order: CUDA promises none
};

struct Gpu {
  std::mt19937_64 random;
  Policy policy;
  std::list<Cta> ctas;
  const Launch* launch = nullptr;
  ucontext_t scheduler;
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  Lane* lane = nullptr;
  int warp_index = 0, lane_index = 0;
  uint64_t operations_left = 0;  // of the lane
  std::string failure;

  uint64_t below(uint64_t n) { return random() % n; }
  double uniform() { return static_cast<double>(random() >> 11) * 0x1p-53; }
};

extern Gpu* gpu;

// Ends the run with `message`.
[[noreturn]] void fail(const std::string& message);
Mbarrier& mbarrier_at(uint32_t address);
// Begins the next phase when all have arrived and all bytes have come.
void complete_if_due(Mbarrier& barrier);
// Null for what is not all inside.
uint8_t* shared_of(Cta& cta, uint32_t address, int size);

// The data of one copy, or one matrix multiplication, now.
void execute(Cta& cta, const Copy& copy);
void execute(Cta& cta, const CpAsync& copy);
void execute_next_wgmma(Cta& cta, int warp_index);

}  // namespace emulator
