"""GateVPT: each block's influence on the prompts is gated.

"Improving Visual Prompt Tuning for Self-supervised Vision Transformers" (ICML 2023, arXiv
2306.05067): one gate for each block, without the paper's attention shaping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vpt_fast.methods import PromptMethod, register_method
from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.prompt_module import PromptModule


@dataclass(frozen=True)
class GateVPT(PromptMethod):
    """VPT-Shallow whose prompts enter the next block as g * output + (1 - g) * input of a block.

    g = sigmoid(gate), one gate for each block but the last; they start at 0, g = 1/2.

    Args:
        num_prompts: Number of prompts p, at least 0.
        dropout: Probability of prompt dropout, an independent mask per image; in [0, 1).

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    paper: ClassVar[str] = "ICML 2023, arXiv 2306.05067"
    equation: ClassVar[str] = "P_(i+1) = g_i P_i' + (1 - g_i) P_i"

    def prompted_blocks(self, depth: int) -> tuple[int, ...]:
        """Return which of `depth` blocks get prompts: block 0."""
        return (0,) if self.num_prompts else ()


class Gate(nn.Module):
    """Gate of one block.

    Args:
        method: Settings of the method.
        block: The block.
    """

    def __init__(self, method: GateVPT, block: BlockInfo) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, left: Tensor, entered: Tensor) -> Tensor:
        """Return the rows (B, p, D) that enter the next block."""
        return torch.lerp(entered, left, self.gate.sigmoid().to(left.dtype))


@register_method("gate-vpt", GateVPT, update=Gate)
class GatedPrompts(PromptModule):
    """Prompts of block 0.

    Args:
        method: Settings of the method.
        block: The block.
    """

    def __init__(self, method: GateVPT, block: BlockInfo) -> None:
        super().__init__()
        self.tokens = block.new_parameter(method.num_prompts, block.width)

    def forward(self) -> Tensor:
        """Return the prompts (p, D)."""
        return self.tokens
