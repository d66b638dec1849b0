"""Sources of a block's prompts: P, or K_p and V_p, from what is trained, and the gradients.

A source computes norm1(P) from a few small tensors, or holds K_p and V_p already. Prompts that
differ by image (prompt dropout, prompt experts) are recomputed in backward from what is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.ops.block.add_norm import Norm, SavedInput
from vpt_fast.ops.block.sites import Sites
from vpt_fast.ops.experts.operator import (
    FEATURES,
    FEATURES_BACKWARD,
    FOLD,
    FOLD_BACKWARD,
    folded_columns,
)
from vpt_fast.ops.experts.token_mixing import MIX, MIX_BACKWARD
from vpt_fast.ops.rowwise.residual_norm import RESIDUAL_NORM, RESIDUAL_NORM_BACKWARD

Tensors = Sequence[Any]
Mixing = tuple[Tensor, ...]
"""Token mixing, if any: M (p, columns), its row sums (p,), and M LayerNorm(x) (B, p, D)."""

Gradients = tuple[list[Tensor | None], Mixing]


class PromptSource:
    """Base of the sources: norm1(P) from tensors, and the tensors' gradients from its gradient.

    Attributes:
        saves_kv: Whether K_p and V_p are worth saving: in mode "speed", and in every mode if the
            batch shares them. Otherwise they are always recomputed.
        gives_kv: Whether the first tensor is K_p, V_p itself.
        appends_kv: Whether the last tensor is more keys and values (B or 1, n, 2, H, d), which
            follow those of the prompts.
    """

    __slots__ = ()
    saves_kv = True
    gives_kv = False
    appends_kv = False

    @property
    def eps(self) -> float | None:
        """Epsilon of the experts' LayerNorm; None without token mixing."""
        return None

    def mix(self, sites: Sites, tensors: Tensors, x: Tensor, statistics: Tensor) -> Mixing:
        """Return the token mixing of a block's input.

        Args:
            sites: Call sites of the block.
            tensors: Tensors of the source.
            x: Input (B, N, D).
            statistics: Its row statistics (3, B, N).
        """
        raise NotImplementedError(f"{type(self).__name__} mixes no tokens")

    def mix_gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        entry: SavedInput,
        norm: Norm,
        grad_mixing: Mixing,
        grad_y: Tensor | None,
        grad_sum: Tensor | None,
        needs_tokens: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradient of the block's input, and those of the tensors that `mix` read.

        Args:
            sites: Call sites of the block.
            tensors: Tensors of the source.
            entry: What `enter` saved.
            norm: LayerNorm norm1 of the block.
            grad_mixing: Gradients that `gradients` returned.
            grad_y: Gradient of norm1(x), (B, N, D), or None for 0.
            grad_sum: Gradient (B, N, D) that reaches x past the norms, or None for 0.
            needs_tokens: Whether the input's gradient is needed.
        """
        raise NotImplementedError(f"{type(self).__name__} mixes no tokens")

    def normalised_prompts(
        self, sites: Sites, tensors: Tensors, mixing: Mixing, norm: Norm, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return norm1(P), (B or 1, p, D) in `dtype`, and statistics that `gradients` reads."""
        raise NotImplementedError(f"{type(self).__name__} has keys and values, and no prompts")

    def gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        mixing: Mixing,
        norm: Norm,
        statistics: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Gradients:
        """Return the gradients of the tensors that `mix` did not read, and those of the mixing.

        Args:
            sites: Call sites of the block.
            tensors: Tensors of the source.
            mixing: What `mix` returned.
            norm: LayerNorm norm1 of the block.
            statistics: What `normalised_prompts` returned.
            grad: Gradient of norm1(P), (B or 1, p, D).
        """
        raise NotImplementedError(f"{type(self).__name__} has keys and values, and no prompts")


class GivenKV(PromptSource):
    """K_p and V_p that are computed already; the first tensor is kv (B or 1, p, 2, H, d)."""

    saves_kv, gives_kv = False, True  # the tensor is saved as the source's own


GIVEN_KV = GivenKV()


