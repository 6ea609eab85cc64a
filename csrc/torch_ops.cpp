// The binding: schemas, checks, allocation, stream, launch. The only file that includes torch, and
// only its stable ABI, so one binary serves torch 2.10 to 2.13.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdio>
#include <deque>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "backward/cpu/backward.h"
#include "common/params.h"
#include "forward/cpu/forward.h"
#include "instances/registry.h"

#ifdef __linux__
#include <dlfcn.h>
#endif

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // headers before torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace flashmoe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

bool same_device(const Tensor& a, const Tensor& b) {
  int32_t types[2];
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &types[0]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &types[1]));
  return types[0] == types[1] && a.get_device_index() == b.get_device_index();
}

// What a call may have besides q, k, v, softmax_scale and a window; the schemas' names.
struct Options {
  double softcap = 0;
  std::optional<Tensor> alibi_slopes{}, sinks{};
  double dropout_p = 0;
  std::optional<Tensor> rng_state{}, attn_mask{};
  std::optional<Tensor> cu_seqlens_q{}, cu_seqlens_k{}, seqused_k{}, leftpad_k{}, cache_batch_idx{},
      block_table{};
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
};

// What one call asks for, as flashmoe/spec/call.py has it.
struct Call {
  Tensor q, k, v;
  double softmax_scale;
  int64_t window_left, window_right;
  Options options;
};

// And what a backward is given of the forward.
struct BackwardCall : Call {
  Tensor dout, out, softmax_lse;
  std::optional<Tensor> dlse;
};

// An op's arguments, taken from the first to the last. A schema has a call's fields one behind the
// other, for torch's dispatcher knows no structs; from here on they travel together.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}

  template <typename T>
  T take() {
    STD_TORCH_CHECK(next_ != end_, "the schema has fewer arguments than its kernel takes");
    return to<T>(*next_++);
  }
  Tensor tensor() { return take<Tensor>(); }
  std::optional<Tensor> optional() { return take<std::optional<Tensor>>(); }
  double number() { return take<double>(); }
  int64_t integer() { return take<int64_t>(); }

  void check_end() const {
    STD_TORCH_CHECK(next_ == end_, "the schema has more arguments than its kernel takes");
  }

 private:
  StableIValue *next_, *end_;
};

#define FLASHMOE_SCORES "float softmax_scale, int window_left, int window_right"

#define FLASHMOE_CALL "Tensor q, Tensor k, Tensor v, " FLASHMOE_SCORES
template <>
Call Arguments::take<Call>() {
  return {tensor(), tensor(), tensor(), number(), integer(), integer(), {}};
}

#define FLASHMOE_BACKWARD_CALL                  \
  "Tensor dout, Tensor q, Tensor k, Tensor v, " \
  "Tensor out, Tensor softmax_lse, Tensor? dlse, " FLASHMOE_SCORES
template <>
BackwardCall Arguments::take<BackwardCall>() {
  const Tensor dout = tensor(), q = tensor(), k = tensor(), v = tensor();
  const Tensor out = tensor(), softmax_lse = tensor();
  const std::optional<Tensor> dlse = optional();
  return {{q, k, v, number(), integer(), integer(), {}}, dout, out, softmax_lse, dlse};
}

#define FLASHMOE_OPTIONS                                                             \
  "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, "               \
  "float dropout_p=0.0, Tensor? rng_state=None, Tensor? attn_mask=None, "            \
  "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, "   \
  "Tensor? leftpad_k=None, Tensor? cache_batch_idx=None, Tensor? block_table=None, " \
  "int max_seqlen_q=0, int max_seqlen_k=0"
Options all_options(Arguments& given) {
  return {.softcap = given.number(),
          .alibi_slopes = given.optional(),
          .sinks = given.optional(),
          .dropout_p = given.number(),
          .rng_state = given.optional(),
          .attn_mask = given.optional(),
          .cu_seqlens_q = given.optional(),
          .cu_seqlens_k = given.optional(),
          .seqused_k = given.optional(),
          .leftpad_k = given.optional(),
          .cache_batch_idx = given.optional(),
          .block_table = given.optional(),
          .max_seqlen_q = given.integer(),
          .max_seqlen_k = given.integer()};
}

// Of a backward: where its kernel has no sinks, they are a part of softmax_lse.
#define FLASHMOE_BACKWARD_OPTIONS(sinks)                                           \
  "float softcap=0.0, Tensor? alibi_slopes=None, " sinks                           \
  "float dropout_p=0.0, Tensor? rng_state=None, Tensor? attn_mask=None, "          \
  "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, " \
  "int max_seqlen_q=0, int max_seqlen_k=0"
template <bool has_sinks>
Options backward_options(Arguments& given) {
  return {.softcap = given.number(),
          .alibi_slopes = given.optional(),
          .sinks = has_sinks ? given.optional() : std::nullopt,
          .dropout_p = given.number(),
          .rng_state = given.optional(),
          .attn_mask = given.optional(),
          .cu_seqlens_q = given.optional(),
          .cu_seqlens_k = given.optional(),
          .seqused_k = given.optional(),
          .max_seqlen_q = given.integer(),
          .max_seqlen_k = given.integer()};
}

// Of packed batches without terms: their lengths alone.
#define FLASHMOE_PACKED_OPTIONS \
  "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k"
[[maybe_unused]] Options packed_options(Arguments& given) {
  return {.cu_seqlens_q = given.tensor(),
          .cu_seqlens_k = given.tensor(),
          .max_seqlen_q = given.integer(),
          .max_seqlen_k = given.integer()};
}

// Of a cache, or pages, without padding, batch index and terms.
#define FLASHMOE_CACHE_OPTIONS \
  "Tensor? cu_seqlens_q, Tensor? seqused_k, Tensor? block_table, int max_seqlen_q"
[[maybe_unused]] Options cache_options(Arguments& given) {
  return {.cu_seqlens_q = given.optional(),
          .seqused_k = given.optional(),
          .block_table = given.optional(),
          .max_seqlen_q = given.integer()};
}

template <auto options, typename Result, typename Asked, typename... Integers>
Result run_on(Arguments& given, Result (*run)(Asked&, Integers...)) {
  Asked call = given.take<Asked>();
  const std::tuple<Integers...> integers{given.take<Integers>()...};
  if constexpr (options != nullptr) call.options = options(given);
  given.check_end();
  return std::apply([&](Integers... x) { return run(call, x...); }, integers);
}

