"""The rows of the last block that a head reads, computed by the fused function, as on a GPU.

The CPU's own implementation for one or two rows (`absorbed_attention`) is switched off here, and
the references compute, in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.plain import assert_same, distance, pair, redraw_prompts, tuned_gradients
from support.formulations.plain_vapt import ACTING, seeded, vapt_pair, weigh_down
from torch import Tensor

from vpt_fast import VAPT, AdapterTuning, LinearProbe, VPTDeep, prompt_tune
from vpt_fast.models.isotropic import block as blocks
from vpt_fast.models.isotropic import model as models
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.function import run_blocks, run_traced
from vpt_fast.ops.block.parts import BlockConfig, BlockWeights
from vpt_fast.ops.block.prompt_source import GIVEN_KV, ExpertPrompts, StaticPrompts
from vpt_fast.ops.block.sites import OPERATOR_SITES, REFERENCE_SITES
from vpt_fast.ops.memory_modes import MEMORY_MODES


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the number of rows asked of each fused block; fuse the last block as on a GPU."""
    asked: list[Any] = []
    forward = BlockSteps.forward

    def spy(self: BlockSteps, *arguments: Any) -> Any:
        asked.append(self.config.queries)
        return forward(self, *arguments)

    monkeypatch.setattr(BlockSteps, "forward", spy)
    for module in (blocks, models):
        monkeypatch.setattr(module, "uses_kernels", lambda x: True)
    return asked


METHODS: dict[str, Any] = {
    "linear": LinearProbe(),
    "deep": VPTDeep(3),
    "dropout": VPTDeep(3, dropout=0.4),
    "late": VPTDeep(3, blocks=[2]),
    "shared_projected": VPTDeep(3, shared=True, project_dim=6),
    "code": VAPT(3, **ACTING),
    "paper": VAPT(3, variant="paper", **ACTING),
}
FAMILIES = {"vit": 1, "deit_distilled": 2, "dinov2": 1, "no_affine": 1}
MODES = [pytest.param(m, marks=[] if m in ("speed", "minimal") else pytest.mark.full)
         for m in MEMORY_MODES]  # fmt: skip


