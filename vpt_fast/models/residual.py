"""A block after its attention, module by module: both residual sums and the MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def add_branches(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Return a block's output: x' = x + ls1(attended), then x' + adapter(ls2(MLP(norm2(x')))).

    Visual Prompt Tuning (arXiv 2203.12119), equation 3: the part that is done row by row.

    Args:
        block: timm's Block, EvaBlock or SwinTransformerBlock, plain, tuned or baked. LayerScale
            (modules `ls1`, `ls2`, or parameters `gamma_1`, `gamma_2`) and `adapter` are optional.
        x: Residual (B, M, D), in the rows that are computed.
        attended: Output (B, M, D) of the block's attention.
    """
    adapter = block._modules.get("adapter")
    x = add_attention(block, x, attended)
    del attended  # freed before the MLP, where nothing has saved it
    branch = _scaled(block, 2, block.mlp(block.norm2(x)))
    result: Tensor = x + block.drop_path2(branch if adapter is None else adapter(branch))
    return result


def add_attention(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Return x' = x + ls1(attended); see `add_branches`."""
    result: Tensor = x + block.drop_path1(_scaled(block, 1, attended))
    return result


def _scaled(block: Any, number: int, branch: Tensor) -> Tensor:
    """Return a branch after its LayerScale, a module or a parameter, if the block has one."""
    module = block._modules.get(f"ls{number}")
    if module is not None:
        scaled: Tensor = module(branch)
        return scaled
    gamma = block._parameters.get(f"gamma_{number}")
    return branch if gamma is None else gamma * branch
