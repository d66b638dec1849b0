"""timm's Swin stage with prompts: it passes live prompt rows from block to block."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerStage
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as nn_module

from vpt_fast.models.fusion import fused_block
from vpt_fast.models.fusion.fused_block import Use
from vpt_fast.models.fusion.look_ahead import look_ahead
from vpt_fast.models.interop.symbolic import through_blocks_symbolically
from vpt_fast.models.prompt_rows import LiveRows
from vpt_fast.models.recompute import recomputed
from vpt_fast.models.swin.blocks import check_blocks, check_expert_grid, fused, grid_of, windows_of
from vpt_fast.models.tuned import SHARED, reads_feature
from vpt_fast.modules.hooks import (
    call_compiled,
    has_compiled_call,
    has_hooks,
    has_own_forward,
    hint_sizes,
    is_taken_over,
    is_watched,
)
from vpt_fast.ops.block.add_norm import DeferredSum


class PromptedSwinStage(SwinTransformerStage):
    """timm's SwinTransformerStage, whose blocks defer residual sums and pass prompt rows on."""

    def forward(self, x: Tensor, live: LiveRows | None = None) -> Tensor:
        """Return the stage's output, as timm's.

        Args:
            x: Input (B, H, W, D).
            live: Prompt rows that enter; those that leave replace them.

        Raises:
            ValueError: A hook on `blocks` would miss prompt rows.
        """
        x = self.downsample(x)
        if isinstance(x, Proxy):
            return through_blocks_symbolically(self, x)
        live = LiveRows() if live is None else live
        if live.rows is not None:
            live.rows = merge_rows(self.downsample, live.rows)
        blocks: Any = list(self.blocks)
        check_blocks(blocks)
        apart = type(self.blocks) is not nn.Sequential or is_taken_over(self.blocks)
        if apart and not self.grad_checkpointing:
            if any(block.rows.entering or block.rows.leaving for block in blocks):
                raise ValueError(
                    "the stage's `blocks` are hooked, compiled or not timm's, but prompt rows pass "
                    "beside what they see; hook or compile the stage or its blocks instead"
                )
            _check_compiled(self.blocks)
            return self.blocks(x)
        grid = grid_of(x)
        for block in blocks:
            check_expert_grid(block._modules.get("prompt"), grid)
        total = self._through(blocks, DeferredSum(x.flatten(1, 2)), grid, live)
        return total.materialize().unflatten(1, grid)

    def _through(
        self, blocks: list[Any], total: DeferredSum, grid: tuple[int, int], live: LiveRows
    ) -> DeferredSum:
        """Return the output of the blocks for rows (B, H * W, D) of an image of grid (H, W)."""
        memories = ["minimal" if self.grad_checkpointing else block.memory for block in blocks]
        shared = self._modules.get(SHARED)
        if shared is not None and reads_feature(blocks):
            live.feature = shared(total.residual)
        ahead = look_ahead(blocks, total.residual, fused, live.feature)
        if ahead is not None:
            live.rows = None
            uses = [
                Use(memory, windows_of(block, grid))
                for block, memory in zip(blocks, memories, strict=True)
            ]
            return fused_block.run_together(*ahead, total, uses, [None] * len(blocks))
        for block, memory in zip(blocks, memories, strict=True):
            total = _through_block(block, total, grid, memory, live)
        return total


def _check_compiled(blocks: nn.Module) -> None:
    """Raise ValueError if PyTorch's compiler fails on tuned blocks one after the other."""
    if not has_compiled_call(blocks):
        return
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        raise ValueError(
            f"PyTorch {torch.__version__} cannot compile the `blocks` of a tuned stage; compile "
            "the stage, each of its blocks or the model, or take PyTorch 2.14"
        )


def merge_rows(downsample: nn.Module, rows: Tensor) -> Tensor:
    """Return the patch merging (B, p, 2 D) of prompt rows (B, p, D), each as four neighbours.

    The merging's own hooks are not called: they expect images.

    Raises:
        ValueError: A part of it is hooked, or its forward was replaced.
    """
    if type(downsample) is nn.Identity:
        return rows
    if type(downsample) is not PatchMerging or has_own_forward(downsample):
        raise ValueError(
            f"downsample of this stage is a {type(downsample).__name__} with a forward of its own, "
            "which knows no prompt rows; put timm's PatchMerging back, or prompt every block"
        )
    for name, part in downsample.named_children():
        if is_watched(part):
            raise ValueError(
                f"downsample.{name} of this stage is hooked, but prompt rows pass beside the image "
                "that the hook sees; hook the downsample itself, or prompt every block"
            )
    return downsample.reduction(downsample.norm(rows.repeat(1, 1, 4)))


def _through_block(
    block: Any, total: DeferredSum, grid: tuple[int, int], memory: str, live: LiveRows
) -> DeferredSum:
    """Compute a block, hooks on it included."""
    compiled = has_compiled_call(block)
    watched = has_hooks(block) or has_own_forward(block) or nn_module._has_any_global_hook()
    if not (compiled or watched):
        return block.forward_deferred(total, grid, memory, live)
    calls = functools.partial(call_compiled, block) if compiled else block

    def call(x: Tensor, entering: Tensor | None) -> tuple[Tensor, Tensor | None]:
        passing = LiveRows(entering, live.feature)
        if compiled and entering is not None:
            hint_sizes(entering)
        beside = block.rows.entering or block.rows.leaving or live.feature is not None
        x = calls(x, live=passing) if beside else calls(x)
        return x, passing.rows

    x = total.materialize().unflatten(1, grid)
    if memory == block.memory:
        x, live.rows = call(x, live.rows)
    else:
        x, live.rows = recomputed(block, call, x, live.rows)
    return DeferredSum(x.flatten(1, 2))
