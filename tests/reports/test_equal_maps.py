"""Equal token mixing maps are found, named, and drawn once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from vpt_fast.reports import inspection_pictures as pictures
from vpt_fast.reports.equal_maps import TOLERANCE, equal_blocks, equal_prompts, numbered
from vpt_fast.reports.inspection_pictures import Mixing, Shares, save_attention, save_mixing
from vpt_fast.reports.page.experts import ExpertUse


def maps(*values: float) -> np.ndarray:
    """Return a map (2, 2) for each value, which is its first weight."""
    weights = np.tile(np.array([0.0, -1.0, 0.5, 0.25]).reshape(1, 2, 2), (len(values), 1, 1))
    weights[:, 0, 0] = values
    return weights


def test_maps_are_equal_to_a_part_of_the_largest_weight() -> None:
    assert TOLERANCE == 0.02
    assert equal_prompts(maps(0.5, 0.0, 0.519, 0.521, 0.0)) == [[0, 2], [1, 4], [3]]
    assert equal_prompts(10 * maps(0.5, 0.519)) == [[0, 1]]
    assert equal_prompts(np.zeros((3, 2, 2))) == [[0, 1, 2]]
    blocks = {1: maps(0, 1), 2: maps(0.01, 1), 4: maps(1, 0), 5: maps(0, 1), 6: maps(0, 1, 1)}
    assert equal_blocks(blocks) == [[1, 2, 5], [4], [6]]
    # Small beside another block's weights is not small beside its own.
    assert equal_blocks({1: maps(0.0), 2: 1e-3 * maps(0.0)}) == [[1], [2]]
    assert numbered("block", [2, 3, 4, 7]) == "blocks 2-4, 7"
    assert numbered("prompt", [5]) == "prompt 5"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    return figures


def texts_of(figure: Figure) -> list[str]:
    titles = [axes.get_title() for axes in figure.axes]
    return [text for text in [*titles, *(text.get_text() for text in figure.texts)] if text]


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 64)])
@pytest.mark.parametrize("values", [[0.5] * 10, [0.5, 0.5, 0, 0.7, 0], list(np.arange(30) / 10)])
def test_each_map_is_drawn_once_and_fits(drawn, values, size) -> None:
    shares = np.linspace(2e-5, 0.01, len(values))
    image = np.full((*size, 3), 0.5)
    mixing = Mixing([2, 3, 4], maps(*values), (8, 8), shares, image, "some_image, run in out")
    save_mixing(Path("unused"), mixing)
    (figure,) = drawn
    figure.draw_without_rendering()
    drawn_maps = [axes for axes in figure.axes if axes.get_title().startswith("prompt")]
    assert len(drawn_maps) == min(20, len(set(values)))
    text = " ".join(texts_of(figure)).replace("\n", " ")
    assert "blocks 3-4: the same" in text and "run in out" in text
    if len(set(values)) == 1:
        assert "10 prompts with the same map" in text and "prompts 0-9 · < 0.01% to 1.00%" in text
    for axes in figure.axes:
        box, page = axes.get_tightbbox(), figure.bbox
        assert box is not None
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    for one, other in zip(drawn_maps, drawn_maps[1:], strict=False):
        assert not one.get_tightbbox().overlaps(other.get_tightbbox())
    # No wider than its heading and its maps need.
    used = max(axes.get_tightbbox().x1 for axes in figure.axes)
    assert figure.bbox.x1 - used <= 0.4 * figure.dpi


@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 4, 10), (12, 12, 50)])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 0.9])
def test_attention_pictures_fit(drawn, shape, scale) -> None:
    shares = scale * np.random.default_rng(0).random(shape) / shape[2]
    group = Shares("mean of 1,000", range(shape[0]), shares)
    title = "Attention to prompts of a_run in a_folder"
    save_attention(Path("unused"), [group, group], title, "subtitle", 0.01, np.ones((8, 4, 3)))
    (figure,) = drawn
    figure.draw_without_rendering()
    page = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    left = [axes for axes in figure.axes if axes.get_xlabel() == "head"]
    right = [axes for axes in figure.axes if axes.get_xlabel() == "prompt"]
    for one, other in zip(left, right, strict=True):
        assert not one.get_tightbbox().overlaps(other.get_tightbbox())
        note = next(text for text in one.texts if text.get_text() == "mean")
        caption = next(
            text for text in one.get_children()
            if getattr(text, "get_text", str)().startswith("All prompts together")
        )  # fmt: skip
        assert caption.get_window_extent().x1 < note.get_window_extent().x0
    assert all("e-" not in label.get_text() for axes in figure.axes
               for label in axes.get_xticklabels())  # fmt: skip


def test_a_report_draws_equal_experts_as_one() -> None:
    shares = np.array([[0.1, 0.2, 0.3], [0.10, 0.12, 0.3], [0.2, 0.2, np.nan]])
    use = ExpertUse([0, 1, 2], shares, 0.5, 4, "query", {1: [[0, 1]], 2: [[0, 1]]})
    assert use.equal_in_words == ["blocks 1-2: prompts 0-1 the same"]
    np.testing.assert_allclose(use.drawn[:2], [[0.1, 0.2, 0.3], [0.11, 0.11, 0.3]])
    assert [row["least"] for row in use.rows] == ["prompt 0", "prompts 0-1", "prompts 0-1"]
    assert [row["most"] for row in use.rows] == ["prompt 2", "prompt 2", "prompts 0-1"]
    assert use.rows[1]["smallest"] == pytest.approx(0.11)
