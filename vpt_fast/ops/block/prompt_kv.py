"""Keys and values of the static prompts of several blocks, made together.

    K_i, V_i = norm1_i(P_i) W_i + b_i       for every block i

They do not depend on the tokens, so that one normalisation serves all blocks, and a block is left
with one small product. Visual Prompt Tuning (arXiv 2203.12119), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpt_fast.ops.backend import statistics_dtype
from vpt_fast.ops.frozen import (
    apply_directly,
    check_versions,
    exactly,
    once_differentiable,
    versions_of,
)


class KVWeights:
    """What makes keys and values of the normalised prompts of each block; constants.

    Args:
        norm_weights, norm_biases: of norm1, (D,) each or None.
        weights: (2 A, D), of keys and values.
        transposed: (D, 2 A), the same.
        biases: (2 A,) each, or None.
        eps: of all norms.
        heads: H.

    Attributes:
        frozen: all tensors that there are.
    """

    def __init__(
        self,
        norm_weights: list[Tensor | None],
        norm_biases: list[Tensor | None],
        weights: list[Tensor],
        transposed: list[Tensor],
        biases: list[Tensor | None],
        eps: float,
        heads: int,
    ) -> None:
        self.norm_weights, self.norm_biases = norm_weights, norm_biases
        self.weights, self.transposed, self.biases = weights, transposed, biases
        self.eps, self.heads = eps, heads
        found = (*norm_weights, *norm_biases, *weights, *biases)
        self.frozen = [t for t in found if t is not None]

    def make(
        self, dtype: torch.dtype, tokens: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Keys and values (1, p, 2, H, d) of each block, and the prompts' mean and rstd.

        Args:
            dtype: of the products; statistics, (blocks, p, 1), are fp32 at least.
            tokens: the blocks' prompts, (p, D) each.
        """
        wide = statistics_dtype(tokens[0].dtype)
        prompts = torch.stack(list(tokens)).to(wide)
        y, mean, rstd = torch.native_layer_norm(prompts, prompts.shape[-1:], None, None, self.eps)
        gamma, beta = _stacked(self.norm_weights, wide), _stacked(self.norm_biases, wide)
        if gamma is not None:
            y = y * gamma if beta is None else torch.addcmul(beta, y, gamma)
        count, rows, width = y.shape[0], y.shape[1], self.weights[0].shape[0]
        kv = torch.empty((count, rows, width), dtype=dtype, device=y.device)
        parts = zip(y.to(dtype).unbind(), self.transposed, self.biases, kv.unbind(), strict=True)
        for normed, weight, bias, out in parts:
            if bias is None:
                torch.mm(normed, weight, out=out)
            else:
                torch.addmm(bias, normed, weight, out=out)
        heads = kv.view(count, 1, rows, 2, self.heads, width // (2 * self.heads))
        return heads.unbind(), mean, rstd

    def gradients(
        self,
        dtype: torch.dtype,
        tokens: Sequence[Tensor],
        mean: Tensor,
        rstd: Tensor,
        grads: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """Gradients of the prompts from those of their keys and values; see `make`."""
        wide, first = mean.dtype, tokens[0]
        grad_y = torch.empty((len(tokens), *first.shape), dtype=dtype, device=first.device)
        for grad, weight, out in zip(grads, self.weights, grad_y.unbind(), strict=True):
            if grad is None:
                out.zero_()
            else:
                torch.mm(grad.view(first.shape[0], -1), weight, out=out)
        grad_y, gamma = grad_y.to(wide), _stacked(self.norm_weights, wide)
        if gamma is not None:
            grad_y = grad_y * gamma
        prompts = torch.stack(list(tokens)).to(wide)
        found = torch.ops.aten.native_layer_norm_backward(
            grad_y, prompts, prompts.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return found.to(first.dtype).unbind()


def _stacked(vectors: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """(blocks, 1, D), or None where the vectors are folded into others."""
    there = [v for v in vectors if v is not None]
    return torch.stack(there).unsqueeze(1).to(dtype) if there else None


class RowKV(NamedTuple):
    """Blocks of a row whose prompts' keys are made together.

    Attributes:
        weights: what makes them.
        blocks: their places in the row.
    """

    weights: KVWeights
    blocks: list[int]

    def tokens(self, sources: Sequence[Any]) -> list[Tensor]:
        """The prompts (p, D), which are these blocks' sources."""
        return [sources[i][0] for i in self.blocks]

    def given(self, sources: Sequence[Any], kv: Sequence[Tensor]) -> list[Any]:
        """Sources of all blocks, with keys in the place of prompts."""
        found = [*sources]
        for i, made in zip(self.blocks, kv, strict=True):
            found[i] = (made,)
        return found


class _PromptKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, dtype, *tokens):  # type: ignore[no-untyped-def]
        kv, mean, rstd = w.make(dtype, tokens)
        ctx.w, ctx.dtype, ctx.versions = w, dtype, versions_of(w.frozen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, rstd, *tokens)
        return kv

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        w, (mean, rstd, *tokens) = ctx.w, ctx.saved_tensors
        check_versions(w.frozen, ctx.versions)
        with exactly(mean):
            return None, None, *w.gradients(ctx.dtype, tokens, mean, rstd, grads)


def prompt_kv(
    weights: KVWeights, dtype: torch.dtype, tokens: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Keys and values (1, p, 2, H, d) in `dtype` for each block, as a function by itself.

    Args:
        weights: frozen; they get no gradients. In `dtype` where products read them.
        dtype: of the products; statistics are fp32 at least.
        tokens: the blocks' prompts, (p, D) each.

    Raises:
        RuntimeError: in backward, where a weight was changed in place since.
    """
    with exactly(tokens[0]):
        if not (torch.is_grad_enabled() and True in [t.requires_grad for t in tokens]):
            return weights.make(dtype, tokens)[0]
        found: Any = apply_directly(_PromptKeys, weights, dtype, *tokens)
    return found
