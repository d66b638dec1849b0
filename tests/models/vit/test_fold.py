"""`fold_backbone`: the same function, plain checkpoints in and out, and undone bit for bit."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import timm
import torch
from support.formulations import families
from support.formulations.plain import VARIANTS, assert_same, distance, pair
from torch import Tensor, nn

import vpt_fast
from vpt_fast import VPTDeep, fold_backbone, prompt_tune, remove_prompts
from vpt_fast.backbones.demo_backbone import demo_backbone

SCALED = "dinov2"  # has LayerScale


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *((family, "deep") for family in families.FAMILIES),
        *itertools.product(("dinov2", "siglip_map", "no_bias", "qk_norm"), ("shallow", "gaps")),
    ],
)
def test_a_folded_model_computes_the_same(family: str, variant: str) -> None:
    base = families.build(family)
    before = plain_state(base)
    tuned, plain = pair(base, VARIANTS[variant](len(base.blocks)))
    image = families.images(family)
    fold_backbone(tuned)
    changed = [n for n, p in tuned.named_parameters() if n in before if not p.equal(before[n])]
    # RMSNorm and no biases: there is nothing to fold.
    count = 0 if family == "qk_norm_rms" else len(base.blocks)
    assert len([n for n in changed if n.endswith("qkv.weight")]) == count
    assert_same(tuned, plain, tuned(image), plain(image))
    remove_prompts(tuned)
    assert same_states(tuned.state_dict(), before)
    assert not any("folded" in vars(block) for block in tuned.blocks)


@pytest.mark.parametrize("fold", ["norm", "layer_scale", "attention_scale", "bias"])
def test_each_fold_by_itself(fold: str) -> None:
    options = dict.fromkeys(("norm", "layer_scale", "attention_scale", "bias"), False)
    base = families.build(SCALED)
    before = plain_state(base)
    tuned, plain = pair(base, VPTDeep(3))
    fold_backbone(tuned, **(options | {fold: True}))
    changed = {
        name.split(".", 2)[2]
        for name, p in tuned.named_parameters()
        if name in before and not p.equal(before[name])
    }
    norms = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}
    assert (
        changed
        == {
            "norm": norms | {"attn.qkv.weight", "attn.qkv.bias", "mlp.fc1.weight", "mlp.fc1.bias"},
            "layer_scale": {"ls1.gamma", "ls2.gamma", "attn.proj.weight", "attn.proj.bias"}
            | {"mlp.fc2.weight", "mlp.fc2.bias"},
            "attention_scale": {"attn.qkv.weight", "attn.qkv.bias"},
            "bias": {"attn.qkv.bias", "attn.proj.bias"},
        }[fold]
    )
    image = families.images(SCALED)
    assert_same(tuned, plain, tuned(image), plain(image))


def test_masks_and_blocks_by_modules_use_the_folded_scale() -> None:
    tuned, plain = pair(families.build(SCALED), VPTDeep(3))
    image = families.images(SCALED)
    count = 1 + tuned.patch_embed.num_patches
    mask = torch.rand(count, count, generator=torch.Generator().manual_seed(0)) > 0.3
    mask.fill_diagonal_(True)
    expected = tuned(image, attn_mask=mask).detach()
    additive = torch.zeros(count, count, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    linear = prompt_tune(families.build(SCALED), vpt_fast.LinearProbe())
    causal = linear(image, is_causal=True).detach()
    for model in (tuned, linear):
        fold_backbone(model)
    assert distance(tuned(image, attn_mask=mask), expected) < 1e-12
    assert distance(tuned(image, attn_mask=additive), expected) < 1e-12
    assert distance(linear(image, is_causal=True), causal) < 1e-12
    handles = [block.mlp.register_forward_hook(lambda *_: None) for block in tuned.blocks]
    assert_same(tuned, plain, tuned(image), plain(image))
    assert handles


def test_state_dicts_are_those_of_the_unfolded_model() -> None:
    tuned = prompt_tune(families.build(SCALED), VPTDeep(3))
    before, image = plain_state(tuned), families.images(SCALED)
    expected = tuned(image).detach()
    fold_backbone(tuned)
    assert same_states(tuned.state_dict(), before)
    assert same_states(
        nn.Sequential(tuned).state_dict(), {f"0.{name}": t for name, t in before.items()}
    )
    tuned.load_state_dict(before)
    assert distance(tuned(image), expected) < 1e-12
    assert tuned.blocks[0].folded == {"norm1", "norm2", "ls1", "ls2"}


def test_a_plain_checkpoint_that_is_loaded_is_folded() -> None:
    other = families.build(SCALED)
    families.randomise(other, seed=5)
    checkpoint, image = plain_state(other), families.images(SCALED)
    tuned = prompt_tune(families.build(SCALED), VPTDeep(3))
    fold_backbone(tuned)
    tuned.load_state_dict(checkpoint)
    assert tuned.blocks[0].folded
    found = tuned(image).detach()
    prompts = {n: t for n, t in tuned.state_dict().items() if "prompt" in n}
    unfolded = prompt_tune(other, VPTDeep(3))
    unfolded.load_state_dict({**checkpoint, **prompts})
    assert distance(found, unfolded(image)) < 1e-12
    assert same_states(
        {n: t for n, t in remove_prompts(tuned).state_dict().items() if "head" not in n},
        {n: t for n, t in checkpoint.items() if "head" not in n},
    )


def test_copies_pickles_and_casts_stay_folded() -> None:
    tuned = prompt_tune(families.build(SCALED), VPTDeep(3))
    before, image = plain_state(tuned), families.images(SCALED)
    fold_backbone(tuned)
    expected = tuned(image)
    for twin in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(twin(image), expected)
        twin.load_state_dict(twin.state_dict())
        assert torch.equal(twin(image), expected)
        assert same_states(twin.state_dict(), before)
    single = copy.deepcopy(tuned).float()
    plain = prompt_tune(families.build(SCALED), VPTDeep(3)).float()
    removed, expected_state = (
        remove_prompts(single).state_dict(),
        remove_prompts(plain).state_dict(),
    )
    assert same_states(removed, expected_state)


def test_an_adapter_of_a_folded_model_fits_the_plain_backbone(tmp_path: Any) -> None:
    tuned = prompt_tune(families.build(SCALED), VPTDeep(3))
    image = families.images(SCALED)
    fold_backbone(tuned)
    vpt_fast.save_adapter(tuned, tmp_path / "adapter")
    again = vpt_fast.load_adapter(families.build(SCALED), tmp_path / "adapter")
    assert distance(again(image), tuned(image)) < 1e-12


def refused(model: nn.Module, match: str) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        fold_backbone(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_models_that_cannot_be_folded_are_refused_by_name() -> None:
    refused(families.build(SCALED), "not tuned")
    model = prompt_tune(families.build(SCALED), VPTDeep(3))
    model.blocks[1].norm2.weight.requires_grad_(True)
    refused(model, r"blocks\.1\.norm2\.weight: it is trained")
    model.blocks[1].norm2.weight.requires_grad_(False)
    handle = model.blocks[2].mlp.fc1.register_forward_hook(lambda *_: None)
    refused(model, r"blocks\.2\.mlp\.fc1: it is hooked")
    handle.remove()
    fold_backbone(model)
    refused(model, "folded already")


def bf16_errors(model: Any, image: Tensor) -> tuple[float, float]:
    """Return the relative errors of a bf16 model's features, unfolded and folded, against fp64."""
    model, image = model.bfloat16(), image.bfloat16()
    right = copy.deepcopy(model).double().forward_features(image.double())

    def error(candidate: Any) -> float:
        found = candidate.forward_features(image).double()
        return float((found - right).norm() / right.norm())

    plain = error(model)
    return plain, error(fold_backbone(model))


