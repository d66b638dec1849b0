"""Fused blocks: which of timm's blocks run as one function with a hand-written backward pass.

`vpt_fast.ops.block.function` computes. A block is not fused where a part is trained, hooked or
unknown, or drops elements or paths: it runs module by module then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy

from vpt_fast.models.fusion.block_reading import BlockReading, forget, weight_slots
from vpt_fast.models.fusion.fusible import block_settings, can_fuse
from vpt_fast.models.fusion.weights_reading import BlockSettings, WeightsReading
from vpt_fast.models.recompute import in_mode
from vpt_fast.ops.backend import computing_dtype, statistics_dtype
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.function import run_blocks, run_traced
from vpt_fast.ops.block.parts import AttentionPattern, BlockConfig, BlockWeights, contiguous
from vpt_fast.ops.block.prompt_kv import StaticKV
from vpt_fast.ops.block.prompt_source import PromptSource
from vpt_fast.ops.block.sites import sites_for
from vpt_fast.ops.tracing import is_traced, is_transformed

Prompts = tuple[PromptSource | None, tuple[Tensor | None, ...]]
"""Source of a block's prompts, and its tensors."""

NO_PROMPTS: Prompts = (None, ())


def block_weights(block: Any) -> BlockWeights:
    """Return the weights of a block that `can_fuse`; None for those folded into others."""
    return BlockWeights._make([parameters.get(name) for parameters, name in weight_slots(block)])


class Use(NamedTuple):
    """Settings of a block in one call.

    Attributes:
        memory: One of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
        windows: Windows that attention is restricted to, or None.
        queries: Number of first rows that are computed; None computes all.
    """

    memory: str
    windows: AttentionPattern | None = None
    queries: int | None = None


def block_config(block: Any, source: PromptSource | None, use: Use) -> BlockConfig:
    """Return the settings of a block that `can_fuse`, with a source of its prompts."""
    return _config(block_settings(block), source, use)


def _config(settings: BlockSettings, source: PromptSource | None, use: Use) -> BlockConfig:
    s = settings
    return BlockConfig(
        s.heads, s.scale, s.eps1, s.eps2, s.activation, use.memory, source, use.windows,
        use.queries, s.rotate_half, s.gate, s.mlp_eps, s.attn_eps, s.centred,
    )  # fmt: skip


class Fused(NamedTuple):
    """A block that is fused in this call.

    Attributes:
        weights: Weights of the block.
        reading: Reading of the weights; None under tracing, where modules are read in every call.
    """

    weights: BlockWeights
    reading: WeightsReading | None


def fused(block: Any, x: Tensor | None) -> Fused | None:
    """Return a block's weights for a fused call; None if it cannot be fused now.

    Args:
        block: Block of a class that can be fused.
        x: Input; None outside of tracing.
    """
    if x is not None and is_traced(x):
        if is_transformed():
            return None
        return Fused(block_weights(block), None) if can_fuse(block) else None
    reading = block.__dict__.get("_reading")
    known = None if reading is None else reading.current(block)
    if known is None:
        # Weights that are the same are read once, whatever else has changed.
        before = None if reading is None else reading.known
        forget(block)  # frees cached copies, also if it is not fused any more
        if not can_fuse(block):
            return None
        reading = BlockReading(block, block_settings(block), before)
        known = reading.current(block)
        if known is None:
            return None
        block.__dict__["_reading"] = reading
    return Fused(known.weights, known)


def can_rotate(rope: Tensor | None, x: Tensor) -> bool:
    """Return whether fused blocks take a table of the rotary position embedding.

    They take fp32 tables, fp64 ones for tokens in fp64, (N', 2 d) or (H, N', 2 d), that are not
    trained.

    Args:
        rope: Table, or None.
        x: Tokens (B, N, D).
    """
    if rope is None:
        return True
    if isinstance(rope, Proxy):
        return False
    trained = rope.requires_grad and torch.is_grad_enabled()
    return (
        not trained
        and rope.ndim in (2, 3)
        and rope.dtype == statistics_dtype(x.dtype)
        and rope.device == x.device
        and rope.is_contiguous()
        and rope.shape[-2] <= x.shape[1]
    )


def own_sources(
    prompt: Any, total: DeferredSum, memory: str, feature: Any
) -> tuple[DeferredSum, Prompts]:
    """Return the input of a fused block, and the source of its prompts; draws dropout masks.

    Args:
        prompt: Module of the block's prompts, or None.
        total: Input of the block, without rows of prompts.
        memory: What is saved for backward.
        feature: What the method's shared module made of the image, or None.
    """
    if prompt is None:
        return total, NO_PROMPTS
    if prompt.known_ahead:
        return total, prompt.sources(total.residual, feature)
    x = total.materialize()
    return DeferredSum(x), in_mode(memory, prompt, prompt.sources, x)


