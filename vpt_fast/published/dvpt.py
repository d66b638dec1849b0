"""DVPT: prompts that a small network shifts by the image.

"Dynamic Visual Prompt Tuning for Parameter Efficient Transfer Learning" (arXiv 2309.06123): a
module makes the prompts of an image from the image. Here it is a bottleneck of two layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.methods import PromptMethod, register_method
from vpt_fast.methods.fields import check_count
from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.prompt_module import PromptModule

SOURCES = ("tokens", "feature")


@dataclass(frozen=True)
class DVPT(PromptMethod):
    """Prompts P + W2 gelu(W1 u) of each block, u a mean over the patches of the image.

    W2 starts at zero, so that training starts from VPT-Deep.

    Args:
        num_prompts: Number of prompts p of each block, at least 0.
        dropout: Probability of prompt dropout, an independent mask per image and block; in [0, 1).
        hidden_dim: Width r of the hidden layer, at least 1.
        source: "tokens": u is the mean of the block's own input; "feature": of the input of the
            first block, once for all blocks.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    hidden_dim: int = 8
    source: str = "tokens"

    paper: ClassVar[str] = "arXiv 2309.06123"
    equation: ClassVar[str] = "P_b = P + W2 gelu(W1 mean(x_b))"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("hidden_dim", self.hidden_dim, 1)
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {self.source!r}")


class ImageFeature(nn.Module):
    """Mean of an image's patches in the input of the first block, normalised.

    Args:
        method: Settings of the method.
        block: A block.
    """

    def __init__(self, method: DVPT, block: BlockInfo) -> None:
        super().__init__()
        self.prefix = block.num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D) of tokens (B, N, D)."""
        mean = x[:, self.prefix :].mean(1)
        return F.layer_norm(mean, mean.shape[-1:])


class _DynamicPrompts(PromptModule):
    def __init__(self, method: DVPT, block: BlockInfo) -> None:
        super().__init__()
        self.prefix = block.num_prefix_tokens
        self.tokens = block.new_parameter(method.num_prompts, block.width)
        self.down = nn.Linear(block.width, method.hidden_dim)
        self.up = nn.Linear(method.hidden_dim, block.width, bias=False)
        nn.init.zeros_(self.up.weight)

    def shifted(self, u: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of images with means u (B, D)."""
        return self.tokens + self.up(F.gelu(self.down(u))).unsqueeze(1)


class PromptsOfTokens(_DynamicPrompts):
    """Prompts of one block from its own input."""

    reads = "tokens"

    def forward(self, x: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of tokens (B, N, D)."""
        mean = x[:, self.prefix :].mean(1)
        return self.shifted(F.layer_norm(mean, mean.shape[-1:]))


class PromptsOfFeature(_DynamicPrompts):
    """Prompts of one block from the image's feature."""

    reads = "feature"

    def forward(self, feature: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of features (B, D)."""
        return self.shifted(feature)


@register_method("dvpt", DVPT, ImageFeature)
def new_dynamic_prompts(method: DVPT, block: BlockInfo) -> PromptModule:
    """Return the module of a block."""
    kind = PromptsOfTokens if method.source == "tokens" else PromptsOfFeature
    return kind(method, block)
