"""Frozen weights edited between forward and backward: refused where backward would read them.

Autograd does not see the weights of a fused block; it would refuse with a RuntimeError of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE
from support.formulations.plain import distance, gradients, redraw_prompts, tuned_gradients
from torch import Tensor

from vpt_fast import VAPT, VPTDeep, prompt_tune
from vpt_fast.ops.block.projections import Projection
from vpt_fast.ops.block.prompt_kv import KVWeights, StaticKV, prompt_kv
from vpt_fast.ops.memory_modes import MEMORY_MODES

METHODS: dict[str, Any] = {
    "deep": VPTDeep(3),
    "dropout": VPTDeep(3, dropout=0.3),  # prompts that the blocks make themselves
    "vapt": VAPT(3),
}
REFUSED = "modified by an inplace operation"

# What backward reads in every mode: norm1 in front of the first block's prompts too.
READ = (
    "norm1.weight", "attn.qkv.weight", "attn.proj.weight", "ls1.gamma", "norm2.weight",
    "mlp.fc1.weight", "mlp.fc2.weight", "ls2.gamma",
)  # fmt: skip
# What is read besides where parts of forward are computed again.
READ_AGAIN = ("norm1.bias", "attn.qkv.bias", "attn.proj.bias", "norm2.bias", "mlp.fc1.bias")


def tuned(method: str, memory: str = "speed", dtype: torch.dtype = torch.float64) -> Any:
    base = families.build(AVERAGE, dtype=dtype, init_values=0.1)
    model = prompt_tune(base, METHODS[method], memory=memory).train()
    redraw_prompts(model)
    return model


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("method", METHODS)
def test_an_edited_weight_is_refused(method: str, memory: str) -> None:
    model, image = tuned(method, memory), families.images(AVERAGE)
    names = READ + (READ_AGAIN if memory in ("lean", "minimal") else ())
    for index in (0, 2):
        for name in names:
            loss = model(image).square().sum()
            with torch.no_grad():
                model.blocks[index].get_parameter(name).mul_(1)
            with pytest.raises(RuntimeError, match=REFUSED):
                loss.backward()
    model(image).square().sum().backward()


@pytest.mark.parametrize("name", ["blocks.0.prompt.tokens", "blocks.2.prompt.tokens"])
@pytest.mark.parametrize("method", ["deep", "dropout"])
def test_edited_prompts_are_refused(method: str, name: str) -> None:
    """As where the optimiser's step comes before backward."""
    model = tuned(method)
    loss = model(families.images(AVERAGE)).square().sum()
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()


def test_a_loaded_state_dict_is_refused_and_replaced_weights_are_not() -> None:
    """What was replaced is what the graph was made of; autograd holds it too."""
    model, image = tuned("deep"), families.images(AVERAGE)
    expected = tuned_gradients(model, model(image))
    output = model(image)
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=REFUSED):
        output.sum().backward()
    output, before = model(image), dict(model.named_parameters())
    before = {name: parameter for name, parameter in before.items() if parameter.requires_grad}
    doubled = {n: 2 * p.detach() for n, p in model.named_parameters() if "prompt" not in n}
    model.load_state_dict({**model.state_dict(), **doubled}, assign=True)
    assert distance(model(image), output) > 1e-3
    found = gradients(output, before)
    assert all(distance(found[name], expected[name]) == 0 for name in expected)


def test_edits_before_forward_and_after_backward_are_anybodys_right() -> None:
    model, image = tuned("deep"), families.images(AVERAGE)
    for _ in range(2):
        with torch.no_grad():
            model.blocks[1].attn.qkv.weight.mul_(1.1)
        model(image).sum().backward()
    with torch.no_grad():
        found = model(image)
        model.blocks[1].attn.qkv.weight.mul_(1.1)
    assert not found.requires_grad


def test_under_autocast_the_copies_are_what_backward_reads() -> None:
    """Matrices may change: their copies do not. Norms are read as they are."""
    model, image = tuned("deep", dtype=torch.float32), families.images(AVERAGE).float()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(image)

    expected = tuned_gradients(model, forward())
    output = forward()
    with torch.no_grad():
        for name in ("attn.qkv.weight", "mlp.fc1.weight"):
            model.blocks[1].get_parameter(name).mul_(2)
    found = tuned_gradients(model, output)
    assert all(distance(found[name], expected[name]) == 0 for name in expected)
    output = forward()
    assert distance(tuned_gradients(model, output)["blocks.1.prompt.tokens"],
                    expected["blocks.1.prompt.tokens"]) > 1e-3  # fmt: skip
    output = forward()
    with torch.no_grad():
        model.blocks[1].norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match=REFUSED):
        output.float().sum().backward()


