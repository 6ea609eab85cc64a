// The CPU backward kernel, over a vector type Vec of one instruction set, made of the forward's
// parts. Like those it has internal linkage and uses nothing of std.
//
// Per task (rows of one kv head) and block of block_m rows, for tiles of block_n keys and panels of
// rows, first of all tiles
//   P^T[key][row]   from S^T as in the forward, and softmax_lse
//   dP^T[key][row]  = V[key][:] . dO^T[:][row]
// which are kept, and with the sums of P and of P * dP of each row, of all tiles again
//   dS^T            = P^T * (dP^T - delta)
//   dV[key][:]     += P^T[key][row] * dO[row][:]
//   dQ[row][:]     += dS^T[key][row] * K[key][:]
//   dK[key][:]     += dS^T[key][row] * Q[row][:]
// Neither softmax_lse nor out would do instead of the sums: both are rounded, which at a
// softmax_lse of 20 makes every P of a row wrong by 1e-6 of it, and in 16 bits delta by more than
// what is left of dP where one key has all the weight.
//
// The rows of a block are brought to float32 once, the keys of a tile once for each block. The sums
// of dK and dV of all keys stay in memory, those of dQ until the block is done.
#pragma once

#include "backward/cpu/task.h"
#include "forward/cpu/kernel.h"

namespace flashmoe {
namespace {

template <class Vec, typename T>
struct BlockBackward : BlockForward<Vec, T> {
  using Forward = BlockForward<Vec, T>;
  using Seen = typename Forward::Seen;
  static constexpr int PANEL = Vec::PANEL, WIDTH = Vec::WIDTH, V_COLUMNS = Vec::V_COLUMNS;
  // softmax_lse is rounded by more than P may be where it is larger: those rows' maximum and sum
  // are computed again.
  static constexpr float LARGEST_LSE = 4096.0f, LARGEST_SHIFT = 1e37f;
  using Forward::alpha;
  using Forward::block_n;
  using Forward::head_dim;
  using Forward::head_dim_v;
  using Forward::k_tile;
  using Forward::key_begin;
  using Forward::key_end;
  using Forward::params;
  using Forward::q_t;
  using Forward::row_max;
  using Forward::row_sum;
  using Forward::s_t;
  using Forward::score_scale;
  using Forward::seqlen_kv;
  using Forward::task;

  const BackwardParams& backward;
  const BackwardTask& of_backward;
  const long long d_stride, dv_stride;   // head_dim and head_dim_v rounded up to whole vectors
  const long long k_stride, row_stride;  // of columns of block_n keys, and of PANEL rows

  float* do_t;                // [panel][head_dim_v][PANEL]
  float* q_cut;               // [panel][head_dim / V_COLUMNS][row_stride]
  float* do_cut;              // [panel][head_dim_v / V_COLUMNS][row_stride]
  float* k_cut;               // [head_dim / V_COLUMNS][k_stride]
  float* v_tile;              // [block_n / KEY_GROUP][head_dim_v][KEY_GROUP]
  float* p_t;                 // [tile][panel][block_n][PANEL] P, negative where it is dropped
  float* dp_t;                // likewise dP
  float* slope_t;             // likewise derivatives of softcap; with softcap
  float* ds_t;                // [block_n][PANEL] dS
  float* kept_t;              // [block_n][PANEL] P without what is dropped; with dropout
  float* dq;                  // [row][d_stride]
  float* dk;                  // [key][d_stride]
  float* dv;                  // [key][dv_stride]
  float* delta;               // [row], of the current block: the sum of P * dP first
  float* inverse;             // [row] what P of row_max is to be multiplied by
  long long block_begin = 0;  // the current block's first row
  long long floats;

