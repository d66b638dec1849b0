"""A frozen block as one autograd function; `block_body` has its steps.

The frozen weights are no inputs of the function: they get no gradients, and what depends on them
only is cheaper looked at than recorded. They are inputs where somebody traces, who must see them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpt_fast.ops.backend import in_full_precision
from vpt_fast.ops.block_body import BlockConfig, BlockSteps, BlockWeights, Kept, contiguous
from vpt_fast.ops.block_entry import Saved
from vpt_fast.ops.frozen import check_versions, exactly, once_differentiable, versions_of
from vpt_fast.ops.operators import OPERATOR_SITES, Sites
from vpt_fast.ops.tracing import is_traced

_WEIGHTS = len(BlockWeights._fields)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, config, weights, dtype, sites, needs_tokens, residual, branch, *tensors
    ):
        ctx.config, ctx.dtype, ctx.sites, ctx.weights = config, dtype, sites, weights
        if weights is None:
            given, sources = BlockWeights(*tensors[:_WEIGHTS]).to(dtype), tensors[_WEIGHTS:]
            ctx.versions = None
        else:
            given, sources = weights, tensors
            ctx.versions = versions_of(weights)
        steps = BlockSteps(config, given, dtype, sites)
        middle, result, kept = steps.forward(residual, branch, sources)
        kept = steps.keep(kept, needs_tokens)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.residual_dtype = residual.dtype
        ctx.set_materialize_grads(False)
        ctx.counts = (
            len(tensors), len(kept.entry.mixed), len(kept.prompt_statistics), len(kept.tokens),
        )  # fmt: skip
        ctx.save_for_backward(
            *tensors, *kept.entry.mixed, *kept.prompt_statistics, *kept.tokens,
            kept.entry.x, kept.entry.statistics, kept.keys, kept.out, kept.lse, kept.middle,
            kept.statistics, kept.hidden,
        )  # fmt: skip
        return middle, result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_middle, grad_result):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad
        if grad_middle is None and grad_result is None:
            return (None,) * len(needs)
        saved = ctx.saved_tensors  # once: under activation checkpointing it may be read only once
        tensors, kept = _unpacked(saved, ctx.counts)
        if ctx.versions is None:
            weights, sources = BlockWeights(*tensors[:_WEIGHTS]).to(ctx.dtype), tensors[_WEIGHTS:]
            before: tuple[None, ...] = (None,) * (5 + _WEIGHTS)
        else:
            weights, sources, before = ctx.weights, tensors, (None,) * 5
            check_versions(weights, ctx.versions)
        grad = grad_result if grad_middle is None else grad_middle
        sites = OPERATOR_SITES if is_traced(grad) else ctx.sites
        steps = BlockSteps(ctx.config, weights, ctx.dtype, sites)
        with exactly(grad):
            residual, branch, grads = steps.backward(
                kept, sources, contiguous(grad_middle), contiguous(grad_result),
                ctx.branch_dtype, needs[5] or needs[6], any(needs[7:]),
            )  # fmt: skip
        if residual is not None and residual.dtype != ctx.residual_dtype:
            residual = residual.to(ctx.residual_dtype)
        residual = residual if needs[5] else None
        branch = branch if needs[6] else None
        return *before[:5], residual, branch, *before[5:], *grads


def _unpacked(saved: tuple[Any, ...], counts: tuple[int, ...]) -> tuple[tuple[Any, ...], Kept]:
    """The function's tensors, and what was kept of its forward."""
    tensors, mixed, statistics, tokens = counts
    mixed += tensors
    statistics += mixed
    tokens += statistics
    entry = Saved(saved[tokens], saved[tokens + 1], saved[tensors:mixed])
    kept = Kept(
        entry, saved[tokens + 2], saved[mixed:statistics], saved[statistics:tokens],
        *saved[tokens + 3 :],
    )  # fmt: skip
    return saved[:tensors], kept


def run_block(
    config: BlockConfig,
    weights: BlockWeights,
    dtype: torch.dtype,
    sites: Sites,
    residual: Tensor,
    branch: Tensor | None,
    sources: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor, Tensor]:
    """A frozen block, but for its last sum.

    Args:
        config: what is no tensor.
        weights: frozen; they get no gradients. In `dtype` where matrix products read them, unless
            somebody traces.
        dtype: of the matrix products.
        sites: what computes, from `vpt_fast.ops.operators.sites_for`.
        residual: (B, N, D); with `branch` the block's input, residual + branch_scale * branch.
        branch: (B, N, D), or None for 0.
        sources: the tensors of `config.source`.

    Returns:
        x' (B, M, D), the sum after attention, in the input's dtype or a wider one, and
        MLP(norm2(x')) (B, M, D) in `dtype`, without LayerScale; M = N unless `config.queries` says
        less. The block's output is x' + ls2 * MLP(norm2(x')).

    Raises:
        RuntimeError: in backward, where a weight was changed in place since.
    """
    residual, branch = contiguous(residual), contiguous(branch)
    if torch.is_autocast_enabled(residual.device.type):
        with in_full_precision(residual):
            return _run(config, weights, dtype, sites, residual, branch, sources)
    return _run(config, weights, dtype, sites, residual, branch, sources)


def _run(
    config: BlockConfig,
    weights: BlockWeights,
    dtype: torch.dtype,
    sites: Sites,
    residual: Tensor,
    branch: Tensor | None,
    sources: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    needs = residual.requires_grad or (branch is not None and branch.requires_grad)
    if sites is OPERATOR_SITES:
        return _Block.apply(config, None, dtype, sites, needs, residual, branch, *weights, *sources)
    needed = needs or True in [t is not None and t.requires_grad for t in sources]
    if not (needed and torch.is_grad_enabled()):
        return BlockSteps(config, weights, dtype, sites).forward(residual, branch, sources)[:2]
    return _Block.apply(config, weights, dtype, sites, needs, residual, branch, *sources)
