"""Training under an autograd node in C++: one in Python takes the host longer than a small problem.

The stable ABI has no nodes. torch's attention op for other backends has a derivative, but on these
devices no kernels. csrc/torch_ops.cpp brings them, for calls whose dropout_p is a plan's number.
"""

from __future__ import annotations

import functools

import torch

from flashmoe import _extension

attention_under_node = torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default
_backward = torch.ops.aten._scaled_dot_product_fused_attention_overrideable_backward.default
_NAME = "aten::_scaled_dot_product_fused_attention_overrideable"
_SCHEMAS = (
    f"{_NAME}(Tensor query, Tensor key, Tensor value, Tensor? attn_bias=None, float dropout_p=0., "
    "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
    "Tensor philox_seed, Tensor philox_offset, Tensor debug_attn_mask)",
    f"{_NAME}_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor attn_bias, "
    "bool[4] grad_input_mask, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed, "
    "Tensor philox_offset, *, float? scale=None) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_attn_bias)",
)
# Whether training on GPUs is under it: a step's host time on (1, 128, 8, 64), 236 us, becomes 169
# (H200).
NODE_ON_GPUS = True
_KEYS = ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA")


@functools.cache
def has_node() -> bool:
    """Whether `attention_under_node` runs our kernels, which the first call of this brings: where
    its schemas are the known ones, and nobody else brought any."""
    if (str(attention_under_node._schema), str(_backward._schema)) != _SCHEMAS:
        return False
    taken = (
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        for name in (_NAME, f"{_NAME}_backward")
        for key in _KEYS
    )
    return not any(taken) and _extension.register_node()
