"""Frozen blocks, one or several in a row, as one autograd function; `core` has the steps.

The frozen weights are no inputs of the function: they get no gradients, and what depends on them
only is cheaper looked at than recorded. Where somebody traces, who must see them, a block is a
function of its own with its weights among the inputs.
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
from vpt_fast.ops.block.prompt_kv import RowKV, prompt_kv
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
_BEFORE = 5
"""Inputs of `_Blocks` before the sources."""

_ALWAYS = 8
"""Tensors that are saved for every block, if only as None: the last ones of `_packed`."""

Sources = tuple[Tensor | None, ...]
"""The tensors of a block's `config.source`."""

Counts = tuple[int, int, int, int]
"""Tensors saved for a block: of its sources, and of the parts of `SavedBlock` that vary."""


class _Way(NamedTuple):
    """How a block went forward, for its way back."""

    steps: BlockSteps
    dtypes: tuple[torch.dtype, torch.dtype | None]  # of the residual and the branch that it read
    counts: Counts
    needs_tokens: bool  # whether the block before has a way back too


def _packed(sources: Sources, state: SavedBlock) -> tuple[list[Tensor | None], Counts]:
    """What is saved for backward of a block, and how many tensors each part of it has."""
    entry = state.entry
    tensors = [
        *sources, *entry.mixed, *state.prompt_statistics, *state.tokens, entry.x, entry.statistics,
        state.kv, state.out, state.lse, state.middle, state.statistics, state.hidden,
    ]  # fmt: skip
    counts = len(sources), len(entry.mixed), len(state.prompt_statistics), len(state.tokens)
    return tensors, counts


def _unpacked(tensors: Sequence[Any], counts: Counts) -> tuple[Sources, SavedBlock]:
    """What `_packed` was given."""
    parts, start = [], 0
    for count in counts:
        parts.append(tuple(tensors[start : start + count]))
        start += count
    sources, mixed, prompt_statistics, tokens = parts
    x, statistics, kv, *others = tensors[start:]
    state = SavedBlock(SavedInput(x, statistics, mixed), kv, prompt_statistics, tokens, *others)
    return sources, state


def _dtypes(residual: Tensor, branch: Tensor | None) -> tuple[torch.dtype, torch.dtype | None]:
    return residual.dtype, None if branch is None else branch.dtype


def _backward(
    steps: BlockSteps,
    saved: Sequence[Any],
    counts: Counts,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    grads: Sequence[Tensor | None],
    needs_tokens: bool,
    needs_sources: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of the residual, of the branch and of the sources.

    Args:
        steps: of the block.
        saved, counts: as `_packed` has left them.
        dtypes: of the residual and of the branch.
        grads: of x' and of the MLP's output.
        needs_tokens, needs_sources: what is asked for.
    """
    sources, state = _unpacked(saved, counts)
    residual, branch, found = steps.backward(
        state, sources, contiguous(grads[0]), contiguous(grads[1]), dtypes[1], needs_tokens,
        needs_sources,
    )  # fmt: skip
    if residual is not None and residual.dtype != dtypes[0]:
        residual = residual.to(dtypes[0])
    return residual, branch, found


def _apart(tensors: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """The tensors block by block."""
    rest = iter(tensors)
    return [tuple(itertools.islice(rest, count)) for count in counts]


def _to_prompts(
    row_kv: RowKV,
    dtype: torch.dtype,
    saved: Sequence[Any],
    counts: Sequence[int],
    found: list[Tensor | None],
) -> None:
    """Put the prompts' gradients in the place of their keys', in those of all blocks' sources."""
    mean, rstd, *tokens = saved
    starts = [0, *itertools.accumulate(counts)]
    places = [starts[i] for i in row_kv.blocks]
    grads = [found[place] for place in places]
    if any(grad is not None for grad in grads):
        made = row_kv.weights.gradients(dtype, tokens, mean, rstd, grads)
        for place, grad in zip(places, made, strict=True):
            found[place] = grad


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks, row_kv, counts, residual, branch, *tensors):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad
        needs_tokens, first = needs[3] or needs[4], _BEFORE
        ways: list[_Way | None] = []
        saved: list[Tensor | None] = []
        frozen: list[Tensor] = []
        sources = _apart(tensors, counts)
        if row_kv is not None:
            tokens = row_kv.tokens(sources)
            kv, mean, rstd = row_kv.weights.make(blocks[0].dtype, tokens)
            saved += [mean, rstd, *tokens]
            sources = row_kv.given(sources, kv)
        for steps, count, own in zip(blocks, counts, sources, strict=True):
            needed = needs_tokens or True in needs[first : first + count]
            first += count
            if not needed:
                ways.append(None)
                residual, branch, _ = steps.forward(residual, branch, own)
                continue
            dtypes = _dtypes(residual, branch)
            residual, branch, state = steps.forward(residual, branch, own)
            own_saved, packed = _packed(own, steps.save(state, needs_tokens))
            saved += own_saved
            frozen += steps.frozen
            ways.append(_Way(steps, dtypes, packed, needs_tokens))
            needs_tokens = True
        ctx.ways, ctx.frozen, ctx.versions = ways, frozen, versions_of(frozen)
        ctx.counts, ctx.row_kv, ctx.dtype = counts, row_kv, blocks[0].dtype
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
        ctx.maybe_clear_saved_tensors()  # so that what a block has read is freed when it is done
        check_versions(ctx.frozen, ctx.versions)
        traced, last = is_traced(grad), len(needs)
        found: list[Tensor | None] = []
        with exactly(grad):
            for way in reversed(ctx.ways):
                if way is None:
                    break
                steps, dtypes, counts, needs_tokens = way
                if traced:
                    steps = steps.with_sites(OPERATOR_SITES)
                tensors = saved[-sum(counts) - _ALWAYS :]
                del saved[-len(tensors) :]
                first = last - counts[0]
                residual, branch, own = _backward(
                    steps, tensors, counts, dtypes, grads, needs_tokens, True in needs[first:last]
                )
                grads = residual, branch
                del tensors
                found[:0] = own
                last = first
            found[:0] = [None] * (last - _BEFORE)
            if ctx.row_kv is not None:
                _to_prompts(ctx.row_kv, ctx.dtype, saved, ctx.counts, found)
        residual, branch = grads
        return (
            None, None, None, residual if needs[3] else None, branch if needs[4] else None, *found,
        )  # fmt: skip