// The kernel of an op whose arguments are the fields of `run`'s call, its integers, and then what
// `options` takes. Calls that have no options have ops without, for all those that are None would
// cost each call a microsecond.
template <auto run, auto options = nullptr>
void boxed(StableIValue* stack, uint64_t num_inputs, uint64_t /*num_outputs*/) {
  Arguments given(stack, num_inputs);
  const auto results = run_on<options>(given, run);
  std::apply([&](const auto&... x) { ((*stack++ = from(x)), ...); }, results);
}

// (batch, rows, heads, head_dim), or (rows, heads, head_dim) of a packed tensor.
int64_t heads_of(const Tensor& x) { return x.sizes()[x.dim() - 2]; }
int64_t rows_of(const Tensor& x) { return x.sizes()[x.dim() - 3]; }
int64_t head_dim_of(const Tensor& x) { return x.sizes()[x.dim() - 1]; }

// Users meet flashmoe/api.py's errors; these keep a direct call of the op from reading wild memory.
void check_inputs(const Call& call) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  const Options& options = call.options;
  const int q_dims = options.cu_seqlens_q ? 3 : 4, k_dims = options.cu_seqlens_k ? 3 : 4;
  STD_TORCH_CHECK(q.dim() == q_dims && k.dim() == k_dims && v.dim() == k_dims,
                  "q, k and v must have 4 dimensions, or 3 where they are packed, got ", q.dim(),
                  ", ", k.dim(), " and ", v.dim());
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v must have one dtype");
  STD_TORCH_CHECK(same_device(q, k) && same_device(q, v), "q, k and v must be on one device");
  for (int i = 0; i < k_dims; ++i) {
    STD_TORCH_CHECK(k.sizes()[i] == v.sizes()[i] || i == k_dims - 1,
                    "k and v must have one shape but for head_dim");
    STD_TORCH_CHECK(k.sizes()[i] <= INT_MAX, "a dimension exceeds 2^31 - 1");
  }
  for (int i = 0; i < q_dims; ++i) {
    STD_TORCH_CHECK(q.sizes()[i] <= INT_MAX, "a dimension exceeds 2^31 - 1");
  }
  const bool own_batch = options.cu_seqlens_q || options.cu_seqlens_k || options.block_table ||
                         options.cache_batch_idx;
  STD_TORCH_CHECK((own_batch || k.sizes()[0] == q.sizes()[0]) && head_dim_of(k) == head_dim_of(q),
                  "k must have q's batch and head_dim");
  STD_TORCH_CHECK(heads_of(k) > 0 && heads_of(q) % heads_of(k) == 0,
                  "q's heads must be a multiple of k's, got ", heads_of(q), " and ", heads_of(k));
  for (const int64_t head_dim : {head_dim_of(q), head_dim_of(v)}) {
    STD_TORCH_CHECK(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 256,
                    "head_dim must be a multiple of 8 and at most 256, got ", head_dim);
  }
  STD_TORCH_CHECK(call.softmax_scale > 0, "softmax_scale must be positive, got ",
                  call.softmax_scale);
}

// Data of an optional tensor that must be contiguous, of `type` and `sizes` (-1: any); null
// without.
template <typename T>
const T* data_of(const std::optional<Tensor>& x, const char* name, ScalarType type,
                 std::initializer_list<int64_t> sizes, const Tensor& q) {
  if (!x) return nullptr;
  bool fits = x->scalar_type() == type && same_device(*x, q) && x->is_contiguous() &&
              x->dim() == static_cast<int64_t>(sizes.size());
  int i = 0;
  for (const int64_t size : sizes) fits = fits && (size < 0 || x->sizes()[i++] == size);
  STD_TORCH_CHECK(fits, name,
                  " must be contiguous on q's device, with the dtype and shape that "
                  "flashmoe/frontend/ops.py says");
  return static_cast<const T*>(x->data_ptr());
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, "q must be float32, float16 or bfloat16");
  }
}

template <size_t N>
Tensor empty_contiguous(const std::array<int64_t, N>& sizes, int32_t dtype, const Tensor& like) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes.data(), strides.data(), dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor last_contiguous(Tensor x) {
  if (x.stride(x.dim() - 1) != 1) return torch::stable::contiguous(x);
  return x;
}

int32_t dtype_code(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// Uninitialized and contiguous, shaped like x, of 3 or 4 dimensions.
Tensor empty_contiguous_like(const Tensor& x) {
  const auto sizes = x.sizes();
  if (x.dim() == 3) {
    return empty_contiguous<3>({sizes[0], sizes[1], sizes[2]}, dtype_code(x), x);
  }
  return empty_contiguous<4>({sizes[0], sizes[1], sizes[2], sizes[3]}, dtype_code(x), x);
}

// -1 where a limit hides nothing, as kernels need it.
Mask mask_of(int64_t seqlen_q, int64_t seqlen_kv, int64_t window_left, int64_t window_right) {
  STD_TORCH_CHECK(window_left >= -1 && window_right >= -1,
                  "window_left and window_right must be -1 or more, got ", window_left, " and ",
                  window_right);
  STD_TORCH_CHECK(seqlen_q + seqlen_kv <= INT_MAX, "seqlen_q + seqlen_kv exceeds 2^31 - 1");
  return {window_left < seqlen_kv ? static_cast<int>(window_left) : -1,
          window_right < seqlen_q ? static_cast<int>(window_right) : -1};
}

// The strides of a batch (0 of a packed tensor), a row and a head.
std::array<int64_t, 3> strides_of(const Tensor& x) {
  const auto strides = x.strides();
  if (x.dim() == 3) return {0, strides[0], strides[1]};
  return {strides[0], strides[1], strides[2]};
}

// `keys`: how many there are.
AttnMask attn_mask_of(const Tensor& q, int64_t batch, int64_t keys,
                      const std::optional<Tensor>& x) {
  AttnMask mask{};
  if (!x) return mask;
  const int64_t sizes[] = {batch, heads_of(q), rows_of(q), keys};
  const bool fits = x->dim() == 4 && same_device(*x, q);
  STD_TORCH_CHECK(fits, "attn_mask must have 4 dimensions and be on q's device");
  long long strides[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t size = x->sizes()[i];
    STD_TORCH_CHECK(size == sizes[i] || size == 1, "attn_mask must have ", sizes[i],
                    " elements or 1 in dimension ", i, ", got ", size);
    strides[i] = size == 1 ? 0 : x->strides()[i];
  }
  const ScalarType type = x->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Bool || type == ScalarType::Float || type == q.scalar_type(),
                  "attn_mask must be bool, float32 or of q's dtype");
  mask.data = x->data_ptr();
  mask.batch_stride = strides[0];
  mask.head_stride = strides[1];
  mask.row_stride = strides[2];
  mask.key_stride = strides[3];
  mask.kind = type == ScalarType::Bool    ? AttnMask::Kind::boolean
              : type == ScalarType::Float ? AttnMask::Kind::float32
              : type == ScalarType::Half  ? AttnMask::Kind::float16
                                          : AttnMask::Kind::bfloat16;
  return mask;
}

