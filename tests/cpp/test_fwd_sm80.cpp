// The mma.sync forward kernel and its launch, on emulator::run: tiles, shapes, windows, terms and
// orders of execution.
#include "emulator/device.h"
// The kernel, with tests/cpp/emulator/ptx in the place of csrc/ptx.
#include "attention_problem.h"
#include "forward/sm80/launch.cuh"

using namespace flashmoe;

namespace {

struct Instance {
  const char* name;
  int shape[3];
  bool aligned, general;
  cudaError_t (*launch)(const AttentionParams&, DType, int, cudaStream_t);

  int head_dim() const { return shape[0]; }
  int head_dim_v() const { return 0; }
  int block_m() const { return shape[1]; }
  int block_n() const { return shape[2]; }
  Variant may() const {
    return {.local = general,
            .softcap = general,
            .alibi = general,
            .sink = general,
            .dropout = general};
  }

  // Tiles of keys that no row sees become NaN, which would reach every row that visits them.
  void poison_unseen_tiles(const AttentionParams& p) const {
    const int seen = visible(p.mask, 0, p.seqlen_q, p.seqlen_q, p.seqlen_kv).begin;
    const auto poison = [&](const void* x, long long batch, long long row, long long head) {
      for (int b = 0; b < p.batch; ++b)
        for (int h = 0; h < p.heads_kv; ++h)
          for (int key = 0; key < seen / block_n() * block_n(); ++key) {
            const auto first = static_cast<const uint16_t*>(x) + b * batch + key * row + h * head;
            std::fill_n(const_cast<uint16_t*>(first), p.head_dim, 0xffff);
          }
    };
    poison(p.k, p.k_batch_stride, p.k_row_stride, p.k_head_stride);
    poison(p.v, p.v_batch_stride, p.v_row_stride, p.v_head_stride);
  }

  bool check(Problem x, uint64_t seed) const {
    if (seed % 4 == 0) x.dropout_p = 0;
    return flashmoe::check(name, x, aligned, seed, [&](const auto& params, DType dtype, auto&) {
      poison_unseen_tiles(params);
      fake_device.call = [](const void* kernel, void** arguments) {
        const auto entry = reinterpret_cast<void (*)(AttentionParams, int)>(kernel);
        entry(*static_cast<AttentionParams*>(arguments[0]), *static_cast<int*>(arguments[1]));
      };
      return launch_error(launch(params, dtype, 0, nullptr));
    });
  }
};

template <typename Tile, bool ALIGNED, bool GENERAL = false>
Instance instance(const char* name) {
  return {name,
          {Tile::HEAD_DIM, Tile::BLOCK_M, Tile::BLOCK_N},
          ALIGNED,
          GENERAL,
          sm80::launch_dtype<Tile, ALIGNED, GENERAL>};
}

const Instance INSTANCES[] = {
    instance<Sm80Tile<64, 64, 32, 1, 4>, true>("64:64x32-stages1-warps4"),
    instance<Sm80Tile<64, 128, 64, 2, 4>, true>("64:128x64-stages2-warps4"),
    instance<Sm80Tile<96, 64, 16, 3, 4>, true>("96:64x16-stages3-warps4"),
    instance<Sm80Tile<128, 128, 48, 2, 8>, true>("128:128x48-stages2-warps8"),
    instance<Sm80Tile<64, 64, 32, 1, 4>, true, true>("64:64x32-stages1-warps4-general"),
    instance<Sm80Tile<64, 128, 64, 2, 4>, true, true>("64:128x64-stages2-warps4-general"),
    instance<Sm80Tile<96, 64, 16, 3, 4>, true, true>("96:64x16-stages3-warps4-general"),
    instance<Sm80Tile<64, 64, 64, 1, 4>, false, true>("64:64x64-stages1-warps4-general-unaligned"),
};

}  // namespace

int main(int argc, char** argv) { return run_all(INSTANCES, argc, argv); }