  BlockBackward(const BackwardParams& backward, const BackwardTask& of_backward, long long block_m,
                int block_n, float* scratch)
      : Forward(backward.attention, of_backward.forward, block_m, block_n, scratch),
        backward(backward),
        of_backward(of_backward),
        d_stride(round_up(head_dim, WIDTH)),
        dv_stride(round_up(head_dim_v, WIDTH)),
        k_stride(static_cast<long long>(this->block_n) * V_COLUMNS + ALIGN_FLOATS),
        row_stride(static_cast<long long>(PANEL) * V_COLUMNS + ALIGN_FLOATS) {
    const long long rows = round_up(block_m, PANEL), panels = rows / PANEL;
    long long used = Forward::floats;
    const auto take = [&](long long count) {
      float* pointer = scratch + used;
      used += round_up(count, ALIGN_FLOATS);
      return pointer;
    };
    const Terms& terms = params.terms;
    const long long kept =
        (params.seqlen_kv + this->block_n - 1) / this->block_n * panels * square();
    do_t = take(rows * head_dim_v);
    q_cut = take(panels * columns(head_dim) * row_stride);
    do_cut = take(panels * columns(head_dim_v) * row_stride);
    k_cut = take(columns(head_dim) * k_stride);
    v_tile = take(static_cast<long long>(this->block_n) * head_dim_v);
    p_t = take(kept);
    dp_t = take(kept);
    slope_t = terms.softcap > 0 ? take(kept) : nullptr;
    ds_t = take(square());
    kept_t = terms.rng_state != nullptr ? take(square()) : nullptr;
    dq = take(rows * d_stride);
    delta = take(rows);
    inverse = take(rows);
    if (of_backward.sums != nullptr) {
      dk = of_backward.sums + of_backward.part * part_floats();
      dv = dk + params.seqlen_kv * d_stride;
    } else {
      dk = take(params.seqlen_kv * d_stride);
      dv = take(params.seqlen_kv * dv_stride);
    }
    floats = used;
  }

  // Floats of P of a tile and panel.
  long long square() const { return static_cast<long long>(block_n) * PANEL; }

  // Of dk and dv of a part of a task.
  long long part_floats() const { return params.seqlen_kv * (d_stride + dv_stride); }
  static long long columns(int head_dim) { return (head_dim + V_COLUMNS - 1) / V_COLUMNS; }

  void stage_rows(long long begin, int rows) const {
    const long long local = begin - block_begin;
    this->pack_q(begin, rows, q_t + local * head_dim);
    const BackwardParams& b = backward;
    this->pack(b.dout, b.do_batch_stride, b.do_row_stride, b.do_head_stride, head_dim_v, begin,
               rows, do_t + local * head_dim_v);
    const auto dout_row = [&](int i) {
      return static_cast<const T*>(b.dout) +
             this->q_offset(begin + i, b.do_batch_stride, b.do_row_stride, b.do_head_stride);
    };
    const auto q_row = [&](int i) {
      return static_cast<const T*>(params.q) + this->q_offset(begin + i, params.q_batch_stride,
                                                              params.q_row_stride,
                                                              params.q_head_stride);
    };
    const long long panel = local / PANEL;
    this->cut_columns(rows, q_row, head_dim, q_cut + panel * columns(head_dim) * row_stride,
                      row_stride);
    this->cut_columns(rows, dout_row, head_dim_v, do_cut + panel * columns(head_dim_v) * row_stride,
                      row_stride);
    for (int i = 0; i < rows; ++i) {
      const float lse = params.softmax_lse[this->lse_offset(begin + i)];
      // Of a row that sees nothing P is 0.
      row_max[local + i] = lse == -__builtin_inff() ? __builtin_inff() : lse / score_scale;
      inverse[local + i] = 1.0f;
    }
  }

  bool is_coarse(long long row) const {
    const float lse = params.softmax_lse[this->lse_offset(row)];
    if (lse == -__builtin_inff()) return false;
    const float shift = row_max[row - block_begin];
    return !(__builtin_fabsf(lse) < LARGEST_LSE && __builtin_fabsf(shift) < LARGEST_SHIFT);
  }

  const T* k_row(long long n) const { return this->k_head + n * params.k_row_stride; }
  const T* v_row(long long n) const { return this->v_head + n * params.v_row_stride; }