Terms terms_of(const Tensor& q, int64_t batch, int64_t keys, const Options& options) {
  STD_TORCH_CHECK(options.softcap >= 0, "softcap must be 0 or positive, got ", options.softcap);
  const int64_t heads = heads_of(q);
  const auto& slopes = options.alibi_slopes;
  const bool by_batch = slopes && slopes->dim() == 2;
  Terms terms{};
  terms.softcap = static_cast<float>(options.softcap);
  terms.alibi_slopes =
      by_batch ? data_of<float>(slopes, "alibi_slopes", ScalarType::Float, {batch, heads}, q)
               : data_of<float>(slopes, "alibi_slopes", ScalarType::Float, {heads}, q);
  terms.alibi_batch_stride = by_batch ? heads : 0;
  terms.sinks = data_of<float>(options.sinks, "sinks", ScalarType::Float, {heads}, q);
  STD_TORCH_CHECK(options.dropout_p >= 0 && options.dropout_p < 1,
                  "dropout_p must be from 0 to less than 1, got ", options.dropout_p);
  STD_TORCH_CHECK((options.dropout_p > 0) == options.rng_state.has_value(),
                  "rng_state must be there with dropout_p, and only with it");
  if (options.rng_state) {
    terms.rng_state = reinterpret_cast<const long long*>(
        data_of<int64_t>(options.rng_state, "rng_state", ScalarType::Long, {2}, q));
    // As spec/dropout.py rounds it.
    const double kept = std::floor((1 - options.dropout_p) * 65536 + 0.5);
    terms.dropout_limit = kept < 1 ? 0 : static_cast<unsigned>(kept) - 1;
  }
  STD_TORCH_CHECK(
      !options.attn_mask || !(options.cu_seqlens_q || options.cu_seqlens_k || options.seqused_k ||
                              options.leftpad_k || options.cache_batch_idx || options.block_table),
      "attn_mask is of dense batches");
  terms.attn_mask = attn_mask_of(q, batch, keys, options.attn_mask);
  return terms;
}

// Fills what `params` says of shapes besides head_dim: sizes, sequences and mask.
void describe_sequences(AttentionParams& params, const Call& call) {
  const Tensor &q = call.q, &k = call.k;
  const Options& options = call.options;
  const int64_t batch = options.cu_seqlens_q ? options.cu_seqlens_q->numel() - 1 : q.sizes()[0];
  STD_TORCH_CHECK(batch >= 0 && batch < INT_MAX, "cu_seqlens_q must have batch + 1 elements");
  STD_TORCH_CHECK(options.cu_seqlens_k.has_value() + options.block_table.has_value() +
                          options.cache_batch_idx.has_value() <=
                      1,
                  "only one of cu_seqlens_k, block_table and cache_batch_idx says where keys are");
  STD_TORCH_CHECK(options.cu_seqlens_k || options.block_table || options.cache_batch_idx ||
                      k.sizes()[0] == batch,
                  "k must have a batch for each of ", batch, " sequences, got ", k.sizes()[0]);
  Sequences& s = params.sequences;
  const auto lengths = [&](const std::optional<Tensor>& x, const char* name, int64_t size) {
    return data_of<int>(x, name, ScalarType::Int, {size}, q);
  };
  s.cu_seqlens_q = lengths(options.cu_seqlens_q, "cu_seqlens_q", batch + 1);
  s.cu_seqlens_k = lengths(options.cu_seqlens_k, "cu_seqlens_k", batch + 1);
  s.seqused_k = lengths(options.seqused_k, "seqused_k", batch);
  s.leftpad_k = lengths(options.leftpad_k, "leftpad_k", batch);
  s.cache_batch_idx = lengths(options.cache_batch_idx, "cache_batch_idx", batch);
  s.block_table = data_of<int>(options.block_table, "block_table", ScalarType::Int, {batch, -1}, q);
  s.num_pages = static_cast<int>(k.sizes()[0]);
  s.page_size = static_cast<int>(rows_of(k));
  s.total_q = static_cast<int>(rows_of(q));
  s.total_k = static_cast<int>(rows_of(k));
  int64_t seqlen_q = rows_of(q), seqlen_kv = rows_of(k);
  if (options.cu_seqlens_q && options.max_seqlen_q < seqlen_q) seqlen_q = options.max_seqlen_q;
  if (options.cu_seqlens_k && options.max_seqlen_k < seqlen_kv) seqlen_kv = options.max_seqlen_k;
  if (options.block_table) {
    s.block_table_stride = options.block_table->sizes()[1];
    seqlen_kv = s.block_table_stride * s.page_size;
  }
  STD_TORCH_CHECK(seqlen_q >= 0 && seqlen_kv >= 0,
                  "max_seqlen_q and max_seqlen_k must be 0 or more");
  params.mask = mask_of(seqlen_q, seqlen_kv, call.window_left, call.window_right);
  params.is_causal = params.mask.right >= 0;
  params.batch = static_cast<int>(batch);
  params.seqlen_q = static_cast<int>(seqlen_q);
  params.seqlen_kv = static_cast<int>(seqlen_kv);
}

// All but out and softmax_lse.
AttentionParams describe(const Call& call) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  const auto q_strides = strides_of(q), k_strides = strides_of(k), v_strides = strides_of(v);
  AttentionParams params{};
  params.q = q.data_ptr();
  params.k = k.data_ptr();
  params.v = v.data_ptr();
  params.q_batch_stride = q_strides[0];
  params.q_row_stride = q_strides[1];
  params.q_head_stride = q_strides[2];
  params.k_batch_stride = k_strides[0];
  params.k_row_stride = k_strides[1];
  params.k_head_stride = k_strides[2];
  params.v_batch_stride = v_strides[0];
  params.v_row_stride = v_strides[1];
  params.v_head_stride = v_strides[2];
  params.heads_q = static_cast<int>(heads_of(q));
  params.heads_kv = static_cast<int>(heads_of(k));
  params.head_dim = static_cast<int>(head_dim_of(q));
  params.head_dim_v = static_cast<int>(head_dim_of(v));
  params.softmax_scale = static_cast<float>(call.softmax_scale);
  describe_sequences(params, call);
  params.terms = terms_of(q, params.batch, params.seqlen_kv, call.options);
  return params;
}

struct Prepared {
  Tensor out, softmax_lse;
  AttentionParams params;
};

