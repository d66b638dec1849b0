"""A tuned model computes the same function as the plain formulation, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.formulations import families
from support.formulations.families import AVERAGE, FAMILIES, TOKEN
from support.formulations.fixed_masks import FixedMasks
from support.formulations.plain import VARIANTS, Plain, assert_same, distance, pair, redraw_prompts
from torch import Tensor

from vpt_fast import VPTDeep, VPTShallow, prompt_tune

EVERYWHERE = ("shallow", "deep", "gaps", "last_only", "shared", "projected")
IN_DEPTH = (TOKEN, AVERAGE, "deit_distilled", "dinov2_registers", "siglip_map")
CASES = [
    (family, variant)
    for family in FAMILIES
    for variant in VARIANTS
    if (variant in EVERYWHERE or family in IN_DEPTH) and (family, variant) != ("headless", "linear")
]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_logits_and_gradients(family: str, variant: str) -> None:
    method = VARIANTS[variant](families.depth(family))
    tuned, plain = pair(families.build(family), method)
    image = families.images(family)
    expected = plain(image)
    tuned.train()
    assert_same(tuned, plain, tuned(image), expected)
    tuned.eval()
    with torch.no_grad():
        assert distance(tuned(image), expected) <= 1e-10
    with torch.inference_mode():
        assert distance(tuned(image), expected) <= 1e-10


def test_every_variant_is_another_function() -> None:
    """The comparison above distinguishes every variant from every other one."""
    image, outputs = families.images(TOKEN), {}
    for variant, method in VARIANTS.items():
        if variant in ("deep_one", "deep_many"):
            continue
        tuned = prompt_tune(families.build(TOKEN), method(families.depth(TOKEN)))
        redraw_prompts(tuned)
        with torch.no_grad():
            outputs[variant] = tuned(image)
    for one, found in outputs.items():
        for other, compared in outputs.items():
            assert one == other or distance(found, compared) > 1e-3, f"{one} is {other}"


def test_blocks_in_any_order_and_kind() -> None:
    image, outputs = families.images(TOKEN), []
    for blocks in ([2, 0], (0, 2), range(0, 4, 2)):
        tuned = prompt_tune(families.build(TOKEN), VPTDeep(3, blocks=blocks))
        redraw_prompts(tuned)
        outputs.append(tuned(image))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


DROPOUT = {
    "shallow": VPTShallow(3, dropout=0.4),
    "deep": VPTDeep(3, dropout=0.4),
    "gaps": VPTDeep(3, dropout=0.4, blocks=[0, 2]),
    "shared": VPTDeep(3, dropout=0.4, shared=True),
    "projected": VPTDeep(3, dropout=0.4, project_dim=6),
    "shallow_projected": VPTShallow(3, dropout=0.4, project_dim=6),
}


@pytest.mark.parametrize("family", [TOKEN, "deit_distilled", "siglip_map", "no_bias", "qk_norm"])
@pytest.mark.parametrize("variant", DROPOUT)
def test_prompt_dropout(family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same masks on both sides: one per image, prompted block and step."""
    tuned, plain = pair(families.build(family), DROPOUT[variant])
    image, masks = families.images(family, batch=3), FixedMasks()
    monkeypatch.setattr(F, "dropout", masks)
    plain.training = True
    expected, theirs = plain(image), list(masks.shapes)
    masks.shapes.clear()
    tuned.train()
    output, ours = tuned(image), list(masks.shapes)
    assert len(ours) == len(theirs) == len(plain.blocks), f"masks drawn: {ours}, not {theirs}"
    assert_same(tuned, plain, output, expected)
    plain.training = False
    tuned.eval()
    assert distance(tuned(image), plain(image)) <= 1e-10


@pytest.mark.parametrize("method", [VPTShallow(8, dropout=0.5), VPTDeep(8, dropout=0.5)])
def test_prompt_dropout_differs_by_image_and_step(method: Any) -> None:
    tuned, plain = pair(families.build(TOKEN), method)
    image = families.images(TOKEN, batch=1).expand(2, -1, -1, -1)
    tuned.train()
    torch.manual_seed(3)
    output, again = tuned(image), tuned(image)
    assert distance(output[0], output[1]) > 1e-3
    assert distance(output, again) > 1e-3
    torch.manual_seed(3)
    assert torch.equal(output, tuned(image))
    tuned.eval()
    assert torch.equal(tuned(image), tuned(image))
    assert distance(tuned(image), plain(image)) <= 1e-10


