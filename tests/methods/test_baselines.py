"""The papers' baselines compute and train the same as timm's own model with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import distance
from support.formulations.plain_baselines import BASELINES, assert_same, baseline_pair
from support.fusion import indices, spied
from timm.optim import param_groups_layer_decay
from torch import nn

from vpt_fast import (
    AdapterTuning,
    BiasTuning,
    FullTuning,
    MLPHead,
    PartialTuning,
    count_parameters,
    fold_backbone,
    prompt_tune,
    trainable_parameters,
)
from vpt_fast.ops.memory_modes import MEMORY_MODES

SCALED = "dinov2_registers"
# [CLS] and two tokens, registers with LayerScale, pooled with fc_norm, pooled by attention, a norm
# before the blocks, and blocks that are never fused (qk-norm, SwiGLU).
MODELS = (TOKEN, "deit_distilled", SCALED, "mae", "siglip_map", "clip", "qk_norm", "dinov2_swiglu")
ONE_HEAD = [name for name in MODELS if name != "deit_distilled"]


def cases() -> list[Any]:
    """Return every baseline on one model and some on the others, with alternating memory modes.

    The full suite has the whole grid.
    """
    found = []
    for i, model in enumerate(MODELS):
        names = [name for name in BASELINES if not name.startswith("mlp") or model in ONE_HEAD]
        for j, name in enumerate(names):
            for k, memory in enumerate(MEMORY_MODES):
                often = model == TOKEN or (i + j) % 3 == 0
                slow = not often or k != (i + j) % len(MEMORY_MODES)
                marks = [pytest.mark.full] if slow else []
                found.append(pytest.param(model, name, memory, marks=marks))
    return found


@pytest.mark.parametrize(("model", "method", "memory"), cases())
def test_logits_and_all_gradients(model: str, method: str, memory: str) -> None:
    tuned, plain = baseline_pair(families.build(model), BASELINES[method], memory)
    image = families.images(model)
    assert_same(tuned, plain, tuned(image), plain(image))
    with torch.no_grad():
        assert distance(tuned.forward_features(image), plain.features(image)) < 1e-10


@pytest.mark.parametrize("method", BASELINES)
def test_training_mode_leaves_the_backbone_in_eval_mode(method: str) -> None:
    base = families.build(TOKEN, proj_drop_rate=0.3, drop_path_rate=0.5, pos_drop_rate=0.3)
    tuned, plain = baseline_pair(base, BASELINES[method])
    tuned.train()
    image = families.images(TOKEN)
    assert_same(tuned, plain, tuned(image), plain(image))
    assert tuned.head.training
    own = ("adapter", "head_hidden", "head", "head_drop")
    for name, module in tuned.named_modules():
        assert module.training == (not name or any(part in name.split(".") for part in own)), name


@pytest.mark.parametrize(
    ("model", "attention", "memory"),
    [(TOKEN, "mask", "minimal"), (SCALED, "causal", "speed"), (SCALED, "mask", "speed")],
)
def test_adapters_under_a_mask(model: str, attention: str, memory: str) -> None:
    tuned, plain = baseline_pair(families.build(model), AdapterTuning(), memory)
    image = families.images(model)
    tokens = tuned.num_prefix_tokens + tuned.patch_embed.num_patches
    mask = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(3)) < 0.7
    given: Any = {"is_causal": True} if attention == "causal" else {"attn_mask": mask | mask.T}
    assert_same(tuned, plain, tuned(image, **given), plain(image, **given))


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("partial", "blocks.3"),
        ("bias", "blocks.1"),
        ("adapter", "blocks.1"),
        ("adapter", "blocks.2.norm2"),
        ("adapter", "blocks.3"),
        ("mlp-wide", "head"),
    ],
)
def test_a_hook_changes_nothing_and_sees_its_rows(method: str, where: str) -> None:
    tuned, plain = baseline_pair(families.build(TOKEN), BASELINES[method])
    seen = []
    hook = tuned.get_submodule(where).register_forward_hook(lambda m, x, y: seen.append(y.shape))
    image = families.images(TOKEN)
    output = tuned(image)
    hook.remove()
    assert_same(tuned, plain, output, plain(image))
    assert [*seen[0]] == ([2, 5] if where == "head" else [2, 10, 64])


# Numbers of fused blocks, of 4; the last computes only the row that the head reads.
FUSED = {
    "linear": 3,
    "full": 0,
    "partial": 3,
    "partial-2": 2,
    "bias": 0,
    "adapter": 3,
    "mlp-head": 3,
    "mlp-wide": 3,
}


@pytest.mark.parametrize("method", BASELINES)
def test_only_frozen_blocks_are_fused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, _ = baseline_pair(families.build(TOKEN), BASELINES[method])
    ran = spied(monkeypatch)
    tuned(families.images(TOKEN))
    assert indices(tuned, ran) == set(range(FUSED[method]))


def test_adapters_start_from_the_pretrained_function() -> None:
    image = families.images(SCALED)
    before = families.build(SCALED)(image)
    tuned = prompt_tune(families.build(SCALED), AdapterTuning())
    assert distance(tuned(image), before) < 1e-12
    tuned(image).square().sum().backward()
    for block in tuned.blocks:
        assert block.adapter.up.weight.grad.abs().min() > 0


def test_folded_weights_and_adapters() -> None:
    tuned, plain = baseline_pair(families.build(SCALED), AdapterTuning())
    fold_backbone(tuned)
    image = families.images(SCALED)
    assert_same(tuned, plain, tuned(image), plain(image))


@pytest.mark.parametrize("method", ["full", "partial", "bias"])
def test_trained_weights_are_not_folded(method: str) -> None:
    tuned = prompt_tune(families.build(TOKEN), BASELINES[method])
    with pytest.raises(ValueError, match="is trained"):
        fold_backbone(tuned)


def vit_base() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=10)


HEAD = 768 * 10 + 10
BLOCK = 4 * 768 + (768 * 2304 + 2304) + (768**2 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768)
COUNTS: dict[str, tuple[Callable[[], Any], int]] = {
    "full": (FullTuning, 12 * BLOCK + (3 * 16**2 + 1) * 768 + (1 + 197) * 768 + 2 * 768),
    "partial": (PartialTuning, BLOCK + 2 * 768),
    "partial-3": (lambda: PartialTuning(3), 3 * BLOCK + 2 * 768),
    # Biases of patch embedding, final norm, and norm1, qkv, proj, norm2, fc1, fc2 of each block.
    "bias": (BiasTuning, 768 + 12 * (768 + 2304 + 768 + 768 + 3072 + 768) + 768),
    "adapter": (AdapterTuning, 12 * (2 * 768 * 96 + 96 + 768)),
    "adapter-64": (lambda: AdapterTuning(64), 12 * (2 * 768 * 12 + 12 + 768)),
    "mlp-head": (MLPHead, 2 * (768 * 768 + 768)),
    # The last layer reads 100 channels, not 768.
    "mlp-100": (lambda: MLPHead(2, 100), 768 * 100 + 100 + (100 - 768) * 10),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_vit_base(name: str) -> None:
    build, expected = COUNTS[name]
    assert count_parameters(prompt_tune(vit_base(), build()))[0] == expected + HEAD


def test_counts_in_numbers() -> None:
    """The results of the arithmetic above."""
    figures = {name: count for name, (_, count) in COUNTS.items()}
    assert figures["full"] == 85_798_656
    assert figures["partial"] == 7_089_408
    assert figures["bias"] == 102_912
    assert figures["adapter"] == 1_779_840
    assert figures["mlp-head"] == 1_181_184


@pytest.mark.parametrize("method", BASELINES)
def test_layer_decay_groups(method: str) -> None:
    """timm's optimiser groups cover every trained parameter once."""
    tuned = prompt_tune(families.build(TOKEN), BASELINES[method])
    groups = param_groups_layer_decay(tuned, weight_decay=0.1, layer_decay=0.7)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for _, p in trainable_parameters(tuned))
