"""Fused blocks in low precision: no further from float64 than eager PyTorch's own blocks.

Eager means timm's blocks with concatenated prompts in the same dtype, with the same values. Both
errors are sums of random roundings: for one tensor of one model their ratio lies between 0.5 and 2.
The tests compare its geometric mean over models, dtypes and blocks, whose standard deviation is
0.02 to 0.06 (0.1 for one kind of tensor): `SLACK` and `KIND_SLACK` are about three of them.
Observed means are 1, or less where prompts are held in fp32.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support.formulations.families import randomise
from support.formulations.fixed_masks import FixedMasks
from support.formulations.plain import gradients, pair, redraw_prompts, tuned_gradients
from support.formulations.plain_vapt import STILL, seeded, vapt_pair
from torch import Tensor, nn

from vpt_fast import VAPT, VPTDeep, VPTShallow
from vpt_fast.backbones.demo_backbone import demo_backbone
from vpt_fast.ops.memory_modes import MEMORY_MODES

SLACK, KIND_SLACK = 1.15, 1.5
SEEDS = 4
LOW = ("bfloat16", "float16", "autocast_bfloat16")
METHODS: dict[str, Any] = {
    "deep": VPTDeep(4),
    "deep_dropout": VPTDeep(4, dropout=0.3),
    "shallow": VPTShallow(4),
    "code": VAPT(4, **STILL),
    "paper": VAPT(4, variant="paper", **STILL),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: models this small are slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_vit(seed: int, depth: int, **more: Any) -> nn.Module:
    """Build a ViT with weights of order one, its residual stream growing as in trained models."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", depth=depth, **{**sizes, **more})
    model = model.double().eval()
    randomise(model, seed)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight /= depth**0.5
    return model


