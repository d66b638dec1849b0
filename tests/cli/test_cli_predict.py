"""`vpt-fast predict --bank`: many adapters predict as each of them alone; wrong input is named."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.pictures import CLASSES, make_folders, write_checkpoint
from typer.testing import CliRunner

from vpt_fast.cli.app import app
from vpt_fast.train.data.images import eval_transform
from vpt_fast.train.run.tuned_model import load_tuned

MODEL = ["--model", "test_vit", "--img-size", "32"]
TASKS = {
    "deep": ["--method", "vpt-deep", "--num-prompts", 3],
    "experts": ["--method", "vapt", "--num-prompts", 2],
    "linear": ["--method", "linear"],
}


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result, code=2):
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    (line,) = result.stderr.splitlines()
    return line.removeprefix("vpt-fast: error: ")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Create folders of images, a checkpoint, and a folder of three runs' outputs."""
    root = tmp_path_factory.mktemp("bank")
    images = make_folders(root / "images", train=8, val=3, test=4)
    checkpoint = write_checkpoint(root / "tiny.pth")
    for name, options in TASKS.items():
        where = ["--checkpoint", checkpoint, "--output", root / "tasks" / name]
        result = call("train", images, *MODEL, "--epochs", 1, "-b", 8, "--lr", 3, *where, *options)
        assert result.exit_code == 0, result.output
    return root


def pictures(workspace: Path) -> list[Path]:
    return [workspace / "images" / "test" / name / f"{i}.png" for name in CLASSES for i in (0, 1)]


