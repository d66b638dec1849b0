"""The average of what is trained: its values, who sees it, and resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import backbone
from support.tape import TapeCapture
from support.training import endings, pictures, save, stopped_after
from torch import Tensor, nn

from vpt_fast import VPTDeep, load_adapter, prompt_tune, trainable_parameters
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.loop import epochs as epochs_module
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.evaluate import evaluate
from vpt_fast.train.loop.graphed_step import StepGraphs
from vpt_fast.train.loop.run_state import RunState
from vpt_fast.train.loop.trained_average import TrainedAverage

RECIPE: dict[str, Any] = {"epochs": 3, "batch_size": 7, "lr": 2.0, "warmup_epochs": 0}
EMA: dict[str, Any] = {"model_ema": True, "model_ema_decay": 0.8}


def tuned(depth: int = 1) -> nn.Module:
    torch.manual_seed(3)
    model = backbone(depth=depth)
    init_head(model)
    return prompt_tune(model, VPTDeep(2, dropout=0.1))


def train(model: nn.Module, folder: Path | None = None, resume: bool = False, **changes: Any):
    recipe = Recipe(**{**RECIPE, **changes})
    return fit(
        model,
        make_loader(pictures(24), recipe.batch_size, shuffle=True, seed=recipe.seed),
        recipe,
        val_batches=make_loader(pictures(12, seed=1), 12),
        output=folder,
        save=save,
        progress=False,
        resume=resume,
    )


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for _, p in trainable_parameters(model)]


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_a_plain_loop_in_fp64(warmup: bool) -> None:
    model = tuned()
    average = TrainedAverage(model, Recipe(**EMA, model_ema_warmup=warmup))
    expected: list[Tensor] = []
    for step in range(1, 9):
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        # timm's: nothing of before the first step; the warm-up is 1 - (1 + step)^(-2/3).
        decay = 0.0 if step == 1 else 0.8
        if warmup and step > 1:
            decay = min(decay, 1 - step ** (-2 / 3))
        now = [value.double() for value in values(model)]
        before = expected or now
        expected = [decay * b + (1 - decay) * n for b, n in zip(before, now, strict=True)]
    for found, wanted in zip(average.values, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_frozen_backbone_is_not_copied() -> None:
    model = tuned()
    average = TrainedAverage(model, Recipe(**EMA))
    held = sum(value.numel() for value in average._ema.module.state_dict().values())
    assert held == sum(p.numel() for _, p in trainable_parameters(model))


def test_training_is_the_same_and_validation_and_adapters_have_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw: list[list[Tensor]] = []
    run_epoch = RunState.run_epoch

    def watching(self: Any, *arguments: Any) -> Any:
        row = run_epoch(self, *arguments)
        raw.append(values(self.model))
        return row

    monkeypatch.setattr(RunState, "run_epoch", watching)
    plain, averaged = tuned(), tuned()
    without = train(plain)
    plain_values = raw[:]
    raw.clear()
    (tmp_path / "run").mkdir()
    result = train(averaged, tmp_path / "run", **EMA)
    # The same steps, bit for bit.
    assert [row.train_loss for row in result.epochs] == [row.train_loss for row in without.epochs]
    for one, other in zip(plain_values, raw, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    val = make_loader(pictures(12, seed=1), 12)
    last = load_adapter(backbone(depth=1), tmp_path / "run" / "last")
    assert evaluate(last, val, progress=False).loss == pytest.approx(result.epochs[-1].val_loss)
    assert not all(torch.equal(a, b) for a, b in zip(values(last), raw[-1], strict=True))
    kept = load_adapter(backbone(depth=1), tmp_path / "run" / "best")
    assert all(torch.equal(a, b) for a, b in zip(values(kept), values(averaged), strict=True))


def test_without_validation_the_model_ends_with_the_average(tmp_path: Path) -> None:
    model = tuned()
    loader = make_loader(pictures(24), 7, shuffle=True)
    fit(model, loader, Recipe(**RECIPE, **EMA), output=tmp_path, save=save, progress=False)
    last = load_adapter(backbone(depth=1), tmp_path / "last")
    assert all(torch.equal(a, b) for a, b in zip(values(last), values(model), strict=True))


@pytest.mark.parametrize("after", [3, 6])
def test_a_resumed_run_with_mixing_ends_with_the_same_bits(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**EMA, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train(tuned(), whole, **changes)
    with stopped_after(after, monkeypatch):
        train(tuned(), parts, **changes)
    model = tuned()
    train(model, parts, resume=True, **changes)
    assert endings(whole) == endings(parts)
    with pytest.raises(ValueError, match="its recipe has model_ema_decay 0.8, not 0.9"):
        train(tuned(), parts, resume=True, **{**changes, "model_ema_decay": 0.9})
    with pytest.raises(ValueError, match="its recipe has mixup 0.8, not None"):
        train(tuned(), parts, resume=True, **{**changes, "mixup": 0.0})


def test_recorded_steps_are_not_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[TapeCapture] = []
    make = epochs_module.TrainStep

    def graphed(*arguments: Any) -> Any:
        step, capture = make(*arguments), TapeCapture()
        step.graphs = StepGraphs(step.net, lambda device: capture)
        captures.append(capture)
        return step

    eager, recorded = tuned(), tuned()
    changes = {**EMA, "mixup": 0.8, "epochs": 6}
    train(eager, **changes)
    monkeypatch.setattr(epochs_module, "TrainStep", graphed)
    train(recorded, **changes)
    assert all(torch.equal(a, b) for a, b in zip(values(eager), values(recorded), strict=True))
    # Batches of 7 and of 3: the first of each runs eagerly, the next is recorded.
    assert (captures[0].recorded, captures[0].replayed) == (2, 6 * 4 - 2)


def test_a_failed_run_gives_the_average_of_its_last_epoch_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = tuned(), []
    train_epoch = RunState.train_epoch

    def failing(self: Any, epoch: int) -> Any:
        if epoch == 2:
            seen.append(copy.deepcopy(self.average.values))
            train_epoch(self, epoch)
            self.fail("a test")
        return train_epoch(self, epoch)

    monkeypatch.setattr(RunState, "train_epoch", failing)
    with pytest.raises(RuntimeError, match="a test; the model has the weights of epoch 1 again"):
        train(model, **EMA)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], values(model), strict=True))
