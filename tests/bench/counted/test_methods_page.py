"""The table of prompt methods: up to date, and its figures by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.counted import methods_page
from vpt_fast import BPT, E2VPT, VFPT, PromptMethod, VPTDeep
from vpt_fast.methods import METHODS


def test_the_page_is_up_to_date() -> None:
    assert methods_page.main(["--check"]) == 0


def test_every_method_of_the_package_is_there() -> None:
    ours = {
        name
        for name, cls in METHODS.items()
        if issubclass(cls, PromptMethod) and cls.__module__.startswith("vpt_fast.")
    }
    assert {method.name for method, _ in methods_page.METHODS} == ours


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (VPTDeep(), 12 * 50 * 768), (E2VPT(), 12 * (50 * 768 + 2 * 5 * 768)),
        (VFPT(), 12 * 50 * 768), (BPT(), 12 * (50 * 50 + 50 * 768)),
    ],
)  # fmt: skip
def test_parameters_by_hand(method: PromptMethod, parameters: int) -> None:
    text = Path(methods_page.PAGE).read_text(encoding="utf-8")
    (row,) = [
        x for x in text.splitlines() if x.startswith((f"| {method.name} ", f"| {method.name},"))
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == f"{parameters:,}", row


def test_a_page_without_its_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit):
        methods_page.main(["--page", str(page)])
    assert page.read_text() == "nothing" and capsys.readouterr().err
