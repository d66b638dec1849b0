"""One pass of a frozen vision transformer over images of different tasks.

Everything but the prompts is the same for all images and is computed for the whole batch at once.
In attention every image reads the keys and values of its own task's prompts, by their place; they
are neither gathered nor padded. Visual Prompt Tuning (arXiv 2203.12119), section 3.2, without the
prompts' dead rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn.modules import module as nn_module

from vpt_fast.attention_inputs import attention_tokens, prompt_keys_values
from vpt_fast.bank.task_experts import ExpertGroup, TaskExperts, expert_groups
from vpt_fast.experts import EPS
from vpt_fast.fused_block import block_config, block_weights, can_fuse, layer_scale
from vpt_fast.hooks import has_hooks, has_own_forward
from vpt_fast.norms import is_layer_norm, norm_of
from vpt_fast.ops.backend import computing_dtype, in_full_precision, statistics_dtype
from vpt_fast.ops.bank_attention import bank_attention
from vpt_fast.ops.block_body import BlockConfig, BlockSteps, BlockWeights
from vpt_fast.ops.block_entry import OpenSum
from vpt_fast.ops.residual_norm import residual_norm


@dataclass(frozen=True)
class Held:
    """Where a task's keys and values are.

    Attributes:
        start: row of the first of them in the bank's pool.
        blocks: those whose prompts are there, `count` rows each, one block after another.
        count: prompts of a block.
        experts: what makes the other blocks' prompts, or None.
    """

    start: int
    blocks: tuple[int, ...]
    count: int
    experts: TaskExperts | None


@dataclass(frozen=True)
class Places:
    """Whose prompts are where, for one batch.

    Attributes:
        rest: the pool's keys and values (rows, 2, H, d).
        starts: (blocks, B), row of an image's first prompt in `rest`; -1 - row in what the
            block's experts make.
        counts: (blocks, B), number of an image's prompts.
        most: of each block, the largest of its counts.
        groups: images whose prompts are made in the call, in the order in which they are made.
    """

    rest: Tensor
    starts: Tensor
    counts: Tensor
    most: tuple[int, ...]
    groups: tuple[ExpertGroup, ...]


def find_places(held: Sequence[Held], depth: int, rest: Tensor) -> Places:
    """The places of a batch's prompts.

    Args:
        held: of every image's task.
        depth: number of blocks.
        rest: the pool's keys and values (rows, 2, H, d).
    """
    device = rest.device
    groups = expert_groups([h.experts for h in held], device)
    made: dict[int, int] = {}
    at = 0
    for group in groups:
        for image in group.members:
            made[image] = -1 - at
            at += group.tasks[0].num_prompts
    starts, counts = [], []
    for block in range(depth):
        row, number = [], []
        for image, task in enumerate(held):
            if block in task.blocks:
                row.append(task.start + task.blocks.index(block) * task.count)
                number.append(task.count)
            elif image in made and block:
                row.append(made[image])
                number.append(task.count)
            else:
                row.append(0)
                number.append(0)
        starts.append(row)
        counts.append(number)
    return Places(
        rest,
        torch.tensor(starts, device=device),
        torch.tensor(counts, device=device),
        tuple(max(number, default=0) for number in counts),
        groups,
    )


def features(model: Any, images: Tensor, places: Places) -> Tensor:
    """What the tasks' heads read, (B, F), from images (B, channels, height, width).

    Args:
        model: a plain, frozen VisionTransformer or VisionTransformerDistilled in eval mode.
        images: on its device.
        places: of the images' prompts.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    total, count = OpenSum(x), _rows_read(model)
    last = len(model.blocks) - 1
    for index, block in enumerate(model.blocks):
        prompts = _BlockPrompts(places, index)
        if index == last and count is not None:
            total = OpenSum(_by_modules(block, total.closed(), prompts, count))
        elif _fuses(block):
            total = _fused(block, total, prompts)
        else:
            total = OpenSum(_by_modules(block, total.closed(), prompts, None))
    x = model.norm(total.closed())
    if isinstance(model, VisionTransformerDistilled):
        return x[:, :2].flatten(1)
    pooled: Tensor = model.forward_head(x, pre_logits=True)
    return pooled


