#include "gpu.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

#include "number.h"

namespace emulator {

Dim3 thread_index, block_index, grid_dim;

namespace {

constexpr size_t STACK_BYTES = 128 << 10;

struct Wait {
  enum Kind { NOTHING, COLLECTIVE, NAMED, MBARRIER } kind = NOTHING;
  uint32_t where = 0;       // address of the mbarrier, or number of the barrier
  uint64_t generation = 0;  // what must have passed; of an mbarrier the parity
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
  std::array<int, 4> start;
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

Gpu* gpu = nullptr;

// Stacks are kept: mapping them anew would cost more than the kernels.
void* stack(size_t index) {
  static std::vector<void*> stacks;
  while (stacks.size() <= index) {
    void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
    stacks.push_back(memory);
  }
  return stacks[index];
}

void yield() { swapcontext(&gpu->lane->context, &gpu->scheduler); }

[[noreturn]] void fail(const std::string& message) {
  gpu->failure = "thread block " + std::to_string(gpu->cta->index) + ", warp " +
                 std::to_string(gpu->warp_index) + ", lane " + std::to_string(gpu->lane_index) +
                 ": " + message;
  yield();
  std::abort();  // a failed run resumes nobody
}

void wait(const Wait& what);

bool passed(const Cta& cta, const Warp& warp, const Wait& wait) {
  switch (wait.kind) {
    case Wait::NOTHING:
      return true;
    case Wait::COLLECTIVE:
      return warp.generation != wait.generation;
    case Wait::NAMED:
      return cta.named[wait.where].generation != wait.generation;
    case Wait::MBARRIER:
      return (cta.mbarriers.at(wait.where).phase & 1) != wait.generation;
  }
  return true;
}

void wait(const Wait& what) {
  if (passed(*gpu->cta, *gpu->warp, what)) return;
  gpu->lane->wait = what;
  yield();
}

Mbarrier& mbarrier_at(uint32_t address) {
  const auto found = gpu->cta->mbarriers.find(address);
  if (found == gpu->cta->mbarriers.end()) fail("no mbarrier at " + std::to_string(address));
  return found->second;
}

void complete_if_due(Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
  }
}

uint8_t* shared_of(Cta& cta, uint32_t address, int size) {
  const bool inside = address >= SMEM_BASE && address - SMEM_BASE + size <= cta.memory.size();
  return inside ? cta.memory.data() + (address - SMEM_BASE) : nullptr;
}

// The 128-byte swizzle: bits 4 to 6 of an address by its bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// --- what happens later

uint8_t* element(const TensorMap& map, const std::array<int, 4>& at) {
  uint8_t* data = map.data + at[0] * 2;
  for (int d = 0; d < 4; ++d) {
    if (at[d] < 0 || static_cast<uint64_t>(at[d]) >= map.sizes[d]) return nullptr;
    if (d > 0) data += static_cast<uint64_t>(at[d]) * map.strides[d - 1];
  }
  return data;
}

void execute(Cta& cta, const Copy& copy) {
  for (uint32_t row = 0; row < copy.map.box_rows; ++row) {
    for (int column = 0; column < 64; ++column) {
      const uint32_t address = swizzled(copy.smem + row * 128 + column * 2);
      uint8_t* smem = shared_of(cta, address, 2);
      uint8_t* global =
          element(copy.map, {copy.start[0] + column, copy.start[1] + static_cast<int>(row),
                             copy.start[2], copy.start[3]});
      if (copy.load && global != nullptr) std::memcpy(smem, global, 2);
      if (copy.load && global == nullptr) std::memset(smem, 0, 2);
      if (!copy.load && global != nullptr) std::memcpy(global, smem, 2);
    }
  }
  if (copy.load) {
    Mbarrier& barrier = cta.mbarriers.at(copy.barrier);
    barrier.bytes -= static_cast<int64_t>(copy.map.box_rows) * 128;
    complete_if_due(barrier);
  }
}

// A wgmma's operand in shared memory, as its descriptor has it (PTX ISA, "Matrix descriptor").
struct Operand {
  uint32_t start, leading, stride;
  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {}
  // K-major: rows of 128 bytes along k, groups of 8 rows `stride` apart.
  uint32_t k_major(int row, int k) const {
    return swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2);
  }
  // MN-major: a row of 64 for each k, groups of 8 k `stride` apart, of 64 columns `leading`.
  uint32_t mn_major(int column, int k) const {
    return swizzled(start + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }
};

void execute(Cta& cta, const CpAsync& copy) {
  uint8_t* smem = shared_of(cta, copy.destination, 16);
  if (copy.source != nullptr) {
    std::memcpy(smem, copy.source, 16);
  } else {
    std::memset(smem, 0, 16);
  }
}

// 16 rows of one warp: D = A B (+ D).
void execute(Cta& cta, int warp_index, const Wgmma& op) {
  const WgmmaOperands& first = op.lanes[0];
  const int n = first.n;
  float A[16][16];
  static float B[16][256], D[16][256];
  const Operand b(first.b_descriptor);
  const auto load = [&](uint32_t address) {
    uint16_t bits = 0;
    if (const uint8_t* source = shared_of(cta, address, 2))
      std::memcpy(&bits, source, 2);
    else
      gpu->failure = "wgmma reads past shared memory, at " + std::to_string(address);
    return number(first.format, bits);
  };
  if (first.a_registers == nullptr) {
    const Operand a(first.a_descriptor);
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) A[row][k] = load(a.k_major(warp_index % 4 * 16 + row, k));
    }
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const unsigned bits = op.lanes[lane].a_registers[i / 2] >> (i % 2 * 16) & 0xffff;
        A[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2] = number(first.format, bits);
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < n; ++column) {
      B[k][column] = load(first.b_mn_major ? b.mn_major(column, k) : b.k_major(column, k));
    }
  }
  for (int row = 0; row < 16; ++row) {
    std::memset(D[row], 0, sizeof D[row]);
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < n; ++column) D[row][column] += A[row][k] * B[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = op.lanes[lane].d;
    for (int i = 0; i < n / 2; ++i) {
      const float sum = D[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
      d[i] = first.accumulate ? d[i] + sum : sum;
    }
  }
}

