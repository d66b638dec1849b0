"""Blocks with graphs that change are recorded again, or run eagerly with a warning."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from support.graphs import (
    LABELS,
    assert_same_gradients,
    gradients,
    images,
    pair,
    refuse_state_while_recording,
    step,
)
from support.tape import Tape
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vpt_fast import VPTDeep


@pytest.fixture(autouse=True)
def no_state_while_recording(monkeypatch):
    refuse_state_while_recording(monkeypatch)


def double(model):
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)


def replace_data(model):
    weight = model.blocks[0].mlp.fc1.weight
    weight.data = weight.data * 2


def replace_module(model):
    old = model.blocks[0].mlp.fc1
    model.blocks[0].mlp.fc1 = nn.Linear(old.in_features, old.out_features).requires_grad_(False)
    with torch.no_grad():
        for new, before in zip(model.blocks[0].mlp.fc1.parameters(), old.parameters(), strict=True):
            new.copy_(2 * before)


def freeze(model):
    model.blocks[0].prompt.tokens.requires_grad_(False)


def more_dropout(model):
    model.blocks[0].prompt.dropout = 0.9


@pytest.mark.parametrize(
    "change", [double, replace_data, replace_module, freeze, more_dropout, nn.Module.double]
)
def test_a_changed_model_is_recorded_again(change):
    eager, graphed, capture = pair(VPTDeep(2, dropout=0.5))
    for model in (eager, graphed):
        step(model)
        model.zero_grad()
        change(model)
        for seed in range(2):
            torch.manual_seed(seed)
            dtype = model.blocks[0].attn.qkv.weight.dtype
            F.cross_entropy(model(images(seed).to(dtype)), LABELS).backward()
    assert_same_gradients(eager, graphed)
    assert capture.recorded == 4 and capture.replayed == 6


def test_weights_that_change_all_the_time_run_eagerly():
    eager, graphed, capture = pair()
    for model in (eager, graphed):
        for seed in range(4):
            step(model, seed)
            double(model)
    with pytest.warns(UserWarning, match="are changed all the time"):
        step(graphed)
    step(eager)
    assert_same_gradients(eager, graphed)
    assert len(graphed.tune_record.graphs) == 0


def test_a_hook_in_the_blocks_is_called_and_warned_of_once():
    _, graphed, capture = pair()
    step(graphed)
    seen = []
    handle = graphed.blocks[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="has a hook or a forward of its own"):
        step(graphed)
    step(graphed)
    assert len(seen) == 2 and capture.replayed == 2
    handle.remove()
    step(graphed)
    assert len(seen) == 2 and capture.replayed == 4
    graphed.blocks[1].mlp._forward_hooks = OrderedDict({0: lambda *_: seen.append(1)})
    step(graphed)
    assert len(seen) == 3 and capture.replayed == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_an_outer_checkpoint(reentrant):
    eager, graphed, _ = pair()
    for model in (eager, graphed):
        x = images().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = checkpoint(model, x, use_reentrant=reentrant)
            F.cross_entropy(logits, LABELS).backward()
    wanted, found = gradients(eager), gradients(graphed)
    assert found and all(torch.allclose(g, wanted[n], atol=1e-6) for n, g in found.items())


def test_another_thread_or_stream_runs_eagerly():
    eager, graphed, capture = pair()
    step(graphed)
    found = []

    def run():
        with torch.no_grad():
            found.append(graphed(images()))

    with pytest.warns(UserWarning, match="in another thread or stream"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert torch.allclose(found[0], eager(images()), atol=1e-6)
    capture.current = 1
    step(graphed, 1)
    assert capture.replayed == 2


def test_without_memory_to_record_blocks_run_eagerly(monkeypatch):
    eager, graphed, capture = pair()

    def refused(*work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(capture, "record", refused)
    with pytest.warns(UserWarning, match=r"no memory to record \(2, 5, 64\)"):
        step(graphed)
    step(eager)
    assert_same_gradients(eager, graphed)


def test_compiled_and_traced_models_are_left_alone():
    eager, graphed, capture = pair(VPTDeep(2))
    eager.eval(), graphed.eval()
    compiled = torch.compile(graphed, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(images()), eager(images()), atol=1e-6)
        with Tape() as tape:
            graphed(images())
    assert tape.lines
    assert capture.recorded == 0