def _rows_read(model: Any) -> int | None:
    """Rows of the last block's output that the head reads, if they are its first."""
    if model.global_pool != "token" or model.attn_pool is not None:
        return None
    watched = [m for part in (model.blocks[-1], model.norm) for m in part.modules()]
    if nn_module._has_any_global_hook() or any(has_hooks(m) for m in watched):
        return None
    return 2 if isinstance(model, VisionTransformerDistilled) else 1


def _fuses(block: Any) -> bool:
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and not (has_hooks(block) or has_own_forward(block))
        and can_fuse(block)
    )


class _BlockPrompts:
    """The prompts of one block."""

    def __init__(self, places: Places, index: int) -> None:
        self.places, self.index = places, index

    @property
    def groups(self) -> tuple[ExpertGroup, ...]:
        """Those whose prompts this block makes: none in the first block."""
        return self.places.groups if self.index else ()

    def make(self, block: Any, x: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
        """Keys and values (rows, 2, H, d) of the prompts that experts make of x (B, N, D)."""
        rest = self.places.rest
        if mean is None or rstd is None:
            return rest[:0]
        rows = []
        for group in self.groups:
            with in_full_precision(x):
                prompts = group.prompts(x, mean, rstd, self.index)
                rows.append(_normalised(block.norm1, prompts, x.dtype).flatten(0, 1))
        keys = prompt_keys_values(block.attn, torch.cat(rows)[None])
        return torch.stack(keys, 2)[0] if len(keys) == 2 else keys[0][0]

    def attend(self, tokens: list[Tensor], made: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of every image's tokens, which read its own prompts too."""
        places, index = self.places, self.index
        dtype = tokens[0].dtype
        return bank_attention(
            tokens, places.rest.to(dtype), made.to(dtype), places.starts[index],
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
        super().__init__(config, weights, dtype)
        self.prompts, self.made = prompts, made

    def attend(self, qkv: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.prompts.attend([qkv], self.made, self.config.scale)


def _fused(block: Any, total: OpenSum, prompts: _BlockPrompts) -> OpenSum:
    dtype = computing_dtype(total.residual)
    eps = EPS if prompts.groups else None
    with in_full_precision(total.residual):
        summed, y, statistics = residual_norm(
            total.residual, total.branch, total.scale, *norm_of(block.norm1), eps, dtype
        )
        x = total.residual if total.branch is None else summed
    mean, rstd = (None, None) if eps is None else (statistics[0], statistics[2])
    made = prompts.make(block, x, mean, rstd)
    steps = _Steps(block_config(block), block_weights(block), dtype, prompts, made)
    with in_full_precision(x):
        middle, result, _ = steps.forward(x, y, ())
    return OpenSum(middle, result, layer_scale(block, "ls2"))


def _by_modules(block: Any, x: Tensor, prompts: _BlockPrompts, first: int | None) -> Tensor:
    """Module by module: the first rows of the block's output, or all of them."""
    y, mean, rstd = block.norm1(x), None, None
    if prompts.groups:
        wide = x.to(statistics_dtype(x.dtype))
        variance, mean = torch.var_mean(wide, -1, correction=0)
        rstd = (variance + EPS).rsqrt()
    made = prompts.make(block, x, mean, rstd)
    queries = None if first is None else y[:, :first]
    tokens = attention_tokens(block.attn, y, queries)
    out, _ = prompts.attend(tokens, made, block.attn.scale)
    x = x if first is None else x[:, :first]
    x = x + block.drop_path1(block.ls1(block.attn.proj_drop(block.attn.proj(out))))
    found: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return found