  void stage_v(long long n_begin, int keys) const {
    this->interleave(keys, [&](int n) { return v_row(n_begin + n); }, head_dim_v, v_tile);
  }
  void stage_k(long long n_begin, int keys) const {
    this->interleave(keys, [&](int n) { return k_row(n_begin + n); }, head_dim, k_tile);
  }
  void cut_k(long long n_begin, int keys) const {
    this->cut_columns(keys, [&](int n) { return k_row(n_begin + n); }, head_dim, k_cut, k_stride);
  }

  // S^T of what a panel sees of the staged keys, with its terms but for the mask's limits.
  template <int NV>
  void compute_scores(long long panel_begin, int rows, long long first_key, const Seen& seen,
                      float* slope) {
    const long long local = panel_begin - block_begin;
    qk_panel<Vec, NV>(seen.keys, k_tile + seen.skipped * head_dim, q_t + local * head_dim, head_dim,
                      s_t);
    if (this->is_capped()) {
      this->template cap_scores<NV>(seen.keys);
      if (slope != nullptr) differentiate_cap<NV>(seen.keys, slope);
    }
    if (this->is_added_to()) {
      this->template add_terms<NV>(panel_begin, rows, first_key, seen.keys);
    }
    if (task.is_masked) this->add_mask(panel_begin, rows, first_key, seen.keys);
  }

  template <int NV>
  FLASHMOE_NOINLINE void differentiate_cap(int keys, float* slope) const {
    const auto one = Vec::set1(1.0f), per_cap = Vec::set1(1.0f / params.terms.softcap);
    for (int n = 0; n < keys; ++n) {
      for (int j = 0; j < NV * WIDTH; j += WIDTH) {
        const auto x = Vec::mul(Vec::load(s_t + n * PANEL + j), per_cap);
        Vec::store(slope + n * PANEL + j, Vec::sub(one, Vec::mul(x, x)));
      }
    }
  }

  // Sets row_max and inverse of the rows from their scores.
  FLASHMOE_NOINLINE void recompute_statistics(long long begin, long long end) {
    for (long long i = 0; i < end - begin; ++i) {
      row_max[i] = -__builtin_inff();
      row_sum[i] = 0.0f;
    }
    for_each_tile(begin, end, [&](long long n, int keys) {
      stage_k(n, keys);
      for_each_panel(begin, end, [&](long long panel, int rows) {
        add_statistics<PANEL / WIDTH>(panel, rows, n, keys);
      });
    });
    for (long long i = 0; i < end - begin; ++i) {
      if (row_sum[i] == 0.0f) {  // a row that sees nothing
        row_max[i] = __builtin_inff();
        continue;
      }
      inverse[i] = 1.0f / row_sum[i];
      if (params.terms.sinks == nullptr) continue;
      const float sink = params.terms.sinks[this->query_head(begin + i)];
      const float max = row_max[i] * score_scale, top = sink > max ? sink : max;
      const float of_keys = __builtin_expf(max - top);
      inverse[i] = of_keys / (row_sum[i] * of_keys + __builtin_expf(sink - top));
    }
  }

  template <int NV>
  void add_statistics(long long panel_begin, int rows, long long n_begin, int tile_keys) {
    const Seen seen = this->template seen_of<NV>(panel_begin, rows, n_begin, tile_keys);
    if (seen.keys == 0) return;
    compute_scores<NV>(panel_begin, rows, n_begin + seen.skipped, seen, nullptr);
    if (seen.common_begin > 0) this->template mask_first<NV>(seen.common_begin);
    const long long local = panel_begin - block_begin;
    this->template softmax_panel<NV>(seen.common_end, seen.keys, row_max + local, row_sum + local);
  }

