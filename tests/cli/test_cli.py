"""The command line: train, eval and predict as a user types them, with wrong input too."""

from __future__ import annotations

import csv
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
import torch
from support.pictures import CLASSES, make_folders, write_checkpoint
from typer.testing import CliRunner

from vpt_fast import prompt_tune
from vpt_fast.cli.app import app
from vpt_fast.cli.common import block_indices
from vpt_fast.train.run import folder_run as run_module

MODEL = ["--model", "test_vit", "--img-size", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("colours"), train=8, val=3, test=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.pth")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(folder, checkpoint, output, *arguments):
    options = ["--epochs", 2, "-b", 8, "--lr", 3, "--output", output, *arguments]
    return call("train", folder, *MODEL, "--checkpoint", checkpoint, *options)


@pytest.fixture(scope="module")
def run(folder, checkpoint, tmp_path_factory):
    """The output folder of a finished run."""
    output = tmp_path_factory.mktemp("runs") / "deep"
    result = train(folder, checkpoint, output, "--epochs", 4, "--num-prompts", 3)
    assert result.exit_code == 0, result.output
    return output, result


def error_of(result, code=2):
    """The one line on stderr."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("vpt-fast: error: ")
    return lines[0]


def test_training_says_what_it_does_and_writes_it(run):
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


def test_eval_repeats_what_training_measured(run, folder, checkpoint):
    output, trained = run
    line = re.search(r"^test: 12 images, .*$", trained.stdout, re.M).group()
    for adapter in (output, output / "best"):
        result = call("eval", adapter, folder, "--checkpoint", checkpoint)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == line
    result = call("eval", output, folder / "test", "--checkpoint", checkpoint, "--workers", 2)
    assert result.stdout.strip() == line
    result = call("eval", output, folder, "--checkpoint", checkpoint, "--split", "val")
    kept = re.search(r"kept epoch \d, ([\d.]+)% on val", trained.stdout).group(1)
    assert f"val: 9 images, top-1 {kept}%" in result.stdout


def test_predict_names_classes_and_probabilities(run, folder, checkpoint):
    images = [folder / "test" / name / "0.png" for name in CLASSES]
    result = call("predict", run[0], *images, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line, image in zip(lines, images, strict=True):
        path, _, rest = line.partition(": ")
        assert path == str(image)
        found = re.findall(r"(\w+) ([\d.]+)%", rest)
        assert sorted(name for name, _ in found) == list(CLASSES)
        percents = [float(value) for _, value in found]
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=0.03)
    top = call("predict", run[0], *images, "--checkpoint", checkpoint, "--topk", 1)
    assert [line.count("%") for line in top.stdout.splitlines()] == [1, 1, 1]


def test_predict_goes_on_after_an_undecodable_image(run, folder, checkpoint, tmp_path):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vit_base_patch16_244"], "did you mean vit_base_patch16_224"),
        (["--model", "vit_base_patch16_224.imagenet"], "no pretrained tag 'imagenet'; it has"),
        (["--model", "swinv2_tiny_window8_256"], "cannot tune a Swin"),
        (["--checkpoint", "nowhere.pth"], "no checkpoint file nowhere.pth"),
        (["--pretrained"], "both --pretrained and --checkpoint"),
        (["--method", "vpt"], "--method is 'vpt'; choose one of linear, vpt-shallow, vpt-deep"),
        (["--method", "linear", "--num-prompts", "5"], "has no option --num-prompts"),
        (["--num-prompts", "-1"], "num_prompts must be at least 0, got -1"),
        (["--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["--warmup-epochs", "2"], "warmup_epochs is 2 of 2 epochs"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--lr", "-1"], "lr is -1"),
        (["--opt", "lion"], "opt is 'lion'; choose one of sgd, adamw"),
        (["--amp-dtype", "half"], "amp_dtype is 'half'; choose one of float32"),
        (["--scale", "0", "1"], "scale is 0 1; it must be 0 < low"),
        (["--hflip", "2"], "hflip is 2"),
        (
            ["--memory", "small"],
            "memory must be one of speed, balanced, lean, minimal; got 'small'",
        ),
        (["--device", "tpu"], "device is 'tpu'; choose auto, cpu, cuda"),
        (["--workers", "-1"], "workers is -1"),
        (["--num-prompts", "0"], "--num-prompts 0 trains the head alone; --method linear"),
        (["--model", "vpt_fast_demo", "--img-size", "64"], "the demo's model has one size, 32"),
        (["--img-size", "33"], "test_vit takes no images of size (3, 33, 33): "),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(
    folder, checkpoint, tmp_path, options, message
):
    result = train(folder, checkpoint, tmp_path / "out", *options)
    assert message in error_of(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_absent_cuda_is_named(folder, checkpoint, tmp_path):
    result = train(folder, checkpoint, tmp_path / "out", "--device", "cuda")
    assert "device is 'cuda', but PyTorch sees 0 CUDA GPUs; use --device cpu" in error_of(result)


def test_a_backbone_without_weights_is_refused(folder, tmp_path):
    result = call("train", folder, *MODEL, "--output", tmp_path / "out")
    assert "no weights for the backbone; pass --pretrained" in error_of(result)


def test_bad_checkpoints_are_named(folder, checkpoint, tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(checkpoint.read_bytes()[:1000])
    text = tmp_path / "text.safetensors"
    text.write_text("not weights")
    numbers = tmp_path / "numbers.pth"
    torch.save([1, 2, 3], numbers)
    for path in (cut, text, numbers):
        result = train(folder, path, tmp_path / "out")
        assert f"checkpoint {path} cannot be read as weights of test_vit" in error_of(result)
    other = ["--model", "test_vit2"]
    assert "does not belong to test_vit2: it" in error_of(
        train(folder, checkpoint, tmp_path / "out", *other)
    )
    state = torch.load(checkpoint)
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"][:-1]
    torch.save(state, numbers)
    message = error_of(train(folder, numbers, tmp_path / "out"))
    assert "its blocks.0.mlp.fc1.weight has shape (" in message
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_exists_is_left_alone(run, folder, checkpoint):
    before = {path: path.stat().st_mtime_ns for path in run[0].rglob("*")}
    result = train(folder, checkpoint, run[0])
    assert f"output folder {run[0]} exists; choose another with --output" in error_of(result)
    assert {path: path.stat().st_mtime_ns for path in run[0].rglob("*")} == before


def test_bad_data_folders_are_named(folder, checkpoint, tmp_path):
    output = tmp_path / "out"
    assert "no data folder" in error_of(train(tmp_path / "nowhere", checkpoint, output))
    assert "has no folder 'train'" in error_of(train(tmp_path, checkpoint, output))
    (tmp_path / "train").mkdir()
    assert "no class folders" in error_of(train(tmp_path, checkpoint, output))
    make_folders(tmp_path, ("red",), train=2)
    assert "one class folder (red)" in error_of(train(tmp_path, checkpoint, output))
    make_folders(tmp_path, train=2)
    make_folders(tmp_path, (*CLASSES, "violet"), val=1)
    assert "training does not know: violet" in error_of(train(tmp_path, checkpoint, output))


def test_a_loss_that_is_not_finite_is_one_line(folder, checkpoint, tmp_path):
    options = ["--lr", 1e38, "--warmup-epochs", 1, "--epochs", 3]
    message = error_of(train(folder, checkpoint, tmp_path / "out", *options), code=1)
    assert "the loss is not finite in epoch 2, step 2 of 3" in message
    assert "adapter of epoch 1 is in" in message
    result = call("eval", tmp_path / "out" / "last", folder, "--checkpoint", checkpoint)
    assert result.exit_code == 0
    options[3] = 0
    message = error_of(train(folder, checkpoint, tmp_path / "other", *options), code=1)
    assert "no adapter is kept" in message
    assert not (tmp_path / "other").exists()


def test_resuming_in_a_folder_of_something_else(folder, checkpoint, tmp_path):
    """Neither is it written to, nor removed with a run that fails; what a run has left is not."""
    other = tmp_path / "other"
    (other / "src").mkdir(parents=True)
    (other / "src" / "keep.txt").write_text("keep")
    options = ["--lr", 1e38, "--warmup-epochs", 0, "--epochs", 3, "--resume"]
    message = error_of(train(folder, checkpoint, other, *options))
    assert f"{other} holds other files and no run that could go on" in message
    assert [path.name for path in other.rglob("*")] == ["src", "keep.txt"]
    (other / "run.json").write_text("{}")
    assert "no adapter is kept" in error_of(train(folder, checkpoint, other, *options), code=1)
    assert (other / "src" / "keep.txt").read_text() == "keep"
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".run.json.writing-0").touch()
    assert train(folder, checkpoint, begun, "--epochs", 1, "--resume").exit_code == 0


def test_adapters_that_do_not_fit_are_named(run, folder, checkpoint, tmp_path):
    message = error_of(call("eval", run[0], folder))
    assert "trained on the weights in tiny.pth; pass --checkpoint" in message
    other = write_checkpoint(tmp_path / "other.pth", seed=1)
    message = error_of(call("eval", run[0], folder, "--checkpoint", other))
    assert "is for another backbone" in message
    assert "not an adapter" in error_of(call("predict", tmp_path, folder / "a.png"))
    damaged = shutil.copytree(run[0] / "best", tmp_path / "damaged")
    tensors = damaged / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    message = error_of(call("eval", damaged, folder, "--checkpoint", checkpoint))
    assert "adapter_model.safetensors is damaged" in message
    (damaged / "adapter_config.json").write_text("{")
    message = error_of(call("eval", damaged, folder, "--checkpoint", checkpoint))
    assert "adapter_config.json is damaged" in message
    make_folders(tmp_path / "data", (*CLASSES, "violet"), test=1)
    message = error_of(call("eval", run[0], tmp_path / "data", "--checkpoint", checkpoint))
    assert "training does not know: violet" in message


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


def test_a_name_in_no_encoding_does_not_end_a_run(folder, checkpoint, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    name = os.fsdecode(os.fsencode(next((data / "train").iterdir())) + b"/\xff.png")
    Path(name).write_text("no image")
    command = [sys.executable, "-m", "vpt_fast.cli", "train", data, *MODEL]
    command += ["--checkpoint", checkpoint, "--epochs", 1, "--output", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert r"\udcff.png cannot be decoded" in done.stdout + done.stderr


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
