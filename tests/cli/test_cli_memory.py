"""`vpt-fast memory`: its defaults, files, and refusals."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vpt_fast.cli.app import app

SMALL = ["--model", "test_vit", "--img-size", "32", "-b", "2"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["memory", *SMALL, *map(str, arguments)])


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "memory.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("--num-prompts", 2, "--prompts", "0,4", "--dropout", 0.1)
    assert result.exit_code == 0, result.output
    assert "| 2 prompts, first 4 blocks" in result.stdout
    output = Path("output") / "memory-test_vit-vpt-deep"
    assert f"written to {output}: memory.csv" in result.stdout
    rows = rows_of(output)
    assert {row["num_prompts"] for row in rows} == {"0", "2", "4"}
    assert {row["dropout"] for row in rows} == {"0.1"}
    assert (output / "memory.png").is_file()


def test_the_module_runs_as_a_program(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    arguments = ["memory", *SMALL, "--method", "linear", "--dtype", "float16"]
    monkeypatch.setattr(sys, "argv", ["vpt-fast", *arguments, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vpt_fast.cli", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().err == "" and not recwarn.list
    assert {row["dtype"] for row in rows_of(tmp_path / "out")} == {"float16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vit_base_patch16_244"], "did you mean vit_base_patch16_224"),
        (["--model", "swinv2_tiny_window8_256"], "cannot tune a Swin"),
        (["--method", "vpt"], "--method is 'vpt'; choose one of linear, vpt-shallow, vpt-deep"),
        (["--method", "vapt", "--num-prompts", "5"], "--method vapt does not vary; use --prompts"),
        (["--method", "linear", "--prompts", "5"], "--method linear has no option --prompts"),
        (["--method", "linear", "--dropout", "0.1"], "--method linear has no option --dropout"),
        (["--num-prompts", "-1"], "num_prompts must be at least 0, got -1"),
        (["--prompts", "3,-1"], "num_prompts must be at least 0, got -1"),
        (["--prompts", "3 4"], "--prompts is '3 4'; give numbers with commas between them"),
        (["--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--dtype", "int8"], "dtype is 'int8'; choose one of bfloat16, float16, float32"),
        (["--img-size", "8"], "test_vit takes no images of size (3, 8, 8)"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    result = call("--output", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("vpt-fast: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = call("--output", tmp_path)
    assert result.exit_code == 2
    assert (
        f"{tmp_path} exists and is not of an earlier memory (it holds notes.txt)" in result.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