void execute_next_wgmma(Cta& cta, int warp_index) {
  Warp& warp = cta.warps[warp_index];
  execute(cta, warp_index, warp.wgmmas.front());
  warp.wgmmas.pop_front();
}

// Removes one of `items`, whichever, and gives it to `act`.
template <typename Items, typename Act>
void take(Items& items, const Act& act) {
  const auto chosen = items.begin() + static_cast<std::ptrdiff_t>(gpu->below(items.size()));
  const auto item = *chosen;
  items.erase(chosen);
  act(item);
}

// --- the scheduler

void enter() {
  gpu->launch->kernel();
  const Warp& warp = *gpu->warp;
  if (!warp.wgmmas.empty()) fail("ends with a wgmma under way");
  if (!gpu->lane->cp_asyncs.empty()) fail("ends with a cp.async under way");
  for (const Copy& copy : gpu->cta->copies) {
    const int thread = gpu->warp_index * 32 + gpu->lane_index;
    if (!copy.load && copy.thread == thread) fail("ends before a TMA store has read its source");
  }
  gpu->lane->done = true;
  yield();
}

void prepare(ucontext_t& context, void* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK_BYTES;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}

bool runnable(const Cta& cta, const Warp& warp) {
  for (const Lane& lane : warp.lanes) {
    if (!lane.done && passed(cta, warp, lane.wait)) return true;
  }
  return false;
}

