"""BPT: prompts of low rank, whose second factor starts as a whitening of the queries' keys.

"Attention to the Burstiness in Visual Prompt Tuning!" (ICCV 2025, arXiv 2506.22908).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vpt_fast.methods import PromptMethod, register_method
from vpt_fast.methods.fields import check_count
from vpt_fast.modules.block_info import BlockInfo, FrozenWeights
from vpt_fast.modules.prompt_module import PromptModule


@dataclass(frozen=True)
class BPT(PromptMethod):
    """Bilinear prompts P = A B of each block, A (p, c) and B (c, D).

    Args:
        num_prompts: Number of prompts p of each block, at least 0.
        dropout: Probability of prompt dropout, an independent mask per image and block; in [0, 1).
        rank: Rank c, at least 1 and at most the model's width; the paper has 50 to 75.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    rank: int = 50

    paper: ClassVar[str] = "ICCV 2025, arXiv 2506.22908"
    equation: ClassVar[str] = "P = A B"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank, 1)


@register_method("bpt", BPT)
class BilinearPrompts(PromptModule):
    """Prompts of one block.

    Args:
        method: Settings of the method.
        block: The block.

    Raises:
        ValueError: If the rank is larger than the width.
    """

    def __init__(self, method: BPT, block: BlockInfo) -> None:
        super().__init__()
        if method.rank > block.width:
            raise ValueError(f"rank={method.rank}, but the model's width is {block.width}")
        self.a = block.new_parameter(method.num_prompts, method.rank, width=block.width)
        self.b = nn.Parameter(torch.randn(method.rank, block.width) / method.rank**0.5)

    def forward(self) -> Tensor:
        """Return P = A B, (p, D)."""
        return self.a @ self.b

    def initialise(self, inputs: Tensor, weights: FrozenWeights) -> None:
        """Set B to the first rows of the whitening of W_q W_k^T X^T.

        With the covariance U diag(l) U^T of the columns of W_q W_k^T X^T, X = norm1(inputs), these
        are diag(l)^(-1/2) U^T of the largest l, scaled to unit variance of P's entries where A's
        are one.
        """
        x = weights.norm1(inputs).flatten(0, 1).double()
        heads = weights.k[0].double().T @ weights.q[0].double()  # (D, D), W_k W_q^T
        interaction = x @ heads
        values, vectors = torch.linalg.eigh(torch.cov(interaction.T))
        rank = self.b.shape[0]
        values = values.flip(0)[:rank].clamp_min(torch.finfo(torch.float32).eps * values.max())
        whitening = vectors.flip(1)[:, :rank] / values.sqrt()  # (D, c)
        scale = whitening.square().sum(1).mean().sqrt()
        self.b.data.copy_((whitening / scale).T)
