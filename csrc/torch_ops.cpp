// The binding: schemas, checks, allocation, stream, launch. The only file that includes torch, and
// only its stable ABI, so one binary serves torch 2.10 to 2.13.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <climits>
#include <cstdio>
#include <exception>
#include <optional>
#include <tuple>

#include "common/params.h"
#include "forward/cpu/forward.h"
#include "instances/registry.h"

#ifdef FLASHMOE_WITH_CUDA
#include <dlfcn.h>
#endif

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // headers before torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace flashmoe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool same_device(const Tensor& a, const Tensor& b) {
  int32_t types[2];
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &types[0]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &types[1]));
  return types[0] == types[1] && a.get_device_index() == b.get_device_index();
}

// Users meet flashmoe/api.py's errors; these keep a direct call of the op from reading wild memory.
void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "q, k and v must have 4 dimensions, got ", q.dim(), ", ", k.dim(), " and ",
                  v.dim());
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v must have one dtype");
  STD_TORCH_CHECK(same_device(q, k) && same_device(q, v), "q, k and v must be on one device");
  const auto q_sizes = q.sizes(), k_sizes = k.sizes(), v_sizes = v.sizes();
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(k_sizes[i] == v_sizes[i], "k and v must have one shape");
    STD_TORCH_CHECK(q_sizes[i] <= INT_MAX && k_sizes[i] <= INT_MAX, "a dimension exceeds 2^31 - 1");
  }
  STD_TORCH_CHECK(k_sizes[0] == q_sizes[0] && k_sizes[3] == q_sizes[3],
                  "k must have q's batch and head_dim");
  STD_TORCH_CHECK(k_sizes[2] > 0 && q_sizes[2] % k_sizes[2] == 0,
                  "q's heads must be a multiple of k's, got ", q_sizes[2], " and ", k_sizes[2]);
  STD_TORCH_CHECK(q_sizes[3] % 8 == 0 && q_sizes[3] >= 8 && q_sizes[3] <= 256,
                  "head_dim must be a multiple of 8 and at most 256, got ", q_sizes[3]);
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

Tensor last_contiguous(const Tensor& x) {
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

int32_t dtype_code(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// All but out, softmax_lse and softmax_scale.
AttentionParams describe(const Tensor& q, const Tensor& k, const Tensor& v, Mask mask) {
  const auto q_sizes = q.sizes(), k_sizes = k.sizes();
  const auto q_strides = q.strides(), k_strides = k.strides(), v_strides = v.strides();
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
  params.batch = static_cast<int>(q_sizes[0]);
  params.heads_q = static_cast<int>(q_sizes[2]);
  params.heads_kv = static_cast<int>(k_sizes[2]);
  params.seqlen_q = static_cast<int>(q_sizes[1]);
  params.seqlen_kv = static_cast<int>(k_sizes[1]);
  params.head_dim = static_cast<int>(q_sizes[3]);
  params.is_causal = mask.right >= 0;
  params.mask = mask;
  return params;
}

// -1 where a limit hides nothing, as kernels need it.
Mask mask_of(const Tensor& q, const Tensor& k, int64_t window_left, int64_t window_right) {
  STD_TORCH_CHECK(window_left >= -1 && window_right >= -1,
                  "window_left and window_right must be -1 or more, got ", window_left, " and ",
                  window_right);
  STD_TORCH_CHECK(q.sizes()[1] + k.sizes()[1] <= INT_MAX, "seqlen_q + seqlen_kv exceeds 2^31 - 1");
  return {window_left < k.sizes()[1] ? static_cast<int>(window_left) : -1,
          window_right < q.sizes()[1] ? static_cast<int>(window_right) : -1};
}

struct Call {
  Tensor q, k, v, out, softmax_lse;
  AttentionParams params;
};

// Checks, allocates the outputs and describes the call to a kernel.
Call prepare(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, double softmax_scale,
             Mask mask) {
  check_inputs(q_in, k_in, v_in);
  STD_TORCH_CHECK(softmax_scale > 0, "softmax_scale must be positive, got ", softmax_scale);
  const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in);
  const auto q_sizes = q.sizes();
  const int64_t batch = q_sizes[0], seqlen_q = q_sizes[1], heads_q = q_sizes[2];
  const int64_t head_dim = q_sizes[3];
  Tensor out = empty_contiguous<4>({batch, seqlen_q, heads_q, head_dim}, dtype_code(q), q);
  Tensor lse = empty_contiguous<3>({batch, heads_q, seqlen_q}, aoti_torch_dtype_float32(), q);

  AttentionParams params = describe(q, k, v, mask);
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.out = out.data_ptr();
  params.softmax_lse = static_cast<float*>(lse.data_ptr());
  params.o_batch_stride = seqlen_q * heads_q * head_dim;
  params.o_row_stride = heads_q * head_dim;
  params.o_head_stride = head_dim;
  return {q, k, v, std::move(out), std::move(lse), params};
}

bool is_empty(const AttentionParams& params) {
  return params.batch == 0 || params.seqlen_q == 0 || params.heads_q == 0;
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

std::tuple<Tensor, Tensor> fwd_cpu_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                      double softmax_scale, int64_t window_left,
                                      int64_t window_right, int64_t block_m, int64_t block_n) {
  STD_TORCH_CHECK(block_m >= 1 && block_n >= 1 && block_m <= INT_MAX && block_n <= INT_MAX,
                  "block_m and block_n must be positive, got ", block_m, " and ", block_n);
  Call call = prepare(q, k, v, softmax_scale, mask_of(q, k, window_left, window_right));
  if (!is_empty(call.params)) {
    fwd_cpu(call.params, dtype_of(q), static_cast<int>(block_m), static_cast<int>(block_n),
            best_cpu_isa(), torch_parallel_for_range,
            static_cast<int>(torch::stable::get_num_threads()));
  }
  return {std::move(call.out), std::move(call.softmax_lse)};
}

#ifdef FLASHMOE_WITH_CUDA

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

std::tuple<Tensor, Tensor> fwd_cuda_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                       double softmax_scale, int64_t window_left,
                                       int64_t window_right, int64_t handle) {
  const int device = static_cast<int>(q.get_device_index());
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard.emplace(device);
  Call call = prepare(q, k, v, softmax_scale, mask_of(q, k, window_left, window_right));
  const Kernel* kernel = find_kernel(handle);
  STD_TORCH_CHECK(kernel != nullptr, "kernel must be a handle, got ", handle);
  STD_TORCH_CHECK(call.params.head_dim <= kernel->head_dim, "kernel ", handle,
                  " takes head_dim up to ", kernel->head_dim, ", got ", call.params.head_dim);
  const DType dtype = dtype_of(q);
  STD_TORCH_CHECK(dtype != DType::float32, "q must be float16 or bfloat16 on a cuda device");
  if (!is_empty(call.params)) {
    const cudaError_t error =
        launch_forward(*kernel, call.params, dtype, device, current_stream(device));
    STD_TORCH_CHECK(error == cudaSuccess,
                    "launching the forward kernel failed: ", cudaGetErrorString(error));
  }
  return {std::move(call.out), std::move(call.softmax_lse)};
}

