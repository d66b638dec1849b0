"""VAPT computes the same function as its plain formulation, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import assert_same, distance, redraw_prompts
from support.formulations.plain_vapt import (
    ACTING,
    STILL,
    PlainVAPT,
    compare,
    seeded,
    vapt_pair,
    weigh_down,
)

from vpt_fast import VAPT, prompt_tune

FAMILIES = (
    TOKEN,
    AVERAGE,
    "vit_oblong",
    "vit_grey",
    "deit_distilled",
    "deit3",
    "clip",
    "dinov2_swiglu",
    "dinov2_registers",
    "siglip_map",
    "siglip_average",
    "no_bias",
    "aimv2",
    "qk_norm",
    "qk_norm_rms",
    "wide_heads",
    "average_with_prefix",
    "max_pool",
    "all_tokens",
    "no_positions",
    "headless",
)
IN_DEPTH = ("vit_32px", "deit_distilled")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_logits_and_gradients(family: str, variant: str) -> None:
    tuned, plain = vapt_pair(families.build(family), VAPT(3, variant=variant, **ACTING))
    compare(tuned, plain, families.images(family))


@pytest.mark.parametrize("family", IN_DEPTH)
@pytest.mark.parametrize("p", [1, 3, 20])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_kernels_and_numbers_of_prompts(family: str, p: int, kernel: int, variant: str) -> None:
    """A kernel of 3 covers the whole 3 x 3 grid of all families but the first."""
    tuned, plain = vapt_pair(
        families.build(family), VAPT(p, kernel_size=kernel, variant=variant, **ACTING)
    )
    if variant == "paper" and kernel != 2:
        weigh_down(tuned, plain.model)
    compare(tuned, plain, families.images(family, batch=1 if p == 20 else 3))


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize(
    ("family", "kernel", "size"),
    [
        (TOKEN, 2, (16, 16)),
        (TOKEN, 2, (16, 48)),
        (TOKEN, 3, (40, 24)),
        ("siglip_map", 4, (32, 32)),
        ("one_patch", 1, (8, 8)),
        ("deit_distilled", 1, (8, 24)),
    ],
)
def test_grids_down_to_the_kernel(
    variant: str, family: str, kernel: int, size: tuple[int, int]
) -> None:
    method = VAPT(3, kernel_size=kernel, variant=variant, **ACTING)
    tuned, plain = vapt_pair(families.build(family, img_size=size), method)
    rows, columns = (side // 8 - kernel + 1 for side in size)
    assert tuned.state_dict()["blocks.1.prompt.mix.weight"].shape == (3, rows * columns)
    if variant == "paper":
        weigh_down(tuned, plain.model)
    compare(tuned, plain, torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("field", ["dropout", "projector_dropout", "channel_dropout"])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_each_dropout_alone(field: str, variant: str) -> None:
    method = VAPT(5, variant=variant, **{**STILL, field: 0.5})
    tuned, plain = vapt_pair(families.build(TOKEN), method)
    compare(tuned, plain, families.images(TOKEN, batch=3))


@pytest.mark.parametrize("hidden", [1, 16])
def test_hidden_width(hidden: int) -> None:
    tuned, plain = vapt_pair(families.build(TOKEN), VAPT(3, hidden_dim=hidden, **ACTING))
    assert tuned.state_dict()["prompt_projector.up.weight"].shape == (64, hidden)
    compare(tuned, plain, families.images(TOKEN))


@pytest.mark.parametrize("field", ["dropout", "projector_dropout", "channel_dropout"])
def test_masks_differ_by_image_and_step(field: str) -> None:
    tuned, _ = vapt_pair(families.build(TOKEN), VAPT(8, **{**STILL, field: 0.5}))
    image = families.images(TOKEN, batch=1).expand(2, -1, -1, -1)
    tuned.train()
    output = seeded(tuned, image)
    assert distance(output[0], output[1]) > 1e-3
    assert distance(tuned(image), output) > 1e-3
    assert torch.equal(seeded(tuned, image), output)
    tuned.eval()
    assert torch.equal(tuned(image), tuned(image))


def test_every_field_changes_the_function() -> None:
    """So the tests above would notice a wrong variant, kernel or width."""
    image, outputs = families.images(TOKEN), {}
    changes: list[dict[str, Any]] = [{}, {"variant": "paper"}, {"kernel_size": 1}]
    for change in [*changes, {"kernel_size": 3}, {"hidden_dim": 4}, {"num_prompts": 4}]:
        tuned = prompt_tune(families.build(TOKEN), dataclasses.replace(VAPT(3), **change))
        redraw_prompts(tuned)
        with torch.no_grad():
            outputs[str(change)] = tuned.eval()(image)
    for one, found in outputs.items():
        for other, compared in outputs.items():
            assert one == other or distance(found, compared) > 1e-3, f"{one} is {other}"


def test_prompts_depend_on_the_image() -> None:
    """In every block except the first."""
    _, plain = vapt_pair(families.build(TOKEN), VAPT(3))
    rows = torch.randn(2, 10, 64, dtype=torch.float64)
    alike = rows[:1].expand(2, -1, -1)
    assert distance(*plain.prompt(0, 2, rows)) == 0
    for index in (1, 2, 3):
        assert distance(*plain.prompt(index, 2, rows)) > 1e-2
        assert distance(*plain.prompt(index, 2, alike)) <= 1e-12


@pytest.mark.parametrize("mode", [True, False])
def test_distilled_training_returns_both_heads(mode: bool) -> None:
    base = families.build("deit_distilled")
    base.set_distilled_training(True)
    tuned, plain = vapt_pair(base, VAPT(3, **ACTING))
    image = families.images("deit_distilled")
    plain.training = mode
    torch.manual_seed(4)
    rows = plain.features(image)
    heads = plain.model.head(rows[:, 0]), plain.model.head_dist(rows[:, 1])
    output = seeded(tuned.train(mode), image)
    assert isinstance(output, tuple) is mode
    assert_same(tuned, plain, output, heads if mode else sum(heads) / 2)


@pytest.mark.parametrize("family", [TOKEN, "deit_distilled", "siglip_map", "dinov2_registers"])
def test_batch_mates_do_not_matter(family: str) -> None:
    tuned, _ = vapt_pair(families.build(family), VAPT(3))
    tuned.eval()
    image = families.images(family, batch=5)
    with torch.no_grad():
        together = tuned(image)
        alone = torch.cat([tuned(image[i : i + 1]) for i in range(5)])
        turned = tuned(image.flip(0)).flip(0)
    assert distance(alone, together) <= 1e-12
    assert distance(turned, together) <= 1e-12
    assert distance(together[:1], together[1:2]) > 1e-3


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_gradient_of_the_image(variant: str) -> None:
    """It flows through the experts too, whose prompts depend on the image."""
    tuned, plain = vapt_pair(families.build(TOKEN), VAPT(3, variant=variant, **ACTING))
    ours, theirs = (families.images(TOKEN).requires_grad_() for _ in range(2))
    plain.training = True
    seeded(tuned.train(), ours).tanh().sum().backward()
    seeded(plain, theirs).tanh().sum().backward()
    assert distance(ours.grad, theirs.grad) <= 1e-10


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_nothing_stale_after_a_change(variant: str) -> None:
    """Optimiser steps, edits in place and loaded weights take effect immediately."""
    method = VAPT(3, variant=variant, **STILL)
    base, untouched = families.build(TOKEN), families.build(TOKEN)
    tuned, image = prompt_tune(base, method).train(), families.images(TOKEN)
    redraw_prompts(tuned)
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        plain = PlainVAPT(untouched, method, tuned.state_dict())
        assert_same(tuned, plain, tuned(image), plain(image))
        optimiser.zero_grad()
        tuned(image).square().sum().backward()
        optimiser.step()
    tuned.eval()
    with torch.no_grad():
        tuned(image)
        redraw_prompts(tuned, seed=8)
        plain = PlainVAPT(untouched, method, tuned.state_dict())
        assert distance(tuned(image), plain(image)) <= 1e-10
        other = families.build(TOKEN, seed=9)
        tuned.load_state_dict(other.state_dict(), strict=True)
        plain = PlainVAPT(other, method, tuned.state_dict())
        assert distance(tuned(image), plain(image)) <= 1e-10


@pytest.mark.parametrize("family", [TOKEN, "deit_distilled", "siglip_map"])
def test_no_prompts_is_the_base_model(family: str) -> None:
    base, image = families.build(family), families.images(family)
    with torch.no_grad():
        expected = base(image)
    tuned = prompt_tune(base, VAPT(0)).train()
    assert distance(tuned(image), expected) <= 1e-12


def test_awkward_batches() -> None:
    """Empty batches, and images that are not contiguous."""
    tuned, plain = vapt_pair(families.build(TOKEN), VAPT(3))
    tuned.eval()
    assert tuned(families.images(TOKEN, batch=0)).shape == (0, families.CLASSES)
    image = families.images(TOKEN)
    for view in (image.to(memory_format=torch.channels_last), image.flip(2).transpose(2, 3)):
        assert distance(tuned(view), plain(view.contiguous())) <= 1e-10


def test_backbone_dropout_and_drop_path_are_off() -> None:
    rates = ("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate")
    base = families.build(TOKEN, drop_path_rate=0.5, **dict.fromkeys(rates, 0.3))
    tuned, plain = vapt_pair(base, VAPT(3, **ACTING))
    compare(tuned, plain, families.images(TOKEN))


def test_one_block_has_static_prompts_only() -> None:
    tuned, plain = vapt_pair(families.build("one_block"), VAPT(3, dropout=0.4))
    assert [name for name in tuned.state_dict() if "prompt" in name] == ["blocks.0.prompt.tokens"]
    compare(tuned, plain, families.images("one_block"))
