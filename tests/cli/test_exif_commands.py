"""Rotation by EXIF: training decides it, its adapter records it, other commands follow it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from PIL import Image
from support.adapters.adapter_editing import rewrite_config
from support.pictures import CLASSES, make_folders, write_checkpoint
from typer.testing import CliRunner

from vpt_fast.cli.app import app


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Create rotated images with and without EXIF orientation, upright ones, and three runs."""
    root = tmp_path_factory.mktemp("exif")
    make_folders(root / "lying", train=2, test=2)
    for kind in ("said", "upright"):
        shutil.copytree(root / "lying", root / kind)
        for path in (root / kind).glob("*/*/*.png"):
            with Image.open(path) as image:
                exif = Image.Exif()
                exif[0x0112] = 6
                if kind == "said":
                    image.save(path, exif=exif)
                else:
                    image.transpose(Image.Transpose.ROTATE_270).save(path)
    checkpoint = write_checkpoint(root / "tiny.pth")
    options = ["--model", "test_vit", "--img-size", 32, "--checkpoint", checkpoint, "--lr", 3]
    options += ["--epochs", 2, "-b", 3, "--no-aug", "--num-prompts", 2, "--output"]
    for name, more in (("turned", []), ("stored", ["--no-exif"])):
        (root / f"{name}.txt").write_text(
            call("train", root / "said", *options, root / name, *more)
        )
    (root / "plain.txt").write_text(call("train", root / "upright", *options, root / "plain"))
    return root


def config_of(folder):
    return folder / "last" / "adapter_config.json"


def figures(text):
    return re.search(r"^test: [0-9].*", text, re.M).group()


def test_training_rotates_images_and_the_adapter_records_it(workspace):
    turned = json.loads(config_of(workspace / "turned").read_text())
    assert turned["input"]["exif_transpose"] is True
    stored = json.loads(config_of(workspace / "stored").read_text())
    assert stored["input"]["exif_transpose"] is False
    assert (
        json.loads((workspace / "stored" / "run.json").read_text())["image_options"]["exif"]
        is False
    )
    texts = {
        name: figures((workspace / f"{name}.txt").read_text()) for name in ("turned", "stored")
    }
    assert texts["turned"] == figures((workspace / "plain.txt").read_text()) != texts["stored"]


@pytest.mark.parametrize("name", ["turned", "stored", "older"])
def test_eval_and_predict_follow_the_adapter(workspace, name):
    if name == "older":
        # Adapters without the field were trained without rotation.
        shutil.copytree(workspace / "stored", workspace / "older")
        rewrite_config(
            workspace / "older" / "last", lambda config: config["input"].pop("exif_transpose")
        )
    weights = ["--checkpoint", workspace / "tiny.pth"]
    asked = "turned" if name == "turned" else "stored"
    assert figures((workspace / f"{asked}.txt").read_text()) in call(
        "eval", workspace / name, workspace / "said", *weights
    )
    same = "upright" if name == "turned" else "lying"
    for label in CLASSES:
        said, there = (
            call("predict", workspace / name, workspace / kind / "test" / label / "0.png", *weights)
            for kind in ("said", same)
        )
        assert said.partition(": ")[2] == there.partition(": ")[2]
