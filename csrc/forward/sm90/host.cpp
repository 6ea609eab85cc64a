#include "forward/sm90/host.h"

#include <algorithm>
#include <cstring>

#include "common/sm90_launch.h"

namespace flashmoe::sm90 {
namespace {

// How many (batch, head) pairs of a masked problem are worked on together: few, so that what they
// read stays in L2; enough blocks to level out their lengths; and as many in every section, since
// the last one ends it all. The factors were measured (H100, docs/dev/hopper-forward.md).
int section_heads(const AttentionParams& a, long long num_m_blocks, long long grid, int l2_bytes) {
  const double batch_heads = static_cast<double>(a.batch) * a.heads_q;
  const double group = a.heads_q / a.heads_kv;
  const double group_bytes = 2. * (a.head_dim + a.head_dim_v) * (a.seqlen_kv + a.seqlen_q * group);
  const double in_l2 = l2_bytes / 3. / std::max(group_bytes, 1.) * group;
  const double leveled = std::min(2., num_m_blocks / 4.) * grid / num_m_blocks;
  const double wanted = std::min(std::max(in_l2, leveled), batch_heads);
  int best = 1;
  const int all = static_cast<int>(batch_heads);
  for (int divisor = 1; divisor <= all / divisor; ++divisor) {
    if (all % divisor != 0) continue;
    for (const int section : {divisor, all / divisor}) {
      const auto off = [&](int heads) { return std::max(heads / wanted, wanted / heads); };
      if (off(section) < off(best)) best = section;
    }
  }
  return best;
}

// Thread blocks that run at a time.
long long slots_of(const Sm90Tile& tile, int device) {
  return static_cast<long long>(device_properties(device).sm_count) * tile.ctas_per_sm;
}

// Blocks of rows of all heads, at most.
long long most_work(const Sm90Tile& tile, const AttentionParams& a) {
  if (a.sequences.is_packed()) {
    return packed_blocks(a.sequences.total_q, a.batch, a.seqlen_q, tile.block_m) * a.heads_q;
  }
  const long long num_m_blocks = (a.seqlen_q + tile.block_m - 1) / tile.block_m;
  return num_m_blocks * a.batch * a.heads_q;
}

// Whether blocks of rows are listed, for they differ in length. Where they run all at once their
// order matters to nobody, and each thread block finds its own sooner than another kernel has
// listed them, unless there are many sequences to search.
bool is_listed(const Sm90Tile& tile, const AttentionParams& a, int device) {
  constexpr int SEARCHED = 128;
  return a.sequences.is_packed() &&
         (a.batch > SEARCHED || most_work(tile, a) > slots_of(tile, device));
}

}  // namespace

bool can_run(const AttentionParams& p) {
  return is_fetchable(q_view(p)) && is_fetchable(k_view(p)) && is_fetchable(v_view(p));
}

long long workspace_bytes(const Sm90Tile& tile, const AttentionParams& a, int device) {
  if (a.terms.attn_mask.is_given()) {
    return mask_tiles_bytes(a, tile.block_m, tile.block_n, false, false);
  }
  return is_listed(tile, a, device) ? schedule_bytes(a, tile.block_m, 0) : 0;
}

cudaError_t launch(const Sm90Tile& tile, const void* kernel, const AttentionParams& a, DType dtype,
                   int device, cudaStream_t stream, unsigned* counter, void* workspace) {
  const bool listed = is_listed(tile, a, device);
  Sm90Params params;
  std::memset(&params, 0, sizeof params);
  if (listed) params.schedule = plan_schedule(a, tile.block_m, 0, workspace);
  const long long num_m_blocks = (a.seqlen_q + tile.block_m - 1) / tile.block_m;
  const long long num_work = most_work(tile, a);
  if (num_work > 0x7fffffffll) return cudaErrorInvalidConfiguration;
  const Device& here = device_properties(device);
  const long long grid = std::min(num_work, slots_of(tile, device));

  params.attention = a;
  const bool capped = a.terms.softcap > 0;
  params.scale_log2 = (capped ? a.terms.softcap : a.softmax_scale) * 1.4426950408889634f;
  params.cap_scale = capped ? a.softmax_scale / a.terms.softcap : 0.f;
  params.inverse_scale_log2 = 1.f / params.scale_log2;
  // P is at most 2^8 then, in float16: far from overflow, and its precision does not depend on it.
  params.slack = (8.f - max_shift(dtype == DType::bfloat16)) / params.scale_log2;
  params.num_work = static_cast<int>(num_work);
  params.m_blocks = FastDivisor::of(static_cast<int>(num_m_blocks));
  params.heads_q = FastDivisor::of(a.heads_q);
  params.group = FastDivisor::of(a.heads_q / a.heads_kv);
  // With a window blocks of rows differ in length at its edges only, or as much as causal ones
  // where it is as wide as the sequence: one order for all of them, whose draws even out what
  // differs.
  if (listed) {
    // One sequence of the longest, whose heads are a section: others are shorter, and follow it.
    AttentionParams one = a;
    one.batch = 1;
    params.section_heads = FastDivisor::of(section_heads(one, num_m_blocks, grid, here.l2_bytes));
  } else if (!a.mask.is_full() && !a.sequences.is_packed()) {
    const int section = section_heads(a, num_m_blocks, grid, here.l2_bytes);
    params.section_heads = FastDivisor::of(section);
    params.per_section = FastDivisor::of(static_cast<int>(section * num_m_blocks));
    // Other blocks are of one length, and dealt evenly as they are.
    if (num_work > grid) params.counter = counter;
  } else if (a.terms.attn_mask.is_given() && num_work > grid) {
    params.counter = counter;
  }

  const TensorView o = out_view(a);
  if (!encode(&params.q, q_view(a), 64, dtype) ||
      !encode(&params.k, k_view(a), tile.block_n, dtype) ||
      !encode(&params.v, v_view(a), tile.block_n, dtype) ||
      (tile.stages_output() && !encode(&params.o, o, 64, dtype))) {
    return cudaErrorNotSupported;
  }
  if (const cudaError_t error = allow_smem(kernel, tile.smem_bytes(), device)) return error;
  void* arguments[] = {&params};
  if (a.terms.attn_mask.is_given()) {
    const MaskTilesParams found =
        plan_mask_tiles(a, tile.block_m, tile.block_n, false, false, workspace);
    params.mask_tiles = found.out;
    if (const cudaError_t error = launch_mask_tiles(found, stream)) return error;
  }
  if (listed) {
    if (const cudaError_t error = launch_schedule(a, params.schedule, stream)) return error;
    return launch_overlapping(kernel, grid, tile.num_threads(), tile.smem_bytes(), arguments,
                              stream);
  }
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid)),
                          dim3(static_cast<unsigned>(tile.num_threads())), arguments,
                          static_cast<size_t>(tile.smem_bytes()), stream);
}

}  // namespace flashmoe::sm90
