"""The command line: train, eval and predict, also with undecodable images."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.pictures import CLASSES
from typer.testing import CliRunner

from vpt_fast import prompt_tune
from vpt_fast.cli import app as app_module
from vpt_fast.cli.app import app
from vpt_fast.cli.common import block_indices
from vpt_fast.train.run import folder_run as run_module

MODEL = ["--model", "test_vit", "--img-size", "32"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(folder, checkpoint, output, *arguments):
    options = ["--epochs", 2, "-b", 8, "--lr", 3, "--output", output, *arguments]
    return call("train", folder, *MODEL, "--checkpoint", checkpoint, *options)


def error_of(result, code=2):
    """Return the one line on stderr."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("vpt-fast: error: ")
    return lines[0]


def test_training_prints_its_settings_and_writes_its_files(run):
    output, result = run
    assert "vpt-deep on test_vit, cpu: " in result.stdout
    assert "images: 24 train, 9 val, 12 test; 3 classes" in result.stdout
    assert "learning rate 3 x 8 / 256 = 0.09375" in result.stdout
    assert len(re.findall(r"^epoch \d/4 ", result.stdout, re.M)) == 4
    assert f"adapter: {output / 'best'}" in result.stdout
    files = {path.name for path in output.iterdir()}
    assert files == {"best", "last", "metrics.csv", "tensorboard", "checkpoint.pt", "run.json"}
    config = json.loads((output / "best" / "adapter_config.json").read_text())
    assert config["class_names"] == list(CLASSES)
    assert config["method"]["num_prompts"] == 3
    assert config["model"]["checkpoint"] == "tiny.pth"
    assert config["input"]["input_size"] == [3, 32, 32]


def test_eval_repeats_the_accuracy_of_training(run, folder, checkpoint):
    output, trained = run
    line = re.search(r"^test: 12 images, .*$", trained.stdout, re.M).group()
    for adapter in (output, output / "best"):
        result = call("eval", adapter, folder, "--checkpoint", checkpoint)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == line
    result = call("eval", output, folder / "test", "--checkpoint", checkpoint, "--workers", 2)
    assert result.stdout.strip() == line
    result = call("eval", output, folder, "--checkpoint", checkpoint, "--split", "val")
    best = re.search(r"kept epoch \d, ([\d.]+)% on val", trained.stdout).group(1)
    assert f"val: 9 images, top-1 {best}%" in result.stdout


def test_predict_names_classes_and_probabilities(run, folder, checkpoint):
    images = [folder / "test" / name / "0.png" for name in CLASSES]
    result = call("predict", run[0], *images, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line, image in zip(lines, images, strict=True):
        path, _, rest = line.partition(": ")
        assert path == str(image)
        found = re.findall(r"(\w+) (?:< )?([\d.]+)%", rest)
        assert sorted(name for name, _ in found) == list(CLASSES)
        percents = [float(value) for _, value in found]
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=0.05)
    top = call("predict", run[0], *images, "--checkpoint", checkpoint, "--topk", 1)
    assert [line.count("%") for line in top.stdout.splitlines()] == [1, 1, 1]