def kv_weights(
    blocks: int = 2, affine: bool = True, apart: bool = False, centred: bool = True
) -> KVWeights:
    """Draw weights for D = 6, A = 4, H = 2; keys and values in one projection, or `apart`."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    none: list[Tensor | None] = [None] * blocks
    rows = [4, 4] if apart else [8]
    projections = [
        [Projection(rand(count, 6), rand(count) if affine else None) for count in rows]
        for _ in range(blocks)
    ]
    return KVWeights(
        [rand(6) for _ in range(blocks)] if affine else none,
        [rand(6) for _ in range(blocks)] if affine else none,
        projections,
        0.1,
        centred,
        2,
    )


def keys_of(weights: KVWeights, rows: Any, more: Any = ()) -> Any:
    """Return keys and values of two blocks' prompts."""
    sources = [*zip(rows, more, strict=True)] if more else [(row,) for row in rows]
    return prompt_kv(StaticKV(weights, [0, 1], bool(more)), torch.float64, sources)


def tokens(blocks: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(blocks, 3, 6, generator=generator, dtype=torch.float64)
    return [row.clone().requires_grad_() for row in rows]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck_of_prompt_keys(affine: bool, apart: bool, centred: bool) -> None:
    weights = kv_weights(affine=affine, apart=apart, centred=centred)
    assert torch.autograd.gradcheck(lambda *rows: keys_of(weights, rows), tokens())
    # Of keys that nobody reads, and of prompts that are not trained.
    assert torch.autograd.gradcheck(lambda *rows: keys_of(weights, rows)[1], tokens()[1:] * 2)
    first, second = tokens()
    first.requires_grad_(False)
    keys = keys_of(weights, [first, second])
    assert torch.autograd.grad(keys[0].sum() + keys[1].sum(), second)[0].shape == (3, 6)
    unused = keys_of(weights, tokens())[0]
    assert unused.shape == (1, 3, 2, 2, 2)


def test_gradcheck_with_more_keys_and_values() -> None:
    """They follow those of the prompts as they are, of either block or of none that is read."""
    weights = kv_weights()
    generator = torch.Generator().manual_seed(5)
    more = torch.randn(2, 1, 4, 2, 2, 2, generator=generator, dtype=torch.float64)
    own = [t.clone().requires_grad_() for t in more]
    kv = keys_of(weights, tokens(), own)
    assert kv[0].shape == (1, 7, 2, 2, 2) and torch.equal(kv[1][:, 3:], own[1])
    assert torch.equal(kv[0][:, :3], keys_of(weights, tokens())[0])
    for read in (slice(None), slice(1, 2)):
        assert torch.autograd.gradcheck(
            lambda *t, read=read: keys_of(weights, t[:2], t[2:])[read], (*tokens(), *own)
        )
    frozen = [row.detach() for row in tokens()]
    grads = torch.autograd.grad(sum(t.sum() for t in keys_of(weights, frozen, own)), own)
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)


def test_weights_of_the_prompts_keys_are_refused() -> None:
    for field in ("norm_weights", "weights"):
        for index in (0, 1):
            weights, rows = kv_weights(), tokens()
            keys = keys_of(weights, rows)
            changed = getattr(weights, field)[index]
            (changed if field == "norm_weights" else changed[0]).mul_(2)
            with pytest.raises(RuntimeError, match=REFUSED):
                (keys[0].sum() + keys[1].sum()).backward()


def test_second_derivatives_are_refused() -> None:
    """At once, not where somebody asks for the second, who may get none where inputs are named."""
    rows = tokens()
    keys = keys_of(kv_weights(), rows)
    with pytest.raises(RuntimeError, match="no second derivatives where backward is recorded"):
        torch.autograd.grad(keys[0].square().sum(), rows[0], create_graph=True)
    model = tuned("deep")
    parameter = model.blocks[1].prompt.tokens
    loss = model(families.images(AVERAGE)).square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives where backward is recorded"):
        torch.autograd.grad(loss, parameter, create_graph=True)