class _TracedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, config, dtype, needs_tokens, residual, branch, *tensors):  # type: ignore[no-untyped-def]
        weights, sources = tensors[:_WEIGHTS], tensors[_WEIGHTS:]
        steps = BlockSteps(config, BlockWeights(*weights).to(dtype), dtype, OPERATOR_SITES)
        middle, result, state = steps.forward(residual, branch, sources)
        saved, ctx.counts = _packed(sources, steps.save(state, needs_tokens))
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
        with exactly(grad):
            residual, branch, found = _backward(
                steps, saved[_WEIGHTS:], ctx.counts, ctx.dtypes, grads, ctx.needs_tokens,
                any(needs[5 + _WEIGHTS :]),
            )  # fmt: skip
        residual, branch = residual if needs[3] else None, branch if needs[4] else None
        return None, None, None, residual, branch, *[None] * _WEIGHTS, *found


def run_blocks(
    blocks: Sequence[BlockSteps],
    residual: Tensor,
    branch: Tensor | None,
    sources: Sequence[Sources],
    row_kv: RowKV | None = None,
) -> tuple[Tensor, Tensor]:
    """Frozen blocks one after the other, but for the last one's last sum; nobody traces.

    Args:
        blocks: the steps of each; all but the last compute all rows. Their weights get no
            gradients.
        residual: (B, N, D); with `branch` the input, residual + branch_scale * branch.
        branch: (B, N, D), or None for 0.
        sources: of each block.
        row_kv: what makes keys of some blocks' prompts; their sources are the prompts, (p, D).

    Returns:
        x' (B, M, D), the sum after the last block's attention, in the input's dtype or a wider one,
        and MLP(norm2(x')) (B, M, D) in the dtype of the products, without LayerScale; M = N unless
        the last block's `config.queries` says less. The output is x' + ls2 * MLP(norm2(x')).

    Their backward pass is one: it goes through all blocks that have prompts, even where only the
    last one's gradients are asked for.

    Raises:
        RuntimeError: in backward, where a weight was changed in place since.
    """
    residual, branch = contiguous(residual), contiguous(branch)
    with exactly(residual):
        inputs = [residual, branch, *[t for own in sources for t in own]]
        needed = True in [t is not None and t.requires_grad for t in inputs]
        if not (needed and torch.is_grad_enabled()):
            sources = _with_keys(sources, row_kv, blocks[0].dtype)
            residual, branch = run_forward(blocks, residual, branch, sources)
        elif len(blocks) > 1 and has_saved_tensor_hooks():
            # Who stores what is saved elsewhere should have it block by block.
            sources = _with_keys(sources, row_kv, blocks[0].dtype)
            for steps, own in zip(blocks, sources, strict=True):
                residual, branch = run_blocks([steps], residual, branch, [own])
        else:
            counts = [len(own) for own in sources]
            residual, branch = apply_directly(_Blocks, blocks, row_kv, counts, *inputs)
    return residual, branch


def _with_keys(
    sources: Sequence[Sources], row_kv: RowKV | None, dtype: torch.dtype
) -> Sequence[Sources]:
    """Sources of the blocks, with keys in the place of prompts."""
    if row_kv is None:
        return sources
    kv = prompt_kv(row_kv.weights, dtype, row_kv.tokens(sources))
    return row_kv.given(sources, kv)


def run_traced(
    config: BlockConfig,
    weights: BlockWeights,
    scale: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor,
    branch: Tensor | None,
    sources: Sources = (),
) -> tuple[Tensor, Tensor]:
    """As `run_blocks`, of one block as operators of PyTorch's.

    Args:
        config: what is no tensor.
        weights: frozen, as they are; they get no gradients.
        scale: LayerScale (D,) of the branch, or None.
        dtype: of the matrix products.
        residual, branch, sources: as for `run_blocks`.
    """
    residual, branch = contiguous(residual), contiguous(branch)
    if scale is not None:
        weights = weights._replace(branch_scale=scale)
    needs_tokens = residual.requires_grad or (branch is not None and branch.requires_grad)
    with exactly(residual):
        found: Any = _TracedBlock.apply(
            config, dtype, needs_tokens, residual, branch, *weights, *sources
        )
    return found
