"""Several blocks before the first of them runs: whether all are fused, and all their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpt_fast.models.fusion.block_reading import BlockReading, BlocksReading, read_together
from vpt_fast.models.fusion.fused_block import NO_PROMPTS, Fused, Prompts
from vpt_fast.models.fusion.weights_reading import WeightsReading
from vpt_fast.modules.experts import PromptExperts
from vpt_fast.modules.experts_together import sources_together
from vpt_fast.modules.hooks import has_compiled_call, has_hooks, has_own_forward
from vpt_fast.modules.prompt_module import fused_source
from vpt_fast.ops.backend import computing_dtype
from vpt_fast.ops.block.parts import BlockWeights
from vpt_fast.ops.block.projections import keys_and_values_of
from vpt_fast.ops.block.prompt_kv import KVWeights, StaticKV
from vpt_fast.ops.block.prompt_source import GIVEN_KV
from vpt_fast.ops.tracing import is_traced

_form = attrgetter("shape", "dtype", "device")

Ahead = tuple[Fused, Prompts]
"""A fused block and its prompts."""


def look_ahead(
    blocks: Sequence[Any],
    x: Tensor,
    fused: Callable[[Any, Tensor | None], Fused | None],
    feature: Any = None,
) -> tuple[list[Ahead], StaticKV | None] | None:
    """Return all blocks with their prompts, and those whose K_p, V_p are computed together.

    Args:
        blocks: Blocks of one width, in order.
        x: Tokens (B, N, D).
        fused: Function that returns a block's weights for a fused call, or None.
        feature: What the method's shared module made of the image, or None.

    Returns:
        None under tracing, or if a block is hooked, compiled by itself, has an adapter, makes its
        prompts of its input by autograd or runs module by module: that may change the blocks after
        it, and each is checked when it runs.
    """
    if not blocks or is_traced(x):
        return None
    reading = read_together(blocks, lambda block: _read(block, fused))
    if reading is None:
        return None
    now = [Fused(known.weights, known) for known in reading.weights]
    prompts, static_kv = _prompts_together(reading, x, feature)
    return list(zip(now, prompts, strict=True)), static_kv


def _read(block: Any, fused: Callable[[Any, Tensor | None], Fused | None]) -> BlockReading | None:
    """Return a block's reading; None if it does not run with the others."""
    rows = block.__dict__.get("rows")
    if has_hooks(block) or has_own_forward(block) or has_compiled_call(block):
        return None
    if "adapter" in block._modules or (rows is not None and (rows.entering or rows.leaving)):
        return None
    prompt = block._modules.get("prompt")
    if prompt is not None and not prompt.known_ahead:
        return None
    if fused(block, None) is None:
        return None
    reading: BlockReading | None = block.__dict__.get("_reading")
    return reading


def _prompts_together(
    reading: BlocksReading, x: Tensor, feature: Any
) -> tuple[list[Prompts], StaticKV | None]:
    """Return the blocks' prompts; dropout masks are drawn in the blocks' order."""
    prompts = reading.prompts
    found: dict[int, Prompts] = {}
    static = [i for i, p in enumerate(prompts) if p is not None and p.is_static]
    static_kv = _static_together(reading, static, x, found) if len(static) > 1 else None
    experts = [i for i, p in enumerate(prompts) if type(p) is PromptExperts]
    first = experts[0] if experts else len(prompts)
    for i, prompt in enumerate(prompts):
        if i == first:
            sources = sources_together([prompts[j] for j in experts], x)
            found |= zip(experts, sources, strict=True)
        elif i not in found:
            found[i] = NO_PROMPTS if prompt is None else prompt.sources(x, feature)
    return [found[i] for i in range(len(prompts))], static_kv


def _static_together(
    reading: BlocksReading, blocks: list[int], x: Tensor, found: dict[int, Prompts]
) -> StaticKV | None:
    """Find the sources of the given blocks, whose prompts are static; return what is computed
    together, if their prompts and weights have one form."""
    dtype, made = computing_dtype(x), [reading.prompts[i].static() for i in blocks]
    rows, more = zip(*made, strict=True)
    alike = _are_alike(rows) and (more.count(None) == len(more) or _are_alike(more))
    if alike:
        appends_kv = more[0] is not None
        static_kv = _static_kv(reading, blocks, dtype, appends_kv)
        if static_kv is not None:
            sources = made if appends_kv else zip(rows)
            found |= {i: (GIVEN_KV, own) for i, own in zip(blocks, sources, strict=True)}
            return static_kv
    for i, (own, kv) in zip(blocks, made, strict=True):
        own = None if own is None else own.unsqueeze(0)
        found[i] = fused_source(own, None, kv, 1.0 - reading.prompts[i].dropout, dtype)
    return None


def _are_alike(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether all are tensors of one shape, dtype and device."""
    return type(None) not in map(type, tensors) and len({*map(_form, tensors)}) == 1


class _CachedKV(NamedTuple):
    """What `_static_kv` returned, and what it returned it for."""

    blocks: list[int]
    appends_kv: bool
    weights: list[BlockWeights]
    static_kv: StaticKV | None


def _static_kv(
    reading: BlocksReading, blocks: list[int], dtype: torch.dtype, appends_kv: bool
) -> StaticKV | None:
    """Return the blocks' weights for K_p and V_p; None if they differ in form.

    Args:
        reading: Reading of all blocks.
        blocks: Indices of blocks with static prompts of one form.
        dtype: Dtype of the products.
        appends_kv: Whether more keys and values follow those of the prompts.
    """
    read = [reading.weights[i] for i in blocks]
    weights = [known.in_dtype(dtype) for known in read]
    known: _CachedKV | None = reading.static_kv
    if (
        known is None
        or known.blocks != blocks
        or known.appends_kv != appends_kv
        or False in map(is_, weights, known.weights)
    ):
        constants = _kv_weights(read, weights)
        static_kv = None if constants is None else StaticKV(constants, blocks, appends_kv)
        known = reading.static_kv = _CachedKV(blocks, appends_kv, weights, static_kv)
    return known.static_kv


def _kv_weights(
    read: Sequence[WeightsReading], weights: Sequence[BlockWeights]
) -> KVWeights | None:
    forms = {
        (
            r.settings.heads, r.settings.eps1, r.settings.centred, w.proj_weight.shape,
            w.norm1_weight is None, w.norm1_bias is None,
        )
        for r, w in zip(read, weights, strict=True)
    }  # fmt: skip
    if len(forms) > 1:
        return None
    settings = read[0].settings
    # Views taken under inference_mode could not serve training later.
    with torch.inference_mode(False), torch.no_grad():
        return KVWeights(
            [w.norm1_weight for w in weights],
            [w.norm1_bias for w in weights],
            [keys_and_values_of(w) for w in weights],
            settings.eps1,
            settings.centred,
            settings.heads,
        )
