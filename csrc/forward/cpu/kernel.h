// The CPU forward kernel, over a vector type Vec of one instruction set. The file of each
// instruction set includes it once; like tiles.h it has internal linkage and uses nothing of std.
//
// Per task (a block of query rows) and tile of keys:
//   S^T[key][row]  = K[key][:] . Q^T[:][row]      vector lanes are rows, K is broadcast
//   P^T            = exp2(S^T - max)              reductions run down the lanes: no shuffles
//   O[row][:]     += P^T[key][row] * V[key][:]    vector lanes are head_dim, P^T is broadcast
// A tile of K and V is brought to float32 in the order it is read, once for the block_m rows of the
// task. Rows go through it in panels of PANEL, so that S^T (block_n x PANEL) stays in L1.
#pragma once

#include "common/dropout.h"
#include "forward/cpu/mask.h"
#include "forward/cpu/task.h"
#include "forward/cpu/tiles.h"

namespace flashmoe {
namespace {

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

constexpr float LOG2_E = 1.44269504088896341f;
constexpr long long ALIGN_FLOATS = 16;  // one cache line

template <typename I>
FLASHMOE_INLINE I clamp(I x, I low, I high) {
  return x < low ? low : x > high ? high : x;
}

FLASHMOE_INLINE long long round_up(long long x, long long multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// One task of one (Vec, element type).
template <class Vec, typename T>
struct BlockForward {
  static constexpr int PANEL = Vec::PANEL;
  static constexpr int WIDTH = Vec::WIDTH;
  static constexpr int V_COLUMNS = Vec::V_COLUMNS;
  static_assert(PANEL % WIDTH == 0 && PANEL % 8 == 0, "Q is transposed eight rows at a time");
  static_assert(PANEL % Vec::PV_ROWS == 0, "a panel is a whole number of PV row groups");
  static_assert(V_COLUMNS == 2 * WIDTH && V_COLUMNS % 8 == 0, "PV tiles are two vectors wide");

  const AttentionParams& params;
  const CpuTask& task;
  const int head_dim, head_dim_v;
  const int group;
  const int seqlen_q, seqlen_kv;  // of the task's sequence
  const int q_batch;              // 0 where q is packed
  const T* k_head;                // the sequence's first key of this kv head; in pages, page 0
  const T* v_head;
  // What a stored score is to be multiplied by: terms other than sinks scale before they compute,
  // unless that could overflow where nothing else does.
  const float score_scale;
  const int block_n;         // a multiple of KEY_GROUP
  const long long o_stride;  // head_dim_v rounded up to whole vectors

  const long long v_stride;  // one line more than a column: columns must not share cache sets

  float* q_t;        // [panel][head_dim][PANEL]
  float* k_tile;     // [block_n / KEY_GROUP][head_dim][KEY_GROUP]
  float* v_tile;     // [head_dim_v / V_COLUMNS][v_stride], columns of [block_n][V_COLUMNS]
  float* s_t;        // [block_n][PANEL] scores, then probabilities
  float* o;          // [row][o_stride], not yet divided by row_sum
  float* row_max;    // [row], of the scores before score_scale, which is positive
  float* row_sum;    // [row]
  float* alpha;      // [PANEL] exp2(old max - new max) of the current panel and tile
  float* key_begin;  // [PANEL] first key each row of the current panel sees, counted from the
  float* key_end;    // [PANEL] first that is computed of the current tile, and past its last
  float* unpacked;   // [8][head_dim or head_dim_v]
  float* slopes;     // [PANEL] of ALiBi, of each row of the current panel, per score_scale
  float* positions;  // [PANEL] the key level with each row, counted as key_begin
  const T** k_rows;  // [block_n] of the current tile, where they are in pages
  const T** v_rows;
  long long floats;      // scratch used
  float p_shift = 0.0f;  // P is this many powers of two smaller

  BlockForward(const AttentionParams& params, const CpuTask& task, long long block_m, int block_n,
               float* scratch)
      : params(params),
        task(task),
        head_dim(params.head_dim),
        head_dim_v(params.head_dim_v),
        group(params.heads_q / params.heads_kv),
        seqlen_q(task.sequence.seqlen_q),
        seqlen_kv(task.sequence.seqlen_kv),
        q_batch(params.sequences.cu_seqlens_q != nullptr ? 0 : task.batch),
        k_head(kv_head(params.k, params.k_batch_stride, params.k_row_stride, params.k_head_stride)),
        v_head(kv_head(params.v, params.v_batch_stride, params.v_row_stride, params.v_head_stride)),
        score_scale(params.terms.softcap > 0 || (is_added_to() && params.softmax_scale < 1.0f)
                        ? 1.0f
                        : params.softmax_scale),
        block_n(static_cast<int>(round_up(block_n, KEY_GROUP))),
        o_stride(round_up(params.head_dim_v, WIDTH)),
        v_stride(static_cast<long long>(this->block_n) * V_COLUMNS + ALIGN_FLOATS) {
    const long long rows = round_up(block_m, PANEL);
    long long used = 0;
    const auto take = [&](long long count) {
      float* pointer = scratch + used;
      used += round_up(count, ALIGN_FLOATS);
      return pointer;
    };
    q_t = take(rows * head_dim);
    k_tile = take(static_cast<long long>(this->block_n) * head_dim);
    v_tile = take(round_up(head_dim_v, V_COLUMNS) / V_COLUMNS * v_stride);
    s_t = take(static_cast<long long>(this->block_n) * PANEL);
    o = take(rows * o_stride);
    row_max = take(rows);
    row_sum = take(rows);
    alpha = take(PANEL);
    key_begin = take(PANEL);
    key_end = take(PANEL);
    unpacked = take(8 * (head_dim > head_dim_v ? head_dim : head_dim_v));
    slopes = take(PANEL);
    positions = take(PANEL);
    constexpr long long POINTER_FLOATS = sizeof(const T*) / sizeof(float);
    k_rows = reinterpret_cast<const T**>(take(this->block_n * POINTER_FLOATS));
    v_rows = reinterpret_cast<const T**>(take(this->block_n * POINTER_FLOATS));
    floats = used;
  }

  // Whether a term is added to scores.
  bool is_added_to() const {
    const AttnMask& mask = params.terms.attn_mask;
    return params.terms.alibi_slopes != nullptr || (mask.is_given() && !mask.is_boolean());
  }

  // Neither end ever decreases with the row. A row that sees nothing has {0, 0}.
  KeyRange visible_at(int position) const {
    return visible(params.mask, position, position + 1, seqlen_q, seqlen_kv);
  }
  KeyRange visible_keys(long long row) const { return visible_at(static_cast<int>(row / group)); }

  long long query_head(long long row) const {
    return static_cast<long long>(task.head_kv) * group + row % group;
  }

  const T* kv_head(const void* base, long long batch_stride, long long row_stride,
                   long long head_stride) const {
    const T* head = static_cast<const T*>(base) + task.head_kv * head_stride;
    if (in_pages()) return head;
    return head + task.kv_batch * batch_stride + task.sequence.k_begin * row_stride;
  }
  bool in_pages() const { return params.sequences.block_table != nullptr; }

  // Where a row of q or out begins.
  long long q_offset(long long row, long long batch_stride, long long row_stride,
                     long long head_stride) const {
    return q_batch * batch_stride + (task.sequence.q_begin + row / group) * row_stride +
           query_head(row) * head_stride;
  }

  // Where a row's softmax_lse is.
  long long lse_offset(long long row) const {
    const Sequences& s = params.sequences;
    const long long rows = s.cu_seqlens_q != nullptr ? s.total_q : params.seqlen_q;
    const long long head = static_cast<long long>(q_batch) * params.heads_q + query_head(row);
    return head * rows + task.sequence.q_begin + row / group;
  }

  // Rows of a (seqlen, heads, head_dim) tensor lie too far apart for the hardware prefetchers, and
  // at power-of-two distances they share cache sets: fetch a few rows ahead, no more.
  void prefetch_row(const T* row, int columns) const {
    constexpr int LINE = 64 / static_cast<int>(sizeof(T));
    for (int d = 0; d < columns; d += LINE) __builtin_prefetch(row + d);
  }

  // Transposes the rows of `base` from panel_begin on to `panel`, [columns][PANEL]. Lanes behind
  // the last row repeat it; nobody reads their results.
  void pack(const void* base, long long batch_stride, long long row_stride, long long head_stride,
            int columns, long long panel_begin, int rows, float* panel) const {
    const auto src = [&](int lane) {
      const long long row = panel_begin + (lane < rows ? lane : rows - 1);
      return static_cast<const T*>(base) + q_offset(row, batch_stride, row_stride, head_stride);
    };
    for (int lane = 0; lane < round_up(rows, WIDTH); lane += 8) {
      for (int i = 0; i < 8; ++i) {
        const T* x = src(lane + i);
        prefetch_row(src(lane + i + 4), columns);
        for (int d = 0; d < columns; d += 8) {
          Vec::eight_store(unpacked + i * columns + d, Vec::eight_load(x + d));
        }
      }
      for (int d = 0; d < columns; d += 8) {
        Vec::transpose_8x8(unpacked + d, columns, panel + d * PANEL + lane, PANEL);
      }
    }
  }
  void pack_q(long long panel_begin, int rows, float* panel) const {
    pack(params.q, params.q_batch_stride, params.q_row_stride, params.q_head_stride, head_dim,
         panel_begin, rows, panel);
  }

  // Brings keys [n_begin, n_begin + keys) and their values to k_tile and v_tile.
  void stage(long long n_begin, int keys) const {
    if (in_pages()) {
      find_rows(n_begin, keys);
      interleave(keys, [&](int n) { return k_rows[n]; }, head_dim, k_tile);
      cut_columns(keys, [&](int n) { return v_rows[n]; }, head_dim_v, v_tile, v_stride);
    } else {
      const auto k_row = [&](int n) { return k_head + (n_begin + n) * params.k_row_stride; };
      const auto v_row = [&](int n) { return v_head + (n_begin + n) * params.v_row_stride; };
      interleave(keys, k_row, head_dim, k_tile);
      cut_columns(keys, v_row, head_dim_v, v_tile, v_stride);
    }
  }

  // Sets k_rows and v_rows.
  FLASHMOE_NOINLINE void find_rows(long long n_begin, int keys) const {
    const Sequences& s = params.sequences;
    const long long first = task.sequence.k_begin + n_begin;
    const int* page = s.block_table + task.batch * s.block_table_stride + first / s.page_size;
    int slot = static_cast<int>(first % s.page_size);
    for (int n = 0; n < keys; ++page, slot = 0) {
      const long long index = clamped(*page, 0, s.num_pages - 1);
      const T* k = k_head + index * params.k_batch_stride;
      const T* v = v_head + index * params.v_batch_stride;
      for (; n < keys && slot < s.page_size; ++n, ++slot) {
        k_rows[n] = k + slot * params.k_row_stride;
        v_rows[n] = v + slot * params.v_row_stride;
      }
    }
  }

  // Rows in groups of KEY_GROUP, those of a group interleaved: [count / KEY_GROUP][columns][4].
  template <typename Row>
  void interleave(int count, const Row& row_of, int columns, float* dst) const {
    const auto row = [&](int n) { return row_of(n < count ? n : count - 1); };
    for (int n = 0; n < count; n += KEY_GROUP) {
      const T *x0 = row(n), *x1 = row(n + 1), *x2 = row(n + 2), *x3 = row(n + 3);
      for (int i = 0; i < KEY_GROUP; ++i) prefetch_row(row(n + KEY_GROUP + i), columns);
      for (int d = 0; d < columns; d += 8) {
        Vec::store_interleaved(Vec::eight_load(x0 + d), Vec::eight_load(x1 + d),
                               Vec::eight_load(x2 + d), Vec::eight_load(x3 + d),
                               dst + n * columns + d * KEY_GROUP);
      }
    }
  }

  // Rows in columns of V_COLUMNS, column_stride apart, the last one filled with zeros to whole
  // vectors.
  template <typename Row>
  void cut_columns(int count, const Row& row_of, int columns, float* dst,
                   long long column_stride) const {
    const auto row = [&](int n) { return row_of(n < count ? n : count - 1); };
    for (int n = 0; n < count; ++n) {
      const T* x = row(n);
      prefetch_row(row(n + KEY_GROUP), columns);
      for (int d = 0; d < round_up(columns, WIDTH); d += 8) {
        const auto x_d = d < columns ? Vec::eight_load(x + d) : Vec::eight_set1(0.0f);
        Vec::eight_store(dst + n * V_COLUMNS + d / V_COLUMNS * column_stride + d % V_COLUMNS, x_d);
      }
    }
  }

  bool is_capped() const { return params.terms.softcap > 0; }

  // Caps the scores of S^T[keys][rows].
  template <int NV>
  FLASHMOE_NOINLINE void cap_scores(int keys) const {
    const float softcap = params.terms.softcap;
    const float most = 0x1.fffffep127f, factor = params.softmax_scale / softcap;
    softcap_panel<Vec, NV>(keys, factor < most ? factor : most, softcap, s_t);
  }

  // Makes scores of S^T[keys][rows], whose keys are counted from first_key, what ALiBi says, or
  // where something is to be added to them, scales them.
  template <int NV>
  FLASHMOE_NOINLINE void add_terms(long long panel_begin, int rows, long long first_key,
                                   int keys) const {
    const Terms& terms = params.terms;
    const float scale = is_capped() ? 1.0f : params.softmax_scale / score_scale;
    if (terms.alibi_slopes != nullptr) {
      for (int lane = 0; lane < NV * WIDTH; ++lane) {
        const long long row = panel_begin + (lane < rows ? lane : rows - 1);
        const float* of_batch = terms.alibi_slopes + task.batch * terms.alibi_batch_stride;
        slopes[lane] = of_batch[query_head(row)] / score_scale;
        positions[lane] = static_cast<float>(row / group + seqlen_kv - seqlen_q - first_key);
      }
      alibi_panel<Vec, NV>(keys, scale, slopes, positions, s_t);
    } else if (scale != 1.0f) {
      scale_panel<Vec, NV>(keys, scale, s_t);
    }
  }

  MaskRow mask_of(long long row) const {
    return mask_row(params.terms.attn_mask, task.batch, query_head(row), row / group);
  }
  // Whether one row serves all.
  bool is_key_mask() const {
    return params.terms.attn_mask.row_stride == 0 && params.terms.attn_mask.head_stride == 0;
  }

  // Whether attn_mask lets any of these rows see any of the keys from `begin` to `end` - 1.
  bool mask_sees_any(long long row_begin, long long row_end, int begin, int end) const {
    const long long first = task.sequence.k_begin;
    if (is_key_mask()) row_end = row_begin + 1;
    for (long long row = row_begin; row < row_end; ++row) {
      if (mask_of(row).sees_any(first + begin, first + end)) return true;
    }
    return false;
  }

  // Adds attn_mask to S^T[keys][rows], whose keys are counted from first_key.
  FLASHMOE_NOINLINE void add_mask(long long panel_begin, int rows, long long first_key, int keys) {
    const long long first = task.sequence.k_begin + first_key;
    // What scores are still to be multiplied by is divided out.
    const float factor = 1.0f / score_scale;
    if (!is_key_mask()) {
      for (int lane = 0; lane < rows; ++lane) {
        mask_of(panel_begin + lane).add_to(first, keys, factor, s_t + lane, PANEL);
      }
      return;
    }
    const MaskRow row = mask_of(panel_begin);
    for (int n = 0; n < keys; ++n) {
      const float value = row[first + n];
      if (value == 0.0f) continue;
      const bool hides = value == -__builtin_inff();
      for (float* s = s_t + n * PANEL; s < s_t + n * PANEL + rows; ++s) {
        *s = hides ? value : *s + value * factor;
      }
    }
  }

  // The first keys' scores become -inf in rows that see only later ones. softmax_panel masks those
  // that rows no longer see.
  template <int NV>
  FLASHMOE_NOINLINE void mask_first(int keys) {
    const auto neg_inf = Vec::set1(-__builtin_inff());
    for (int n = 0; n < keys; ++n) {
      for (int j = 0; j < NV; ++j) {
        float* s = s_t + n * PANEL + j * WIDTH;
        const auto begin = Vec::load(key_begin + j * WIDTH);
        const auto key = Vec::set1(static_cast<float>(n));
        Vec::store(s, Vec::select_greater(begin, key, neg_inf, Vec::load(s)));
      }
    }
  }

  // Online softmax of S^T[keys][rows], in place; keys from `common` on are masked by key_end.
  // Returns whether any row's maximum moved, i.e. whether O must be rescaled by alpha.
  template <int NV>
  FLASHMOE_NOINLINE bool softmax_panel(int common, int keys, float* m, float* l) {
    const auto neg_inf = Vec::set1(-__builtin_inff());
    bool moved = false;
    for (int j = 0; j < NV; ++j) {
      float* s = s_t + j * WIDTH;
      const auto m_old = Vec::load(m + j * WIDTH);
      // max(a, b) is b when either is NaN: a NaN score is skipped here and poisons the sum below.
      auto m_even = m_old, m_odd = neg_inf;
      int n = 0;
      for (; n + 2 <= common; n += 2) {
        m_even = Vec::max(Vec::load(s + n * PANEL), m_even);
        m_odd = Vec::max(Vec::load(s + (n + 1) * PANEL), m_odd);
      }
      if (n < common) m_odd = Vec::max(Vec::load(s + n * PANEL), m_odd);
      const auto end_j = Vec::load(key_end + j * WIDTH);
      for (n = common; n < keys; ++n) {
        const auto masked = Vec::select_greater(end_j, Vec::set1(static_cast<float>(n)),
                                                Vec::load(s + n * PANEL), neg_inf);
        Vec::store(s + n * PANEL, masked);
        m_odd = Vec::max(masked, m_odd);
      }
      const auto m_new = Vec::max(m_even, m_odd);
      // A row that has seen nothing yet keeps -inf; -inf - (-inf) would make it NaN.
      const auto m_used = Vec::select_greater(m_new, neg_inf, m_new, Vec::set1(0.0f));
      // The difference is scaled, not the scores: scaling a score rounds it by its own magnitude.
      const auto scale = Vec::set1(score_scale * LOG2_E);
      const auto alpha_j = exp2_nonpositive<Vec>(Vec::mul(Vec::sub(m_old, m_used), scale));
      auto sum = Vec::set1(0.0f);
      for (n = 0; n < keys; ++n) {
        const auto difference = Vec::sub(Vec::load(s + n * PANEL), m_used);
        const auto p = exp2_nonpositive<Vec>(Vec::mul(difference, scale), p_shift);
        Vec::store(s + n * PANEL, p);
        sum = Vec::add(sum, p);
      }
      Vec::store(m + j * WIDTH, m_new);
      Vec::store(l + j * WIDTH, Vec::fma(Vec::load(l + j * WIDTH), alpha_j, sum));
      Vec::store(alpha + j * WIDTH, alpha_j);
      moved |= Vec::any_not_equal(alpha_j, Vec::set1(1.0f));
    }
    return moved;
  }

  // Makes 0 of those of P^T[keys][rows] that dropout drops. Keys are counted from first_key.
  FLASHMOE_NOINLINE void drop_weights(long long panel_begin, int rows, long long first_key,
                                      int keys) const {
    unsigned row_counters[PANEL], heads[PANEL], words[2][PANEL];
    bool lower[PANEL];  // half of a tile of 16 rows
    for (int lane = 0; lane < PANEL; ++lane) {
      const long long row = panel_begin + (lane < rows ? lane : rows - 1);
      const unsigned position = static_cast<unsigned>(row / group);
      row_counters[lane] = Dropout::row_counter(position);
      heads[lane] = static_cast<unsigned>(query_head(row));
      lower[lane] = position & 8;
    }
    const Dropout dropout = Dropout::of(params.terms, task.batch, 0);
    const unsigned limit = dropout.limit;
    for (long long tile = first_key & ~15ll; tile < first_key + keys; tile += 16) {
      for (int pair = 0; pair < 8; pair += 2) {
        const unsigned column = Dropout::column_counter(static_cast<unsigned>(tile + pair));
        for (int lane = 0; lane < PANEL; ++lane) {
          const Philox bits = philox(
              {{row_counters[lane], column, dropout.counter2, dropout.counter3 + heads[lane]}},
              dropout.key0, dropout.key1);
          words[0][lane] = lower[lane] ? bits.x[1] : bits.x[0];
          words[1][lane] = lower[lane] ? bits.x[3] : bits.x[2];
        }
        for (int i = 0; i < 4; ++i) {
          const int column = i / 2 * 8 + i % 2;
          const long long n = tile + pair + column - first_key;
          if (n < 0 || n >= keys) continue;
          for (int lane = 0; lane < PANEL; ++lane) {
            float& p = s_t[n * PANEL + lane];
            const unsigned mine = words[column / 8][lane] >> column % 2 * 16 & 0xffff;
            p = mine <= limit ? p : 0.0f;
          }
        }
      }
    }
  }

  // O[rows][NV vectors] += P . V for one column of V.
  template <int NV>
  void pv_panel(int rows, const float* v, Accumulate accumulate, float* o_panel) const {
    for (int i = 0; i < rows; i += Vec::PV_ROWS) {
      const int group_rows = rows - i < Vec::PV_ROWS ? rows - i : Vec::PV_ROWS;
      const float *begin = key_begin + i, *end = key_end + i;
      const int last = group_rows - 1;
      // Neither limit ever decreases with the row: all rows see from where the last begins to where
      // the first ends. Outside that each row goes alone, between its own limits, so a V row meets
      // only queries that may see it.
      const int group_end = static_cast<int>(end[0]);
      const int group_begin = begin[last] < end[0] ? static_cast<int>(begin[last]) : group_end;
      float* o_group = o_panel + i * o_stride;
      pv_rows<Vec, Vec::PV_ROWS, NV>(group_rows, group_end - group_begin,
                                     s_t + group_begin * PANEL + i, v + group_begin * V_COLUMNS,
                                     accumulate, alpha + i, o_group, o_stride);
      const auto add_alone = [&](int r, int from, int to) {
        if (from >= to) return;
        pv_tile<Vec, 1, NV>(to - from, s_t + from * PANEL + i + r, v + from * V_COLUMNS,
                            Accumulate::add, alpha, o_group + r * o_stride, o_stride);
      };
      for (int r = 0; begin[r] < group_begin; ++r) {  // the last row's is no less
        add_alone(r, static_cast<int>(begin[r]), group_begin);
      }
      for (int r = 1; r < group_rows; ++r) {
        const int from = begin[r] < end[0] ? group_end : static_cast<int>(begin[r]);
        add_alone(r, from, static_cast<int>(end[r]));
      }
    }
  }

  // What a panel of rows sees of a tile: `keys` of them from its `skipped` on, a multiple of
  // KEY_GROUP, in which K is staged. All rows see those from common_begin to common_end - 1.
  struct Seen {
    int skipped, keys, common_begin, common_end;
  };

  // And sets key_begin and key_end. No keys: no row sees any.
  template <int NV>
  FLASHMOE_INLINE Seen seen_of(long long panel_begin, int rows, long long n_begin, int tile_keys) {
    // Some row of the panel sees [first.begin, last.end), all see [last.begin, first.end).
    const KeyRange first = visible_keys(panel_begin), last = visible_keys(panel_begin + rows - 1);
    const auto in_tile = [&](int key) {
      return static_cast<int>(clamp<long long>(key - n_begin, 0, tile_keys));
    };
    if (in_tile(first.begin) == in_tile(last.end)) return {};
    const int skipped = in_tile(first.begin) / KEY_GROUP * KEY_GROUP;
    const int keys = in_tile(last.end) - skipped;
    const int common_begin = in_tile(last.begin) - skipped;
    const int common_end = in_tile(first.end) - skipped;
    const int n_first = static_cast<int>(n_begin) + skipped;
    if (task.is_masked &&
        !mask_sees_any(panel_begin, panel_begin + rows, n_first, n_first + keys)) {
      return {};
    }
    if (common_begin == 0 && common_end == keys) {
      for (int i = 0; i < NV * WIDTH; ++i) key_begin[i] = 0.0f;
      for (int i = 0; i < NV * WIDTH; ++i) key_end[i] = static_cast<float>(keys);
      return {skipped, keys, common_begin, common_end};
    }
    int position = static_cast<int>(panel_begin / group);
    // Lanes behind the last row have its limits.
    for (int i = 0; i < NV * WIDTH; ++position) {
      const KeyRange seen = visible_at(position);
      const int next = static_cast<int>((position + 1ll) * group - panel_begin);
      const int end = next < rows ? next : NV * WIDTH;
      for (; i < end; ++i) {
        key_begin[i] = static_cast<float>(in_tile(seen.begin) - skipped);
        key_end[i] = static_cast<float>(in_tile(seen.end) - skipped);
      }
    }
    return {skipped, keys, common_begin, common_end};
  }

  // Adds the staged keys [n_begin, n_begin + tile_keys) to one panel of rows. Not inlined: three
  // copies in add_keys cost 1 % (Zen 4, 1024 x 1024, head_dim 64).
  template <int NV>
  FLASHMOE_NOINLINE void add_tile(long long panel_begin, int rows, long long n_begin,
                                  int tile_keys) {
    if constexpr (NV > 1) {
      if (rows <= (NV - 1) * WIDTH) {
        return add_tile<NV - 1>(panel_begin, rows, n_begin, tile_keys);
      }
    }
    const auto [skipped, keys, common_begin, common_end] =
        seen_of<NV>(panel_begin, rows, n_begin, tile_keys);
    if (keys == 0) return;

    const long long local = panel_begin - task.row_begin;
    qk_panel<Vec, NV>(keys, k_tile + skipped * head_dim, q_t + local * head_dim, head_dim, s_t);
    if (is_capped()) cap_scores<NV>(keys);
    if (is_added_to()) add_terms<NV>(panel_begin, rows, n_begin + skipped, keys);
    if (task.is_masked) add_mask(panel_begin, rows, n_begin + skipped, keys);
    if (common_begin > 0) mask_first<NV>(common_begin);
    // Of the panel: its O is not yet set.
    bool first_keys = visible_keys(panel_begin).begin >= n_begin;
    if (task.is_masked) {
      first_keys = true;
      for (int i = 0; i < rows; ++i) first_keys &= row_sum[local + i] == 0.0f;
    }
    const bool moved = softmax_panel<NV>(common_end, keys, row_max + local, row_sum + local);

    if (params.terms.rng_state != nullptr) {
      drop_weights(panel_begin, rows, n_begin + skipped, keys);
    }
    const Accumulate accumulate = first_keys ? Accumulate::overwrite
                                  : moved    ? Accumulate::rescale
                                             : Accumulate::add;
    float* o_panel = o + local * o_stride;
    const float* v = v_tile + skipped * V_COLUMNS;
    long long d = 0;
    for (; d + V_COLUMNS <= o_stride; d += V_COLUMNS) {
      pv_panel<2>(rows, v + d / V_COLUMNS * v_stride, accumulate, o_panel + d);
    }
    if (d < o_stride) pv_panel<1>(rows, v + d / V_COLUMNS * v_stride, accumulate, o_panel + d);
  }

  void write_row(long long row) const {
    const long long local = row - task.row_begin;
    const float sum = row_sum[local], max = row_max[local] * score_scale;
    // A row without keys: its O is whatever the scratch held.
    const bool empty = sum == 0.0f;
    const float powers = __builtin_ldexpf(1.0f, static_cast<int>(p_shift));
    float factor = empty ? 0.0f : 1.0f / sum;
    float lse = empty ? -__builtin_inff() : max + __builtin_logf(sum * powers);
    if (params.terms.sinks != nullptr) {
      const float sink = params.terms.sinks[query_head(row)];
      if (empty) {
        lse = sink;
      } else {
        const float top = sink > max ? sink : max, of_keys = __builtin_expf(max - top) * powers;
        const float total = sum * of_keys + __builtin_expf(sink - top);
        factor = of_keys / total;
        lse = top + __builtin_logf(total);
      }
    }
    if (params.terms.rng_state != nullptr) factor *= dropout_scale(params.terms.dropout_limit);
    T* dst = static_cast<T*>(params.out) +
             q_offset(row, params.o_batch_stride, params.o_row_stride, params.o_head_stride);
    const auto scale = Vec::eight_set1(factor);
    for (int d = 0; d < head_dim_v; d += 8) {
      const auto o_d = empty ? scale : Vec::eight_load(o + local * o_stride + d);
      Vec::eight_store(dst + d, Vec::eight_mul(o_d, scale));
    }
    params.softmax_lse[lse_offset(row)] = lse;
  }

  bool o_is_finite() const {
    for (long long row = 0; row < task.row_end - task.row_begin; ++row) {
      if (row_sum[row] == 0.0f) continue;  // without keys: whatever the scratch held
      for (int d = 0; d < head_dim_v; ++d) {
        if (!(__builtin_fabsf(o[row * o_stride + d]) < __builtin_inff())) return false;
      }
    }
    return true;
  }

  void run() {
    add_keys();
    if (!o_is_finite()) {
      // The values may be so large that their sum overflows before it is divided. Not from the
      // start: the smallest values would be lost.
      p_shift = 24.0f;
      add_keys();
    }
    for (long long row = task.row_begin; row < task.row_end; ++row) write_row(row);
  }

  // Sets O, the maxima and the sums of the task's rows.
  FLASHMOE_NOINLINE void add_keys() {
    for (long long begin = task.row_begin; begin < task.row_end; begin += PANEL) {
      const long long local = begin - task.row_begin;
      const int rows = static_cast<int>(clamp<long long>(task.row_end - begin, 0, PANEL));
      pack_q(begin, rows, q_t + local * head_dim);
      for (int i = 0; i < PANEL; ++i) {
        row_max[local + i] = -__builtin_inff();
        row_sum[local + i] = 0.0f;
      }
    }

    const long long kv_end = visible_keys(task.row_end - 1).end;
    for (long long n = visible_keys(task.row_begin).begin; n < kv_end; n += block_n) {
      const int keys = static_cast<int>(clamp<long long>(kv_end - n, 0, block_n));
      const int n_begin = static_cast<int>(n);
      if (task.is_masked && !mask_sees_any(task.row_begin, task.row_end, n_begin, n_begin + keys)) {
        continue;
      }
      stage(n, keys);
      for (long long begin = task.row_begin; begin < task.row_end; begin += PANEL) {
        const int rows = static_cast<int>(clamp<long long>(task.row_end - begin, 0, PANEL));
        add_tile<PANEL / WIDTH>(begin, rows, n, keys);
      }
    }
  }
};

template <class Vec>
long long scratch_floats(const AttentionParams& params, long long block_m, int block_n) {
  return BlockForward<Vec, float>(params, CpuTask{}, block_m, block_n, nullptr).floats;
}

template <class Vec>
void run_task(const AttentionParams& params, DType dtype, const CpuTask& task, long long block_m,
              int block_n, float* scratch) {
  switch (dtype) {
    case DType::float32:
      return BlockForward<Vec, float>(params, task, block_m, block_n, scratch).run();
    case DType::float16:
      return BlockForward<Vec, Half>(params, task, block_m, block_n, scratch).run();
    case DType::bfloat16:
      return BlockForward<Vec, BFloat16>(params, task, block_m, block_n, scratch).run();
  }
}

}  // namespace
}  // namespace flashmoe