// Checks, makes tensors such that kernels read them, allocates the outputs and describes the call.
Prepared prepare(Call& call) {
  check_inputs(call);
  for (Tensor* x : {&call.q, &call.k, &call.v}) *x = last_contiguous(std::move(*x));
  const Tensor& q = call.q;
  const int64_t rows = rows_of(q), heads = heads_of(q), head_dim = head_dim_of(call.v);
  const int32_t dtype = dtype_code(q), float32 = aoti_torch_dtype_float32();
  const bool packed = call.options.cu_seqlens_q.has_value();
  const int64_t batch = packed ? 1 : q.sizes()[0];
  Tensor out = packed ? empty_contiguous<3>({rows, heads, head_dim}, dtype, q)
                      : empty_contiguous<4>({batch, rows, heads, head_dim}, dtype, q);
  Tensor lse = packed ? empty_contiguous<2>({heads, rows}, float32, q)
                      : empty_contiguous<3>({batch, heads, rows}, float32, q);

  AttentionParams params = describe(call);
  params.out = out.data_ptr();
  params.softmax_lse = static_cast<float*>(lse.data_ptr());
  params.o_batch_stride = packed ? 0 : rows * heads * head_dim;
  params.o_row_stride = heads * head_dim;
  params.o_head_stride = head_dim;
  return {std::move(out), std::move(lse), params};
}

void torch_parallel_for_range(long long begin, long long end, long long grain, ParallelRange body,
                              void* context) {
  struct Body {
    ParallelRange function;
    void* context;
  } bound{body, context};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(
      begin, end, grain,
      [](int64_t from, int64_t to, void* opaque) {
        const Body* inner = static_cast<const Body*>(opaque);
        inner->function(from, to, inner->context);
      },
      &bound));
}

std::tuple<Tensor, Tensor> run_cpu(Call& call, int64_t block_m, int64_t block_n) {
  STD_TORCH_CHECK(block_m >= 1 && block_n >= 1 && block_m <= INT_MAX && block_n <= INT_MAX,
                  "block_m and block_n must be positive, got ", block_m, " and ", block_n);
  Prepared prepared = prepare(call);
  if (prepared.out.numel() > 0) {
    fwd_cpu(prepared.params, dtype_of(call.q), static_cast<int>(block_m), static_cast<int>(block_n),
            best_cpu_isa(), torch_parallel_for_range,
            static_cast<int>(torch::stable::get_num_threads()));
  }
  return {std::move(prepared.out), std::move(prepared.softmax_lse)};
}

void check_saved(const BackwardCall& call) {
  const Tensor &q = call.q, &v = call.v, &softmax_lse = call.softmax_lse;
  const int64_t dims = q.dim(), batch_dims = dims - 3;
  for (const Tensor* x : {&call.dout, &call.out}) {
    STD_TORCH_CHECK(x->dim() == dims && x->scalar_type() == q.scalar_type() && same_device(*x, q),
                    "dout and out must have q's dtype, device and dimensions");
    for (int64_t i = 0; i < dims; ++i) {
      STD_TORCH_CHECK(x->sizes()[i] == (i + 1 < dims ? q : v).sizes()[i],
                      "dout and out must have q's shape, with v's head_dim");
    }
  }
  for (const Tensor* x : {&softmax_lse, call.dlse ? &*call.dlse : &softmax_lse}) {
    const auto sizes = x->sizes();
    STD_TORCH_CHECK(
        x->dim() == dims - 1 && x->scalar_type() == ScalarType::Float && same_device(*x, q) &&
            (batch_dims == 0 || sizes[0] == q.sizes()[0]) && sizes[batch_dims] == heads_of(q) &&
            sizes[batch_dims + 1] == rows_of(q) && x->is_contiguous(),
        "softmax_lse and dlse must be contiguous float32 (batch, heads_q, seqlen_q), or "
        "(heads_q, total_q) of a packed batch");
  }
}

struct PreparedBackward {
  Tensor dq, dk, dv;
  BackwardParams params;
};

// Of a checked call: makes tensors `readable`, allocates the gradients and describes the call.
PreparedBackward prepare_backward(BackwardCall& call, Tensor (*readable)(Tensor)) {
  for (Tensor* x : {&call.q, &call.k, &call.v, &call.dout, &call.out}) *x = readable(std::move(*x));
  Tensor dq = empty_contiguous_like(call.q), dk = empty_contiguous_like(call.k),
         dv = empty_contiguous_like(call.v);
  BackwardParams params{};
  params.attention = describe(call);
  params.attention.out = call.out.data_ptr();
  const auto o_strides = strides_of(call.out), do_strides = strides_of(call.dout);
  params.attention.o_batch_stride = o_strides[0];
  params.attention.o_row_stride = o_strides[1];
  params.attention.o_head_stride = o_strides[2];
  params.attention.softmax_lse = static_cast<float*>(call.softmax_lse.data_ptr());
  params.dout = call.dout.data_ptr();
  if (call.dlse) params.dlse = static_cast<const float*>(call.dlse->data_ptr());
  params.do_batch_stride = do_strides[0];
  params.do_row_stride = do_strides[1];
  params.do_head_stride = do_strides[2];
  params.dq = dq.data_ptr();
  params.dk = dk.data_ptr();
  params.dv = dv.data_ptr();
  return {std::move(dq), std::move(dk), std::move(dv), params};
}

std::tuple<Tensor, Tensor, Tensor> run_backward_cpu(BackwardCall& call, int64_t block_m,
                                                    int64_t block_n) {
  STD_TORCH_CHECK(block_m >= 1 && block_n >= 1 && block_m <= INT_MAX && block_n <= INT_MAX,
                  "block_m and block_n must be positive, got ", block_m, " and ", block_n);
  check_inputs(call);
  check_saved(call);
  PreparedBackward prepared = prepare_backward(call, last_contiguous);
  bwd_cpu(prepared.params, dtype_of(call.q), static_cast<int>(block_m), static_cast<int>(block_n),
          best_cpu_isa(), torch_parallel_for_range,
          static_cast<int>(torch::stable::get_num_threads()));
  return {std::move(prepared.dq), std::move(prepared.dk), std::move(prepared.dv)};
}

#ifdef FLASHMOE_WITH_CUDA

bool is_cpu(const Tensor& x) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  return type == aoti_torch_device_type_cpu();
}

bool is_empty(const AttentionParams& params) {
  return params.batch == 0 || params.seqlen_q == 0 || params.heads_q == 0;
}

// torch's current stream, without linking libtorch_cuda: the same binary loads on a CPU-only torch.
cudaStream_t current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(library != nullptr, "libtorch_cuda.so is not loaded: is torch a CUDA build?");
    return reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "libtorch_cuda.so lacks aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// x, or its copy where the TMA cannot fetch x.