  // P^T from S^T in s_t, 0 where a row does not see a key, and its sums.
  template <int NV>
  FLASHMOE_NOINLINE void exponentiate(const Seen& seen, long long local, float* p) const {
    const auto neg_inf = Vec::set1(-__builtin_inff());
    const auto scale = Vec::set1(score_scale * LOG2_E);
    for (int j = 0; j < NV * WIDTH; j += WIDTH) {
      const auto max_j = Vec::load(row_max + local + j), factor = Vec::load(inverse + local + j);
      const auto begin = Vec::load(key_begin + j), end = Vec::load(key_end + j);
      auto sum = Vec::load(row_sum + local + j);
      for (int n = 0; n < seen.keys; ++n) {
        auto x = Vec::load(s_t + n * PANEL + j);
        if (n < seen.common_begin || n >= seen.common_end) {
          const auto key = Vec::set1(static_cast<float>(n));
          x = Vec::select_greater(begin, key, neg_inf, Vec::select_greater(end, key, x, neg_inf));
        }
        // The difference is scaled, not the scores: scaling a score rounds it by its own magnitude.
        const auto power = exp2_nonpositive<Vec>(Vec::mul(Vec::sub(x, max_j), scale));
        const auto weight = Vec::mul(power, factor);
        Vec::store(p + n * PANEL + j, weight);
        sum = Vec::add(sum, weight);
      }
      Vec::store(row_sum + local + j, sum);
    }
  }

  // Adds P * dP to delta. With dropout P of `kept` says what is dropped: P becomes negative there,
  // and dP 0, which is multiplied by what the others are.
  template <int NV>
  FLASHMOE_NOINLINE void add_delta(int keys, long long local, float* p, float* dp) const {
    const bool drops = params.terms.rng_state != nullptr;
    const auto zero = Vec::set1(0.0f), rescale = Vec::set1(dropout_factor());
    for (int j = 0; j < NV * WIDTH; j += WIDTH) {
      auto sum = Vec::load(delta + local + j);
      for (int n = 0; n < keys; ++n) {
        const long long at = n * PANEL + j;
        const auto weight = Vec::load(p + at);
        auto x = Vec::load(dp + at);
        if (drops) {
          const auto kept = Vec::load(kept_t + at);
          x = Vec::select_greater(kept, zero, Vec::mul(x, rescale), zero);
          Vec::store(p + at, Vec::select_greater(kept, zero, weight, Vec::sub(zero, weight)));
          Vec::store(dp + at, x);
        }
        sum = Vec::fma(weight, x, sum);
      }
      Vec::store(delta + local + j, sum);
    }
  }

  // dS^T = P^T * (dP^T - delta), P being `p` times `inverse`.
  template <int NV>
  FLASHMOE_NOINLINE void differentiate(int keys, long long local, const float* p, const float* dp,
                                       const float* slope) const {
    const auto zero = Vec::set1(0.0f);
    for (int j = 0; j < NV * WIDTH; j += WIDTH) {
      const auto delta_j = Vec::load(delta + local + j), factor = Vec::load(inverse + local + j);
      for (int n = 0; n < keys; ++n) {
        const long long at = n * PANEL + j;
        auto weight = Vec::load(p + at);
        if (kept_t != nullptr) {
          Vec::store(kept_t + at, Vec::max(weight, zero));
          weight = Vec::max(weight, Vec::sub(zero, weight));
        }
        auto ds = Vec::mul(Vec::mul(weight, factor), Vec::sub(Vec::load(dp + at), delta_j));
        if (slope != nullptr) ds = Vec::mul(ds, Vec::load(slope + at));
        Vec::store(ds_t + at, ds);
      }
    }
  }

  float dropout_factor() const {
    return params.terms.rng_state == nullptr ? 1.0f : dropout_scale(params.terms.dropout_limit);
  }

