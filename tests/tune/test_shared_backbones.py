"""Tuned models that share weights or blocks: removing one's prompts leaves the other unchanged."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from support.changes import blocks_of
from support.formulations import plain_swin
from support.formulations.families import build, images
from support.snapshots import assert_same_model, snapshot
from torch import nn

from vpt_fast import FullTuning, LinearProbe, VPTDeep, prompt_tune, remove_prompts


def built(family: str) -> Any:
    return plain_swin.build(family) if family == "tiny" else build(family)


def with_parameters_of(one: nn.Module, other: nn.Module) -> nn.Module:
    """Return another model with the same parameters."""
    for name, parameter in one.named_parameters():
        if "prompt" in name:
            continue
        place, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(place), leaf, parameter)
    return other


@pytest.mark.parametrize("family", ["vit", "tiny"])
@pytest.mark.parametrize("methods", [(VPTDeep(2), LinearProbe()), (FullTuning(), VPTDeep(2))])
def test_the_last_one_is_removed_first(family: str, methods: Any) -> None:
    one = built(family)
    other = with_parameters_of(one, built(family))
    flags = {name: p.requires_grad for name, p in one.named_parameters()}
    prompt_tune(one, methods[0]), prompt_tune(other, methods[1])
    before = snapshot(one), snapshot(other)
    with pytest.raises(ValueError, match="that was tuned after this one .* on that one first"):
        remove_prompts(one)
    assert_same_model(one, before[0]), assert_same_model(other, before[1])
    remove_prompts(other)
    remove_prompts(one)
    assert {name: p.requires_grad for name, p in one.named_parameters()} == flags


def test_a_deleted_model_is_ignored() -> None:
    one = build("vit")
    other = prompt_tune(with_parameters_of(one, build("vit")), VPTDeep(2))
    prompt_tune(one, VPTDeep(2))
    later = prompt_tune(with_parameters_of(one, build("vit")), VPTDeep(2))
    gc.disable()
    try:
        del later
        remove_prompts(one)
    finally:
        gc.enable()
    assert not other.patch_embed.proj.weight.requires_grad


@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_blocks_of_another_tuned_model_are_refused(family: str) -> None:
    """A linear probe leaves blocks timm's own; they would get the other model's prompts."""
    one, other = built(family), built(family)
    prompt_tune(one, LinearProbe())
    if family == "vit":
        other.blocks[0] = one.blocks[0]
        with pytest.raises(ValueError, match="are blocks of another tuned model too"):
            prompt_tune(other, VPTDeep(2))
    else:
        other.layers[0] = one.layers[0]
        with pytest.raises(ValueError, match=r"layers\.0 is PromptedSwinStage"):
            prompt_tune(other, VPTDeep(2))
    other = built(family)
    prompt_tune(other, VPTDeep(2))
    assert not any("prompt" in block._modules for block in blocks_of(one))


@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_copies(family: str) -> None:
    """A deep copy is another model; a shallow copy shares all, and neither can be removed."""
    one = prompt_tune(built(family), VPTDeep(2))
    deep = copy.deepcopy(one)
    shallow = copy.copy(one)
    before = snapshot(one)
    for model in (one, shallow):
        with pytest.raises(ValueError, match="are blocks of another tuned model too"):
            remove_prompts(model)
    assert_same_model(one, before)
    remove_prompts(deep)
    assert_same_model(one, before)
    given = plain_swin.images(family) if family == "tiny" else images(family)
    assert torch.equal(one(given), shallow(given))
    del shallow, model
    remove_prompts(one)
