"""Formats of data sets: VTAB-1k, FGVC json files, saved datasets, class folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from support.pictures import CLASSES, make_folders, write_checkpoint, write_image
from typer.testing import CliRunner

from vpt_fast.cli.app import app
from vpt_fast.train.common.names import FORMATS
from vpt_fast.train.data.formats.fgvc import read_fgvc
from vpt_fast.train.data.formats.vtab import CLASSES as VTAB_CLASSES
from vpt_fast.train.data.formats.vtab import vtab_name
from vpt_fast.train.data.images import SkippedImage, make_loader
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.data.split import SplitImages


def make_vtab(folder: Path, train=6, val=3, test=6, classes=3) -> Path:
    """Write a data set in VTAB's layout; labels are the image's number modulo `classes`."""
    first, lists = 0, {}
    for name, count in (("train800", train), ("val200", val), ("test", test)):
        part = "test" if name == "test" else "train800val200"
        lists[name] = []
        for i in range(first, first + count):
            path = f"images/{part}/{i:06d}.png"
            write_image(folder / path, i % classes, i)
            lists[name].append(f"{path} {i % classes}")
        first += count
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_fgvc(folder: Path, images: str = "images", **splits: dict[str, object]) -> Path:
    for part, (split, entries) in enumerate(splits.items()):
        for number, path in enumerate(entries):
            write_image(folder / images / path, number % 3, 100 * part + number)
        (folder / f"{split}.json").write_text(json.dumps(entries))
    return folder


def test_vtab_lists_are_the_splits(tmp_path):
    source = open_source(make_vtab(tmp_path / "mine"))
    assert source.format == "vtab"
    assert source.class_names == ["0", "1", "2"]
    assert {name: split.labels for name, split in source.splits.items()} == {
        "train": [0, 1, 2, 0, 1, 2],
        "val": [0, 1, 2],
        "test": [0, 1, 2, 0, 1, 2],
    }
    assert source.splits["val"].names[0].endswith("images/train800val200/000006.png")
    assert source.splits["val"].load(0, 3).size == (40, 36)
    assert source.warnings == []
    whole = open_source(tmp_path / "mine", "vtab-1000")
    assert set(whole.splits) == {"train", "test"}
    assert len(whole.splits["train"]) == 9


def test_vtab_sets_have_their_classes_and_other_names(tmp_path):
    assert sum(VTAB_CLASSES.values()) == 102 + 100 + 47 + 102 + 37 + 10 + 397 + 62 + 83
    assert len(VTAB_CLASSES) == 19
    for name in ("cifar100", "cifar_100", "CIFAR", "cifar"):
        assert vtab_name(name) == "cifar"
    assert vtab_name("pets") == "oxford_iiit_pet"
    make_vtab(tmp_path / "flowers102", train=2, val=1, test=1)
    assert len(open_source(tmp_path / "flowers102").class_names) == 102
    other = open_source(tmp_path / "oxford_flowers102")
    assert other.splits["train"].names[0].startswith(str(tmp_path / "flowers102"))
    with pytest.raises(FileNotFoundError, match="holds VTAB sets; name one: .*flowers102"):
        open_source(tmp_path)


def test_bad_lines_of_vtab_lists_are_named_and_left_out(tmp_path):
    folder = make_vtab(tmp_path / "smallnorb_ele")
    path = folder / "train800.txt"
    with path.open("a") as file:
        file.write("\nimages/a.png 9\nimages/a.png -1\nimages/a.png\nimages/b.png two\n")
    split = open_source(folder).splits["train"]
    assert len(split) == 6
    assert [item.path for item in split.refused] == [f"{path} line {n}" for n in (8, 9, 10, 11)]
    assert split.refused[0].reason == f"{path} line 8: label 9 is out of range, 0 to 8"
    assert split.refused[2].reason == f"{path} line 10: 'images/a.png' is no path and label"
    path.write_text("images/a.png 9\n")
    with pytest.raises(ValueError, match=r"train800.txt has no entry that can be used: .* line 1"):
        open_source(folder)


def test_missing_lists(tmp_path):
    folder = make_vtab(tmp_path / "mine")
    (folder / "val200.txt").unlink()
    (folder / "test.txt").unlink()
    assert set(open_source(folder).splits) == {"train"}
    (folder / "train800.txt").unlink()
    source = open_source(folder)
    assert len(source.splits["train"]) == 9
    assert source.warnings == [
        "no train800.txt: training on all of train800val200.txt, without validation"
    ]
    make_vtab(tmp_path / "other")
    for name in ("train800", "train800val200"):
        (tmp_path / "other" / f"{name}.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(vtab\) has no train split; it has test"):
        open_source(tmp_path / "other")


def test_a_missing_or_damaged_image_is_counted_in_its_batch(tmp_path):
    folder = make_vtab(tmp_path / "mine")
    (folder / "images/train800val200/000001.png").unlink()
    (folder / "images/train800val200/000002.png").write_bytes(b"no image")
    split = open_source(folder).splits["train"]
    images = SplitImages(split, lambda image: torch.zeros(3, 2, 2), ["0", "1", "2"])
    assert isinstance(images[1], SkippedImage)
    (batch,) = make_loader(images, 10)
    assert batch.labels.tolist() == [0, 0, 1, 2]
    assert [Path(item.path).name for item in batch.skipped] == ["000001.png", "000002.png"]


def test_an_image_in_two_splits_is_named(tmp_path):
    folder = make_vtab(tmp_path / "mine")
    with (folder / "test.txt").open("a") as file:
        file.write("images/train800val200/000000.png 0\n")
    (line,) = open_source(folder).warnings
    assert line.startswith("1 images are in both train and test: ")
    assert line.endswith("000000.png")


@pytest.mark.parametrize("images", ["images", "Images", ""])
def test_fgvc_labels_are_ranks_in_the_union(tmp_path, images):
    make_fgvc(
        tmp_path,
        images,
        train={"x/a.png": 7, "x/b.png": 30, "x/c.png": 2},
        val={"x/d.png": 30, "x/e.png": 7},
        test={"x/f.png": 2, "x/g.png": 7},
    )
    source = open_source(tmp_path)
    assert source.format == "fgvc"
    assert source.class_names == ["2", "7", "30"]
    labels = {name: split.labels for name, split in source.splits.items()}
    assert labels == {"train": [1, 2, 0], "val": [2, 1], "test": [0, 1]}
    assert all(Path(p).is_file() for split in source.splits.values() for p in split.names)
    # val lacks the lowest id, and ranks within it would shift; test lacks the highest.
    (line,) = source.warnings
    assert line.startswith("val.json lacks 1 of the 3 class ids (2): labels are ranks among")


def test_fgvc_files_that_cannot_be_used(tmp_path):
    make_fgvc(tmp_path, train={"a.png": 1, "b.png": 2, "c.png": "three", "d.png": "3"})
    split = open_source(tmp_path).splits["train"]
    assert split.labels == [0, 1, 2]
    (item,) = split.refused
    assert item.reason == f"{tmp_path / 'train.json'} c.png: class id 'three' is no whole number"
    known = read_fgvc(tmp_path, ["3", "1"]).splits["train"]
    assert known.labels == [1, 0]
    assert "the model has no class id 2" in known.refused[0].reason
    (tmp_path / "train.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"train.json holds no .* but a list"):
        open_source(tmp_path)
    (tmp_path / "train.json").write_text('{"a.png": ')
    with pytest.raises(ValueError, match=r"train.json is no json file"):
        open_source(tmp_path)
    make_fgvc(tmp_path, train={"a.png": 1})
    with pytest.raises(ValueError, match="has 1 class; a classifier needs at least two"):
        open_source(tmp_path)


def test_class_folders_are_read(tmp_path):
    make_folders(tmp_path, train=2, validation=1)
    source = open_source(tmp_path)
    assert source.format == "folders"
    assert source.class_names == list(CLASSES)
    assert source.splits["train"].labels == [0, 0, 1, 1, 2, 2]
    assert set(source.splits) == {"train", "val"}


def test_ambiguous_and_unknown_formats_are_refused_by_name(tmp_path):
    make_folders(tmp_path, train=2)
    make_fgvc(tmp_path, train={"a.png": 1, "b.png": 2})
    with pytest.raises(ValueError, match="could be several formats: fgvc, folders; name one"):
        open_source(tmp_path)
    assert open_source(tmp_path, "folders").class_names == list(CLASSES)
    assert open_source(tmp_path, "fgvc").class_names == ["1", "2"]
    with pytest.raises(ValueError, match=f"'coco'; choose one of {', '.join(FORMATS)}"):
        open_source(tmp_path, "coco")
    with pytest.raises(FileNotFoundError, match="no data folder .*nowhere"):
        open_source(tmp_path / "nowhere")


# `datasets` may not be installed: these stand for its features and rows, with the interface that
# its documentation gives. They do not show that a directory which it wrote can be read.
ImageFeature = type("Image", (), {})
ValueFeature = type("Value", (), {})


class ClassLabel:
    def __init__(self, names):
        self.names = names


class FakeRows:
    def __init__(self, features, columns, broken=()):
        self.features, self.columns, self.broken = features, columns, broken

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        if key in self.broken:
            raise OSError("image file is truncated")
        return {name: values[key] for name, values in self.columns.items()}


def fake_rows(labels, feature=None, broken=(), **more):
    pictures = [Image.new("L", (20, 10), 40 * i) for i in range(len(labels))]
    features = {"picture": ImageFeature(), "label": feature or ClassLabel(["ant", "bee", "cat"])}
    return FakeRows({**features, **more}, {"picture": pictures, "label": labels}, broken)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Return a function that sets the result of load_from_disk of a stand-in for `datasets`."""
    (tmp_path / "dataset_dict.json").write_text("{}")
    (tmp_path / "train").mkdir()  # save_to_disk writes a folder with files
    (tmp_path / "train" / "state.json").write_text("{}")

    def returns(content):
        module = ModuleType("datasets")
        module.load_from_disk = lambda path: content if path == str(tmp_path) else None
        monkeypatch.setitem(sys.modules, "datasets", module)
        return tmp_path

    return returns


