// That emulator::run finds what it is there to find: small kernels with one mistake each, and the
// same without it.
#include "emulator/device.h"
//
#include "emulator/ptx/ld_st.cuh"
#include "emulator/ptx/ldmatrix.cuh"
#include "emulator/ptx/mbarrier.cuh"
#include "emulator/ptx/red.cuh"
#include "emulator/ptx/tma.cuh"
#include "emulator/ptx/wgmma.cuh"
//
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using namespace flashmoe;

namespace {

constexpr int SEEDS = 50;
constexpr unsigned FULL = emulator::SMEM_BASE, EMPTY = FULL + 8, TILE = emulator::SMEM_BASE + 1024;

// 16 tiles of 64 rows of 64 bfloat16, all elements of tile i being i + 1.
struct Tiles {
  std::vector<uint16_t> memory = std::vector<uint16_t>(16 * 64 * 64);
  emulator::TensorMap map;

  Tiles() {
    for (size_t i = 0; i < memory.size(); ++i) {
      memory[i] = emulator::to_bfloat16(static_cast<float>(i / (64 * 64) + 1));
    }
    map = {reinterpret_cast<uint8_t*>(memory.data()),
           {64, 16 * 64, 1, 1},
           {128, 128, 128},
           64,
           4,
           2,
           128,
           true};
  }
};

struct Mistakes {
  bool released_early = false;  // before the wgmma that reads it is waited for
  bool read_early = false;      // accumulators before the wait
  bool never_released = false;
  bool released_twice = false;
};

// One thread fetches 16 tiles through one buffer, a warpgroup multiplies each with itself.
std::string multiply(const Mistakes& mistakes, uint64_t seed) {
  Tiles tiles;
  float result[128][32];
  const emulator::Launch launch{
      1, 256, 16 << 10, 1, [&] {
        if (threadIdx.x == 0) {
          ptx::mbarrier_init(FULL, 1);
          ptx::mbarrier_init(EMPTY, 4);
        }
        __syncthreads();
        if (threadIdx.x >= 128) {
          if (threadIdx.x > 128) return;
          for (int tile = 0; tile < 16; ++tile) {
            ptx::mbarrier_wait_parity(EMPTY, (tile & 1) ^ 1);
            ptx::mbarrier_arrive_expect_tx(FULL, 64 * 128);
            ptx::cp_async_bulk_tensor_4d_load(TILE, &tiles.map, FULL, 0, tile * 64, 0, 0);
          }
          return;
        }
        float sums[32] = {}, product[32];
        for (int tile = 0; tile < 16; ++tile) {
          ptx::mbarrier_wait_parity(FULL, tile & 1);
          const auto release = [&] {
            if (threadIdx.x % 32 == 0 && !mistakes.never_released) ptx::mbarrier_arrive(EMPTY);
            if (threadIdx.x % 32 == 0 && mistakes.released_twice) ptx::mbarrier_arrive(EMPTY);
          };
          for (int k = 0; k < 4; ++k) {
            const unsigned long long descriptor =
                (64ull | 1ull << 30) << 32 | (TILE + static_cast<unsigned>(k) * 32) >> 4;
            ptx::Wgmma<__nv_bfloat16, 64>::ss(product, descriptor, descriptor, k != 0);
          }
          ptx::wgmma_commit_group();
          if (mistakes.released_early) release();
          if (!mistakes.read_early) ptx::wgmma_wait_group<0>();
          for (int i = 0; i < 32; ++i) sums[i] += product[i];
          ptx::wgmma_wait_group<0>();
          if (!mistakes.released_early) release();
        }
        std::memcpy(result[threadIdx.x], sums, sizeof sums);
      }};
  if (std::string failure = emulator::run(launch, seed); !failure.empty()) return failure;
  for (const auto& row : result) {
    for (const float sum : row) {
      if (sum != 64 * 1496) return "wrong";  // 1^2 + 2^2 + .. + 16^2, 64 times
    }
  }
  return "";
}

// A warp stores a tile that another thread has made, by TMA.
std::string store(bool meets, bool waits, uint64_t seed) {
  Tiles tiles;
  const emulator::Launch launch{
      1, 64, 16 << 10, 1, [&] {
        if (threadIdx.x < 32) {
          for (unsigned row = 0; row < 64; row += 8) {
            const unsigned x[4] = {0x40404040, 0x40404040, 0x40404040, 0x40404040};  // 3.00
            const auto lane = static_cast<unsigned>(threadIdx.x);
            for (unsigned half = 0; half < 128; half += 64) {
              ptx::stmatrix_x4(TILE + (row + lane % 8) * 128 + half + lane / 8 * 16, x);
            }
          }
        }
        if (meets) __syncthreads();
        if (threadIdx.x != 32) return;
        ptx::cp_async_bulk_tensor_4d_store(&tiles.map, TILE, 0, 64, 0, 0);
        ptx::cp_async_bulk_commit_group();
        if (waits) ptx::cp_async_bulk_wait_group_read<0>();
      }};
  if (std::string failure = emulator::run(launch, seed); !failure.empty()) return failure;
  for (size_t i = 0; i < 64 * 64; ++i) {
    if (tiles.memory[64 * 64 + i] != 0x4040) return "wrong";
  }
  return "";
}

// 16 thread blocks, of which 2 run at once, append their numbers in the order of tickets, or of
// numbers: these begin in any order.
std::string take_turns(bool tickets, bool waits, uint64_t seed) {
  int ticket = 0, turn = 0;
  std::vector<int> appended;
  const emulator::Launch launch{16, 32, 1 << 10, 2, [&] {
                                  if (threadIdx.x != 0) return;
                                  const int mine = tickets ? atomicAdd(&ticket, 1) : blockIdx.x;
                                  if (waits) ptx::ld_acquire_gpu_until(&turn, mine);
                                  emulator::preempt();
                                  appended.push_back(mine);
                                  ptx::red_release_gpu_add(&turn, 1);
                                }};
  if (std::string failure = emulator::run(launch, seed); !failure.empty()) return failure;
  return std::is_sorted(appended.begin(), appended.end()) ? "" : "wrong";
}

int failures = 0;

// Of SEEDS runs, those that end with `expected` in what they report: all, or at least one.
template <typename Run>
void expect(const char* name, const std::string& expected, bool always, const Run& run) {
  int found = 0;
  std::string other;
  for (uint64_t seed = 0; seed < SEEDS; ++seed) {
    const std::string reported = run(seed);
    if (expected.empty() ? reported.empty() : reported.find(expected) != std::string::npos) {
      ++found;
    } else if (!reported.empty()) {
      other = reported;
    }
  }
  const bool right = other.empty() && found >= (always ? SEEDS : 1);
  failures += !right;
  std::printf("%s: %d of %d runs say '%s'%s%s\n", name, found, SEEDS, expected.c_str(),
              right ? "" : ", FAILED ", other.c_str());
}

}  // namespace

int main() {
  const auto product = [](Mistakes mistakes) {
    return [mistakes](uint64_t seed) { return multiply(mistakes, seed); };
  };
  expect("multiply", "", true, product({}));
  expect("released early", "wrong", false, product({.released_early = true}));
  expect("read early", "wrong", false, product({.read_early = true}));
  expect("never released", "mbarrier at " + std::to_string(EMPTY), true,
         product({.never_released = true}));
  expect("released twice", "mbarrier at ", true, product({.released_twice = true}));
  expect("store", "", true, [](uint64_t seed) { return store(true, true, seed); });
  expect("stored unseen", "wrong", false, [](uint64_t seed) { return store(false, true, seed); });
  expect("left early", "before a TMA store has read", false,
         [](uint64_t seed) { return store(true, false, seed); });
  expect("turns", "", true, [](uint64_t seed) { return take_turns(true, true, seed); });
  expect("turns not awaited", "wrong", false,
         [](uint64_t seed) { return take_turns(true, false, seed); });
  expect("turns without tickets", "deadlock", false,
         [](uint64_t seed) { return take_turns(false, true, seed); });
  return failures != 0;
}
