"""Tiles of the prompt-expert kernels: pure functions of shape and dtype.

Nothing is tuned at run time. Tiles of the token mixing have the fewest issue cycles per byte of x
in the code compiled for bf16, among those that spill no register. Warps and pipeline stages on
sm_90 are the fastest on an H200, in bf16 at 50 prompts and 768 channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..runtime.launch import Target, power_of_2_at_least
from ..runtime.row_tiles import RowTiles


class MixTiles(NamedTuple):
    """A program's tile: `prompts` by `width` channels, over `rows` patches per loop iteration."""

    prompts: int
    rows: int
    width: int
    num_warps: int
    num_stages: int


def feature_tiles(width: int, target: Target) -> RowTiles:
    """Return the tiles of the kernels that hold whole prompts."""
    block = power_of_2_at_least(width)
    return RowTiles(
        max(1, 4096 // block), block, 4 if block <= 1024 and not target.is_hopper else 8
    )


def mix_tiles(prompts: int, width: int, dtype: torch.dtype, target: Target) -> MixTiles:
    """Return the tiles of the token mixing."""
    block_d = min(256, power_of_2_at_least(width))
    block_p = power_of_2_at_least(prompts)
    if dtype != torch.bfloat16:
        return MixTiles(min(64, block_p), 16, min(128 if block_p == 16 else 64, block_d), 4, 2)
    if block_p <= 32:
        return MixTiles(block_p, 32, block_d, 4, 3)
    if block_p == 64:
        return MixTiles(64, 32, min(128, block_d), 4, 3 if target.is_hopper else 2)
    return MixTiles(128, 32, min(128, block_d), 8, 3)


def mix_gradient_tiles(prompts: int, width: int, dtype: torch.dtype, target: Target) -> MixTiles:
    """Return the tiles of the gradients of tokens and mixing weight: `rows` by all prompts."""
    block_p, block_d = power_of_2_at_least(prompts), min(32, power_of_2_at_least(width))
    if dtype != torch.bfloat16 or block_p > 64:
        most = {torch.bfloat16: 128, torch.float16: 64, torch.float32: 32}[dtype]
        return MixTiles(block_p, 16, block_d, 4 if block_p <= most else 8, 2)
    stages = 3 if target.is_hopper else 2
    return MixTiles(block_p, 64 if block_p <= 32 else 32, block_d, 4, stages)


def weight_gradient_tiles(hidden_dim: int, width: int, target: Target) -> MixTiles:
    """Return the tiles of the gradients of projector and LayerNorm: `rows` prompts a step."""
    stages = 3 if target.is_hopper else 1
    block_d = min(64, power_of_2_at_least(width))
    return MixTiles(power_of_2_at_least(hidden_dim), 16, block_d, 4, stages)
