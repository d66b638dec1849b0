"""`vpt-fast export`: one file that runs in Python without this package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from support.formulations.plain import distance, redraw_prompts
from support.pictures import CLASSES, IMG_SIZE
from support.pictures import backbone as any_backbone
from typer.testing import CliRunner

from vpt_fast import VAPT, VPTDeep, load_adapter, prompt_tune, save_adapter
from vpt_fast.cli.app import app

METHODS: dict[str, Any] = {"deep": VPTDeep(3, shared=True), "vapt": VAPT(2)}


DEPTH = {"depth": 2}
SAVED: dict[str, Any] = {"checkpoint": "tiny.pth", "model_args": DEPTH}


def backbone() -> Any:
    return any_backbone(**DEPTH)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(backbone().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, method in METHODS.items():
        tuned = prompt_tune(backbone(), method)
        redraw_prompts(tuned)
        save_adapter(tuned, folder / name, class_names=CLASSES, **SAVED)
    return {name: folder / name for name in METHODS}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def error_of(result: Any) -> str:
    """Return the one line on stderr."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("vpt-fast: error: ")
    return str(lines[0])


BLOCKER = """
import sys


class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vpt_fast", "timm"):
            raise ImportError(name + " was imported")


sys.meta_path.insert(0, Refused())
import json, torch
images = torch.load(sys.argv[1])
"""


@pytest.mark.filterwarnings("ignore")
def test_the_printed_line_runs_it_without_this_package(
    adapters: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    adapter = adapters["vapt"]
    output = tmp_path / "new" / "task.pt2"
    result = call(adapter, "--checkpoint", checkpoint, "--output", output, "--device", "cpu")
    assert result.exit_code == 0, result.output
    about, how = result.stdout.splitlines()
    assert about.startswith(f"{output}: ")
    assert f"images (batch, 3, {IMG_SIZE}, {IMG_SIZE}) in float32 on cpu" in about
    off = re.search(r"at most (\S+) of the largest logit", about)
    assert off is not None and float(off.group(1)) < 1e-5
    assert [path.name for path in output.parent.iterdir()] == ["task.pt2"]

    images = torch.randn(5, 3, IMG_SIZE, IMG_SIZE)
    torch.save(images, tmp_path / "images.pt")
    assert how.startswith("load it: ")
    script = (
        BLOCKER
        + how.removeprefix("load it: ")
        + f"\ntorch.save([program(images), program(images[:1])], {str(tmp_path / 'found.pt')!r})"
        + '\nprint(extra["task.json"])'
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "images.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    tuned = load_adapter(backbone(), adapter).eval()
    found, single = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        assert distance(found, tuned(images)) < 1e-5
    assert distance(single, found[:1]) < 1e-5
    task = json.loads(done.stdout)
    assert task["class_names"] == list(CLASSES) and task["multi_label"] is False
    assert task["method"]["name"] == "vapt"
    assert task["input"]["input_size"] == [3, IMG_SIZE, IMG_SIZE]
    assert task["input"]["dtype"] == "float32"
    assert len(task["input"]["mean"]) == len(task["input"]["std"]) == 3
    assert {"interpolation", "crop_pct", "crop_mode"} <= task["input"].keys()


@pytest.mark.filterwarnings("ignore")
def test_a_file_is_replaced_only_with_overwrite(
    adapters: dict[str, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "task.pt2"
    output.write_text("something else")
    options = (adapters["deep"], "--checkpoint", checkpoint, "-o", output, "--dtype", "bfloat16")
    for more in ((), ("--overwrite",)):
        message = error_of(call(*options, *more))
        assert f"{output} exists and is not of an earlier export; choose another" in message
        assert output.read_text() == "something else"
    with ZipFile(output, "w") as file:
        file.writestr("archive/extra/task.json", "{}")
    before = output.read_bytes()
    message = error_of(call(*options))
    assert f"{output} exists, of an earlier export; choose another --output, or repl" in message

    def full(*args: Any, **kwargs: Any) -> None:
        args[1].write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", full)
        assert "No space left on device" in error_of(call(*options, "--overwrite"))
    assert output.read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]

    result = call(*options, "--overwrite")
    assert result.exit_code == 0, result.output
    assert "in bfloat16 on" in result.stdout
    program = torch.export.load(output).module()
    images = torch.randn(2, 3, IMG_SIZE, IMG_SIZE)
    found = program(images.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        expected = load_adapter(backbone(), adapters["deep"]).eval()(images)
    assert distance(found, expected) < 0.05


@pytest.mark.filterwarnings("ignore")
def test_logits_that_are_not_finite_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    tuned: Any = prompt_tune(backbone(), VPTDeep(1))
    with torch.no_grad():
        tuned.head.weight.normal_(std=3e4)
    save_adapter(tuned, tmp_path / "adapter", **SAVED)
    options = ("--checkpoint", checkpoint, "-o", tmp_path / "task.pt2", "--dtype", "float16")
    message = error_of(call(tmp_path / "adapter", *options))
    assert "logits in float16 are not finite; use --dtype bfloat16 or float32" in message
    assert not (tmp_path / "task.pt2").exists()


def test_wrong_input_is_named_and_nothing_is_written(
    adapters: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    output, weights = tmp_path / "task.pt2", ("--checkpoint", checkpoint)
    deep = adapters["deep"]
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "none", "-o", output), "none is not an adapter: it has no adapter_config"),
        ((deep, "-o", output), "trained on the weights in tiny.pth; pass --checkpoint"),
        ((deep, "-o", output, "--checkpoint", "no.pth"), "no checkpoint file no.pth"),
        ((deep, "-o", tmp_path / "task.pt", *weights), "its name must end in .pt2"),
        ((deep, "-o", output, *weights, "--dtype", "int8"), "--dtype is 'int8'; choose one of"),
        ((deep, "-o", output, *weights, "--device", "tpu"), "device is 'tpu'; choose auto, cpu"),
    ]
    for arguments, message in cases:
        assert message in error_of(call(*arguments))
    (tmp_path / "folder.pt2").mkdir()
    message = error_of(call(deep, "-o", tmp_path / "folder.pt2", "--overwrite", *weights))
    assert "folder.pt2 is a folder; choose another --output" in message
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]
    missing = call(deep, *weights)
    assert missing.exit_code == 2 and "--output" in missing.stderr
