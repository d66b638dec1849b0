"""Options of timm's train.py in a run: log, record, resuming, and what they turn off."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import make_folders, write_checkpoint
from support.training import Stopped, endings
from torch.nn import functional as F
from typer.testing import CliRunner

from vpt_fast import VPTDeep, trainable_parameters
from vpt_fast.cli.app import app
from vpt_fast.reports.page.text import describe_recipe
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.loop import step as step_module
from vpt_fast.train.run.folder_run import tune_on_folder
from vpt_fast.train.run.record import read_record
from vpt_fast.train.run.settings import RunSettings

ALL = Recipe(
    epochs=3, batch_size=7, lr=2.0, warmup_epochs=0, opt="sgd", smoothing=0.1, mixup=0.8,
    cutmix=1.0, mixup_mode="elem", model_ema=True, model_ema_decay=0.9, patience=2,
)  # fmt: skip
AUGMENTATION = Augmentation(aa="rand-m9-mstd0.5-inc1", reprob=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folders(tmp_path_factory.mktemp("data"), train=6, val=2, test=2)
    write_checkpoint(folder / "tiny.pth")
    return folder


def tune(data: Path, output: Path, recipe: Recipe = ALL, **options: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    options = {"augmentation": AUGMENTATION, "method": VPTDeep(2), **options}
    settings = RunSettings(
        data, output, "test_vit", recipe=recipe, checkpoint=data / "tiny.pth", img_size=32,
        **options,
    )  # fmt: skip
    return tune_on_folder(settings, progress=False, log=lines.append), lines


def stop_after(count: int, patch: pytest.MonkeyPatch) -> None:
    call, steps = step_module.TrainStep.__call__, 0

    def stopping(self: Any, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > count:
            raise Stopped
        return call(self, batch)

    patch.setattr(step_module.TrainStep, "__call__", stopping)


def test_a_resumed_run_with_all_of_them_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lines = tune(data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Stopped):
            tune(data, tmp_path / "parts")
    again, _ = tune(data, tmp_path / "parts", resume=True)
    assert endings(tmp_path / "whole") == endings(tmp_path / "parts")
    assert [r.train_loss for r in again.fit.epochs] == [r.train_loss for r in whole.fit.epochs]
    assert again.test.loss == whole.test.loss
    said = "smoothing 0.1, mixup 0.8, cutmix 1.0, mixup_mode elem, patience 2"
    assert said in lines
    assert any(line.startswith("model_ema, decay 0.9: validation, test and") for line in lines)
    assert any("warning: after 9 steps 39% of the average" in line for line in lines)
    record = read_record(tmp_path / "whole")
    assert record is not None and not record.stopped_early
    assert (record.recipe["mixup"], record.recipe["model_ema"]) == (0.8, True)
    assert record.augmentation["aa"] == AUGMENTATION.aa
    told = describe_recipe(record.recipe)
    assert told.endswith(
        "smoothing 0.1, mixup 0.8, cutmix 1, mixup_mode elem, model_ema yes, "
        "model_ema_decay 0.9, patience 2"
    )
    for changes, message in (
        ({"recipe": replace(ALL, mixup=0.4)}, "started with --mixup 0.8, not 0.4"),
        ({"recipe": replace(ALL, patience=None)}, "started with --patience 2, not none"),
        (
            {"augmentation": replace(AUGMENTATION, aa=None)},
            "started with --aa rand-m9-.*, not none",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tune(data, tmp_path / "whole", resume=True, **changes)


def plain(**changes: Any) -> Recipe:
    return Recipe(epochs=2, batch_size=18, lr=2.0, warmup_epochs=0, **changes)


def test_without_them_training_is_a_plain_loop(data: Path, tmp_path: Path) -> None:
    """Two steps of SGD on the whole training set, with cross-entropy."""
    result, lines = tune(
        data, tmp_path / "run", plain(), augmentation=Augmentation(no_aug=True), prefix_cache=False
    )
    assert not any("model_ema" in line or "smoothing" in line for line in lines)
    seen: list[Any] = []
    losses = [row.train_loss for row in result.fit.epochs]
    with pytest.MonkeyPatch.context() as patch:

        def by_hand(self: Any, batch: Any) -> Any:
            parameters = [p for _, p in trainable_parameters(self.model)]
            decays = {id(self.model.head.bias): 0.0}
            loss = F.cross_entropy(self.net(batch.images), batch.labels)
            gradients = torch.autograd.grad(loss, parameters)
            lr = self.optimizer.param_groups[0]["lr"]
            with torch.no_grad():
                moved = []
                for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                    g = g + decays.get(id(p), 1e-4) * p
                    before = seen[-1][i] if seen else None
                    moved.append(g if before is None else 0.9 * before + g)
                    p.sub_(lr * moved[-1])
                seen.append(moved)
            return torch.tensor([float(loss.detach()) * 18, 0, 18], dtype=torch.float64)

        patch.setattr(step_module.TrainStep, "__call__", by_hand)
        other, _ = tune(
            data, tmp_path / "hand", plain(), augmentation=Augmentation(no_aug=True),
            prefix_cache=False,
        )  # fmt: skip
    assert [row.train_loss for row in other.fit.epochs] == pytest.approx(losses, rel=1e-6)


def test_what_an_earlier_version_wrote_goes_on(data: Path, tmp_path: Path) -> None:
    options = {"augmentation": Augmentation(no_aug=True), "cache": "stream"}
    tune(data, tmp_path / "run", plain(), **options)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    later = {f.name for f in fields(Recipe)} - plain().settings().keys()
    assert len(later) == 12
    for name in later:
        del record["recipe"][name]
    for name in ("aa", "reprob", "color_jitter"):
        del record["augmentation"][name]
    del record["stopped_early"], record["multi_label"]
    path.write_text(json.dumps(record))
    result, _ = tune(data, tmp_path / "run", plain(), resume=True, **options)
    assert len(result.fit.epochs) == 2
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="started with --smoothing 0, the default, not 0.1"):
        tune(data, tmp_path / "run", plain(smoothing=0.1), resume=True, **options)


def test_mixing_turns_the_cache_of_frozen_blocks_off_and_says_so(
    data: Path, tmp_path: Path
) -> None:
    options = {"augmentation": Augmentation(no_aug=True), "method": VPTDeep(2, blocks=(5,))}
    _, without = tune(data, tmp_path / "one", plain(), **options)
    _, mixed = tune(data, tmp_path / "two", plain(mixup=1.0), **options)
    said = "mixup and cutmix change images in every step: nothing is computed once per image"
    assert any("are frozen: computed once per image" in line for line in without)
    assert not any("computed once per image" in line and line != said for line in mixed)
    assert said in mixed and said not in without


def test_patience_needs_val_and_weights_fit_the_classes(data: Path, tmp_path: Path) -> None:
    short = make_folders(tmp_path / "short", train=2)
    write_checkpoint(short / "tiny.pth")
    for where, recipe, message in (
        (short, plain(patience=1), "there is no val split; leave --patience out"),
        (data, plain(class_weights=(1.0, 2.0)), "class_weights has 2 numbers for 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(where, tmp_path / "none", recipe)
        assert not (tmp_path / "none").exists()


def test_weights_are_printed_and_the_tested_model_is_the_average(
    data: Path, tmp_path: Path
) -> None:
    recipe = plain(class_weights="balanced", model_ema=True, model_ema_decay=0.5)
    result, lines = tune(data, tmp_path / "run", recipe, augmentation=Augmentation())
    assert "weights of classes: blue 1, green 1, red 1" in lines
    record = read_record(tmp_path / "run")
    assert record is not None and record.test == result.test.figures
    arguments = ["eval", result.adapter, data, "--checkpoint", data / "tiny.pth"]
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.stdout.endswith(f"loss {result.test.loss:.4f}\n"), found.output
