"""VFPT: prompts of which a part is Fourier transformed.

"Visual Fourier Prompt Tuning" (NeurIPS 2024, arXiv 2411.01327).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vpt_fast.methods import PromptMethod, register_method
from vpt_fast.methods.fields import check_share
from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.prompt_module import PromptModule


@dataclass(frozen=True)
class VFPT(PromptMethod):
    """VPT-Deep whose first prompts are the real part of their two-dimensional Fourier transform.

    P' = [Re F_p P[:m] F_D; P[m:]], m = floor(fourier_share * p), after prompt dropout.

    Args:
        num_prompts: Number of prompts p of each block, at least 0.
        dropout: Probability of prompt dropout, an independent mask per image and block; in [0, 1).
        fourier_share: Share of the prompts that are transformed, in [0, 1]; the paper chooses among
            0, 0.3, 0.5, 0.7 and 1.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    fourier_share: float = 0.5

    paper: ClassVar[str] = "NeurIPS 2024, arXiv 2411.01327"
    equation: ClassVar[str] = "P = [C_p P C_D - S_p P S_D of the first m; the others]"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("fourier_share", self.fourier_share)

    @property
    def transformed(self) -> int:
        """Number m of prompts that are transformed."""
        return math.floor(self.fourier_share * self.num_prompts)


def _waves(count: int) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine matrix (count, count) of the Fourier transform, in fp64."""
    index = torch.arange(count, dtype=torch.float64, device="cpu")
    angles = torch.outer(index, index).remainder(max(count, 1)) * (2 * math.pi / max(count, 1))
    return angles.cos(), angles.sin()


class FourierMatrices(nn.Module):
    """Matrices of the transform, which all blocks of one width share: C_p, S_p; C_D, S_D.

    With F = C - i S, Re F_p P F_D = C_p P C_D - S_p P S_D: two real products with stacked matrices.

    Args:
        method: Settings of the method.
        block: A block.
    """

    over_prompts: Tensor  # (2 m, m), C_p above -S_p
    over_channels: Tensor  # (2 D, D), C_D above S_D

    def __init__(self, method: VFPT, block: BlockInfo) -> None:
        super().__init__()
        self.sizes = method.transformed, block.width
        self.init_non_persistent_buffers(block.like)

    def init_non_persistent_buffers(self, like: Tensor | None = None) -> None:
        """Set the matrices, which no state dict has; timm has this name for it.

        Args:
            like: Tensor with their device and dtype; None takes their own.
        """
        like = self.over_channels if like is None else like
        cosine, sine = _waves(self.sizes[0])
        matrices = {"over_prompts": torch.cat([cosine, -sine])}
        matrices["over_channels"] = torch.cat(_waves(self.sizes[1]))
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix.to(like.device, like.dtype), persistent=False)

    def transform(self, rows: Tensor) -> Tensor:
        """Return Re F_p P F_D of prompts P (..., m, D)."""
        count = rows.shape[-2]
        both = (self.over_prompts @ rows).unflatten(-2, (2, count)).transpose(-3, -2)
        return both.flatten(-2) @ self.over_channels


@register_method("vfpt", VFPT, FourierMatrices)
class FourierPrompts(PromptModule):
    """Prompts of one block.

    Args:
        method: Settings of the method.
        block: The block.
    """

    def __init__(self, method: VFPT, block: BlockInfo) -> None:
        super().__init__()
        self.transformed = method.transformed
        self.tokens = block.new_parameter(method.num_prompts, block.width)

    def forward(self) -> Tensor:
        """Return the prompts (p, D) before prompt dropout and transform."""
        return self.tokens

    def after_dropout(self, rows: Tensor) -> Tensor:
        """Return prompts (p, D) or (B, p, D) of which the first ones are transformed."""
        count, matrices = self.transformed, self.shared
        if not count:
            return rows
        first: Any = matrices.transform(rows[..., :count, :])
        return first if count == rows.shape[-2] else torch.cat([first, rows[..., count:, :]], -2)