void run_warp(Cta& cta, int warp_index) {
  Warp& warp = cta.warps[warp_index];
  const int passes = 1 + static_cast<int>(gpu->below(gpu->policy.passes));
  bool any = true;
  for (int pass = 0; pass < passes && any; ++pass) {
    any = false;
    // The same for each lane: a warp runs in step, or its kernels would not work.
    const uint64_t operations = 1 + gpu->below(gpu->policy.operations);
    for (int i = 0; i < 32 && gpu->failure.empty(); ++i) {
      Lane& lane = warp.lanes[i];
      if (lane.done || !passed(cta, warp, lane.wait)) continue;
      any = true;
      lane.wait = {};
      gpu->cta = &cta, gpu->warp = &warp, gpu->lane = &lane;
      gpu->warp_index = warp_index, gpu->lane_index = i;
      thread_index.x = warp_index * 32 + i;
      block_index.x = cta.index;
      gpu->operations_left = operations;
      swapcontext(&gpu->scheduler, &lane.context);
    }
  }
}

// Brings the data of one TMA copy; false when there is none.
bool bring_copy() {
  std::vector<Cta*> choices;
  for (Cta& cta : gpu->ctas) {
    if (!cta.copies.empty()) choices.push_back(&cta);
  }
  if (choices.empty()) return false;
  Cta& cta = *choices[gpu->below(choices.size())];
  take(cta.copies, [&](const Copy& copy) { execute(cta, copy); });
  return true;
}

void do_something_asynchronous() {
  Cta& cta = *std::next(gpu->ctas.begin(), static_cast<int>(gpu->below(gpu->ctas.size())));
  const auto warp_index = static_cast<int>(gpu->below(cta.warps.size()));
  Warp& warp = cta.warps[warp_index];
  auto& cp_asyncs = warp.lanes[gpu->below(32)].cp_asyncs;
  switch (gpu->below(3)) {
    case 0:
      if (!warp.wgmmas.empty()) execute_next_wgmma(cta, warp_index);
      break;
    case 1:
      if (!cp_asyncs.empty()) take(cp_asyncs, [&](const CpAsync& copy) { execute(cta, copy); });
      break;
    default:
      bring_copy();
  }
}

void draw_weights() {
  for (Cta& cta : gpu->ctas) {
    for (Warp& warp : cta.warps) {
      warp.weight = gpu->uniform() < gpu->policy.slow_share ? 0.002 : 1;
    }
  }
}

std::string deadlock() {
  std::string text = "deadlock:";
  for (const Cta& cta : gpu->ctas) {
    for (size_t w = 0; w < cta.warps.size(); ++w) {
      for (const Lane& lane : cta.warps[w].lanes) {
        if (lane.done) continue;
        text += "\n  thread block " + std::to_string(cta.index) + ", warp " + std::to_string(w);
        const std::string where = std::to_string(lane.wait.where);
        switch (lane.wait.kind) {
          case Wait::MBARRIER:
            text += ": mbarrier at " + where + ", parity " + std::to_string(lane.wait.generation);
            break;
          case Wait::NAMED:
            text += ": barrier " + where;
            break;
          default:
            text += std::string(": other lanes, for ") + cta.warps[w].what;
        }
        break;
      }
    }
  }
  return text;
}

bool done(const Cta& cta) {
  for (const Warp& warp : cta.warps) {
    for (const Lane& lane : warp.lanes) {
      if (!lane.done) return false;
    }
  }
  return true;
}

void begin(Cta& cta, int index, size_t stacks) {
  const Launch& launch = *gpu->launch;
  cta.index = index;
  cta.stacks = stacks;
  cta.memory.assign(static_cast<size_t>(launch.smem_bytes), 0xff);  // NaN
  for (int w = 0; w < launch.threads / 32; ++w) {
    Warp& warp = cta.warps.emplace_back();
    for (Lane& lane : warp.lanes) prepare(lane.context, stack(stacks++));
  }
}

