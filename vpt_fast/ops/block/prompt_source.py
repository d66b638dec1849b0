"""Where a block's prompts come from, and how to compute them again in backward.

A source makes norm1(P) from a few small tensors, or has the prompts' keys and values already. What
is made per image (dropped prompts, prompt experts) is not kept for backward as long as it can be
computed again from what is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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
Gradients = tuple[list[Tensor | None], tuple[Tensor, ...]]


class PromptSource(Protocol):
    """Makes normalised prompts from tensors, and the tensors' gradients from theirs.

    Attributes:
        saves_kv: whether the prompts' keys and values are worth keeping: in mode "speed", and in
            every mode if the batch shares them. If not they are always computed again.
        gives_kv: whether the one tensor is the prompts' keys and values themselves.
        eps: of the LayerNorm of tokens that prompts are mixed of; None where they are not.
    """

    @property
    def saves_kv(self) -> bool:
        """See the class."""

    @property
    def gives_kv(self) -> bool:
        """See the class."""

    @property
    def eps(self) -> float | None:
        """See the class."""

    def mix(
        self, sites: Sites, tensors: Tensors, x: Tensor, statistics: Tensor
    ) -> tuple[Tensor, ...]:
        """What is made of the block's input x (B, N, D) with its row statistics (3, B, N)."""

    def mix_gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        entry: SavedInput,
        norm: Norm,
        grad_mixed: tuple[Tensor, ...],
        grad_y: Tensor | None,
        grad_sum: Tensor | None,
        needs_tokens: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of x, norm1's and its own included, and those of the first tensors."""

    def make(
        self,
        sites: Sites,
        tensors: Tensors,
        mixed: tuple[Tensor, ...],
        norm: Norm,
        dtype: torch.dtype,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """norm1(P), (B or 1, p, D) in `dtype`, and statistics that `gradients` needs."""

    def gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        mixed: tuple[Tensor, ...],
        norm: Norm,
        statistics: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Gradients:
        """Gradients of the tensors that `mix_gradients` leaves, None for constants; of `mixed`."""


class _Unmixed:
    """A source that reads nothing of the block's input."""

    saves_kv, gives_kv, eps = True, False, None

    def mix(self, *_: Any) -> tuple[Tensor, ...]:
        """Never called."""
        raise NotImplementedError(f"{type(self).__name__} mixes no tokens")

    def mix_gradients(self, *_: Any) -> tuple[Tensor | None, list[Tensor]]:
        """Never called."""
        raise NotImplementedError(f"{type(self).__name__} mixes no tokens")


class GivenKeys(_Unmixed):
    """Keys and values that were made before, tensors = (kv (1, p, 2, H, d),)."""

    saves_kv, gives_kv = False, True  # they are the source itself, which is kept

    def make(self, *_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Never called."""
        raise NotImplementedError("the keys are there already")

    def gradients(self, *_: Any) -> Gradients:
        """Never called."""
        raise NotImplementedError("the keys' gradient is the tensor's")


GIVEN_KEYS = GivenKeys()


@dataclass(frozen=True)
class StaticPrompts(_Unmixed):
    """Prompts that do not depend on the image, tensors = (tokens (1, p, D), mask or None).

    Attributes:
        keep: probability that a mask (B, p, D) of booleans keeps an element; prompt dropout.
    """

    keep: float = 1.0

    def _prompts(self, tensors: Tensors) -> Tensor:
        tokens, mask = tensors
        return tokens if mask is None else drop(tokens, mask, self.keep)

    def make(
        self,
        sites: Sites,
        tensors: Tensors,
        mixed: tuple[Tensor, ...],
        norm: Norm,
        dtype: torch.dtype,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `PromptSource`."""
        normalise = sites[RESIDUAL_NORM, "prompts"]
        _, out, statistics = normalise(self._prompts(tensors), None, None, *norm, None, dtype)
        return out, (statistics,)

    def gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        mixed: tuple[Tensor, ...],
        norm: Norm,
        statistics: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Gradients:
        """See `PromptSource`."""
        tokens, mask = tensors
        result = sites[RESIDUAL_NORM_BACKWARD, "prompts"](
            self._prompts(tensors), *statistics, norm.weight, None, grad, None, None
        )[0]
        if mask is not None:
            result = drop(result, mask, self.keep).sum(0, keepdim=True)
        return [result.to(tokens.dtype), None], ()


class ExpertPrompts(NamedTuple):
    """VAPT's prompts; tensors = (projector's weight, convolution, *fields of `FeatureInputs` but
    the first two), or the matrix and its row sums in place of weight and convolution.

    What is mixed is (matrix (p, columns), mix_sum (p,), mixed (B, p, D)): the weight of every patch
    in every prompt, its sum over the patches, and the patches so mixed, all fp32 at least.

    Attributes:
        residual: whether the mix itself is added to what the feature projector makes of it.
        grid: height and width of the patch grid.
        eps: of the LayerNorm of the patches.
        folded: whether the first two tensors are the matrix and its row sums.
    """

    residual: bool
    grid: tuple[int, int]
    eps: float
    folded: bool = False

    @property
    def saves_kv(self) -> bool:
        """The mix is kept already, in fp32, which takes as much."""
        return False

    @property
    def gives_kv(self) -> bool:
        """See `PromptSource`."""
        return False

    def mix(
        self, sites: Sites, tensors: Tensors, x: Tensor, statistics: Tensor
    ) -> tuple[Tensor, ...]:
        """See `PromptSource`."""
        matrix, mix_sum = tensors[:2]
        if not self.folded:
            columns = folded_columns(matrix, self.grid)
            matrix, mix_sum = sites[FOLD, ""](*tensors[:2], self.grid, columns)
        patches = self.grid[0] * self.grid[1]
        return matrix, mix_sum, sites[MIX, ""](x, matrix, patches, statistics)

    def mix_gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        entry: SavedInput,
        norm: Norm,
        grad_mixed: tuple[Tensor, ...],
        grad_y: Tensor | None,
        grad_sum: Tensor | None,
        needs_tokens: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `PromptSource`."""
        matrix, (grad, grad_mix_sum), x = entry.mixed[0], grad_mixed, entry.x
        if grad_y is None:
            grad_y = torch.zeros_like(x)  # type: ignore[arg-type]
        *total, grad_matrix = sites[MIX_BACKWARD, f"{needs_tokens} {grad_sum is None}"](
            x, matrix, self.grid[0] * self.grid[1], norm.weight, entry.statistics, grad_y, grad,
            grad_sum, needs_tokens, True,
        )  # fmt: skip
        first = (grad_matrix, grad_mix_sum)
        if not self.folded:
            first = sites[FOLD_BACKWARD, ""](*tensors[:2], *first, self.grid)
        return total[0] if total else None, list(first)

    def make(
        self,
        sites: Sites,
        tensors: Tensors,
        mixed: tuple[Tensor, ...],
        norm: Norm,
        dtype: torch.dtype,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `PromptSource`."""
        inputs = FeatureInputs(mixed[2], mixed[1], *tensors[2:])
        out, *statistics = sites[FEATURES, ""](inputs, self.residual, *norm, dtype)
        return out, tuple(statistics)

    def gradients(
        self,
        sites: Sites,
        tensors: Tensors,
        mixed: tuple[Tensor, ...],
        norm: Norm,
        statistics: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Gradients:
        """See `PromptSource`."""
        inputs = FeatureInputs(mixed[2], mixed[1], *tensors[2:])
        grad_mixed, grad_mix_sum, *found = sites[FEATURES_BACKWARD, ""](
            inputs, self.residual, norm.weight, *statistics, grad
        )
        if inputs.projector_bias is None:
            found.insert(2, None)
        weight, shift, bias, down, up = found
        return [weight, shift, bias, None, down, up, None], (grad_mixed, grad_mix_sum)


def drop(values: Tensor, mask: Tensor, keep: float) -> Tensor:
    """Dropout of `values` by a mask of booleans that is True with probability `keep`."""
    return values * mask * (1.0 / keep)
