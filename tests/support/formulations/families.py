"""Tiny timm models, one for every supported family, with weights of order one.

timm builds each model (its own registry entry, shrunk by arguments), in float64, on a grid of
3 x 3 to 4 x 4 patches. Every parameter is redrawn: with timm's initialisation (LayerScale of 1e-5,
weights of 0.02) the blocks are nearly the identity, and every test would be easy to pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from support.formulations.copies import Original

CLASSES = 5


@dataclass(frozen=True)
class Family:
    """A model of timm's registry, its arguments and edits.

    Attributes:
        entry: Name for `timm.create_model`.
        arguments: Arguments of `timm.create_model`.
        image: Height and width of the model's images, in pixels.
        channels: Number of channels of the images.
        edit: Function that edits the built model, where timm has no argument for it.
    """

    entry: str
    arguments: dict[str, Any] = field(default_factory=dict)
    image: tuple[int, int] = (24, 24)
    channels: int = 3
    edit: Callable[[nn.Module], None] | None = None


def _vit(
    entry: str = "vit_tiny_patch16_224", heads: int = 2, head_dim: int = 32, **more: Any
) -> Family:
    edit = more.pop("edit", None)
    image = more.pop("image", (24, 24))
    arguments = {
        "img_size": image,
        "patch_size": 8,
        "embed_dim": heads * head_dim,
        "num_heads": heads,
        "depth": 3,
        "num_classes": CLASSES,
    }
    arguments.update(more)
    return Family(entry, arguments, image, more.get("in_chans", 3), edit)


def _wide_heads(model: nn.Module) -> None:
    """Set two heads of dimension 48 at width 64, so that qkv and proj are not square."""
    for block in model.blocks:
        block.attn = Attention(64, num_heads=2, attn_head_dim=48, qkv_bias=True)


def _other_size(family: Family, image: tuple[int, int]) -> Family:
    return Family(family.entry, family.arguments, image, family.channels, family.edit)


FAMILIES: dict[str, Family] = {
    "vit": _vit(depth=4),
    "vit_32px": _vit(image=(32, 32), depth=2),
    "vit_oblong": _vit(image=(16, 40), patch_size=(8, 10), depth=2),
    "vit_grey": _vit(in_chans=1, depth=2),
    "deit": _vit("deit_tiny_patch16_224", head_dim=48),
    "deit_distilled": _vit("deit_tiny_distilled_patch16_224"),
    "deit3": _vit("deit3_small_patch16_224"),
    "mae": _vit("vit_base_patch16_224", global_pool="avg"),
    "clip": _vit("vit_base_patch16_clip_quickgelu_224", head_dim=64, depth=2),
    "dinov2": _vit("vit_small_patch14_dinov2"),
    "dinov2_swiglu": _vit("vit_giant_patch14_dinov2", mlp_ratio=3),
    "dinov2_registers": _vit("vit_small_patch14_reg4_dinov2"),
    "siglip_map": _vit("vit_base_patch16_siglip_224", head_dim=72),
    "siglip_average": _vit("vit_base_patch16_siglip_gap_224", head_dim=80, depth=2),
    "no_bias": _vit("vit_medium_patch16_gap_240"),
    "aimv2": _vit("aimv2_large_patch14_224", heads=1, head_dim=128, depth=2),
    "qk_norm": _vit(qk_norm=True),
    "qk_norm_rms": _vit("aimv2_large_patch14_224", qk_norm=True),
    "wide_heads": _vit(edit=_wide_heads),
    "dynamic": _other_size(_vit(dynamic_img_size=True), (32, 16)),
    "dynamic_padded": _other_size(
        _vit(dynamic_img_size=True, dynamic_img_pad=True, global_pool="avg"), (20, 28)
    ),
    "max_pool": _vit(global_pool="max", depth=2),
    "average_and_max": _vit(global_pool="avgmax", reg_tokens=2),
    "average_with_prefix": _vit(global_pool="avg", pool_include_prefix=True),
    "average_unnormed": _vit(global_pool="avg", fc_norm=False, final_norm=False),
    "token_fc_norm": _vit(global_pool="token", fc_norm=True),
    "all_tokens": _vit(global_pool=""),
    "prr_pool": _vit(global_pool="prr", depth=2),
    "no_positions": _vit(pos_embed="none", depth=2),
    "headless": _vit(num_classes=0),
    "one_patch": _vit(image=(8, 8), class_token=False, global_pool="avg"),
    "one_block": _vit(depth=1),
}

TOKEN = "vit"
AVERAGE = "mae"


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, of order one, so that no part of the model is negligible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        leaf = name.rpartition(".")[2]
        if "token" in leaf or leaf in ("pos_embed", "latent"):
            value = 0.7 * noise
        elif parameter.ndim > 1:
            value = 1.5 * noise / math.sqrt(parameter[0].numel())
        elif leaf in ("weight", "gamma"):
            value = 1 + 0.3 * noise
        else:
            value = 0.3 * noise
        with torch.no_grad():
            parameter.copy_(value)


def create(family: str, **overrides: Any) -> nn.Module:
    """Build the family's model as timm initialises it, in float32 and in eval mode."""
    found = FAMILIES[family]
    model = timm.create_model(found.entry, pretrained=False, **{**found.arguments, **overrides})
    if found.edit is not None:
        found.edit(model)
    return model.eval()


@functools.cache
def _original(
    family: str, seed: int, dtype: torch.dtype, overrides: tuple[tuple[str, Any], ...]
) -> Original:
    model = create(family, **dict(overrides)).to(dtype)
    randomise(model, seed)
    return Original(model)


def build(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any
) -> nn.Module:
    """Build a new model of the family with weights of order one, in eval mode."""
    model: nn.Module = _original(family, seed, dtype, tuple(overrides.items())).copy()
    return model


def images(
    family: str, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return random images (batch, channels, height, width) of the family's size."""
    found = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, found.channels, *found.image)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def depth(family: str) -> int:
    """Return the number of blocks of the family's model."""
    return FAMILIES[family].arguments["depth"]


def pools_patches(family: str) -> bool:
    """Return whether the family's head pools patches, as `pool_prompts` requires."""
    return create(family).global_pool in ("avg", "avgmax", "max", "map")
