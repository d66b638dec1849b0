"""Every model of timm's Eva: tuned and exact, or refused with the true reason.

On the meta device each is as large as timm makes it. Values are compared at two blocks and two
heads, with the model's own head dimension, MLP ratio, bias, norms and rotation.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.formulations.families import randomise
from support.formulations.plain import assert_same
from support.formulations.plain_eva import pair
from timm.models import list_models

from vpt_fast import VPTDeep, prompt_tune
from vpt_fast.models.fusion.fusible import can_fuse

ALL = list_models(module="eva")
REFUSED = {
    "eva02_enormous_patch14_clip_224": "blocks.0 is EvaBlockPostNorm; its norms come after",
    "vit_large_patch16_sapiens2": "blocks.8.attn.num_kv_heads is 8; 16 heads of queries share",
    "vit_huge_patch16_sapiens2": "blocks.8.attn.num_kv_heads is 8; 16 heads of queries share",
    "vit_giant_patch16_sapiens2": "blocks.8.attn.num_kv_heads is 12; 24 heads of queries share",
    "vit_5b_patch16_sapiens2": "blocks.8.attn.num_kv_heads is 16; 32 heads of queries share",
}
BY_MODULES = {"vit_base_patch16_sapiens2"}
"""Tuned, but with blocks that are not fused: norms of queries and keys."""


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name)


def small(name: str, like: Any) -> Any:
    """Return the model with two blocks and two heads, in fp64, weights of order one."""
    attn, patch = like.blocks[0].attn, like.patch_embed.patch_size[0]
    groups = {"num_kv_heads": (2, 2)} if hasattr(attn, "num_kv_heads") else {}
    if "sapiens" not in name:
        groups = {}
    model = timm.create_model(
        name, img_size=3 * patch, depth=2, num_heads=2, embed_dim=2 * attn.head_dim,
        num_classes=5, **groups,
    )  # fmt: skip
    model.double().eval()
    frequencies = {n: p.detach().clone() for n, p in model.named_parameters() if "freqs" in n}
    randomise(model)
    model.load_state_dict(frequencies, strict=False)
    return model


def test_the_list_is_that_of_timm() -> None:
    assert set(REFUSED) | BY_MODULES <= set(ALL)
    assert len(ALL) >= 60


@pytest.mark.parametrize("name", ALL)
def test_tuned_and_exact_or_refused(name: str) -> None:
    whole = on_meta(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            prompt_tune(whole, VPTDeep(3))
        return
    model = small(name, whole)
    prompt_tune(whole, VPTDeep(3))
    assert all(can_fuse(block) for block in whole.blocks) == (name not in BY_MODULES)
    tuned, plain = pair(model, VPTDeep(3))
    patch = tuned.patch_embed.patch_size[0]
    image = torch.randn(2, 3, 3 * patch, 3 * patch, dtype=torch.float64)
    assert_same(tuned, plain, tuned(image), plain(image))
