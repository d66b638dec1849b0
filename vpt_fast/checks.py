"""What `prompt_tune` can honour: every part of a model is looked at before anything is changed."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from timm import layers
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block, LayerScale
from torch import nn

from vpt_fast.baselines import AdapterTuning, BiasTuning, MLPHead, PartialTuning
from vpt_fast.hooks import has_hooks
from vpt_fast.methods import VAPT, Method
from vpt_fast.models import TUNED_CLASS, check_pooling, is_tuned

# Normalisations that treat every row by itself, so that dead rows may be left out.
_ROW_NORMS = tuple(
    getattr(layers, name)
    for name in (
        "LayerNorm",
        "LayerNormFp32",
        "RmsNorm",
        "RmsNormFp32",
        "SimpleNorm",
        "SimpleNormFp32",
    )
    if hasattr(layers, name)
) + (nn.LayerNorm, nn.Identity, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))

_BLOCK_PARTS: dict[str, tuple[type, ...] | None] = {
    "norm1": _ROW_NORMS,
    "attn": (Attention,),
    "ls1": (nn.Identity, LayerScale),
    "drop_path1": (nn.Identity, DropPath),
    "norm2": _ROW_NORMS,
    "mlp": None,  # any module: it is called as it is
    "ls2": (nn.Identity, LayerScale),
    "drop_path2": (nn.Identity, DropPath),
}
_ATTENTION_PARTS: dict[str, tuple[type, ...] | None] = {
    "qkv": (nn.Linear,),
    "q_norm": _ROW_NORMS,
    "k_norm": _ROW_NORMS,
    "attn_drop": (nn.Dropout,),
    "norm": (nn.Identity,),
    "proj": (nn.Linear,),
    "proj_drop": (nn.Dropout,),
}
# Modules that some rows pass beside; a hook on them would miss those rows.
_BYPASSED = ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm")


def _refuse(where: str, value: Any, why: str) -> NoReturn:
    raise ValueError(f"cannot tune this model: {where} is {value}; {why}")


def _name(value: Any) -> str:
    return type(value).__name__


def check_model(model: Any, method: Method) -> None:
    """Raise if `model` cannot be tuned with `method`; change nothing.

    Raises:
        TypeError: not a timm VisionTransformer.
        ValueError: a block, an attribute or the method does not fit, or it is tuned already.
    """
    if is_tuned(model):
        raise ValueError(
            f"this {_name(model)} is tuned already, with {model.tune_record.method}; call "
            "remove_prompts(model) first"
        )
    if type(model) not in TUNED_CLASS:
        raise TypeError(_not_a_vit(model))
    if "forward" in vars(model) or "forward_features" in vars(model):
        _refuse("forward", "replaced on the instance", "restore the class's own")
    if type(model.blocks) is not nn.Sequential or not len(model.blocks):
        _refuse("blocks", _name(model.blocks), "a Sequential of at least one Block is needed")
    for index, block in enumerate(model.blocks):
        _check_block(block, f"blocks.{index}")
    if type(model.norm) not in _ROW_NORMS:
        _refuse("norm", _name(model.norm), "a normalisation of each token by itself is needed")
    method.prompted_blocks(len(model.blocks))
    if isinstance(method, VAPT) and method.num_prompts:
        grid = model.patch_embed.grid_size
        if min(grid) < method.kernel_size:
            raise ValueError(
                f"kernel_size={method.kernel_size} does not fit the model's {grid[0]} x {grid[1]} "
                f"grid of patches; use at most {min(grid)}"
            )
    check_pooling(method, model.global_pool)
    _check_baseline(model, method)


def _check_baseline(model: Any, method: Method) -> None:
    depth, width = len(model.blocks), model.embed_dim
    if isinstance(method, PartialTuning) and method.num_blocks > depth:
        raise ValueError(
            f"num_blocks={method.num_blocks}, but the model has {depth} blocks; use at most {depth}"
        )
    if isinstance(method, AdapterTuning) and method.reduction > width:
        raise ValueError(
            f"reduction={method.reduction} leaves no channel of the model's {width}; use at most "
            f"{width}"
        )
    if isinstance(method, BiasTuning):
        backbone = (n for n, _ in model.named_parameters() if not n.startswith("head"))
        if not any(method.trains(name, depth) for name in backbone):
            raise ValueError(f"this {_name(model)} has no bias to train; use another method")
    if isinstance(method, MLPHead):
        if isinstance(model.get_classifier(), tuple):
            _refuse("head_dist", _name(model.head_dist), "an MLP head fits models with one head")
        if type(model.head) is not nn.Linear:
            _refuse("head", _name(model.head), "a Linear is needed; pass num_classes=...")


def _not_a_vit(model: Any) -> str:
    known = " or ".join(f"timm {cls.__name__}" for cls in TUNED_CLASS)
    message = f"cannot tune a {_name(model)}: a {known} is needed"
    if isinstance(model, torch.jit.ScriptModule):
        return f"{message}; tune the model before scripting it"
    if hasattr(model, "_orig_mod"):
        return f"{message}; tune the model before torch.compile"
    if isinstance(getattr(model, "module", None), nn.Module):
        return f"{message}; tune the model before wrapping it (its .module)"
    if isinstance(getattr(model, "model", None), nn.Module):
        return f"{message}; tune its .model instead"
    return f"{message}, as timm.create_model('vit_base_patch16_224') makes it"


def _check_parts(
    module: nn.Module, parts: dict[str, tuple[type, ...] | None], where: str, optional: str = ""
) -> None:
    if "forward" in vars(module):
        _refuse(f"{where}.forward", "replaced on the instance", "restore the class's own")
    for name, types in parts.items():
        part = getattr(module, name)
        if types is not None and type(part) not in types:
            needed = ", ".join(sorted({t.__name__ for t in types}))
            _refuse(f"{where}.{name}", _name(part), f"known are: {needed}")
    extra = sorted(set(module._modules) - set(parts) - {optional})
    if extra or module._parameters:
        name = (extra or list(module._parameters))[0]
        _refuse(f"{where}.{name}", _name(getattr(module, name)), "timm's class has no such part")


def _check_block(block: nn.Module, where: str) -> None:
    if type(block) is not Block:
        _refuse(where, _name(block), "only timm's Block is known")
    if type(block.attn) is not Attention:
        _refuse(f"{where}.attn", _name(block.attn), "only timm's Attention is known")
    _check_parts(block, _BLOCK_PARTS, where)
    attn: Any = block.attn
    _check_parts(attn, _ATTENTION_PARTS, f"{where}.attn", optional="gate")
    if getattr(attn, "gate", None) is not None:
        _refuse(f"{where}.attn.gate", _name(attn.gate), "gated attention is not known")
    if not attn.fused_attn:
        _refuse(
            f"{where}.attn.fused_attn",
            attn.fused_attn,
            "explicit softmax was asked for, which fused prompt attention would replace; set "
            "fused_attn = True",
        )
    width = attn.num_heads * attn.head_dim
    if attn.qkv.out_features != 3 * width:
        _refuse(f"{where}.attn.qkv.out_features", attn.qkv.out_features, f"{3 * width} are needed")
    if (attn.proj.in_features, attn.proj.out_features) != (width, attn.qkv.in_features):
        shape = (attn.proj.in_features, attn.proj.out_features)
        _refuse(f"{where}.attn.proj", shape, f"{width, attn.qkv.in_features} features are needed")
    for name in _BYPASSED:
        if has_hooks(block.get_submodule(name)):
            _refuse(f"{where}.{name}", "hooked", "prompt rows would miss the hook; remove it")