Tensor fetchable(Tensor x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t last = x.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && strides[last] == 1;
  for (int64_t i = 0; i < last; ++i) {
    aligned = aligned && (sizes[i] == 1 || (strides[i] > 0 && strides[i] % 8 == 0));
  }
  if (aligned) return x;
  Tensor copy = empty_contiguous_like(x);
  return torch::stable::copy_(copy, x);
}

// Of `bytes`, a multiple of 4.
Tensor empty_workspace(int64_t bytes, const Tensor& like) {
  return empty_contiguous<1>({bytes / 4}, aoti_torch_dtype_float32(), like);
}

std::tuple<Tensor, Tensor> run_forward(Call& call, int64_t handle) {
  const int device = static_cast<int>(call.q.get_device_index());
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard.emplace(device);
  // Of dense tensors that the TMA cannot fetch the kernel's launch finds another kernel, unless
  // there is a mask, or v has a head_dim of its own.
  const bool packed = call.options.cu_seqlens_q.has_value();
  if (packed || call.options.attn_mask || head_dim_of(call.v) != head_dim_of(call.q)) {
    for (Tensor* x : {&call.q, &call.k, &call.v}) *x = fetchable(std::move(*x));
  }
  Prepared prepared = prepare(call);
  const Kernel* kernel = find_kernel(handle);
  STD_TORCH_CHECK(kernel != nullptr, "kernel must be a handle, got ", handle);
  STD_TORCH_CHECK(prepared.params.head_dim <= kernel->head_dim, "kernel ", handle,
                  " takes head_dim up to ", kernel->head_dim, ", got ", prepared.params.head_dim);
  const DType dtype = dtype_of(call.q);
  STD_TORCH_CHECK(dtype != DType::float32, "q must be float16 or bfloat16 on a cuda device");
  if (!is_empty(prepared.params)) {
    std::optional<Tensor> workspace;
    if (const int64_t bytes = forward_workspace_bytes(*kernel, prepared.params, device)) {
      workspace = empty_workspace(bytes, call.q);
    }
    const cudaError_t error =
        launch_forward(*kernel, prepared.params, dtype, device, current_stream(device),
                       workspace ? workspace->data_ptr() : nullptr);
    STD_TORCH_CHECK(error == cudaSuccess,
                    "launching the forward kernel failed: ", cudaGetErrorString(error));
  } else if (packed) {
    // Rows that are in no sequence.
    torch::stable::zero_(prepared.out);
    torch::stable::fill_(prepared.softmax_lse, -INFINITY);
  }
  return {std::move(prepared.out), std::move(prepared.softmax_lse)};
}

// x, or its copy where cp.async cannot fetch its rows.
Tensor with_aligned_rows(Tensor x) {
  const auto strides = x.strides();
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && strides[x.dim() - 1] == 1;
  for (int i = 0; i < x.dim() - 1; ++i) aligned = aligned && strides[i] % 8 == 0;
  if (aligned) return x;
  const Tensor copy = torch::stable::contiguous(x);  // or x itself
  return copy.data_ptr() == x.data_ptr() ? torch::stable::clone(x) : copy;
}

std::tuple<Tensor, Tensor> run_decode(Call& call, int64_t handle, int64_t num_splits) {
  const int device = static_cast<int>(call.q.get_device_index());
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard.emplace(device);
  STD_TORCH_CHECK(num_splits >= -1, "num_splits must be -1 or more, got ", num_splits);
  STD_TORCH_CHECK(call.options.dropout_p == 0, "the decode kernel has no dropout, got dropout_p ",
                  call.options.dropout_p);
  STD_TORCH_CHECK(!call.options.attn_mask, "the decode kernel has no attn_mask");
  STD_TORCH_CHECK(head_dim_of(call.v) == head_dim_of(call.q), "v must have q's head_dim ",
                  head_dim_of(call.q), " for the decode kernel, got ", head_dim_of(call.v));
  for (Tensor* x : {&call.q, &call.k, &call.v}) *x = with_aligned_rows(std::move(*x));
  Prepared prepared = prepare(call);
  const DecodeKernel* kernel = find_decode_kernel(handle);
  STD_TORCH_CHECK(kernel != nullptr, "kernel must be a handle, got ", handle);
  STD_TORCH_CHECK(prepared.params.head_dim <= kernel->head_dim, "kernel ", handle,
                  " takes head_dim up to ", kernel->head_dim, ", got ", prepared.params.head_dim);
  const DType dtype = dtype_of(call.q);
  STD_TORCH_CHECK(dtype != DType::float32, "q must be float16 or bfloat16 on a cuda device");
  if (!is_empty(prepared.params)) {
    // Without a page, or a batch, there are no keys.
    if (call.k.numel() == 0) prepared.params.seqlen_kv = 0;
    const decoding::DecodeParams params =
        prepare_decode(*kernel, prepared.params, num_splits, device);
    std::optional<Tensor> workspace;
    if (const int64_t bytes = decode_workspace_bytes(*kernel, params)) {
      workspace = empty_contiguous<1>({(bytes + 3) / 4}, aoti_torch_dtype_float32(), call.q);
    }
    const cudaError_t error = launch_decode(*kernel, params, dtype, device, current_stream(device),
                                            workspace ? workspace->data_ptr() : nullptr);
    STD_TORCH_CHECK(error == cudaSuccess,
                    "launching the decode kernel failed: ", cudaGetErrorString(error));
  }
  return {std::move(prepared.out), std::move(prepared.softmax_lse)};
}

NewRows new_rows(const Tensor& x, const int* cu_seqlens) {
  const auto strides = strides_of(x);
  const int64_t rows = cu_seqlens != nullptr ? rows_of(x) : x.sizes()[0] * rows_of(x);
  STD_TORCH_CHECK(rows <= INT_MAX, "q and k must have at most 2^31 - 1 rows, got ", rows);
  return {x.data_ptr(),
          strides[0],
          strides[1],
          strides[2],
          cu_seqlens,
          static_cast<int>(rows),
          static_cast<int>(rows_of(x)),
          static_cast<int>(heads_of(x)),
          static_cast<int>(head_dim_of(x))};
}

CacheView cache_view(const Tensor& x) {
  const auto strides = strides_of(x);
  return {x.data_ptr(), strides[0], strides[1], strides[2]};
}

