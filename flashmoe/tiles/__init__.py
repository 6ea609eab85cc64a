"""Tiles: the tunable shape of a kernel. fields.py has every family's fields, and a module for each
kernel says what is legal for it."""

from __future__ import annotations

from flashmoe.tiles.decode import DECODE_HEAD_DIMS, decode_smem_bytes
from flashmoe.tiles.fields import FAMILIES, FLAGS, axes, columns
from flashmoe.tiles.sm80 import SM80_HEAD_DIMS, instance_head_dim, sm80_smem_bytes
from flashmoe.tiles.sm90 import sm90_head_dim, sm90_registers, sm90_smem_bytes
from flashmoe.tiles.sm90_bwd import (
    SM90_BWD_HEAD_DIMS,
    sm90_bwd_head_dim,
    sm90_bwd_smem_bytes,
)
from flashmoe.tiles.tile import Tile, grid
from flashmoe.tiles.triton import triton_head_dim, triton_registers, triton_smem_bytes
from flashmoe.tiles.variant import PLAIN, Variant

__all__ = [
    "DECODE_HEAD_DIMS",
    "FAMILIES",
    "FLAGS",
    "PLAIN",
    "SM80_HEAD_DIMS",
    "SM90_BWD_HEAD_DIMS",
    "Tile",
    "Variant",
    "axes",
    "columns",
    "decode_smem_bytes",
    "grid",
    "instance_head_dim",
    "sm80_smem_bytes",
    "sm90_bwd_head_dim",
    "sm90_bwd_smem_bytes",
    "sm90_head_dim",
    "sm90_registers",
    "sm90_smem_bytes",
    "triton_head_dim",
    "triton_registers",
    "triton_smem_bytes",
]
