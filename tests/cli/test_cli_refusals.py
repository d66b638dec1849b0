"""The command line with wrong options, data, checkpoints and adapters: errors of one line."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.pictures import CLASSES, make_folders, write_checkpoint
from test_cli import MODEL, call, error_of, train


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
        (["--amp-dtype", "int8"], "amp_dtype is 'int8'; choose one of float32"),
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
    assert f"{run[0]} exists, of an earlier train; choose another --output" in error_of(result)
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
    """Other files are neither written to nor removed after a failed run; a run's own files are."""
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
    started = tmp_path / "started"
    started.mkdir()
    (started / ".run.json.writing-0").touch()
    assert train(folder, checkpoint, started, "--epochs", 1, "--resume").exit_code == 0


def test_adapters_that_do_not_fit_are_named(run, folder, checkpoint, tmp_path):
    message = error_of(call("eval", run[0], folder))
    assert "trained on the weights in tiny.pth; pass --checkpoint" in message
    other = write_checkpoint(tmp_path / "other.pth", seed=1)
    message = error_of(call("eval", run[0], folder, "--checkpoint", other))
    assert "is for another backbone" in message
    assert "not an adapter" in error_of(
        call("predict", tmp_path, folder / "test" / "red" / "0.png")
    )
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
