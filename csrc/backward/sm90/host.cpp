#include "backward/sm90/host.h"

#include <algorithm>
#include <cstring>

#include "common/sm90_launch.h"

namespace flashmoe::sm90_backward {
namespace {

constexpr unsigned EDGE_THREADS = 256;

sm90::TensorView out_view(const AttentionParams& p) {
  return {p.out,   p.o_batch_stride, p.o_row_stride, p.o_head_stride,
          p.batch, p.seqlen_q,       p.heads_q,      p.head_dim};
}

sm90::TensorView dout_view(const BackwardParams& p) {
  const AttentionParams& a = p.attention;
  return {p.dout,  p.do_batch_stride, p.do_row_stride, p.do_head_stride,
          a.batch, a.seqlen_q,        a.heads_q,       a.head_dim};
}

// A contiguous gradient of k or v.
sm90::TensorView gradient_view(void* data, const AttentionParams& a) {
  const long long row = static_cast<long long>(a.heads_kv) * a.head_dim;
  return {data, row * a.seqlen_kv, row, a.head_dim, a.batch, a.seqlen_kv, a.heads_kv, a.head_dim};
}

long long blocks_of_queries(const Sm90BackwardTile& tile, const AttentionParams& a) {
  const long long m_blocks = (a.seqlen_q + tile.block_m - 1) / tile.block_m;
  return m_blocks * a.batch * a.heads_q;
}

long long stats_bytes(const Sm90BackwardTile& tile, const AttentionParams& a) {
  return blocks_of_queries(tile, a) * tile.stats_bytes();
}

// How many (batch, key head) pairs of a causal problem are worked on together: as many as L2 holds
// the queries, gradients and sums of.
int section_of(const AttentionParams& a, int l2_bytes) {
  const long long pairs = static_cast<long long>(a.batch) * a.heads_kv;
  const long long bytes = 8ll * a.seqlen_q * a.head_dim * (a.heads_q / a.heads_kv);
  const long long held = std::clamp(l2_bytes / 2 / std::max(bytes, 1ll), 1ll, pairs);
  const long long sections = (pairs + held - 1) / held;
  return static_cast<int>((pairs + sections - 1) / sections);
}

}  // namespace

bool can_run(const BackwardParams& p) {
  const AttentionParams& a = p.attention;
  return sm90::is_fetchable(sm90::q_view(a)) && sm90::is_fetchable(sm90::k_view(a)) &&
         sm90::is_fetchable(sm90::v_view(a)) && sm90::is_fetchable(out_view(a)) &&
         sm90::is_fetchable(dout_view(p));
}

// Statistics, sums of dQ, turns and the ticket; a multiple of 16, as all but the last are.
long long workspace_bytes(const Sm90BackwardTile& tile, const AttentionParams& a) {
  const long long blocks = blocks_of_queries(tile, a);
  return stats_bytes(tile, a) + blocks * tile.dq_elements() * 4 + (blocks + 1 + 3) / 4 * 16;
}

cudaError_t launch(const Sm90BackwardTile& tile, const Entries& entries, const BackwardParams& call,
                   DType dtype, int device, cudaStream_t stream, void* workspace) {
  const AttentionParams& a = call.attention;
  const long long n_blocks = (a.seqlen_kv + tile.block_n - 1) / tile.block_n;
  const long long grid = n_blocks * a.batch * a.heads_kv, edge_grid = blocks_of_queries(tile, a);
  if (grid > 0x7fffffffll || edge_grid > 0x7fffffffll) return cudaErrorInvalidConfiguration;

  Sm90BackwardParams params;
  std::memset(&params, 0, sizeof params);
  params.call = call;
  params.stats = static_cast<float*>(workspace);
  params.dq_sum = params.stats + stats_bytes(tile, a) / 4;
  params.turns = reinterpret_cast<int*>(params.dq_sum + edge_grid * tile.dq_elements());
  params.ticket = params.turns + edge_grid;
  const bool capped = a.terms.softcap > 0;
  params.scale_log2 = (capped ? a.terms.softcap : a.softmax_scale) * 1.4426950408889634f;
  params.cap_scale = capped ? a.softmax_scale / a.terms.softcap : 0.f;
  params.m_blocks = (a.seqlen_q + tile.block_m - 1) / tile.block_m;
  params.n_blocks = static_cast<int>(n_blocks);
  params.section = section_of(a, sm90::device_properties(device).l2_bytes);
  if (!sm90::encode(&params.q, sm90::q_view(a), tile.block_m, dtype) ||
      !sm90::encode(&params.k, sm90::k_view(a), tile.block_n, dtype) ||
      !sm90::encode(&params.v, sm90::v_view(a), tile.block_n, dtype) ||
      !sm90::encode(&params.dout, dout_view(call), tile.block_m, dtype) ||
      !sm90::encode(&params.dk, gradient_view(call.dk, a), 64, dtype) ||
      !sm90::encode(&params.dv, gradient_view(call.dv, a), 64, dtype)) {
    return cudaErrorNotSupported;
  }
  void* arguments[] = {&params};
  // The second and third may begin while the one before ends: they wait where they need it.
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const auto run = [&](int which, long long blocks, unsigned threads, int smem_bytes) {
    if (smem_bytes > 48 << 10) {
      if (const cudaError_t error = sm90::allow_smem(entries[which], smem_bytes, device)) {
        return error;
      }
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = which > 0 ? 1 : 0;
    return cudaLaunchKernelExC(&config, entries[which], arguments);
  };
  if (const cudaError_t error = run(0, edge_grid, EDGE_THREADS, 0)) return error;
  if (const cudaError_t error =
          run(1, grid, static_cast<unsigned>(tile.num_threads()), tile.smem_bytes())) {
    return error;
  }
  return run(2, edge_grid, EDGE_THREADS, tile.block_m * tile.finish_pitch());
}

}  // namespace flashmoe::sm90_backward
