"""What `prompt_tune` can honour: every part of a model is looked at before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block, LayerScale
from torch import nn

from vpt_fast.methods import VAPT, Method
from vpt_fast.methods.baselines import AdapterTuning, BiasTuning, MLPHead, PartialTuning
from vpt_fast.models.check_parts import Parts, check_apart, check_parts, name_of, refuse
from vpt_fast.models.swin.checks import check_swin
from vpt_fast.models.swin.model import TUNED_CLASS as TUNED_SWIN
from vpt_fast.models.tuned import blocks_of, check_pooling, is_tuned
from vpt_fast.models.vit.model import TUNED_CLASS
from vpt_fast.modules.row_by_row import ROW_NORMS

_BLOCK_PARTS: Parts = {
    "norm1": ROW_NORMS,
    "attn": (Attention,),
    "ls1": (nn.Identity, LayerScale),
    "drop_path1": (nn.Identity, DropPath),
    "norm2": ROW_NORMS,
    "mlp": None,  # any module: it is called as it is
    "ls2": (nn.Identity, LayerScale),
    "drop_path2": (nn.Identity, DropPath),
}
_ATTENTION_PARTS: Parts = {
    "qkv": (nn.Linear,),
    "q_norm": ROW_NORMS,
    "k_norm": ROW_NORMS,
    "attn_drop": (nn.Dropout,),
    "norm": (nn.Identity,),
    "proj": (nn.Linear,),
    "proj_drop": (nn.Dropout,),
}


def check_model(model: Any, method: Method) -> None:
    """Raise if `model` cannot be tuned with `method`; change nothing.

    Raises:
        TypeError: not a timm VisionTransformer or SwinTransformer.
        ValueError: a block, an attribute or the method does not fit, or it is tuned already.
    """
    if is_tuned(model):
        raise ValueError(
            f"this {name_of(model)} is tuned already, with {model.tune_record.method}; call "
            "remove_prompts(model) first"
        )
    if type(model) not in TUNED_CLASS and type(model) not in TUNED_SWIN:
        raise TypeError(_not_known(model))
    if "forward" in vars(model) or "forward_features" in vars(model):
        refuse("forward", "replaced on the instance", "restore the class's own")
    if type(model) in TUNED_SWIN:
        check_swin(model, method)
    else:
        _check_vit(model, method)
    check_pooling(method, _pooling(model))
    _check_baseline(model, method)


def _pooling(model: Any) -> str:
    """The kind of pooling; of a ClassifierHead its own, which timm 1.0.29 lets differ."""
    pool = getattr(model.head, "global_pool", None)
    return model.global_pool if pool is None else pool.pool_type


def _check_vit(model: Any, method: Method) -> None:
    if type(model.blocks) is not nn.Sequential or not len(model.blocks):
        refuse("blocks", name_of(model.blocks), "a Sequential of at least one Block is needed")
    for index, block in enumerate(model.blocks):
        _check_block(block, f"blocks.{index}")
    check_apart([(f"blocks.{i}", block) for i, block in enumerate(model.blocks)])
    if not hasattr(model.patch_embed, "patch_size") or not hasattr(model.patch_embed, "grid_size"):
        embed = name_of(model.patch_embed)
        refuse("patch_embed", embed, "what embeds patches must have a patch_size and a grid_size")
    if type(model.norm) not in ROW_NORMS:
        refuse("norm", name_of(model.norm), "a normalisation of each token by itself is needed")
    method.prompted_blocks(len(model.blocks))
    if isinstance(method, VAPT) and method.num_prompts:
        grid = model.patch_embed.grid_size
        if min(grid) < method.kernel_size:
            raise ValueError(
                f"kernel_size={method.kernel_size} does not fit the model's {grid[0]} x {grid[1]} "
                f"grid of patches; use at most {min(grid)}"
            )


def _check_baseline(model: Any, method: Method) -> None:
    depth, width = len(blocks_of(model)), model.embed_dim
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
            raise ValueError(f"this {name_of(model)} has no bias to train; use another method")
    if isinstance(method, MLPHead):
        if isinstance(model.get_classifier(), tuple):
            refuse("head_dist", name_of(model.head_dist), "an MLP head fits models with one head")
        head = model.get_classifier()
        if type(head) is not nn.Linear:
            refuse("head", name_of(head), "a Linear is needed; pass num_classes=...")


_NOT_SWIN = {
    "SwinTransformerV2": "its cosine attention with a position bias from an MLP is not known",
    "SwinTransformerV2Cr": "its cosine attention with a position bias from an MLP is not known",
}


def _not_known(model: Any) -> str:
    known = " or ".join(f"timm {cls.__name__}" for cls in (*TUNED_CLASS, *TUNED_SWIN))
    message = f"cannot tune a {name_of(model)}: a {known} is needed"
    if name_of(model) in _NOT_SWIN:
        return f"{message}; {_NOT_SWIN[name_of(model)]}, use a swin_* model of the first version"
    if isinstance(model, torch.jit.ScriptModule):
        return f"{message}; tune the model before scripting it"
    if hasattr(model, "_orig_mod"):
        return f"{message}; tune the model before torch.compile"
    if isinstance(getattr(model, "module", None), nn.Module):
        return f"{message}; tune the model before wrapping it (its .module)"
    if isinstance(getattr(model, "model", None), nn.Module):
        return f"{message}; tune its .model instead"
    return f"{message}, as timm.create_model('vit_base_patch16_224') makes it"


def _check_block(block: nn.Module, where: str) -> None:
    if type(block) is not Block:
        refuse(where, name_of(block), "only timm's Block is known")
    if type(block.attn) is not Attention:
        refuse(f"{where}.attn", name_of(block.attn), "only timm's Attention is known")
    check_parts(block, _BLOCK_PARTS, where)
    attn: Any = block.attn
    check_parts(attn, _ATTENTION_PARTS, f"{where}.attn", optional="gate")
    if getattr(attn, "gate", None) is not None:
        refuse(f"{where}.attn.gate", name_of(attn.gate), "gated attention is not known")
    if not attn.fused_attn:
        refuse(
            f"{where}.attn.fused_attn",
            attn.fused_attn,
            "explicit softmax was asked for, which fused prompt attention would replace; set "
            "fused_attn = True",
        )
    width = attn.num_heads * attn.head_dim
    if attn.qkv.out_features != 3 * width:
        refuse(f"{where}.attn.qkv.out_features", attn.qkv.out_features, f"{3 * width} are needed")
    if (attn.proj.in_features, attn.proj.out_features) != (width, attn.qkv.in_features):
        shape = (attn.proj.in_features, attn.proj.out_features)
        refuse(f"{where}.attn.proj", shape, f"{width, attn.qkv.in_features} features are needed")
