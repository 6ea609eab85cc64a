// The Hopper forward kernel and its launch, on emulator::run: tiles, shapes and orders of
// execution.
#include "emulator/device.h"
// The kernel, with tests/cpp/emulator/ptx in the place of csrc/ptx.
#include "forward/sm90/host.h"
#include "forward/sm90/kernel.cuh"
#include "packed_problem.h"

using namespace flashmoe;

namespace {

template <typename T, Sm90Tile TILE, Variant VARIANT>
void kernel(const Sm90Params& params) {
  sm90::attention_forward<T, TILE, VARIANT>(params);
}

struct Instance {
  const char* name;
  Sm90Tile tile;
  Variant variant;
  void (*entries[2])(const Sm90Params&);  // float16, bfloat16

  int head_dim() const { return tile.head_dim; }
  int head_dim_v() const { return tile.head_dim_v; }
  int block_m() const { return tile.block_m; }
  int block_n() const { return tile.block_n; }
  Variant may() const { return variant; }

  bool check(const Problem& x, uint64_t seed) const {
    const LaunchForward launch = [&](const auto& params, DType dtype, auto& random) {
      if (!sm90::can_run(params)) return std::string("can_run refuses");
      const auto entry = entries[dtype == DType::bfloat16];
      fake_device.call = run_kernel<Sm90Params>;
      unsigned counter = 0;
      unsigned* const given = random() % 4 == 0 ? nullptr : &counter;
      const int device = variant.packed && random() % 2 == 0 ? 2 : 0;
      const GuardedBytes workspace(
          static_cast<size_t>(sm90::workspace_bytes(tile, params, device)));
      std::fill(workspace.begin(), workspace.end(), POISON);
      const cudaError_t error = sm90::launch(tile, reinterpret_cast<const void*>(entry), params,
                                             dtype, device, nullptr, given, workspace.data());
      if (error == cudaSuccess && counter != 0) return std::string("the counter is not left at 0");
      return launch_error(error);
    };
    if (!variant.packed) return flashmoe::check(name, x, true, seed, launch);
    std::mt19937_64 random(seed);
    const PackedProblem packed = random_packed_problem(tile.head_dim, tile.block_m, tile.block_n,
                                                       variant, true, random, tile.head_dim_v);
    return check_packed(name, packed, random(), launch);
  }
};

// Boxes that an instance loads for a problem.
long long loads_of(const Instance& x, const Problem& problem, const AttnMask& mask) {
  const Problem& p = problem;
  const auto queries = [&] {
    return Tensor(DType::bfloat16, p.batch, p.seqlen_q, p.heads_q, p.head_dim, 8, false);
  };
  const auto keys = [&] {
    return Tensor(DType::bfloat16, p.batch, p.seqlen_kv, p.heads_kv, p.head_dim, 8, false);
  };
  Tensor q = queries(), out = queries(), k = keys(), v = keys();
  for (Tensor* tensor : {&q, &k, &v}) tensor->fill([] { return 1.; });
  std::vector<float> lse(static_cast<size_t>(p.batch) * p.heads_q * p.seqlen_q);
  AttentionParams params = forward_params(q, k, v, out, lse, 0.1f, p.mask);
  params.terms.attn_mask = mask;
  fake_device.call = run_kernel<Sm90Params>;
  const GuardedBytes workspace(static_cast<size_t>(sm90::workspace_bytes(x.tile, params, 0)));
  const long long before = emulator::tma_loads;
  const auto entry = reinterpret_cast<const void*>(x.entries[1]);
  const cudaError_t error =
      sm90::launch(x.tile, entry, params, DType::bfloat16, 0, nullptr, nullptr, workspace.data());
  return error == cudaSuccess ? emulator::tma_loads - before : -1;
}

template <Sm90Tile TILE, Variant VARIANT = Variant{}>
Instance instance(const char* name) {
  (void)LegalSm90Tile<TILE>{};
  return {
      name, TILE, VARIANT, {kernel<__half, TILE, VARIANT>, kernel<__nv_bfloat16, TILE, VARIANT>}};
}

constexpr Variant LOCAL{.local = true}, SOFTCAP{.softcap = true}, ALIBI{.alibi = true},
    SINK{.sink = true}, DROPOUT{.dropout = true},
    ALL{.local = true, .softcap = true, .alibi = true, .sink = true, .dropout = true};
constexpr Variant MASK{.mask = true}, LOCAL_MASK{.local = true, .mask = true},
    ALL_MASK{
        .local = true, .softcap = true, .alibi = true, .sink = true, .dropout = true, .mask = true};
constexpr Variant PACKED{.packed = true}, LOCAL_PACKED{.local = true, .packed = true},
    ALL_PACKED{.local = true,
               .softcap = true,
               .alibi = true,
               .sink = true,
               .dropout = true,
               .packed = true};

// head_dim, block_m, block_n, num_stages, q_stages, pingpong, q_in_registers, exp2_fma,
// ctas_per_sm, serial, head_dim_v
const Instance INSTANCES[] = {
    instance<{64, 128, 64, 2, 1, true, false, 0, 1, false}>("64:128x64-stages2-pingpong"),
    instance<{64, 64, 48, 1, 1, false, false, 0, 2, false}>("64:64x48-stages1-ctas2"),
    instance<{64, 192, 32, 3, 2, true, false, 5, 1, false}>("64:192x32-stages3-q2-pingpong-fma5"),
    instance<{64, 128, 64, 2, 1, false, true, 0, 1, false}>("64:128x64-stages2-qreg"),
    instance<{80, 256, 64, 3, 1, false, false, 0, 1, true}>("80:256x64-stages3-serial"),
    instance<{80, 128, 32, 4, 1, true, true, 0, 1, true}>("80:128x32-stages4-pingpong-qreg-serial"),
    instance<{96, 256, 64, 3, 2, true, false, 0, 1, true}>("96:256x64-stages3-q2-pingpong-serial"),
    instance<{64, 256, 48, 2, 2, false, false, 0, 1, true}>("64:256x48-stages2-q2-serial"),
    instance<{128, 64, 80, 2, 2, false, false, 0, 1, false}>("128:64x80-stages2-q2"),
    instance<{64, 128, 64, 2, 1, true, false, 0, 1, false}, LOCAL>(
        "64:128x64-stages2-pingpong-local"),
    instance<{64, 64, 48, 1, 1, false, false, 0, 2, false}, LOCAL>("64:64x48-stages1-ctas2-local"),
    instance<{64, 192, 32, 3, 2, true, false, 5, 1, false}, LOCAL>(
        "64:192x32-stages3-q2-pingpong-fma5-local"),
    instance<{64, 128, 64, 2, 1, false, true, 0, 1, false}, LOCAL>("64:128x64-stages2-qreg-local"),
    instance<{80, 256, 64, 3, 1, false, false, 0, 1, true}, LOCAL>(
        "80:256x64-stages3-serial-local"),
    instance<{80, 128, 32, 4, 1, true, true, 0, 1, true}, LOCAL>(
        "80:128x32-stages4-pingpong-qreg-serial-local"),
    instance<{96, 256, 64, 3, 2, true, false, 0, 1, true}, LOCAL>(
        "96:256x64-stages3-q2-pingpong-serial-local"),
    instance<{64, 256, 32, 4, 2, true, false, 0, 1, false}, LOCAL>(
        "64:256x32-stages4-q2-pingpong-local"),
    instance<{128, 64, 80, 2, 2, false, false, 0, 1, false}, LOCAL>("128:64x80-stages2-q2-local"),
    instance<{64, 128, 64, 2, 1, true, false, 0, 1, false}, SOFTCAP>(
        "64:128x64-stages2-pingpong-softcap"),
    instance<{64, 192, 32, 3, 2, true, false, 5, 1, false}, SOFTCAP>(
        "64:192x32-stages3-q2-pingpong-fma5-softcap"),
    instance<{80, 256, 64, 3, 1, false, false, 0, 1, true}, SOFTCAP>(
        "80:256x64-stages3-serial-softcap"),
    instance<{64, 128, 64, 2, 1, true, false, 0, 1, false}, ALIBI>(
        "64:128x64-stages2-pingpong-alibi"),
    instance<{80, 128, 32, 4, 1, true, true, 0, 1, true}, ALIBI>(
        "80:128x32-stages4-pingpong-qreg-serial-alibi"),
    instance<{64, 256, 48, 2, 2, false, false, 0, 1, true}, SINK>(
        "64:256x48-stages2-q2-serial-sink"),
    instance<{64, 128, 64, 2, 1, false, true, 0, 1, false}, SINK>("64:128x64-stages2-qreg-sink"),
    instance<{64, 128, 64, 2, 1, true, false, 0, 1, false}, DROPOUT>(
        "64:128x64-stages2-pingpong-dropout"),
    instance<{64, 256, 48, 2, 2, false, false, 0, 1, true}, DROPOUT>(
        "64:256x48-stages2-q2-serial-dropout"),
    instance<{128, 64, 80, 2, 2, false, false, 0, 1, false}, DROPOUT>(
        "128:64x80-stages2-q2-dropout"),
    instance<{64, 128, 64, 2, 1, false, true, 0, 1, false}, ALL>("64:128x64-stages2-qreg-all"),
    instance<{96, 256, 64, 3, 2, true, false, 0, 1, true}, ALL>(
        "96:256x64-stages3-q2-pingpong-serial-all"),
    instance<{128, 64, 80, 2, 2, false, false, 0, 1, false}, ALL>("128:64x80-stages2-q2-all"),
    instance<{64, 192, 32, 3, 2, true, false, 5, 1, false}, ALL>(
        "64:192x32-stages3-q2-pingpong-fma5-all"),
    instance<{64, 128, 64, 2, 1, true, false, 0, 1, false}, PACKED>(
        "64:128x64-stages2-pingpong-packed"),
    instance<{64, 192, 32, 3, 2, true, false, 5, 1, false}, PACKED>(
        "64:192x32-stages3-q2-pingpong-fma5-packed"),
    instance<{80, 128, 32, 4, 1, true, true, 0, 1, true}, PACKED>(
        "80:128x32-stages4-pingpong-qreg-serial-packed"),
    instance<{64, 256, 48, 2, 2, false, false, 0, 1, true}, PACKED>(
        "64:256x48-stages2-q2-serial-packed"),
    instance<{128, 64, 80, 2, 2, false, false, 0, 1, false}, PACKED>("128:64x80-stages2-q2-packed"),
    instance<{64, 192, 32, 3, 2, true, false, 5, 1, false}, LOCAL_PACKED>(
        "64:192x32-stages3-q2-pingpong-fma5-local-packed"),
    instance<{80, 256, 64, 3, 1, false, false, 0, 1, true}, LOCAL_PACKED>(
        "80:256x64-stages3-serial-local-packed"),
    instance<{64, 64, 48, 1, 1, false, false, 0, 2, false}, LOCAL_PACKED>(
        "64:64x48-stages1-ctas2-local-packed"),
    instance<{64, 128, 64, 2, 1, false, true, 0, 1, false}, ALL_PACKED>(
        "64:128x64-stages2-qreg-all-packed"),
    instance<{64, 128, 64, 3, 1, false, false, 0, 2, true}, MASK>("64:128x64-stages3-serial-mask"),
    instance<{64, 64, 48, 1, 1, false, false, 0, 2, false}, MASK>("64:64x48-stages1-ctas2-mask"),
    instance<{64, 192, 32, 3, 2, true, false, 5, 1, false}, MASK>(
        "64:192x32-stages3-q2-pingpong-fma5-mask"),
    instance<{96, 256, 64, 3, 2, true, false, 0, 1, true}, MASK>(
        "96:256x64-stages3-q2-pingpong-serial-mask"),
    instance<{64, 128, 176, 2, 1, true, false, 0, 1, false}, MASK>(
        "64:128x176-stages2-pingpong-mask"),
    instance<{64, 128, 64, 2, 1, false, true, 0, 1, false}, LOCAL_MASK>(
        "64:128x64-stages2-qreg-local-mask"),
    instance<{80, 128, 32, 4, 1, true, true, 0, 1, true}, ALL_MASK>(
        "80:128x32-stages4-pingpong-qreg-serial-all-mask"),
    instance<{128, 64, 80, 2, 2, false, false, 0, 1, false}, ALL_MASK>(
        "128:64x80-stages2-q2-all-mask"),
    // V narrower than K and wider, of panels that are full or not; O through a buffer of Q that is
    // too narrow for it, and through one that is too wide.
    instance<{192, 128, 128, 2, 1, true, true, 0, 1, false, 128}>(
        "192v128:128x128-stages2-pingpong-qreg"),
    instance<{192, 64, 64, 2, 1, false, false, 0, 2, false, 128}>("192v128:64x64-stages2-ctas2"),
    instance<{192, 64, 64, 2, 1, false, false, 0, 2, false, 128}, LOCAL>(
        "192v128:64x64-stages2-ctas2-local"),
    instance<{192, 128, 48, 2, 1, true, true, 0, 1, false, 128}, PACKED>(
        "192v128:128x48-stages2-pingpong-qreg-packed"),
    instance<{64, 128, 64, 2, 1, true, false, 0, 1, false, 32}>("64v32:128x64-stages2-pingpong"),
    instance<{48, 64, 48, 1, 1, false, false, 0, 2, false, 32}, LOCAL_PACKED>(
        "48v32:64x48-stages1-ctas2-local-packed"),
    instance<{48, 256, 64, 3, 1, false, false, 0, 1, true, 80}, LOCAL>(
        "48v80:256x64-stages3-serial-local"),
    instance<{64, 192, 32, 3, 2, true, false, 5, 1, false, 96}>(
        "64v96:192x32-stages3-q2-pingpong-fma5"),
    instance<{128, 64, 80, 2, 2, false, false, 0, 1, false, 64}, ALL>(
        "128v64:64x80-stages2-q2-all"),
    instance<{64, 256, 48, 2, 2, false, false, 0, 1, true, 96}, ALL_PACKED>(
        "64v96:256x48-stages2-q2-serial-all-packed"),
    instance<{96, 128, 64, 2, 1, false, true, 0, 1, false, 64}, ALL_MASK>(
        "96v64:128x64-stages2-qreg-all-mask"),
};

}  // namespace

int main(int argc, char** argv) {
  constexpr Sm90Tile TILE{64, 64, 48, 1, 1, false, false, 0, 2, false};
  const Instance plain = instance<TILE>("plain"), masked = instance<TILE, MASK>("a mask");
  const bool is_cheap =
      padding_costs_lengths("forward", {1, 2, 1, 200, 300, 64, {-1, -1}, 0, false, false, true, 0},
                            [&](const Problem& x, const AttnMask& mask) {
                              return loads_of(mask.is_given() ? masked : plain, x, mask);
                            });
  return run_all(INSTANCES, argc, argv) || !is_cheap;
}
