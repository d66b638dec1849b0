"""Picture of `vpt-fast memory`: bytes against prompted blocks and number of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vpt_fast.analysis.activation_memory import EAGER, PLAIN, PROVIDERS
from vpt_fast.train.common.style import (
    COLOURS,
    INK,
    MUTED,
    Heading,
    save,
    style_axes,
)

_DPI = 130
# Sizes and margins of the panels in the figure, in inches.
_PANEL_WIDTH, _PANEL_HEIGHT, _BOTTOM, _LEFT, _GAP = 4.0, 3.3, 0.65, 0.85, 0.45
_ONLY_WIDTH, _ROW_GAP, _LEGEND_LINE = 6.2, 1.05, 0.24
_GIB_FROM = 10 * 2**30
_COLOUR = {EAGER: INK, **dict(zip(PROVIDERS[1:], (COLOURS[i] for i in (0, 2, 1, 3)), strict=True))}
_MARKER = dict(zip(PROVIDERS, "os^Dv", strict=True))


@dataclass(frozen=True)
class Panel:
    """Diagram of bytes.

    Attributes:
        title: Title above the diagram.
        across: Label of the horizontal axis.
        up: Label of the vertical axis, without its unit.
        lines: Bytes by position on the horizontal axis, for each provider. If all lines have the
            same single position, bars are drawn and the horizontal axis names providers.
        reference: Bytes of the model without prompts, or None.
    """

    title: str
    across: str
    up: str
    lines: Mapping[str, Mapping[int, int]]
    reference: int | None


def save_panels(path: Path, title: str, subtitle: str, rows: Sequence[Sequence[Panel]]) -> None:
    """Draw rows of panels; those of a row share the scale of their vertical axes.

    Args:
        path: PNG file to write.
        title: First line of the heading.
        subtitle: Second line of the heading.
        rows: Rows of panels, with equally many in each.
    """
    columns = len(rows[0])
    across = _PANEL_WIDTH if columns > 1 else _ONLY_WIDTH
    # A single panel is too narrow for a legend in one line.
    lines = 1 if columns > 1 else 2
    width = _LEFT + columns * across + (columns - 1) * _GAP + 0.3
    heading = Heading(title, subtitle, width - 0.6)
    # Below the legend stands a panel's title.
    titled = any(panel.title for panels in rows for panel in panels)
    top = heading.height + lines * _LEGEND_LINE + (0.5 if titled else 0.3)
    height = top + len(rows) * _PANEL_HEIGHT + (len(rows) - 1) * _ROW_GAP + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    heading.draw(figure)
    grid = figure.add_gridspec(
        len(rows), columns, left=_LEFT / width, right=1 - 0.3 / width, top=1 - top / height,
        bottom=_BOTTOM / height, wspace=_GAP / across, hspace=_ROW_GAP / _PANEL_HEIGHT,
    )  # fmt: skip
    for i, panels in enumerate(rows):
        _draw_row([figure.add_subplot(grid[i, j]) for j in range(columns)], panels)
    _draw_legend(figure, (0.3 / width, 1 - (heading.height + 0.06) / height), lines)
    save(figure, path)


def _draw_row(axes: Sequence[Axes], panels: Sequence[Panel]) -> None:
    largest = max(
        (count for panel in panels for line in panel.lines.values() for count in line.values()),
        default=1,
    )
    largest = max(largest, *(panel.reference or 1 for panel in panels))
    unit, size = ("GiB", 2**30) if largest >= _GIB_FROM else ("MiB", 2**20)
    for column, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        style_axes(ax)
        positions = sorted({x for line in panel.lines.values() for x in line})
        if len(positions) == 1:
            _draw_bars(ax, panel, positions[0], size)
        else:
            _draw_lines(ax, panel, positions, size)
        if panel.reference is not None:
            ax.axhline(panel.reference / size, color=MUTED, linestyle=":", linewidth=1.6)
        ax.set_title(panel.title, loc="left", fontsize=10.5, color=INK)
        ax.set_ylim(0, 1.06 * largest / size)
        if column:
            ax.tick_params(labelleft=False)
        else:
            ax.set_ylabel(f"{panel.up} ({unit})", fontsize=9.5, color=MUTED)


def _draw_lines(ax: Axes, panel: Panel, positions: Sequence[int], size: int) -> None:
    for provider, line in panel.lines.items():
        x = sorted(line)
        ax.plot(x, [line[position] / size for position in x], **_style_of(provider))
    ax.set_xlabel(panel.across, fontsize=9.5, color=MUTED)
    ax.set_xticks(_apart(positions))


def _draw_bars(ax: Axes, panel: Panel, position: int, size: int) -> None:
    for i, (provider, line) in enumerate(panel.lines.items()):
        if position in line:
            value = line[position] / size
            ax.bar(i, value, color=_COLOUR[provider], width=0.6)
            ax.annotate(format_size(value), (i, value), (0, 3), textcoords="offset points",
                        ha="center", fontsize=9, color=INK,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    ax.set_xlabel(panel.across, fontsize=9.5, color=MUTED)
    ax.set_xticks(range(len(panel.lines)), list(panel.lines))


def format_size(value: float) -> str:
    """Return a size in MiB or GiB: whole from 100 on, one decimal below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _apart(positions: Sequence[int]) -> list[int]:
    """Return those of ascending positions whose labels do not overlap below an axis."""
    # In inches, for the narrowest panel: its margins are 5% each, and a digit takes 0.07.
    inch = 0.9 * _PANEL_WIDTH / (positions[-1] - positions[0])
    chosen = [positions[0]]
    for position in positions[1:]:
        digits = len(str(chosen[-1])) + len(str(position))
        if (position - chosen[-1]) * inch > 0.035 * digits + 0.06:
            chosen.append(position)
    return chosen


def _style_of(provider: str) -> dict[str, Any]:
    return {
        "color": _COLOUR[provider], "marker": _MARKER[provider], "markersize": 4.5,
        "linewidth": 1.8, "label": _label(provider), "clip_on": False,
    }  # fmt: skip


def _label(provider: str) -> str:
    return "eager PyTorch" if provider == EAGER else f"vpt_fast, {provider}"


def _draw_legend(figure: Figure, corner: tuple[float, float], lines: int) -> None:
    handles = [Line2D([], [], **_style_of(provider)) for provider in PROVIDERS]
    handles.append(
        Line2D([], [], color=MUTED, linestyle=":", linewidth=1.6, label=f"timm's model {PLAIN}")
    )
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=corner, ncols=len(handles) // lines,
        frameon=False, fontsize=9.5, labelcolor=INK, columnspacing=1.6, handlelength=2.2,
        borderpad=0, borderaxespad=0,
    )  # fmt: skip
