"""Attention to the prompts of a tuned model, and the patches that VAPT mixes into its prompts.

Prompts as keys and values of frozen attention are the experts of a mixture that the attention
weights gate ("Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts", ICLR 2026,
arXiv 2501.18936, sections 3 and 4): the share of a prompt is the weight of its expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vpt_fast.analysis.swin_shares import window_shares
from vpt_fast.methods.baselines import Baseline, LinearProbe
from vpt_fast.models.attention_inputs import projected
from vpt_fast.models.isotropic.block import PromptedBlock
from vpt_fast.models.isotropic.inputs import table_of
from vpt_fast.models.prompt_rows import insert_rows
from vpt_fast.models.tuned import blocks_of, is_tuned
from vpt_fast.modules.experts import PromptExperts
from vpt_fast.ops.backend import in_full_precision
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.rowwise.rotation import rotated, table_of_first


@dataclass(frozen=True)
class PromptAttention:
    """Attention of one block for the query that the head reads.

    Attributes:
        block: Index of the block.
        prompts: Share of each prompt (B, H, p).
        tokens: Share (B, H) of all prefix tokens and patches together, 1 - prompts.sum(-1).
    """

    block: int
    prompts: Tensor
    tokens: Tensor


def attention_shares(model: nn.Module, images: Tensor) -> list[PromptAttention]:
    """Return the shares of attention to the prompts of each block, softmax(q k^T * scale).

    The keys are those of the block: its prompts, or live prompt rows that pass through it as
    tokens, and all tokens. The query is the [CLS] row if the head reads it (the mean over [CLS] and
    the distillation row for distilled DeiT); for heads that pool, shares are averaged over the
    queries of all patches. So they are for Swin, where the tokens are those of the query's window.
    The model computes as in eval mode, without gradients, and its mode is restored. Scores and
    softmax are fp32 at least, fp64 for a model in fp64.

    Args:
        model: Model that was tuned with prompts (`prompt_tune`, `load_adapter`).
        images: (B, C, H, W), as the model takes them, of its dtype and device.

    Returns:
        One entry per block whose keys include prompts, in ascending order.

    Raises:
        TypeError: If `images` is no tensor.
        ValueError: If `images` is not (B, C, H, W), or `model` has no prompts.
    """
    tuned = _check_prompts(model)
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor (B, C, H, W), got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
    found = []
    with torch.no_grad(), _eval_mode(tuned):
        if isinstance(tuned, SwinTransformer):
            windows = window_shares(tuned, images)
            return [PromptAttention(index, p, 1 - p.sum(dim=-1)) for index, p in windows]
        x, tables = tuned.embedded(images)
        feature = tuned.feature_of(x)
        for index, block in enumerate(tuned.blocks):
            rope = table_of(tables, index)
            rows, count, kv = _with_prompts(block, x, feature)
            if count or kv is not None:
                found.append(_shares(tuned, index, rows, count, rope, kv))
            total = DeferredSum(x)
            x = tuned.tuned_block.through(block, total, "speed", None, rope, feature).materialize()
    return found


def stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Stack arrays, with NaN where one is smaller than the largest.

    Blocks differ in their numbers of heads and of prompts.
    """
    found = np.full((len(arrays), *np.max([array.shape for array in arrays], axis=0)), np.nan)
    for whole, array in zip(found, arrays, strict=True):
        whole[tuple(map(slice, array.shape))] = array
    return found


def mixing_maps(model: nn.Module) -> dict[int, Tensor]:
    """Return VAPT's token mixing maps: the mixing weight of each patch in each prompt.

    A map is the convolution and the token-wise projector as one matrix over the patches; it is
    trained and does not depend on the image. Prompts of block 0, of VPT-Deep and of VPT-Shallow mix
    no patches.

    Args:
        model: Model that was tuned with prompts.

    Returns:
        Block index to weights (p, gh, gw) over the patch grid; empty if no prompt mixes patches.

    Raises:
        ValueError: If `model` has no prompts.
    """
    tuned = _check_prompts(model)
    with torch.no_grad():
        return {
            index: block.prompt.token_mixing()
            for index, block in enumerate(blocks_of(tuned))
            if isinstance(getattr(block, "prompt", None), PromptExperts)
        }


