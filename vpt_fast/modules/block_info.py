"""A block as the modules of prompt methods see it: its sizes, and its frozen weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def init_bound(patch_size: tuple[int, int], width: int) -> float:
    """Return the bound v of the initialisation U(-v, v), v = sqrt(6 / (3 * ph * pw + width)).

    "Visual Prompt Tuning" (arXiv 2203.12119), appendix A.

    Args:
        patch_size: Height and width of a patch in pixels.
        width: Number of channels of the stored prompts.
    """
    return math.sqrt(6.0 / (3 * patch_size[0] * patch_size[1] + width))


class FrozenWeights(NamedTuple):
    """Frozen weights of a block, for `PromptModule.initialise`.

    Attributes:
        norm1: The block's first normalisation, a module.
        q, k, v: Weight (H * d, D) and bias (H * d,) or None of each projection.
        proj: Weight (D, H * d) and bias (D,) or None of the projection of attention's output.
    """

    norm1: nn.Module
    q: tuple[Tensor, Tensor | None]
    k: tuple[Tensor, Tensor | None]
    v: tuple[Tensor, Tensor | None]
    proj: tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class BlockInfo:
    """A block that gets prompts, for the constructor of a `PromptModule`.

    Attributes:
        index: Index of the block, through all stages of a model with stages.
        depth: Number of blocks of the model.
        width: Number D of channels.
        num_heads: Number H of heads.
        head_dim: Number d of channels of a head.
        grid: Height and width of the grid of patches among the block's tokens.
        num_prefix_tokens: Number of tokens before the patches.
        patch_size: Height and width of the model's patches in pixels.
        like: Tensor with the device and dtype of the weights.
    """

    index: int
    depth: int
    width: int
    num_heads: int
    head_dim: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    like: Tensor = field(repr=False)
    owner: Any = field(repr=False)  # model, or stage of blocks of one width
    model: Any = field(repr=False)

    @property
    def num_tokens(self) -> int:
        """Number N of the block's tokens at the model's image size."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    def new_parameter(self, *shape: int, width: int | None = None) -> nn.Parameter:
        """Draw a parameter from U(-v, v), as VPT's prompts; see `init_bound`.

        Args:
            shape: Shape of the parameter.
            width: Number of channels in v; by default the last of `shape`.
        """
        bound = init_bound(self.patch_size, width or shape[-1])
        values = torch.empty(shape, device=self.like.device, dtype=self.like.dtype)
        return nn.Parameter(nn.init.uniform_(values, -bound, bound))