// x, or its copy where the TMA cannot fetch x.
Tensor fetchable(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && strides[3] == 1;
  for (int i = 0; i < 3; ++i) {
    aligned = aligned && (sizes[i] == 1 || (strides[i] > 0 && strides[i] % 8 == 0));
  }
  if (aligned) return x;
  Tensor copy = empty_contiguous<4>({sizes[0], sizes[1], sizes[2], sizes[3]}, dtype_code(x), x);
  return torch::stable::copy_(copy, x);
}

std::tuple<Tensor, Tensor, Tensor> bwd_cuda_op(const Tensor& dout_in, const Tensor& q_in,
                                               const Tensor& k_in, const Tensor& v_in,
                                               const Tensor& out_in, const Tensor& softmax_lse,
                                               const std::optional<Tensor>& dlse,
                                               double softmax_scale, int64_t window_left,
                                               int64_t window_right, int64_t handle) {
  const int device = static_cast<int>(q_in.get_device_index());
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard.emplace(device);
  check_inputs(q_in, k_in, v_in);
  STD_TORCH_CHECK(softmax_scale > 0, "softmax_scale must be positive, got ", softmax_scale);
  const auto q_sizes = q_in.sizes(), k_sizes = k_in.sizes();
  for (const Tensor* x : {&dout_in, &out_in}) {
    STD_TORCH_CHECK(
        x->dim() == 4 && x->scalar_type() == q_in.scalar_type() && same_device(*x, q_in),
        "dout and out must have q's dtype, device and dimensions");
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(x->sizes()[i] == q_sizes[i], "dout and out must have q's shape");
    }
  }
  for (const Tensor* x : {&softmax_lse, dlse ? &*dlse : &softmax_lse}) {
    const auto sizes = x->sizes();
    STD_TORCH_CHECK(x->dim() == 3 && x->scalar_type() == ScalarType::Float &&
                        same_device(*x, q_in) && sizes[0] == q_sizes[0] && sizes[1] == q_sizes[2] &&
                        sizes[2] == q_sizes[1] && x->is_contiguous(),
                    "softmax_lse and dlse must be contiguous float32 (batch, heads_q, seqlen_q)");
  }
  const BackwardKernel* kernel = find_backward_kernel(handle);
  STD_TORCH_CHECK(kernel != nullptr, "kernel must be a handle, got ", handle);
  STD_TORCH_CHECK(q_sizes[3] <= kernel->tile.head_dim, "kernel ", handle, " takes head_dim up to ",
                  kernel->tile.head_dim, ", got ", q_sizes[3]);
  const DType dtype = dtype_of(q_in);
  STD_TORCH_CHECK(dtype != DType::float32, "q must be float16 or bfloat16 on a cuda device");

  const Tensor q = fetchable(q_in), k = fetchable(k_in), v = fetchable(v_in);
  const Tensor out = fetchable(out_in), dout = fetchable(dout_in);
  const int32_t code = dtype_code(q);
  Tensor dq = empty_contiguous<4>({q_sizes[0], q_sizes[1], q_sizes[2], q_sizes[3]}, code, q);
  Tensor dk = empty_contiguous<4>({k_sizes[0], k_sizes[1], k_sizes[2], k_sizes[3]}, code, q);
  Tensor dv = empty_contiguous<4>({k_sizes[0], k_sizes[1], k_sizes[2], k_sizes[3]}, code, q);
  BackwardParams params{};
  params.attention = describe(q, k, v, mask_of(q, k, window_left, window_right));
  params.attention.softmax_scale = static_cast<float>(softmax_scale);
  params.attention.out = out.data_ptr();
  const auto o_strides = out.strides(), do_strides = dout.strides();
  params.attention.o_batch_stride = o_strides[0];
  params.attention.o_row_stride = o_strides[1];
  params.attention.o_head_stride = o_strides[2];
  params.attention.softmax_lse = static_cast<float*>(softmax_lse.data_ptr());
  params.dout = dout.data_ptr();
  if (dlse) params.dlse = static_cast<const float*>(dlse->data_ptr());
  params.do_batch_stride = do_strides[0];
  params.do_row_stride = do_strides[1];
  params.do_head_stride = do_strides[2];
  params.dq = dq.data_ptr();
  params.dk = dk.data_ptr();
  params.dv = dv.data_ptr();
  // Where either side has no rows, nothing adds to the gradients of the other.
  if (is_empty(params.attention) || params.attention.seqlen_kv == 0) {
    torch::stable::zero_(dq);
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  } else {
    const Tensor workspace =
        empty_contiguous<1>({sm90_backward::workspace_bytes(kernel->tile, params.attention) / 4},
                            aoti_torch_dtype_float32(), q);
    const cudaError_t error = launch_backward(*kernel, params, dtype, device,
                                              current_stream(device), workspace.data_ptr());
    STD_TORCH_CHECK(error == cudaSuccess,
                    "launching the backward kernel failed: ", cudaGetErrorString(error));
  }
  return {std::move(dq), std::move(dk), std::move(dv)};
}

