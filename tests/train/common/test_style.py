"""The style of pictures: plain numbers, small percentages, headings that fit, titles of folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from vpt_fast.train.common.style import (
    Heading,
    decimal,
    log_numbers,
    named_folder,
    percentage,
    style_axes,
    text_inches,
    wrapped,
)


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_numbers_are_plain_decimals() -> None:
    values = (0, 1e-5, 0.1 + 0.2, 99.98, 1234.6, 1e7, -2.5)
    assert [decimal(value) for value in values] == [
        "0", "0.00001", "0.3", "99.98", "1,235", "10,000,000", "-2.5",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [(1e-6, 3e-6), (2e-5, 3e-5), (0.1, 90.0), (1e3, 1e8)])
@pytest.mark.parametrize("log", [False, True])
def test_no_axis_has_an_offset_or_a_power_of_ten(values, log) -> None:
    axes = Figure().add_subplot()
    axes.plot(values, values)
    style_axes(axes)
    if log:
        log_numbers(axes.yaxis)
    axes.figure.draw_without_rendering()
    assert axes.yaxis.get_offset_text().get_text() == ""
    shown = [text for text in labels(axes.yaxis) if text]
    assert len(shown) >= 2
    assert all(set(text) <= set("0123456789.,-") for text in shown), shown


def test_a_small_share_is_not_zero() -> None:
    found = [percentage(share) for share in (0, 4.9e-5, 5.1e-5, 0.5, 1)]
    assert found == ["0.00%", "< 0.01%", "0.01%", "50.00%", "100.00%"]
    found = [percentage(share, 1) for share in (0, 4.9e-5, 4e-4, 6e-4, 0.999)]
    assert found == ["0.0%", "< 0.01%", "0.04%", "0.1%", "99.9%"]


def test_headings_wrap_and_keep_every_word() -> None:
    title = "a $title$ of several words and " + "one_that_is_wider_than_the_picture" * 2
    lines = wrapped(title, 2.0, 14, "bold")
    assert "".join(lines).replace(" ", "") == title.replace(" ", "")
    assert max(text_inches(line, 14, "bold") for line in lines) <= 2.0
    heading = Heading(title, "short", room=2.0)
    figure = Figure(figsize=(2.6, heading.height))
    heading.draw(figure)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts]
    assert len(boxes) == len(lines) + 1
    assert min(box.y0 for box in boxes) > 0
    assert max(box.x1 for box in boxes) <= figure.bbox.width * 2.4 / 2.6
    assert all(above.y0 >= below.y1 for above, below in zip(boxes, boxes[1:], strict=False))


def test_titles_name_the_folder_and_where_it_lies(tmp_path: Path) -> None:
    assert named_folder(tmp_path / "out" / "run") == "run in out"
    assert named_folder(tmp_path / "run" / "." / "best") == "best in run"
    assert named_folder(Path("hf-hub:user/name")) == "hf-hub:user/name"
