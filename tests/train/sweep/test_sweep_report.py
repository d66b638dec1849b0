"""The picture of a sweep: one axis, plain numbers, texts that fit and can be read on a phone."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vpt_fast.train.common.style import Heading
from vpt_fast.train.sweep import report
from vpt_fast.train.sweep.report import Accuracies, write
from vpt_fast.train.sweep.sweep import Outcome, Result

CASES = {
    "usual": [("linear", 1290, [95.0, 96.0]), ("vapt", 6418, [97.0, 97.5])],
    "perfect": [("linear", 12, [100.0, 99.99]), ("full", 85_800_000, [100.0, 100.0])],
    "one": [("package.module:AMethodWithALongName", 85_800_000, [0.0])],
    "none": [("linear", 12, []), ("vapt", 12, [50.0, 51.0])],
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("case", CASES)
def test_one_axis_with_plain_numbers_and_no_text_over_another(case, drawn) -> None:
    methods = [Accuracies(*values) for values in CASES[case]]
    report._draw(Path("unused"), methods, "Sweep photos-sweep in out", "photos, a_model, 2 epochs")
    (figure,) = drawn
    (axes,) = figure.axes
    figure.draw_without_rendering()
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    low, high = axes.get_xlim()
    assert 0 <= low < high <= 100
    assert ticks and all(set(text) <= set("0123456789.") for text in ticks), ticks
    assert not axes.xaxis.get_offset_text().get_text()
    texts = [*figure.texts, *axes.texts]
    boxes = [text.get_window_extent() for text in texts]
    page = figure.bbox
    for text, box in zip(texts, boxes, strict=True):
        assert page.x0 <= box.x0 and box.x1 <= page.x1, text
        # 360 pixels wide, with 13 of margin on each side.
        assert text.get_fontsize() / 72 * (360 - 26) / figure.get_size_inches()[0] >= 9
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    written = " ".join(text.get_text() for text in texts)
    for method in methods:
        assert f"{method.trained:,} trained" in written
        if method.top1:
            assert f"{np.mean(method.top1):.2f}" in written


def _recording(titles: list[str]) -> Any:
    def heading(title: str, *rest: Any) -> Heading:
        titles.append(title)
        return Heading(title, *rest)

    return heading


def test_it_names_the_folder_and_nothing_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "photos-sweep"
    folder.mkdir(parents=True)
    outcome = Outcome(90.0, 0.1, 1290, 21_000, 1.0)
    results = [
        Result(name, {"lr": 1.0, "weight_decay": 0.0}, outcome, {1: outcome, 2: outcome})
        for name in ("linear", "bias")
    ]
    headings: list[str] = []
    monkeypatch.setattr(report, "Heading", _recording(headings))
    table, picture = write(folder, results, "photos, vit_tiny, 2 epochs")
    assert headings[0] == "Sweep photos-sweep in out"
    assert table.read_text().count("linear") == 2
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    white = (pixels == 255).all(axis=-1)
    for edge in (white[:20], white[-20:], white[:, :20], white[:, -20:]):
        assert edge.all()
