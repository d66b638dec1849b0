"""Tables and pictures of runs: learning curves and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vpt_fast.extras import require_extra
from vpt_fast.train.common.metrics import Epoch
from vpt_fast.train.common.style import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    WRONG,
    Heading,
    log_numbers,
    save,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 8


@dataclass(frozen=True)
class ShownImages:
    """A group of images for the picture.

    Attributes:
        images: (n, H, W) grey values in [0, 1].
        labels: (n,) class indices.
        predictions: (n,) class indices.
        title: Heading above the group.
    """

    images: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    title: str


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table that reads well in a terminal and is valid Markdown.

    Args:
        header: Column titles.
        rows: Cells; the first column is aligned left, the others right.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join(map(line, [header, rule, *rows]))


def format_bytes(count: int) -> str:
    """Format a size in bytes, kB or MB (powers of 1000)."""
    if count < 1000:
        return f"{count} B"
    if count < 999_500:
        return f"{count / 1000:.0f} kB"
    return f"{count / 1e6:.1f} MB"


def directory_size(directory: str | Path) -> int:
    """Return the bytes of all files in `directory`."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def save_picture(
    path: str | Path,
    curves: Mapping[str, Sequence[Epoch]],
    groups: Sequence[ShownImages],
    class_names: Sequence[str],
    title: str,
    subtitle: str,
) -> None:
    """Draw learning curves beside test images with their predictions.

    Args:
        path: PNG file to write.
        curves: Epochs by the name of the method.
        groups: Images for the right half, from top to bottom; 8 in a row.
        class_names: Names of the classes, by their index.
        title: First line of the heading.
        subtitle: Second line of the heading.
    """
    require_extra("reports", "matplotlib")
    # Only pictures need it; tables and sizes do not.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), dpi=150, facecolor="white", layout=None)
    Heading(title, subtitle, room=11.0, left=0.54).draw(figure)
    left = figure.add_gridspec(2, 1, left=0.075, right=0.46, top=0.80, bottom=0.095, hspace=0.42)
    _draw_curves(figure.add_subplot(left[0]), curves, "val_top1")
    _draw_curves(figure.add_subplot(left[1]), curves, "train_loss")
    _draw_images(figure, groups, class_names)
    save(figure, Path(path))


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[Epoch]], what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for (name, epochs), colour in zip(curves.items(), COLOURS, strict=False):
        x = [epoch.epoch for epoch in epochs]
        y = [getattr(epoch, what) for epoch in epochs]
        axes.plot(x, y, color=colour, linewidth=2, label=name, solid_capstyle="round")
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    if what == "val_top1":
        axes.set_title("Validation accuracy (%)", loc="left", fontsize=11, color=INK)
        # The first epochs start near chance; methods differ above.
        late = [getattr(epoch, what) for es in curves.values() for epoch in es[len(es) // 2 :]]
        axes.set_ylim(bottom=max(0.0, 10 * (min(late, default=0.0) // 10) - 10), top=100.5)
        axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="lower right")
    else:
        axes.set_title("Training loss (log scale)", loc="left", fontsize=11, color=INK)
        log_numbers(axes.yaxis)
        axes.set_xlabel("epoch", fontsize=10, color=MUTED)


def _draw_images(figure: Figure, groups: Sequence[ShownImages], class_names: Sequence[str]) -> None:
    rows = sum(-(-len(group.images) // COLUMNS) for group in groups)
    # In inches: a row of images with its captions, and the title above a group.
    row_height, title_height = 0.83, 0.40
    left, side, gap = 6.2, 0.56, 0.13
    width, height = figure.get_size_inches()
    top = height - 1.08
    for group in groups:
        figure.text(left / width, top / height, group.title, fontsize=11, color=INK, va="center")
        top -= title_height
        for i in range(len(group.images)):
            row, column = divmod(i, COLUMNS)
            x = left + column * (side + gap)
            y = top - row * row_height - side
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            _draw_image(axes, group, i, class_names)
        top -= row_height * -(-len(group.images) // COLUMNS)
        top -= 0.02 * rows


def _draw_image(axes: Axes, group: ShownImages, i: int, class_names: Sequence[str]) -> None:
    label, prediction = group.labels[i], group.predictions[i]
    right = bool(label == prediction)
    axes.imshow(group.images[i], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID if right else WRONG)
        spine.set_linewidth(1.0 if right else 2.2)
    text = str(class_names[prediction])
    axes.set_title(
        text if right else f"{text}, is {class_names[label]}",
        fontsize=10.5 if right else 9,
        color=INK if right else WRONG,
        fontweight="normal" if right else "bold",
        pad=3,
    )
