"""One pass of a frozen vision transformer over images of different tasks.

Everything but the prompts is the same for all images and is computed for the whole batch at once.
In attention every image reads the keys and values of its own task's prompts, by their place; they
are neither gathered nor padded. Visual Prompt Tuning (arXiv 2203.12119), section 3.2, without the
prompts' dead rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import Tensor

from vpt_fast.bank.places import Places
from vpt_fast.bank.task_experts import ExpertGroup
from vpt_fast.models.attention_inputs import attention_tokens, packed_prompts
from vpt_fast.models.fusion.fused_block import Use, block_config, block_weights
from vpt_fast.models.patches import embedded_patches
from vpt_fast.models.vit.blocks import is_fusable
from vpt_fast.models.vit.head_rows import rows_read
from vpt_fast.modules.experts import EPS
from vpt_fast.modules.norms import is_layer_norm, norm_of
from vpt_fast.ops.attention.ragged import bank_attention
from vpt_fast.ops.backend import (
    computing_dtype,
    in_full_precision,
    statistics_dtype,
    uses_kernels,
)
from vpt_fast.ops.block.add_norm import OpenSum, Saved
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.parts import BlockConfig, BlockWeights
from vpt_fast.ops.block.sites import OPERATOR_SITES
from vpt_fast.ops.rowwise.residual_norm import residual_norm


def features(model: Any, images: Tensor, places: Places) -> Tensor:
    """What the tasks' heads read, (B, F), from images (B, channels, height, width).

    Args:
        model: a plain, frozen VisionTransformer or VisionTransformerDistilled in eval mode.
        images: on its device.
        places: of the images' prompts.
    """
    patches = embedded_patches(model.patch_embed, images)
    x = model.norm_pre(model.patch_drop(model._pos_embed(patches)))
    total, count = OpenSum(x), rows_read(model, Block)
    last = len(model.blocks) - 1
    for index, block in enumerate(model.blocks):
        prompts = _BlockPrompts(places, index)
        first = count if index == last else None
        # As in a tuned model: the CPU has a cheaper way to compute one or two rows of a block.
        if is_fusable(block) and (first is None or uses_kernels(x)):
            total = _fused(block, total, prompts, first)
        else:
            total = OpenSum(_by_modules(block, total.closed(), prompts, first))
    x = model.norm(total.closed())
    if isinstance(model, VisionTransformerDistilled):
        return x[:, :2].flatten(1)
    pooled: Tensor = model.forward_head(x, pre_logits=True)
    return pooled


class _BlockPrompts:
    """The prompts of one block."""

    def __init__(self, places: Places, index: int) -> None:
        self.places, self.index = places, index

    @property
    def groups(self) -> tuple[ExpertGroup, ...]:
        """Those whose prompts this block makes: none in the first block."""
        return self.places.groups if self.index else ()

    def make(
        self,
        block: Any,
        x: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Keys and values (rows, 2, H, d) of the prompts that experts make of x (B, N, D)."""
        rest = self.places.rest
        if mean is None or rstd is None:
            return rest[:0]
        rows = []
        for group in self.groups:
            with in_full_precision(x):
                prompts = group.prompts(x, mean, rstd, self.index)
                rows.append(_normalised(block.norm1, prompts, dtype).flatten(0, 1))
        return packed_prompts(block.attn, torch.cat(rows)[None])[0]

    def attend(self, tokens: list[Tensor], made: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of every image's tokens, which read its own prompts too."""
        places, index = self.places, self.index
        return bank_attention(
            tokens, places.rest, made.to(places.rest.dtype), places.starts[index],
            places.counts[index], places.most[index], scale,
        )  # fmt: skip


def _normalised(norm: Any, prompts: Tensor, dtype: torch.dtype) -> Tensor:
    """norm1 of prompts (n, p, D), which are fp32 at least; a LayerNorm is taken as exactly."""
    if not is_layer_norm(norm):
        result: Tensor = norm.forward(prompts.to(dtype))
        return result
    weight, bias = (None if t is None else t.to(prompts.dtype) for t in (norm.weight, norm.bias))
    return F.layer_norm(prompts, prompts.shape[-1:], weight, bias, norm.eps).to(dtype)


class _Steps(BlockSteps):
    """A fused block whose attention reads the bank."""

    def __init__(
        self,
        config: BlockConfig,
        weights: BlockWeights,
        dtype: torch.dtype,
        prompts: _BlockPrompts,
        made: Tensor,
    ) -> None:
        super().__init__(config, weights, dtype, OPERATOR_SITES)
        self.prompts, self.made = prompts, made

    def attend(self, tokens: tuple[Tensor, ...], keys: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.prompts.attend(list(tokens), self.made, self.config.scale)


def _fused(block: Any, total: OpenSum, prompts: _BlockPrompts, first: int | None) -> OpenSum:
    """As one function: the first rows of the block's output, or all of them."""
    dtype = computing_dtype(total.residual)
    eps = EPS if prompts.groups else None
    with in_full_precision(total.residual):
        summed, y, statistics = residual_norm(
            total.residual, total.branch, total.scale, *norm_of(block.norm1), eps, dtype
        )
        x = total.residual if total.branch is None else summed
    mean, rstd = (None, None) if eps is None else (statistics[0], statistics[2])
    made = prompts.make(block, x, mean, rstd, dtype)
    weights = block_weights(block)
    config = block_config(block, None, Use("speed", queries=first))
    steps = _Steps(config, weights.to(dtype), dtype, prompts, made)
    with in_full_precision(x):
        middle, result, _ = steps.forward_from(y, Saved(x, statistics))
    return OpenSum(middle, result, weights.scale2)


def _by_modules(block: Any, x: Tensor, prompts: _BlockPrompts, first: int | None) -> Tensor:
    """Module by module: the first rows of the block's output, or all of them."""
    y, mean, rstd = block.norm1(x), None, None
    if prompts.groups:
        wide = x.to(statistics_dtype(x.dtype))
        variance, mean = torch.var_mean(wide, -1, correction=0)
        rstd = (variance + EPS).rsqrt()
    made = prompts.make(block, x, mean, rstd, x.dtype)
    queries = None if first is None else y[:, :first]
    tokens = attention_tokens(block.attn, y, queries)
    out, _ = prompts.attend(tokens, made, block.attn.scale)
    x = x if first is None else x[:, :first]
    x = x + block.drop_path1(block.ls1(block.attn.proj_drop(block.attn.proj(out))))
    found: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return found
