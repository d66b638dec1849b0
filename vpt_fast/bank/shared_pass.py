"""One pass of a frozen vision transformer over images of different tasks.

Everything but the prompts is the same for all images and is computed for the whole batch at once.
In attention every image reads the keys and values of its own task's prompts at their row offsets;
they are neither gathered nor padded. Visual Prompt Tuning (arXiv 2203.12119), section 3.2, without
computing the prompts' own output rows, which are discarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from vpt_fast.bank.batch_index import BatchIndex
from vpt_fast.bank.task_experts import ExpertGroup
from vpt_fast.bank.task_modules import ModuleGroup
from vpt_fast.models.attention_inputs import attention_tokens, packed_prompts, projected_out
from vpt_fast.models.family import family_of
from vpt_fast.models.fusion.fused_block import Use, block_config, block_weights, can_rotate
from vpt_fast.models.isotropic.head_rows import rows_read
from vpt_fast.models.isotropic.inputs import block_inputs, table_of
from vpt_fast.models.residual import add_branches
from vpt_fast.modules.experts import EPS
from vpt_fast.modules.norms import is_layer_norm, normalised_prompts
from vpt_fast.ops.attention.ragged import bank_attention
from vpt_fast.ops.backend import (
    computing_dtype,
    in_full_precision,
    statistics_dtype,
    uses_kernels,
)
from vpt_fast.ops.block.add_norm import DeferredSum, SavedInput
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.parts import BlockConfig, BlockWeights
from vpt_fast.ops.block.sites import OPERATOR_SITES
from vpt_fast.ops.rowwise.residual_norm import residual_norm
from vpt_fast.ops.rowwise.rotation import table_of_first


def features(model: Any, images: Tensor, index: BatchIndex) -> Tensor:
    """Return the input (B, F) of the tasks' heads.

    Args:
        model: Plain, frozen VisionTransformer, VisionTransformerDistilled or Eva in eval mode.
        images: (B, channels, height, width), on the model's device.
        index: Row offsets of the images' prompts.
    """
    family: Any = family_of(model)
    kind = family.block
    tokens, tables = block_inputs(model, images)
    total, count = DeferredSum(tokens), rows_read(model, kind.plain_class)
    last = len(model.blocks) - 1
    modules = [
        (group, group.feature(tokens)) for group in index.groups if isinstance(group, ModuleGroup)
    ]
    for number, block in enumerate(model.blocks):
        prompts = _BlockPrompts(index, number, modules)
        first = count if number == last else None
        # As in a tuned model: on the CPU one or two rows of a block are cheaper by modules.
        rope = table_of(tables, number)
        if (
            kind.is_fusable(block)
            and (is_layer_norm(block.norm1) or not prompts.experts)  # they share its statistics
            and (first is None or uses_kernels(total.residual))
            and can_rotate(rope, total.residual)
        ):
            total = _fused(block, total, prompts, first, rope)
        else:
            total = DeferredSum(_by_modules(block, total.materialize(), prompts, first, rope))
    x = model.norm(total.materialize())
    if isinstance(model, VisionTransformerDistilled):
        return x[:, :2].flatten(1)
    pooled: Tensor = model.forward_head(x, pre_logits=True)
    return pooled


class _BlockPrompts:
    """Prompts of one block.

    Args:
        index: Row offsets of the images' prompts.
        block: Index of the block.
        modules: Images of each task whose modules make prompts, and what its shared module made
            of them, or None.

    Attributes:
        experts: Images whose prompts experts compute in this block: none in the first block.
        modules: Those of `modules` with prompts in this block.
    """

    def __init__(
        self, index: BatchIndex, block: int, modules: Sequence[tuple[ModuleGroup, Any]]
    ) -> None:
        self.index, self.block = index, block
        self.experts = [
            group for group in index.groups if isinstance(group, ExpertGroup) and group.count(block)
        ]
        self.modules = [own for own in modules if own[0].count(block)]

    def compute(
        self,
        block: Any,
        x: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return keys and values (rows, 2, H, d) of the prompts that experts compute.

        Args:
            block: Timm block.
            x: Input of the block (B, N, D).
            mean: Mean of every row (B, N), or None in a block without experts.
            rstd: Reciprocal standard deviation of every row (B, N), or None likewise.
            dtype: Dtype of the normalised prompts.
        """
        rows, found = [], []
        for group in self.experts:
            with in_full_precision(x):
                prompts = group.prompts(x, mean, rstd, self.block)  # type: ignore[arg-type]
                rows.append(normalised_prompts(block.norm1, prompts, dtype).flatten(0, 1))
        if rows:
            found.append(packed_prompts(block.attn, torch.cat(rows)[None])[0])
        for own, feature in self.modules:
            found.append(own.kv(block, self.block, x, feature, dtype))
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else self.index.prompt_kv[:0]

    def attend(
        self, tokens: list[Tensor], computed_kv: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of attention to an image's tokens and its prompts.

        Args:
            tokens: Queries, keys and values of the tokens, as `bank_attention` takes them.
            computed_kv: Keys and values that `compute` returned.
            scale: Factor of the scores.
        """
        index, block = self.index, self.block
        return bank_attention(
            tokens, index.prompt_kv, computed_kv.to(index.prompt_kv.dtype),
            index.row_offsets[block], index.counts[block], index.max_counts[block], scale,
        )  # fmt: skip


class _Steps(BlockSteps):
    """Steps of a fused block whose attention reads the bank's prompts."""

    def __init__(
        self,
        config: BlockConfig,
        weights: BlockWeights,
        dtype: torch.dtype,
        prompts: _BlockPrompts,
        computed_kv: Tensor,
    ) -> None:
        super().__init__(config, weights, dtype, OPERATOR_SITES)
        self.prompts, self.computed_kv = prompts, computed_kv

    def attend(self, tokens: tuple[Tensor, ...], keys: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.prompts.attend(list(tokens), self.computed_kv, self.config.scale)


def _fused(
    block: Any,
    total: DeferredSum,
    prompts: _BlockPrompts,
    first: int | None,
    rope: Tensor | None,
) -> DeferredSum:
    """Return the first rows of the block's output, or all of them, by the fused operators."""
    dtype = computing_dtype(total.residual)
    eps = EPS if prompts.experts else None
    weights = block_weights(block)._replace(rope=rope)
    config = block_config(block, None, Use("speed", queries=first))
    with in_full_precision(total.residual):
        summed, y, statistics = residual_norm(
            *total, weights.norm1_weight, weights.norm1_bias, config.eps1, eps, dtype,
            config.centred,
        )  # fmt: skip
        x = total.residual if total.branch is None else summed
    mean, rstd = (None, None) if eps is None else (statistics[0], statistics[2])
    computed_kv = prompts.compute(block, x, mean, rstd, dtype)
    steps = _Steps(config, weights.to(dtype), dtype, prompts, computed_kv)
    with in_full_precision(x):
        middle, result, _ = steps.forward_entered(y, SavedInput(x, statistics))
    return DeferredSum(middle, result, weights.scale2)


def _by_modules(
    block: Any, x: Tensor, prompts: _BlockPrompts, first: int | None, rope: Tensor | None
) -> Tensor:
    """Return the first rows of the block's output, or all of them, module by module."""
    y, mean, rstd = block.norm1(x), None, None
    if prompts.experts:
        wide = x.to(statistics_dtype(x.dtype))
        variance, mean = torch.var_mean(wide, -1, correction=0)
        rstd = (variance + EPS).rsqrt()
    computed_kv = prompts.compute(block, x, mean, rstd, x.dtype)
    queries, query_rope = None, rope
    if first is not None:
        x, queries = x[:, :first], y[:, :first]
        query_rope = table_of_first(rope, y.shape[1], first)
    tokens = attention_tokens(block.attn, y, queries, rope, query_rope)
    out, _ = prompts.attend(tokens, computed_kv, block.attn.scale)
    return add_branches(block, x, projected_out(block.attn, out, y if queries is None else queries))
