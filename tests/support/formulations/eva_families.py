"""Tiny models of timm's Eva: one for every row of the table of backbones, weights of order one.

As in `families`: timm builds each model by its own registry entry, shrunk by arguments.
"""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from torch import Tensor, nn

from support.formulations.copies import Original
from support.formulations.families import CLASSES, Family, randomise


def _eva(entry: str, heads: int = 2, head_dim: int = 16, **more: Any) -> Family:
    image = more.pop("image", (24, 24))
    arguments = {
        "img_size": image, "patch_size": 8, "embed_dim": heads * head_dim, "num_heads": heads,
        "depth": 3, "num_classes": CLASSES,
    }  # fmt: skip
    return Family(entry, {**arguments, **more}, image)


FAMILIES: dict[str, Family] = {
    "dinov3": _eva("vit_small_patch16_dinov3", head_dim=32),
    "dinov3_oblong": _eva("vit_small_patch16_dinov3", image=(16, 40), depth=2),
    "dinov3_qkvb": _eva("vit_small_patch16_dinov3_qkvb", depth=2),
    "dinov3_swiglu": _eva("vit_small_plus_patch16_dinov3", head_dim=20),
    "dinov3_7b": _eva("vit_7b_patch16_dinov3", heads=1, head_dim=128, depth=2),
    "lingbot": _eva("vit_small_patch16_lingbot"),
    "eva02_glu": _eva("eva02_tiny_patch14_224"),
    "eva02_swiglu_norm": _eva("eva02_base_patch14_224"),
    "eva02_clip": _eva("eva02_base_patch16_clip_224"),
    "eva02_clip_inner_norm": _eva("eva02_large_patch14_clip_224", scale_attn_inner=True),
    "pe_core": _eva("vit_pe_core_tiny_patch16_384", depth=2),
    "pe_core_gigantic": _eva("vit_pe_core_gigantic_patch14_448", head_dim=24, depth=2),
    "pe_lang": _eva("vit_pe_lang_large_patch14_448"),
    "pe_spatial": _eva("vit_pe_spatial_tiny_patch16_512", depth=2),
    "rope": _eva("vit_small_patch16_rope_224"),
    "rope_ape": _eva("vit_small_patch16_rope_ape_224", depth=2),
    "rope_mixed": _eva("vit_small_patch16_rope_mixed_224"),
    "rope_mixed_ape": _eva("vit_small_patch16_rope_mixed_ape_224", depth=2),
    "sbb": _eva("vit_medium_patch16_rope_reg1_gap_256"),
    "sbb_reg4": _eva("vit_betwixt_patch16_rope_reg4_gap_256", depth=2),
    "sapiens2": _eva("vit_large_patch16_sapiens2", num_kv_heads=(2, 2, 2)),
    "giant": _eva("eva_giant_patch14_224", head_dim=44),
    "separate_bias": _eva("eva02_tiny_patch14_224", depth=2),
    "qk_norm": _eva("vit_small_patch16_dinov3_qkvb", qk_norm=True),
    "unfused_rope": _eva("vit_small_patch16_rope_224", qkv_fused=False),
    "mrope": _eva("vit_small_patch16_dinov3", rope_type="mrope", rope_mrope_section=(2, 3, 3)),
    "one_patch": _eva(
        "vit_small_patch16_dinov3", image=(8, 8), class_token=False, num_reg_tokens=0, depth=1
    ),
    "gated": _eva("vit_small_patch16_dinov3_qkvb"),
    "gated_rope": _eva("vit_small_patch16_rope_224", depth=2),
    "max_pool": _eva("vit_small_patch16_rope_224", global_pool="max", depth=2),
}  # fmt: skip
"""Models of timm's registry, by a short name."""


def create(family: str, **overrides: Any) -> nn.Module:
    """Build the family's model as timm initialises it, in float32 and in eval mode."""
    found = FAMILIES[family]
    model: Any = timm.create_model(found.entry, **{**found.arguments, **overrides})
    if family == "separate_bias":
        for block in model.blocks:
            block.attn.qkv_bias_separate = True
    if family.startswith("gated"):  # timm's blocks have it as an argument, its Eva does not
        for block in model.blocks:
            block.attn.gate = nn.Linear(model.embed_dim, model.embed_dim)
    return model.eval()


@functools.cache
def _original(family: str, seed: int, overrides: tuple[tuple[str, Any], ...]) -> Original:
    model = create(family, **dict(overrides)).double()
    frequencies = [p.detach().clone() for n, p in model.named_parameters() if n == "rope.freqs"]
    randomise(model, seed)
    for value in frequencies:
        model.rope.freqs.data.copy_(value)
    return Original(model)


def build(family: str, seed: int = 0, **overrides: Any) -> Any:
    """Build a new model of the family in fp64 with weights of order one, in eval mode."""
    return _original(family, seed, tuple(overrides.items())).copy()


def images(family: str, batch: int = 2, seed: int = 1) -> Tensor:
    """Return random images (batch, 3, height, width) of the family's size, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 3, *FAMILIES[family].image), generator=generator).double()
