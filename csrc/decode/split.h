// How the keys of a sequence are split over thread blocks, and how their results are merged: what
// the kernel and its host side must agree on. Plain C++.
#pragma once

#include "common/fast_divisor.h"
#include "common/params.h"

namespace flashmoe::decoding {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Thread blocks merge in a tree: those of a level that has up to MERGE_ALL results merge all,
// otherwise groups of MERGE_EACH do, side by side. One SM reads results at about 64 bytes a clock,
// so a few hundred would keep the last thread block busy for longer than the keys took.
constexpr int MERGE_ALL = 40, MERGE_EACH = 16;
constexpr int nodes_of(int count) { return count <= MERGE_ALL ? 1 : ceil_div(count, MERGE_EACH); }
constexpr int node_of(int part, int count) { return count <= MERGE_ALL ? 0 : part / MERGE_EACH; }

// Results and groups on all levels of a tree over `count` thread blocks, none for one.
struct Tree {
  int results, groups;
};
constexpr Tree tree_of(int count) {
  Tree tree{0, 0};
  while (count > 1) {
    tree.results += count;
    count = nodes_of(count);
    tree.groups += count;
  }
  return tree;
}

// A counter of arrivals has the count in its low bits, and above them the tag of the launch.
constexpr int COUNT_BITS = 12;
constexpr int MAX_SPLITS = (1 << COUNT_BITS) - 1;

// Without batch invariance a sequence has num_splits parts. With it, parts of INVARIANT_KEYS keys,
// of more where that makes more than INVARIANT_SPLITS: by its length alone.
constexpr int INVARIANT_KEYS = 512, INVARIANT_SPLITS = 64;

struct DecodeParams {
  AttentionParams attention;
  void* workspace;         // of workspace_bytes, 16-byte aligned, holding anything; unused for
                           // num_splits 1
  unsigned long long tag;  // of this launch, positive, at most 64 - COUNT_BITS bits
  int num_splits;          // thread blocks for a sequence's keys: 1 to MAX_SPLITS
  bool batch_invariant;
  bool evict_first;  // of plain calls: whether K and V leave L2 before anything else
  // Which the launch fills in.
  FastDivisor heads_kv, group, m_blocks, splits, page_size;
};

// How many steps of block_n keys each thread block takes of a sequence that has `steps`: at least
// those that make num_splits parts, `even`.
constexpr int steps_each(int steps, int even, int block_n, bool batch_invariant) {
  if (!batch_invariant) return even > 0 ? even : 1;
  const int fixed = ceil_div(INVARIANT_KEYS, block_n), long_one = ceil_div(steps, INVARIANT_SPLITS);
  return fixed > long_one ? fixed : long_one;
}

// How many parts a sequence of at most seqlen_kv keys has then, which begin up to 15 keys early.
constexpr int invariant_splits(int seqlen_kv, int block_n) {
  const int fixed = ceil_div(INVARIANT_KEYS, block_n);
  const int parts = ceil_div(ceil_div(seqlen_kv + 15, block_n), fixed);
  return parts < INVARIANT_SPLITS ? parts : INVARIANT_SPLITS;
}

// Rows of a head of k: (query, head of the group) pairs, queries slowest.
constexpr int rows_of(const AttentionParams& p) { return p.seqlen_q * (p.heads_q / p.heads_kv); }
constexpr int num_m_blocks(const AttentionParams& p, int block_m) {
  return ceil_div(rows_of(p), block_m);
}
// Rows for which the workspace has room in each result.
constexpr int result_rows(const AttentionParams& p, int block_m) {
  return rows_of(p) < block_m ? rows_of(p) : block_m;
}

// The workspace has the counters of all trees, then O of all results (result_rows, head_dim), then
// their (maximum, sum) by row; all by (sequence, block of rows, head of k), then within its tree.
struct Workspace {
  long long trees, results, rows;
  int head_dim;  // of the kernel
  Tree tree;

  constexpr Workspace(const AttentionParams& p, int block_m, int head_dim, int num_splits)
      : trees(static_cast<long long>(p.batch) * num_m_blocks(p, block_m) * p.heads_kv),
        results(0),
        rows(result_rows(p, block_m)),
        head_dim(head_dim),
        tree(tree_of(num_splits)) {
    results = trees * tree.results;
  }
  constexpr long long out_offset() const { return (trees * tree.groups * 8 + 15) / 16 * 16; }
  constexpr long long stats_offset() const { return out_offset() + results * rows * head_dim * 4; }
  constexpr long long bytes() const { return stats_offset() + results * rows * 8; }
};

// Whether all sequences are as long as the tensors, and no key lies too far back to be seen: what a
// kernel takes that is compiled for no more.
constexpr bool is_plain(const AttentionParams& p) {
  const Sequences& s = p.sequences;
  return p.mask.left < 0 && s.cu_seqlens_q == nullptr && s.cu_seqlens_k == nullptr &&
         s.seqused_k == nullptr && s.leftpad_k == nullptr && s.cache_batch_idx == nullptr &&
         s.block_table == nullptr;
}

// Whether K and V should leave L2 before anything else. Each block of rows reads them, so only
// where there is one. Beyond four times L2 it is slower, by 4 % on an H200 (docs/dev/decode.md).
constexpr bool should_evict_first(const AttentionParams& p, int block_m, long long l2_bytes) {
  const long long bytes = 4ll * p.batch * p.heads_kv * p.seqlen_kv * p.head_dim;
  return num_m_blocks(p, block_m) == 1 && bytes <= 4 * l2_bytes;
}

// The most keys that a block of rows sees of a sequence.
constexpr int most_keys(const AttentionParams& p) {
  if (p.mask.left < 0) return p.seqlen_kv;
  const long long window = static_cast<long long>(p.mask.left) + p.seqlen_q;
  return window < p.seqlen_kv ? static_cast<int>(window) : p.seqlen_kv;
}

// The number of splits with which a call is expected to be fastest on `slots` thread blocks at a
// time, among those that fill one to four waves. What a thread block costs besides its steps, and
// what merging costs, count in steps.
constexpr int choose_splits(const AttentionParams& p, int block_m, int block_n, int slots) {
  constexpr double BLOCK = 1.0, MERGE = 0.7, EACH = 0.01;
  const int steps = ceil_div(most_keys(p), block_n);
  const long long trees = static_cast<long long>(p.batch) * num_m_blocks(p, block_m) * p.heads_kv;
  const long long most = steps < MAX_SPLITS ? steps : MAX_SPLITS;
  int best = 1;
  double least = static_cast<double>((trees + slots - 1) / slots) * (steps + BLOCK);
  for (int filled = 1; filled <= 4; ++filled) {
    long long splits = filled * static_cast<long long>(slots) / trees;
    splits = splits < most ? splits : most;
    if (splits < 2) continue;
    const int each = ceil_div(steps, static_cast<int>(splits));
    splits = ceil_div(steps, each);  // the fewest of as many steps
    const long long waves = (trees * splits + slots - 1) / slots;
    const double time = static_cast<double>(waves) * (each + BLOCK) + MERGE + EACH * splits;
    if (time < least) best = static_cast<int>(splits), least = time;
  }
  return best;
}

}  // namespace flashmoe::decoding