std::tuple<Tensor, Tensor> append_cuda_op(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& seqused_k, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k_new, const std::optional<Tensor>& cache_batch_idx,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& rotary_cos,
    const std::optional<Tensor>& rotary_sin, bool rotary_interleaved, bool rotate_by_row) {
  const int device = static_cast<int>(q_in.get_device_index());
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard.emplace(device);
  const int64_t batch = seqused_k.numel();
  const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in);
  STD_TORCH_CHECK(q.dim() == (cu_seqlens_q ? 3 : 4) && k.dim() == (cu_seqlens_k_new ? 3 : 4) &&
                      v.dim() == k.dim() && k_cache.dim() == 4 && v_cache.dim() == 4,
                  "q, k and v must have 4 dimensions, or 3 where they are packed, and caches 4");
  for (const Tensor* x : {&k, &v, &k_cache, &v_cache}) {
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type() && same_device(*x, q),
                    "q, k, v and the caches must have one dtype and device");
  }
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(k_cache.sizes()[i] == v_cache.sizes()[i] && k_cache.sizes()[i] <= INT_MAX,
                    "the caches must have one shape");
  }
  STD_TORCH_CHECK(heads_of(k) == heads_of(k_cache) && head_dim_of(k) == head_dim_of(k_cache) &&
                      heads_of(v) == heads_of(k) && head_dim_of(v) == head_dim_of(v_cache) &&
                      rows_of(v) == rows_of(k) && (cu_seqlens_k_new || k.sizes()[0] == batch) &&
                      (cu_seqlens_k_new || v.sizes()[0] == batch) &&
                      (cu_seqlens_q || q.sizes()[0] == batch) && head_dim_of(q) == head_dim_of(k),
                  "k and v must have the rows of one another and the caches' heads and head_dim, "
                  "and each sequence a batch of q, k and v");
  STD_TORCH_CHECK(k_cache.stride(3) == 1 && v_cache.stride(3) == 1 && batch < INT_MAX,
                  "the caches' last dimension must be contiguous");
  STD_TORCH_CHECK(
      rotary_cos.has_value() == rotary_sin.has_value() && !(block_table && cache_batch_idx),
      "rotary_cos needs rotary_sin, and only one of block_table and cache_batch_idx "
      "says where keys are");
  AppendParams params{};
  const auto lengths = [&](const std::optional<Tensor>& x, const char* name, int64_t size) {
    return data_of<int>(x, name, ScalarType::Int, {size}, q);
  };
  params.k = new_rows(k, lengths(cu_seqlens_k_new, "cu_seqlens_k_new", batch + 1));
  params.v = new_rows(v, params.k.cu_seqlens);
  params.k_cache = cache_view(k_cache), params.v_cache = cache_view(v_cache);
  params.lengths = lengths(seqused_k, "seqused_k", batch);
  params.cache_batch_idx = lengths(cache_batch_idx, "cache_batch_idx", batch);
  params.block_table = data_of<int>(block_table, "block_table", ScalarType::Int, {batch, -1}, q);
  params.page_size = static_cast<int>(rows_of(k_cache));
  params.num_pages = static_cast<int>(k_cache.sizes()[0]);
  params.batch = static_cast<int>(batch);
  int64_t room = rows_of(k_cache);
  if (block_table) {
    params.block_table_stride = block_table->sizes()[1];
    room *= params.block_table_stride;
  }
  STD_TORCH_CHECK(room <= INT_MAX, "a sequence must have room for at most 2^31 - 1 keys");
  params.room = static_cast<int>(room);
  Tensor lengths_out = empty_contiguous<1>({batch}, dtype_code(seqused_k), q);
  params.lengths_out = static_cast<int*>(lengths_out.data_ptr());
  std::optional<Tensor> rotated;
  if (rotary_cos) {
    const int64_t rows = rotary_cos->sizes()[0], half = rotary_cos->sizes()[1];
    for (const Tensor* x : {&*rotary_cos, &*rotary_sin}) {
      STD_TORCH_CHECK(x->dim() == 2 && x->is_contiguous() && same_device(*x, q) &&
                          x->scalar_type() == rotary_cos->scalar_type() && x->sizes()[0] == rows &&
                          x->sizes()[1] == half && rows > 0 && rows <= INT_MAX && half > 0 &&
                          2 * half <= head_dim_of(q),
                      "rotary_cos and rotary_sin must be contiguous (rows, at most head_dim / 2)");
    }
    params.q = new_rows(q, lengths(cu_seqlens_q, "cu_seqlens_q", batch + 1));
    rotated = empty_contiguous_like(q);
    params.q_out = rotated->data_ptr();
    params.cos = rotary_cos->data_ptr(), params.sin = rotary_sin->data_ptr();
    params.table_dtype = dtype_of(*rotary_cos);
    params.rotary_rows = static_cast<int>(rows), params.rotary_dim = static_cast<int>(2 * half);
    params.interleaved = rotary_interleaved, params.rotate_by_row = rotate_by_row;
  } else {
    rotated = empty_contiguous<1>({0}, dtype_code(q), q);
  }
  const cudaError_t error = launch_append(params, dtype_of(q), current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess,
                  "launching the append kernel failed: ", cudaGetErrorString(error));
  return {std::move(*rotated), std::move(lengths_out)};
}

std::tuple<Tensor, Tensor, Tensor> run_backward(BackwardCall& call, int64_t handle) {
  const int device = static_cast<int>(call.q.get_device_index());
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard.emplace(device);
  check_inputs(call);
  const int64_t head_dim = head_dim_of(call.q);
  STD_TORCH_CHECK(head_dim_of(call.v) == head_dim, "v must have q's head_dim ", head_dim,
                  " for the backward kernel, got ", head_dim_of(call.v));
  check_saved(call);
  const BackwardKernel* kernel = find_backward_kernel(handle);
  STD_TORCH_CHECK(kernel != nullptr, "kernel must be a handle, got ", handle);
  STD_TORCH_CHECK(head_dim <= kernel->tile.head_dim, "kernel ", handle, " takes head_dim up to ",
                  kernel->tile.head_dim, ", got ", head_dim);
  const DType dtype = dtype_of(call.q);
  STD_TORCH_CHECK(dtype != DType::float32, "q must be float16 or bfloat16 on a cuda device");

  PreparedBackward prepared = prepare_backward(call, fetchable);
  const AttentionParams& attention = prepared.params.attention;
  // Where either side has no rows, nothing adds to the gradients of the other.
  if (is_empty(attention) || attention.seqlen_kv == 0) {
    torch::stable::zero_(prepared.dq);
    torch::stable::zero_(prepared.dk);
    torch::stable::zero_(prepared.dv);
  } else {
    if (call.options.seqused_k) {
      // Keys that are not used have no gradient, and no block of keys.
      torch::stable::zero_(prepared.dk);
      torch::stable::zero_(prepared.dv);
    }
    const Tensor workspace = empty_workspace(
        sm90_backward::workspace_bytes(kernel->tile, kernel->variant, attention), call.q);
    const cudaError_t error = launch_backward(*kernel, prepared.params, dtype, device,
                                              current_stream(device), workspace.data_ptr());
    STD_TORCH_CHECK(error == cudaSuccess,
                    "launching the backward kernel failed: ", cudaGetErrorString(error));
  }
  return {std::move(prepared.dq), std::move(prepared.dk), std::move(prepared.dv)};
}

