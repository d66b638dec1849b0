"""Fused blocks against the plain formulation in float64: families x methods x memory modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import (
    Plain,
    assert_same,
    distance,
    pair,
    redraw_prompts,
    tuned_gradients,
)
from support.formulations.plain_vapt import ACTING, STILL, seeded, vapt_pair, weigh_down
from torch import nn

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow
from vpt_fast.ops.memory_modes import MEMORY_MODES


def _norms_without_affine(model: nn.Module) -> None:
    for block in model.blocks:
        width = block.attn.proj.out_features
        block.norm1 = nn.LayerNorm(width, elementwise_affine=False, dtype=torch.float64)
        block.norm2 = nn.LayerNorm(width, eps=1e-3, bias=False, dtype=torch.float64)


# Name to family, arguments of timm's, and a change to the model.
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[nn.Module], None] | None]] = {
    "vit": (TOKEN, {"depth": 3}, None),
    "average": (AVERAGE, {}, None),
    "layer_scale": ("dinov2", {}, None),
    "layer_scale_average": ("dinov2", {"global_pool": "avg"}, None),
    "no_bias": ("no_bias", {}, None),
    "no_affine": (AVERAGE, {}, _norms_without_affine),
    "registers": ("dinov2_registers", {}, None),
    "distilled": ("deit_distilled", {}, None),
    "map_pooling": ("siglip_map", {}, None),
    "clip": ("clip", {"depth": 3}, None),
    "gelu_tanh": (AVERAGE, {"act_layer": "gelu_tanh"}, None),
    "silu": (AVERAGE, {"act_layer": "silu"}, None),
    "relu": (AVERAGE, {"act_layer": "relu"}, None),
    "wide_heads": ("wide_heads", {}, None),
    "qk_norm": ("qk_norm", {}, None),
    "swiglu": ("dinov2_swiglu", {}, None),
    "rms_norm": ("qk_norm_rms", {}, None),
}

METHODS: dict[str, Any] = {
    "linear": LinearProbe(),
    "shallow": VPTShallow(3, dropout=0.4),
    "shallow_projected": VPTShallow(3, project_dim=6),
    "deep": VPTDeep(3),
    "deep_dropout": VPTDeep(3, dropout=0.4),
    "gaps": VPTDeep(3, dropout=0.4, blocks=[0, 2]),
    "late": VPTDeep(3, dropout=0.4, blocks=[1]),
    "shared_projected": VPTDeep(3, dropout=0.4, shared=True, project_dim=6),
    "code": VAPT(3, **ACTING),
    "paper": VAPT(3, variant="paper", **ACTING),
    "code_still": VAPT(3, kernel_size=1, **STILL),
}
POOLED: dict[str, Any] = {
    "shallow_pooled": VPTShallow(3, pool_prompts=True),
    "deep_pooled": VPTDeep(3, dropout=0.4, pool_prompts=True),
    "first_pooled": VPTDeep(3, blocks=[0], pool_prompts=True),
}


def built(name: str) -> nn.Module:
    family, arguments, edit = MODELS[name]
    model = families.build(family, **arguments)
    if edit is not None:
        edit(model)
    return model.eval()


def tuned_with(name: str, method: Any, memory: str) -> tuple[nn.Module, Plain]:
    if isinstance(method, VAPT):
        return vapt_pair(built(name), method, memory=memory)
    return pair(built(name), method, memory)


def compare(name: str, method: Any, memory: str) -> None:
    """Assert equal logits and gradients, with dropout, and without it.

    Backward uses the masks of forward, though the generator's state differs.
    """
    tuned, plain = tuned_with(name, method, memory)
    if getattr(method, "variant", "") == "paper":
        weigh_down(tuned, plain.model)
    image = families.images(MODELS[name][0], batch=3)
    plain.training = True
    tuned.train()
    expected, output = seeded(plain, image), seeded(tuned, image)
    torch.manual_seed(99)
    assert_same(tuned, plain, output, expected)
    plain.training = False
    if method.num_prompts and any(getattr(method, field, 0.0) for field in ACTING):
        assert distance(plain(image), expected) > 1e-4, "no dropout acted"
    with torch.no_grad():
        assert distance(tuned.eval()(image), plain(image)) <= 1e-10


def grid(names: Iterable[str], methods: Iterable[str], stride: int = 4) -> list[Any]:
    """Return models x methods x modes; all but a subset that covers each are marked `full`."""
    cases = []
    for i, name in enumerate(names):
        pools = families.pools_patches(MODELS[name][0])
        for j, method in enumerate(m for m in methods if pools or m not in POOLED):
            for k, memory in enumerate(MEMORY_MODES):
                chosen = (i + j) % stride == 0 and (i + j // 2) % len(MEMORY_MODES) == k
                marks = [] if chosen else [pytest.mark.full]
                cases.append(pytest.param(name, method, memory, marks=marks))
    return cases


@pytest.mark.parametrize(("name", "method", "memory"), grid(MODELS, {**METHODS, **POOLED}))
def test_logits_and_gradients(name: str, method: str, memory: str) -> None:
    compare(name, {**METHODS, **POOLED}[method], memory)


@pytest.mark.parametrize(
    ("name", "method", "memory"),
    grid(
        ("average", "layer_scale", "clip"),
        ("shallow", "gaps", "shared_projected", "code", "paper"),
        stride=2,
    ),
)
def test_fused_is_unfused(name: str, method: str, memory: str) -> None:
    """With a hook that does nothing, a block runs module by module and computes the same."""
    tuned, _ = tuned_with(name, METHODS[method], memory)
    image = families.images(MODELS[name][0], batch=3)
    tuned.train()
    fused = seeded(tuned, image)
    torch.manual_seed(99)
    expected = tuned_gradients(tuned, fused)
    for block in tuned.blocks:
        block.mlp.register_forward_hook(lambda *_: None)
    unfused = seeded(tuned, image)
    torch.manual_seed(98)
    found = tuned_gradients(tuned, unfused)
    assert distance(unfused, fused) <= 1e-10
    assert max(distance(found[key], expected[key]) for key in expected) <= 1e-10


@pytest.mark.parametrize(
    ("name", "method", "memory"),
    grid(
        ("vit", "average", "layer_scale_average"),
        ("shallow", "deep", "gaps", "late", "code"),
        stride=2,
    ),
)
def test_gradient_of_the_image(name: str, method: str, memory: str) -> None:
    """The gradient passes through prompted blocks and the plain blocks before them."""
    tuned, plain = tuned_with(name, METHODS[method], memory)
    ours, theirs = (families.images(MODELS[name][0]).requires_grad_() for _ in range(2))
    plain.training = True
    tuned.train()
    seeded(plain, theirs).tanh().sum().backward()
    output = seeded(tuned, ours)
    torch.manual_seed(99)
    output.tanh().sum().backward()
    assert ours.grad is not None
    assert distance(ours.grad, theirs.grad) <= 1e-10


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("method", ["deep", "code"])
def test_some_prompts_are_frozen(method: str, memory: str) -> None:
    """Frozen prompts have no gradient, and those of the others do not change."""
    tuned, plain = tuned_with("average", METHODS[method], memory)
    image = families.images(AVERAGE)
    plain.training = True
    tuned.train()
    frozen = [n for n in plain.trained if n.startswith(("blocks.0.prompt", "blocks.1.prompt.mix"))]
    assert frozen
    for name in frozen:
        tuned.get_parameter(name).requires_grad_(False)
        plain.trained[name].requires_grad_(False)
    expected, output = seeded(plain, image), seeded(tuned, image)
    plain.trained = {n: leaf for n, leaf in plain.trained.items() if n not in frozen}
    assert_same(tuned, plain, output, expected)
    assert all(tuned.get_parameter(name).grad is None for name in frozen)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_recomputation_uses_the_weights_of_the_current_step(memory: str) -> None:
    """Checked over three steps of an optimiser."""
    tuned, plain = tuned_with("average", METHODS["deep_dropout"], memory)
    image = families.images(AVERAGE)
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    plain.training = True
    tuned.train()
    for seed in range(3):
        plain = Plain(plain.model, METHODS["deep_dropout"], tuned.state_dict())
        plain.training = True
        expected = seeded(plain, image, seed=seed)
        assert_same(tuned, plain, seeded(tuned, image, seed=seed), expected)
        optimiser.zero_grad()
        tuned(image).square().sum().backward()
        optimiser.step()
    redraw_prompts(tuned, seed=12)
    plain = Plain(plain.model, METHODS["deep_dropout"], tuned.state_dict())
    assert distance(tuned.eval()(image), plain(image)) <= 1e-10