def test_predict_continues_after_an_undecodable_image(run, folder, checkpoint, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    good = folder / "test" / "red" / "0.png"
    result = call("predict", run[0], broken, good, "--checkpoint", checkpoint)
    assert f"{broken} cannot be decoded" in error_of(result, code=1)
    assert result.stdout.startswith(f"{good}: ")


def test_undecodable_images_are_counted(folder, checkpoint, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "train" / "red" / "cut.png").write_bytes(b"\x89PNG")
    (data / "test" / "red" / "bad.jpg").write_bytes(b"")
    result = train(data, checkpoint, tmp_path / "out", "--epochs", 1)
    assert result.exit_code == 1
    assert "skipped 1 images that cannot be decoded" in result.stdout
    assert "cut.png" in result.stdout
    assert "test: 12 images" in result.stdout
    assert "cannot be decoded: 1" in result.stderr
    assert "1 images are not in these figures" in result.stderr and "bad.jpg" in result.stderr
    result = call("eval", tmp_path / "out", data, "--checkpoint", checkpoint)
    assert "1 images are not in these figures" in error_of(result, code=1)
    assert "test: 12 images" in result.stdout


@pytest.mark.parametrize("method", ["linear", "vpt-shallow"])
def test_other_methods_and_no_validation(folder, checkpoint, tmp_path, method):
    data = shutil.copytree(folder / "train", tmp_path / "data" / "train").parent
    result = train(data, checkpoint, tmp_path / "out", "--method", method, "--no-aug")
    assert result.exit_code == 0, result.output
    assert "no val/ folder: the last epoch is kept" in result.stdout
    assert f"adapter: {tmp_path / 'out' / 'last'}" in result.stdout
    result = call("eval", tmp_path / "out", data, "--checkpoint", checkpoint)
    assert "no test/ or val/" in error_of(result)
    result = call("eval", tmp_path / "out", data, "--checkpoint", checkpoint, "--split", "train")
    assert "train: 24 images" in result.stdout


def test_the_memory_mode_reaches_the_model(folder, checkpoint, tmp_path, monkeypatch):
    modes = []

    def tune(model, method, memory="speed"):
        modes.append(memory)
        return prompt_tune(model, method, memory)

    monkeypatch.setattr(run_module, "prompt_tune", tune)
    for name, options in (("a", []), ("b", ["--memory", "minimal"])):
        result = train(folder, checkpoint, tmp_path / name, "--no-aug", *options)
        assert result.exit_code == 0, result.output
    assert modes == ["speed", "minimal"]


def test_a_run_repeats_itself(folder, checkpoint, tmp_path):
    for name in ("a", "b"):
        assert train(folder, checkpoint, tmp_path / name, "--dropout", 0.1).exit_code == 0
    first, second = (
        (tmp_path / name / "last" / "adapter_model.safetensors").read_bytes() for name in "ab"
    )
    assert first == second


def test_ctrl_c_ends_training_and_leaves_a_usable_adapter(folder, checkpoint, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "vpt_fast.cli", "train", folder, *MODEL]
    command += ["--checkpoint", checkpoint, "--epochs", 10_000, "--output", output]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (output / "best").is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert re.search(rf"interrupted after \d+ of 10000 epochs; adapter: {output}/best", stdout)
    assert "Traceback" not in stderr
    result = call("eval", output / "last", folder, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output


def test_a_name_in_no_encoding_does_not_end_a_run(folder, checkpoint, tmp_path, monkeypatch):
    data = shutil.copytree(folder, tmp_path / "data")
    name = os.fsdecode(os.fsencode(next((data / "train").iterdir())) + b"/\xff.png")
    Path(name).write_text("no image")
    command = ["vpt-fast", "train", data, *MODEL, "--checkpoint", checkpoint, "--epochs", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--output", str(tmp_path / "out")])
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    assert not ended.value.code
    assert rb"\udcff.png cannot be decoded" in stdout.buffer.getvalue()


def test_frozen_blocks_are_computed_once(folder, checkpoint, tmp_path):
    arguments = ("--no-aug", "--blocks", "4-5", "--epochs", "2")
    cached = train(folder, checkpoint, tmp_path / "cached", *arguments)
    plain = train(folder, checkpoint, tmp_path / "plain", *arguments, "--no-prefix-cache")
    assert cached.exit_code == plain.exit_code == 0, cached.output + plain.output
    assert "the first 4 of 6 blocks are frozen" in cached.output
    assert "are frozen" not in plain.output
    rows = []
    for name in ("cached", "plain"):
        with (tmp_path / name / "metrics.csv").open() as file:
            rows.append([float(row["train_loss"]) for row in csv.DictReader(file)])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_blocks_are_given_as_ranges(folder, checkpoint, tmp_path):
    assert block_indices("9-11") == [9, 10, 11] and block_indices("0, 6,8-9") == [0, 6, 8, 9]
    for text in ("", "a", "3-", "-3"):
        line = error_of(train(folder, checkpoint, tmp_path / "run", f"--blocks={text}"))
        assert "such as 9-11 or 0,6" in line


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "partial", "--num-blocks", 2),
        ("--method", "adapter", "--reduction", 4),
        ("--method", "mlp-head", "--num-layers", 2, "--hidden-dim", 16),
        ("--method", "full", "--opt", "adamw", "--lr", 0.01),
    ],
)
def test_baselines_train_and_evaluate(folder, checkpoint, tmp_path, options):
    result = train(folder, checkpoint, tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    found = call("eval", tmp_path / "run" / "best", folder, "--checkpoint", checkpoint)
    assert found.exit_code == 0 and "12 images" in found.output, found.output
