"""The modules that own what is trained beside the head: prompt tokens and their projection."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.ops.block.prompt_source import drop


def init_bound(patch_size: tuple[int, int], width: int) -> float:
    """Bound v of the uniform initialisation U(-v, v), v = sqrt(6 / (3 * ph * pw + width)).

    Args:
        patch_size: height and width of a patch, in pixels.
        width: channels of the stored prompts.
    """
    return math.sqrt(6.0 / (3 * patch_size[0] * patch_size[1] + width))


def new_tokens(num_prompts: int, width: int, bound: float, like: Tensor) -> nn.Parameter:
    """Prompts (num_prompts, width) drawn from U(-bound, bound), with `like`'s device and dtype."""
    tokens = torch.empty(num_prompts, width, device=like.device, dtype=like.dtype)
    return nn.Parameter(nn.init.uniform_(tokens, -bound, bound))


def new_projection(project_dim: int, width: int, like: Tensor) -> nn.Linear:
    """Linear (project_dim -> width), weight kaiming-normal over fan-out, bias 0."""
    projection = nn.Linear(project_dim, width, device=like.device, dtype=like.dtype)
    nn.init.kaiming_normal_(projection.weight, a=0, mode="fan_out")
    nn.init.zeros_(projection.bias)
    return projection


class PromptTokens(nn.Module):
    """Static prompts of one block.

    Args:
        tokens: parameter (p, D) or (p, project_dim) of this block; None if the block uses the
            model's `prompt_tokens`.
        dropout: probability of prompt dropout, an independent mask per image.
        owner: the model whose `prompt_tokens` and `prompt_projection` are used; None if neither is.
    """

    def __init__(
        self, tokens: nn.Parameter | None, dropout: float, owner: nn.Module | None
    ) -> None:
        super().__init__()
        self.register_parameter("tokens", tokens)
        self.dropout = dropout
        # In a tuple the model is no submodule of its own prompts.
        self._owner = (owner,)

    def forward(self, x: Tensor) -> Tensor:
        """Prompts (1, p, D), shared by the batch; (B, p, D) under dropout in training.

        Args:
            x: the block's tokens (B, N, D), of which only B matters.
        """
        tokens, mask = self.draw(x.shape[0])
        return tokens if mask is None else drop(tokens, mask, 1.0 - self.dropout)

    @property
    def drops(self) -> bool:
        """Whether prompt dropout is at work."""
        return bool(self.dropout and self.training)

    def undropped(self) -> Tensor:
        """Prompts (p, D) before dropout."""
        owner: Any = self._owner[0]
        tokens: Any = self._parameters["tokens"]
        if owner is None:
            return tokens
        if tokens is None:
            tokens = owner.prompt_tokens
        projection = owner._modules.get("prompt_projection")
        return tokens if projection is None else projection(tokens)

    def draw(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Prompts (1, p, D) before dropout, and its mask (batch, p, D) of booleans or None."""
        tokens = self.undropped().unsqueeze(0)
        if not self.drops:
            return tokens, None
        ones = tokens.new_ones(batch, *tokens.shape[1:])
        mask = F.dropout(ones, self.dropout).bool()
        return tokens, mask

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