def query_name(model: Any) -> str:
    """Return the name of the query of `attention_shares`, for texts."""
    if not _reads_first_rows(model):
        return "patch queries"
    return f"[CLS]{' and distillation' if _first_rows(model) == 2 else ''} query"


def uniform_share(model: Any) -> float:
    """Return the share of all prompts of a block under uniform attention.

    The share is that at the model's image size, of the first block with prompts, and of all blocks
    with as many prompts and tokens.
    """
    tuned = _check_prompts(model)
    made = [getattr(block, "prompt", None) for block in blocks_of(tuned)]
    prompts = next(prompt.num_rows + prompt.num_keys for prompt in made if prompt is not None)
    if isinstance(tuned, SwinTransformer):
        tokens = blocks_of(tuned)[0].window_area
    else:
        tokens = tuned.num_prefix_tokens + tuned.patch_embed.num_patches
    return prompts / (prompts + tokens)


def _check_prompts(model: Any) -> Any:
    if not is_tuned(model):
        raise ValueError(
            f"this {type(model).__name__} is not tuned and has no prompts; load an adapter first"
        )
    method = model.tune_record.method
    if isinstance(method, Baseline):
        what = "a linear probe" if isinstance(method, LinearProbe) else f"method {method.name!r}"
        raise ValueError(f"{what} has no prompts to inspect; take an adapter of another method")
    made = [block._modules.get("prompt") for block in blocks_of(model)]
    if not any(prompt is not None and prompt.num_rows + prompt.num_keys for prompt in made):
        raise ValueError(f"num_prompts is 0 in {method}: there are no prompts to inspect")
    return model


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _with_prompts(block: Any, x: Tensor, feature: Any) -> tuple[Tensor, int, Tensor | None]:
    """Return the rows that the block attends to, prompts after the prefix, and the number p.

    With them keys and values (B or 1, n, 2, H, d) beside those of the rows, or None.
    """
    if not isinstance(block, PromptedBlock):
        return x, 0, None
    if block.joined is None:
        return x, block.rows.entering, None
    x, (prompts, kv) = block.own_prompts(x, feature)
    count = 0 if prompts is None else prompts.shape[1]
    return insert_rows(x, prompts, block.rows.prefix), count, kv


def _shares(
    model: Any, index: int, rows: Tensor, count: int, rope: Tensor | None, kv: Tensor | None
) -> PromptAttention:
    block = model.blocks[index]
    attn, prefix = block.attn, block.rows.prefix
    # Past the hooks of norm1 and qkv, which are for what the block itself computes.
    y = block.norm1.forward(rows)
    queries, query_rope = y[:, prefix + count :], rope
    if _reads_first_rows(model):
        queries = y[:, : _first_rows(model)]
        query_rope = table_of_first(rope, y.shape[1], queries.shape[1])
    width, half = attn.num_heads * attn.head_dim, getattr(attn, "rotate_half", False)
    q = attn.q_norm.forward(_heads(attn, projected(attn, queries, slice(0, width))))
    k = attn.k_norm.forward(_heads(attn, projected(attn, y, slice(width, 2 * width))))
    q = rotated(q, query_rope, half).transpose(1, 2)
    k = rotated(k, rope, half).transpose(1, 2)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if kv is not None:
        own = kv[:, :, 0].transpose(1, 2).expand(len(k), -1, -1, -1).to(k)
        k = torch.cat([k[:, :, : prefix + count], own, k[:, :, prefix + count :]], 2)
        count += own.shape[2]
    with in_full_precision(y):
        scores = attn.scale * q.to(dtype) @ k.to(dtype).transpose(-2, -1)
    shares = scores.softmax(dim=-1).mean(dim=-2)  # (B, H, N + p + n)
    prompts = shares[..., prefix : prefix + count]
    tokens = shares[..., :prefix].sum(dim=-1) + shares[..., prefix + count :].sum(dim=-1)
    return PromptAttention(index, prompts, tokens)


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.num_heads, attn.head_dim))


def _reads_first_rows(model: Any) -> bool:
    return model.global_pool == "token" and model.attn_pool is None


def _first_rows(model: Any) -> int:
    return 2 if isinstance(model, VisionTransformerDistilled) else 1