#endif  // FLASHMOE_WITH_CUDA

}  // namespace
}  // namespace flashmoe

#define FLASHMOE_EXPORT extern "C" __attribute__((visibility("default")))

FLASHMOE_EXPORT const char* flashmoe_build_info() { return flashmoe::build_info; }

// The handle of the kernel in a cubin, or -1 and why not. `fields` are head_dim and those of
// csrc/build_config.py's INSTANCE_FIELDS, then VARIANT_FIELDS, `num_fields` of them.
FLASHMOE_EXPORT long long flashmoe_load_kernel([[maybe_unused]] const void* cubin,
                                               [[maybe_unused]] const int* fields, int num_fields,
                                               [[maybe_unused]] int bfloat16, char* error,
                                               size_t error_size) {
#ifdef FLASHMOE_WITH_CUDA
  try {
    if (num_fields != 11) throw std::runtime_error("expected 10 fields of a tile and a variant's");
    const flashmoe::Sm90Tile tile{fields[0], fields[1],      fields[2],      fields[3],
                                  fields[4], fields[5] != 0, fields[6] != 0, fields[7],
                                  fields[8], fields[9] != 0};
    return flashmoe::load_kernel(
        cubin, tile, {.local = fields[10] != 0},
        bfloat16 != 0 ? flashmoe::DType::bfloat16 : flashmoe::DType::float16);
  } catch (const std::exception& exception) {
    std::snprintf(error, error_size, "%s", exception.what());
  }
#else
  std::snprintf(error, error_size, "this build has no CUDA kernels (%d fields)", num_fields);
#endif
  return -1;
}

STABLE_TORCH_LIBRARY(flashmoe, m) {
  m.def(
      "fwd_cpu(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, "
      "int window_right, int block_m, int block_n) -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "fwd_cuda(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, "
      "int window_right, int kernel) -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "bwd_cuda(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
      "Tensor? dlse, float softmax_scale, int window_left, int window_right, int kernel) -> "
      "(Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(flashmoe, CPU, m) { m.impl("fwd_cpu", TORCH_BOX(&flashmoe::fwd_cpu_op)); }

#ifdef FLASHMOE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(flashmoe, CUDA, m) {
  m.impl("fwd_cuda", TORCH_BOX(&flashmoe::fwd_cuda_op));
  m.impl("bwd_cuda", TORCH_BOX(&flashmoe::bwd_cuda_op));
}
#endif