class _Input(NamedTuple):
    """Layout of a block's input, a deferred sum."""

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype  # of the residual
    branch: torch.dtype | None  # of the branch


def run(
    block: Any,
    now: Fused,
    prompts: Prompts,
    total: DeferredSum,
    use: Use,
    rope: Tensor | None = None,
) -> DeferredSum:
    """Run a fused block from one deferred sum to the next.

    Args:
        block: Block with the adapter that is called, if it has one.
        now: What `fused` returned for this input.
        prompts: Source of its prompts, and the source's tensors.
        total: Input.
        use: Settings in this call.
        rope: Table of the rotary position embedding, as `can_rotate` takes it; or None.

    Returns:
        Output (B, N, D), or its first rows (B, queries, D), deferred.
    """
    residual, branch, scale = total
    source, sources = prompts
    dtype = computing_dtype(residual)
    if now.reading is None:
        config = block_config(block, source, use)
        weights = now.weights._replace(rope=rope)
        middle, result = run_traced(config, weights, scale, dtype, residual, branch, sources)
    else:
        steps = _steps(now.reading, prompts, dtype, _input_of(total), scale, use, rope)
        middle, result = run_blocks([steps], residual, branch, [sources])
    adapter, scale = block._modules.get("adapter"), now.weights.scale2
    if adapter is None:
        return DeferredSum(middle, result, scale)
    return DeferredSum(middle, adapter(result if scale is None else result * scale))


def run_together(
    ahead: Sequence[tuple[Fused, Prompts]],
    static_kv: StaticKV | None,
    total: DeferredSum,
    uses: Iterable[Use],
    ropes: Iterable[Tensor | None],
) -> DeferredSum:
    """Run fused blocks as one function; see `run`.

    Args:
        ahead: Each block and its prompts, outside of tracing; blocks without adapters.
        static_kv: Those blocks whose K_p and V_p are computed together, if any.
        total: Input of the first block.
        uses: Settings of each in this call; all but the last compute all rows.
        ropes: Table of each, as for `run`.
    """
    dtype, scale, read = computing_dtype(total.residual), total.scale, _input_of(total)
    steps, sources = [], []
    for (now, prompts), use, rope in zip(ahead, uses, ropes, strict=True):
        if now.reading is None:
            raise RuntimeError("under tracing blocks run one by one")
        steps.append(_steps(now.reading, prompts, dtype, read, scale, use, rope))
        sources.append(prompts[1])
        scale = now.weights.scale2
        if len(steps) == 1:  # later sums have the wider dtype of input and products
            wide = torch.promote_types(total.dtype, dtype)
            read = read._replace(dtype=wide, branch=dtype)
    middle, result = run_blocks(steps, total.residual, total.branch, sources, static_kv)
    return DeferredSum(middle, result, scale)


def _input_of(total: DeferredSum) -> _Input:
    residual, branch, _ = total
    kind = None if branch is None else branch.dtype
    return _Input(residual.shape, residual.device, residual.dtype, kind)


def _steps(
    reading: WeightsReading,
    prompts: Prompts,
    dtype: torch.dtype,
    read: _Input,
    scale: Tensor | None,
    use: Use,
    rope: Tensor | None,
) -> BlockSteps:
    """Return the steps of a block for inputs of one layout, cached."""
    weights, scale = reading.in_dtype(dtype), contiguous(scale)
    source, sources = prompts
    tensors: tuple[Any, ...] = (
        dtype, read, None if scale is None else scale.dtype, None if rope is None else rope.shape,
        *[None if t is None else (t.shape, t.dtype) for t in sources],
    )  # fmt: skip
    layout = source, use, tensors
    known = reading.steps.get(layout)
    if (
        known is not None
        and known.weights is weights
        and known.scale is scale
        and known.rope is rope
    ):
        return known.steps
    config = _config(reading.settings, source, use)
    head_dim = weights.proj_weight.shape[1] // config.heads
    sites = sites_for(weights.proj_weight, head_dim, config, reading.layout, tensors)
    steps = BlockSteps(config, weights._replace(branch_scale=scale, rope=rope), dtype, sites)
    reading.remember(layout, weights, scale, rope, steps)
    return steps
