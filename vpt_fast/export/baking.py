"""`bake`: a tuned model as a plain module for inference, its prompts as constants."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vpt_fast.export.baked import (
    BakedExperts,
    BakedVisionTransformer,
    BakedVisionTransformerDistilled,
    BakedViTAttention,
    BakedViTBlock,
)
from vpt_fast.export.baked_eva import PARTS as EVA_PARTS
from vpt_fast.models.changes.taken import take_out
from vpt_fast.models.family import Family, family_of
from vpt_fast.models.fold import unfold_backbone
from vpt_fast.models.interop.wrappers import check_unwrapped, inner_model
from vpt_fast.models.isotropic.block import PromptedBlock
from vpt_fast.models.tuned import SHARED, UPDATE, TuneRecord, is_tuned, reads_feature
from vpt_fast.modules.experts import PromptExperts
from vpt_fast.modules.hooks import has_hooks, has_own_forward
from vpt_fast.modules.prompt_module import PromptModule

_BAKED_CLASS: dict[type, type] = {
    VisionTransformer: BakedVisionTransformer,
    VisionTransformerDistilled: BakedVisionTransformerDistilled,
    Block: BakedViTBlock,
    Attention: BakedViTAttention,
    **EVA_PARTS,
}
"""Class of a baked model and its parts, by timm's."""


def bake(model: nn.Module) -> nn.Module:
    """Return a tuned model as a new module for inference, in plain PyTorch.

    The new module has timm's parameter names and computes the logits of `model` in eval mode. It
    is in eval mode, has no prompt parameters and requires no gradient. It shares nothing with
    `model`, which does not change: every weight is copied (ViT-B/16 in fp32: 340 MB).

    - VPT: `blocks.{i}.attn.prompt_keys` and `.prompt_values` (H, p, d), the prompts after norm1 and
      the qkv projection; prompt rows that live on as tokens (VPT-Shallow, an unprompted block after
      a prompted one, `pool_prompts`) are `blocks.{i}.prompt_rows` (1, p, D).
    - VAPT: block 0 as VPT; later blocks have `blocks.{i}.experts.*`, of which `mix` (p, patches) is
      the convolution and the token-wise projector as one matrix.
    - Any other method: as VPT where every image has the same prompts; else `blocks.{i}.experts.*`
      is the method's own module, and `prompt_shared.*` what its blocks share.
    - `LinearProbe`, `BiasTuning`, `PartialTuning`, `FullTuning`: timm's own class with the trained
      values. `MLPHead`: the same, `head` is the whole MLP. `AdapterTuning`:
      `blocks.{i}.adapter.*`.

    Constants are computed in the dtype of `model`: bake first and cast afterwards for constants
    that are rounded once. A model that `fold_backbone` has folded is baked with its weights from
    before. Loading other backbone weights into the module leaves the constants as they are: load a
    whole state dict of a baked model. `torch.export.export` and `torch.compile(fullgraph=True)`
    take the module, for any batch size; an exported program needs torch alone. The module and the
    program hold the backbone's weights, so that their licence holds for both (DINOv3 has one of its
    own).

    Args:
        model: timm `VisionTransformer`, `VisionTransformerDistilled` or `Eva` that `prompt_tune` or
            `load_adapter` has tuned.

    Returns:
        A module that maps images (B, channels, height, width) to logits (B, classes).

    Raises:
        ValueError: If `model` is not tuned, is a SwinTransformer, or a module in it has hooks or a
            forward of its own.
    """
    model = inner_model(model)
    check_unwrapped(model)
    family = _check(model)
    with torch.inference_mode(False), torch.no_grad():
        baked: Any = _copy(model)
        grid, hidden = _expert_grid(baked), baked._modules.get("head_hidden")
        shared, feature = baked._modules.get(SHARED), reads_feature(baked.blocks)
        parts = [_part(baked, block) for block in baked.blocks]
        take_out(baked, family.plain_parts)
        del baked.tune_record
        baked.__class__ = family.plain
        if hidden is not None and not isinstance(baked.head, nn.Identity):
            baked.head = nn.Sequential(*hidden, baked.head)
        if any(part is not None and part.changes for part in parts):
            baked.__class__ = _BAKED_CLASS[type(baked)]
            baked.expert_grid = grid
            baked.carries_rows = any(
                part is not None and (part.rows is not None or part.inserts or part.update)
                for part in parts
            )
            baked.reads_feature, makers = feature, [part.experts for part in parts if part]
            if shared is not None and any(isinstance(maker, PromptModule) for maker in makers):
                setattr(baked, SHARED, shared)
            for block, part in zip(baked.blocks, parts, strict=True):
                if part is not None:
                    _bake_block(block, part, baked.num_prefix_tokens)
        baked.grad_checkpointing = False
        return baked.eval().requires_grad_(False)