def built(family: str) -> Any:
    if family == "no_affine":
        model = families.build("vit", depth=3)
        for block in model.blocks:
            block.norm1 = torch.nn.LayerNorm(64, elementwise_affine=False, dtype=torch.float64)
        return model.eval()
    return families.build(family, depth=3)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *[("vit", method) for method in METHODS],
        *[("deit_distilled", method) for method in ("deep", "code")],
        *[("dinov2", method) for method in ("deep", "code")],
        ("no_affine", "deep"),
        ("dinov2", "dropout"),
    ],
)
def test_logits_and_gradients(family: str, method: str, memory: str, queries: list[Any]) -> None:
    how = METHODS[method]
    pairs = vapt_pair if isinstance(how, VAPT) else pair
    tuned, plain = pairs(built(family), how, memory=memory)
    if method == "paper":
        weigh_down(tuned, plain.model)
    image = families.images("vit" if family == "no_affine" else family, batch=3)
    for training in (True, False):
        plain.training = training
        tuned.train(training)
        queries.clear()
        expected, output = seeded(plain, image), seeded(tuned, image)
        torch.manual_seed(99)
        assert_same(tuned, plain, output, expected)
        assert queries == [None, None, FAMILIES[family]]


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_with_an_adapter(memory: str, queries: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompt_tune(families.build("dinov2"), AdapterTuning(), memory=memory)
    redraw_prompts(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name:
                parameter.copy_(rand(*parameter.shape) / 4)
    image = families.images("dinov2", batch=3)
    output = model(image)
    assert queries == [None, None, 1]
    found = tuned_gradients(model, output)
    monkeypatch.undo()
    other = copy.deepcopy(model)
    right = other(image)
    assert distance(output, right) <= 1e-10
    for name, grad in tuned_gradients(other, right).items():
        assert distance(found[name], grad) <= 1e-10, name


# --- the function itself --------------------------------------------------------------------

KINDS = ("none", "keys", "static", "dropped", "experts", "paper", "folded")
BATCH, ROWS, WIDTH, HEADS, PROMPTS, GRID = 2, 5, 6, 2, 2, (2, 2)


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def weights() -> BlockWeights:
    hidden = 8
    return BlockWeights(
        1 + rand(WIDTH, seed=1) / 3, rand(WIDTH, seed=2),
        rand(3 * WIDTH, WIDTH) / 2, rand(3 * WIDTH), rand(WIDTH, WIDTH, seed=3) / 2,
        rand(WIDTH, seed=4), 1 + rand(WIDTH, seed=5) / 3, 1 + rand(WIDTH, seed=6) / 3,
        rand(WIDTH, seed=7), rand(hidden, WIDTH), rand(hidden), rand(WIDTH, hidden),
        rand(WIDTH, seed=8), branch_scale=1 + rand(WIDTH, seed=9) / 3,
    )  # fmt: skip


def sources(kind: str) -> tuple[Any, tuple[Any, ...]]:
    """Return a prompt source and its tensors."""
    if kind == "none":
        return None, ()
    if kind == "keys":
        return GIVEN_KV, (rand(1, PROMPTS, 2, HEADS, WIDTH // HEADS),)
    if kind == "static":
        return StaticPrompts(), (rand(1, PROMPTS, WIDTH), None)
    if kind == "dropped":
        return StaticPrompts(0.6), (rand(1, PROMPTS, WIDTH), rand(BATCH, PROMPTS, WIDTH) > -0.5)
    channel_mask = (rand(BATCH, WIDTH, seed=3) > -0.5).double() / 0.7
    hidden_mask = (rand(BATCH, PROMPTS, 3, seed=3) > -0.5).double() / 0.7
    applied = (
        1 + rand(WIDTH, seed=11) / 3, rand(WIDTH, seed=12), rand(PROMPTS), channel_mask,
        rand(3, WIDTH), rand(WIDTH, 3), hidden_mask,
    )  # fmt: skip
    if kind == "folded":
        mixing_weight = rand(PROMPTS, 4)
        tensors = mixing_weight, rand(PROMPTS, seed=5), *applied
        return ExpertPrompts(True, GRID, 0.1, True), tensors
    kernel = rand(1, 1, 2, 2)
    return ExpertPrompts(kind == "experts", GRID, 0.1), (rand(PROMPTS, 1), kernel, *applied)


@pytest.mark.parametrize("count", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_a_block(kind: str, count: int | None) -> None:
    """In every memory mode, as functions and as operators; each gradient alone as well."""
    source, tensors = sources(kind)
    w = weights()
    trained = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()
               and i not in ((5, 8) if len(tensors) == 9 else ())]  # fmt: skip

    def function(memory: str, sites: Any) -> Any:
        config = BlockConfig(HEADS, 0.6, 0.1, 0.2, "gelu", memory, source, None, count)

        def block(residual: Tensor, branch: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            found = list(tensors)
            for i, tensor in zip(trained, given, strict=True):
                found[i] = tensor
            if sites is OPERATOR_SITES:
                scale, dtype = w.branch_scale, torch.float64
                return run_traced(config, w, scale, dtype, residual, branch, tuple(found))
            steps = BlockSteps(config, w, torch.float64, sites)
            return run_blocks([steps], residual, branch, [tuple(found)])

        return block

    inputs = [rand(BATCH, ROWS, WIDTH, seed=21), rand(BATCH, ROWS, WIDTH, seed=22)]
    inputs += [tensors[i].clone() for i in trained]
    for tensor in inputs:
        tensor.requires_grad_()
    outputs, grads = [], []
    for memory in MEMORY_MODES:
        for sites in (REFERENCE_SITES, OPERATOR_SITES):
            block = function(memory, sites)
            if (memory, sites) == ("speed", REFERENCE_SITES):
                assert torch.autograd.gradcheck(block, inputs, fast_mode=True)
            outputs.append(block(*inputs))
            loss = sum((o.tanh() * o).sum() for o in outputs[-1])
            grads.append(torch.autograd.grad(loss, inputs))
    assert outputs[0][0].shape == (BATCH, count or ROWS, WIDTH)
    for found in zip(*outputs, strict=True), zip(*grads, strict=True):
        assert all(distance(one, each[0]) <= 1e-12 for each in found for one in each)
    # Inputs that need no gradient: the block's input, the prompts, one of its two outputs.
    block = function("lean", REFERENCE_SITES)
    for alone in ([0], [1], range(2, len(inputs))):
        if not alone:
            continue
        given = [t if i in alone else t.detach() for i, t in enumerate(inputs)]
        loss = sum((o.tanh() * o).sum() for o in block(*given))
        found = torch.autograd.grad(loss, [inputs[i] for i in alone])
        assert all(distance(f, grads[0][i]) <= 1e-12 for f, i in zip(found, alone, strict=True))
    for part in (0, 1):
        function_of = lambda *t, part=part: block(*t)[part]  # noqa: E731
        assert torch.autograd.gradcheck(function_of, inputs, fast_mode=True)
