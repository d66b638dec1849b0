"""A whole step that is recorded and replayed trains like an eager one, bit for bit."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from support.pictures import backbone
from support.tape import TapeCapture
from support.training import pictures

from vpt_fast import VAPT, FullTuning, VPTDeep, prompt_tune
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.loop import graphed_step
from vpt_fast.train.loop.frozen_cast import FrozenCast
from vpt_fast.train.loop.graphed_step import StepGraphs, check_cuda_graphs
from vpt_fast.train.loop.step import TrainStep


def steps(method=None, memory="speed", **recipe):
    """Return two equal steps, the second with graphs, and the capture of its graphs."""
    torch.manual_seed(0)
    model = backbone(depth=2)
    init_head(model)
    prompt_tune(model, method or VPTDeep(2, dropout=0.5), memory).train()
    settings = Recipe(batch_size=8, lr=1.0, warmup_epochs=0, **recipe)
    eager, graphed = (TrainStep(copy.deepcopy(model), settings, 3) for _ in range(2))
    capture = TapeCapture()
    graphed.graphs = StepGraphs(graphed.net, lambda device: capture)
    return eager, graphed, capture


def batches(count=20):
    """Return batches of 8, 8 and 4 images."""
    return list(make_loader(pictures(count), 8))


def take(step, epochs=3):
    found = []
    for epoch in range(epochs):
        for number, batch in enumerate(batches()):
            torch.manual_seed(10 * epoch + number)
            found.append(step(batch).clone())
    return found


def assert_same(eager, graphed):
    for (name, wanted), found in zip(
        eager.model.named_parameters(), graphed.model.parameters(), strict=True
    ):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        (None, {}),
        (None, {"opt": "adamw", "accumulation": 3}),
        (VAPT(2), {"accumulation": 2}),
        (FullTuning(), {"amp_dtype": "bfloat16"}),
        (None, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "accumulation": 2}),
        (None, {"bce_loss": True, "class_weights": (1.0, 2.0, 0.5)}),
    ],
    ids=["vpt-deep", "three parts", "vapt, two parts", "full, bf16", "mixup, two parts", "bce"],
)
def test_training_has_the_same_bits(method, recipe):
    eager, graphed, capture = steps(method, **recipe)
    wanted, found = take(eager), take(graphed)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert_same(eager, graphed)
    assert capture.recorded == len(graphed.graphs) > 0
    # All but the first batch, or part, of each shape.
    parts = 9 * recipe.get("accumulation", 1)
    assert capture.replayed == parts - len(graphed.graphs)


def test_frozen_weights_that_are_cast_to_bf16_and_restored():
    eager, graphed, capture = steps(amp_dtype="bfloat16")
    for step in (eager, graphed):
        with FrozenCast(step.model, torch.bfloat16) as cast:
            take(step, 1)
            with cast.originals():
                pass
            take(step, 1)
    assert_same(eager, graphed)
    assert (capture.recorded, capture.replayed) == (2, 4)


def test_a_gradient_scaler_scales_replayed_steps():
    eager, graphed, capture = steps()
    for step in (eager, graphed):
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        take(step)
        assert step.scaler.get_scale() == 2.0**16
    assert_same(eager, graphed)
    assert capture.replayed == 7


def test_labels_of_another_kind_are_recorded_apart():
    eager, graphed, capture = steps()
    several = torch.tensor([[1.0, 0.0, 1.0]] * 8)
    kinds = [batches(8)[0], batches(8)[0]._replace(labels=several)] * 3
    for number, batch in enumerate(kinds):
        found = []
        for step in (eager, graphed):
            torch.manual_seed(number)
            found.append(step(batch).clone())
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    assert_same(eager, graphed)
    assert (capture.recorded, capture.replayed) == (2, 4)


def test_a_loss_that_is_not_finite_is_seen():
    _, graphed, _ = steps()
    take(graphed, 2)
    with torch.no_grad():
        graphed.model.head.weight.fill_(math.nan)
    assert math.isnan(graphed(batches()[0])[0])


@pytest.mark.parametrize("memory", ["lean", "minimal"])
def test_memory_modes(memory):
    eager, graphed, capture = steps(VPTDeep(2), memory)
    take(eager), take(graphed)
    assert_same(eager, graphed)
    assert capture.replayed == 7


def test_changed_steps_are_recorded_again_and_hooks_run_eagerly():
    eager, graphed, capture = steps()
    for step in (eager, graphed):
        take(step, 2)
        with torch.no_grad():
            step.model.blocks[0].attn.qkv.weight.mul_(1.5)
        take(step, 1)
    assert_same(eager, graphed)
    assert capture.recorded == 4
    seen = []
    graphed.model.head.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="has a hook, or a forward of its own; steps run eagerly"):
        take(graphed, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(graphed, 1)
    assert len(seen) == 6


def test_a_hook_on_a_parameter_is_called_at_every_step():
    _, graphed, capture = steps()
    seen = []
    graphed.model.head.bias.register_hook(lambda grad: seen.append(1))
    with pytest.warns(UserWarning, match="parameter has a hook"):
        take(graphed, 2)
    assert len(seen) == 6 and capture.recorded == 0


def test_recomputed_dropout_is_refused_by_name():
    eager, graphed, capture = steps(memory="minimal")
    take(eager)
    with pytest.warns(UserWarning, match="dropout is drawn in a block that is computed again"):
        take(graphed)
    assert_same(eager, graphed)
    assert capture.recorded == 0


def test_several_processes_are_refused_by_name(monkeypatch):
    check_cuda_graphs(True)
    monkeypatch.setattr(graphed_step, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="--cuda-graphs records the step of one process"):
        check_cuda_graphs(True)
    check_cuda_graphs(None), check_cuda_graphs(False)


def test_the_cpu_records_nothing():
    model = prompt_tune(backbone(depth=2), VPTDeep(2))
    assert TrainStep(model, Recipe(), 1, cuda_graphs=True).graphs is None