void schedule() {
  const Launch& launch = *gpu->launch;
  int begun = 0;
  size_t stacks = 0;
  for (; begun < std::min(launch.grid, launch.resident); ++begun) {
    begin(gpu->ctas.emplace_back(), begun, stacks);
    stacks += static_cast<size_t>(launch.threads);
  }
  std::vector<std::pair<Cta*, int>> ready;
  for (uint64_t step = 0; gpu->failure.empty(); ++step) {
    if (step % 4096 == 0 || gpu->below(512) == 0) draw_weights();
    ready.clear();
    double total = 0;
    for (Cta& cta : gpu->ctas) {
      for (size_t w = 0; w < cta.warps.size(); ++w) {
        const Warp& warp = cta.warps[w];
        if (!runnable(cta, warp)) continue;
        ready.emplace_back(&cta, static_cast<int>(w));
        total += warp.weight;
      }
    }
    if (ready.empty()) {
      if (!bring_copy()) gpu->failure = deadlock();
      continue;
    }
    if (gpu->uniform() < gpu->policy.asynchronous) do_something_asynchronous();
    double chosen = gpu->uniform() * total;
    size_t i = 0;
    while (i + 1 < ready.size() && (chosen -= ready[i].first->warps[ready[i].second].weight) > 0) {
      ++i;
    }
    Cta& cta = *ready[i].first;
    run_warp(cta, ready[i].second);
    if (!gpu->failure.empty() || !done(cta)) continue;
    for (const Copy& copy : cta.copies) {
      if (copy.load) gpu->failure = "a thread block ends before a TMA load has come";
    }
    const size_t its_stacks = cta.stacks;
    gpu->ctas.remove_if([&](const Cta& other) { return &other == &cta; });
    if (begun < launch.grid) begin(gpu->ctas.emplace_back(), begun++, its_stacks);
    if (gpu->ctas.empty()) return;
  }
}

}  // namespace

std::string run(const Launch& launch, uint64_t seed) {
  Gpu here;
  gpu = &here;
  gpu->random.seed(seed);
  gpu->launch = &launch;
  const auto one_of = [&](auto... values) {
    const std::array choices{values...};
    return choices[gpu->below(choices.size())];
  };
  gpu->policy = {one_of(3, 30, 1000), one_of(1, 4, 64), one_of(0., 0.02, 0.3, 0.9),
                 one_of(0., 0.2, 0.5)};
  grid_dim.x = launch.grid;
  schedule();
  gpu = nullptr;
  return here.failure;
}

void preempt() {
  if (--gpu->operations_left == 0) yield();
}

void require(bool condition, const char* message) {
  if (!condition) fail(message);
}

uint8_t* shared(uint32_t address, int size) {
  uint8_t* memory = shared_of(*gpu->cta, address, size);
  if (memory == nullptr) fail("access past shared memory, at " + std::to_string(address));
  if (address % size != 0)
    fail("misaligned access of shared memory, at " + std::to_string(address));
  return memory;
}

void collective(const char* what, void* mine, const std::function<void(Slots)>& act) {
  preempt();
  Warp& warp = *gpu->warp;
  if (warp.arrived == 0) warp.what = what;
  if (std::strcmp(warp.what, what) != 0) {
    fail(std::string(what) + " where other lanes are at " + warp.what);
  }
  warp.slots[gpu->lane_index] = mine;
  if (++warp.arrived < 32) {
    wait({Wait::COLLECTIVE, 0, warp.generation});
    return;
  }
  act(warp.slots);
  warp.arrived = 0;
  ++warp.generation;
}

void cp_async(uint32_t destination, const void* source) {
  std::memset(shared(destination, 16), 0xff, 16);  // NaN in both formats
  gpu->lane->cp_asyncs.push_back({destination, source, gpu->lane->cp_async_groups});
}

void cp_async_commit_group() { ++gpu->lane->cp_async_groups; }

void cp_async_wait_group(int pending) {
  preempt();
  Lane& lane = *gpu->lane;
  std::erase_if(lane.cp_asyncs, [&](const CpAsync& copy) {
    if (copy.group >= lane.cp_async_groups - pending) return false;
    execute(*gpu->cta, copy);
    return true;
  });
}

