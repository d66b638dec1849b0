"""Which of timm's blocks run as one function with a hand-written backward pass, and how.

`ops.block_entry` and `ops.block_body` compute; here a block's modules are read: what they are, and
whether somebody trains, hooks or drops out something that the fused functions pass by. Such a block
runs module by module, as `blocks` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from timm.layers import GELU, GELUTanh, Mlp, QuickGELU, Swish
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.experts import PromptExperts
from vpt_fast.fold import folded_parts
from vpt_fast.hooks import has_hooks, has_own_forward
from vpt_fast.norms import is_layer_norm, norm_of
from vpt_fast.ops.backend import computing_dtype
from vpt_fast.ops.block_body import BlockConfig, BlockWeights, run_block
from vpt_fast.ops.block_entry import OpenSum, enter_block
from vpt_fast.ops.prompt_source import ExpertPrompts, PromptSource, StaticPrompts
from vpt_fast.ops.window_attention_rows import Windows
from vpt_fast.prompts import PromptTokens

_ACTIVATIONS: dict[type[nn.Module], str] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    Swish: "silu",
    nn.SiLU: "silu",
}

_LAYER_SCALES = (nn.Identity, LayerScale, NoneType)  # Swin's blocks have none

# Parts of a block that are called as modules, before and after what is fused.
_BESIDE = ("prompt", "adapter")


def activation_kind(module: nn.Module) -> str | None:
    """Name of an activation that the fused MLP has; None for any other."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))


def can_fuse(block: nn.Module) -> bool:
    """Whether a block is of a kind that is fused, frozen, without dropout and without hooks.

    Hooks on the block itself, which see its input and output, are not looked at.
    """
    # Modules are looked up in their dictionaries: this runs for every block of every step, and
    # nn.Module's attribute access is slow.
    parts: Any = block._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    return (
        type(parts["mlp"]) is Mlp
        and is_layer_norm(parts["norm1"])
        and is_layer_norm(parts["norm2"])
        and activation_kind(mlp["act"]) is not None
        and all(type(m) is nn.Linear for m in (attn["qkv"], attn["proj"], mlp["fc1"], mlp["fc2"]))
        and all(
            type(m) in (nn.Identity, NoneType)
            for m in (attn.get("q_norm"), attn.get("k_norm"), attn.get("norm"), mlp["norm"])
        )
        and attn.get("gate") is None
        and all(type(parts.get(name)) in _LAYER_SCALES for name in ("ls1", "ls2"))
        and not any(_drops(m) for m in (attn["attn_drop"], attn["proj_drop"]))
        and not any(_drops(m) for m in (mlp["drop1"], mlp["drop2"]))
        and not any(_drops(parts[name]) for name in ("drop_path1", "drop_path2"))
        and not nn_module._has_any_global_hook()
        and _is_left_alone(parts)
    )


def _is_left_alone(parts: Mapping[str, nn.Module | None]) -> bool:
    """Whether nothing that is fused is trained, and no hook or forward was put on any module."""
    for name, part in parts.items():
        for module in _modules(part):
            if has_hooks(module) or has_own_forward(module):
                return False
            if name not in _BESIDE and any(
                p is not None and p.requires_grad for p in module._parameters.values()
            ):
                return False
    return True


def _modules(module: nn.Module | None) -> Iterator[nn.Module]:
    """The module and all below it."""
    if module is not None:
        yield module
        for child in module._modules.values():
            yield from _modules(child)


def _drops(module: Any) -> bool:
    """Whether a dropout, or timm's stochastic depth, is at work."""
    return module.training and bool(getattr(module, "p", 0) or getattr(module, "drop_prob", 0))


def block_weights(block: Any) -> BlockWeights:
    """The weights of a block that `can_fuse`; None for those that are folded into others."""
    parts, passed = block._modules, folded_parts(block)
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    norm1, norm2 = (norm_of(parts[name], name in passed) for name in ("norm1", "norm2"))
    linears = (attn["qkv"], attn["proj"], mlp["fc1"], mlp["fc2"])
    qkv, proj, fc1, fc2 = (linear._parameters for linear in linears)
    return BlockWeights(
        norm1.weight,
        norm1.bias,
        qkv["weight"],
        qkv["bias"],
        proj["weight"],
        proj["bias"],
        layer_scale(block, "ls1", passed),
        norm2.weight,
        norm2.bias,
        fc1["weight"],
        fc1["bias"],
        fc2["weight"],
        fc2["bias"],
        parts["attn"]._parameters.get("relative_position_bias_table"),
    )


def layer_scale(block: Any, name: str, folded: frozenset[str]) -> Tensor | None:
    """Factors (D,) of a block's `ls1` or `ls2`; None for 1, and where they are `folded_parts`."""
    scale = None if name in folded else block._modules.get(name)
    return None if scale is None else scale._parameters.get("gamma")


def block_config(
    block: Any,
    memory: str = "speed",
    source: PromptSource | None = None,
    windows: Windows | None = None,
) -> BlockConfig:
    """What of a block that `can_fuse` is no tensor; for the other arguments see `run`."""
    return BlockConfig(
        heads=block.attn.num_heads,
        scale=block.attn.scale,
        eps1=block.norm1.eps,
        eps2=block.norm2.eps,
        activation=activation_kind(block.mlp.act) or "",
        memory=memory,
        source=source,
        windows=windows,
    )


def _enter(
    block: Any, total: OpenSum, prompt: nn.Module | None
) -> tuple[Tensor, Tensor, PromptSource | None, tuple[Tensor | None, ...]]:
    """A block's input, norm1 of it, and how its prompts are made from which tensors."""
    dtype = computing_dtype(total.residual)
    norm = norm_of(block.norm1, "norm1" in folded_parts(block))
    if isinstance(prompt, PromptExperts):
        x, y, inputs = prompt.enter(total, norm, dtype)
        return x, y, ExpertPrompts(prompt.residual), tuple(inputs)
    x, y, _ = enter_block(total, norm, None, dtype)
    if isinstance(prompt, PromptTokens):
        return x, y, StaticPrompts(1.0 - prompt.dropout), prompt.draw(x.shape[0])
    return x, y, None, ()


def run(
    block: Any,
    total: OpenSum,
    prompt: nn.Module | None,
    memory: str,
    windows: Windows | None = None,
) -> OpenSum:
    """A block from the sum that it reads to the sum that is its output.

    Args:
        block: one that `can_fuse`.
        total: its input.
        prompt: makes prompts that are keys and values only; or None.
        memory: one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
        windows: of its attention; None if that is over all rows.

    Returns:
        Its output (B, N, D), not yet summed.
    """
    x, y, source, tensors = _enter(block, total, prompt)
    config = block_config(block, memory, source, windows)
    middle, result = run_block(config, x, y, block_weights(block), tensors)
    return OpenSum(middle, result, layer_scale(block, "ls2", folded_parts(block)))