  // sum[rows][head_dim] += X . Y, of X^T[count][rows] or X[rows][count] in lines of PANEL.
  template <Lines LINES>
  void add_product(int rows, int count, const float* x, const float* y, long long column_stride,
                   float* sum, long long stride) const {
    constexpr int STEP = LINES == Lines::of_sum ? 1 : PANEL;
    for (long long d = 0; d < stride; d += V_COLUMNS, y += column_stride) {
      for (int i = 0; i < rows; i += Vec::PV_ROWS) {
        const int some = rows - i < Vec::PV_ROWS ? rows - i : Vec::PV_ROWS;
        float* to = sum + i * stride + d;
        if (d + V_COLUMNS <= stride) {
          pv_rows<Vec, Vec::PV_ROWS, 2, LINES>(some, count, x + i * STEP, y, Accumulate::add, alpha,
                                               to, stride);
        } else {
          pv_rows<Vec, Vec::PV_ROWS, 1, LINES>(some, count, x + i * STEP, y, Accumulate::add, alpha,
                                               to, stride);
        }
      }
    }
  }

  // Sets P, dP and with softcap its derivative of what a panel sees of a tile, and adds to the
  // sums.
  template <int NV>
  FLASHMOE_NOINLINE void weigh(long long panel_begin, int rows, long long n_begin, int tile_keys,
                               long long place) {
    if constexpr (NV > 1) {
      if (rows <= (NV - 1) * WIDTH) {
        return weigh<NV - 1>(panel_begin, rows, n_begin, tile_keys, place);
      }
    }
    const Seen seen = this->template seen_of<NV>(panel_begin, rows, n_begin, tile_keys);
    if (seen.keys == 0) return;
    const long long local = panel_begin - block_begin, first_key = n_begin + seen.skipped;
    float *p = p_t + place, *dp = dp_t + place;
    compute_scores<NV>(panel_begin, rows, first_key, seen,
                       slope_t == nullptr ? nullptr : slope_t + place);
    exponentiate<NV>(seen, local, p);
    if (kept_t != nullptr) {
      __builtin_memcpy(kept_t, p, static_cast<unsigned long>(seen.keys) * PANEL * sizeof(float));
      float* scores = s_t;
      s_t = kept_t;
      this->drop_weights(panel_begin, rows, first_key, seen.keys);
      s_t = scores;
    }
    qk_panel<Vec, NV>(seen.keys, v_tile + seen.skipped * head_dim_v, do_t + local * head_dim_v,
                      head_dim_v, dp);
    add_delta<NV>(seen.keys, local, p, dp);
  }

  // Adds what a panel and a tile have of the gradients.
  template <int NV>
  FLASHMOE_NOINLINE void add_gradients(long long panel_begin, int rows, long long n_begin,
                                       int tile_keys, long long place) {
    if constexpr (NV > 1) {
      if (rows <= (NV - 1) * WIDTH) {
        return add_gradients<NV - 1>(panel_begin, rows, n_begin, tile_keys, place);
      }
    }
    const Seen seen = this->template seen_of<NV>(panel_begin, rows, n_begin, tile_keys);
    if (seen.keys == 0) return;
    const long long local = panel_begin - block_begin, panel = local / PANEL;
    const long long first_key = n_begin + seen.skipped;
    differentiate<NV>(seen.keys, local, p_t + place, dp_t + place,
                      slope_t == nullptr ? nullptr : slope_t + place);
    add_product<Lines::of_result>(seen.keys, rows, kept_t != nullptr ? kept_t : p_t + place,
                                  do_cut + panel * columns(head_dim_v) * row_stride, row_stride,
                                  dv + first_key * dv_stride, dv_stride);
    add_product<Lines::of_sum>(rows, seen.keys, ds_t, k_cut + seen.skipped * V_COLUMNS, k_stride,
                               dq + local * d_stride, d_stride);
    add_product<Lines::of_result>(seen.keys, rows, ds_t,
                                  q_cut + panel * columns(head_dim) * row_stride, row_stride,
                                  dk + first_key * d_stride, d_stride);
  }

