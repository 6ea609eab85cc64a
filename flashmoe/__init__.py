"""FlashAttention that installs anywhere, tunes itself and cannot get slower unnoticed."""

from __future__ import annotations

from flashmoe.api import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
)
from flashmoe.machine.device import Arch
from flashmoe.planning.plan import Plan, make_plan
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem
from flashmoe.spec.shapes import record_problems
from flashmoe.tiles import Tile

__version__ = "0.1.0"

__all__ = [
    "Arch",
    "Mask",
    "Plan",
    "Problem",
    "Tile",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "make_plan",
    "record_problems",
    "scaled_dot_product_attention",
]
