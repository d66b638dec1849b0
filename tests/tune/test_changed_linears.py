"""Modules that replace a Linear are called, and the result is theirs.

Compared with prompts concatenated into timm's own blocks.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.changes import LowRank, Scaled, merged, swapped, with_low_rank
from support.formulations import plain_swin
from support.formulations.families import build, depth, images
from support.formulations.plain import (
    VARIANTS,
    assert_same,
    distance,
    gradients,
    pair,
    redraw_prompts,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vpt_fast import VAPT, VPTDeep, bake, fold_backbone, prompt_tune, remove_prompts
from vpt_fast.analysis import attention_shares
from vpt_fast.ops.memory_modes import MEMORY_MODES

SWIN = "window4"


def methods(count: int) -> dict[str, Any]:
    names = ("linear", "shallow", "deep", "gaps", "last_only", "projected")
    return {**{name: VARIANTS[name](count) for name in names}, "vapt": VAPT(2)}


@pytest.mark.covering
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("variant", methods(4))
@pytest.mark.parametrize("family", ["vit", "qk_norm", "siglip_average", SWIN])
def test_low_rank_is_the_merged_model(family: str, variant: str, memory: str) -> None:
    """Logits and gradients of prompts and both factors are those of the merged weight."""
    swin = family == SWIN
    if swin and variant in ("gaps", "last_only", "projected", "vapt"):
        pytest.skip("as the others, in windows")
    base = plain_swin.build(family) if swin else build(family)
    count = plain_swin.SWINS[family].depth if swin else depth(family)
    given = plain_swin.images(family) if swin else images(family)
    tuned = prompt_tune(base, methods(count)[variant], memory)
    redraw_prompts(tuned)
    other = copy.deepcopy(tuned)
    with_low_rank(tuned)
    merged(other)
    tuned.eval(), other.eval()
    have, want = tuned(given), other(given)
    assert distance(have, want) <= 1e-10
    ours = gradients(have, {n: p for n, p in tuned.named_parameters() if p.requires_grad})
    theirs = gradients(want, {n: p for n, p in other.named_parameters() if p.requires_grad})
    assert [n for n in ours if n.endswith(".down")]
    for name, found in ours.items():
        place, _, leaf = name.rpartition(".")
        if leaf not in ("down", "up") or not isinstance(tuned.get_submodule(place), LowRank):
            expected = theirs[name]
        else:
            weight = theirs[f"{place}.weight"]
            low = tuned.get_submodule(place)
            expected = low.up.T @ weight if leaf == "down" else weight @ low.down.T
        assert distance(found, expected) <= 1e-9, name


@pytest.mark.parametrize("make", [Scaled, "parametrized", "own forward", "quantised"])
def test_a_replaced_projection_is_called(make: Any) -> None:
    def change(linear: nn.Linear) -> nn.Module:
        if make == "parametrized":

            class Doubled(nn.Module):
                def forward(self, weight: Tensor) -> Tensor:
                    return 2 * weight

            parametrize.register_parametrization(linear, "weight", Doubled())
        elif make == "own forward":
            forward = linear.forward
            linear.forward = lambda x: forward(x).sin()  # type: ignore[method-assign]
        elif make == "quantised":
            weight = (4 * linear.weight.detach()).round() / 4

            class Rounded(nn.Module):  # has no weight that could be read
                def forward(self, x: Tensor) -> Tensor:
                    return x @ weight.T + linear.bias.detach()

            return Rounded()
        else:
            linear.__class__ = Scaled
        return linear

    tuned, plain = pair(build("vit"), VPTDeep(3))
    swapped(tuned, change, ["attn.qkv"])
    swapped(plain.model, change, ["attn.qkv"])
    assert_same(tuned, plain, tuned(images("vit")), plain(images("vit")))
    if make == "own forward":
        with pytest.raises(ValueError, match="qkv has a forward of its own"):
            bake(tuned)
        return
    assert distance(bake(copy.deepcopy(tuned.eval()))(images("vit")), plain(images("vit"))) <= 1e-10


def test_a_linear_replaced_before_tuning_is_refused() -> None:
    model = build("vit")
    model.blocks[1].attn.qkv = LowRank(model.blocks[1].attn.qkv)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv is \S*LowRank; .* tune first"):
        prompt_tune(model, VPTDeep(3))
    tuned = plain_swin.build(SWIN)
    tuned.layers[0].blocks = nn.Sequential(tuned.layers[0].blocks[0], tuned.layers[0].blocks[0])
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.1 is layers\.0\.blocks\.0 again"):
        prompt_tune(tuned, VPTDeep(3))


@pytest.mark.parametrize("family", ["vit", "qk_norm", SWIN])
def test_inspection_uses_the_replaced_linear(family: str) -> None:
    base = plain_swin.build(family) if family == SWIN else build(family)
    given = plain_swin.images(family) if family == SWIN else images(family)
    tuned = prompt_tune(base, VPTDeep(3))
    redraw_prompts(tuned)
    other = copy.deepcopy(tuned)
    with_low_rank(tuned)
    merged(other)
    for found, expected in zip(
        attention_shares(tuned, given), attention_shares(other, given), strict=True
    ):
        assert distance(found.prompts, expected.prompts) <= 1e-10


def test_folding_takes_plain_linears_only() -> None:
    tuned = prompt_tune(build("vit"), VPTDeep(3))
    with_low_rank(tuned)
    before = copy.deepcopy(tuned.state_dict())
    with pytest.raises(ValueError, match=r"cannot fold blocks\.0\.attn\.qkv: .* a LowRank; merge"):
        fold_backbone(tuned)
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())


def test_folding_leaves_another_model_of_the_same_weights_alone() -> None:
    one, other = build("deit3"), build("deit3")
    for block, same in zip(one.blocks, other.blocks, strict=True):
        for name, parameter in block.named_parameters():
            place, _, leaf = name.rpartition(".")
            setattr(same.get_submodule(place), leaf, parameter)
    given = images("deit3")
    prompt_tune(one, VPTDeep(3)), prompt_tune(other, VPTDeep(3))
    before, theirs = one(given), other(given)
    fold_backbone(one)
    assert torch.equal(other(given), theirs) and distance(one(given), before) <= 1e-10
    remove_prompts(one)
    assert torch.equal(other(given), theirs)
