"""Images with several labels: training, adapter, and every command that reads it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score
from support.pictures import CLASSES, backbone, make_folders, write_checkpoint
from support.training import open_instead, several_labels
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from vpt_fast import PromptBank, VPTDeep, load_adapter, save_adapter
from vpt_fast.adapter.files import read_config
from vpt_fast.cli.app import app
from vpt_fast.cli.work import eval as eval_module
from vpt_fast.reports.page import evaluation as report_module
from vpt_fast.reports.page.evaluation import EvaluationOptions
from vpt_fast.reports.page.page import write_page
from vpt_fast.reports.page.runs import read_runs
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.split import ImageSource
from vpt_fast.train.run import data_of_run, folder_run
from vpt_fast.train.run.folder_run import tune_on_folder
from vpt_fast.train.run.record import read_record
from vpt_fast.train.run.settings import RunSettings
from vpt_fast.train.sweep import plan as sweep_plan
from vpt_fast.train.sweep.plan import SweepPlan, candidate

COUNTS = {"train": 26, "val": 16, "test": 16}


def settings(folder: Path, output: str, **changes: Any) -> RunSettings:
    recipe = {"epochs": 3, "batch_size": 8, "lr": 10.0, "warmup_epochs": 0, **changes}
    return RunSettings(
        folder, folder / output, "test_vit", recipe.pop("method", VPTDeep(2)),
        checkpoint=folder / "tiny.pth", img_size=32, rewind=recipe.pop("rewind", None),
        augmentation=Augmentation(no_aug=recipe.pop("no_aug", False)), recipe=Recipe(**recipe),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImageSource, list[str], Any]:
    folder = tmp_path_factory.mktemp("several")
    source = several_labels(folder, **COUNTS)
    write_checkpoint(folder / "tiny.pth")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        open_instead(patch, source, folder_run)
        chosen = settings(folder, "run", class_weights="balanced", model_ema=True,
                          model_ema_decay=0.5)  # fmt: skip
        result = tune_on_folder(chosen, progress=False, log=lines.append)
    return folder, source, lines, result


def test_map_chooses_the_epoch_and_is_recorded(trained: Any) -> None:
    folder, source, lines, result = trained
    rows = result.fit.epochs
    assert all(row.train_top1 is None and row.val_top1 is None for row in rows)
    best = max(rows, key=lambda row: (row.val_map, -row.val_loss))
    assert result.fit.kept == best.epoch and best.val_map > 80
    test = result.test
    assert test.labels.tolist() == source.splits["test"].labels
    assert (test.top1 != test.top1) and test.predictions.shape == (16, 3)
    assert "several labels an image: binary cross-entropy, and mAP in place of top-1" in lines
    assert "weights of positive labels: blue 1, green 1.167, red 1.167" in lines
    record = read_record(folder / "run")
    assert record is not None and record.multi_label
    assert record.test == {"loss": test.loss, "map": test.mean_ap, "images": 16}
    with (folder / "run" / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [float(row["eval_map"]) for row in found] == [row.val_map for row in rows]
    assert not any("top1" in name for name in found[0])
    events = EventAccumulator(str(folder / "run" / "tensorboard")).Reload()
    tags = {"train/loss", "train/images_per_second", "val/loss", "val/map", "lr"}
    assert set(events.Tags()["scalars"]) == tags


def test_the_adapter_says_so_and_keeps_saying_so(trained: Any, tmp_path: Path) -> None:
    folder, _, _, result = trained
    assert read_config(result.adapter)["multi_label"] is True
    model = load_adapter(backbone(), result.adapter)
    save_adapter(model, tmp_path / "again")
    assert read_config(tmp_path / "again")["multi_label"] is True
    assert "(transform(image)[None]).sigmoid()" in (tmp_path / "again" / "README.md").read_text()
    save_adapter(model, tmp_path / "one", multi_label=False)
    assert "(transform(image)[None]).softmax(-1)" in (tmp_path / "one" / "README.md").read_text()
    assert read_config(tmp_path / "one")["multi_label"] is False
    bank = PromptBank(backbone())
    bank.add("task", result.adapter)
    assert bank.task("task").multi_label
    with pytest.raises(ValueError, match="multi_label is 'yes', not true or false"):
        save_adapter(model, tmp_path / "bad", multi_label="yes")  # type: ignore[arg-type]


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_predict_gives_each_class_a_probability_of_its_own(trained: Any) -> None:
    folder, source, _, result = trained
    image = source.splits["test"].names[7]  # of all three classes
    options = ("--checkpoint", folder / "tiny.pth")
    alone = call("predict", result.adapter, image, *options)
    together = call("predict", "--bank", folder / "run", "--tasks", "best", image, *options)
    assert alone.exit_code == 0 and together.exit_code == 0, (alone.output, together.output)
    shares = {}
    for text in alone.stdout.removeprefix(f"{image}: ").strip().split(", "):
        name, percent = text.split(" ")
        shares[name] = float(percent.rstrip("%")) / 100
    assert set(shares) == set(CLASSES)
    assert sum(shares.values()) > 1.5
    assert together.stdout == alone.stdout


def test_eval_says_map_and_refuses_other_data(
    trained: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    folder, source, _, result = trained
    options = ("--checkpoint", folder / "tiny.pth")
    with monkeypatch.context() as patch:
        open_instead(patch, source, eval_module, data_of_run)
        found = call("eval", result.adapter, folder, *options)
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith(f"test: 16 images, mAP {result.test.mean_ap:.2f}%, loss ")
    make_folders(tmp_path, test=2)
    refused = call("eval", result.adapter, tmp_path, *options)
    assert refused.exit_code == 2
    assert "has one label an image, and the adapter was trained on several" in refused.stderr


def test_the_report_has_average_precisions(trained: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, source, _, result = trained
    open_instead(monkeypatch, source, data_of_run)
    lines: list[str] = []
    options = EvaluationOptions(checkpoint=folder / "tiny.pth", progress=False)
    write_page([folder / "run"], tmp_path / "page.html", options, lines.append)
    assert lines[0] == f"run: test, 16 images, mAP {result.test.mean_ap:.2f}%"
    page = (tmp_path / "page.html").read_text()
    for text in ("Average precision by class", "Validation mAP (%)", f"{result.test.mean_ap:.2f}%"):
        assert text in page
    for text in ("Confusion matrix", "Worst mistakes", "Training accuracy (%)", "top-1"):
        assert text not in page
    evaluated = report_module.evaluate_run(read_runs([folder / "run"])[0], options)
    logits = evaluated.evaluation.logits
    assert logits is not None
    torch.testing.assert_close(evaluated.probabilities, torch.sigmoid(logits))
    wanted = average_precision_score(evaluated.evaluation.labels, logits, average="macro")
    assert result.test.mean_ap == pytest.approx(100 * wanted, rel=1e-6)


def test_what_cannot_be_is_refused_before_anything_is_written(
    trained: Any, monkeypatch: Any
) -> None:
    folder, source, _, _ = trained
    open_instead(monkeypatch, source, folder_run, sweep_plan)
    for changes, message in (
        ({"smoothing": 0.1}, "leave --smoothing out"),
        ({"mixup": 0.1}, "leave --mixup out"),
        ({"class_weights": (1.0, 2.0)}, "class_weights has 2 numbers for 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            tune_on_folder(settings(folder, "other", **changes), log=lambda line: None)
        assert not (folder / "other").exists()
    one = candidate(VPTDeep(2), Recipe(epochs=1))
    with pytest.raises(ValueError, match="a sweep compares top-1"):
        sweep_plan.run_plan(SweepPlan(folder / "sweep", (one,), folder, model="test_vit"))


def test_frozen_blocks_are_computed_once_and_labels_stay_rows(
    trained: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    folder, source, _, _ = trained
    open_instead(monkeypatch, source, folder_run)
    lines: list[str] = []
    chosen = settings(
        folder, f"{tmp_path.name}-prefix", no_aug=True, method=VPTDeep(2, blocks=(5,))
    )
    result = tune_on_folder(chosen, progress=False, log=lines.append)
    assert any("are frozen: computed once" in line for line in lines)
    assert result.fit.epochs[-1].val_map is not None


def test_validation_without_any_label_is_said(
    trained: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    folder, source, _, _ = trained
    val = source.splits["val"]
    none = type(val)([[0, 0, 0]] * len(val), val.names, val.load)
    empty = ImageSource("json", list(CLASSES), {**source.splits, "val": none}, multi_label=True)
    open_instead(monkeypatch, empty, folder_run)
    with pytest.raises(ValueError, match="no image of val has a label"):
        tune_on_folder(settings(folder, "none"), log=lambda line: None)
    assert not (folder / "none").exists()
    with pytest.raises(ValueError, match="--rewind is for images with one label each"):
        run = folder_run._check_recipe
        run(settings(folder, "none", rewind=folder / "run"), source)


def test_json_of_the_record_is_plain(trained: Any) -> None:
    text = (trained[0] / "run" / "run.json").read_text()
    assert "NaN" not in text and json.loads(text)["recipe"]["class_weights"] == "balanced"
