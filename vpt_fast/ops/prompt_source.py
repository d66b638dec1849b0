"""Where a block's normalised prompts come from, and how to make them again in backward.

A source makes norm1(P) from a few small tensors. What is made per image (dropped prompts, prompt
experts) is not kept for backward as long as it can be made again from what is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vpt_fast.kernels.expert_inputs import FeatureInputs
from vpt_fast.ops.block_entry import Norm
from vpt_fast.ops.prompt_expert import features_operator, features_operator_backward
from vpt_fast.ops.residual_norm import residual_norm, residual_norm_backward

Tensors = Sequence[Any]


class PromptSource(Protocol):
    """Makes normalised prompts from tensors, and the tensors' gradients from theirs.

    Attributes:
        keeps_keys: whether the prompts' keys and values are worth keeping: in mode "speed", and in
            every mode if the batch shares them. If not they are always made again.
    """

    @property
    def keeps_keys(self) -> bool:
        """See the class."""

    def make(
        self, tensors: Tensors, norm: Norm, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """norm1(P), (B or 1, p, D) in `dtype`, and statistics that `gradients` needs."""

    def gradients(
        self, tensors: Tensors, norm: Norm, statistics: tuple[Tensor, ...], grad: Tensor
    ) -> list[Tensor | None]:
        """Gradients of `tensors`; None for constants."""


@dataclass(frozen=True)
class StaticPrompts:
    """Prompts that do not depend on the image, tensors = (tokens (1, p, D), mask or None).

    Attributes:
        keep: probability that a mask (B, p, D) of booleans keeps an element; prompt dropout.
    """

    keep: float = 1.0

    @property
    def keeps_keys(self) -> bool:
        """See `PromptSource`."""
        return True

    def _prompts(self, tensors: Tensors) -> Tensor:
        tokens, mask = tensors
        return tokens if mask is None else drop(tokens, mask, self.keep)

    def make(
        self, tensors: Tensors, norm: Norm, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `PromptSource`."""
        _, out, statistics = residual_norm(self._prompts(tensors), None, None, *norm, None, dtype)
        return out, (statistics,)

    def gradients(
        self, tensors: Tensors, norm: Norm, statistics: tuple[Tensor, ...], grad: Tensor
    ) -> list[Tensor | None]:
        """See `PromptSource`."""
        tokens, mask = tensors
        result = residual_norm_backward(
            self._prompts(tensors), *statistics, norm.weight, None, grad, None, None
        )[0]
        if mask is not None:
            result = drop(result, mask, self.keep).sum(0, keepdim=True)
        return [result.to(tokens.dtype), None]


@dataclass(frozen=True)
class ExpertPrompts:
    """VAPT's prompts after the mix, tensors = the fields of `FeatureInputs`.

    Attributes:
        residual: whether the mix itself is added to what the feature projector makes of it.
    """

    residual: bool

    @property
    def keeps_keys(self) -> bool:
        """See `PromptSource`: the mix is kept already, in fp32, which takes as much."""
        return False

    def make(
        self, tensors: Tensors, norm: Norm, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `PromptSource`."""
        out, *statistics = features_operator(*tensors, self.residual, *norm, dtype)
        return out, tuple(statistics)

    def gradients(
        self, tensors: Tensors, norm: Norm, statistics: tuple[Tensor, ...], grad: Tensor
    ) -> list[Tensor | None]:
        """See `PromptSource`."""
        found = iter(
            features_operator_backward(
                *tensors, self.residual, norm.weight, *statistics, grad.contiguous()
            )
        )
        masks = ("channels", "hidden")
        return [
            None if tensor is None or name in masks else next(found)
            for name, tensor in zip(FeatureInputs._fields, tensors, strict=True)
        ]


def drop(values: Tensor, mask: Tensor, keep: float) -> Tensor:
    """Dropout of `values` by a mask of booleans that is True with probability `keep`."""
    return values * mask * (1.0 / keep)
