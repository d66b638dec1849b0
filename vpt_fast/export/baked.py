"""Tuned models for inference: timm's classes with constants in place of prompts.

Everything here is plain PyTorch, so that a program that is exported from these classes needs
nothing but torch. `vpt_fast.export.baking` creates them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.fx import Proxy

from vpt_fast.export.baked_attention import BakedAttention
from vpt_fast.models.interop.symbolic import called_symbolically, made_symbolically, without_masks
from vpt_fast.models.isotropic.head_rows import rows_read
from vpt_fast.models.isotropic.inputs import block_inputs, table_of
from vpt_fast.models.isotropic.rope_tables import RopeTables
from vpt_fast.models.prompt_rows import insert_rows, split_rows, strip_rows
from vpt_fast.models.residual import add_attention, add_branches
from vpt_fast.modules.experts import check_grid
from vpt_fast.modules.prompt_module import Made, PromptModule
from vpt_fast.ops.backend import statistics_dtype
from vpt_fast.ops.rowwise.rotation import table_of_first


class BakedViTAttention(BakedAttention, Attention):
    """timm's Attention with constant keys and values."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        prompts: Tensor | None = None,
        queries: Tensor | None = None,
        kv: Tensor | None = None,
    ) -> Tensor:
        """Attend as `BakedAttention.attend`.

        Raises:
            ValueError: If there is an `attn_mask`, or `is_causal` is True.
        """
        refuse_mask(attn_mask, is_causal)
        return self.attend(x, prompts, queries, kv=kv)


class BakedExperts(nn.Module):
    """VAPT's prompts of one block, P = g + up relu(down g) with g = weight * (mix n) + shift.

    n is the LayerNorm of the block's patches without its affine; the convolution, the token-wise
    projector and all that does not depend on the image are folded into `mix` and `shift`. The
    paper's variant has no g in the sum.

    Args:
        mix: Mixing weights (p, patches).
        weight: Weight (D,) of the experts' LayerNorm.
        shift: Constant part (p, D) of g.
        down: Weight (r, D) of the feature projector's first layer.
        up: Weight (D, r) of the feature projector's second layer.
        eps: Epsilon of the experts' LayerNorm.
        residual: Whether g is in the sum.
    """

    mix: Tensor
    weight: Tensor
    shift: Tensor
    down: Tensor
    up: Tensor

    def __init__(
        self,
        mix: Tensor,
        weight: Tensor,
        shift: Tensor,
        down: Tensor,
        up: Tensor,
        eps: float,
        residual: bool,
    ) -> None:
        super().__init__()
        named = {"mix": mix, "weight": weight, "shift": shift, "down": down, "up": up}
        for name, tensor in named.items():
            self.register_buffer(name, tensor.detach().clone())
        self.eps = eps
        self.residual = residual
        self.num_rows, self.num_keys = mix.shape[0], 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of a block's input x (B, N, D), whose last rows are patches.

        They are computed and returned in fp32 at least.
        """
        wide = statistics_dtype(x.dtype)
        patches = x[:, x.shape[1] - self.mix.shape[1] :].to(wide)
        mixing = self.mix.to(wide) @ F.layer_norm(patches, x.shape[-1:], eps=self.eps)
        g = torch.addcmul(self.shift.to(wide), mixing.to(wide), self.weight.to(wide))
        product = F.linear(F.linear(g, self.down.to(wide)).relu(), self.up.to(wide)).to(wide)
        return g + product if self.residual else product

    def made(self, x: Tensor, feature: Any = None) -> Made:
        """Return the same, as `PromptModule.made`."""
        return Made(self(x), None)

    def extra_repr(self) -> str:
        return f"prompts={self.mix.shape[0]}, residual={self.residual}"


class BakedBlock(nn.Module):
    """A block with the prompts of its attention, or with prompt rows among its tokens.

    Mixed into timm's class. A submodule `adapter`, if it has one, maps the MLP's output (B, N, D)
    before the residual sum.

    Attributes:
        experts: Module that makes the block's prompts of an image, by its `made`; or None.
        inserts: Whether the rows that it makes are inserted among the tokens.
        prompt_rows: Buffer (1, p, D) of rows that are inserted among the tokens, or None.
        prompt_update: Module that changes the prompt rows that leave the block, or None.
        leaving: Number of these rows.
        prefix: Number of prefix tokens; prompt rows come right after them.
        dead: Number of prompt rows among the tokens that are not read after the block.
    """

    attn: Any
    norm1: nn.Module
    experts: BakedExperts | PromptModule | None
    inserts: bool
    prompt_rows: Tensor | None
    prompt_update: nn.Module | None
    leaving: int
    prefix: int
    dead: int

    def compute(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        first: int | None,
        feature: Any,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Return the output (B, N, D), with `prompt_rows` inserted and the `dead` rows stripped.

        Args:
            x: Tokens (B, N, D).
            attn_mask: Must be None.
            is_causal: Must be False.
            first: Number of first rows of the output that are computed; None computes all.
            feature: What the method's shared module made of the image, or None.
            rope: Table of the rotary position embedding, or None.

        Raises:
            ValueError: If there is an `attn_mask`, or `is_causal` is True.
        """
        refuse_mask(attn_mask, is_causal)
        live, beside = self.leaving or self.dead, None
        if self.attn.attends_apart and live:
            x, beside = split_rows(x, live, self.prefix)
        prompts, kv = (None, None) if self.experts is None else self._made(x, feature)
        if prompts is not None:
            prompts = prompts.to(x.dtype)
        if self.prompt_rows is not None:
            x = insert_rows(x, self.prompt_rows, self.prefix)
        elif self.inserts:
            x, prompts = insert_rows(x, prompts, self.prefix), None
        prompts = None if prompts is None else self.norm1(prompts)
        if self.attn.attends_apart:
            read = self.attn.attend_to_prompts(self.norm1(x), prompts, rope, kv)
            x, prompts, kv = add_attention(self, x, read), None, None
        if beside is not None:
            x = insert_rows(x, beside, self.prefix)
        entered, y, queries = x[:, self.prefix :][:, : self.leaving], self.norm1(x), None
        query_rope = rope
        if first is not None:
            x, queries = x[:, :first], y[:, :first]
            query_rope = table_of_first(rope, y.shape[1], first)
        elif self.dead:
            x = strip_rows(x, self.dead, self.prefix)
            queries = strip_rows(y, self.dead, self.prefix)
        tables = {} if rope is None else {"rope": rope, "query_rope": query_rope}
        attended = self.attn(y, **tables, prompts=prompts, queries=queries, kv=kv)
        x = add_branches(self, x, attended)
        if self.prompt_update is None:
            return x
        rows = self.prompt_update(x[:, self.prefix :][:, : self.leaving], entered)
        return insert_rows(strip_rows(x, self.leaving, self.prefix), rows, self.prefix)

    def _made(self, x: Tensor, feature: Any) -> Made:
        experts: Any = self.experts
        if isinstance(x, Proxy):
            return made_symbolically(experts, x, feature)
        made: Made = experts.made(x, feature)
        return made


