"""Style that all pictures share: colours, axes, plain numbers, headings that fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vpt_fast.adapter.hub.names import is_on_hub

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, MUTED, GRID, WRONG = "#1f2933", "#5f6b7a", "#e3e7ec", "#D55E00"
# In points and inches.
_TITLE, _SUBTITLE, _TITLE_LINE, _SUBTITLE_LINE, _ABOVE = 14.0, 10.0, 0.28, 0.21, 0.2


def style_axes(axes: Axes, grid: str = "y") -> None:
    """Give axes two muted spines, a pale grid behind the data and plain numbers.

    Args:
        axes: Axes with linear scales; `log_numbers` follows for others.
        grid: Axis that the grid lines belong to: "x", "y" or "" for none.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.set_axisbelow(True)
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        plain_numbers(axis)
        if name == grid:
            axis.grid(color=GRID, linewidth=0.8)


def plain_numbers(axis: Axis) -> None:
    """Write the numbers of an axis as decimals, without an offset or a power of ten."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: decimal(value)))


def log_numbers(axis: Axis) -> None:
    """Give a logarithmic axis of positive data few ticks, labelled with decimals."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes = axis.axes
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    if high < 5 * low:  # it may hold fewer than two of 1, 2 and 5 times a power of ten
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    plain_numbers(axis)


def decimal(value: float) -> str:
    """Return a number with six significant digits at most, and commas between thousands."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return np.format_float_positional(float(f"{value:.6g}"), trim="-")


def percentage(share: float, digits: int = 2) -> str:
    """Return a share of 1 as a percentage; one that would read as zero is "< 0.01%".

    Args:
        share: Value in [0, 1].
        digits: Number of decimals; smaller shares have up to two.
    """
    percent = 100 * share
    if 0 < percent < 0.005:
        return "< 0.01%"
    if percent > 0 and round(percent, digits) == 0:
        digits = 2
    return f"{percent:.{digits}f}%"


def named_folder(folder: Path) -> str:
    """Return the name of a folder and of the one that it is in, for titles.

    An adapter on the Hub has its name there, `hf-hub:user/name`.
    """
    if is_on_hub(folder):
        return str(folder)
    path = folder.resolve()
    return f"{path.name} in {path.parent.name}" if path.parent.name else path.name


def text_inches(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of a line of text.

    Args:
        text: Line, in which "$" is no mathematics.
        size: Size of the font, in points.
        weight: Weight of the font, "normal" or "bold".
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with _without_glyph_warnings():
        font = FontProperties(size=size, weight=weight)
        width: float = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
    return width / 72


def wrapped(text: str, inches: float, size: float, weight: str = "normal") -> list[str]:
    """Return the lines of a text that is at most so wide; a word that is wider is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_inches(longer, size, weight) <= inches:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if lines[-1] and text_inches(lines[-1] + character, size, weight) > inches:
                lines.append("")
            lines[-1] += character
    return lines


@dataclass(frozen=True)
class Heading:
    """Title and subtitle of a picture, wrapped to the room that they have.

    Attributes:
        title: Text in bold.
        subtitle: Text below it.
        room: Width of the text, in inches.
        left: Distance from the picture's left edge, in inches.
    """

    title: str
    subtitle: str
    room: float
    left: float = 0.3

    @cached_property
    def lines(self) -> tuple[list[str], list[str]]:
        """Lines of the title, and of the subtitle."""
        return (
            wrapped(self.title, self.room, _TITLE, "bold"),
            wrapped(self.subtitle, self.room, _SUBTITLE),
        )

    @property
    def height(self) -> float:
        """Height from the picture's upper edge to below the subtitle, in inches."""
        title, subtitle = self.lines
        return _ABOVE + len(title) * _TITLE_LINE + len(subtitle) * _SUBTITLE_LINE + 0.06

    def draw(self, figure: Figure) -> None:
        """Draw the heading into the upper left corner of a figure."""
        width, height = figure.get_size_inches()
        y = height - _ABOVE
        styles = ((_TITLE, "bold", INK, _TITLE_LINE), (_SUBTITLE, "normal", MUTED, _SUBTITLE_LINE))
        for lines, (size, weight, colour, step) in zip(self.lines, styles, strict=True):
            for line in lines:
                y -= step
                figure.text(
                    self.left / width, (y + step / 2) / height, line, va="center", fontsize=size,
                    fontweight=weight, color=colour, parse_math=False,
                )  # fmt: skip
            y -= 0.04


def save(figure: Figure, path: Path) -> None:
    """Write a figure; characters that the font lacks are boxes, without a warning."""
    with _without_glyph_warnings():
        figure.savefig(path)


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    # Names of files and classes may be in scripts that matplotlib's font lacks.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
