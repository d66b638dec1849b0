"""Which of timm's blocks run as one function with a hand-written backward pass, and how.

`ops.block_entry` and `ops.block_body` compute; here a block's modules are read: what they are, and
whether somebody trains, hooks or drops out something that the fused functions pass by. Such a block
runs module by module, as `blocks` has it.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GELU, GELUTanh, Mlp, QuickGELU, Swish
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.experts import PromptExperts, norm_of
from vpt_fast.hooks import has_hooks
from vpt_fast.ops.block_body import BlockConfig, BlockWeights, run_block
from vpt_fast.ops.block_entry import OpenSum, enter_block
from vpt_fast.ops.prompt_source import ExpertPrompts, PromptSource, StaticPrompts
from vpt_fast.prompts import PromptTokens

_ACTIVATIONS: dict[type[nn.Module], str] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    Swish: "silu",
    nn.SiLU: "silu",
}


def activation_kind(module: nn.Module) -> str | None:
    """Name of an activation that the fused MLP has; None for any other."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))


def can_fuse(block: Block) -> bool:
    """Whether a block is of a kind that is fused, frozen, without dropout and without hooks.

    Hooks on the block itself, which see its input and output, are not looked at.
    """
    attn: Any = block.attn
    mlp: Any = block.mlp
    return (
        isinstance(block.norm1, nn.LayerNorm)
        and isinstance(block.norm2, nn.LayerNorm)
        and type(mlp) is Mlp
        and type(mlp.norm) is nn.Identity
        and activation_kind(mlp.act) is not None
        and all(type(m) is nn.Linear for m in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
        and all(type(m) is nn.Identity for m in (attn.q_norm, attn.k_norm, attn.norm))
        and getattr(attn, "gate", None) is None
        and all(type(m) in (nn.Identity, LayerScale) for m in (block.ls1, block.ls2))
        and not _drops(block, attn, mlp)
        and not any(t is not None and t.requires_grad for t in _weights(block))
        and not nn_module._has_any_global_hook()
        and not any(has_hooks(m) for m in block.modules() if m is not block)
    )


def _drops(block: Any, attn: Any, mlp: Any) -> bool:
    dropouts = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
    paths = (block.drop_path1, block.drop_path2)
    return any(m.training and m.p for m in dropouts) or any(
        m.training and getattr(m, "drop_prob", 0.0) for m in paths
    )


def _weights(block: Any) -> BlockWeights:
    attn, mlp = block.attn, block.mlp
    return BlockWeights(
        block.norm1.weight,
        block.norm1.bias,
        attn.qkv.weight,
        attn.qkv.bias,
        attn.proj.weight,
        attn.proj.bias,
        getattr(block.ls1, "gamma", None),
        block.norm2.weight,
        block.norm2.bias,
        mlp.fc1.weight,
        mlp.fc1.bias,
        mlp.fc2.weight,
        mlp.fc2.bias,
    )


def computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's, or its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _enter(
    block: Any, total: OpenSum, prompt: nn.Module | None
) -> tuple[Tensor, Tensor, PromptSource | None, tuple[Tensor | None, ...]]:
    """A block's input, norm1 of it, and how its prompts are made from which tensors."""
    dtype, norm = computing_dtype(total.residual), norm_of(block.norm1)
    if isinstance(prompt, PromptExperts):
        mix, mix_sum = prompt.mixing(total.residual.shape[1])
        x, y, mixed = enter_block(total, norm, mix, dtype)
        if mixed is None:
            raise RuntimeError("enter_block returned no mix")
        return x, y, ExpertPrompts(prompt.residual), tuple(prompt.features(mixed, mix_sum))
    x, y, _ = enter_block(total, norm, None, dtype)
    if isinstance(prompt, PromptTokens):
        return x, y, StaticPrompts(1.0 - prompt.dropout), prompt.draw(x.shape[0])
    return x, y, None, ()


def run(block: Any, total: OpenSum, prompt: nn.Module | None, memory: str) -> OpenSum:
    """A block from the sum that it reads to the sum that is its output.

    Args:
        block: one that `can_fuse`.
        total: its input.
        prompt: makes prompts that are keys and values only; or None.
        memory: one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.

    Returns:
        Its output (B, N, D), not yet summed.
    """
    x, y, source, tensors = _enter(block, total, prompt)
    attn = block.attn
    config = BlockConfig(
        heads=attn.num_heads,
        scale=attn.scale,
        eps1=block.norm1.eps,
        eps2=block.norm2.eps,
        activation=activation_kind(block.mlp.act) or "",
        memory=memory,
        source=source,
    )
    middle, result = run_block(config, x, y, _weights(block), tensors)
    return OpenSum(middle, result, getattr(block.ls2, "gamma", None))
