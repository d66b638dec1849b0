"""What VAPT trains: names, shapes, counts and initialisation; every expert learns."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import gradients, tuned_gradients
from support.formulations.plain_vapt import STILL, PlainVAPT, prompt_names, vapt_pair
from torch import Tensor, nn

from vpt_fast import (
    VAPT,
    count_parameters,
    prompt_tune,
    remove_prompts,
    trainable_parameters,
)

COUNTS = {
    "code": {1: 31_866, 10: 55_608, 50: 161_128, 100: 293_028},
    "paper": {1: 31_855, 10: 55_498, 50: 160_578, 100: 291_928},
}


@pytest.mark.parametrize("variant", COUNTS)
def test_published_parameter_counts(variant: str) -> None:
    """ViT-B/16 at 224 px without a head."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    total = sum(parameter.numel() for parameter in model.parameters())
    for p, count in COUNTS[variant].items():
        tuned = prompt_tune(model, VAPT(p, variant=variant))
        assert count_parameters(tuned) == (count, total + count)
        remove_prompts(tuned)


@pytest.mark.parametrize(
    "family", [TOKEN, "vit_oblong", "deit_distilled", "siglip_map", "dinov2_registers", "one_block"]
)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_state_dict_names_and_shapes(family: str, variant: str) -> None:
    base, depth, method = families.build(family), families.depth(family), VAPT(3, variant=variant)
    plain = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    heads = {n for n, _ in base.named_parameters() if n.startswith(("head.", "head_dist."))}
    width, (rows, columns) = base.embed_dim, base.patch_embed.grid_size
    shapes = {
        "tokens": (3, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "conv.weight": (1, 1, 2, 2),
        "mix.weight": (3, (rows - 1) * (columns - 1)),
        "mix.bias": (3,),
        "down.weight": (8, width),
        "up.weight": (width, 8),
    }
    tuned = prompt_tune(base, method)
    found = {name: tuple(value.shape) for name, value in tuned.state_dict().items()}
    names = prompt_names(method, depth)
    assert set(names) == set(found) - set(plain)
    assert {name: found[name] for name in plain} == plain
    for name in names:
        assert found[name] == shapes[".".join(name.split(".")[-2:]).replace("prompt.", "")], name
    assert {name for name, _ in trainable_parameters(tuned)} == heads | set(names)
    assert {value.dtype for value in tuned.state_dict().values()} == {torch.float64}


def drawn(name: str, seeds: int, method: VAPT, **arguments: Any) -> Tensor:
    """Return initial values of `name` in every block except the first, over many seeds."""
    base = families.create(TOKEN, embed_dim=16, num_heads=1, depth=12, **arguments)
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        state = prompt_tune(base, method).state_dict()
        found += [state[f"blocks.{i}.prompt.{name}"].flatten() for i in range(1, 12)]
        remove_prompts(base)
    assert not torch.equal(found[0], found[1])
    return torch.cat(found)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_kernels_are_initialised_as_standard_normal(variant: str) -> None:
    values = drawn("conv.weight", 20, VAPT(1, kernel_size=3, variant=variant))
    assert values.numel() == 20 * 11 * 9
    assert values.mean().abs() < 0.08
    assert values.std() == pytest.approx(1, rel=0.06)
    assert values.pow(4).mean() == pytest.approx(3, rel=0.2), "not normal"


def _uniform(values: Tensor, bound: float) -> None:
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.98 * bound
    assert values.mean().abs() < 0.06 * bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.04)


def test_the_paper_variants_projector_is_initialised_as_a_linear() -> None:
    """The fan-in is 2 x 2 positions: U(-1/2, 1/2)."""
    _uniform(drawn("mix.weight", 4, VAPT(50, variant="paper")), 0.5)
    _uniform(drawn("mix.weight", 4, VAPT(50, variant="paper", kernel_size=3)), 1.0)


