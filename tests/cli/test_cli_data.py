"""The command line on CSV files, shards and class folders without splits."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from support.pictures import CLASSES, write_image
from test_cli import MODEL, call, error_of, train


def classes(folder: Path, names=CLASSES, count: int = 8) -> Path:
    for label, name in enumerate(names):
        for i in range(count):
            write_image(folder / name / f"{i}.png", label, 1000 * label + i)
    return folder


def listed(folder: Path, *extra: str) -> Path:
    """Write 8 images of each class and list.csv, which splits them 5, 2 and 1."""
    classes(folder)
    parts = ["train"] * 5 + ["val"] * 2 + ["test"]
    lines = [f"{name}/{i}.png,{name},{part}" for name in CLASSES for i, part in enumerate(parts)]
    (folder / "list.csv").write_text("\n".join(["path,label,split", *lines, *extra]) + "\n")
    return folder / "list.csv"


def line(result, split: str) -> str:
    found = re.search(f"^{split}: .*$", result.stdout, re.M)
    assert found is not None, result.output
    return found.group()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, checkpoint):
    """Train on class folders with a fifth held out; return data, output and result."""
    data = classes(tmp_path_factory.mktemp("data"), ("c1", "c2", "c10"))
    output = tmp_path_factory.mktemp("runs") / "held"
    options = ["--val-fraction", 0.25, "--class-order", "natural", "--no-aug"]
    result = train(data, checkpoint, output, *options, "--num-prompts", 2)
    assert result.exit_code == 0, result.output
    return data, output, result


def test_a_held_out_split_is_found_again(held_out, checkpoint, tmp_path):
    data, output, result = held_out
    assert "images: 18 train, 6 val; 3 classes" in result.stdout
    assert "classes are sorted with numbers in their names by value" in result.stdout
    record = json.loads((output / "run.json").read_text())
    assert record["data"]["val_fraction"] == 0.25
    assert record["data"]["class_order"] == "natural"
    assert record["images"] == {"train": 18, "val": 6}
    config = json.loads((output / "best" / "adapter_config.json").read_text())
    assert config["class_names"] == ["c1", "c2", "c10"]
    best = re.search(r"kept epoch \d, ([\d.]+)% on val", result.stdout).group(1)
    for arguments in ([], ["--split", "val"]):
        again = call("eval", output, data, "--checkpoint", checkpoint, *arguments)
        assert f"val: 6 images, top-1 {best}%" in line(again, "val")
    # An adapter without its run is told the fraction; the same images moved elsewhere.
    shutil.copytree(output / "best", tmp_path / "adapter")
    shutil.copytree(data, tmp_path / "moved")
    told = ["--val-fraction", 0.25, "--checkpoint", checkpoint]
    assert line(call("eval", tmp_path / "adapter", tmp_path / "moved", *told), "val") == line(
        again, "val"
    )
    moved = call("eval", output, tmp_path / "moved", "--checkpoint", checkpoint)
    assert line(moved, "val") == line(again, "val")


def test_other_images_are_not_taken_for_the_held_out_ones(held_out, checkpoint, tmp_path):
    data, output, _ = held_out
    other = classes(tmp_path / "other", ("c1", "c2", "c10"), count=4)
    result = call("eval", output, other, "--checkpoint", checkpoint)
    assert "other: 12 images" in line(result, "other")
    message = error_of(call("eval", output, other, "--split", "val", "--checkpoint", checkpoint))
    assert "has no val split; it has --split train, and not the images of the run" in message
    options = ["--class-order", "natural", "--no-aug", "--num-prompts", 2, "--resume"]
    message = error_of(train(data, checkpoint, output, *options))
    assert "started with --val-fraction 0.25, not none; resume with the options" in message
    message = error_of(train(data, checkpoint, output, *options, "--val-fraction", 0.5))
    assert "started with --val-fraction 0.25, not 0.5" in message
    options[1] = "strings"
    message = error_of(train(data, checkpoint, output, *options, "--val-fraction", 0.25))
    assert "started with other classes: c2, not c10" in message


def test_the_report_takes_the_held_out_images(held_out, checkpoint, tmp_path):
    data, output, _ = held_out
    page = tmp_path / "page.html"
    result = call("report", output, "--output", page)
    assert result.exit_code == 0, result.output
    assert "6 images" in page.read_text() and "c10" in page.read_text()


def test_without_a_validation_split_training_says_so(checkpoint, tmp_path):
    data = classes(tmp_path / "data", ("c1", "c2", "c10"), 3)
    result = train(data, checkpoint, tmp_path / "out", "--num-prompts", 2)
    assert "images: 9 train; 3 classes" in result.stdout
    assert "no val split: the last epoch is kept, and nothing is selected (--val-" in result.stdout
    assert "sorted as strings, c10 before c2 (--class-order natural)" in result.stdout
    assert (tmp_path / "out" / "last").is_dir() and not (tmp_path / "out" / "best").exists()


def test_a_csv_file_is_trained_on_evaluated_and_reported(checkpoint, tmp_path):
    path = listed(tmp_path / "data", "gone.png,red,train", "red/0.png,pink,val")
    output = tmp_path / "out"
    result = train(path, checkpoint, output, "--num-prompts", 2)
    assert result.exit_code == 0, result.output
    assert "images: 16 train, 6 val, 3 test; 3 classes" in result.stdout
    assert "val: 1 entries left out: " in result.stdout
    assert "list.csv line 27: no training image has the class 'pink'" in result.stdout
    assert "images skipped in training, as they cannot be decoded: 1" in result.stderr
    again = call("eval", output, path, "--checkpoint", checkpoint)
    assert line(again, "test") == line(result, "test")
    page = tmp_path / "page.html"
    assert call("report", output, "--output", page).exit_code == 0
    assert "3 images" in page.read_text()


def test_shards_with_a_cached_prefix_train_as_files_do(checkpoint, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the data extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = listed(tmp_path / "data")
    for row in path.read_text().splitlines()[1:]:
        image, name, part = row.split(",")
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / f"{part}-0.tar", "a") as archive:
            key = image.replace("/", "_").removesuffix(".png")
            archive.add(path.parent / image, f"{key}.png")
            member = tarfile.TarInfo(f"{key}.cls")
            number = str(CLASSES.index(name)).encode()
            member.size = len(number)
            archive.addfile(member, io.BytesIO(number))
    options = ["--method", "linear", "--no-aug"]
    one = train(path, checkpoint, tmp_path / "files", *options)
    two = train(tmp_path / "shards", checkpoint, tmp_path / "tars", *options)
    assert "blocks are frozen: computed once per image" in two.stdout
    assert line(one, "test") == line(two, "test")
    tensors = [tmp_path / run / "last" / "adapter_model.safetensors" for run in ("files", "tars")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_images_with_several_labels_are_trained_and_not_swept(checkpoint, tmp_path):
    path = listed(tmp_path / "data")
    text = path.read_text().replace("label", "labels", 1).replace(",red,", ",red;blue,", 1)
    path.write_text(text)
    result = train(path, checkpoint, tmp_path / "out", "--epochs", 1)
    assert result.exit_code == 0 and "\ntest: 3 images, mAP " in result.stdout, result.output
    options = [*MODEL, "--checkpoint", checkpoint, "--output", tmp_path / "sweep"]
    assert "several labels each" in error_of(call("sweep", path, *options))


def test_a_sweep_takes_a_held_out_split(checkpoint, tmp_path):
    path = listed(tmp_path / "data")
    path.write_text(path.read_text().replace(",val", ",train"))
    options = [*MODEL, "--checkpoint", checkpoint, "--output", tmp_path / "sweep", "--epochs", 1]
    options += ["--methods", "linear", "--lrs", 1, "--weight-decays", 0.01, "--seeds", 42, "-b", 8]
    message = error_of(call("sweep", path, *options))
    assert "no val split: a sweep chooses on val" in message and "--val-fraction 0.2" in message
    result = call("sweep", path, *options, "--val-fraction", 0.3)
    assert result.exit_code == 0, result.output
    message = error_of(call("sweep", path, *options, "--val-fraction", 0.4))
    assert "val_fraction" in message