@pytest.mark.parametrize("family", [f for f in FAMILIES if families.pools_patches(f)])
@pytest.mark.parametrize(
    "method",
    [
        VPTShallow(3, pool_prompts=True),
        VPTDeep(3, pool_prompts=True),
        VPTDeep(3, blocks=[0], pool_prompts=True),
        VPTDeep(3, shared=True, project_dim=6, pool_prompts=True),
    ],
    ids=["shallow", "deep", "first_only", "shared_projected"],
)
def test_prompts_in_the_pooling(family: str, method: Any) -> None:
    tuned, plain = pair(families.build(family), method)
    image = families.images(family)
    tuned.train()
    assert_same(tuned, plain, tuned(image), plain(image))
    plain.pool_prompts = False
    assert distance(tuned(image), plain(image)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [VPTShallow(0), VPTDeep(0), VPTDeep(0, blocks=[0], shared=True)],
    ids=["shallow", "deep", "shared"],
)
def test_no_prompts_is_the_base_model(family: str, method: Any) -> None:
    base, image = families.build(family), families.images(family)
    with torch.no_grad():
        expected, features = base(image), base.forward_features(image)
    tuned = prompt_tune(base, method).train()
    output = tuned(image)
    assert distance(output, expected) <= 1e-12
    assert distance(tuned.forward_features(image), features) <= 1e-12
    if family != "headless":
        output.square().sum().backward()
        assert tuned.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["shallow", "deep"])
def test_batch_mates_do_not_matter(family: str, variant: str) -> None:
    tuned, _ = pair(families.build(family), VARIANTS[variant](families.depth(family)))
    image = families.images(family, batch=5)
    with torch.no_grad():
        together = tuned(image)
        alone = torch.cat([tuned(image[i : i + 1]) for i in range(5)])
        turned = tuned(image.flip(0)).flip(0)
    assert distance(alone, together) <= 1e-12
    assert distance(turned, together) <= 1e-12
    assert distance(together[:1], together[1:2]) > 1e-3


@pytest.mark.parametrize("variant", ["shallow", "deep", "middle_only"])
def test_distilled_training_returns_both_heads(variant: str) -> None:
    base = families.build("deit_distilled")
    base.set_distilled_training(True)
    tuned, plain = pair(base, VARIANTS[variant](3))
    image = families.images("deit_distilled")
    rows = plain.features(image)
    expected = plain.model.head(rows[:, 0]), plain.model.head_dist(rows[:, 1])
    tuned.train()
    output = tuned(image)
    assert isinstance(output, tuple)
    assert_same(tuned, plain, output, expected)
    tuned.eval()
    assert distance(tuned(image), sum(expected) / 2) <= 1e-10