@torch.no_grad()
@pytest.mark.parametrize("depth", [12, pytest.param(24, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["normal", "offset", "massive"])
def test_folding_loses_nothing_in_bf16(kind: str, depth: int) -> None:
    """Compares means over seeds: for a single seed either error may be the larger one."""
    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        vit: Any = timm.create_model(
            "vit_tiny_patch16_224", depth=depth, embed_dim=96, img_size=64, init_values=0.3
        )
        for name, parameter in vit.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.mul_(torch.rand_like(parameter) * 2 + 0.1)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        if kind == "offset":
            vit.pos_embed += 5.0
        elif kind == "massive":
            vit.pos_embed[..., :3] += 300.0
        model = prompt_tune(vit, VPTDeep(5)).eval()
        errors.append(bf16_errors(model, torch.randn(4, 3, 64, 64)))
    plain, folded = torch.tensor(errors).mean(0).tolist()
    assert folded < 1.05 * plain, (plain, folded)


@torch.no_grad()
def test_folding_loses_nothing_in_bf16_on_the_demo_backbone() -> None:
    torch.manual_seed(0)
    model = prompt_tune(demo_backbone(num_classes=10), VPTDeep(10)).eval()
    images = torch.rand(32, model.patch_embed.proj.in_channels, 32, 32)
    plain, folded = bf16_errors(model, images)
    assert folded < 1.05 * plain, (plain, folded)