def demo(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return demo_backbone().double().eval()


def offset(model: nn.Module, size: float) -> None:
    """Add a constant to every channel of every token, which LayerNorm removes."""
    with torch.no_grad():
        model.pos_embed += size


def massive(model: nn.Module, size: float = 40.0) -> None:
    """Add massive activations: three channels far above the rest, largest in one token."""
    with torch.no_grad():
        model.pos_embed[..., [3, 17, 40]] += torch.tensor([size, -size, size / 2]).double()
        model.pos_embed[:, 5, 17] *= 3


def norm_offset(model: nn.Module) -> None:
    """Add an offset to the residual stream in every block, so that it grows with depth."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.bias += 1.5
            block.mlp.fc2.bias += 1.5


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model to `dtype` and to float64, so that storing parameters adds no error."""
    return model.to(dtype).double()


def error(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    assert found.isfinite().all()
    return float((found - truth).norm() / truth.norm())


def errors(
    base: nn.Module, method: Any, how: str, memory: str, seed: int
) -> dict[str, list[tuple[float, float]]]:
    """Return errors of the output and of every gradient, ours and eager's, by kind of tensor."""
    dtype, autocast = getattr(torch, how.rpartition("_")[2]), how.startswith("autocast")
    stored = torch.float32 if autocast else dtype
    base = rounded(base, stored)
    pairs = vapt_pair if isinstance(method, VAPT) else pair
    tuned, truth = pairs(base, method, memory=memory)
    redraw_prompts(tuned, seed=seed)
    tuned.to(stored)
    for name, leaf in truth.trained.items():
        leaf.data.copy_(tuned.get_parameter(name))
    generator = torch.Generator().manual_seed(seed)
    size = truth.model.patch_embed.img_size
    image = torch.randn(4, 3, *size, generator=generator).to(stored)
    truth.training = True
    eager = truth.narrowed(stored)
    eager.training = True
    expected = seeded(masked(truth, dtype), image.double())
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        theirs = seeded(masked(eager, dtype), image)
        ours = seeded(masked(tuned.train(), dtype), image)
    right = gradients(expected, truth.trained)
    found, other = tuned_gradients(tuned, ours), gradients(theirs, eager.trained)
    values = {"output": [(error(ours, expected), error(theirs, expected))]}
    for name, value in right.items():
        kind = name.rpartition("prompt.")[2]
        values.setdefault(kind, []).append((error(found[name], value), error(other[name], value)))
    return values


class TypedMasks(FixedMasks):
    """FixedMasks in the input's dtype."""

    def __call__(self, input: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return super().__call__(input, *arguments, **named).to(input.dtype)


def masked(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Wrap a function so that its dropout masks depend on their number and shape, not on dtype."""

    def call(image: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "dropout", TypedMasks())
            return function(image)

    return call


def within_budget(
    make: Callable[[int], nn.Module], method: Any, memory: str, seeds: int = SEEDS
) -> None:
    """Assert errors within the slack of eager's, by kind of tensor and overall."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for how in LOW:
        for seed in range(seeds):
            for kind, both in errors(make(seed), method, how, memory, seed).items():
                kinds.setdefault(kind, []).extend(both)
    logs = {kind: torch.tensor(both).log().mean(0) for kind, both in kinds.items()}
    eager = {kind: float(log[1].exp()) for kind, log in logs.items()}
    assert max(eager.values()) < 0.3, f"eager is too far off to compare with: {eager}"
    ratios = {kind: float((log[0] - log[1]).exp()) for kind, log in logs.items()}
    assert max(ratios.values()) <= KIND_SLACK, f"errors as multiples of eager's: {ratios}"
    total = torch.tensor([*ratios.values()]).log().mean().exp()
    assert total <= SLACK, f"errors are {total:.3f} times eager's: {ratios}"


def modes(*axes: Any) -> list[Any]:
    """Return the product of the axes, each case with one of the memory modes, which alternate.

    One mode per case is enough, since all modes give the same bits (see below).
    """
    cases = itertools.product(*axes)
    return [(*case, MEMORY_MODES[index % 4]) for index, case in enumerate(cases)]


def quick(cases: list[Any], shifts: dict[str, Any]) -> list[Any]:
    """Mark cases whose shift is not among their method's as full."""
    return [
        pytest.param(*case, marks=() if case[1] in shifts[case[0]] else pytest.mark.full)
        for case in cases
    ]


@pytest.mark.parametrize(("method", "memory"), modes(METHODS))
def test_random_weights(method: str, memory: str) -> None:
    # If the head reads one row, the last block is not fused, and redraws its masks in backward.
    pool = {"global_pool": "avg"} if method == "deep_dropout" else {}
    within_budget(lambda seed: random_vit(seed, 4, **pool), METHODS[method], memory)


SHIFTS: dict[str, Callable[[nn.Module], None]] = {
    "offset": lambda model: offset(model, 5.0),
    "large_offset": lambda model: offset(model, 50.0),
    "massive": massive,
    "norm_offset": norm_offset,
}


@pytest.mark.parametrize(
    ("method", "shift", "memory"),
    quick(modes(["deep", "code"], SHIFTS), {"deep": SHIFTS, "code": ["large_offset", "massive"]}),
)
def test_offsets_and_massive_channels(method: str, shift: str, memory: str) -> None:
    def make(seed: int) -> nn.Module:
        model = random_vit(seed, 4, init_values=1.0 if seed % 2 else None)
        SHIFTS[shift](model)
        return model

    within_budget(make, METHODS[method], memory)


@pytest.mark.parametrize(
    ("depth", "method", "seeds", "memory"),
    [
        (12, "deep", 3, "minimal"),
        pytest.param(12, "code", 8, "lean", marks=pytest.mark.full),
        pytest.param(24, "deep", 6, "balanced", marks=pytest.mark.full),
        pytest.param(24, "code", 8, "speed", marks=pytest.mark.full),
    ],
)
def test_many_blocks(depth: int, method: str, seeds: int, memory: str) -> None:
    within_budget(lambda seed: random_vit(seed, depth), METHODS[method], memory, seeds)


@pytest.mark.parametrize(
    ("method", "shift", "memory"),
    quick(
        modes(["deep", "shallow", "code"], ["", "large_offset", "massive"]),
        {"deep": ["", "massive"], "shallow": ["large_offset"], "code": ["", "large_offset"]},
    ),
)
def test_demo_weights(method: str, shift: str, memory: str) -> None:
    """The shipped backbone's weights, also with residual streams as in larger models."""

    def make(seed: int) -> nn.Module:
        model = demo(seed)
        if shift:
            SHIFTS[shift](model)
        return model

    within_budget(make, METHODS[method], memory)


@pytest.mark.covering
@pytest.mark.parametrize("how", ["float32", *LOW])
@pytest.mark.parametrize("method", METHODS)
def test_modes_give_the_same_bits(method: str, how: str) -> None:
    """Backward recomputes with the same operations on the same values."""
    dtype, autocast = getattr(torch, how.rpartition("_")[2]), how.startswith("autocast")
    base = demo(0).to(torch.float32 if autocast else dtype)
    image = torch.randn(3, 3, 32, 32).to(base.pos_embed.dtype)
    pairs, results = vapt_pair if isinstance(METHODS[method], VAPT) else pair, []
    for memory in MEMORY_MODES:
        tuned, _ = pairs(copy.deepcopy(base), METHODS[method], memory=memory)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            output = seeded(tuned.train(), image)
        torch.manual_seed(99)
        results.append([output, *tuned_gradients(tuned, output).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
