"""run.json: its content, when it is written, and refusals when it is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import CLASSES, make_folders, write_checkpoint

from vpt_fast import VAPT, VPTDeep
from vpt_fast.adapter.files import TENSORS_FILE
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.loop import run_state
from vpt_fast.train.loop.evaluate import TrainingError
from vpt_fast.train.run import folder_run as run_module
from vpt_fast.train.run.folder_run import tune_on_folder
from vpt_fast.train.run.record import (
    FAILED,
    FILE,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    RunRecord,
    read_record,
    recording,
    write_record,
)
from vpt_fast.train.run.settings import RunSettings

RECORD = RunRecord(
    RUNNING,
    {"directory": "/data", "format": "folders"},
    {"train": 3},
    ["<b>", "caf\udce9"],
    {"name": "m", "checkpoint": None, "pretrained": True, "img_size": None},
    {"name": "linear"},
    {"epochs": 2},
    {},
    {},
    {},
    {"trained": 1, "total": 2},
    {"torch": "2"},
)


def tune(data: Path, output: Path, weights: Path, **options: Any) -> Any:
    recipe = {"epochs": 2, "batch_size": 8, "lr": 2.0, "seed": 7}
    known = {field.name for field in fields(Recipe)}
    recipe |= {name: options.pop(name) for name in list(options) if name in known}
    settings = RunSettings(
        data,
        output,
        "test_vit",
        options.pop("method", VPTDeep(num_prompts=2)),
        Recipe(**recipe),
        checkpoint=weights,
        img_size=32,
        **options,
    )
    return tune_on_folder(settings, progress=False, log=lambda line: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("data"), train=4, val=2, test=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.pth")


def test_a_run_records_its_settings_and_results(data: Path, weights: Path, tmp_path: Path) -> None:
    options = ImageOptions(antialias=False)
    result = tune(data, tmp_path / "run", weights, image_options=options)
    record = read_record(tmp_path / "run")
    assert record is not None
    assert record.state == FINISHED and record.kept_epoch == result.fit.kept
    assert record.data["directory"] == str(data.resolve()) and record.data["format"] == "folders"
    assert record.images == {"train": 12, "val": 6, "test": 9}
    assert record.class_names == list(CLASSES)
    assert record.model["name"] == "test_vit" and record.model["img_size"] == 32
    assert record.model["checkpoint"] == str(weights.resolve())
    assert record.method["name"] == "vpt-deep" and record.method["num_prompts"] == 2
    assert record.recipe["lr"] == 2.0 and record.recipe["warmup_epochs"] == 0
    assert record.image_options["antialias"] is False
    assert record.augmentation["hflip"] == 0.5 and record.options["memory"] == "speed"
    assert result.test is not None and record.test is not None
    assert record.test["top1"] == result.test.top1 and record.test["images"] == 9
    assert record.parameters["trained"] < record.parameters["total"]
    assert set(record.versions) == {"vpt_fast", "timm", "torch", "python"}
    assert record.skipped == 0 and record.error is None


def test_model_cards_have_what_was_measured(data: Path, weights: Path, tmp_path: Path) -> None:
    result = tune(data, tmp_path / "run", weights, lr=0.0)
    kept = next(row for row in result.fit.epochs if row.epoch == result.fit.kept)
    last = result.fit.epochs[-1]
    assert result.test is not None and result.adapter == tmp_path / "run" / "best"
    best, other = (
        (tmp_path / "run" / name / "README.md").read_text(encoding="utf-8")
        for name in ("best", "last")
    )
    assert f"| val top-1 | {kept.val_top1:.2f}% |" in best
    assert f"| test top-1 | {result.test.top1:.2f}% |" in best
    assert f"| val top-1 | {last.val_top1:.2f}% |" in other and "test top-1" not in other
    assert f"name: {data.name}" in best and f"| Data set | {data.name} |" in other


def test_it_exists_during_training_and_records_the_end(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = run_module.fit, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        seen.append(read_record(options["output"]))
        result = real(*arguments, **options)
        result.interrupted = True
        return result

    monkeypatch.setattr(run_module, "fit", interrupted)
    tune(data, tmp_path / "stopped", weights)
    assert seen[0].state == RUNNING and seen[0].kept_epoch is None and seen[0].test is None
    record = read_record(tmp_path / "stopped")
    assert record is not None and record.state == INTERRUPTED and record.test is None

    def failing(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        raise TrainingError("the loss is not finite in epoch 3")

    monkeypatch.setattr(run_module, "fit", failing)
    with pytest.raises(TrainingError):
        tune(data, tmp_path / "failed", weights)
    record = read_record(tmp_path / "failed")
    assert record is not None and record.state == FAILED
    assert record.error == "the loss is not finite in epoch 3"


def test_resuming_with_other_options_does_not_change_the_record(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    tune(data, tmp_path / "run", weights, epochs=1)
    before = (tmp_path / "run" / FILE).read_bytes()
    with pytest.raises(ValueError, match="with --epochs 1, not 2"):
        tune(data, tmp_path / "run", weights, epochs=2, resume=True)
    assert (tmp_path / "run" / FILE).read_bytes() == before


@pytest.fixture(scope="module")
def ended(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run, which no test changes."""
    output = tmp_path_factory.mktemp("ended") / "run"
    tune(data, output, weights)
    return output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache": "stream"}, "with --cache auto, the default, not stream;"),
        (
            {"image_options": ImageOptions(interpolation="nearest")},
            "with --interpolation model, the default, not nearest",
        ),
        ({"image_options": ImageOptions(antialias=False)}, "without --no-antialias, not with it"),
        ({"augmentation": Augmentation(hflip=0.0)}, "with --hflip 0.5, the default, not 0;"),
        ({"augmentation": Augmentation(no_aug=True)}, "without --no-aug, not with it"),
        ({"augmentation": Augmentation((0.5, 1.0))}, "with --scale 0.7 1, the default, not 0.5 1;"),
        ({"method": VAPT(2)}, "with --method vpt-deep, not vapt"),
        ({"method": VPTDeep(2, dropout=0.9)}, "with --dropout 0, the default, not 0.9"),
        ({"method": VPTDeep(3)}, "with --num-prompts 2, not 3"),
        ({"lr": None}, "with --lr 2, not 0.5, the default;"),
        ({"opt": "adamw"}, "with --opt sgd, the default, not adamw"),
        ({"seed": 42}, "with --seed 7, not 42, the default"),
        ({"batch_size": 7}, "with --batch-size 8, not 7"),
        ({"epochs": 3}, "with --epochs 2, not 3"),
        ({"schedule": "step"}, "with --schedule epoch, the default, not step"),
        ({"prefix_cache": False}, "with --prefix-cache, not without"),
    ],
)
def test_a_run_resumes_only_with_its_settings(
    changed: dict[str, Any], message: str, data: Path, weights: Path, ended: Path
) -> None:
    before = {path: path.read_bytes() for path in ended.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        tune(data, ended, weights, resume=True, **changed)
    after = {path: path.read_bytes() for path in ended.rglob("*") if path.is_file()}
    assert before == after


def _one_more_image(data: Path, _: Path) -> None:
    first = next((data / "train").glob("*/*"))
    shutil.copy(first, first.with_name(f"again-{first.name}"))


def _another_image(data: Path, _: Path) -> None:
    first = next((data / "train").glob("*/*"))
    first.write_bytes(first.read_bytes() + b"more")


def _other_weights(_: Path, weights: Path) -> None:
    state = torch.load(weights)
    state["cls_token"] += 1e-6
    torch.save(state, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_more_image, "other numbers of images: train 12, not 13"),
        (_another_image, "other images: their checksum is another"),
        (_other_weights, "other weights of the backbone: their checksum is another"),
    ],
)
def test_a_run_resumes_only_with_its_data_and_weights(
    change: Any, message: str, data: Path, weights: Path, tmp_path: Path
) -> None:
    images, file = tmp_path / "images", tmp_path / "weights.pth"
    shutil.copytree(data, images)
    shutil.copy(weights, file)
    tune(images, tmp_path / "run", file)
    images.rename(tmp_path / "elsewhere")
    tune(tmp_path / "elsewhere", tmp_path / "run", file, resume=True)
    change(tmp_path / "elsewhere", file)
    with pytest.raises(ValueError, match=message):
        tune(tmp_path / "elsewhere", tmp_path / "run", file, resume=True)