def _check(model: Any) -> Family:
    name = type(model).__name__
    family = family_of(model)
    if not is_tuned(model) or family is None:
        raise ValueError(
            f"this {name} is not tuned, so there is nothing to bake; call prompt_tune(model, "
            "method) or load_adapter(model, directory) first"
        )
    if family.in_stages:
        raise ValueError(
            f"a {name} cannot be baked: prompts in windows have no plain form here; only a tuned "
            "VisionTransformer, VisionTransformerDistilled or Eva can be"
        )
    for where, module in model.named_modules():
        if has_hooks(module) or has_own_forward(module):
            what = "hooks" if has_hooks(module) else "a forward of its own"
            raise ValueError(
                f"cannot bake this model: {where or name} has {what}, which may change what it "
                "computes; remove them"
            )
    return family


def _copy(model: Any) -> Any:
    """Return an unfolded copy of a tuned model in eval mode, without the record's originals."""
    record: TuneRecord = model.tune_record
    fold = record.fold
    if fold is not None:  # unfolding empties the copy's record, not the model's
        fold = replace(fold, originals=dict(fold.originals), scales=dict(fold.scales))
    copied = copy.deepcopy(model, {id(record): replace(record, originals={}, fold=fold)})
    unfold_backbone(copied)
    return copied.eval()


@dataclass(frozen=True)
class _Part:
    """Prompts and adapter of a block of a baked model.

    Attributes:
        prompts: Static prompts (1, p, D) that are keys and values only, before norm1.
        rows: Static prompts (1, p, D) that live on as tokens.
        kv: Static keys and values (1, n, 2, H, d) beside those of the prompts.
        experts: Module that makes the prompts of an image.
        inserts: Whether the prompts that it makes live on as tokens.
        dead: Number of prompt rows that enter the block and are not read after it.
        leaving: Number of prompt rows that leave the block.
        apart: Whether tokens attend to the prompts alone.
        update: Module that changes the prompt rows that leave the block.
        adapter: Bottleneck after the block's MLP.
    """

    prompts: Tensor | None
    rows: Tensor | None
    kv: Tensor | None
    experts: BakedExperts | PromptModule | None
    inserts: bool
    dead: int
    leaving: int
    apart: bool
    update: nn.Module | None
    adapter: nn.Module | None

    @property
    def changes(self) -> bool:
        """Whether the block computes anything but timm's block."""
        added = (self.prompts, self.rows, self.kv, self.experts, self.update, self.adapter)
        return self.dead > 0 or any(item is not None for item in added)


def _part(model: Any, block: Any) -> _Part | None:
    """Return the prompts and the adapter of a block; None for a block of timm's."""
    if not isinstance(block, PromptedBlock):
        return None
    prompt: Any = block.prompt
    prompts = rows = kv = experts = None
    apart = prompt is not None and prompt.attends_apart
    lives = bool(block.rows.leaving)
    if isinstance(prompt, PromptExperts):
        experts = _bake_experts(prompt, model.prompt_projector)
    elif prompt is not None and not prompt.is_static:
        experts = prompt
    elif prompt is not None:
        tokens, kv = (None if t is None else t.detach().clone() for t in prompt.static())
        tokens = None if tokens is None else tokens.unsqueeze(0)
        prompts, rows = (None, tokens) if lives and not apart else (tokens, None)
    dead = block.rows.entering if (prompt is None or apart) and not lives else 0
    inserts = lives and experts is not None and not apart
    update, adapter = (block._modules.get(name) for name in (UPDATE, "adapter"))
    leaving = block.rows.leaving
    return _Part(prompts, rows, kv, experts, inserts, dead, leaving, apart, update, adapter)


def _bake_experts(experts: Any, projector: Any) -> BakedExperts:
    mix = experts.token_mixing().flatten(1)
    norm, bias = experts.norm, experts.mix.bias
    shift = mix.sum(1)[:, None] * norm.bias.to(mix.dtype)
    if bias is not None:
        shift = shift + bias.to(mix.dtype)[:, None]
    down, up = projector.down.weight, projector.up.weight
    return BakedExperts(mix, norm.weight, shift, down, up, norm.eps, experts.residual)


def _expert_grid(model: Any) -> tuple[int, int] | None:
    grids = [b.prompt.grid for b in model.blocks if isinstance(_prompt(b), PromptExperts)]
    return grids[0] if grids else None


def _prompt(block: Any) -> Any:
    return getattr(block, "prompt", None)


def _bake_block(block: Any, part: _Part, prefix: int) -> None:
    """Turn a plain block into a baked one with the prompts and the adapter of `part`."""
    block.__class__ = _BAKED_CLASS[type(block)]
    block.attn.__class__ = _BAKED_CLASS[type(block.attn)]
    keys = values = None
    pairs = []
    if part.prompts is not None:
        pairs.append(block.attn.keys_and_values(block.norm1(part.prompts)))
    if part.kv is not None:
        pairs.append(tuple(t.transpose(1, 2) for t in part.kv.unbind(2)))
    if pairs:
        keys, values = (torch.cat(own, 2).squeeze(0) for own in zip(*pairs, strict=True))
    block.attn.register_buffer("prompt_keys", keys)
    block.attn.register_buffer("prompt_values", values)
    block.register_buffer("prompt_rows", part.rows)
    block.experts, block.prefix, block.dead = part.experts, prefix, part.dead
    block.inserts, block.leaving, block.prompt_update = part.inserts, part.leaving, part.update
    block.attn.attends_apart = part.apart
    if part.adapter is not None:
        block.adapter = part.adapter