#endif  // FLASHMOE_WITH_CUDA

// Training. An autograd node of our own would need headers that are not in the stable ABI, and one
// in Python takes longer than a small problem. torch has an operator with a derivative, and so a
// node in C++, whose kernels are others' to bring: ours run those calls of it whose dropout_p is no
// probability but the number of a TrainingPlan.

// What such a call runs: handles of kernels. On a CPU `forward` is block_m. The op
// `attention_backward` runs where `backward` is -1, and where torch asks for deterministic
// gradients and the plan has none.
struct TrainingPlan {
  int64_t window_left, window_right, forward, backward;
  bool deterministic;
  std::string backend;

  bool operator==(const TrainingPlan&) const = default;
};

constexpr double first_training_plan = 2;
std::mutex training_plans_mutex;
std::deque<TrainingPlan> training_plans;  // whose elements never move

double number_of(TrainingPlan plan) {
  const std::lock_guard lock(training_plans_mutex);
  const auto found = std::find(training_plans.begin(), training_plans.end(), plan);
  const auto index = found - training_plans.begin();
  if (found == training_plans.end()) training_plans.push_back(std::move(plan));
  return first_training_plan + static_cast<double>(index);
}

const TrainingPlan& training_plan(double number) {
  const std::lock_guard lock(training_plans_mutex);
  const double index = number - first_training_plan;
  STD_TORCH_CHECK(index >= 0 && index < static_cast<double>(training_plans.size()),
                  "not implemented: torch's overrideable attention, of which flashmoe has the "
                  "kernels on this device, runs flashmoe's own calls only");
  return training_plans[static_cast<size_t>(index)];
}

// A function of libtorch_cpu that its stable headers do not have; null where it has none either.
template <typename Function>
Function* torch_function([[maybe_unused]] const char* symbol) {
#ifdef __linux__
  if (void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    return reinterpret_cast<Function*>(dlsym(library, symbol));
  }
#endif
  return nullptr;
}

// at::globalContext().deterministicAlgorithms()
const auto global_context = torch_function<const void*()>("_ZN2at13globalContextEv");
const auto context_is_deterministic =
    torch_function<bool(const void*)>("_ZNK2at7Context23deterministicAlgorithmsEv");

// Why the last call of torch's failed, from torch 2.13 on.
const char* last_error() {
  static const auto get =
      torch_function<const char*()>("torch_exception_get_what_without_backtrace");
  return get != nullptr ? get() : "";
}

StableIValue undefined() {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&handle));
  return reinterpret_cast<StableIValue>(handle);
}

std::tuple<Tensor, Tensor> training_forward(Call& call, const TrainingPlan& plan) {
#ifdef FLASHMOE_WITH_CUDA
  if (!is_cpu(call.q)) return run_forward(call, plan.forward);
#endif
  return run_cpu(call, plan.forward, 128);
}

// The kernel of _scaled_dot_product_fused_attention_overrideable(q, k, v, attn_bias, dropout_p,
// is_causal, return_debug_mask, scale) -> output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
// philox_seed, philox_offset, debug_attn_mask.
void node_forward(StableIValue* stack, uint64_t /*num_inputs*/, uint64_t /*num_outputs*/) {
  Tensor q = to<Tensor>(stack[0]), k = to<Tensor>(stack[1]), v = to<Tensor>(stack[2]);
  to<std::optional<Tensor>>(stack[3]);
  const auto softmax_scale = to<std::optional<double>>(stack[7]);
  const TrainingPlan& plan = training_plan(to<double>(stack[4]));
  STD_TORCH_CHECK(softmax_scale, "scale must be given");
  Call call{std::move(q),
            std::move(k),
            std::move(v),
            *softmax_scale,
            plan.window_left,
            plan.window_right,
            {}};
  const auto [out, lse] = training_forward(call, plan);
  stack[0] = from(out), stack[1] = from(lse);
  for (const int i : {2, 3, 6, 7, 8}) stack[i] = undefined();
  stack[4] = stack[5] = from(int64_t{0});
}

// The kernel, also for autograd, of …_overrideable_backward(grad_out, query, key, value, attn_bias,
// grad_input_mask, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
// philox_seed, philox_offset, scale) -> grad_query, grad_key, grad_value, grad_attn_bias. It calls
// another op by the dispatcher, so modes see that, and its autograd refuses a second derivative.
void node_backward(StableIValue* stack, uint64_t /*num_inputs*/, uint64_t /*num_outputs*/) {
  for (const int i : {4, 8, 9, 14, 15})
    aoti_torch_delete_tensor_object(to<AtenTensorHandle>(stack[i]));
  torch_delete_list(to<StableListHandle>(stack[5]));
  const auto softmax_scale = to<std::optional<double>>(stack[16]);
  const TrainingPlan& plan = training_plan(to<double>(stack[12]));
  STD_TORCH_CHECK(softmax_scale, "scale must be given");
  const bool by_kernel = plan.backward >= 0 && !aoti_torch_grad_mode_is_enabled() &&
                         (plan.deterministic || !context_is_deterministic(global_context()));
  const StableIValue none = from(std::nullopt);
  // Of either op; owners of the tensors.
  std::array<StableIValue, 18> given{stack[0],
                                     stack[1],
                                     stack[2],
                                     stack[3],
                                     stack[6],
                                     stack[7],
                                     none,
                                     from(*softmax_scale),
                                     from(plan.window_left),
                                     from(plan.window_right)};
  const char* op = by_kernel ? "flashmoe::bwd_cuda_dense" : "flashmoe::attention_backward";
  if (by_kernel) {
    given[10] = from(plan.backward);
  } else {
    const StableIValue others[]{
        from(plan.backend), from(plan.deterministic), from(0.0), none, none, from(0.0), none, none};
    std::copy(std::begin(others), std::end(others), given.begin() + 10);
  }
  const auto status = torch_call_dispatcher(op, "", given.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(status == TORCH_SUCCESS, op, " failed: ", last_error());
  std::copy_n(given.begin(), 3, stack);
  stack[3] = undefined();
}

}  // namespace
}  // namespace flashmoe