  // Once the sums are known: makes `inverse` what P has to be multiplied by, delta what is taken
  // from dP, and divides dO by the sum, which dV then needs no more.
  void normalize(long long begin, long long end) const {
    for (long long row = begin; row < end; ++row) {
      const long long i = row - begin;
      float sum = row_sum[i];
      if (params.terms.sinks != nullptr) {
        const float sink = params.terms.sinks[this->query_head(row)];
        sum += __builtin_expf((sink / score_scale - row_max[i]) * score_scale) * inverse[i];
      }
      // A row that sees nothing has no sum, and a softmax_lse that depends on nothing.
      const float factor = row_sum[i] == 0.0f ? 0.0f : 1.0f / sum;
      inverse[i] = factor;
      delta[i] *= factor;
      if (backward.dlse != nullptr && factor != 0.0f)
        delta[i] -= backward.dlse[this->lse_offset(row)];
      float* dout = do_cut + i / PANEL * columns(head_dim_v) * row_stride + i % PANEL * V_COLUMNS;
      const auto scale = Vec::set1(factor);
      for (long long column = 0; column < columns(head_dim_v); ++column, dout += row_stride) {
        for (int d = 0; d < V_COLUMNS; d += WIDTH) {
          Vec::store(dout + d, Vec::mul(Vec::load(dout + d), scale));
        }
      }
    }
  }

  template <typename Visit>
  void for_each_panel(long long begin, long long end, const Visit& visit) const {
    for (long long row = begin; row < end; row += PANEL) {
      visit(row, static_cast<int>(clamp<long long>(end - row, 0, PANEL)));
    }
  }

  // The tiles of keys that some of these rows see.
  template <typename Visit>
  void for_each_tile(long long begin, long long end, const Visit& visit) const {
    const long long kv_end = this->visible_keys(end - 1).end;
    for (long long n = this->visible_keys(begin).begin; n < kv_end; n += block_n) {
      const int first = static_cast<int>(n);
      const int keys = static_cast<int>(clamp<long long>(kv_end - n, 0, block_n));
      if (task.is_masked && !this->mask_sees_any(begin, end, first, first + keys)) continue;
      visit(n, keys);
    }
  }

  void write(const float* from, float scale, int columns, T* to) const {
    const auto factor = Vec::eight_set1(scale);
    for (int d = 0; d < columns; d += 8) {
      Vec::eight_store(to + d, Vec::eight_mul(Vec::eight_load(from + d), factor));
    }
  }

  // Where a row of dq begins, which is contiguous.
  T* dq_row(long long row) const {
    const long long position = static_cast<long long>(this->q_batch) * params.seqlen_q +
                               task.sequence.q_begin + row / this->group;
    return static_cast<T*>(backward.dq) +
           (position * params.heads_q + this->query_head(row)) * head_dim;
  }

  FLASHMOE_NOINLINE void add_rows(long long begin, long long end) {
    block_begin = begin;
    bool coarse = false;
    for_each_panel(begin, end, [&](long long panel, int rows) { stage_rows(panel, rows); });
    for (long long row = begin; row < end; ++row) coarse |= is_coarse(row);
    if (coarse) recompute_statistics(begin, end);
    fill_zeros(dq, (end - begin) * d_stride);
    const long long panels = round_up(end - begin, PANEL) / PANEL;
    const long long first = this->visible_keys(begin).begin;
    // Where what is kept of a tile and panel is.
    const auto place = [&](long long n, long long row) {
      return ((n - first) / block_n * panels + (row - begin) / PANEL) * square();
    };
    fill_zeros(row_sum, panels * PANEL);
    fill_zeros(delta, panels * PANEL);
    for_each_tile(begin, end, [&](long long n, int keys) {
      stage_k(n, keys);
      stage_v(n, keys);
      for_each_panel(begin, end, [&](long long row, int rows) {
        weigh<PANEL / WIDTH>(row, rows, n, keys, place(n, row));
      });
    });
    normalize(begin, end);
    for_each_tile(begin, end, [&](long long n, int keys) {
      cut_k(n, keys);
      for_each_panel(begin, end, [&](long long row, int rows) {
        add_gradients<PANEL / WIDTH>(row, rows, n, keys, place(n, row));
      });
    });
    for (long long row = begin; row < end; ++row) {
      write(dq + (row - begin) * d_stride, params.softmax_scale, head_dim, dq_row(row));
    }
  }