def test_the_code_variants_projector_starts_at_zero() -> None:
    for name in ("mix.weight", "mix.bias"):
        torch.manual_seed(0)
        state = prompt_tune(families.build(TOKEN), VAPT(3)).state_dict()
        for index in (1, 2, 3):
            assert not state[f"blocks.{index}.prompt.{name}"].any()


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_initialisation_of_static_prompts_norms_and_feature_projector(variant: str) -> None:
    """Block 0 as in VPT: U(-v, v) with v = sqrt(6 / (3 * patch_h * patch_w + D))."""
    torch.manual_seed(0)
    base = families.build("vit_oblong")
    state = prompt_tune(base, VAPT(100, variant=variant, hidden_dim=50)).state_dict()
    _uniform(state["blocks.0.prompt.tokens"], math.sqrt(6 / (3 * 8 * 10 + 64)))
    assert torch.equal(state["blocks.1.prompt.norm.weight"], torch.ones(64).double())
    assert torch.equal(state["blocks.1.prompt.norm.bias"], torch.zeros(64).double())
    _uniform(state["prompt_projector.down.weight"], 1 / 8)
    _uniform(state["prompt_projector.up.weight"], 1 / math.sqrt(50))


def test_initialisation_follows_the_seed() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(prompt_tune(families.build(TOKEN), VAPT(3)).state_dict())
    for name in prompt_names(VAPT(3), 4):
        assert torch.equal(states[0][name], states[1][name])
        constant = name.rpartition("prompt.")[2] in (
            "norm.weight",
            "norm.bias",
            "mix.weight",
            "mix.bias",
        )
        assert torch.equal(states[0][name], states[2][name]) is constant


def experts(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the experts' parameters, without block 0's prompts and the head."""
    return {n: g for n, g in found.items() if "prompt" in n and not n.endswith("tokens")}


def begin(variant: str) -> tuple[nn.Module, PlainVAPT, Tensor]:
    torch.manual_seed(0)
    method = VAPT(3, variant=variant, **STILL)
    tuned, plain = vapt_pair(families.build(TOKEN), method, redraw=False)
    return tuned.train(), plain, families.images(TOKEN)


def test_a_zero_projector_would_never_train_in_the_paper_variant() -> None:
    """As relu'(0) = 0, no expert parameter gets a gradient, as in the plain formulation."""
    tuned, plain, image = begin("paper")
    with torch.no_grad():
        for name, parameter in [*tuned.named_parameters(), *plain.trained.items()]:
            if name.endswith("mix.weight"):
                parameter.zero_()
    for found in (tuned_gradients(tuned, tuned(image)), gradients(plain(image), plain.trained)):
        assert len(experts(found)) == 3 * 4 + 2
        for name, gradient in experts(found).items():
            assert not gradient.any(), f"{name} has a gradient"
        assert found["blocks.0.prompt.tokens"].any()


def test_every_expert_trains_from_the_first_step_in_the_paper_variant() -> None:
    tuned, plain, image = begin("paper")
    for found in (tuned_gradients(tuned, tuned(image)), gradients(plain(image), plain.trained)):
        for name, gradient in experts(found).items():
            assert gradient.any(), f"{name} has no gradient"


def test_the_token_wise_projector_trains_first_in_the_code_variant() -> None:
    """At the first step no other expert parameter has a gradient, at the second all have one.

    mix.bias has one at the first step, too, but only by rounding: norm1 removes what it adds.
    """
    tuned, plain, image = begin("code")
    for found in (tuned_gradients(tuned, tuned(image)), gradients(plain(image), plain.trained)):
        for name, gradient in experts(found).items():
            if not name.endswith("mix.bias"):
                assert bool(gradient.any()) is name.endswith("mix.weight"), name
            else:
                scale = found[name.replace("bias", "weight")].norm()
                assert gradient.norm() <= 1e-10 * scale
    optimiser = torch.optim.SGD([p for _, p in trainable_parameters(tuned)], lr=1e-3)
    tuned(image).tanh().sum().backward()
    optimiser.step()
    for name, gradient in experts(tuned_gradients(tuned, tuned(image))).items():
        assert gradient.any(), f"{name} has no gradient"


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_step_changes_prompts_and_head_only(variant: str, optimiser: Any) -> None:
    """Even if the optimiser gets all parameters, with weight decay."""
    tuned, _ = vapt_pair(families.build(TOKEN), VAPT(3, variant=variant))
    before = copy.deepcopy(tuned.state_dict())
    step = optimiser(tuned.parameters(), lr=0.1, weight_decay=0.1)
    tuned.train()(families.images(TOKEN)).square().sum().backward()
    step.step()
    changed = {n for n, v in tuned.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {name for name, _ in trainable_parameters(tuned)}