@dataclass(frozen=True)
class StaticPrompts(PromptSource):
    """Prompts that are computed already; tensors = (tokens (B or 1, p, D), mask or None).

    Attributes:
        keep: Probability with which a mask (B, p, D) of booleans is True; prompt dropout.
        appends_kv: As of every source.
    """

    keep: float = 1.0
    appends_kv: bool = False

    def _prompts(self, tensors: Tensors) -> Tensor:
        tokens, mask = tensors[:2]
        return tokens if mask is None else drop(tokens, mask, self.keep)

    def normalised_prompts(
        self, sites: Sites, tensors: Tensors, mixing: Mixing, norm: Norm, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return norm1(P) and its row statistics; see `PromptSource`."""
        normalise = sites[RESIDUAL_NORM, "prompts"]
        *affine, centred = norm
        prompts = self._prompts(tensors)
        _, out, statistics = normalise(prompts, None, None, *affine, None, dtype, centred)
        return out, (statistics,)

    def gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        mixing: Mixing,
        norm: Norm,
        statistics: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Gradients:
        """Return the gradient of the tokens; see `PromptSource`."""
        tokens, mask = tensors[:2]
        result = sites[RESIDUAL_NORM_BACKWARD, "prompts"](
            self._prompts(tensors), *statistics, norm.weight, None, grad, None, None, norm.centred
        )[0]
        if mask is not None:
            result = drop(result, mask, self.keep).sum(0, keepdim=True)
        return [result.to(tokens.dtype), None], ()


class _ExpertSettings(NamedTuple):
    residual: bool
    grid: tuple[int, int]
    eps: float
    folded: bool = False


class ExpertPrompts(_ExpertSettings, PromptSource):
    """VAPT's prompts, P = g + W2 relu(W1 g), where g is the affine token mixing M LayerNorm(x).

    Tensors = (token-wise projector's weight, convolution, *fields of `FeatureInputs` but the first
    two); with `folded`, M and its row sums in place of weight and convolution.

    Attributes:
        residual: Whether g is added, as in the published program; not in the paper's equations.
        grid: Height and width of the patch grid.
        eps: Epsilon of the experts' LayerNorm.
        folded: Whether the first two tensors are M and its row sums.
    """

    __slots__ = ()
    saves_kv = False  # the token mixing is saved, which is as large

    def mix(self, sites: Sites, tensors: Tensors, x: Tensor, statistics: Tensor) -> Mixing:
        """Return M, its row sums and M LayerNorm(x); see `PromptSource`."""
        weight, mixing_sum = tensors[:2]
        if not self.folded:
            columns = folded_columns(weight, self.grid)
            weight, mixing_sum = sites[FOLD, ""](weight, mixing_sum, self.grid, columns)
        patches = self.grid[0] * self.grid[1]
        return weight, mixing_sum, sites[MIX, ""](x, weight, patches, statistics)

    def mix_gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        entry: SavedInput,
        norm: Norm,
        grad_mixing: Mixing,
        grad_y: Tensor | None,
        grad_sum: Tensor | None,
        needs_tokens: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of x and of the first two tensors; see `PromptSource`."""
        weight, (grad, grad_mixing_sum), x = entry.mixing[0], grad_mixing, entry.x
        if grad_y is None:
            grad_y = torch.zeros_like(x)  # type: ignore[arg-type]
        *grad_x, grad_weight = sites[MIX_BACKWARD, f"{needs_tokens} {grad_sum is None}"](
            x, weight, self.grid[0] * self.grid[1], norm.weight, entry.statistics, grad_y, grad,
            grad_sum, needs_tokens, True,
        )  # fmt: skip
        grads = (grad_weight, grad_mixing_sum)
        if not self.folded:
            grads = sites[FOLD_BACKWARD, ""](*tensors[:2], *grads, self.grid)
        return grad_x[0] if grad_x else None, list(grads)

    def normalised_prompts(
        self, sites: Sites, tensors: Tensors, mixing: Mixing, norm: Norm, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return norm1(P) and its row statistics; see `PromptSource`."""
        inputs = self._inputs(tensors, mixing)
        out, *statistics = sites[FEATURES, ""](inputs, self.residual, *norm[:3], dtype)
        return out, tuple(statistics)

    def gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        mixing: Mixing,
        norm: Norm,
        statistics: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Gradients:
        """Return the gradients of the experts' tensors and of the mixing; see `PromptSource`."""
        inputs = self._inputs(tensors, mixing)
        grad_mixed, grad_mixing_sum, *grads = sites[FEATURES_BACKWARD, ""](
            inputs, self.residual, norm.weight, *statistics, grad
        )
        if inputs.projector_bias is None:
            grads.insert(2, None)
        weight, norm_bias, bias, down, up = grads
        return [weight, norm_bias, bias, None, down, up, None], (grad_mixed, grad_mixing_sum)

    def _inputs(self, tensors: Tensors, mixing: Mixing) -> FeatureInputs:
        _, mixing_sum, mixed = mixing
        return FeatureInputs(mixed, mixing_sum, *tensors[2:])


def appended(kv: Tensor, more: Tensor) -> Tensor:
    """Return keys and values (B or 1, p, 2, H, d), and after them more, (B or 1, n, 2, H, d)."""
    if kv.shape[0] != more.shape[0]:
        batch = more.shape[0] if kv.shape[0] == 1 else kv.shape[0]
        kv, more = (t.expand(batch, *[-1] * (t.ndim - 1)) for t in (kv, more))
    return torch.cat([kv, more], 1)


def split_gradient(grad: Tensor, more: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of the arguments of `appended` from that of its result.

    Args:
        grad: Gradient (B or 1, p + n, 2, H, d).
        more: Its second argument.
        batch: Number of images of its first argument, B or 1.
    """
    count = grad.shape[1] - more.shape[1]
    first, second = grad[:, :count], grad[:, count:]
    if batch != grad.shape[0]:
        first = first.sum(0, keepdim=True)
    if more.shape[0] != grad.shape[0]:
        second = second.sum(0, keepdim=True)
    return first.contiguous(), second.contiguous()


def drop(values: Tensor, mask: Tensor, keep: float) -> Tensor:
    """Return the dropout of `values` by a mask of booleans, True with probability `keep`."""
    return values * mask * (1.0 / keep)
