"""The benchmark of training's costs beyond its steps."""

from __future__ import annotations

from typing import Any

import pytest

from bench.studies.training_loop import main


def test_both_parts_are_measured(capsys: Any) -> None:
    arguments = ["--model", "test_vit", "--images", "12", "--batch-size", "4", "--rounds", "1"]
    assert main([*arguments, "--no-aug"]) == 0
    printed = capsys.readouterr().out
    assert "test_vit, 12 images, no augmentation, batch 4" in printed
    assert 0 < float(printed.split("s: ")[-1].split()[0]) < 1


def test_wrong_arguments(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--images", "0"])
    assert "must be at least 1" in capsys.readouterr().err