void mbarrier_init(uint32_t address, int arrivals) {
  shared(address, 8);
  if (!gpu->cta->mbarriers.emplace(address, Mbarrier{arrivals, arrivals, 0, 0}).second) {
    fail("an mbarrier is initialized twice");
  }
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes) {
  preempt();
  Mbarrier& barrier = mbarrier_at(address);
  if (barrier.pending == 0) fail("too many arrive at the mbarrier at " + std::to_string(address));
  barrier.bytes += expected_bytes;
  --barrier.pending;
  complete_if_due(barrier);
}

bool mbarrier_test(uint32_t address, uint32_t parity) {
  preempt();
  return (mbarrier_at(address).phase & 1) != parity;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  preempt();
  mbarrier_at(address);
  wait({Wait::MBARRIER, address, parity});
}

void bar(int id, int threads, bool waits) {
  preempt();
  NamedBarrier& barrier = gpu->cta->named.at(static_cast<size_t>(id));
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  if (waits) wait({Wait::NAMED, static_cast<uint32_t>(id), generation});
}

void syncthreads() { bar(0, gpu->launch->threads, true); }

float number(Format format, unsigned bits) {
  return format == Format::float16 ? from_float16(static_cast<uint16_t>(bits))
                                   : from_bfloat16(static_cast<uint16_t>(bits));
}

void tma_load(uint32_t destination, const TensorMap& map, uint32_t barrier, const int (&start)[4]) {
  preempt();
  mbarrier_at(barrier);
  if (destination % 128 != 0) fail("a TMA load's destination is not aligned to 128 bytes");
  uint8_t* memory = shared_of(*gpu->cta, destination, static_cast<int>(map.box_rows) * 128);
  if (memory == nullptr) fail("a TMA load past shared memory");
  std::memset(memory, 0xff, map.box_rows * 128);  // NaN in both formats
  gpu->cta->copies.push_back(
      {true, destination, barrier, map, {start[0], start[1], start[2], start[3]}, 0});
}

void tma_store(const TensorMap& map, uint32_t source, const int (&start)[4]) {
  preempt();
  if (shared_of(*gpu->cta, source, static_cast<int>(map.box_rows) * 128) == nullptr) {
    fail("a TMA store past shared memory");
  }
  const int thread = gpu->warp_index * 32 + gpu->lane_index;
  gpu->cta->copies.push_back(
      {false, source, 0, map, {start[0], start[1], start[2], start[3]}, thread});
  ++gpu->lane->uncommitted_stores;
}

void tma_commit_group() { gpu->lane->uncommitted_stores = 0; }

void tma_wait_group_read() {
  preempt();
  if (gpu->lane->uncommitted_stores > 0) fail("waits for TMA stores that are in no group");
  auto& copies = gpu->cta->copies;
  const int thread = gpu->warp_index * 32 + gpu->lane_index;
  for (size_t i = 0; i < copies.size();) {
    if (copies[i].load || copies[i].thread != thread) {
      ++i;
      continue;
    }
    execute(*gpu->cta, copies[i]);
    copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void wgmma(const WgmmaOperands& operands) {
  WgmmaOperands mine = operands;
  collective("wgmma", &mine, [](Slots slots) {
    Wgmma op;
    for (int lane = 0; lane < 32; ++lane)
      op.lanes[lane] = *static_cast<WgmmaOperands*>(slots[lane]);
    op.group = gpu->warp->committed;
    gpu->warp->wgmmas.push_back(op);
  });
}

void wgmma_commit_group() {
  collective("wgmma.commit_group", nullptr, [](Slots) { ++gpu->warp->committed; });
}

void wgmma_wait_group(int pending) {
  collective("wgmma.wait_group", nullptr, [pending](Slots) {
    Warp& warp = *gpu->warp;
    while (!warp.wgmmas.empty() && warp.wgmmas.front().group < warp.committed - pending) {
      execute_next_wgmma(*gpu->cta, gpu->warp_index);
    }
  });
}

}  // namespace emulator
