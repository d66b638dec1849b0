"""Modules that own prompt tokens and their projection."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.ops.block.prompt_source import drop


def init_bound(patch_size: tuple[int, int], width: int) -> float:
    """Return the bound v of the initialisation U(-v, v), v = sqrt(6 / (3 * ph * pw + width)).

    "Visual Prompt Tuning" (arXiv 2203.12119), appendix A.

    Args:
        patch_size: Height and width of a patch in pixels.
        width: Number of channels of the stored prompts.
    """
    return math.sqrt(6.0 / (3 * patch_size[0] * patch_size[1] + width))


def new_tokens(num_prompts: int, width: int, bound: float, like: Tensor) -> nn.Parameter:
    """Draw prompts (num_prompts, width) from U(-bound, bound), with `like`'s device and dtype."""
    tokens = torch.empty(num_prompts, width, device=like.device, dtype=like.dtype)
    return nn.Parameter(nn.init.uniform_(tokens, -bound, bound))


def new_projection(project_dim: int, width: int, like: Tensor) -> nn.Linear:
    """Return a Linear (project_dim -> width), weight kaiming-normal over fan-out, bias 0."""
    projection = nn.Linear(project_dim, width, device=like.device, dtype=like.dtype)
    nn.init.kaiming_normal_(projection.weight, a=0, mode="fan_out")
    nn.init.zeros_(projection.bias)
    return projection


class PromptTokens(nn.Module):
    """Static prompts of one block.

    Args:
        tokens: Parameter (p, D) or (p, project_dim) of this block; None if the block uses the
            model's `prompt_tokens`.
        dropout: Probability of prompt dropout, an independent mask per image.
        owner: Model with the `prompt_tokens` or `prompt_projection` of this block; None if it uses
            neither.
    """

    def __init__(
        self, tokens: nn.Parameter | None, dropout: float, owner: nn.Module | None
    ) -> None:
        super().__init__()
        self.register_parameter("tokens", tokens)
        self.dropout = dropout
        # In a tuple, so that the model does not become a submodule of its own prompts.
        self._owner = (owner,)

    def forward(self, x: Tensor) -> Tensor:
        """Return prompts (1, p, D), shared by the batch; (B, p, D) under dropout in training.

        Args:
            x: Tokens (B, N, D) of the block; only B matters.
        """
        tokens, mask = self.draw(x.shape[0])
        return tokens if mask is None else drop(tokens, mask, 1.0 - self.dropout)

    @property
    def drops(self) -> bool:
        """Whether the module is in training mode and has a dropout."""
        return bool(self.dropout and self.training)

    def undropped(self) -> Tensor:
        """Return the prompts (p, D) before dropout."""
        owner: Any = self._owner[0]
        tokens: Any = self._parameters["tokens"]
        if owner is None:
            return tokens
        if tokens is None:
            tokens = owner.prompt_tokens
        projection = owner._modules.get("prompt_projection")
        return tokens if projection is None else projection(tokens)

    def draw(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Return the prompts (1, p, D) before dropout, and a boolean mask (batch, p, D) or None."""
        tokens = self.undropped().unsqueeze(0)
        if not self.drops:
            return tokens, None
        ones = tokens.new_ones(batch, *tokens.shape[1:])
        mask = F.dropout(ones, self.dropout).bool()
        return tokens, mask

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
