"""Early stopping: when, what is kept, and resuming after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.pictures import backbone
from support.training import endings, pictures, save

from vpt_fast import LinearProbe, prompt_tune
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.run_state import RunState

SCORES = [50.0, 60.0, 55.0, 60.0, 40.0, 90.0, 90.0]
RECIPE = Recipe(epochs=7, batch_size=8, lr=0.1, patience=3)


def train(
    monkeypatch: Any, folder: Path, lines: list[str], stop: int | None = None, **changes: Any
) -> Any:
    """Train with the validation scores above; Ctrl-C comes in epoch number `stop`."""
    run_epoch = RunState.run_epoch

    def scored(self: Any, epoch: int, batches: Any) -> Any:
        if epoch == stop:
            raise KeyboardInterrupt
        return replace(run_epoch(self, epoch, batches), val_top1=SCORES[epoch - 1], val_loss=1.0)

    model = backbone(depth=1)
    init_head(model)
    prompt_tune(model, LinearProbe())
    recipe = replace(RECIPE, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "run_epoch", scored)
        return fit(
            model, make_loader(pictures(16), 8, shuffle=True, seed=1), recipe,
            val_batches=make_loader(pictures(6, seed=1), 6), output=folder, save=save,
            progress=False, log=lines.append, resume=True,
        )  # fmt: skip


def test_it_stops_after_epochs_that_are_not_better_and_resumes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    result = train(monkeypatch, tmp_path, lines)
    # Epoch 2 is best; 4 equals it, which is not better.
    assert (result.kept, len(result.epochs), result.stopped_early) == (2, 5, True)
    assert lines[-1] == "stopped after epoch 5: none better on val for 3"
    bits = endings(tmp_path)
    again = train(monkeypatch, tmp_path, lines)
    assert (again.kept, len(again.epochs), again.stopped_early) == (2, 5, True)
    assert endings(tmp_path) == bits and lines[-1] == lines[-2]
    with pytest.raises(ValueError, match="its recipe has patience 3, not 9"):
        train(monkeypatch, tmp_path, lines, patience=9)


def test_a_run_that_is_interrupted_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    first = train(monkeypatch, tmp_path, lines, stop=4)
    assert first.interrupted and len(first.epochs) == 3 and not first.stopped_early
    assert len(train(monkeypatch, tmp_path, lines).epochs) == 5


def test_more_patience_goes_on_and_none_never_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patience, kept in ((4, 6), (None, 6)):
        folder = tmp_path / str(patience)
        folder.mkdir()
        result = train(monkeypatch, folder, [], patience=patience)
        assert (result.kept, len(result.epochs), result.stopped_early) == (kept, 7, False)


def test_it_needs_validation() -> None:
    model = prompt_tune(backbone(depth=1), LinearProbe())
    with pytest.raises(ValueError, match="there is no val split; leave --patience out"):
        fit(model, make_loader(pictures(4), 4), RECIPE, progress=False)
