"""prompt_kv that are computed for several blocks at once equal those of each block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import (
    assert_same,
    distance,
    gradients,
    pair,
    redraw_prompts,
    tuned_gradients,
)
from support.formulations.plain_vapt import ACTING, seeded, vapt_pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpt_fast import VAPT, VPTDeep, VPTShallow, prompt_tune
from vpt_fast.ops.block.prompt_kv import KVWeights
from vpt_fast.ops.memory_modes import MEMORY_MODES


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record for how many blocks each call computes prompt_kv."""
    counts: list[int] = []
    prompt_kv = KVWeights.prompt_kv

    def spy(self: KVWeights, dtype: torch.dtype, tokens: Any, more: Any = ()) -> Any:
        counts.append(len(tokens))
        return prompt_kv(self, dtype, tokens, more)

    monkeypatch.setattr(KVWeights, "prompt_kv", spy)
    return counts


def assert_equal(model: Any, plain: Any, image: Tensor) -> None:
    plain.training = model.training
    expected, output = seeded(plain, image), seeded(model, image)
    assert_same(model, plain, output, expected)


# Method, and for how many of four blocks prompt_kv are computed together.
METHODS: dict[str, tuple[Any, list[int]]] = {
    "deep": (VPTDeep(3), [3]),
    "shared_projected": (VPTDeep(3, shared=True, project_dim=6), [3]),
    "last": (VPTDeep(3, blocks=[2, 3]), []),
    "first": (VPTDeep(3, blocks=[0, 1, 2]), []),
    "dropout": (VPTDeep(3, dropout=0.4), []),
    "shallow": (VPTShallow(3), []),
    "vapt": (VAPT(3, **ACTING), []),
}


@pytest.mark.parametrize("method", METHODS)
def test_prompt_kv_are_computed_together_where_possible(method: str, together: list[int]) -> None:
    """On the CPU, without the last block if the head reads one row of it."""
    how, expected = METHODS[method]
    base, image = families.build(TOKEN), families.images(TOKEN, batch=3)
    tuned, plain = vapt_pair(base, how) if isinstance(how, VAPT) else pair(base, how)
    assert_equal(tuned.train(), plain, image)
    assert together == expected
    together.clear()
    assert_equal(tuned.eval(), plain, image)
    assert together == ([3] if method == "dropout" else expected)


def _fewer_prompts(model: Any) -> None:
    tokens = model.blocks[1].prompt.tokens
    model.blocks[1].prompt.tokens = nn.Parameter(tokens.detach()[:2].clone())


def _norms(*blocks: int, bias: bool = False) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for index in blocks:
            norm = nn.LayerNorm(64, eps=1e-6, elementwise_affine=bias, bias=False)
            model.blocks[index].norm1 = norm.double().requires_grad_(False)

    return change


def _eps(model: Any) -> None:
    model.blocks[1].norm1.eps = 0.5


def _heads(model: Any) -> None:
    attn = model.blocks[1].attn
    attn.num_heads, attn.head_dim, attn.scale = 4, 16, 0.25


def _no_bias(model: Any) -> None:
    model.blocks[1].attn.qkv.bias = None


FORMS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "fewer_prompts": (_fewer_prompts, []),
    "one_without_affine": (_norms(1), []),
    "all_but_one_without_affine": (_norms(0, 1), []),
    "all_without_affine": (_norms(0, 1, 2), [3]),
    "one_without_bias": (_norms(2, bias=True), []),
    "all_without_bias": (_norms(0, 1, 2, bias=True), [3]),
    "eps": (_eps, []),
    "heads": (_heads, []),
    "no_qkv_bias": (_no_bias, [3]),
}


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_other_forms(form: str, together: list[int]) -> None:
    change, expected = FORMS[form]
    model = prompt_tune(families.build(AVERAGE), VPTDeep(3)).train()
    redraw_prompts(model)
    change(model)
    image = families.images(AVERAGE)
    output = model(image)
    assert together == expected
    found = tuned_gradients(model, output)
    apart = copy.deepcopy(model)
    apart.blocks[0].mlp.register_forward_hook(lambda *_: None)  # disables looking ahead
    right = apart(image)
    assert together == expected and distance(output, right) <= 1e-10
    for name, grad in tuned_gradients(apart, right).items():
        assert distance(found[name], grad) <= 1e-10, name