  static void fill_zeros(float* x, long long count) {
    __builtin_memset(x, 0, static_cast<unsigned long>(count) * sizeof(float));
  }

  void write_keys(int begin, int end) const {
    const long long first =
        static_cast<long long>(task.kv_batch) * params.seqlen_kv + task.sequence.k_begin;
    for (int n = begin; n < end; ++n) {
      const long long head = (first + n) * params.heads_kv + task.head_kv;
      write(dk + n * d_stride, params.softmax_scale, head_dim,
            static_cast<T*>(backward.dk) + head * head_dim);
      write(dv + n * dv_stride, dropout_factor(), head_dim_v,
            static_cast<T*>(backward.dv) + head * head_dim_v);
    }
  }

  void run(long long block_m) {
    fill_zeros(dk, seqlen_kv * d_stride);
    fill_zeros(dv, seqlen_kv * dv_stride);
    const long long step = of_backward.num_parts * block_m;
    for (long long row = of_backward.part * block_m; row < task.row_end; row += step) {
      add_rows(row, clamp(row + block_m, row, task.row_end));
    }
    if (of_backward.sums == nullptr) write_keys(0, seqlen_kv);
  }

  // Adds up what the parts of a task left, in their order, for the keys from `begin` to `end` - 1.
  void combine(int begin, int end) const {
    for (int part = 1; part < of_backward.num_parts; ++part) {
      const long long behind = part * part_floats();
      add(dk + begin * d_stride, dk + behind + begin * d_stride, (end - begin) * d_stride);
      add(dv + begin * dv_stride, dv + behind + begin * dv_stride, (end - begin) * dv_stride);
    }
    write_keys(begin, end);
  }
  static void add(float* to, const float* from, long long count) {
    for (long long i = 0; i < count; i += WIDTH) {
      Vec::store(to + i, Vec::add(Vec::load(to + i), Vec::load(from + i)));
    }
  }
};

template <class Vec>
long long backward_scratch_floats(const BackwardParams& params, const BackwardTask& task,
                                  long long block_m, int block_n) {
  return BlockBackward<Vec, float>(params, task, block_m, block_n, nullptr).floats;
}

template <class Vec>
long long part_floats(const BackwardParams& params) {
  return BlockBackward<Vec, float>(params, BackwardTask{}, 1, 1, nullptr).part_floats();
}

template <class Vec, typename Visit>
void with_backward(const BackwardParams& params, DType dtype, const BackwardTask& task,
                   long long block_m, int block_n, float* scratch, const Visit& visit) {
  switch (dtype) {
    case DType::float32:
      return visit(BlockBackward<Vec, float>(params, task, block_m, block_n, scratch));
    case DType::float16:
      return visit(BlockBackward<Vec, Half>(params, task, block_m, block_n, scratch));
    case DType::bfloat16:
      return visit(BlockBackward<Vec, BFloat16>(params, task, block_m, block_n, scratch));
  }
}

template <class Vec>
void run_backward(const BackwardParams& params, DType dtype, const BackwardTask& task,
                  long long block_m, int block_n, float* scratch) {
  with_backward<Vec>(params, dtype, task, block_m, block_n, scratch,
                     [&](auto block) { block.run(block_m); });
}

template <class Vec>
void combine_parts(const BackwardParams& params, DType dtype, const BackwardTask& task, int begin,
                   int end) {
  with_backward<Vec>(params, dtype, task, 1, 1, nullptr,
                     [&](const auto& block) { block.combine(begin, end); });
}

template <class Vec>
constexpr CpuBackwardKernel cpu_backward_of() {
  return {backward_scratch_floats<Vec>, part_floats<Vec>, run_backward<Vec>, combine_parts<Vec>};
}

}  // namespace
}  // namespace flashmoe
