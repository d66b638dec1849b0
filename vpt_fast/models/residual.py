"""A block after its attention, module by module: both residual sums and the MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def add_branches(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Return a block's output: x' = x + ls1(attended), then x' + adapter(ls2(MLP(norm2(x')))).

    Visual Prompt Tuning (arXiv 2203.12119), equation 3: the part that is done row by row.

    Args:
        block: timm's Block or SwinTransformerBlock, plain, tuned or baked. LayerScale (`ls1`,
            `ls2`) and `adapter` are optional.
        x: Residual (B, M, D), in the rows that are computed.
        attended: Output (B, M, D) of the block's attention.
    """
    optional = block._modules.get
    ls1, ls2, adapter = optional("ls1"), optional("ls2"), optional("adapter")
    x = x + block.drop_path1(attended if ls1 is None else ls1(attended))
    del attended  # freed before the MLP, where nothing has saved it
    branch = block.mlp(block.norm2(x))
    branch = branch if ls2 is None else ls2(branch)
    result: Tensor = x + block.drop_path2(branch if adapter is None else adapter(branch))
    return result
