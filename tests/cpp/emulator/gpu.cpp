#include "gpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "state.h"

namespace emulator {

Dim3 thread_index, block_index, grid_dim;
Gpu* gpu = nullptr;

namespace {

constexpr size_t STACK_BYTES = 128 << 10;

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
    case Wait::DEVICE_MEMORY:
      return *wait.address == wait.value;
  }
  return true;
}

void wait(const Wait& what) {
  if (passed(*gpu->cta, *gpu->warp, what)) return;
  gpu->lane->wait = what;
  yield();
}

// Removes one of `items`, whichever, and gives it to `act`.
template <typename Items, typename Act>
void take(Items& items, const Act& act) {
  const auto chosen = items.begin() + static_cast<std::ptrdiff_t>(gpu->below(items.size()));
  const auto item = *chosen;
  items.erase(chosen);
  act(item);
}

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
          case Wait::DEVICE_MEMORY:
            text += ": device memory, which holds " + std::to_string(*lane.wait.address) +
                    ", to hold " + std::to_string(lane.wait.value);
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
  std::vector<int> order(static_cast<size_t>(launch.grid));
  std::iota(order.begin(), order.end(), 0);
  if (gpu->policy.shuffled) std::shuffle(order.begin(), order.end(), gpu->random);
  for (; begun < std::min(launch.grid, launch.resident); ++begun) {
    begin(gpu->ctas.emplace_back(), order[begun], stacks);
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
    if (begun < launch.grid) begin(gpu->ctas.emplace_back(), order[begun++], its_stacks);
    if (gpu->ctas.empty()) return;
  }
}

}  // namespace

[[noreturn]] void fail(const std::string& message) {
  gpu->failure = "thread block " + std::to_string(gpu->cta->index) + ", warp " +
                 std::to_string(gpu->warp_index) + ", lane " + std::to_string(gpu->lane_index) +
                 ": " + message;
  yield();
  std::abort();  // a failed run resumes nobody
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
                 one_of(0., 0.2, 0.5), one_of(false, true)};
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
  if (address % size != 0) {
    fail("misaligned access of shared memory, at " + std::to_string(address));
  }
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

void device_memory_wait(const int* address, int value) {
  preempt();
  Wait what{Wait::DEVICE_MEMORY};
  what.address = address, what.value = value;
  wait(what);
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

}  // namespace emulator
