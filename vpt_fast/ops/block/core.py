"""A frozen block, step by step: plain functions of tensors, forward and backward.

    x  = residual + scale * branch                       the deferred sum of the block before
    x' = x + ls1 * proj(attention(norm1(x), K_p, V_p))
    result = MLP(norm2(x'))                              x' + ls2 * result is deferred in turn

Visual Prompt Tuning (arXiv 2203.12119), section 3.2, without the dead rows of the prompts. The
backward pass is written out: frozen weights get no gradient, gradients are added where they are
computed, and the memory mode decides what is saved and what is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.attention.operator import ATTENTION, ATTENTION_BACKWARD
from vpt_fast.ops.block import mlp, projections
from vpt_fast.ops.block.add_norm import Norm, SavedInput, enter, entry_gradients
from vpt_fast.ops.block.parts import BlockConfig, BlockWeights, SavedBlock
from vpt_fast.ops.block.projections import Projection
from vpt_fast.ops.block.prompt_source import appended, split_gradient
from vpt_fast.ops.block.sites import Sites
from vpt_fast.ops.rowwise.residual_norm import RESIDUAL_NORM, RESIDUAL_NORM_BACKWARD


class BlockSteps:
    """The steps of a block.

    Args:
        config: Settings of the block.
        weights: Weights; operands of matrix products are in `dtype`.
        dtype: Dtype of the matrix products.
        sites: Implementations of the operations, by call site.

    Attributes:
        norm1: LayerNorm of tokens and prompts.
        attention_norm: Norm before attention's projection, None without one.
        mlp_norm: Norm before fc2, None without one.
        head_dim: Channels d of a head.
        frozen: All weights that are not None.
        transposed: Views of weights of Linears by name, added when first needed.
    """

    __slots__ = (
        "_keys_and_values", "_queries", "attention_norm", "config", "dtype", "frozen", "head_dim",
        "mlp_norm", "norm1", "sites", "transposed", "weights",
    )  # fmt: skip

    def __init__(
        self, config: BlockConfig, weights: BlockWeights, dtype: torch.dtype, sites: Sites
    ) -> None:
        self.config, self.weights, self.dtype, self.sites = config, weights, dtype, sites
        self.norm1 = Norm(weights.norm1_weight, weights.norm1_bias, config.eps1, config.centred)
        w = weights
        self.attention_norm = _inner_norm(w.attnnorm_weight, w.attnnorm_bias, config.attn_eps)
        self.mlp_norm = _inner_norm(w.mlpnorm_weight, w.mlpnorm_bias, config.mlp_eps)
        self.head_dim = weights.proj_weight.shape[1] // config.heads
        self.frozen = [w for w in weights if w is not None]
        self.transposed: dict[str, Tensor] = {}
        self._queries: Projection | None = None
        self._keys_and_values: list[Projection] = []

    def with_sites(self, sites: Sites) -> BlockSteps:
        """Return the same steps with other implementations."""
        steps: BlockSteps = object.__new__(BlockSteps)
        steps._take(self, sites)
        return steps

    def _take(self, steps: BlockSteps, sites: Sites) -> None:
        """Copy the attributes of other steps, but for their sites."""
        self.config, self.weights, self.dtype = steps.config, steps.weights, steps.dtype
        self.norm1, self.head_dim, self.frozen = steps.norm1, steps.head_dim, steps.frozen
        self.attention_norm, self.mlp_norm = steps.attention_norm, steps.mlp_norm
        self.sites, self.transposed = sites, steps.transposed
        self._queries, self._keys_and_values = steps._queries, steps._keys_and_values

    @property
    def queries(self) -> Projection:
        """The projection to queries."""
        if self._queries is None:
            self._queries = projections.queries_of(self.weights)
        return self._queries

    @property
    def keys_and_values(self) -> list[Projection]:
        """The projections to keys and values."""
        if not self._keys_and_values:
            self._keys_and_values = projections.keys_and_values_of(self.weights)
        return self._keys_and_values

    # --- prompts: K_p, V_p = norm1(P) W_k + b_k, norm1(P) W_v + b_v ----------------------------

    def prompt_kv(
        self, sources: tuple[Any, ...], mixing: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return K_p, V_p (B or 1, p, 2, H, d), and the row statistics of norm1(P)."""
        source = self.config.source
        if source is None:
            return None, ()
        if source.gives_kv:
            return sources[0], ()
        prompts, statistics = source.normalised_prompts(
            self.sites, sources, mixing, self.norm1, self.dtype
        )
        kv = projections.prompt_kv(self, prompts)
        return appended(kv, sources[-1]) if source.appends_kv else kv, statistics

    def prompt_gradients(
        self,
        sources: tuple[Any, ...],
        mixing: tuple[Tensor, ...],
        statistics: tuple[Tensor, ...],
        grad_kv: Tensor,
    ) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
        """Return the gradients of the sources and of the token mixing."""
        source = self.config.source
        if source is None or source.gives_kv:
            return [grad_kv] if len(sources) == 1 else [grad_kv, None], ()
        own = []
        if source.appends_kv:
            batch = (sources[0] if sources[1] is None else sources[1]).shape[0]
            grad_kv, more = split_gradient(grad_kv, sources[-1], batch)
            own = [more]
        grad = projections.prompt_kv_backward(self, grad_kv)
        grads, mixing = source.gradients(self.sites, sources, mixing, self.norm1, statistics, grad)
        return [*grads, *own], mixing

    # --- attention: softmax(q [K_p; k]^T * scale) [V_p; v] ------------------------------------

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b by one of the block's Linears."""
        return F.linear(x, weight, bias)

    def attend(self, tokens: tuple[Tensor, ...], kv: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return output (B, M, A) and base-2 log-sum-exp (B, H, M) of attention."""
        scale, windows, w = self.config.scale, self.config.windows, self.weights
        if windows is None:
            prompts = [] if kv is None else [kv]
            return self.sites[ATTENTION, ""](list(tokens), prompts, scale)
        table = _required(w.position_bias)
        return windows.attend(self.sites, tokens[0], w.qkv_bias, table, kv, scale)

    def attention_gradients(
        self, full: SavedBlock, grad_out: Tensor, needs_tokens: bool, needs_prompts: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the gradients of q, k, v and of K_p, V_p, where needed."""
        kv, out, lse = full.kv, _required(full.out), _required(full.lse)
        scale, windows, w = self.config.scale, self.config.windows, self.weights
        if windows is None:
            backward = self.sites[ATTENTION_BACKWARD, f"{needs_tokens} {needs_prompts}"]
            tokens, prompts = backward(
                list(full.tokens), [] if kv is None else [kv], out, lse, grad_out, scale,
                needs_tokens, needs_prompts,
            )  # fmt: skip
            return tokens, prompts[0] if prompts else None
        return windows.gradients(
            self.sites, full.tokens[0], w.qkv_bias, _required(w.position_bias), kv, out, lse,
            grad_out, scale, needs_tokens, needs_prompts,
        )  # fmt: skip

    # --- x' = x + ls1 * proj(out), then norm2(x') ---------------------------------------------

    def first_rows(self, x: Tensor) -> Tensor:
        """Return those rows of x (B, N, D) that are computed."""
        count = self.config.queries
        return x if count is None else x[:, :count].contiguous()

    def add_attention(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x', norm2(x') and the row statistics of x'."""
        w = self.weights
        if self.attention_norm is not None:
            out = self.normed("attention", out, self.attention_norm)[1]
        branch = self.linear("proj", out, w.proj_weight, w.proj_bias)
        return self.sites[RESIDUAL_NORM, "norm2"](
            self.first_rows(x), branch, w.scale1, w.norm2_weight, w.norm2_bias, self.config.eps2,
            None, self.dtype, self.config.centred,
        )  # fmt: skip

    def normed(self, site: str, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, its norm and the row statistics, at one call site."""
        return self.sites[RESIDUAL_NORM, site](
            x, None, None, *norm[:3], None, self.dtype, norm.centred
        )

    def normalise_middle(self, middle: Tensor) -> Tensor:
        """Return norm2(x')."""
        w, config = self.weights, self.config
        norm2 = Norm(w.norm2_weight, w.norm2_bias, config.eps2, config.centred)
        return self.normed("norm2 recomputed", middle, norm2)[1]

    # --- whole passes ------------------------------------------------------------------------

    def forward(
        self, residual: Tensor, branch: Tensor | None, sources: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, SavedBlock]:
        """Return x' and the MLP's output (B, M, D), and all that backward may read."""
        y, entry = enter(self, residual, branch, sources)
        kv, kv_statistics = self.prompt_kv(sources, entry.mixing)
        return self.forward_entered(y, entry, kv, kv_statistics)

    def forward_entered(
        self,
        y: Tensor,
        entry: SavedInput,
        kv: Tensor | None = None,
        kv_statistics: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor, SavedBlock]:
        """Return what `forward` does, from y = norm1(x) and from K_p, V_p."""
        tokens = projections.project(self, y)
        out, lse = self.attend(tokens, kv)
        middle, y, statistics = self.add_attention(_required(entry.x), out)
        hidden = mlp.expand(self, y)
        result = mlp.contract(self, hidden)
        saved = SavedBlock(entry, kv, kv_statistics, tokens, out, lse, middle, statistics, hidden)
        return middle, result, saved

    def save(self, full: SavedBlock, needs_tokens: bool) -> SavedBlock:
        """Return those tensors of a forward pass that are saved for backward."""
        memory, entry = self.config.memory, full.entry
        dropped: dict[str, Any] = {}
        ends_here = not needs_tokens and len(entry.mixing) == 0
        if ends_here:
            entry = entry._replace(statistics=None)
        if memory in ("lean", "minimal"):
            dropped["tokens"] = ()
        elif ends_here:
            entry = entry._replace(x=None)
        if memory == "minimal":
            dropped |= {"out": None, "lse": None, "middle": None, "statistics": None}
        if memory != "speed":
            dropped["hidden"] = None
        if full.kv is not None and not self.config.saves_kv(full.kv):
            dropped |= {"kv": None, "kv_statistics": ()}
        return full._replace(entry=entry, **dropped)

    def recomputed(self, saved: SavedBlock, sources: tuple[Any, ...]) -> SavedBlock:
        """Return all tensors that backward reads, from those that are saved."""
        entry, kv, kv_statistics, tokens, out, lse, middle, statistics, hidden = saved
        if kv is None:
            kv, kv_statistics = self.prompt_kv(sources, entry.mixing)
        if not tokens:
            tokens = projections.project(
                self, self.normed("norm1 recomputed", _required(entry.x), self.norm1)[1]
            )
        if out is None or lse is None:
            out, lse = self.attend(tokens, kv)
        y = None
        if middle is None:
            middle, y, statistics = self.add_attention(_required(entry.x), out)
        if hidden is None:
            hidden = mlp.expand(self, self.normalise_middle(middle) if y is None else y)
        return SavedBlock(entry, kv, kv_statistics, tokens, out, lse, middle, statistics, hidden)

    def backward(
        self,
        saved: SavedBlock,
        sources: tuple[Any, ...],
        grad_middle: Tensor | None,
        grad_result: Tensor | None,
        branch_dtype: torch.dtype | None,
        needs_tokens: bool,
        needs_prompts: bool,
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Return the gradients of the residual, of the branch and of the sources.

        Args:
            saved: What `save` returned.
            sources: Tensors of `config.source`.
            grad_middle: Gradient (B, M, D) of x', contiguous, or None for 0.
            grad_result: Gradient (B, M, D) of the MLP's output likewise.
            branch_dtype: Dtype of the branch; None without one.
            needs_tokens: Whether the input's gradient is needed.
            needs_prompts: Whether the sources' gradients are needed.
        """
        full = self.recomputed(saved, sources)
        grad_x, grad_branch = self._middle_gradients(full, grad_middle, grad_result)
        grad_out = torch.matmul(grad_branch, self.weights.proj_weight)
        del grad_branch
        norm = self.attention_norm
        if norm is not None:
            out, _, statistics = self.normed("attention recomputed", _required(full.out), norm)
            grad_out = self.sites[RESIDUAL_NORM_BACKWARD, "attention"](
                out, statistics, norm.weight, None, grad_out, None, None
            )[0]
        # The tokens' gradient goes through prompts that are mixed of tokens, trained or not.
        needs_kv = needs_prompts or (needs_tokens and bool(full.entry.mixing))
        tokens, kv = self.attention_gradients(full, grad_out, needs_tokens, needs_kv)
        del grad_out
        source_grads: list[Tensor | None] = [None for _ in sources]
        grad_mixing: tuple[Tensor, ...] = ()
        if kv is not None:
            source_grads, grad_mixing = self.prompt_gradients(
                sources, full.entry.mixing, full.kv_statistics, kv
            )
        if not (needs_tokens or grad_mixing):
            return None, None, source_grads
        grad_y = projections.project_backward(self, tokens) if needs_tokens else None
        residual, branch, mixing_grads = entry_gradients(
            self, full.entry, sources, grad_x, grad_y, grad_mixing, branch_dtype, needs_tokens
        )
        return residual, branch, [*mixing_grads, *source_grads]

    def _middle_gradients(
        self, full: SavedBlock, grad_middle: Tensor | None, grad_result: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x' and of proj's output."""
        w, middle = self.weights, _required(full.middle)
        separate = w.scale1 is not None or middle.dtype != self.dtype
        if grad_result is not None:
            grad = mlp.gradient(self, grad_result, _required(full.hidden))
            site = f"norm2 {separate} {grad_middle is None}"
            grads = self.sites[RESIDUAL_NORM_BACKWARD, site](
                middle, full.statistics, w.norm2_weight, w.scale1, grad, grad_middle,
                self.dtype if separate else None, self.config.centred,
            )  # fmt: skip
            return grads[0], grads[-1]
        grad = _required(grad_middle).to(middle.dtype)
        branch = grad if w.scale1 is None else grad * w.scale1
        return grad, branch.to(self.dtype)


def _inner_norm(weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Norm | None:
    return None if eps is None else Norm(weight, bias, eps)


def _required(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("a tensor that backward reads was neither saved nor recomputed")
    return tensor
