#include "backward/sm90/host.h"

#include <algorithm>
#include <climits>
#include <cstring>

#include "common/sm90_launch.h"

namespace flashmoe::sm90_backward {
namespace {

constexpr int EDGE_THREADS = 256;

sm90::TensorView dout_view(const BackwardParams& p) {
  return sm90::queries_view(p.attention, p.dout, p.do_batch_stride, p.do_row_stride,
                            p.do_head_stride);
}

// A contiguous gradient of k or v.
sm90::TensorView gradient_view(void* data, const AttentionParams& a) {
  const long long row = static_cast<long long>(a.heads_kv) * a.head_dim;
  return sm90::keys_view(a, data, row * a.seqlen_kv, row, a.head_dim);
}

Schedule schedule_of(const Sm90BackwardTile& tile, const AttentionParams& a, void* memory) {
  return sm90::plan_schedule(a, tile.block_m, tile.block_n, memory);
}

long long blocks_of_queries(const Sm90BackwardTile& tile, const AttentionParams& a) {
  if (a.sequences.is_packed()) {
    return static_cast<long long>(schedule_of(tile, a, nullptr).room_queries) * a.heads_q;
  }
  const long long m_blocks = (a.seqlen_q + tile.block_m - 1) / tile.block_m;
  return m_blocks * a.batch * a.heads_q;
}

long long stats_bytes(const Sm90BackwardTile& tile, const AttentionParams& a) {
  return blocks_of_queries(tile, a) * tile.stats_bytes();
}

// How many (batch, key head) pairs are worked on together: as many as L2 holds the queries,
// gradients and sums of. Deterministic kernels need some: thread blocks of neighbouring keys of a
// head follow one another through its queries, and with others between them they begin some steps
// apart. More would be too far apart: L2 must hold what is read and added to between two of them.
int section_of(const AttentionParams& a, int l2_bytes) {
  const long long pairs = static_cast<long long>(a.batch) * a.heads_kv;
  const long long bytes = 8ll * a.seqlen_q * a.head_dim * (a.heads_q / a.heads_kv);
  const long long held = std::clamp(l2_bytes / 2 / std::max(bytes, 1ll), 1ll, pairs);
  const long long sections = (pairs + held - 1) / held;
  return static_cast<int>((pairs + sections - 1) / sections);
}

// Of what is listed before anything else runs: behind the rest of the workspace.
long long listed_bytes(const Sm90BackwardTile& tile, const Variant& variant,
                       const AttentionParams& a) {
  if (a.terms.attn_mask.is_given()) {
    return sm90::mask_tiles_bytes(a, tile.block_m, tile.block_n, true, variant.deterministic);
  }
  return a.sequences.is_packed() ? sm90::schedule_bytes(a, tile.block_m, tile.block_n) : 0;
}

}  // namespace

bool can_run(const BackwardParams& p) {
  const AttentionParams& a = p.attention;
  return sm90::is_fetchable(sm90::q_view(a)) && sm90::is_fetchable(sm90::k_view(a)) &&
         sm90::is_fetchable(sm90::v_view(a)) && sm90::is_fetchable(sm90::out_view(a)) &&
         sm90::is_fetchable(dout_view(p));
}

// Statistics, sums of dQ, turns and the ticket, and a packed batch's schedule or a mask's tiles; a
// multiple of 16, as each but the turns and the ticket is.
long long workspace_bytes(const Sm90BackwardTile& tile, const Variant& variant,
                          const AttentionParams& a) {
  const long long blocks = blocks_of_queries(tile, a);
  const long long sum_bytes = variant.whole ? 0 : blocks * tile.dq_elements() * 4;
  return stats_bytes(tile, a) + sum_bytes + (blocks + 1 + 3) / 4 * 16 +
         listed_bytes(tile, variant, a);
}

cudaError_t launch(const Sm90BackwardTile& tile, const Variant& variant, const Entries& entries,
                   const BackwardParams& call, DType dtype, int device, cudaStream_t stream,
                   void* workspace) {
  const AttentionParams& a = call.attention;
  const bool packed = a.sequences.is_packed();
  char* const listed = static_cast<char*>(workspace) + workspace_bytes(tile, variant, a) -
                       listed_bytes(tile, variant, a);
  Schedule schedule{};
  if (packed) schedule = schedule_of(tile, a, listed);
  const long long n_blocks =
      packed ? schedule.room_keys : (a.seqlen_kv + tile.block_n - 1) / tile.block_n;
  const long long grid = n_blocks * (packed ? 1 : a.batch) * a.heads_kv;
  const long long edge_grid = blocks_of_queries(tile, a);
  if (grid > 0x7fffffffll || edge_grid > 0x7fffffffll) return cudaErrorInvalidConfiguration;

  Sm90BackwardParams params;
  std::memset(&params, 0, sizeof params);
  params.call = call;
  params.stats = static_cast<float*>(workspace);
  params.dq_sum = params.stats + stats_bytes(tile, a) / 4;
  params.turns =
      reinterpret_cast<int*>(params.dq_sum + (variant.whole ? 0 : edge_grid * tile.dq_elements()));
  params.ticket = params.turns + edge_grid;
  params.descending_from = INT_MAX;
  const bool capped = a.terms.softcap > 0;
  params.scale_log2 = (capped ? a.terms.softcap : a.softmax_scale) * 1.4426950408889634f;
  params.cap_scale = capped ? a.softmax_scale / a.terms.softcap : 0.f;
  params.m_blocks = packed ? schedule.room_queries : (a.seqlen_q + tile.block_m - 1) / tile.block_m;
  params.n_blocks = static_cast<int>(n_blocks);
  const int l2_bytes = sm90::device_properties(device).l2_bytes;
  if (packed) {
    AttentionParams one = a;
    one.batch = 1;
    // Where nothing is masked, one head after the other.
    params.section = a.mask.is_full() ? 1 : section_of(one, l2_bytes);
    params.schedule = schedule;
  } else {
    params.section = section_of(a, l2_bytes);
    // In the last section the longest come first, so that the end of the grid is even. They all
    // begin at the last queries: as the thread blocks of the section before end one after the
    // other, so that they need not wait for each other there. With a group of heads, those of fewer
    // queries would be at the next head too early.
    const long long pairs = static_cast<long long>(a.batch) * a.heads_kv;
    const long long sections = (pairs + params.section - 1) / params.section;
    const bool evens_out = a.mask.right >= 0 && a.mask.left < 0 && a.heads_q == a.heads_kv &&
                           !a.terms.attn_mask.is_given();
    if (evens_out && sections > 1) params.descending_from = static_cast<int>(sections - 1);
  }
  if (!sm90::encode(&params.q, sm90::q_view(a), tile.block_m, dtype) ||
      !sm90::encode(&params.k, sm90::k_view(a), tile.block_n, dtype) ||
      !sm90::encode(&params.v, sm90::v_view(a), tile.block_n, dtype) ||
      !sm90::encode(&params.dout, dout_view(call), tile.block_m, dtype) ||
      !sm90::encode(&params.dk, gradient_view(call.dk, a), 64, dtype) ||
      !sm90::encode(&params.dv, gradient_view(call.dv, a), 64, dtype) ||
      !sm90::encode_rows(&params.stats_rows, params.stats, 2 * tile.block_m, edge_grid)) {
    return cudaErrorNotSupported;
  }
  void* arguments[] = {&params};
  const auto run = [&](int which, long long blocks, int threads, int smem_bytes) {
    if (smem_bytes > 48 << 10) {
      if (const cudaError_t error = sm90::allow_smem(entries[which], smem_bytes, device)) {
        return error;
      }
    }
    // All but what comes first may begin while the one before ends: they wait where they need it.
    if (which > 0 || packed) {
      return sm90::launch_overlapping(entries[which], blocks, threads, smem_bytes, arguments,
                                      stream);
    }
    return cudaLaunchKernel(entries[which], dim3(static_cast<unsigned>(blocks)),
                            dim3(static_cast<unsigned>(threads)), arguments,
                            static_cast<size_t>(smem_bytes), stream);
  };
  if (packed) {
    if (const cudaError_t error = sm90::launch_schedule(a, schedule, stream)) return error;
  }
  // What follows begins when this has ended.
  if (a.terms.attn_mask.is_given()) {
    const MaskTilesParams found =
        sm90::plan_mask_tiles(a, tile.block_m, tile.block_n, true, variant.deterministic, listed);
    params.mask_tiles = found.out;
    if (const cudaError_t error = sm90::launch_mask_tiles(found, stream)) return error;
  }
  if (const cudaError_t error = run(0, edge_grid, EDGE_THREADS, 0)) return error;
  if (const cudaError_t error = run(1, grid, tile.num_threads(), tile.smem_bytes())) return error;
  if (variant.whole) return cudaSuccess;
  return run(2, edge_grid, EDGE_THREADS, tile.block_m * tile.finish_pitch());
}

}  // namespace flashmoe::sm90_backward
