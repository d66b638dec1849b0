"""Runs of a sweep on real data: independent of each other, and tabulated."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.pictures import backbone
from support.training import pictures

from vpt_fast import VAPT, LinearProbe, VPTDeep
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.evaluate import TrainingError
from vpt_fast.train.sweep import data as sweep_data
from vpt_fast.train.sweep import task as task_module
from vpt_fast.train.sweep.data import ArrayData
from vpt_fast.train.sweep.report import HEADER, mean_and_deviation, table, write
from vpt_fast.train.sweep.sweep import Candidate, Outcome, Result, Sweep
from vpt_fast.train.sweep.task import SweepTask

RECIPE = Recipe(epochs=3, batch_size=8, lr=2.0)


def task() -> SweepTask:
    data = ArrayData(pictures(24), pictures(12, seed=1), pictures(12, seed=2))
    return SweepTask(backbone(), data, progress=False)


def test_a_run_does_not_depend_on_those_before_it() -> None:
    runs = task()
    before = {name: value.clone() for name, value in runs.backbone.state_dict().items()}
    first = runs.run(VPTDeep(2), RECIPE, final=False)
    for method in (LinearProbe(), VAPT(2)):
        runs.run(method, RECIPE, final=True)
    again = runs.run(VPTDeep(2), RECIPE, final=False)
    assert (again.top1, again.loss) == (first.top1, first.loss)
    assert first.trained == 6 * 2 * 64 + 64 * 3 + 3 and first.adapter_bytes == 0
    assert runs.run(VPTDeep(2), RECIPE, final=True).adapter_bytes > 4 * first.trained
    for name, value in runs.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_final_runs_train_on_both_and_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    loader = sweep_data.make_loader

    def counting(dataset, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(len(dataset))
        return loader(dataset, *args, **kwargs)

    monkeypatch.setattr(sweep_data, "make_loader", counting)
    data = ArrayData(pictures(24), pictures(9, seed=1), pictures(6, seed=2))
    runs = SweepTask(backbone(), data, progress=False)
    runs.run(VPTDeep(2), RECIPE, final=False)
    runs.run(VPTDeep(2), RECIPE, final=True)
    assert seen == [24, 9, 33, 6]


def test_a_run_that_diverges_leaves_the_backbone_usable() -> None:
    runs = task()
    with pytest.raises(TrainingError, match="not finite"):
        runs.run(VPTDeep(2), Recipe(epochs=2, batch_size=8, lr=1e30, warmup_epochs=0), final=False)
    assert runs.run(LinearProbe(), RECIPE, final=True).top1 > 30


def test_a_whole_sweep_and_its_table(tmp_path: Path) -> None:
    candidates = [
        Candidate(VPTDeep(), RECIPE, (0.5, 2.0), (0.01,), (1, 2)),
        Candidate(LinearProbe(), RECIPE, (2.0,), (0.0,)),
    ]
    results = Sweep(tmp_path, task(), (42, 44), lambda line: None).run(candidates)
    path, picture = write(tmp_path, results, "Coloured noise")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == HEADER
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("vpt-deep", "42"), ("vpt-deep", "44"), ("linear", "42"), ("linear", "44"),
    ]  # fmt: skip
    text = table(results)
    mean, _ = mean_and_deviation([final.top1 for final in results[0].finals.values()])
    assert "| vpt-deep |" in text and f"{mean:.2f}%" in text
    assert min(Image.open(picture).size) > 400


def test_the_deviation_is_the_samples() -> None:
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, deviation = mean_and_deviation([5.0])
    assert mean == 5.0 and deviation != deviation
    one = Result("linear", {"lr": 1.0, "weight_decay": 0.0}, Outcome(50, 1, 3, 4, 1), {})
    assert "nan" in table([one]), "no final run has ended"


def test_additions_to_the_recipe_are_those_of_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixing leaves frozen blocks to each step, and balanced weights are of the run's images."""
    data = ArrayData(pictures(4), pictures(12, seed=1), pictures(12, seed=2))
    runs = SweepTask(backbone(), data, progress=False)
    seen: list[Recipe] = []

    def watched(model, batches, recipe, **options):  # type: ignore[no-untyped-def]
        seen.append(recipe)
        assert options["net"] is model or not recipe.mixes
        return fit(model, batches, recipe, **options)

    monkeypatch.setattr(task_module, "fit", watched)
    runs.run(LinearProbe(), replace(RECIPE, mixup=0.8, model_ema=True), final=False)
    for final in (False, True):
        runs.run(LinearProbe(), replace(RECIPE, class_weights="balanced"), final=final)
    # Labels 0, 1, 2, 0; and with 12 more, four of each.
    assert seen[1].class_weights == pytest.approx((2 / 3, 4 / 3, 4 / 3))
    assert seen[2].class_weights == pytest.approx((16 / 18, 16 / 15, 16 / 15))
