"""Class folders: files that are not images, links and cycles, and the order of classes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.adapters.adapter_editing import rewrite_config
from support.pictures import make_folders, write_checkpoint, write_image
from typer.testing import CliRunner

from vpt_fast.cli.app import app
from vpt_fast.train.data.formats.class_folders import find_images, natural
from vpt_fast.train.data.images import ImageFolders
from vpt_fast.train.data.sources import open_source


def blank(image: Image.Image) -> torch.Tensor:
    return torch.zeros(3, 2, 2)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_other_types_are_read_or_counted(tmp_path):
    make_folders(tmp_path, train=2)
    blue = tmp_path / "train" / "blue"
    with Image.open(blue / "0.png") as image:
        for end, file_format in ((".gif", "GIF"), (".jfif", "JPEG"), (".BMP", "BMP")):
            image.save(blue / f"more{end}", file_format)
    for name in ("a.heic", "b.HEIC", "notes.txt", "README"):
        (tmp_path / "train" / "red" / name).write_bytes(b"x")
    for name in (".DS_Store", "Thumbs.db", "._0.png", ".hidden.png"):
        (blue / name).write_bytes(b"x")
    shutil.copytree(tmp_path / "train" / "red", tmp_path / "train" / "__MACOSX")
    shutil.copytree(tmp_path / "train" / "red", blue / ".ipynb_checkpoints")
    write_image(tmp_path / "train" / "loose.png", 0, 5)
    images = ImageFolders(tmp_path / "train", blank)
    assert images.classes == ["blue", "green", "red"]
    assert [Path(path).name for path, label in images.samples if label == 0] == [
        "0.png",
        "1.png",
        "more.BMP",
        "more.gif",
        "more.jfif",
    ]
    folder = tmp_path / "train"
    assert images.warnings == [
        f"{folder}: files of types that are not read: 1 without extension, 2 .heic, 1 .txt",
        f"{folder}: images in no class folder, which are not read: 1",
    ]
    assert set(images.warnings) <= set(open_source(tmp_path).warnings)
    for path in (tmp_path / "train" / "red").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"without an image in .*: red \(1 without ext.*, 1 "):
        ImageFolders(folder, blank)


def test_links_and_cycles_end(tmp_path):
    make_folders(tmp_path, train=2)
    blue = tmp_path / "train" / "blue"
    for name in ("again", "and again"):
        (blue / name).symlink_to(blue)
    (blue / "up").symlink_to(tmp_path)
    (blue / "lost.png").symlink_to(tmp_path / "nowhere.png")
    found = find_images(blue)
    names = [os.path.relpath(path, blue) for path in found.images]
    # Through "up" the images of other classes are found, each once.
    assert names[:3] == ["0.png", "1.png", "lost.png"] and len(names) == 3 + 4
    (blue / "up").unlink()
    images = ImageFolders(tmp_path / "train", blank)
    assert images.targets.count(0) == 3
    assert "No such file" in images[2].reason


def test_natural_order():
    names = ["class10", "class2", "Class1", "class02", "7", "12", "x" + 5000 * "9", ""]
    want = ["", "7", "12", "Class1", "class02", "class2", "class10", "x" + 5000 * "9"]
    assert natural(names) == want


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Create folders 1 to 12, and an adapter trained on them without class names."""
    root = tmp_path_factory.mktemp("numbered")
    classes = tuple(str(number) for number in range(1, 13))
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(classes):
            for i in range(count):
                write_image(root / "data" / split / name / f"{i}.png", label % 3, 100 * label + i)
    checkpoint = write_checkpoint(root / "tiny.pth")
    options = ["--model", "test_vit", "--img-size", 32, "--checkpoint", checkpoint]
    options += ["--epochs", 1, "--output", root / "out", "--method", "linear"]
    result = call("train", root / "data", *options)
    assert result.exit_code == 0, result.output
    last = root / "out" / "last"
    content = json.loads((last / "adapter_config.json").read_text())
    assert content["class_names"] == sorted(classes)
    rewrite_config(last, lambda config: config.update(class_names=None))
    return root


def test_an_adapter_without_names_needs_the_order_of_its_classes(numbered):
    arguments = ["eval", numbered / "out", numbered / "data", "--checkpoint", numbered / "tiny.pth"]
    result = call(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "class 1 of" in line and "'10' by strings and '2' by numbers in names" in line
    assert line.endswith("say how they were sorted with eval --class-order strings or natural")
    found = {}
    for order in ("strings", "natural"):
        result = call(*arguments, "--class-order", order)
        assert result.exit_code == 0, result.output
        found[order] = result.stdout
    assert found["strings"] != found["natural"]
    assert "choose one of strings, natural" in call(*arguments, "--class-order", "size").stderr
    # If both orders are the same, the option is not needed.
    for name in ("10", "11", "12"):
        for split in ("train", "test"):
            folder = numbered / "data" / split / name
            folder.rename(folder.with_name(f"9{name}"))
    assert call(*arguments).stdout.startswith("test: 12 images")


def test_an_adapter_with_names_needs_no_order(numbered):
    names = sorted(path.name for path in (numbered / "data" / "train").iterdir())
    last = numbered / "out" / "last"
    rewrite_config(last, lambda config: config.update(class_names=names))
    arguments = ["eval", numbered / "out", numbered / "data", "--checkpoint", numbered / "tiny.pth"]
    assert call(*arguments).exit_code == 0
    line = call(*arguments, "--class-order", "natural").stderr
    assert line == "vpt-fast: error: the adapter names its classes; leave --class-order out\n"