def test_a_saved_dataset_is_read_by_its_features(saved):
    folder = saved({"train": fake_rows([2, 0, 7, 1], broken=(1,)), "validation": fake_rows([1])})
    source = open_source(folder)
    assert source.format == "hf"
    assert source.class_names == ["ant", "bee", "cat"]
    train = source.splits["train"]
    assert train.labels == [2, 0, 1]
    assert train.refused[0].reason == f"{folder} train row 2: label 7 is out of range, 0 to 2"
    assert source.splits["val"].labels == [1]
    assert train.load(2, 3).getpixel((0, 0)) == (120, 120, 120)
    with pytest.raises(ValueError, match=r"train row 1 cannot be decoded \(image file is trunc"):
        train.load(1, 3)
    assert open_source(folder, known=["cat", "bee"]).splits["train"].labels == [0, 1]


def test_a_saved_dataset_without_class_names(saved):
    folder = saved(fake_rows([0, 3, None, 0, 1e9, 10**12], ValueFeature()))
    source = open_source(folder)
    assert source.class_names == ["0", "1", "2", "3"]
    assert source.splits["train"].labels == [0, 3, 0]
    assert (
        source.splits["train"]
        .refused[2]
        .reason.endswith("row 5: label 1000000000000 is out of range, 0 to 3")
    )
    folder = saved(fake_rows(["1", "0", "2", "x"], ValueFeature()))
    assert open_source(folder).splits["train"].labels == [1, 0, 2]
    folder = saved(fake_rows(["dog", "cat", None, "dog", "nan"], ValueFeature()))
    source = open_source(folder)
    assert source.class_names == ["cat", "dog"]
    assert source.splits["train"].labels == [1, 0, 1]
    assert source.splits["train"].refused[1].reason.endswith("row 4: label 'nan' is no word")
    folder = saved({"train": fake_rows([0, 1]), "test": fake_rows([-1, -1])})
    source = open_source(folder)
    assert set(source.splits) == {"train"}
    assert "has no labels (all are -1): it is left out" in source.warnings[0]


