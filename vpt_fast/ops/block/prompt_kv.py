"""K_p and V_p of the static prompts of several blocks, computed together.

    K_i, V_i = norm1_i(P_i) W_i + b_i       for every block i

They do not depend on the tokens: one normalisation serves all blocks, and each block has one small
product. Visual Prompt Tuning (arXiv 2203.12119), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpt_fast.ops.backend import statistics_dtype
from vpt_fast.ops.block.projections import Projection
from vpt_fast.ops.frozen import (
    apply_directly,
    check_versions,
    exactly,
    once_differentiable,
    versions_of,
)
from vpt_fast.ops.rowwise.residual_norm_reference import rms_norm, rms_norm_backward


class KVWeights:
    """Frozen weights of norm1 and of the projection to keys and values, block by block.

    Args:
        norm_weights: Weight (D,) of each norm1, or None.
        norm_biases: Bias (D,) of each norm1, or None.
        projections: Projections of each block to keys and values, of (2 A, D) or two of (A, D).
        eps: Epsilon of every norm1.
        centred: Whether every norm1 subtracts the mean; RMSNorm does not.
        heads: Number of heads H.

    Attributes:
        frozen: All weights that are not None.
    """

    def __init__(
        self,
        norm_weights: list[Tensor | None],
        norm_biases: list[Tensor | None],
        projections: Sequence[Sequence[Projection]],
        eps: float,
        centred: bool,
        heads: int,
    ) -> None:
        self.norm_weights, self.norm_biases = norm_weights, norm_biases
        self.eps, self.centred, self.heads = eps, centred, heads
        self.weights = [[part.weight for part in parts] for parts in projections]
        self.transposed = [
            [(part.weight.t(), part.bias) for part in parts] for parts in projections
        ]
        every = (
            *norm_weights,
            *norm_biases,
            *(t for parts in projections for p in parts for t in p),
        )
        self.frozen = [t for t in every if t is not None]

    def prompt_kv(
        self, dtype: torch.dtype, prompts: Sequence[Tensor], more: Sequence[Tensor] = ()
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return K_p, V_p (1, p, 2, H, d) of each block, and mean and rstd of the prompts' rows.

        Args:
            dtype: Dtype of the products; the statistics, (blocks, p, 1), are fp32 at least.
            prompts: Prompts P (p, D) of each block.
            more: Keys and values (1, n, 2, H, d) of each block that follow those of its prompts:
                the result is (1, p + n, 2, H, d); or nothing.
        """
        wide = statistics_dtype(prompts[0].dtype)
        stacked = torch.stack(list(prompts)).to(wide)
        norm = torch.native_layer_norm if self.centred else rms_norm
        y, mean, rstd = norm(stacked, stacked.shape[-1:], None, None, self.eps)
        gamma, beta = _stacked(self.norm_weights, wide), _stacked(self.norm_biases, wide)
        if gamma is not None:
            y = y * gamma if beta is None else torch.addcmul(beta, y, gamma)
        count, rows = y.shape[0], y.shape[1]
        width = sum(weight.shape[0] for weight in self.weights[0])
        extra = more[0].shape[1] if more else 0
        kv = torch.empty((count, rows + extra, width), dtype=dtype, device=y.device)
        own = kv[:, :rows] if more else kv
        if more:
            kv[:, rows:] = torch.stack(list(more)).view(count, extra, width)
        for normed, parts, out in zip(
            y.to(dtype).unbind(), self.transposed, own.unbind(), strict=True
        ):
            outs = (out,) if len(parts) == 1 else out.chunk(len(parts), 1)
            for (weight, bias), part in zip(parts, outs, strict=True):
                if bias is None:
                    torch.mm(normed, weight, out=part)
                else:
                    torch.addmm(bias, normed, weight, out=part)
        heads = kv.view(count, 1, rows + extra, 2, self.heads, width // (2 * self.heads))
        return heads.unbind(), mean, rstd

    def gradients(
        self,
        dtype: torch.dtype,
        prompts: Sequence[Tensor],
        mean: Tensor,
        rstd: Tensor,
        grads: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """Return the gradients (p, D) of the prompts.

        Args:
            dtype: Dtype of the products.
            prompts: Prompts P (p, D) of each block.
            mean: Mean of every prompt row, from `prompt_kv`.
            rstd: Reciprocal standard deviation likewise.
            grads: Gradients of the keys and values of each block; None for 0.
        """
        wide, first, count = mean.dtype, prompts[0], prompts[0].shape[0]
        grad_y = torch.empty((len(prompts), *first.shape), dtype=dtype, device=first.device)
        for grad, weights, out in zip(grads, self.weights, grad_y.unbind(), strict=True):
            if grad is None:
                out.zero_()
                continue
            rows = grad.view(grad.shape[1], -1)
            if grad.shape[1] > count:
                rows = rows[:count]
            parts = (rows,) if len(weights) == 1 else rows.chunk(len(weights), 1)
            torch.mm(parts[0], weights[0], out=out)
            for part, weight in zip(parts[1:], weights[1:], strict=True):
                out.addmm_(part, weight)
        grad_y, gamma = grad_y.to(wide), _stacked(self.norm_weights, wide)
        if gamma is not None:
            grad_y = grad_y * gamma
        stacked = torch.stack(list(prompts)).to(wide)
        if not self.centred:
            return rms_norm_backward(grad_y, stacked, rstd, None).to(first.dtype).unbind()
        result = torch.ops.aten.native_layer_norm_backward(
            grad_y, stacked, stacked.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return result.to(first.dtype).unbind()


def _stacked(vectors: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """Return (blocks, 1, D), or None where the vectors are folded into other weights."""
    present = [v for v in vectors if v is not None]
    return torch.stack(present).unsqueeze(1).to(dtype) if present else None


class StaticKV(NamedTuple):
    """Those of several blocks whose K_p and V_p are computed together.

    Their sources are the prompts (p, D), and with `appends_kv` the keys and values
    (1, n, 2, H, d) that follow those of the prompts.

    Attributes:
        weights: Weights that compute them.
        blocks: Indices of these blocks among all.
        appends_kv: Whether there are such keys and values.
    """

    weights: KVWeights
    blocks: list[int]
    appends_kv: bool = False

    def inputs(self, sources: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the prompts of these blocks, and the keys and values that follow theirs."""
        prompts = [sources[i][0] for i in self.blocks]
        return prompts, [sources[i][1] for i in self.blocks] if self.appends_kv else []

    def with_kv(self, sources: Sequence[Any], kv: Sequence[Tensor]) -> list[Any]:
        """Return the sources of all blocks with K_p, V_p in place of these blocks' prompts."""
        changed, rest = [*sources], (None,) if self.appends_kv else ()
        for i, prompt_kv in zip(self.blocks, kv, strict=True):
            changed[i] = (prompt_kv, *rest)
        return changed

    def gradients(
        self,
        dtype: torch.dtype,
        prompts: Sequence[Tensor],
        mean: Tensor,
        rstd: Tensor,
        grads: Sequence[Tensor | None],
    ) -> list[tuple[Tensor | None, ...]]:
        """Return the gradients of each block's sources; arguments as `KVWeights.gradients`."""
        own = self.weights.gradients(dtype, prompts, mean, rstd, grads)
        if not self.appends_kv:
            return [(grad,) for grad in own]
        count = len(prompts[0])
        more = [None if grad is None else grad[:, count:].contiguous() for grad in grads]
        return list(zip(own, more, strict=True))


class _PromptKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, static_kv, dtype, count, *inputs):  # type: ignore[no-untyped-def]
        prompts, weights = inputs[:count], static_kv.weights
        kv, mean, rstd = weights.prompt_kv(dtype, prompts, inputs[count:])
        ctx.static_kv, ctx.dtype, ctx.versions = static_kv, dtype, versions_of(weights.frozen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, rstd, *prompts)
        return kv

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        static_kv, (mean, rstd, *prompts) = ctx.static_kv, ctx.saved_tensors
        check_versions(static_kv.weights.frozen, ctx.versions)
        with exactly(mean):
            found = static_kv.gradients(ctx.dtype, prompts, mean, rstd, grads)
        return None, None, None, *[grad for part in zip(*found, strict=True) for grad in part]


def prompt_kv(
    static_kv: StaticKV, dtype: torch.dtype, sources: Sequence[Any]
) -> tuple[Tensor, ...]:
    """Return keys and values of each of `static_kv.blocks` in `dtype`, as one autograd function.

    Args:
        static_kv: Frozen weights, without gradients; operands of products are in `dtype`.
        dtype: Dtype of the products; statistics are fp32 at least.
        sources: Sources of all blocks.

    Raises:
        RuntimeError: In backward, if a weight was changed in place since.
    """
    prompts, more = static_kv.inputs(sources)
    with exactly(prompts[0]):
        if not (torch.is_grad_enabled() and True in [t.requires_grad for t in (*prompts, *more)]):
            return static_kv.weights.prompt_kv(dtype, prompts, more)[0]
        kv: Any = apply_directly(_PromptKV, static_kv, dtype, len(prompts), *prompts, *more)
    return kv
