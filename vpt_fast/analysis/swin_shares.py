"""Shares of attention that go to the prompts of a tuned SwinTransformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpt_fast.kernels.constants import LOG2_E
from vpt_fast.models.attention_inputs import projected_kv
from vpt_fast.models.prompt_rows import LiveRows
from vpt_fast.models.swin.blocks import windows_of
from vpt_fast.models.swin.stages import merge_rows
from vpt_fast.models.tuned import SHARED, reads_feature
from vpt_fast.ops.backend import statistics_dtype
from vpt_fast.ops.block.prompt_source import appended
from vpt_fast.ops.window_attention.operator import window_attention_operator
from vpt_fast.ops.window_attention.rows import padding_of


def window_shares(model: Any, images: Tensor) -> list[tuple[int, Tensor]]:
    """Return each block's index and the shares (B, H, p) of its prompts, mean over the queries.

    Every window of an image reads the same prompts; a token's share is that within its window,
    exp(scale * q k - lse).

    Args:
        model: Swin that was tuned with prompts, in eval mode.
        images: (B, C, H, W), as the model takes them.
    """
    found: list[tuple[int, Tensor]] = []
    x, live, index = model.patch_embed(images), LiveRows(), 0
    for stage in model.layers:
        x = stage.downsample(x)
        if live.rows is not None:
            live.rows = merge_rows(stage.downsample, live.rows)
        if SHARED in stage._modules and reads_feature(stage.blocks):
            live.feature = stage._modules[SHARED](x.flatten(1, 2))
        for block in stage.blocks:
            prompts, kv = live.rows, None
            if block.prompt is not None:
                prompts, kv = block.prompt.made(x.flatten(1, 2), live.feature)
            if prompts is not None or kv is not None:
                found.append((index, _shares(block, x, prompts, kv)))
            x = block(x, live=live)
            index += 1
    return found


def _shares(block: Any, x: Tensor, prompts: Tensor | None, kv: Tensor | None) -> Tensor:
    attn = block.attn
    # Past the hooks of norm1 and qkv, which are for what the block itself computes.
    qkv = attn.qkv.forward(block.norm1.forward(x)).unflatten(-1, (3, attn.num_heads, -1))
    keys: Any = kv
    if prompts is not None:
        normed = block.norm1.forward(prompts.to(x.dtype))
        keys = projected_kv(attn, normed, qkv.shape[-1])
        keys = keys if kv is None else appended(keys, kv)
    windows = windows_of(block, (x.shape[1], x.shape[2]))
    pad = padding_of(windows, attn.qkv_of_zeros(x), qkv)
    _, lse = window_attention_operator(
        qkv, pad, attn.relative_position_bias_table, keys,
        list(windows.window), list(windows.shift), attn.scale,
    )  # fmt: skip
    dtype = statistics_dtype(qkv.dtype)
    q = qkv[:, :, :, 0].to(dtype).flatten(1, 2).transpose(1, 2)  # (B, H, N, d)
    k = keys[:, :, 0].to(dtype).transpose(1, 2)  # (B or 1, H, p, d)
    scores = attn.scale * LOG2_E * (q @ k.transpose(-2, -1)) - lse.to(dtype).flatten(2).unsqueeze(
        -1
    )
    return torch.exp2(scores).mean(dim=2)
