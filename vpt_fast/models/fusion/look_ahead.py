"""What can be found out about several blocks before the first of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.models.fusion.block_reading import BlockReading, BlocksReading, read_together
from vpt_fast.models.fusion.fused_block import NO_PROMPTS, Fused, Prompts
from vpt_fast.models.fusion.weights_reading import WeightsReading
from vpt_fast.modules.experts import PromptExperts
from vpt_fast.modules.experts_together import sources_together
from vpt_fast.modules.hooks import has_compiled_call, has_hooks, has_own_forward
from vpt_fast.modules.prompt_tokens import PromptTokens
from vpt_fast.ops.backend import computing_dtype
from vpt_fast.ops.block.parts import BlockWeights, contiguous
from vpt_fast.ops.block.prompt_kv import KVWeights, StaticKV
from vpt_fast.ops.block.prompt_source import GIVEN_KV, StaticPrompts
from vpt_fast.ops.tracing import is_traced

_form = attrgetter("shape", "dtype", "device")

Ahead = tuple[Fused, Prompts]
"""A block as it is fused in this call, and its prompts."""


def prompts_of(prompt: nn.Module | None, x: Tensor) -> Prompts:
    """Where the prompts of a block with input x (B, N, D) come from; draws dropout masks."""
    if prompt is None:
        return NO_PROMPTS
    if isinstance(prompt, PromptExperts):
        return prompt.sources(x)
    if isinstance(prompt, PromptTokens):
        tokens, mask = prompt.draw(x.shape[0])
        return StaticPrompts(1.0 - prompt.dropout), (contiguous(tokens), mask)
    raise TypeError(f"a {type(prompt).__name__} makes no prompts of a fused block")


def look_ahead(
    blocks: Sequence[Any], x: Tensor, fused: Callable[[Any, Tensor | None], Fused | None]
) -> tuple[list[Ahead], StaticKV | None] | None:
    """Blocks as they will be fused, and what makes keys of their static prompts, for all at once.

    Args:
        blocks: of one width, in the order in which x passes through them.
        x: tokens (B, N, D).
        fused: a block as it is fused in a call in which nobody traces, or None.

    Returns:
        None where somebody traces, or where a block is hooked, compiled by itself, has an adapter
        or runs module by module: what runs there may change the blocks after it, so that each looks
        for itself.
    """
    if not blocks or is_traced(x):
        return None
    reading = read_together(blocks, lambda block: _read(block, fused))
    if reading is None:
        return None
    now = [Fused(known.weights, known) for known in reading.weights]
    prompts, static_kv = _prompts_together(reading, x)
    return list(zip(now, prompts, strict=True)), static_kv


def _read(block: Any, fused: Callable[[Any, Tensor | None], Fused | None]) -> BlockReading | None:
    """A block's reading; None if it runs by itself."""
    rows = block.__dict__.get("rows")
    if has_hooks(block) or has_own_forward(block) or has_compiled_call(block):
        return None
    if "adapter" in block._modules or (rows is not None and (rows.entering or rows.leaving)):
        return None
    if fused(block, None) is None:
        return None
    found: BlockReading | None = block.__dict__.get("_reading")
    return found


def _prompts_together(reading: BlocksReading, x: Tensor) -> tuple[list[Prompts], StaticKV | None]:
    """The blocks' prompts; dropout masks are drawn in the blocks' order."""
    prompts = reading.prompts
    static = [i for i, p in enumerate(prompts) if type(p) is PromptTokens and not p.drops]
    keys: StaticKV | None = None
    found: dict[int, Prompts] = {}
    if len(static) > 1:
        tokens = [prompts[i].undropped() for i in static]
        keys = _keys_of(reading, static, tokens, computing_dtype(x))
        if keys is not None:
            found = {i: (GIVEN_KV, (rows,)) for i, rows in zip(static, tokens, strict=True)}
    experts = [i for i, p in enumerate(prompts) if type(p) is PromptExperts]
    first = experts[0] if experts else len(prompts)
    for i, prompt in enumerate(prompts):
        if i == first:
            sources = sources_together([prompts[j] for j in experts], x)
            found |= zip(experts, sources, strict=True)
        elif i not in found:
            found[i] = prompts_of(prompt, x)
    return [found[i] for i in range(len(prompts))], keys


def _keys_of(
    reading: BlocksReading, static: list[int], tokens: list[Tensor], dtype: torch.dtype
) -> StaticKV | None:
    """What makes keys of several blocks' static prompts.

    None for blocks whose attention, norm1 or prompts have different forms.
    """
    if len({*map(_form, tokens)}) > 1:
        return None
    read = [reading.weights[i] for i in static]
    weights = [known.in_dtype(dtype) for known in read]
    known = reading.prompt_kv
    if known is None or known[0] != static or False in map(is_, weights, known[1]):
        constants = _key_weights(read, weights)
        keys = None if constants is None else StaticKV(constants, static)
        known = reading.prompt_kv = static, weights, keys
    found: StaticKV | None = known[2]
    return found


def _key_weights(
    read: Sequence[WeightsReading], weights: Sequence[BlockWeights]
) -> KVWeights | None:
    """What makes keys of prompts, of several blocks; None if they have different forms."""
    forms = {
        (
            r.scalars[0], r.scalars[2], w.qkv_weight.shape, w.norm1_weight is None,
            w.norm1_bias is None,
        )
        for r, w in zip(read, weights, strict=True)
    }  # fmt: skip
    if len(forms) > 1:
        return None
    heads, _, eps, *_ = read[0].scalars
    width = weights[0].qkv_weight.shape[0] // 3  # queries come before keys and values
    # Whatever mode is on now, they serve training later.
    with torch.inference_mode(False), torch.no_grad():
        parts = [w.qkv_weight[width:] for w in weights]
        return KVWeights(
            [w.norm1_weight for w in weights],
            [w.norm1_bias for w in weights],
            parts,
            [part.t() for part in parts],
            [None if w.qkv_bias is None else w.qkv_bias[width:] for w in weights],
            eps,
            heads,
        )