def test_it_resumes_with_other_workers_and_memory(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    """Neither changes any bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tune(data, whole, weights, cache="stream")
    real = run_state.save_checkpoint

    def stopping(directory: Path, state: Any) -> None:
        real(directory, state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state, "save_checkpoint", stopping)
        assert tune(data, parts, weights, cache="stream").fit.interrupted
    tune(data, parts, weights, cache="stream", workers=2, memory="minimal", resume=True)
    for name in ("best", "last"):
        one, other = (folder / name / TENSORS_FILE for folder in (whole, parts))
        assert one.read_bytes() == other.read_bytes()


def test_a_full_disk_is_recorded(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "adapter_model.safetensors")

    monkeypatch.setattr(run_state, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        tune(data, tmp_path / "run", weights)
    record = read_record(tmp_path / "run")
    assert record is not None and record.state == FAILED
    assert "No space left on device" in str(record.error)


def test_an_error_after_the_first_epoch_is_recorded(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is not removed, unlike that of a run that cannot begin."""
    real = run_state.save_checkpoint

    def breaking(directory: Path, state: Any) -> None:
        real(directory, state)
        raise ValueError("a transform is broken")

    monkeypatch.setattr(run_state, "save_checkpoint", breaking)
    with pytest.raises(ValueError, match="broken"):
        tune(data, tmp_path / "run", weights)
    record = read_record(tmp_path / "run")
    assert record is not None and record.state == FAILED
    assert record.error == "a transform is broken"


def test_a_run_that_cannot_begin_leaves_no_new_record(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="checkpoint"), recording(tmp_path, RECORD):
        raise ValueError("the checkpoint is damaged")
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == RECORD
    write_record(tmp_path, replace(RECORD, kept_epoch=3))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert read_record(tmp_path) == replace(RECORD, kept_epoch=3)
    assert read_record(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format 99"),
        ({"recipe": None}, "recipe is None"),
        ({"images": [1]}, r"images is \[1\]"),
    ],
)
def test_unreadable_records_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_record(tmp_path, RECORD)
    values = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        read_record(tmp_path)


def test_fields_of_later_versions_are_ignored_and_missing_ones_named(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    values = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(values | {"weather": "fine"}))
    assert read_record(tmp_path) == RECORD
    del values["method"]
    (tmp_path / FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has no 'method'"):
        read_record(tmp_path)
