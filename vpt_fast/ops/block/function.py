"""Frozen blocks, one or several in a row, as one autograd function.

`vpt_fast.ops.block.core` has the steps. The frozen weights are no inputs of the function: they get
no gradients, and to check that they have not changed costs less than to record them. Under tracing,
which must record them, a block is a function of its own with its weights among the inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpt_fast.ops.block.add_norm import SavedInput
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.forward_only import run_forward
from vpt_fast.ops.block.parts import BlockConfig, BlockWeights, SavedBlock, contiguous
from vpt_fast.ops.block.prompt_kv import StaticKV, prompt_kv
from vpt_fast.ops.block.sites import OPERATOR_SITES
from vpt_fast.ops.frozen import (
    apply_directly,
    check_versions,
    exactly,
    has_saved_tensor_hooks,
    once_differentiable,
    versions_of,
)
from vpt_fast.ops.tracing import is_traced

_WEIGHTS = len(BlockWeights._fields)
_BEFORE_SOURCES = 5
"""Number of inputs of `_Blocks` before the sources."""

_SINGLE = 8
"""Number of tensors, None among them, that `_packed` puts last: one for each single field."""

Sources = tuple[Tensor | None, ...]
"""Tensors of a block's `config.source`."""

Counts = tuple[int, int, int, int]
"""Numbers of tensors that are saved of a block's sources, mixing, kv_statistics and tokens."""

Dtypes = tuple[torch.dtype, torch.dtype | None]
"""Dtypes of a block's residual and of its branch, None without one."""


class _BlockRecord(NamedTuple):
    """What the backward pass of a block reads beside the saved tensors."""

    steps: BlockSteps
    dtypes: Dtypes
    counts: Counts
    needs_tokens: bool  # whether the gradient of the block's input is needed


def _packed(sources: Sources, saved: SavedBlock) -> tuple[list[Tensor | None], Counts]:
    """Return all tensors that are saved of a block in one list, and how `_unpacked` splits it."""
    entry = saved.entry
    tensors = [
        *sources, *entry.mixing, *saved.kv_statistics, *saved.tokens, entry.x, entry.statistics,
        saved.kv, saved.out, saved.lse, saved.middle, saved.statistics, saved.hidden,
    ]  # fmt: skip
    counts = len(sources), len(entry.mixing), len(saved.kv_statistics), len(saved.tokens)
    return tensors, counts


def _unpacked(tensors: Sequence[Any], counts: Counts) -> tuple[Sources, SavedBlock]:
    """Return the arguments of `_packed` from its results."""
    *parts, single = _split(tensors, (*counts, _SINGLE))
    sources, mixing, kv_statistics, tokens = parts
    x, x_statistics, kv, out, lse, middle, statistics, hidden = single
    entry = SavedInput(x, x_statistics, mixing)
    return sources, SavedBlock(
        entry, kv, kv_statistics, tokens, out, lse, middle, statistics, hidden
    )


def _split(tensors: Sequence[Any], counts: Sequence[int]) -> list[tuple[Any, ...]]:
    rest = iter(tensors)
    return [tuple(itertools.islice(rest, count)) for count in counts]


def _dtypes(residual: Tensor, branch: Tensor | None) -> Dtypes:
    return residual.dtype, None if branch is None else branch.dtype


