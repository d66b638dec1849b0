"""The study of the normalised row runs, and supports the choice."""

from __future__ import annotations

import pytest

from bench.studies import norm_choice
from bench.studies.norm_choice import CHOSEN, DATAFLOW, IMPLEMENTATIONS, INPUTS, errors, rows_moved


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[float | str, float]]:
    return errors()


@pytest.mark.parametrize("kind", INPUTS)
def test_the_choice_is_no_further_from_fp64_than_eager(measured, kind: float | str) -> None:
    assert measured[CHOSEN][kind] <= measured["eager"][kind] * 1.001
    assert measured[CHOSEN][kind] < 5e-3


def test_a_narrow_product_of_raw_rows_loses_to_an_offset(measured) -> None:
    errors_bf16 = measured["rank one, bf16 product"]
    assert errors_bf16[50.0] > 10 * measured[CHOSEN][50.0]
    assert measured["rank one, fp32 product"][50.0] < measured["eager"][50.0]


def test_the_choice_moves_less_than_eager() -> None:
    assert rows_moved(CHOSEN) == rows_moved("eager") - 2
    assert rows_moved("rank one, pass over qkv") > rows_moved(CHOSEN)
    assert rows_moved("rank one, inside attention") == rows_moved(CHOSEN) - 2


def test_the_tables_are_printed(
    measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(norm_choice, "errors", lambda: measured)
    norm_choice.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*IMPLEMENTATIONS, *DATAFLOW))
