"""What serving engines load by themselves where flashmoe is installed (pyproject.toml,
entry-points): names, whose adapters are imported when they are chosen."""

from __future__ import annotations

from typing import Any

VLLM_NAME = "FLASHMOE"
SGLANG_NAME = "flashmoe"


def register_vllm() -> None:
    """Make attention_backend="FLASHMOE" known to vLLM in this process. VLLM_PLUGINS can leave the
    plugin, "flashmoe", out."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if VLLM_NAME not in AttentionBackendEnum.__members__:
        register_backend(VLLM_NAME, "flashmoe.integrations.vllm.FlashmoeBackend")


def register_sglang() -> None:
    """Make --attention-backend flashmoe known to SGLang in this process. SGLANG_PLUGINS can leave
    the plugin, "flashmoe", out."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    def made(model_runner: Any) -> Any:
        from flashmoe.integrations.sglang import FlashmoeAttnBackend

        return FlashmoeAttnBackend(model_runner)

    register_attention_backend(SGLANG_NAME)(made)
    add_attention_backend_choices([SGLANG_NAME])