def test_every_image_is_answered_by_its_own_task(workspace):
    images = pictures(workspace)
    order = [*TASKS, *reversed(TASKS)]
    weights = ["--checkpoint", workspace / "tiny.pth"]
    result = call(
        "predict", "--bank", workspace / "tasks", "--tasks", ",".join(order), *images, *weights
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == len(images) == 6
    for line, image, task in zip(lines, images, order, strict=True):
        alone = call("predict", workspace / "tasks" / task, image, *weights)
        assert alone.exit_code == 0 and line == alone.stdout.strip()
    answers = {line.partition(": ")[2] for line in lines}
    assert len(answers) > 3  # the tasks differ


def test_one_task_for_all_and_an_undecodable_image(workspace, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    images = [broken, *pictures(workspace)]
    weights = ["--checkpoint", workspace / "tiny.pth"]
    result = call("predict", "--bank", workspace / "tasks", "--tasks", "experts", *images, *weights)
    assert f"{broken} cannot be decoded" in error_of(result, 1)
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [
        str(image) for image in images[1:]
    ]


def test_wrong_arguments(workspace, tmp_path):
    image = pictures(workspace)[0]
    weights = ["--checkpoint", workspace / "tiny.pth"]
    bank = ["predict", "--bank", workspace / "tasks"]
    assert "--bank needs --tasks" in error_of(call(*bank, image, *weights))
    assert "names 2 tasks for 1 images" in error_of(call(*bank, "--tasks", "deep,deep", image))
    message = error_of(call(*bank, "--tasks", "cats", image, *weights))
    assert "has no task 'cats'; it has deep, experts, linear" in message
    message = error_of(
        call("predict", "--tasks", "deep", workspace / "tasks" / "deep", image, *weights)
    )
    assert message == "--tasks needs --bank, the folder that holds their adapters"
    assert "needs an ADAPTER and at least one IMAGE" in error_of(call("predict", image))
    nowhere = call("predict", "--bank", tmp_path / "none", "--tasks", "deep", image)
    assert "there is no folder" in error_of(nowhere)
    empty = call("predict", "--bank", tmp_path, "--tasks", "deep", image)
    assert "holds no adapters" in error_of(empty)
    assert "pass --checkpoint with its path" in error_of(call(*bank, "--tasks", "deep", image))


def test_a_method_that_no_bank_holds(workspace, tmp_path):
    images, weights = workspace / "images", ["--checkpoint", workspace / "tiny.pth"]
    output = tmp_path / "tasks" / "shallow"
    more = ["--epochs", 1, "-b", 8, "--output", output, "--method", "vpt-shallow"]
    assert call("train", images, *MODEL, *weights, *more).exit_code == 0
    shutil.copytree(workspace / "tasks" / "deep", tmp_path / "tasks" / "deep")
    bank = ["predict", "--bank", tmp_path / "tasks", *weights, "--tasks"]
    assert "tuned with VPTShallow" in error_of(call(*bank, "shallow", pictures(workspace)[0]))
    assert call(*bank, "deep", pictures(workspace)[0]).exit_code == 0


def test_folders_are_read_as_the_data_are(workspace, tmp_path):
    weights = ["--checkpoint", workspace / "tiny.pth"]
    folder = tmp_path / "some"
    shutil.copytree(workspace / "images" / "val", folder / "b")
    shutil.copy(pictures(workspace)[0], folder / "z.png")
    (folder / "b" / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    alone = pictures(workspace)[1]
    result = call("predict", workspace / "tasks" / "deep", alone, folder, *weights)
    assert result.exit_code == 0, result.output
    names = [line.partition(": ")[0] for line in result.stdout.splitlines()]
    below = [str(folder / "b" / name / f"{i}.png") for name in CLASSES for i in range(3)]
    assert names == [str(alone), str(folder / "z.png"), *below]
    bank = call("predict", "--bank", workspace / "tasks", "--tasks", "deep", folder, *weights)
    assert bank.stdout.splitlines() == result.stdout.splitlines()[1:]
    empty = tmp_path / "empty"
    empty.mkdir()
    message = error_of(call("predict", workspace / "tasks" / "deep", empty, *weights))
    assert message == f"{empty} has no images in it or below it"
    (empty / "a.txt").write_text("text")
    message = error_of(call("predict", workspace / "tasks" / "deep", empty, *weights))
    assert message == f"{empty} has no images in it or below it; it has 1 .txt"
    message = error_of(call("predict", workspace / "tasks" / "deep", empty / "no.png", *weights))
    assert message == f"there is no image {empty / 'no.png'}"


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_predictions_are_written_to_a_file(workspace, tmp_path, suffix):
    output = tmp_path / "new" / f"found{suffix}"
    adapter, weights = workspace / "tasks" / "deep", ["--checkpoint", workspace / "tiny.pth"]
    images = pictures(workspace)[:2]
    words = ["predict", adapter, *images, *weights, "--topk", 2, "--output", output]
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"written to {output}: 2 images, 4 rows\n"
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file)) if suffix == ".csv" else json.load(file)
    assert [list(row) for row in rows] == [["path", "rank", "class", "probability"]] * 4
    assert [(row["path"], int(row["rank"])) for row in rows] == [
        (str(image), rank) for image in images for rank in (1, 2)
    ]
    loaded = load_tuned(adapter, workspace / "tiny.pth", torch.device("cpu"))
    for image, row in zip(images, rows[::2], strict=True):
        tensor = eval_transform(loaded.inputs)(Image.open(image).convert("RGB"))
        wanted = loaded.net(tensor[None])[0].softmax(0)
        assert row["class"] == CLASSES[int(wanted.argmax())]
        assert float(row["probability"]) == pytest.approx(float(wanted.max()), rel=1e-5)
    before = output.read_bytes()
    assert "replace it with --overwrite" in error_of(call(*words))
    assert call(*words, "--overwrite").exit_code == 0 and output.read_bytes() == before
    output.write_text("mine")
    assert "is not of an earlier predict" in error_of(call(*words, "--overwrite"))
    assert output.read_text() == "mine"
    message = error_of(call(*words[:-1], tmp_path / "found.txt"))
    assert message == f"--output is {tmp_path / 'found.txt'}; its name must end in .csv or .json"