def _backward(
    record: _BlockRecord,
    tensors: Sequence[Any],
    grads: Sequence[Tensor | None],
    needs_sources: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Return the gradients of a block's residual, of its branch and of its sources.

    Args:
        record: Record of the forward pass.
        tensors: Saved tensors, as `_packed` ordered them.
        grads: Gradients of x' and of the MLP's output.
        needs_sources: Whether the sources' gradients are needed.
    """
    steps, (dtype, branch_dtype), counts, needs_tokens = record
    sources, saved = _unpacked(tensors, counts)
    middle, result = map(contiguous, grads)
    residual, branch, source_grads = steps.backward(
        saved, sources, middle, result, branch_dtype, needs_tokens, needs_sources
    )
    if residual is not None and residual.dtype != dtype:
        residual = residual.to(dtype)
    return residual, branch, source_grads


def _kv_to_prompts(
    static_kv: StaticKV,
    dtype: torch.dtype,
    saved: Sequence[Any],
    counts: Sequence[int],
    source_grads: list[Tensor | None],
) -> None:
    """Replace the gradients of K_p, V_p by those of the prompts, among those of all sources."""
    mean, rstd, *prompts = saved
    offsets = [0, *itertools.accumulate(counts)]
    indices = [offsets[block] for block in static_kv.blocks]
    kv_grads = [source_grads[i] for i in indices]
    if any(grad is not None for grad in kv_grads):
        grads = static_kv.gradients(dtype, prompts, mean, rstd, kv_grads)
        for i, own in zip(indices, grads, strict=True):
            source_grads[i : i + len(own)] = own


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks, static_kv, counts, residual, branch, *tensors):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad
        needs_tokens, first = needs[3] or needs[4], _BEFORE_SOURCES
        records: list[_BlockRecord | None] = []
        saved: list[Tensor | None] = []
        frozen: list[Tensor] = []
        sources = _split(tensors, counts)
        if static_kv is not None:
            prompts, more = static_kv.inputs(sources)
            kv, mean, rstd = static_kv.weights.prompt_kv(blocks[0].dtype, prompts, more)
            saved += [mean, rstd, *prompts]
            sources = static_kv.with_kv(sources, kv)
        for steps, count, own in zip(blocks, counts, sources, strict=True):
            needed = needs_tokens or True in needs[first : first + count]
            first += count
            if not needed:
                records.append(None)
                residual, branch, _ = steps.forward(residual, branch, own)
                continue
            dtypes = _dtypes(residual, branch)
            residual, branch, full = steps.forward(residual, branch, own)
            packed, packed_counts = _packed(own, steps.save(full, needs_tokens))
            saved += packed
            frozen += steps.frozen
            records.append(_BlockRecord(steps, dtypes, packed_counts, needs_tokens))
            needs_tokens = True
        ctx.records, ctx.frozen, ctx.versions = records, frozen, versions_of(frozen)
        ctx.counts, ctx.static_kv, ctx.dtype = counts, static_kv, blocks[0].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return residual, branch

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad
        grad = grads[1] if grads[0] is None else grads[0]
        if grad is None:
            return (None,) * len(needs)
        saved = [*ctx.saved_tensors]
        ctx.maybe_clear_saved_tensors()  # each block's tensors are freed once it is done
        check_versions(ctx.frozen, ctx.versions)
        traced, last = is_traced(grad), len(needs)
        source_grads: list[Tensor | None] = []
        with exactly(grad):
            for record in reversed(ctx.records):
                if record is None:
                    break
                if traced:
                    record = record._replace(steps=record.steps.with_sites(OPERATOR_SITES))
                tensors = saved[-sum(record.counts) - _SINGLE :]
                del saved[-len(tensors) :]
                first = last - record.counts[0]
                residual, branch, own = _backward(record, tensors, grads, True in needs[first:last])
                grads = residual, branch
                del tensors, residual, branch
                source_grads[:0] = own
                last = first
            source_grads[:0] = [None] * (last - _BEFORE_SOURCES)
            if ctx.static_kv is not None:
                _kv_to_prompts(ctx.static_kv, ctx.dtype, saved, ctx.counts, source_grads)
        residual, branch = grads
        return (
            None, None, None, residual if needs[3] else None, branch if needs[4] else None,
            *source_grads,
        )  # fmt: skip


class _TracedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, config, dtype, needs_tokens, residual, branch, *tensors):  # type: ignore[no-untyped-def]
        weights, sources = tensors[:_WEIGHTS], tensors[_WEIGHTS:]
        steps = BlockSteps(config, BlockWeights(*weights).to(dtype), dtype, OPERATOR_SITES)
        middle, result, full = steps.forward(residual, branch, sources)
        saved, ctx.counts = _packed(sources, steps.save(full, needs_tokens))
        ctx.config, ctx.dtype, ctx.needs_tokens = config, dtype, needs_tokens
        ctx.dtypes = _dtypes(residual, branch)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights, *saved)
        return middle, result

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        needs, saved = ctx.needs_input_grad, ctx.saved_tensors
        grad = grads[1] if grads[0] is None else grads[0]
        if grad is None:
            return (None,) * len(needs)
        weights = BlockWeights(*saved[:_WEIGHTS]).to(ctx.dtype)
        steps = BlockSteps(ctx.config, weights, ctx.dtype, OPERATOR_SITES)
        record = _BlockRecord(steps, ctx.dtypes, ctx.counts, ctx.needs_tokens)
        needs_sources = any(needs[_BEFORE_SOURCES + _WEIGHTS :])
        with exactly(grad):
            residual, branch, source_grads = _backward(
                record, saved[_WEIGHTS:], grads, needs_sources
            )
        residual, branch = residual if needs[3] else None, branch if needs[4] else None
        return None, None, None, residual, branch, *[None] * _WEIGHTS, *source_grads


def run_blocks(
    blocks: Sequence[BlockSteps],
    residual: Tensor,
    branch: Tensor | None,
    sources: Sequence[Sources],
    static_kv: StaticKV | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x' and the MLP's output of the last of several frozen blocks; not under tracing.

    The output of the last block is x' + ls2 * MLP(norm2(x')). There is one backward pass: it goes
    through all blocks with prompts even if only the last one's gradients are needed.

    Args:
        blocks: Steps of each block; all but the last compute all rows. Weights get no gradients.
        residual: Residual (B, N, D) of the input, residual + branch_scale * branch.
        branch: Branch (B, N, D) of the input, or None for 0.
        sources: Tensors of each block's source.
        static_kv: Those blocks whose K_p and V_p are computed together.

    Returns:
        x' (B, M, D), the sum after the last block's attention, in the input's dtype or a wider one,
        and MLP(norm2(x')) (B, M, D) in the dtype of the products, without LayerScale; M = N unless
        the last block has `config.queries`.

    Raises:
        RuntimeError: In backward, if a weight was changed in place since.
    """
    residual, branch = contiguous(residual), contiguous(branch)
    with exactly(residual):
        inputs = [residual, branch, *[t for own in sources for t in own]]
        needed = True in [t is not None and t.requires_grad for t in inputs]
        if not (needed and torch.is_grad_enabled()):
            sources = _with_kv(sources, static_kv, blocks[0].dtype)
            residual, branch = run_forward(blocks, residual, branch, sources)
        elif len(blocks) > 1 and has_saved_tensor_hooks():
            # Hooks that move saved tensors elsewhere should get them block by block.
            sources = _with_kv(sources, static_kv, blocks[0].dtype)
            for steps, own in zip(blocks, sources, strict=True):
                residual, branch = run_blocks([steps], residual, branch, [own])
        else:
            counts = [len(own) for own in sources]
            residual, branch = apply_directly(_Blocks, blocks, static_kv, counts, *inputs)
    return residual, branch


def _with_kv(
    sources: Sequence[Sources], static_kv: StaticKV | None, dtype: torch.dtype
) -> Sequence[Sources]:
    """Return the sources with K_p, V_p in place of prompts whose K_p, V_p are computed together."""
    if static_kv is None:
        return sources
    return static_kv.with_kv(sources, prompt_kv(static_kv, dtype, sources))


def run_traced(
    config: BlockConfig,
    weights: BlockWeights,
    scale: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor,
    branch: Tensor | None,
    sources: Sources = (),
) -> tuple[Tensor, Tensor]:
    """Return what `run_blocks` does for one block, by operators that can be traced.

    Args:
        config: Settings of the block.
        weights: Frozen weights, in any dtype; they get no gradients.
        scale: LayerScale (D,) of the branch, or None.
        dtype: Dtype of the matrix products.
        residual: Residual (B, N, D) of the input.
        branch: Branch (B, N, D) of the input, or None for 0.
        sources: Tensors of `config.source`.
    """
    residual, branch = contiguous(residual), contiguous(branch)
    if scale is not None:
        weights = weights._replace(branch_scale=scale)
    needs_tokens = residual.requires_grad or (branch is not None and branch.requires_grad)
    with exactly(residual):
        results: Any = _TracedBlock.apply(
            config, dtype, needs_tokens, residual, branch, *weights, *sources
        )
    return results