def test_saved_datasets_that_cannot_be_used(saved, monkeypatch):
    folder = saved({"train": fake_rows([0, 1], other=ImageFeature())})
    with pytest.raises(ValueError, match=r"2 image columns \(picture, other\); rename .* 'image'"):
        open_source(folder)
    folder = saved({"train": FakeRows({"image": ImageFeature()}, {"image": []})})
    with pytest.raises(ValueError, match=r"0 label columns \(none\)"):
        open_source(folder)
    folder = saved({"unsupervised": fake_rows([0, 1])})
    with pytest.raises(ValueError, match="has the splits unsupervised; one must be train"):
        open_source(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="not installed: pip install datasets"):
        open_source(folder)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_vtab_set_is_trained_and_evaluated(tmp_path):
    folder = make_vtab(tmp_path / "mine", train=9)
    with (folder / "test.txt").open("a") as file:
        file.write("images/test/000013.png -3\n")
    checkpoint = write_checkpoint(tmp_path / "tiny.pth")
    output = tmp_path / "out"
    options = ["--model", "test_vit", "--img-size", 32, "--checkpoint", checkpoint]
    options += ["--epochs", 1, "-b", 4, "--output", output, "--interpolation", "bilinear"]
    result = call("train", folder, *options, "--normalisation", "inception")
    assert "images: 9 train, 3 val, 6 test; 3 classes" in result.output
    assert "train: images decoded once and kept, 0 MiB on cpu" in result.output
    assert "test: 1 entries left out: " in result.output
    assert "test.txt line 7: label -3 is out of range, 0 to 2" in result.output
    # The test accuracy lacks an image, which the exit status reports.
    assert result.exit_code == 1
    config = json.loads((output / "best" / "adapter_config.json").read_text())
    assert config["input"]["interpolation"] == "bilinear"
    assert config["input"]["mean"] == [0.5, 0.5, 0.5]
    line = next(line for line in result.output.splitlines() if line.startswith("test: 6 images"))
    again = call("eval", output, folder, "--checkpoint", checkpoint)
    assert line in again.output
    assert again.exit_code == 1
