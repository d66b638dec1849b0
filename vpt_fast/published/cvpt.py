"""CVPT: tokens attend to prompts alone, in a softmax of its own.

"CVPT: Cross Visual Prompt Tuning" (ICCV 2025, arXiv 2408.14961).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vpt_fast.methods import PromptMethod, register_method
from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.prompt_module import PromptModule


@dataclass(frozen=True)
class CVPT(PromptMethod):
    """Prompts that the tokens of each block attend to before the block, by its own attention.

    x' = x + attention(norm1(x); K_p, V_p), then the block as it is. Attention's projections are
    the block's, frozen; where the block has LayerScale, it scales this branch, too.

    Args:
        num_prompts: Number of prompts p of each block, at least 0.
        dropout: Probability of prompt dropout, an independent mask per image and block; in [0, 1).

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    paper: ClassVar[str] = "ICCV 2025, arXiv 2408.14961"
    equation: ClassVar[str] = "x + proj(softmax(q K_p^T scale) V_p), then the block"


@register_method("cvpt", CVPT)
class CrossPrompts(PromptModule):
    """Prompts of one block.

    Args:
        method: Settings of the method.
        block: The block.
    """

    attends_apart = True

    def __init__(self, method: CVPT, block: BlockInfo) -> None:
        super().__init__()
        self.tokens = block.new_parameter(method.num_prompts, block.width)

    def forward(self) -> Tensor:
        """Return the prompts (p, D)."""
        return self.tokens
