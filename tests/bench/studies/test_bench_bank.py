"""A bank compared with one task and with switching: correct logits, counts, wrong input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench.studies import bank

SMALL = ["--model", "test_vit", "--prompts", "4", "--tasks", "3", "--images", "6", "--rounds", "1"]


@pytest.mark.parametrize("method", ["vpt-deep", "vapt"])
def test_the_report(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bank.main([*SMALL, "--method", method]) == 0
    text = capsys.readouterr().out
    assert "3 tasks, logits' largest error" in text
    assert text.count("ms, measured") == 3
    found = re.search(r"counted: bank (\d+) launches, [\d,]+ MiB moved\n +switching (\d+)", text)
    assert found is not None
    ours, switching = map(int, found.groups())
    # Three passes, each with the copies of the task's tensors, against one with the tasks' experts.
    assert ours <= 0.52 * switching


def test_wrong_answers_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bank.BankComparison.by_bank
    monkeypatch.setattr(
        bank.BankComparison, "by_bank", lambda comparison: [1.01 * x for x in right(comparison)]
    )
    assert bank.main(SMALL) == 1
    assert "nothing is timed" in capsys.readouterr().out


def test_switching_changes_the_task(tmp_path: Path) -> None:
    comparison = bank.BankComparison(bank.BankCase("test_vit", "vpt-deep", 2, 2, 2), tmp_path)
    comparison.switch(0)
    first = comparison.one_task()
    comparison.switch(1)
    assert not torch.allclose(first, comparison.one_task())
    comparison.switch(0)
    assert torch.equal(first, comparison.one_task())


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, words in (
        (["--images", "5"], "images=5 must be a multiple of tasks=3"),
        (["--method", "linear"], "choose vpt-deep or vapt"),
    ):
        with pytest.raises(SystemExit):
            bank.main([*SMALL, *wrong])
        assert words in capsys.readouterr().err
