"""A frozen block, step by step: plain functions of tensors, forward and backward.

    x  = residual + scale * branch          the sum that the block before has left open
    x' = x + ls1 * proj(attention(norm1(x), prompts))
    result = MLP(norm2(x'))                 x' + ls2 * result is left to whoever reads it

Backward is written out, so that nothing is computed for weights that are frozen, gradients are
added where they are made, and the mode of `memory_modes` decides what is kept and what is computed
again. Visual Prompt Tuning (arXiv 2203.12119), section 3.2, without the prompts' dead rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.attention.operator import ATTENTION, ATTENTION_BACKWARD
from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.block.add_norm import Norm, SavedInput, enter, entry_gradients
from vpt_fast.ops.block.parts import BlockConfig, BlockWeights, SavedBlock
from vpt_fast.ops.block.sites import Sites
from vpt_fast.ops.rowwise.activation import ACTIVATION, ACTIVATION_BACKWARD
from vpt_fast.ops.rowwise.residual_norm import RESIDUAL_NORM, RESIDUAL_NORM_BACKWARD


class _Projection(NamedTuple):
    """A part of the qkv projection: weight (A or 2 A, D) and bias."""

    weight: Tensor
    bias: Tensor | None


class BlockSteps:
    """The steps of a block.

    Args:
        config: what is no tensor.
        weights: in `dtype` where matrix products read them.
        dtype: of the matrix products.
        sites: what computes the steps' operations.

    Attributes:
        norm1: the LayerNorm of tokens and prompts.
        head_dim: d, channels of a head.
        frozen: the weights that there are.
        transposed: views of the Linears' weights by name, those that somebody has needed.
    """

    __slots__ = (
        "_parts", "config", "dtype", "frozen", "head_dim", "norm1", "sites", "transposed",
        "weights",
    )  # fmt: skip

    def __init__(
        self,
        config: BlockConfig,
        weights: BlockWeights,
        dtype: torch.dtype,
        sites: Sites,
    ) -> None:
        self.config, self.weights, self.dtype, self.sites = config, weights, dtype, sites
        self.norm1 = Norm(weights.norm1_weight, weights.norm1_bias, config.eps1)
        self.head_dim = weights.qkv_weight.shape[0] // (3 * config.heads)
        self.frozen = [w for w in weights if w is not None]
        self.transposed: dict[str, Tensor] = {}
        self._parts: tuple[_Projection, _Projection] | None = None

    def with_sites(self, sites: Sites) -> BlockSteps:
        """The same steps, computed by others."""
        steps: BlockSteps = object.__new__(BlockSteps)
        steps._take(self, sites)
        return steps

    def _take(self, steps: BlockSteps, sites: Sites) -> None:
        """Become other steps computed by `sites`; nothing is worked out again."""
        self.config, self.weights, self.dtype = steps.config, steps.weights, steps.dtype
        self.norm1, self.head_dim, self.frozen = steps.norm1, steps.head_dim, steps.frozen
        self.sites, self._parts, self.transposed = sites, steps._parts, steps.transposed

    @property
    def _projections(self) -> tuple[_Projection, _Projection]:
        """The parts of the qkv projection that make queries, and keys and values."""
        if self._parts is None:
            weight, bias = self.weights.qkv_weight, self.weights.qkv_bias
            width = weight.shape[0] // 3
            self._parts = (
                _Projection(weight[:width], None if bias is None else bias[:width]),
                _Projection(weight[width:], None if bias is None else bias[width:]),
            )
        return self._parts

    # --- prompts -----------------------------------------------------------------------------

    def prompt_kv(
        self, sources: tuple[Any, ...], mixed: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Keys and values (B or 1, p, 2, H, d) of the prompts, and their norm1's statistics."""
        source = self.config.source
        if source is None:
            return None, ()
        if source.gives_kv:
            return sources[0], ()
        prompts, statistics = source.make(self.sites, sources, mixed, self.norm1, self.dtype)
        kv = F.linear(prompts, *self._projections[1])
        return kv.view(*prompts.shape[:2], 2, self.config.heads, self.head_dim), statistics

    def prompt_gradients(
        self,
        sources: tuple[Any, ...],
        mixed: tuple[Tensor, ...],
        statistics: tuple[Tensor, ...],
        grad_kv: Tensor,
    ) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
        """Gradients of the sources and of what the experts have mixed."""
        source = self.config.source
        if source is None or source.gives_kv:
            return [grad_kv], ()
        grad = torch.matmul(grad_kv.flatten(2), self._projections[1].weight)
        return source.gradients(self.sites, sources, mixed, self.norm1, statistics, grad)

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b of one of the block's Linears."""
        return F.linear(x, weight, bias)

    # --- attention ---------------------------------------------------------------------------

    def project(self, y: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of norm1(x) (B, N, D)."""
        w, count, heads, dim = self.weights, self.config.queries, self.config.heads, self.head_dim
        batch, rows, _ = y.shape
        if count is None:
            qkv = self.linear("qkv", y, w.qkv_weight, w.qkv_bias)
            return (qkv.view(batch, rows, 3, heads, dim),)
        queries, keys_and_values = self._projections
        q, kv = F.linear(y[:, :count], *queries), F.linear(y, *keys_and_values)
        return q.view(batch, count, heads, dim), kv.view(batch, rows, 2, heads, dim)

    def project_backward(self, grads: list[Tensor]) -> Tensor:
        """Gradient (B, N, D) of norm1(x)."""
        count = self.config.queries
        if count is None:
            return torch.matmul(grads[0].flatten(2), self.weights.qkv_weight)
        queries, keys_and_values = self._projections
        grad = torch.matmul(grads[1].flatten(2), keys_and_values.weight)
        grad[:, :count] += torch.matmul(grads[0].flatten(2), queries.weight)
        return grad

    def attend(self, tokens: tuple[Tensor, ...], kv: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output (B, M, A) and base-2 log-sum-exp (B, H, M) of attention."""
        scale, windows, w = self.config.scale, self.config.windows, self.weights
        if windows is None:
            prompts = [] if kv is None else [kv]
            return self.sites[ATTENTION, ""](list(tokens), prompts, scale)
        table = _there(w.position_bias)
        return windows.attend(self.sites, tokens[0], w.qkv_bias, table, kv, scale)

    def attention_gradients(
        self, full: SavedBlock, grad_out: Tensor, needs_tokens: bool, needs_prompts: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of the tokens and of the prompts' keys, those that are asked for."""
        kv, out, lse = full.kv, _there(full.out), _there(full.lse)
        scale, windows, w = self.config.scale, self.config.windows, self.weights
        if windows is None:
            backward = self.sites[ATTENTION_BACKWARD, f"{needs_tokens} {needs_prompts}"]
            tokens, prompts = backward(
                list(full.tokens), [] if kv is None else [kv], out, lse, grad_out, scale,
                needs_tokens, needs_prompts,
            )  # fmt: skip
            return tokens, prompts[0] if prompts else None
        return windows.gradients(
            self.sites, full.tokens[0], w.qkv_bias, _there(w.position_bias), kv, out, lse,
            grad_out, scale, needs_tokens, needs_prompts,
        )  # fmt: skip

    # --- the rest ----------------------------------------------------------------------------

    def first_rows(self, x: Tensor) -> Tensor:
        """Those rows of x (B, N, D) that are computed."""
        count = self.config.queries
        return x if count is None else x[:, :count].contiguous()

    def add_attention(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x', norm2(x') and the row statistics of x'."""
        w = self.weights
        branch = self.linear("proj", out, w.proj_weight, w.proj_bias)
        return self.sites[RESIDUAL_NORM, "norm2"](
            self.first_rows(x), branch, w.scale1, w.norm2_weight, w.norm2_bias, self.config.eps2,
            None, self.dtype,
        )  # fmt: skip

    def normalise_middle(self, middle: Tensor) -> Tensor:
        """norm2(x')."""
        w = self.weights
        return self.sites[RESIDUAL_NORM, "norm2 recomputed"](
            middle, None, None, w.norm2_weight, w.norm2_bias, self.config.eps2, None, self.dtype
        )[1]

    def expand(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """fc1's output, and the bias that is not in it: the activation's kernel adds it."""
        w = self.weights
        if uses_kernels(y):
            return self.linear("fc1", y, w.fc1_weight, None), w.fc1_bias
        return self.linear("fc1", y, w.fc1_weight, w.fc1_bias), None

    def contract(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """The MLP's output from its hidden layer."""
        active = self.sites[ACTIVATION, ""](hidden, bias, self.config.activation)
        return self.linear("fc2", active, self.weights.fc2_weight, self.weights.fc2_bias)

    def mlp_gradient(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Gradient of norm2(x') from that of the MLP's output."""
        w = self.weights
        grad = torch.matmul(grad, w.fc2_weight)
        bias = w.fc1_bias if uses_kernels(hidden) else None
        self.sites[ACTIVATION_BACKWARD, ""](hidden, bias, grad, self.config.activation)
        return torch.matmul(grad, w.fc1_weight)

    # --- whole -------------------------------------------------------------------------------

    def forward(
        self, residual: Tensor, branch: Tensor | None, sources: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, SavedBlock]:
        """x' and the MLP's output (B, M, D), and what backward may need."""
        y, entry = enter(self, residual, branch, sources)
        kv, prompt_statistics = self.prompt_kv(sources, entry.mixed)
        return self.forward_from(y, entry, kv, prompt_statistics)

    def forward_from(
        self,
        y: Tensor,
        entry: SavedInput,
        kv: Tensor | None = None,
        prompt_statistics: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor, SavedBlock]:
        """As `forward`, from norm1 of the input and from the prompts' keys."""
        tokens = self.project(y)
        out, lse = self.attend(tokens, kv)
        middle, y, statistics = self.add_attention(_there(entry.x), out)
        hidden, bias = self.expand(y)
        result = self.contract(hidden, bias)
        saved = SavedBlock(
            entry, kv, prompt_statistics, tokens, out, lse, middle, statistics, hidden
        )
        return middle, result, saved

    def save(self, saved: SavedBlock, needs_tokens: bool) -> SavedBlock:
        """What is kept of all that forward has made.

        Args:
            kept: from `forward`.
            needs_tokens: whether backward computes the gradient of the block's input.
        """
        (x, entry_statistics, mixed), kv, prompt_statistics, tokens, *others = saved
        out, lse, middle, statistics, hidden = others
        memory, alone = self.config.memory, not needs_tokens and len(mixed) == 0
        if memory in ("lean", "minimal"):
            tokens = ()
        elif alone:
            x = None
        if alone:
            entry_statistics = None
        if memory == "minimal":
            out = lse = middle = statistics = None
        if memory != "speed":
            hidden = None
        if kv is not None and not self.config.saves_kv(kv):
            kv, prompt_statistics = None, ()
        entry = SavedInput(x, entry_statistics, mixed)
        return SavedBlock(
            entry, kv, prompt_statistics, tokens, out, lse, middle, statistics, hidden
        )

    def recomputed(self, saved: SavedBlock, sources: tuple[Any, ...]) -> SavedBlock:
        """What was not kept, from what was."""
        entry, kv, prompt_statistics, tokens, out, lse, middle, statistics, hidden = saved
        if kv is None:
            kv, prompt_statistics = self.prompt_kv(sources, entry.mixed)
        if not tokens:
            tokens = self.project(
                self.sites[RESIDUAL_NORM, "norm1 recomputed"](
                    entry.x, None, None, *self.norm1, None, self.dtype
                )[1]
            )
        if out is None or lse is None:
            out, lse = self.attend(tokens, kv)
        y = None
        if middle is None:
            middle, y, statistics = self.add_attention(_there(entry.x), out)
        if hidden is None:
            hidden = self.expand(self.normalise_middle(middle) if y is None else y)[0]
        return SavedBlock(
            entry, kv, prompt_statistics, tokens, out, lse, middle, statistics, hidden
        )

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
        """Gradients of the residual, of the branch and of the prompts' tensors.

        Those of x' and of the MLP's output are contiguous, or None for 0.
        """
        full = self.recomputed(saved, sources)
        middle = self._middle_gradients(full, grad_middle, grad_result)
        grad_out = torch.matmul(middle[-1], self.weights.proj_weight)
        grad_x = middle[0]
        del middle
        # Prompts that are mixed of tokens lead to them, trained or not.
        needs_kv = needs_prompts or (needs_tokens and bool(full.entry.mixed))
        tokens, kv = self.attention_gradients(full, grad_out, needs_tokens, needs_kv)
        del grad_out
        prompt_grads: list[Tensor | None] = [None for _ in sources]
        mixed: tuple[Tensor, ...] = ()
        if kv is not None:
            prompt_grads, mixed = self.prompt_gradients(
                sources, full.entry.mixed, full.prompt_statistics, kv
            )
        if not (needs_tokens or mixed):
            return None, None, prompt_grads
        grad_y = self.project_backward(tokens) if needs_tokens else None
        residual, branch, mixing = entry_gradients(
            self, full.entry, sources, grad_x, grad_y, mixed, branch_dtype, needs_tokens
        )
        return residual, branch, [*mixing, *prompt_grads]

    def _middle_gradients(
        self, full: SavedBlock, grad_middle: Tensor | None, grad_result: Tensor | None
    ) -> list[Tensor]:
        """[gradient of x'], and what of it attention's branch gets where that is not the same."""
        w, middle = self.weights, _there(full.middle)
        apart = w.scale1 is not None or middle.dtype != self.dtype
        if grad_result is not None:
            grad = self.mlp_gradient(grad_result, _there(full.hidden))
            site = f"norm2 {apart} {grad_middle is None}"
            return self.sites[RESIDUAL_NORM_BACKWARD, site](
                middle, full.statistics, w.norm2_weight, w.scale1, grad, grad_middle,
                self.dtype if apart else None,
            )  # fmt: skip
        grad = _there(grad_middle).to(middle.dtype)
        branch = grad if w.scale1 is None else grad * w.scale1
        return [grad, branch.to(self.dtype)]


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("a tensor that backward needs was neither kept nor computed again")
    return tensor