#define FLASHMOE_EXPORT extern "C" __attribute__((visibility("default")))

FLASHMOE_EXPORT const char* flashmoe_build_info() { return flashmoe::build_info; }

#ifdef FLASHMOE_WITH_CUDA
template <typename T>
const T& struct_at(const void* data, int size) {
  if (size != sizeof(T)) throw std::runtime_error("fields of another version");
  return *static_cast<const T*>(data);
}
#endif

// The handle of what is in a cubin, a forward kernel or, with `backward`, a backward one, or -1 and
// why not. `tile` is an Sm90Tile or an Sm90BackwardTile, whose fields flashmoe/tiles/fields.py has,
// too, and `variant` a Variant.
FLASHMOE_EXPORT long long flashmoe_load_kernel(
    [[maybe_unused]] const void* cubin, [[maybe_unused]] const void* tile,
    [[maybe_unused]] int tile_size, [[maybe_unused]] const void* variant,
    [[maybe_unused]] int variant_size, [[maybe_unused]] int backward, [[maybe_unused]] int bfloat16,
    char* error, size_t error_size) {
#ifdef FLASHMOE_WITH_CUDA
  try {
    const auto dtype = bfloat16 != 0 ? flashmoe::DType::bfloat16 : flashmoe::DType::float16;
    const auto& features = struct_at<flashmoe::Variant>(variant, variant_size);
    if (backward != 0) {
      const auto& shape = struct_at<flashmoe::Sm90BackwardTile>(tile, tile_size);
      return flashmoe::load_backward_kernel(cubin, shape, features, dtype);
    }
    const auto& shape = struct_at<flashmoe::Sm90Tile>(tile, tile_size);
    return flashmoe::load_kernel(cubin, shape, features, dtype);
  } catch (const std::exception& exception) {
    std::snprintf(error, error_size, "%s", exception.what());
  }
#else
  std::snprintf(error, error_size, "this build has no CUDA kernels");
#endif
  return -1;
}

// Brings the kernels of torch's overrideable attention; 0 where this torch lacks what they need.
// Once, where its schemas are those that the kernels know and nobody else brought any.
FLASHMOE_EXPORT int flashmoe_register_node() {
  using torch::stable::detail::StableLibrary;
  if (flashmoe::global_context == nullptr || flashmoe::context_is_deterministic == nullptr)
    return 0;
  const char* forward = "_scaled_dot_product_fused_attention_overrideable";
  const char* backward = "_scaled_dot_product_fused_attention_overrideable_backward";
  static std::deque<StableLibrary> libraries;
  for (const char* key : {"CPU", "CUDA", "AutogradCPU", "AutogradCUDA"}) {
    StableLibrary& library =
        libraries.emplace_back(StableLibrary::Kind::IMPL, "aten", key, __FILE__, __LINE__);
    library.impl(backward, flashmoe::node_backward);
    if (key[0] == 'C') library.impl(forward, flashmoe::node_forward);
  }
  return 1;
}

// What such a call has for dropout_p. `fields` are those of TrainingPlan up to `backward`.
FLASHMOE_EXPORT double flashmoe_training_plan(const long long* fields, int deterministic,
                                              const char* backend) {
  return flashmoe::number_of(
      {fields[0], fields[1], fields[2], fields[3], deterministic != 0, backend});
}

STABLE_TORCH_LIBRARY(flashmoe, m) {
  const auto forward = [&](const char* arguments) {
    m.def((std::string(arguments) + " -> (Tensor out, Tensor softmax_lse)").c_str());
  };
  const auto backward = [&](const char* arguments) {
    m.def((std::string(arguments) + " -> (Tensor dq, Tensor dk, Tensor dv)").c_str());
  };
  forward("fwd_cpu(" FLASHMOE_CALL ", int block_m, int block_n, " FLASHMOE_OPTIONS ")");
  forward("fwd_cpu_dense(" FLASHMOE_CALL ", int block_m, int block_n)");
  forward("fwd_cuda(" FLASHMOE_CALL ", int kernel, " FLASHMOE_OPTIONS ")");
  forward("fwd_cuda_dense(" FLASHMOE_CALL ", int kernel)");
  forward("fwd_cuda_packed(" FLASHMOE_CALL ", int kernel, " FLASHMOE_PACKED_OPTIONS ")");
  forward("decode_cuda(" FLASHMOE_CALL ", int kernel, int num_splits, " FLASHMOE_OPTIONS ")");
  forward("decode_cuda_dense(" FLASHMOE_CALL ", int kernel, int num_splits)");
  forward("decode_cuda_cache(" FLASHMOE_CALL ", int kernel, int num_splits, " FLASHMOE_CACHE_OPTIONS
          ")");
  backward("bwd_cpu(" FLASHMOE_BACKWARD_CALL
           ", int block_m, int block_n, " FLASHMOE_BACKWARD_OPTIONS("Tensor? sinks=None, ") ")");
  backward("bwd_cpu_dense(" FLASHMOE_BACKWARD_CALL ", int block_m, int block_n)");
  backward("bwd_cuda(" FLASHMOE_BACKWARD_CALL ", int kernel, " FLASHMOE_BACKWARD_OPTIONS("") ")");
  backward("bwd_cuda_dense(" FLASHMOE_BACKWARD_CALL ", int kernel)");
  m.def(
      "append_cuda(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k_new, Tensor? cache_batch_idx, "
      "Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
      "bool rotate_by_row) -> (Tensor q_rotated, Tensor seqused_k_after)");
}

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CPU, m) {
  using namespace flashmoe;
  m.impl("fwd_cpu", boxed<run_cpu, all_options>);
  m.impl("fwd_cpu_dense", boxed<run_cpu>);
  m.impl("bwd_cpu", boxed<run_backward_cpu, backward_options<true>>);
  m.impl("bwd_cpu_dense", boxed<run_backward_cpu>);
}

#ifdef FLASHMOE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  using namespace flashmoe;
  m.impl("fwd_cuda", boxed<run_forward, all_options>);
  m.impl("fwd_cuda_dense", boxed<run_forward>);
  m.impl("bwd_cuda_dense", boxed<run_backward>);
  m.impl("decode_cuda", boxed<run_decode, all_options>);
  m.impl("fwd_cuda_packed", boxed<run_forward, packed_options>);
  m.impl("decode_cuda_dense", boxed<run_decode>);
  m.impl("decode_cuda_cache", boxed<run_decode, cache_options>);
  m.impl("append_cuda", TORCH_BOX(&append_cuda_op));
  m.impl("bwd_cuda", boxed<run_backward, backward_options<false>>);
}
#endif
