"""Options of timm's train.py on the command line: `train` and `sweep`."""

from __future__ import annotations

import json

import pytest
from test_cli import MODEL, call, error_of, train

from vpt_fast.reports.page.runs import read_runs

EVERY = [
    "--smoothing", 0.1, "--mixup", 0.8, "--cutmix", 1, "--mixup-prob", 0.9,
    "--mixup-switch-prob", 0.4, "--mixup-mode", "pair", "--aa", "rand-m9-mstd0.5-inc1",
    "--reprob", 0.2, "--bce-loss", "--model-ema", "--model-ema-decay", 0.9, "--model-ema-warmup",
    "--opt", "adam",
]  # fmt: skip


def test_every_option_reaches_the_record(folder, checkpoint, tmp_path):
    result = train(folder, checkpoint, tmp_path / "run", *EVERY, "--lr", 0.01, "--patience", 1)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    wanted = {
        "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.9, "mixup_switch_prob": 0.4,
        "mixup_mode": "pair", "bce_loss": True, "class_weights": None, "model_ema": True,
        "model_ema_decay": 0.9, "model_ema_warmup": True, "patience": 1, "opt": "adam",
    }  # fmt: skip
    assert {name: record["recipe"][name] for name in wanted} == wanted
    assert record["augmentation"]["aa"] == "rand-m9-mstd0.5-inc1"
    assert (record["augmentation"]["reprob"], record["augmentation"]["color_jitter"]) == (0.2, 0)
    assert "model_ema, decay 0.9 with warm-up: validation, test and adapters have" in result.stdout


def test_weights_jitter_and_early_stopping(folder, checkpoint, tmp_path):
    weights = tmp_path / "weights.json"
    weights.write_text("[1, 2.5, 0.5]")
    options = ["--class-weights", weights, "--color-jitter", 0.4, "--epochs", 6, "--patience", 1]
    result = train(folder, checkpoint, tmp_path / "run", *options, "--lr", 0)
    assert result.exit_code == 0, result.output
    assert "weights of classes: blue 1, green 2.5, red 0.5" in result.stdout
    # Nothing is learnt, so the first epoch stays the best.
    assert "stopped after epoch 2: none better on val for 1" in result.stdout
    assert "kept epoch 1 of 2, stopped early, " in result.stdout
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["stopped_early"] and record["state"] == "finished"
    assert record["recipe"]["class_weights"] == [1, 2.5, 0.5]
    state = read_runs([tmp_path / "run"])[0].state
    assert state == "finished, 2 epochs of 6, stopped early"
    again = train(folder, checkpoint, tmp_path / "run", *options, "--lr", 0, "--resume")
    assert again.exit_code == 0 and "kept epoch 1 of 2, stopped early" in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smoothing", "1"], "smoothing is 1.0"),
        (["--mixup", "1", "--class-weights", "balanced"], "class_weights and mixup cannot be"),
        (["--mixup-mode", "elem"], "mixup_mode is of mixup and cutmix, which are both 0"),
        (["--class-weights", "even"], "--class-weights is 'even'; give balanced"),
        (["--class-weights", "1,2"], "class_weights has 2 numbers for 3 classes"),
        (["--aa", "rand-q9"], "aa is 'rand-q9', which timm does not know"),
        (["--aa", "v0", "--no-aug"], "aa augments images, and no_aug is on"),
        (["--reprob", "0.5", "--cache", "memory"], "made of the files; choose cache auto or"),
        (["--reprob", "0.5", "--no-antialias"], "leave --no-antialias out"),
        (["--model-ema-decay", "0.9"], "are of model_ema; set it"),
        (["--patience", "0"], "patience is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_named_and_nothing_is_written(
    folder, checkpoint, tmp_path, options, message
):
    result = train(folder, checkpoint, tmp_path / "out", *options)
    assert message in error_of(result)
    assert not (tmp_path / "out").exists()


def sweep(folder, checkpoint, output, *options):
    return call(
        "sweep", folder, *MODEL, "--checkpoint", checkpoint, "--output", output, "--methods",
        "linear", "--lrs", "3", "--weight-decays", "0", "--seeds", 42, "--epochs", 1, "-b", 8,
        *options,
    )  # fmt: skip


def test_a_sweep_takes_them_and_is_another_one_with_others(folder, checkpoint, tmp_path):
    options = EVERY[:-2]
    result = sweep(folder, checkpoint, tmp_path / "sweep", *options)
    assert result.exit_code == 0, result.output
    other = sweep(folder, checkpoint, tmp_path / "sweep", *options[2:])
    assert "with other settings (recipe smoothing: 0.1, now None)" in error_of(other)
    other = sweep(folder, checkpoint, tmp_path / "sweep", *options, "--color-jitter", "0.4")
    assert "color_jitter would be ignored" in error_of(other)


def test_a_sweep_has_balanced_weights_of_its_own_part(folder, checkpoint, tmp_path):
    options = ["--class-weights", "balanced", "--no-aug"]
    result = sweep(folder, checkpoint, tmp_path / "sweep", *options)
    assert result.exit_code == 0, result.output
    wrong = sweep(folder, checkpoint, tmp_path / "other", "--class-weights", "1,2")
    assert "class_weights has 2 numbers for 3 classes" in error_of(wrong)
