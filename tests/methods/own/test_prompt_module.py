"""Modules of methods of one's own: what they are given, initial values, terms of the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.formulations import eva_families, families, plain_swin
from support.formulations.plain import distance
from test_module_refusals import made
from test_registry import _settings, as_before  # noqa: F401
from torch import Tensor, nn

from vpt_fast import (
    BlockInfo,
    FrozenWeights,
    LinearProbe,
    PromptModule,
    VPTDeep,
    initialise,
    prompt_tune,
    register_method,
    regularisation,
    remove_prompts,
    trainable_parameters,
)
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.images import Batch
from vpt_fast.train.loop.step import TrainStep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_modules_get_the_models_dtype_and_leave_the_generator(dtype: torch.dtype) -> None:
    method = made(lambda m, f: m.tokens * f.mean(), "feature", _Mean)
    base = families.build("vit").to(dtype)
    tuned: Any = prompt_tune(base, method(3))
    assert {p.dtype for _, p in trainable_parameters(tuned)} == {dtype}
    assert tuned.prompt_shared.steps.dtype == torch.int64


def test_trying_a_module_draws_nothing() -> None:
    """Random numbers after tuning do not depend on what a module draws when it is tried."""
    drawn = []
    for noise in (False, True):
        method = made(lambda m, noise=noise: m.tokens + (torch.rand(3, 1) if noise else 0))
        torch.manual_seed(5)
        prompt_tune(families.build("vit"), method(3))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


class _Mean(nn.Module):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((1, 2))

    def regulariser(self) -> Tensor:
        return self.scale.square().sum()


def test_block_info() -> None:
    seen: list[BlockInfo] = []

    class Own(PromptModule):
        def __init__(self, method: Any, block: BlockInfo) -> None:
            super().__init__()
            seen.append(block)
            self.tokens = block.new_parameter(2, block.width)
            bound = (6 / (3 * block.patch_size[0] * block.patch_size[1] + block.width)) ** 0.5
            assert self.tokens.abs().max() <= bound and self.tokens.std() > bound / 3

        def forward(self) -> Tensor:
            return self.tokens

    settings = _settings()
    register_method("own", settings)(Own)
    prompt_tune(families.build("dinov2_registers"), settings(2))
    assert [(b.index, b.depth, b.width, b.num_heads, b.head_dim) for b in seen] == [
        (i, 3, 64, 2, 32) for i in range(3)
    ]
    assert {(b.grid, b.num_prefix_tokens, b.num_tokens, b.patch_size) for b in seen} == {
        ((3, 3), 5, 14, (8, 8))
    }
    seen.clear()
    prompt_tune(plain_swin.build("tiny"), settings(2))
    assert [(b.index, b.width, b.grid, b.num_prefix_tokens, b.head_dim) for b in seen] == [
        (0, 16, (7, 9), 0, 8), (1, 16, (7, 9), 0, 8), (2, 32, (4, 5), 0, 16),
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["vit", "dinov3", "rope_mixed", "swin"])
def test_initialise_gets_the_plain_models_block_inputs(family: str) -> None:
    got: dict[int, tuple[Tensor, FrozenWeights]] = {}

    class Own(PromptModule):
        def __init__(self, method: Any, block: BlockInfo) -> None:
            super().__init__()
            self.index = block.index
            self.tokens = block.new_parameter(2, block.width)

        def forward(self) -> Tensor:
            return self.tokens

        def initialise(self, inputs: Tensor, weights: FrozenWeights) -> None:
            assert not torch.is_grad_enabled()
            got[self.index] = inputs.clone(), weights
            self.tokens.copy_(inputs.mean((0, 1)))

    settings = _settings()
    register_method("own", settings)(Own)
    source: Any = {"vit": families, "swin": plain_swin}.get(family, eva_families)
    name = "tiny" if family == "swin" else family
    base, images = source.build(name), source.images(name, batch=5)
    plain = copy.deepcopy(base)
    expected: list[Tensor] = []
    blocks = [m for m in plain.modules() if hasattr(m, "norm1")]
    for block in blocks:
        block.register_forward_pre_hook(lambda m, args: expected.append(args[0]))
    with torch.no_grad():
        plain(images)
    tuned: Any = prompt_tune(base, settings(2))
    assert initialise(tuned, [images[:2].float(), images[2:]]) == 5
    assert tuned.tune_record.initialised == {"images": 5}
    for index, (block, x) in enumerate(zip(blocks, expected, strict=True)):
        found, weights = got[index]
        want = x.reshape(5, -1, x.shape[-1])
        assert distance(found[2:], want[2:]) <= 1e-12 and distance(found[:2], want[:2]) <= 1e-5
        y = block.norm1(want)
        kinds = [F.linear(y, *weights[i]) for i in (1, 2, 3)]
        assert [t.shape[-1] for t in kinds] == [block.attn.proj.in_features] * 3
        assert weights.proj[0] is not None and weights.norm1 is not None
        prompt = [m for m in tuned.modules() if isinstance(m, Own)][index]
        assert distance(prompt.tokens, found.mean((0, 1)).expand(2, -1)) == 0
    assert prompt_tune(families.build("vit"), VPTDeep(2)) is not None
    with pytest.raises(ValueError, match="is initialised from images: give some"):
        initialise(tuned, [])


def test_initialise_where_there_is_nothing_to_do() -> None:
    assert initialise(prompt_tune(families.build("vit"), VPTDeep(2)), []) == 0
    with pytest.raises(ValueError, match="is not tuned; call prompt_tune first"):
        initialise(families.build("vit"), [])


def test_regularisation_is_added_to_the_loss_once() -> None:
    """By steps in one part or several, and to the loss that is reported."""

    class Own(PromptModule):
        def __init__(self, method: Any, block: BlockInfo) -> None:
            super().__init__()
            self.tokens = block.new_parameter(2, block.width)

        def forward(self) -> Tensor:
            return self.tokens

        def regulariser(self) -> Tensor:
            return 0.3 * self.tokens.square().sum()

    settings = _settings()
    register_method("own", settings, _Mean)(Own)
    assert regularisation(prompt_tune(families.build("vit"), VPTDeep(2))) == 0
    images, labels = families.images("vit", batch=4).float(), torch.tensor([0, 1, 2, 3])
    found = []
    for parts in (0, 1, 3):
        torch.manual_seed(3)
        tuned: Any = prompt_tune(families.build("vit").float(), settings(2)).train()
        term = sum(0.3 * b.prompt.tokens.square().sum() for b in tuned.blocks)
        term = term + tuned.prompt_shared.scale.square().sum()
        assert distance(regularisation(tuned), term) <= 1e-6
        if parts:
            step = TrainStep(tuned, Recipe(epochs=1, lr=1e-9, accumulation=parts), 1)
            sums = step(Batch(images, labels, []))
            assert sums is not None
            reported = float(sums[0] / sums[2])
        else:
            loss = F.cross_entropy(tuned(images), labels) + term
            loss.backward()
            reported = float(loss.detach())
        found.append((reported, [p.grad.clone() for _, p in trainable_parameters(tuned)]))
    for reported, grads in found[1:]:
        assert abs(reported - found[0][0]) <= 1e-4
        for grad, want in zip(grads, found[0][1], strict=True):
            assert distance(grad, want) <= 1e-4
    remove_prompts(tuned)
    assert regularisation(prompt_tune(tuned, LinearProbe())) == 0


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(1, 2)])
def test_a_term_of_the_loss_is_a_scalar(value: Tensor) -> None:
    method = made(lambda m: m.tokens)
    tuned: Any = prompt_tune(families.build("vit"), method(2))
    kind: Any = type(tuned.blocks[0].prompt)
    kind.regulariser = lambda self: value
    with pytest.raises(ValueError, match="regulariser of Own returned a tensor of shape .*scalar"):
        regularisation(tuned)
    for scalar in (2.0, torch.full((1, 1), 2.0)):
        kind.regulariser = lambda self, scalar=scalar: scalar
        assert regularisation(tuned) == 8 and regularisation(tuned).shape == ()
