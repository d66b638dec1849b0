"""timm's Block with prompts: the class that tuned blocks are given.

It overrides `forward` only, so that names, state dicts, copies and pickles stay timm's. In
VPT-Deep a prompt is only a key and a value: its rows of the block's output are never read, so
the block is (B, N, D) -> (B, N, D), like the one it replaces. Prompt rows that are read later
(VPT-Shallow, a prompted block before an unprompted one) stand after the prefix tokens as tokens.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.models.fusion import fused_block
from vpt_fast.models.fusion.fused_block import NO_PROMPTS, Fused, Use
from vpt_fast.models.fusion.look_ahead import prompts_of
from vpt_fast.models.prompt_rows import PromptRows, extend_mask, insert_rows, strip_rows
from vpt_fast.models.recompute import recomputed
from vpt_fast.models.vit.attention import PromptedAttention
from vpt_fast.modules.experts import takes_experts
from vpt_fast.modules.hooks import (
    call_compiled,
    has_compiled_call,
    has_hooks,
    has_own_forward,
    is_watched,
)
from vpt_fast.modules.row_by_row import treats_rows_apart
from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.tracing import is_transformed


class PromptedBlock(Block):
    """timm's Block with prompts of its own, with live prompt rows passing through, or both.

    A submodule `adapter`, if it has one, maps the MLP's output (B, N, D) before the residual sum.

    Attributes:
        prompt: module that makes this block's prompts from its tokens, or None.
        rows: where prompt rows stand in its input and output.
        memory: what it keeps for backward, one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
    """

    attn: PromptedAttention
    prompt: nn.Module | None
    rows: PromptRows
    memory: str

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As every module's call; hooks see the block as (B, N, D) -> (B, N, D)."""
        rows = self.rows
        if not (rows.entering or rows.leaving) or not has_hooks(self):
            return super().__call__(x, *args, **kwargs)
        live = _LiveRows(x[:, rows.prefix : rows.prefix + rows.entering])
        x = strip_rows(x, rows.entering, rows.prefix)
        x = super().__call__(x, *args, live=live, **kwargs)
        return insert_rows(x, live.rows, rows.prefix) if rows.leaving else x

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        live: _LiveRows | None = None,
        first: int | None = None,
    ) -> Tensor:
        """(B, entering + N, D) -> (B, leaving + N, D), or the `first` rows of that.

        Args:
            x: tokens, with the live prompt rows that enter.
            attn_mask: as timm's, (..., N, N) without prompt rows; prompts are always visible.
            is_causal: refused: prompts have no place in an order of tokens.
            live: prompt rows that travel beside x instead of in it.
            first: as `count` of `forward_first`, without `attn_mask` and `live` only.

        Raises:
            ValueError: `is_causal` is True.
        """
        if first is not None:
            return self._first_rows(DeferredSum(x), first, self.memory)
        if self.prompt is None and not self.rows.entering:
            if attn_mask is not None or is_causal:
                return self._plain(x, attn_mask, is_causal)
        elif is_causal:
            raise ValueError("is_causal=True cannot be used with prompts; pass an attn_mask")
        if live is not None:
            x = insert_rows(x, live.rows, self.rows.prefix)
        if attn_mask is None:
            x = self.forward_open(DeferredSum(x), self.memory).materialize()
        elif self.memory == "speed":
            x = self._concatenated(x, attn_mask)
        else:
            x = recomputed(self, self._concatenated, x, attn_mask)
        if live is not None and self.rows.leaving:
            prefix, leaving = self.rows.prefix, self.rows.leaving
            live.rows = x[:, prefix : prefix + leaving]
            x = strip_rows(x, leaving, prefix)
        return x

    def forward_open(self, total: DeferredSum, memory: str) -> DeferredSum:
        """As `forward`, from and to a residual sum that is left to its reader.

        Hooks on the block itself are not called.

        Args:
            total: tokens, with the live prompt rows that enter.
            memory: what is kept for backward.
        """
        rows, prompt = self.rows, self._modules.get("prompt")
        now = None
        if prompt is not None or rows.leaving or not rows.entering:
            now = fused(self, total.residual)
        if now is None:
            return DeferredSum(self._by_modules(total, memory))
        if prompt is not None and (rows.entering or rows.leaving):
            x = strip_rows(total.materialize(), rows.entering, rows.prefix)
            if rows.leaving:
                x, prompt = insert_rows(x, prompt(x), rows.prefix), None
            total = DeferredSum(x)
        prompts = prompts_of(prompt, total.residual)
        return fused_block.run(self, now, prompts, total, Use(memory))

    def forward_first(self, total: DeferredSum, count: int, memory: str) -> Tensor:
        """The `count` first rows of the output, (B, count, D), from all rows of the input.

        On a GPU all keys and values are made, which its matrix units do faster than the smaller
        products that `absorbed_attention` has in their place.

        Args:
            total, memory: as for `forward_open`.
            count: of the rows.
        """
        if not has_compiled_call(self):
            return self._first_rows(total, count, memory)
        x = total.materialize()
        if memory == self.memory:
            return call_compiled(self, x, first=count)
        return recomputed(self, lambda x: self(x, first=count), x)

    def _first_rows(self, total: DeferredSum, count: int, memory: str) -> Tensor:
        rows, now = self.rows, None
        if uses_kernels(total.residual) and not (rows.entering or rows.leaving):
            now = fused(self, total.residual)
        if now is None:
            return self._by_modules(total, memory, count)
        prompts = prompts_of(self._modules.get("prompt"), total.residual)
        return fused_block.run(self, now, prompts, total, Use(memory, queries=count)).materialize()

    def _by_modules(self, total: DeferredSum, memory: str, first: int | None = None) -> Tensor:
        """Module by module; anything but "speed" keeps the block's input only."""
        if memory == "speed":
            return self._forward(total, first)
        return recomputed(self, lambda x: self._forward(DeferredSum(x), first), total.materialize())

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x with this block's live rows in it, and the prompts that are keys and values only."""
        rows = self.rows
        if self.prompt is None:
            return x, None
        x = strip_rows(x, rows.entering, rows.prefix)
        prompts = self.prompt(x)
        if rows.leaving:
            return insert_rows(x, prompts, rows.prefix), None
        return x, prompts.to(x.dtype)

    def _normalise(self, total: DeferredSum) -> tuple[Tensor, Tensor, Tensor | None]:
        """`_enter`, then norm1 of the tokens and of the prompts that are keys and values only."""
        if takes_experts(self.prompt, self.norm1):
            return self.prompt.with_norm(total, self.norm1)
        x, prompts = self._enter(total.materialize())
        prompts = None if prompts is None else self.norm1.forward(prompts)
        return x, self.norm1(x), prompts

    def _forward(self, total: DeferredSum, first: int | None) -> Tensor:
        if self._needs_all_rows():
            x = self._concatenated(total.materialize())
            return x if first is None else x[:, :first]
        x, y, prompts = self._normalise(total)
        dead = self.rows.entering if self.prompt is None and not self.rows.leaving else 0
        queries = None
        if first is not None:
            x, queries = x[:, :first], y[:, :first]
        elif dead:
            x = strip_rows(x, dead, self.rows.prefix)
            queries = strip_rows(y, dead, self.rows.prefix)
        x = x + self.drop_path1(self.ls1(self.attn(y, prompts=prompts, queries=queries)))
        return self._through_mlp(x)

    def _needs_all_rows(self) -> bool:
        """Whether a part may do anything with the rows, or a hook would miss some of them.

        Hooks may change what they see; what comes after the keys is the tokens' own.
        """
        attn: Any = self._modules["attn"]
        parts = [part for name, part in self._modules.items() if name not in ("attn", "prompt")]
        return (
            is_transformed()
            or type(attn) is not PromptedAttention
            or has_own_forward(attn)
            or not treats_rows_apart(*parts, *attn._modules.values())
            or bool(attn._forward_pre_hooks or attn._backward_hooks)
            or nn_module._has_any_global_hook()
            or is_watched(self.norm1, attn.qkv, attn.q_norm, attn.k_norm)
            or (not attn.fused_attn and is_watched(attn.attn_drop))
        )

    def _through_mlp(self, x: Tensor) -> Tensor:
        """The second half of the block: x with its MLP's output, adapted or not, added to it."""
        adapter = self._modules.get("adapter")
        h = self.ls2(self.mlp(self.norm2(x)))
        return x + self.drop_path2(h if adapter is None else adapter(h))

    def _plain(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor:
        """timm's own forward, and the adapter."""
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return self._through_mlp(x + self.drop_path1(self.ls1(y)))

    def _concatenated(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """As published: prompts are ordinary rows of timm's own block, which a mask may cover."""
        rows = self.rows
        count, leaving = rows.entering, rows.leaving
        if self.prompt is not None:
            x = strip_rows(x, rows.entering, rows.prefix)
            prompts = self.prompt(x)
            count = prompts.shape[1]
            x = insert_rows(x, prompts, rows.prefix)
        if attn_mask is not None:
            attn_mask = extend_mask(attn_mask, count, rows.prefix)
        x = self._plain(x, attn_mask)
        return x if leaving else strip_rows(x, count, rows.prefix)


class _LiveRows:
    """Live prompt rows (B, p, D) on their way past the hooks of a block."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


def is_fusable(block: Any) -> bool:
    """`fused_block.can_fuse`; no subclass or wrapper, whose `forward` would be passed by."""
    return _is_known(block) and fused_block.can_fuse(block)


def fused(block: Any, x: Tensor | None) -> Fused | None:
    """`fused_block.fused`; no subclass or wrapper, whose `forward` would be passed by."""
    return fused_block.fused(block, x) if _is_known(block) else None


def _is_known(block: Any) -> bool:
    return type(block) in (Block, PromptedBlock) and type(block._modules.get("attn")) in (
        Attention,
        PromptedAttention,
    )


def through_block(block: Any, total: DeferredSum, memory: str) -> DeferredSum:
    """A frozen or prompted block, called so that its own hooks are.

    Args:
        block: timm's `Block` or a `PromptedBlock`.
        total: its input, a sum that is left to it.
        memory: what is kept for backward.
    """
    compiled = has_compiled_call(block)
    watched = has_hooks(block) or has_own_forward(block) or nn_module._has_any_global_hook()
    if not (compiled or watched):
        if isinstance(block, PromptedBlock):
            return block.forward_open(total, memory)
        now = fused(block, total.residual)
        if now is not None:
            return fused_block.run(block, now, NO_PROMPTS, total, Use(memory))
    x = total.materialize()
    if memory != getattr(block, "memory", "speed"):
        return DeferredSum(recomputed(block, block, x))
    return DeferredSum(call_compiled(block, x) if compiled else block(x))