@pytest.mark.parametrize("where", ["", "attn", "mlp.fc2", "prompt"])
def test_a_hook_may_change_the_blocks_after_it(where: str, together: list[int]) -> None:
    tuned, plain = pair(families.build(AVERAGE), VPTDeep(3))
    image = families.images(AVERAGE)
    before = tuned(image).detach()
    for model in (tuned, plain.model):
        with torch.no_grad():
            model.blocks[2].norm1.weight.mul_(1.5)
    with torch.no_grad():
        plain.trained["blocks.2.prompt.tokens"].mul_(2)
    expected = plain(image)
    with torch.no_grad():
        tuned.blocks[2].norm1.weight.div_(1.5)
    together.clear()

    def change(*_: Any) -> None:
        with torch.no_grad():
            tuned.blocks[2].norm1.weight.mul_(1.5)
            tuned.blocks[2].prompt.tokens.mul_(2)

    module = tuned.blocks[0].get_submodule(where)
    handle = module.register_forward_hook(change)
    output = tuned(image)
    handle.remove()
    assert not together and distance(before, expected) > 1e-3
    assert_same(tuned, plain, output, expected)


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("method", ["deep", "vapt"])
def test_several_passes_of_one_model(method: str, memory: str) -> None:
    """Two forward passes before one backward, accumulation, and a retained graph."""
    how = VPTDeep(3) if method == "deep" else VAPT(3)
    model = prompt_tune(families.build(TOKEN), how, memory=memory)
    redraw_prompts(model)
    first, second = (families.images(TOKEN, seed=seed) for seed in (1, 2))
    separate = [tuned_gradients(model, model(image)) for image in (first, second)]
    total = {name: sum(grads[name] for grads in separate) for name in separate[0]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def assert_total(found: dict[str, Any]) -> None:
        assert max(distance(found[name], total[name]) for name in total) <= 1e-10

    def loss(output: Tensor) -> Tensor:
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(11),
                             dtype=torch.float64)  # fmt: skip
        return (weight * output.tanh()).sum()

    both = [loss(model(image)) for image in (first, second)]
    grads = torch.autograd.grad(sum(both), [*trained.values()])
    assert_total(dict(zip(trained, grads, strict=True)))
    for image in (first, second):
        loss(model(image)).backward()
    assert_total({name: parameter.grad for name, parameter in trained.items()})
    model.zero_grad()
    retained = loss(model(first))
    retained.backward(retain_graph=True)
    retained.backward()
    for name, parameter in trained.items():
        assert distance(parameter.grad, 2 * separate[0][name]) <= 1e-10


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_gradients_pass_through_frozen_experts(memory: str) -> None:
    tuned, plain = vapt_pair(families.build(AVERAGE), VAPT(3), memory=memory)
    image = families.images(AVERAGE)
    expected = plain(image)
    for name in list(plain.trained):
        if "prompt" in name and not name.startswith("blocks.0."):
            tuned.get_parameter(name).requires_grad_(False)
            del plain.trained[name]
    assert_same(tuned, plain, tuned(image), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["deep", "dropout", "vapt"])
def test_under_checkpoint_and_offloading(method: str, reentrant: bool) -> None:
    how = VAPT(3, **ACTING) if method == "vapt" else METHODS[method][0]
    model = prompt_tune(families.build(AVERAGE), how, memory="lean").train()
    redraw_prompts(model)
    image = families.images(AVERAGE).requires_grad_()
    expected = tuned_gradients(model, seeded(model, image))
    torch.manual_seed(4)
    found = checkpoint(model, image, use_reentrant=reentrant)
    if reentrant:  # fills .grad only
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(11),
                             dtype=torch.float64)  # fmt: skip
        (weight * found.tanh()).sum().backward()
        grads: Any = {name: parameter.grad for name, parameter in trained.items()}
    else:
        grads = tuned_gradients(model, found)
    assert max(distance(grads[name], expected[name]) for name in expected) <= 1e-10
    with torch.autograd.graph.save_on_cpu():
        output = seeded(model, image)
    grads = tuned_gradients(model, output)
    assert max(distance(grads[name], expected[name]) for name in expected) <= 1e-10


def test_some_blocks_of_a_model() -> None:
    """`forward_until` and `forward_from` look ahead over their own blocks only."""
    tuned, plain = pair(families.build(AVERAGE), VPTDeep(3))
    image = families.images(AVERAGE)
    for first in (0, 1, 2, 3):
        output = tuned.forward_from(tuned.forward_until(image, first), first)
        assert_same(tuned, plain, output, plain(image))
    rows = tuned.forward_until(image, 2)
    trained = {f"blocks.{i}": tuned.blocks[i].prompt.tokens for i in (0, 1)}
    assert all(bool(grad.abs().sum() > 0) for grad in gradients(rows, trained).values())
