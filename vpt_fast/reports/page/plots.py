"""Plots as SVG inside the page, with text as text and colours that follow the page's style."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vpt_fast.reports.page.experts import ExpertUse
from vpt_fast.train.common.metrics import Epoch
from vpt_fast.train.common.style import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    log_numbers,
    plain_numbers,
    style_axes,
)
from vpt_fast.train.sweep.report import ROW_INCHES, Accuracies, draw_accuracies

# Ink, muted text and grid become variables of the page's style, which defines them for light and
# dark. The colours of the runs are distinct on both.
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
# Small enough for one column of a phone; wider screens show several of them.
_PANEL = (4.2, 2.7)


@dataclass(frozen=True)
class Line:
    """Line style of a run in all plots: colour, and dashes as in SVG's stroke-dasharray."""

    colour: str
    dashes: str


@dataclass(frozen=True)
class Curve:
    """Epochs of a run, its line style, and the number of the selected epoch."""

    epochs: Sequence[Epoch]
    line: Line
    kept: int | None


@dataclass(frozen=True)
class Plot:
    """Plot and its title."""

    title: str
    svg: Markup


def line_of(index: int) -> Line:
    """Return the line style of the run with this number; 24 are distinct."""
    colour = COLOURS[index % len(COLOURS)]
    return Line(colour, _DASHES[index // len(COLOURS) % len(_DASHES)])


def learning_curves(curves: Sequence[Curve]) -> list[Plot]:
    """Return plots of the losses, accuracies and learning rate that the curves have."""
    panels = (
        ("val_top1", "Validation accuracy (%)"),
        ("val_map", "Validation mAP (%)"),
        ("val_loss", "Validation loss"),
        ("train_top1", "Training accuracy (%)"),
        ("train_loss", "Training loss"),
        ("lr", "Learning rate"),
    )
    plots = []
    for name, title in panels:
        if any(getattr(row, name) is not None for curve in curves for row in curve.epochs):
            plots.append(Plot(title, _curves(curves, name)))
    return plots


def _curves(curves: Sequence[Curve], name: str) -> Markup:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        style_axes(axes)
        positive = True
        for curve in curves:
            points = [(row.epoch, getattr(row, name)) for row in curve.epochs]
            points = [(epoch, value) for epoch, value in points if value is not None]
            if not points:
                continue
            positive = positive and all(value > 0 for _, value in points)
            x, y = zip(*points, strict=True)
            style: Any = "-" if not curve.line.dashes else (0, _numbers(curve.line.dashes))
            axes.plot(
                x, y, color=curve.line.colour, linestyle=style, linewidth=1.8,
                marker="" if len(points) > 1 else ".",
            )  # fmt: skip
            kept = [(epoch, value) for epoch, value in points if epoch == curve.kept]
            if kept and name.startswith("val_"):
                axes.plot(*kept[0], "o", color=curve.line.colour, markersize=6)
        if name.endswith("_loss") and positive:
            log_numbers(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch", color=MUTED)

    return _svg(draw, _PANEL, name)


def sweep_plot(methods: Sequence[Accuracies], name: str) -> Markup:
    """Return the plot of a sweep's final runs, as in its picture.

    Args:
        methods: Methods, from top to bottom.
        name: Unique name of the plot on the page.
    """

    def draw(figure: Figure) -> None:
        draw_accuracies(figure.add_subplot(), methods)

    return _svg(draw, (_PANEL[0], ROW_INCHES * len(methods) + 0.5), name)


def expert_map(use: ExpertUse, name: str) -> Markup:
    """Return a heat map of shares by block and prompt, and bars of all prompts of each block.

    Args:
        use: Shares to show.
        name: Unique name of the plot on the page.
    """
    blocks, prompts = use.shares.shape
    height = float(np.clip(0.22 * blocks, 0.8, 5.0)) + 1.1

    def draw(figure: Figure) -> None:
        share, together = figure.subplots(1, 2, sharey=True, width_ratios=(2.4, 1))
        style_axes(share, grid="")
        style_axes(together, grid="x")
        highest = float(np.nanmax(use.shares)) or 1.0
        image = share.imshow(
            100 * use.drawn, cmap=_BLUES, vmin=0, vmax=100 * highest, aspect="auto",
            interpolation="nearest", extent=(-0.5, prompts - 0.5, blocks - 0.5, -0.5),
        )  # fmt: skip
        share.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        share.set_yticks(range(blocks), [str(block) for block in use.blocks])
        share.set_xlabel("prompt", color=MUTED)
        share.set_ylabel("block", color=MUTED)
        bar = figure.colorbar(image, ax=share, location="top", aspect=40, pad=0.03)
        bar.set_label("share of attention, %", color=MUTED)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=MUTED, length=3)
        plain_numbers(bar.ax.xaxis)
        together.barh(
            range(blocks), 100 * np.nansum(use.shares, axis=1), color=COLOURS[0], height=0.7
        )
        together.axvline(100 * use.uniform, color=COLOURS[5], linewidth=1.5, linestyle="--")
        together.tick_params(labelleft=False)
        together.xaxis.set_major_locator(MaxNLocator(nbins=3, min_n_ticks=2))
        together.set_xlim(left=0)
        together.set_xlabel("all prompts, %", color=MUTED)

    return _svg(draw, (_PANEL[0], height), name)


_BLUES = LinearSegmentedColormap.from_list("blues", ["#e8f1f8", "#56B4E9", "#0072B2", "#00334f"])


def _numbers(dashes: str) -> list[float]:
    return [float(part) / 1.8 for part in dashes.split()]


def _svg(draw: Callable[[Figure], None], size: tuple[float, float], name: str) -> Markup:
    """Draw a figure and return it as an element of the page.

    It is hidden from screen readers, for which the page has the same content as text.
    """
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.0}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    return Markup(_inline(buffer.getvalue(), name))


def _inline(text: str, name: str) -> str:
    """Return an SVG file of matplotlib's as an element: without prolog, with unique ids."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(
        r' id="([^"]+)"',
        lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "",
        text,
    )
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    # The page sets the size: the picture is as wide as its container.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    # The page defines font and strokes; a style element here would apply to the whole page.
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
