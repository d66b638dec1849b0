"""A pre-norm transformer block with prompts: what the tuned blocks of all families share.

It overrides calls only, so that names, state dicts, copies and pickles stay timm's. In
VPT-Deep a prompt is only a key and a value: its rows of the block's output are never read, so
the block is (B, N, D) -> (B, N, D), like the one it replaces. Prompt rows that are read later
(VPT-Shallow, a prompted block before an unprompted one) stand after the prefix tokens as tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.models.attention_inputs import projections_of
from vpt_fast.models.fusion import fused_block
from vpt_fast.models.fusion.fused_block import NO_PROMPTS, Fused, Use
from vpt_fast.models.fusion.fusible import can_fuse
from vpt_fast.models.interop.symbolic import called_symbolically, made_symbolically
from vpt_fast.models.isotropic.concatenated import with_all_rows
from vpt_fast.models.isotropic.prompts_apart import after_prompts_apart, with_updated_rows
from vpt_fast.models.prompt_rows import LiveRows, PromptRows, insert_rows, split_rows, strip_rows
from vpt_fast.models.recompute import in_mode, recomputed
from vpt_fast.models.residual import add_branches
from vpt_fast.modules.hooks import (
    call_compiled,
    has_compiled_call,
    has_hooks,
    has_own_forward,
    is_watched,
)
from vpt_fast.modules.norms import normalised_prompts
from vpt_fast.modules.prompt_module import Made
from vpt_fast.modules.row_by_row import treats_rows_apart
from vpt_fast.ops.backend import computing_dtype, uses_kernels
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.block.parts import contiguous
from vpt_fast.ops.block.prompt_source import GIVEN_KV
from vpt_fast.ops.rowwise.rotation import table_of_first
from vpt_fast.ops.tracing import is_symbolic, is_transformed


class PromptedBlock(nn.Module):
    """A block with prompts of its own, with live prompt rows passing through, or both.

    Mixed into timm's class of the block. It is computed by the first of three routes that is
    possible:

    - fused: one autograd function of tensors (`vpt_fast.models.fusion.fused_block`);
    - module by module, without the rows that are not read;
    - concatenated: timm's own block on prompts and tokens, as published.

    A submodule `adapter`, if it has one, maps the MLP's output (B, N, D) before the residual sum,
    and `prompt_update` changes the prompt rows that leave the block.

    Attributes:
        plain_class: timm's class of the block.
        attentions: Class that a tuned block's attention is given, by timm's class of it.
        prompt: Module that computes this block's prompts from its tokens, or None.
        rows: Where prompt rows stand in its input and output.
        memory: What it saves for backward, one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
    """

    plain_class: ClassVar[type[nn.Module]]
    attentions: ClassVar[Mapping[type, type]]
    norm1: nn.Module
    prompt: nn.Module | None
    rows: PromptRows
    memory: str

    @classmethod
    def is_known(cls, block: Any) -> bool:
        """Return whether a block is timm's or ours; other classes compute anything."""
        attn = type(block._modules.get("attn"))
        known = type(block) in (cls.plain_class, cls)
        return known and (attn in cls.attentions or attn in cls.attentions.values())

    @classmethod
    def is_fusable(cls, block: Any) -> bool:
        """Return `fusible.can_fuse` of a known block."""
        return cls.is_known(block) and can_fuse(block)

    @classmethod
    def fused(cls, block: Any, x: Tensor | None) -> Fused | None:
        """Return `fused_block.fused` of a known block."""
        return fused_block.fused(block, x) if cls.is_known(block) else None

    @classmethod
    def through(
        cls,
        block: Any,
        total: DeferredSum,
        memory: str,
        first: int | None = None,
        rope: Tensor | None = None,
        feature: Any = None,
    ) -> DeferredSum:
        """Compute a frozen or prompted block, hooks on it included.

        Args:
            block: timm's or ours.
            total: Input, a deferred residual sum.
            memory: What is saved for backward.
            first: Number of first rows of the output that are computed, by one of ours without
                hooks; None computes all.
            rope: Table of the rotary position embedding, or None.
            feature: What the method's shared module made of the image, or None.
        """
        compiled = has_compiled_call(block)
        hooked = has_hooks(block) or has_own_forward(block) or nn_module._has_any_global_hook()
        if not (compiled or hooked or is_symbolic()):
            if isinstance(block, cls):
                return block.forward_deferred(total, memory, first, rope, feature)
            x = total.residual
            now = cls.fused(block, x) if fused_block.can_rotate(rope, x) else None
            if now is not None:
                return fused_block.run(block, now, NO_PROMPTS, total, Use(memory), rope)
        call = functools.partial(call_compiled, block) if compiled else block
        if is_symbolic() and isinstance(block, cls) and block.is_one_node():
            call = functools.partial(called_symbolically, block)
        if first is not None:
            call = functools.partial(call, first=first)
        if rope is not None:
            call = functools.partial(call, rope=rope)
        if feature is not None and isinstance(block, cls):
            call = functools.partial(call, feature=feature)
        x = total.materialize()
        if memory == getattr(block, "memory", "speed"):
            return DeferredSum(call(x))
        return DeferredSum(recomputed(block, call, x))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the block; its hooks see (B, N, D) -> (B, N, D), without live prompt rows."""
        rows = self.rows
        if not (rows.entering or rows.leaving) or not has_hooks(self):
            return super().__call__(x, *args, **kwargs)
        x, entering = split_rows(x, rows.entering, rows.prefix)
        live = LiveRows(entering)
        x = super().__call__(x, *args, live=live, **kwargs)
        return insert_rows(x, live.rows, rows.prefix) if rows.leaving else x

    def compute(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        live: LiveRows | None,
        first: int | None,
        feature: Any,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Return the output (B, leaving + N, D) of tokens (B, entering + N, D).

        Args:
            x: Tokens, with the live prompt rows that enter.
            attn_mask: As timm's, (..., N, N) without prompt rows; prompts are always visible.
            is_causal: As timm's; refused with prompts, which have no place in an order of tokens.
            live: Prompt rows beside x instead of among its rows.
            first: Number of first rows of the output that are computed; None computes all. Not
                with `attn_mask`, `is_causal` or `live`.
            feature: What the method's shared module made of the image, or None.
            rope: Table of the rotary position embedding, as timm's; prompts are not rotated.

        Raises:
            ValueError: `is_causal` is True in a block with prompts, or `first` is combined.
        """
        rows = self.rows
        if first is not None and (attn_mask is not None or is_causal or live is not None):
            raise ValueError(f"first={first} needs a call without attn_mask, is_causal and live")
        if is_causal and (self.prompt is not None or rows.entering):
            raise ValueError("is_causal=True cannot be used with prompts; pass an attn_mask")
        if live is not None:
            x = insert_rows(x, live.rows, rows.prefix)
        if attn_mask is None and not is_causal:
            total = DeferredSum(x)
            x = self.forward_deferred(total, self.memory, first, rope, feature).materialize()
        elif rows.leaving and "prompt_update" in self._modules:
            x = with_updated_rows(self, x, self.memory, rope, feature, attn_mask).materialize()
        else:
            x = after_prompts_apart(self, x, self.memory, rope, feature)
            args = (x, rope, feature, attn_mask, is_causal)
            x = in_mode(self.memory, self, self._concatenated, *args)
        if live is not None and rows.leaving:
            x, live.rows = split_rows(x, rows.leaving, rows.prefix)
        return x

    def forward_deferred(
        self,
        total: DeferredSum,
        memory: str,
        first: int | None = None,
        rope: Tensor | None = None,
        feature: Any = None,
    ) -> DeferredSum:
        """Compute the block from one deferred residual sum to the next, past its own hooks.

        Args:
            total: Tokens, with the live prompt rows that enter.
            memory: What is saved for backward.
            first, rope, feature: As for `compute`.
        """
        if self.rows.leaving and "prompt_update" in self._modules:
            return with_updated_rows(self, total.materialize(), memory, rope, feature)
        rows, prompt, now = self.rows, self.joined, None
        if prompt is None and "prompt" in self._modules and self.prompt is not None:
            x = after_prompts_apart(self, total.materialize(), memory, rope, feature)
            total = DeferredSum(x)
        # A fused block computes dead rows, too, and all keys and values, which a GPU's matrix units
        # do faster than the smaller products of `absorbed_attention`, and a CPU does not.
        if (
            (prompt is not None or rows.leaving or not rows.entering)
            and (first is None or uses_kernels(total.residual))
            and fused_block.can_rotate(rope, total.residual)
        ):
            now = self.fused(self, total.residual)
        if now is None:
            args = (total.materialize(), first, rope, feature)
            return DeferredSum(in_mode(memory, self, self._by_modules, *args))
        prompts = NO_PROMPTS
        if prompt is not None and (rows.entering or rows.leaving):
            total = DeferredSum(strip_rows(total.materialize(), rows.entering, rows.prefix))
        if prompt is not None and rows.leaving:
            x = total.residual
            own, kv = self._made(x, feature)
            total = DeferredSum(insert_rows(x, own, rows.prefix))
            if kv is not None:
                prompts = GIVEN_KV, (contiguous(kv.to(computing_dtype(x))),)
        else:
            total, prompts = fused_block.own_sources(prompt, total, memory, feature)
        return fused_block.run(self, now, prompts, total, Use(memory, queries=first), rope)

    @property
    def joined(self) -> Any:
        """Module of the prompts that join the tokens' attention, or None."""
        prompt: Any = self._modules.get("prompt")
        return None if prompt is None or prompt.attends_apart else prompt

    def _by_modules(
        self, x: Tensor, first: int | None, rope: Tensor | None, feature: Any
    ) -> Tensor:
        rows = self.rows
        if self._needs_all_rows():
            x = self._concatenated(x, rope, feature)
            return x if first is None else x[:, :first]
        prompts = kv = queries = None
        if self.joined is not None:
            x, (prompts, kv) = self.own_prompts(x, feature)
            if rows.leaving:
                x, prompts = insert_rows(x, prompts, rows.prefix), None
            elif prompts is not None:
                prompts = normalised_prompts(self.norm1, prompts, x.dtype)
        y = self.norm1(x)
        query_rope = rope
        if first is not None:
            x, queries = x[:, :first], y[:, :first]
            query_rope = table_of_first(rope, y.shape[1], first)
        elif self.joined is None and rows.entering and not rows.leaving:
            x = strip_rows(x, rows.entering, rows.prefix)
            queries = strip_rows(y, rows.entering, rows.prefix)
        attn: Any = self.attn
        more: dict[str, Any] = {} if rope is None else {"rope": rope, "query_rope": query_rope}
        if kv is not None:
            more["kv"] = kv.to(y.dtype)
        return add_branches(self, x, attn(y, **more, prompts=prompts, queries=queries))

    def _concatenated(
        self,
        x: Tensor,
        rope: Tensor | None,
        feature: Any,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        rows, kv = self.rows, None
        count = rows.entering
        if self.joined is not None:
            x, (prompts, kv) = self.own_prompts(x, feature)
            count = 0 if prompts is None else self._count(prompts)
            x = insert_rows(x, prompts, rows.prefix)
        x = with_all_rows(self, x, count, rope, attn_mask, is_causal, kv)
        return x if rows.leaving else strip_rows(x, count, rows.prefix)

    def own_prompts(self, x: Tensor, feature: Any = None) -> tuple[Tensor, Made]:
        """Return the tokens (B, N, D) without rows that enter, and this block's prompts."""
        x = strip_rows(x, self.rows.entering, self.rows.prefix)
        return x, self._made(x, feature)

    def _made(self, x: Tensor, feature: Any) -> Made:
        prompt: Any = self.prompt
        if is_symbolic():
            return made_symbolically(prompt, x, feature)
        made: Made = prompt.made(x, feature)
        leaving = self.rows.leaving
        if leaving and (made.rows is None or made.rows.shape[1] != leaving):
            count = 0 if made.rows is None else made.rows.shape[1]
            raise ValueError(
                f"{type(prompt).__name__} made {count} prompts, and {leaving} when the model was "
                "tuned; where they pass through later blocks their number is fixed"
            )
        return made

    def _count(self, prompts: Tensor) -> int:
        own: Any = self.prompt
        count: int = own.num_rows if is_symbolic() else prompts.shape[1]
        return count

    def is_one_node(self) -> bool:
        """Return whether torch.fx takes the block as a whole: its prompts are no rows alone."""
        prompt: Any = self.prompt
        apart = prompt is not None and (prompt.num_keys or prompt.attends_apart)
        return bool(apart) or "prompt_update" in self._modules

    def _needs_all_rows(self) -> bool:
        """Return whether a part may do anything with the rows, or a hook would miss some of them.

        Hooks may change what they see; what comes after the keys is the tokens' own.
        """
        attn: Any = self._modules["attn"]
        apart = ("attn", "prompt", "prompt_update")
        parts = [part for name, part in self._modules.items() if name not in apart]
        inside = attn._modules
        return (
            is_transformed()
            or type(attn) not in self.attentions.values()
            or has_own_forward(attn)
            or not treats_rows_apart(*parts, *inside.values())
            or bool(attn._forward_pre_hooks or attn._backward_hooks)
            or nn_module._has_any_global_hook()
            or is_watched(
                self.norm1, *projections_of(attn), inside.get("q_norm"), inside.get("k_norm")
            )
            or (not attn.fused_attn and is_watched(attn.attn_drop))
        )
