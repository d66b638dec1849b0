"""One rule for outputs that exist: --overwrite replaces a command's own, and nothing else."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import torch
from test_cli import call, error_of, train

from vpt_fast.train.common.output_folder import Output, starts_with
from vpt_fast.train.common.ranking import most_probable, percent

OWN = Output(
    "paint",
    starts_with(("a", "b"), "table.csv"),
    re.compile(r"table\.csv|pictures|.+\.png"),
    "table.csv",
)


def test_a_folder_is_new_or_the_commands_own(tmp_path) -> None:
    folder = tmp_path / "out"
    OWN.check(folder)
    (folder / "pictures").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="out exists and is not of an earlier paint; choose"):
        OWN.check(folder, overwrite=True)
    (folder / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileExistsError, match="earlier paint; .* or replace it with --overwrite"):
        OWN.check(folder)
    OWN.check(folder, overwrite=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not of an earlier paint \(it holds notes.txt\)"):
        OWN.check(folder, overwrite=True)
    with pytest.raises(FileExistsError, match="notes.txt is a file; choose another --output"):
        OWN.check(folder / "notes.txt", overwrite=True)


def test_what_a_killed_process_left_is_nothing(tmp_path) -> None:
    (tmp_path / ".table.csv.writing-0af").touch()
    OWN.check(tmp_path)


def test_a_folder_is_cleared_with_its_mark_last(tmp_path, monkeypatch) -> None:
    (tmp_path / "pictures").mkdir()
    kept = tmp_path.parent / f"{tmp_path.name}-kept"
    kept.mkdir()
    (tmp_path / "link.png").symlink_to(kept)
    (tmp_path / "table.csv").write_text("a,b")

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            OWN.clear(tmp_path)
    assert OWN.is_own(tmp_path)
    OWN.clear(tmp_path)
    assert list(tmp_path.iterdir()) == [] and kept.is_dir()


def test_train_replaces_a_run_and_nothing_else(folder, checkpoint, tmp_path) -> None:
    output = tmp_path / "run"
    short = ["--epochs", 1, "--num-prompts", 1]
    assert train(folder, checkpoint, output, *short).exit_code == 0
    message = error_of(train(folder, checkpoint, output, "--overwrite", "--resume"))
    assert "--resume goes on and --overwrite starts again; leave one out" in message
    # Nothing is removed before everything has been checked.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert "opt is 'lion'" in error_of(
        train(folder, checkpoint, output, "--overwrite", "--opt", "lion")
    )
    other = ["--overwrite", "--num-prompts", 99999999, "--method", "partial"]
    assert "has no option" in error_of(train(folder, checkpoint, output, *other))
    assert "no data folder" in error_of(train(tmp_path / "x", checkpoint, output, "--overwrite"))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    result = train(folder, checkpoint, output, "--overwrite", "--epochs", 2, "--method", "linear")
    assert result.exit_code == 0, result.output
    assert json.loads((output / "run.json").read_text())["method"]["name"] == "linear"
    with (output / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    (output / "notes.txt").write_text("mine")
    message = error_of(train(folder, checkpoint, output, "--overwrite"))
    assert "is not of an earlier train (it holds notes.txt)" in message
    assert (output / "best").is_dir()


def test_a_run_that_is_rewound_is_not_removed(folder, checkpoint, tmp_path) -> None:
    first = tmp_path / "first"
    words = ["--method", "e2vpt", "--num-prompts", 2, "--epochs", 1]
    assert train(folder, checkpoint, first, *words).exit_code == 0
    for rewound in (first, first / "best"):
        message = error_of(
            train(folder, checkpoint, first, *words, "--overwrite", "--rewind", rewound)
        )
        assert f"--rewind {rewound} is in --output, which is overwritten" in message
    assert (first / "best").is_dir()


def test_sweep_goes_on_or_starts_again(folder, checkpoint, tmp_path) -> None:
    output = tmp_path / "sweep"
    words = ["--methods", "linear", "--weight-decays", 0, "--seeds", 1, "--epochs", 1, "-b", 8]
    words += ["--model", "test_vit", "--img-size", 32, "--checkpoint", checkpoint]

    def sweep(lrs, *more):
        return call("sweep", folder, "--output", output, *words, "--lrs", lrs, *more)

    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "holds other files and no sweep that could go on" in error_of(sweep("1"))
    assert "(it holds notes.txt)" in error_of(sweep("1", "--overwrite"))
    (output / "notes.txt").unlink()
    assert sweep("1").exit_code == 0
    journal = (output / "sweep.journal").read_bytes()
    assert sweep("1").exit_code == 0
    assert (output / "sweep.journal").read_bytes().startswith(journal)
    result = sweep("2", "--overwrite")
    assert result.exit_code == 0, result.output
    with (output / "sweep.csv").open() as file:
        assert {row["lr"] for row in csv.DictReader(file)} == {"2.0"}


@pytest.mark.parametrize(
    ("probability", "text"),
    [(0.5, "50.00%"), (0.0, "< 0.01%"), (4.9e-5, "< 0.01%"), (5.1e-5, "0.01%"), (1.0, "100.00%")],
)
def test_small_probabilities(probability: float, text: str) -> None:
    assert percent(probability) == text


def test_small_probabilities_with_one_digit() -> None:
    assert (percent(0.0004, 1), percent(0.0006, 1)) == ("0.04%", "0.1%")
    (_, (_, low)) = most_probable(torch.tensor([20.0, 0.0]), None, 2)
    assert percent(low) == "< 0.01%"
