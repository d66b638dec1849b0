"""Which blocks can be fused: known parts, frozen, without dropout and hooks; and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from timm.layers import GELU, DropPath, GELUTanh, GluMlp, Mlp, QuickGELU, SwiGLU, Swish
from timm.models.vision_transformer import LayerScale
from torch import nn
from torch.nn.modules import module as nn_module

from vpt_fast.models.attention_inputs import computes_as_timms, projections_of, reads_plainly
from vpt_fast.models.fusion.weights_reading import BlockSettings
from vpt_fast.modules.experts import PromptExperts
from vpt_fast.modules.hooks import has_hooks, has_own_forward, with_descendants
from vpt_fast.modules.norms import is_layer_norm, is_rms_norm

_ACTIVATIONS: dict[type[nn.Module], str] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    Swish: "silu",
    nn.SiLU: "silu",
}

_MLPS: dict[type[nn.Module], tuple[str, ...]] = {
    Mlp: ("fc1", "fc2"),
    GluMlp: ("fc1", "fc2"),
    SwiGLU: ("fc1_g", "fc1_x", "fc2"),
}
"""Linears of the MLPs that can be fused."""

_LAYER_SCALES = (nn.Identity, LayerScale, NoneType)  # Swin's blocks have none

_DROPOUTS = (nn.Identity, nn.Dropout, DropPath)

# Parts of a fused block that are called as modules.
_CALLED = ("prompt", "adapter", "prompt_update")


def activation_kind(module: nn.Module) -> str | None:
    """Return the name of an activation of the fused MLP; None for any other."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))


def can_fuse(block: nn.Module) -> bool:
    """Return whether a block's parts can be fused: known, frozen, without dropout and hooks.

    Hooks on the block itself do not matter: they see its input and output.
    """
    # In dictionaries: this runs often, and nn.Module's attribute access is slow.
    parts: Any = block._modules
    if type(parts["mlp"]) not in _MLPS:
        return False
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    projections = [*projections_of(parts["attn"]), attn["proj"]]
    linears = projections + [mlp[name] for name in _MLPS[type(parts["mlp"])]]
    return (
        _are_norms(parts["norm1"], parts["norm2"], parts.get("prompt"))
        and activation_kind(mlp["act"]) is not None
        and all(map(reads_plainly, linears))
        and _gates_alike(mlp)
        and all(
            type(m) in (nn.Identity, NoneType) for m in (attn.get("q_norm"), attn.get("k_norm"))
        )
        and all(map(_is_nothing_or_layer_norm, (attn.get("norm"), mlp["norm"])))
        and attn.get("gate") is None
        and type(attn.get("softmax")) in (nn.Softmax, NoneType)
        and _has_timms_heads(parts["attn"])
        and all(type(parts.get(name)) in _LAYER_SCALES for name in ("ls1", "ls2"))
        and all(map(_drops_nothing, (attn["attn_drop"], attn["proj_drop"])))
        and all(map(_drops_nothing, (mlp["drop1"], mlp["drop2"])))
        and all(_drops_nothing(parts[name]) for name in ("drop_path1", "drop_path2"))
        and not nn_module._has_any_global_hook()
        and not any(p is not None and p.requires_grad for p in block._parameters.values())
        and _is_unchanged(parts)
    )


def _are_norms(norm1: Any, norm2: Any, prompt: Any) -> bool:
    """Return whether both are LayerNorms, or both RMSNorms without prompt experts.

    Experts share the row statistics of a LayerNorm with norm1.
    """
    if is_layer_norm(norm1):
        return is_layer_norm(norm2)
    return is_rms_norm(norm1) and is_rms_norm(norm2) and not isinstance(prompt, PromptExperts)


def _gates_alike(mlp: Mapping[str, Any]) -> bool:
    """Return whether both Linears of a gated MLP's hidden layer have a bias, or neither."""
    gate, value = mlp.get("fc1_g"), mlp.get("fc1_x")
    return gate is None or value is None or (gate.bias is None) == (value.bias is None)


def _is_nothing_or_layer_norm(norm: Any) -> bool:
    return type(norm) in (nn.Identity, NoneType) or is_layer_norm(norm)


def _has_timms_heads(attn: Any) -> bool:
    head_dim, rest = divmod(attn.proj.weight.shape[1], attn.num_heads)
    drops = attn.training and attn.attn_drop.p  # timm's fused attention reads attn.training
    return not rest and not drops and computes_as_timms(attn, head_dim)


def _is_unchanged(parts: Mapping[str, nn.Module | None]) -> bool:
    """Return whether no fused part is trained, and no module has a hook or its own forward."""
    for name, part in parts.items():
        for module in with_descendants(part):
            if has_hooks(module) or has_own_forward(module):
                return False
            if name not in _CALLED and any(
                p is not None and p.requires_grad for p in module._parameters.values()
            ):
                return False
    return True


def _drops_nothing(module: Any) -> bool:
    """Return whether a module is a dropout or timm's stochastic depth that does nothing."""
    dropped = getattr(module, "p", 0) or getattr(module, "drop_prob", 0)
    return type(module) in _DROPOUTS and not (module.training and dropped)


def block_settings(block: Any) -> BlockSettings:
    """Return the settings of a block that `can_fuse`."""
    attn, mlp = block._modules["attn"], block._modules["mlp"]
    gate = "" if type(mlp) is Mlp else "last" if getattr(mlp, "gate_last", False) else "first"
    return BlockSettings(
        attn.num_heads, attn.scale, block.norm1.eps, block.norm2.eps,
        activation_kind(mlp._modules["act"]) or "", getattr(attn, "rotate_half", False), gate,
        mlp_eps=getattr(mlp._modules["norm"], "eps", None),
        attn_eps=getattr(attn._modules.get("norm"), "eps", None),
        centred=is_layer_norm(block.norm1),
    )  # fmt: skip