def _masks(tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(tokens, tokens, generator=generator) > 0.4
    seen |= torch.eye(tokens, dtype=torch.bool)
    each = torch.rand(2, 1, tokens, tokens, generator=generator) > 0.4
    bias = torch.randn(2, 2, tokens, tokens, generator=generator, dtype=torch.float64)
    return {"shared": seen, "per_image": each | torch.eye(tokens, dtype=torch.bool), "bias": bias}


@pytest.mark.parametrize("kind", ["shared", "per_image", "bias"])
@pytest.mark.parametrize("variant", ["shallow", "deep", "gaps", "first", "last_only"])
def test_attention_mask(kind: str, variant: str) -> None:
    """The mask is over tokens; prompts are seen by all of them."""
    tuned, plain = pair(families.build(TOKEN), VARIANTS[variant](families.depth(TOKEN)))
    image = families.images(TOKEN)
    mask = _masks(10)[kind]
    expected = plain(image, mask)
    assert distance(plain(image), expected) > 1e-3
    tuned.train()
    assert_same(tuned, plain, tuned(image, attn_mask=mask), expected)
    features = tuned.forward_features(image, attn_mask=mask)
    assert distance(features, plain.features(image, mask)) <= 1e-10


@pytest.mark.parametrize("variant", ["deep", "last_only"])
def test_attention_mask_over_keys(variant: str) -> None:
    """A mask over keys, broadcast over heads and queries, hides tokens, never prompts."""
    tuned, plain = pair(families.build(TOKEN), VARIANTS[variant](families.depth(TOKEN)))
    image = families.images(TOKEN)
    keys = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    keys[0, ..., 6:] = keys[1, ..., 2:4] = False
    expected = plain(image, keys.expand(-1, -1, 10, -1))
    assert distance(tuned(image, attn_mask=keys), expected) <= 1e-10


@pytest.mark.parametrize("variant", ["shallow", "deep"])
def test_causal_attention_is_not_ignored(variant: str) -> None:
    """Causal over tokens as in timm, or refused by name; never silently ignored."""
    tuned, plain = pair(families.build(TOKEN), VARIANTS[variant](families.depth(TOKEN)))
    image = families.images(TOKEN)
    try:
        output = tuned(image, is_causal=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert "is_causal" in str(error)
        return
    lower = torch.ones(10, 10, dtype=torch.bool).tril()
    assert distance(output, plain(image, lower)) <= 1e-10


def test_causal_attention_without_prompts() -> None:
    """A linear probe takes timm's own masks."""
    tuned, plain = pair(families.build(TOKEN), VARIANTS["linear"](4))
    image = families.images(TOKEN)
    assert distance(tuned(image, is_causal=True), plain.model(image, is_causal=True)) <= 1e-10


@pytest.mark.parametrize("variant", ["linear", "shallow", "deep", "middle_only"])
def test_gradient_of_the_image(variant: str) -> None:
    """The gradient of the image (saliency, attacks) equals timm's."""
    tuned, plain = pair(families.build(TOKEN), VARIANTS[variant](families.depth(TOKEN)))
    ours, theirs = (families.images(TOKEN).requires_grad_() for _ in range(2))
    tuned.train()
    tuned(ours).tanh().sum().backward()
    plain(theirs).tanh().sum().backward()
    assert ours.grad is not None
    assert distance(ours.grad, theirs.grad) <= 1e-10


@pytest.mark.parametrize("variant", ["shallow", "deep", "shared", "projected", "last"])
def test_nothing_stale_after_a_change(variant: str) -> None:
    """Optimiser steps, edits in place and loaded weights take effect in the next call."""
    method = VARIANTS[variant](families.depth(TOKEN))
    base = families.build(TOKEN)
    untouched = copy.deepcopy(base)
    tuned, image = prompt_tune(base, method).train(), families.images(TOKEN)
    redraw_prompts(tuned)
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        output = tuned(image)
        plain = Plain(untouched, method, tuned.state_dict())
        assert_same(tuned, plain, output, plain(image))
        optimiser.zero_grad()
        tuned(image).square().sum().backward()
        optimiser.step()
    tuned.eval()
    with torch.no_grad():
        tuned(image)
        redraw_prompts(tuned, seed=8)
        plain = Plain(untouched, method, tuned.state_dict())
        assert distance(tuned(image), plain(image)) <= 1e-10
        other = families.build(TOKEN, seed=9)
        tuned.load_state_dict(other.state_dict(), strict=False)
        plain = Plain(other, method, tuned.state_dict())
        assert distance(tuned(image), plain(image)) <= 1e-10


@pytest.mark.parametrize("variant", ["shallow", "deep", "first"])
def test_awkward_batches(variant: str) -> None:
    """An empty batch, and images that are not contiguous."""
    tuned, plain = pair(families.build(TOKEN), VARIANTS[variant](families.depth(TOKEN)))
    assert tuned(families.images(TOKEN, batch=0)).shape == (0, families.CLASSES)
    image = families.images(TOKEN)
    for view in (image.to(memory_format=torch.channels_last), image.flip(2).transpose(2, 3)):
        assert distance(tuned(view), plain(view.contiguous())) <= 1e-10


def test_backbone_dropout_and_drop_path_are_off() -> None:
    """The backbone stays in eval mode: its dropout and drop path do not act in training."""
    rates = ("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate")
    base = families.build(TOKEN, drop_path_rate=0.5, **dict.fromkeys(rates, 0.3))
    tuned, plain = pair(base, VPTDeep(3))
    image = families.images(TOKEN)
    tuned.train()
    assert_same(tuned, plain, tuned(image), plain(image))
