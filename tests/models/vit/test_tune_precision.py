"""Gradient checkpointing, low precision and torch.compile compute the same function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import (
    VARIANTS,
    Plain,
    assert_same,
    distance,
    gradients,
    pair,
    redraw_prompts,
    tuned_gradients,
)
from torch import Tensor, nn

from vpt_fast import VPTDeep, VPTShallow, prompt_tune

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("family", [TOKEN, "deit_distilled", "siglip_map"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_nothing(family: str, variant: str) -> None:
    tuned, plain = pair(families.build(family), VARIANTS[variant](families.depth(family)))
    image = families.images(family)
    tuned.set_grad_checkpointing(True)
    tuned.train()
    assert_same(tuned, plain, tuned(image), plain(image))
    if variant != "linear":
        tuned.zero_grad()
        loss = sum(y.sin().sum() for y in tuned.forward_intermediates(image)[1])
        loss.backward()
        checkpointed = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
        tuned.zero_grad()
        tuned.set_grad_checkpointing(False)
        loss = sum(y.sin().sum() for y in tuned.forward_intermediates(image)[1])
        loss.backward()
        direct = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
        assert set(checkpointed) == set(direct)
        assert max(distance(checkpointed[n], direct[n]) for n in direct) <= 1e-10


@pytest.mark.parametrize(
    "method",
    [
        VPTShallow(6, dropout=0.5),
        VPTDeep(6, dropout=0.5),
        VPTDeep(6, dropout=0.5, blocks=[0, 2]),
        VPTDeep(6, dropout=0.5, shared=True, project_dim=5),
    ],
    ids=["shallow", "deep", "gaps", "shared_projected"],
)
def test_checkpointing_replays_dropout_masks(method: Any) -> None:
    tuned, _ = pair(families.build(TOKEN), method)
    tuned.train()
    image, results = families.images(TOKEN), []
    for checkpointing in (False, True):
        tuned.set_grad_checkpointing(checkpointing)
        torch.manual_seed(4)
        output = tuned(image)
        torch.rand(3)  # advances the generator between forward and backward
        results.append((output, tuned_gradients(tuned, output)))
    (output, expected), (again, found) = results
    assert distance(again, output) <= 1e-10
    assert max(distance(found[name], expected[name]) for name in expected) <= 1e-10


def error(found: Tensor, truth: Tensor) -> float:
    """Return the relative root-mean-square error."""
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((found - truth).norm() / truth.norm())


def _twins(family: str, method: Any, device: str, seed: int) -> tuple[nn.Module, Plain, Plain]:
    """Return a tuned model and its plain formulation in float32, and the latter in float64."""
    tuned, truth = pair(families.build(family, seed), method)
    plain = copy.copy(truth)
    plain.model = copy.deepcopy(truth.model).float().to(device)
    plain.trained = {n: t.detach().float().to(device) for n, t in truth.trained.items()}
    for name, parameter in plain.model.named_parameters():
        if name in plain.trained:
            plain.trained[name] = parameter
    for leaf in plain.trained.values():
        leaf.requires_grad_()
    return tuned.float().to(device).train(), plain, truth


def _errors(family: str, method: Any, how: str, device: str, seed: int) -> dict[str, Tensor]:
    """Return errors of output and gradients against float64, ours and the plain formulation's."""
    tuned, plain, truth = _twins(family, method, device, seed)
    image = families.images(family, batch=4, seed=seed + 50)
    expected = truth(image)
    right = gradients(expected, truth.trained)
    small = image.float().to(device)
    dtype = getattr(torch, how.rpartition("_")[2])
    if how == "bfloat16":
        tuned, small = tuned.to(dtype), small.to(dtype)
        plain.model.to(dtype)
        owned = dict(plain.model.named_parameters())
        plain.trained = {
            name: owned[name] if name in owned else leaf.detach().to(dtype).requires_grad_()
            for name, leaf in plain.trained.items()
        }
    with torch.autocast(device, dtype=dtype, enabled=how.startswith("autocast")):
        ours, theirs = tuned(small), plain(small)
    assert ours.dtype == theirs.dtype
    found, eager = tuned_gradients(tuned, ours), gradients(theirs, plain.trained)
    assert {n: g.dtype for n, g in found.items()} == {n: g.dtype for n, g in eager.items()}
    errors = {"output": (error(ours, expected), error(theirs, expected))}
    errors |= {n: (error(found[n], right[n]), error(eager[n], right[n])) for n in right}
    return {name: torch.tensor(pair, dtype=torch.float64) for name, pair in errors.items()}


@pytest.mark.covering
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["float32", "autocast_bfloat16", "autocast_float16", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        (TOKEN, "shallow"),
        (TOKEN, "deep"),
        (TOKEN, "gaps"),
        (TOKEN, "shared"),
        (TOKEN, "projected"),
        (AVERAGE, "deep"),
        ("qk_norm", "deep"),
        ("siglip_average", "shallow"),
    ],
)
def test_low_precision(family: str, variant: str, how: str, device: str) -> None:
    """No further from float64 than the plain formulation in the same precision, plus slack.

    In the mean over four models, or over twenty where four are over the budget, since rounding
    errors of a few models vary at random.
    """
    method = VARIANTS[variant](families.depth(family))
    runs = [_errors(family, method, how, device, seed) for seed in range(4)]
    if _over_budget(runs, how):
        runs += [_errors(family, method, how, device, seed) for seed in range(4, 20)]
    assert _over_budget(runs, how) == {}


def _over_budget(runs: list[dict[str, Tensor]], how: str) -> dict[str, tuple[float, float]]:
    """Return the mean errors (ours, eager's) that are over the budget, by name."""
    slack = 1e-6 if how == "float32" else 2e-3
    means = {name: torch.stack([run[name] for run in runs]).mean(0).tolist() for name in runs[0]}
    return {n: (ours, eager) for n, (ours, eager) in means.items() if ours > 1.3 * eager + slack}


@pytest.mark.parametrize("family", [TOKEN, "qk_norm"])
def test_autocast_leaves_float64_alone(family: str) -> None:
    """As in eager PyTorch; blocks of the second family run module by module."""
    tuned, plain = pair(families.build(family), VPTDeep(3))
    image = families.images(family)
    expected = plain(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tuned(image)
    assert_same(tuned, plain, output, expected)


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method",
    [VPTDeep(3), VPTShallow(3, project_dim=5)],
    ids=["deep", "shallow_projected"],
)
def test_compiles_without_a_graph_break(method: Any, fresh_compiler: Any) -> None:
    base = families.build("vit_32px")
    tuned, plain = pair(base, method)
    tuned.train()
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    image = families.images("vit_32px")
    for _ in range(2):
        assert_same(tuned, plain, compiled(image), plain(image))
        redraw_prompts(tuned, seed=12)
        plain = Plain(plain.model, method, tuned.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_compiles_with_prompt_dropout(fresh_compiler: Any) -> None:
    tuned = prompt_tune(families.build("vit_32px"), VPTDeep(8, dropout=0.5, blocks=[1])).train()
    redraw_prompts(tuned)
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    image = families.images("vit_32px", batch=1).expand(2, -1, -1, -1)
    output = compiled(image)
    output.square().sum().backward()
    assert distance(output[0], output[1]) > 1e-3
    assert all(p.grad is not None for _, p in tuned.named_parameters() if p.requires_grad)
    with torch.no_grad():
        assert distance(compiled.eval()(image), tuned.eval()(image)) <= 1e-10
