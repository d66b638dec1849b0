"""Folding an Eva: the function stays the same, and a key bias stays where keys are rotated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.formulations import eva_families as families
from support.formulations.plain import assert_same, distance
from support.formulations.plain_eva import pair
from support.unchanged import assert_unchanged, snapshot

from vpt_fast import VAPT, VPTDeep, VPTShallow, fold_backbone, prompt_tune, remove_prompts

METHODS: dict[str, Any] = {
    "deep": VPTDeep(3),
    "first": VPTDeep(3, blocks=[0]),
    "shallow": VPTShallow(2),
    "vapt": VAPT(2, projector_dropout=0.0, channel_dropout=0.0),
}


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f != "one_patch"])
def test_the_function_stays_the_same(family: str, method: str) -> None:
    tuned, plain = pair(families.build(family), METHODS[method])
    fold_backbone(tuned)
    image = families.images(family)
    assert_same(tuned, plain, tuned(image), plain(image))
    rows = tuned.num_prefix_tokens + 9
    mask = torch.rand(rows, rows) > 0.2
    if tuned.patch_embed.num_patches == 9 and method != "vapt":
        assert distance(tuned(image, attn_mask=mask), plain(image, mask)) <= 1e-10


def test_rotated_keys_keep_their_bias() -> None:
    tuned = fold_backbone(prompt_tune(families.build("rope"), VPTDeep(3)))
    before = families.build("rope")
    width = tuned.embed_dim
    for block, old in zip(tuned.blocks, before.blocks, strict=True):
        assert block.attn.qkv.bias[width : 2 * width].abs().max() > 0
        assert block.attn.qkv.bias[2 * width :].abs().max() == 0
        assert torch.equal(block.gamma_1, torch.ones_like(old.gamma_1))


@pytest.mark.parametrize("family", ["dinov3", "dinov3_qkvb", "rope", "eva02_clip", "sapiens2"])
def test_undone_bit_for_bit(family: str) -> None:
    model = families.build(family)
    before = snapshot(model)
    del before["identities"]
    fold_backbone(prompt_tune(model, VPTDeep(3)))
    remove_prompts(model)
    assert_unchanged(model, before)


def test_a_trained_gamma_is_refused() -> None:
    model = prompt_tune(families.build("dinov3"), VPTDeep(3))
    model.blocks[1].gamma_2.requires_grad_()
    with pytest.raises(ValueError, match="blocks.1.gamma_2: it is trained"):
        fold_backbone(model)
