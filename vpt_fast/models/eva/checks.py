"""Checks of timm's Eva: what cannot be tuned is refused before anything changes."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionRope, DropPath
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import nn

from vpt_fast.methods import Method
from vpt_fast.models.check_parts import (
    Parts,
    check_apart,
    check_around_blocks,
    check_fused,
    check_parts,
    name_of,
    refuse,
)
from vpt_fast.models.eva.rope import CACHED
from vpt_fast.modules.row_by_row import ROW_NORMS

_BLOCK_PARTS: Parts = {
    "norm1": ROW_NORMS,
    "attn": (EvaAttention, AttentionRope),
    "drop_path1": (nn.Identity, DropPath),
    "norm2": ROW_NORMS,
    "mlp": None,  # any module: it is called as it is
    "drop_path2": (nn.Identity, DropPath),
}
_GAMMAS = ("gamma_1", "gamma_2")
_MAYBE_LINEAR = (nn.Linear, type(None))
_ATTENTION_PARTS: Parts = {
    "q_norm": ROW_NORMS,
    "k_norm": ROW_NORMS,
    "attn_drop": (nn.Dropout,),
    "norm": ROW_NORMS,
    "proj": (nn.Linear,),
    "proj_drop": (nn.Dropout,),
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_BIASES = ("q_bias", "v_bias")


def check_eva(model: Any, method: Method) -> None:
    """Raise ValueError if an Eva cannot be tuned with `method`; change nothing."""
    if type(model.blocks) is not nn.ModuleList or not len(model.blocks):
        refuse("blocks", name_of(model.blocks), "a ModuleList of at least one EvaBlock is needed")
    for index, block in enumerate(model.blocks):
        _check_block(block, f"blocks.{index}", model.num_prefix_tokens)
    check_apart([(f"blocks.{i}", block) for i, block in enumerate(model.blocks)])
    if type(model.rope) in CACHED.values():
        refuse(
            "rope",
            name_of(model.rope),
            "another tuned model has the same module; give each its own (copy.deepcopy), or call "
            "remove_prompts on the other first",
        )
    if model.rope is not None and type(model.rope) not in CACHED:
        known = ", ".join(sorted(kind.__name__ for kind in CACHED))
        refuse("rope", name_of(model.rope), f"known are: {known}")
    check_around_blocks(model, method)


def _check_block(block: nn.Module, where: str, prefix: int) -> None:
    if type(block) is EvaBlockPostNorm:
        refuse(
            where,
            name_of(block),
            "its norms come after attention and MLP; fused blocks and prompts need them before",
        )
    if type(block) is not EvaBlock:
        refuse(where, name_of(block), "only timm's EvaBlock is known")
    check_parts(block, _BLOCK_PARTS, where, parameters=_GAMMAS)
    attn: Any = block.attn
    packed = attn.qkv is not None
    projections: Parts = {"qkv": _MAYBE_LINEAR}
    projections |= {name: (type(None),) if packed else (nn.Linear,) for name in _PROJECTIONS}
    projections |= {"gate": _MAYBE_LINEAR} if hasattr(attn, "gate") else {}
    check_parts(attn, _ATTENTION_PARTS | projections, f"{where}.attn", parameters=_BIASES)
    groups = getattr(attn, "num_kv_groups", 1)
    if groups != 1:
        refuse(
            f"{where}.attn.num_kv_heads",
            attn.num_kv_heads,
            f"{attn.num_heads} heads of queries share these keys and values (grouped-query "
            "attention), which prompt attention does not",
        )
    check_fused(attn, f"{where}.attn")
    if attn.num_prefix_tokens != prefix:
        refuse(
            f"{where}.attn.num_prefix_tokens",
            attn.num_prefix_tokens,
            f"the model has {prefix}; patches, and no other token, are rotated",
        )
    _check_widths(attn, f"{where}.attn")


def _check_widths(attn: Any, where: str) -> None:
    width = attn.num_heads * attn.head_dim
    names = ("qkv",) if attn.qkv is not None else _PROJECTIONS
    for name in names:
        found, needed = getattr(attn, name).out_features, width * (3 if name == "qkv" else 1)
        if found != needed:
            refuse(f"{where}.{name}.out_features", found, f"{needed} are needed")
    inner = getattr(attn, names[0]).in_features
    shape = (attn.proj.in_features, attn.proj.out_features)
    if shape != (width, inner):
        refuse(f"{where}.proj", shape, f"{width, inner} features are needed")
    if type(attn) is EvaAttention and width != inner:
        refuse(
            f"{where}.head_dim",
            attn.head_dim,
            f"{attn.num_heads} heads of it are {width} channels and not the model's {inner}, which "
            "timm's EvaAttention itself cannot compute",
        )
