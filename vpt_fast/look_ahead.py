"""What can be found out about several blocks before the first of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vpt_fast.block_reading import BlockReading
from vpt_fast.experts import PromptExperts
from vpt_fast.experts_together import sources_together
from vpt_fast.fused_block import NO_PROMPTS, Fused, Prompts
from vpt_fast.hooks import has_compiled_call, has_hooks, has_own_forward
from vpt_fast.ops.backend import computing_dtype
from vpt_fast.ops.block_body import BlockWeights, contiguous
from vpt_fast.ops.prompt_keys import KeyWeights, prompt_keys
from vpt_fast.ops.prompt_source import GIVEN_KEYS, StaticPrompts
from vpt_fast.ops.tracing import is_traced
from vpt_fast.prompts import PromptTokens

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
) -> list[Ahead | None]:
    """Blocks as they will be fused, those with static prompts with keys that are made together.

    Args:
        blocks: of one width, in the order in which x passes through them.
        x: tokens (B, N, D).
        fused: a block as it is fused in a call in which nobody traces, or None.

    Returns:
        What is there for each block; None for those that look for themselves. Those are all of
        them where somebody traces, or where a block is hooked, compiled by itself or runs module by
        module: what runs there may change the blocks after it.
    """
    nothing: list[Ahead | None] = [None for _ in blocks]
    if is_traced(x):
        return nothing
    now = []
    for block in blocks:
        rows = block.__dict__.get("rows")
        if has_hooks(block) or has_own_forward(block) or has_compiled_call(block):
            return nothing
        has_rows = rows is not None and (rows.entering or rows.leaving)
        found = None if has_rows else fused(block, None)
        if found is None:
            return nothing
        now.append(found)
    prompts = [block._modules.get("prompt") for block in blocks]
    return list(zip(now, _prompts_together(prompts, now, x), strict=True))


def _prompts_together(prompts: list[Any], now: list[Fused], x: Tensor) -> list[Prompts]:
    """The blocks' prompts; dropout masks are drawn in the blocks' order."""
    static = [i for i, p in enumerate(prompts) if type(p) is PromptTokens and not p.drops]
    made = _keys_of([now[i] for i in static], [prompts[i] for i in static], x)
    found: dict[int, Prompts] = {
        i: (GIVEN_KEYS, (keys,)) for i, keys in zip(static, made, strict=False)
    }
    experts = [i for i, p in enumerate(prompts) if type(p) is PromptExperts]
    for i, prompt in enumerate(prompts):
        if i in found:
            continue
        if i in experts:
            sources = sources_together([prompts[j] for j in experts], x)
            found |= zip(experts, sources, strict=True)
        else:
            found[i] = prompts_of(prompt, x)
    return [found[i] for i in range(len(prompts))]


def _keys_of(now: list[Fused], prompts: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    """Keys and values of the blocks' static prompts; none where making them together has no use.

    That is for one block, and for blocks whose attention, norm1 or prompts have different forms.
    """
    read: list[tuple[BlockReading, BlockWeights]] = [
        (found.reading, found.weights) for found in now if found.reading is not None
    ]
    if len(read) < 2:
        return ()
    tokens = [prompt.undropped() for prompt in prompts]
    forms = {
        (
            reading.scalars[0], reading.scalars[2], w.qkv_weight.shape,
            w.norm1_weight is None, w.norm1_bias is None, rows.shape, rows.dtype, rows.device,
        )
        for (reading, w), rows in zip(read, tokens, strict=True)
    }  # fmt: skip
    if len(forms) > 1:
        return ()
    heads, _, eps, *_ = read[0][0].scalars
    dtype = computing_dtype(x)
    weights = [reading.in_dtype(given, dtype) for reading, given in read]
    views = [r.keys_and_values(w) for (r, _), w in zip(read, weights, strict=True)]
    constants = KeyWeights(
        [w.norm1_weight for w in weights],
        [w.norm1_bias for w in weights],
        [view.weight for view in views],
        [view.transposed for view in views],
        [view.bias for view in views],
        eps,
        heads,
    )
    return prompt_keys(constants, dtype, tokens)