class BakedViTBlock(BakedBlock, Block):
    """timm's Block with the prompts of a task as constants."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        first: int | None = None,
        feature: Any = None,
    ) -> Tensor:
        """Return the block's output; see `BakedBlock.compute`."""
        return self.compute(x, attn_mask, is_causal, first, feature)


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ValueError if there is a mask."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "a baked model takes neither attn_mask nor is_causal=True; use the tuned model that "
            "it was baked from"
        )


_Timms: Any = nn.Module
"""Stands for timm's class, whose methods mypy cannot see."""


class BakedModel(_Timms):
    """A model with the prompts of a task as constants; mixed into timm's class.

    Attributes:
        expert_grid: Patch grid that VAPT's prompts mix, or None.
        carries_rows: Whether prompt rows pass through the blocks as tokens.
        reads_feature: Whether blocks read what `prompt_shared` makes of the first block's input.
    """

    expert_grid: tuple[int, int] | None
    carries_rows: bool
    reads_feature: bool
    blocks: Any
    patch_embed: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Return logits; the last block computes only the rows that the head reads."""
        x, attn_mask, is_causal = without_masks(x, attn_mask, is_causal)
        last = self.blocks[-1] if len(self.blocks) else None
        symbolic = isinstance(x, Proxy)
        # Of the nodes of a graph all rows may be wanted.
        few = isinstance(last, BakedBlock) and not symbolic
        count = rows_read(self, BakedBlock if last is None else type(last)) if few else None
        timms = count is None and not self.reads_feature and not symbolic
        if timms or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x, tables = block_inputs(self, x)
        feature = {"feature": self.prompt_shared(x)} if self.reads_feature else {}
        for index, block in enumerate(self.blocks):
            own: Any = feature if isinstance(block, BakedBlock) else {}
            if block is last and count is not None:
                own = {**own, "first": count}
            rope = _tables(tables, index)
            # Rotation is not made of fx's proxies.
            whole = symbolic and rope
            call = partial(called_symbolically, block) if whole else block
            x = call(x, **rope, **own)
        return self.forward_head(self.norm(x))

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which calls this first."""
        raise ValueError(
            "a baked model cannot be scripted; torch.jit.trace and torch.export.export take it"
        )

    def _pos_embed(self, x: Tensor) -> Any:
        """Add position embeddings; refuse a patch grid that VAPT's prompts were not tuned for."""
        if self.expert_grid is not None and not isinstance(x, Proxy):
            check_grid(
                self.expert_grid, x.shape[1:3] if x.ndim == 4 else self.patch_embed.grid_size
            )
        return super()._pos_embed(x)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Return what timm's method returns; see there for the arguments.

        Raises:
            ValueError: If prompt rows pass through the blocks as tokens.
        """
        self._refuse_rows("forward_intermediates")
        return super().forward_intermediates(*args, **kwargs)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Remove blocks as timm's method does; see there for the arguments.

        Raises:
            ValueError: If prompt rows pass through the blocks as tokens.
        """
        self._refuse_rows("prune_intermediate_layers")
        taken: list[int] = super().prune_intermediate_layers(*args, **kwargs)
        return taken

    def _refuse_rows(self, name: str) -> None:
        if self.carries_rows:
            raise ValueError(
                f"{name} is not for a baked model whose prompt rows pass through its blocks as "
                "tokens; use the tuned model that it was baked from"
            )


def _tables(tables: RopeTables | None, index: int) -> dict[str, Tensor]:
    rope = table_of(tables, index)
    return {} if rope is None else {"rope": rope}


class BakedVisionTransformer(BakedModel, VisionTransformer):
    """timm's VisionTransformer with the prompts of a task as constants."""


class BakedVisionTransformerDistilled(BakedModel, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled with the prompts of a task as constants."""
