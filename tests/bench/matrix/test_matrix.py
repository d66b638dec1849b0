"""The matrix of versions: smoke program, results file and page; nothing is installed."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from bench.matrix import __main__ as program
from bench.matrix import rows, smoke
from bench.matrix.environment import CommandError, interpreter
from bench.matrix.page import MARKS, Result, merge, read, write_page
from bench.matrix.rows import ROWS, Row

EXPECTED = json.loads((Path(smoke.__file__).parent / "expected.json").read_text(encoding="utf-8"))
ROW = ROWS[0]
ABOUT = {"device": "a CPU", "system": "Linux", "commit": "abc", "date": "2026-01-02"}


def result(row: Row, **changes: str) -> Result:
    return Result(**row._asdict(), checks="47 of 47", tests="", note="")._replace(**changes)


def test_logits_are_stored_for_every_family_and_method() -> None:
    assert sorted(EXPECTED) == sorted(f"{family} {method}" for family, method in smoke.cases())
    values = torch.tensor(list(EXPECTED.values()))
    assert values.shape[1:] == (smoke.BATCH, smoke.CLASSES) and values.isfinite().all()
    # Each case has logits of its own, and so tells one method from another.
    assert len({tuple(map(tuple, logits)) for logits in EXPECTED.values()}) == len(EXPECTED)


@pytest.mark.parametrize("case", ["vit vapt", "vit linear", "eva vpt-deep", "swin e2vpt"])
def test_the_smoke_program_finds_the_stored_logits(case: str, tmp_path: Path) -> None:
    family, method = case.split()
    found = smoke.lifecycle(family, method, tmp_path / "adapter")
    torch.testing.assert_close(found, torch.tensor(EXPECTED[case]).double(), rtol=1e-6, atol=1e-6)


def test_the_smoke_program_notices_another_logit() -> None:
    wrong = json.loads(json.dumps(EXPECTED))
    wrong["vit vpt-deep"][0][0] += 1e-6
    checks = dict(smoke.checks(wrong, None))
    with pytest.raises(AssertionError, match="not close"):
        checks["vit vpt-deep"]()
    checks["vit vpt-shallow"]()


@pytest.mark.parametrize("name", smoke.REFERENCE)
def test_the_smoke_program_compares_with_the_published_formulation(name: str) -> None:
    smoke.published(name)


def test_an_interpreter_is_one_of_that_version() -> None:
    version = ".".join(platform.python_version_tuple()[:2])
    found = interpreter(version)
    assert found is None or found.exists()
    assert interpreter("3.1") is None  # not 3.10


def test_the_lowest_version_is_so_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    later = ROW._replace(python="3.9", torch="2.10.0"), ROW._replace(python="3.10", torch="2.9.1")
    monkeypatch.setattr(rows, "ROWS", later)
    assert (rows.lowest("python"), rows.lowest("torch")) == ("3.9", "2.9.1")


def test_a_row_that_cannot_be_installed_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Path:
        raise CommandError("Looking\nNo matching distribution found for torch==2.8.0")

    monkeypatch.setattr(program, "interpreter", lambda version: None)
    found = program.try_row(ROW, tmp_path, tmp_path, tmp_path, ())
    assert (found.checks, found.note) == ("", f"no interpreter of Python {ROW.python}")
    monkeypatch.setattr(program, "interpreter", lambda version: tmp_path)
    monkeypatch.setattr(program, "install", fails)
    found = program.try_row(ROW, tmp_path, tmp_path, tmp_path, ())
    assert found.note == "No matching distribution found for torch==2.8.0"


def test_a_row_replaces_its_earlier_result(tmp_path: Path) -> None:
    path, page = tmp_path / "versions.csv", tmp_path / "versions.md"
    for row, found in (
        (ROWS[1], result(ROWS[1])),
        (ROW, result(ROW, checks="46 of 47", note="failed: command")),
        (ROWS[1], result(ROWS[1], tests="3 passed")),
    ):
        merge(row, found, ABOUT, path)
    assert [row["row"] for row in read(path)] == [ROW.name, ROWS[1].name]
    page.write_text("\n".join(MARKS), encoding="utf-8")
    assert write_page(page, path, check=True) == 1 and write_page(page, path) == 0
    lines = page.read_text(encoding="utf-8").splitlines()
    assert "| 46 of 47; failed: command |  | 2026-01-02 |" in lines[4]
    assert lines[5].endswith("| 47 of 47 | 3 passed | 2026-01-02 |")


def test_the_page_is_that_of_the_results() -> None:
    assert write_page(check=True) == 0
    passed = [row for row in read() if not row["note"]]
    for name in Row._fields:  # the lowest versions, which setup.py declares, have run
        assert any(row[name].startswith(rows.lowest(name)) for row in passed), name
