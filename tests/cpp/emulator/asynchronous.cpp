// What happens later: copies and matrix multiplications, from their start to the wait for them.
#include <algorithm>
#include <cstring>

#include "number.h"
#include "state.h"

namespace emulator {

namespace {

// The 128-byte swizzle: bits 4 to 6 of an address by its bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// Addresses wrap around.
uint8_t* element(const TensorMap& map, const std::array<int, 5>& at) {
  uint64_t address = reinterpret_cast<uint64_t>(map.data);
  for (uint32_t d = 0; d < map.rank; ++d) {
    if (at[d] < 0 || static_cast<uint64_t>(at[d]) >= map.sizes[d]) return nullptr;
    address += static_cast<uint64_t>(at[d]) * (d > 0 ? map.strides[d - 1] : map.element_bytes);
  }
  return reinterpret_cast<uint8_t*>(address);
}

std::array<int, 5> coordinates(const TensorMap& map, std::initializer_list<int> start) {
  if (start.size() != map.rank) fail("a TMA copy with coordinates of another rank");
  std::array<int, 5> found{};
  std::copy(start.begin(), start.end(), found.begin());
  return found;
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

// 16 rows of one warp: D = A B (+ D).
void multiply(Cta& cta, int warp_index, const Wgmma& op) {
  const WgmmaOperands& first = op.lanes[0];
  const int n = first.n;
  float A[16][16];
  static float B[16][256], D[16][256];
  const Operand b(first.b_descriptor);
  const auto load = [&](uint32_t address) {
    uint16_t bits = 0;
    if (const uint8_t* source = shared_of(cta, address, 2)) {
      std::memcpy(&bits, source, 2);
    } else {
      gpu->failure = "wgmma reads past shared memory, at " + std::to_string(address);
    }
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

}  // namespace

void execute(Cta& cta, const Copy& copy) {
  const TensorMap& map = copy.map;
  const uint32_t size = map.element_bytes, columns = map.row_bytes / size;
  for (uint32_t row = 0; row < map.box_rows; ++row) {
    for (uint32_t column = 0; column < columns; ++column) {
      const uint32_t plain = copy.smem + row * map.row_bytes + column * size;
      uint8_t* smem =
          shared_of(cta, map.is_swizzled ? swizzled(plain) : plain, static_cast<int>(size));
      auto at = copy.start;
      at[0] += static_cast<int>(column), at[1] += static_cast<int>(row);
      uint8_t* global = element(map, at);
      if (copy.load && global != nullptr) std::memcpy(smem, global, size);
      if (copy.load && global == nullptr) std::memset(smem, 0, size);
      if (!copy.load && global != nullptr) std::memcpy(global, smem, size);
    }
  }
  if (copy.load) {
    Mbarrier& barrier = cta.mbarriers.at(copy.barrier);
    barrier.bytes -= static_cast<int64_t>(map.box_rows) * map.row_bytes;
    complete_if_due(barrier);
  }
}

void execute(Cta& cta, const CpAsync& copy) {
  uint8_t* smem = shared_of(cta, copy.destination, 16);
  if (copy.source != nullptr) {
    std::memcpy(smem, copy.source, 16);
  } else {
    std::memset(smem, 0, 16);
  }
}

void execute_next_wgmma(Cta& cta, int warp_index) {
  Warp& warp = cta.warps[warp_index];
  multiply(cta, warp_index, warp.wgmmas.front());
  warp.wgmmas.pop_front();
}

float number(Format format, unsigned bits) {
  return format == Format::float16 ? from_float16(static_cast<uint16_t>(bits))
                                   : from_bfloat16(static_cast<uint16_t>(bits));
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

long long tma_loads = 0;

void tma_load(uint32_t destination, const TensorMap& map, uint32_t barrier,
              std::initializer_list<int> start) {
  ++tma_loads;
  preempt();
  mbarrier_at(barrier);
  if (destination % 128 != 0) fail("a TMA load's destination is not aligned to 128 bytes");
  const uint32_t bytes = map.box_rows * map.row_bytes;
  uint8_t* memory = shared_of(*gpu->cta, destination, static_cast<int>(bytes));
  if (memory == nullptr) fail("a TMA load past shared memory");
  std::memset(memory, 0xff, bytes);  // NaN in all formats
  gpu->cta->copies.push_back({true, destination, barrier, map, coordinates(map, start), 0});
}

void tma_store(const TensorMap& map, uint32_t source, std::initializer_list<int> start) {
  preempt();
  const int bytes = static_cast<int>(map.box_rows * map.row_bytes);
  if (shared_of(*gpu->cta, source, bytes) == nullptr) {
    fail("a TMA store past shared memory");
  }
  const int thread = gpu->warp_index * 32 + gpu->lane_index;
  gpu->cta->copies.push_back({false, source, 0, map, coordinates(map, start), thread});
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
    for (int lane = 0; lane < 32; ++lane) {
      op.lanes[lane] = *static_cast<WgmmaOperands*>(slots[lane]);
    }
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
