"""Results of a sweep: a table, a CSV file and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vpt_fast.extras import require_extra
from vpt_fast.train.common.curves import format_bytes, format_table
from vpt_fast.train.common.output_folder import write_csv
from vpt_fast.train.common.style import (
    COLOURS,
    INK,
    MUTED,
    Heading,
    named_folder,
    save,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vpt_fast.train.sweep.sweep import Result

TABLE, PICTURE = "sweep.csv", "sweep.png"
LEGEND = "A dot is a seed; the diamond is their mean, with one standard deviation to each side."
"""What `draw_accuracies` draws, in words."""
ROW_INCHES = 0.52
"""Height of a method in the picture."""
_NAME = 16
HEADER = (
    "method", "lr", "weight_decay", "num_prompts", "validation_top1", "seed", "test_top1",
    "test_loss", "trained_parameters", "adapter_bytes", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Accuracies:
    """Final runs of a method.

    Attributes:
        name: Name of the method.
        trained: Number of trained parameters.
        top1: Test accuracy of each seed, in percent.
    """

    name: str
    trained: int
    top1: Sequence[float]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation; NaN for fewer than two values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return float(np.mean(values)) if len(values) else float("nan"), deviation


def table(results: Sequence[Result]) -> str:
    """Return a line per method: the chosen point, and the final runs' mean and deviation."""
    rows = []
    for result in results:
        finals = list(result.finals.values())
        mean, deviation = mean_and_deviation([final.top1 for final in finals])
        chosen = result.values
        rows.append(
            [
                result.name,
                f"{chosen['lr']:g}",
                f"{chosen['weight_decay']:g}",
                str(chosen.get("num_prompts", "")),
                f"{result.validation.top1:.2f}%",
                f"{mean:.2f}%",
                f"{deviation:.2f}",
                f"{result.validation.trained:,}",
                format_bytes(finals[0].adapter_bytes) if finals else "",
                str(len(finals)),
            ]
        )
    header = [
        "method", "lr", "weight decay", "prompts", "validation", "test, mean", "deviation",
        "trained parameters", "adapter", "seeds",
    ]  # fmt: skip
    return format_table(header, rows)


def write(folder: Path, results: Sequence[Result], title: str) -> tuple[Path, Path]:
    """Write the final runs as CSV, one row each, and the picture.

    Args:
        folder: Folder of the sweep, which the picture's title names.
        results: Results, one per method.
        title: Data, model and epochs, for the picture.

    Returns:
        The two paths.
    """
    rows = [
        [
            result.name, result.values["lr"], result.values["weight_decay"],
            result.values.get("num_prompts", ""), result.validation.top1, seed, final.top1,
            final.loss, final.trained, final.adapter_bytes, f"{final.seconds:.1f}",
        ]
        for result in results
        for seed, final in result.finals.items()
    ]  # fmt: skip
    write_csv(folder / TABLE, HEADER, rows)
    methods = [
        Accuracies(
            result.name, result.validation.trained, [run.top1 for run in result.finals.values()]
        )
        for result in results
    ]
    _draw(folder / PICTURE, methods, f"Sweep {named_folder(folder)}", title)
    return folder / TABLE, folder / PICTURE


def draw_accuracies(axes: Axes, methods: Sequence[Accuracies]) -> None:
    """Draw a row per method: its name and figures, and below them its runs on a common axis.

    Args:
        axes: Empty axes, `ROW_INCHES` high for each method.
        methods: Methods, from top to bottom.
    """
    from matplotlib.ticker import MaxNLocator

    style_axes(axes, grid="x")
    axes.spines["left"].set_visible(False)
    for row, method in enumerate(methods):
        mean, deviation = mean_and_deviation(method.top1)
        axes.plot(
            method.top1, [row] * len(method.top1), "o", color=COLOURS[0], alpha=0.8,
            markeredgewidth=0, clip_on=False,
        )  # fmt: skip
        spread = 0.0 if np.isnan(deviation) else deviation
        axes.errorbar(
            mean, row, xerr=[[min(spread, mean)], [min(spread, 100 - mean)]], color=INK,
            marker="D", markersize=4.5, capsize=3.5, linewidth=1.2, clip_on=False,
        )  # fmt: skip
        for x, side, text, colour in (
            (0.0, "left", _shortened(method.name), INK),
            (0.7, "right", f"{method.trained:,} trained", MUTED),
            (1.0, "right", _figures(mean, deviation), INK),
        ):
            axes.text(
                x, row - 0.4, text, transform=axes.get_yaxis_transform(), ha=side, va="center",
                fontsize=9, color=colour, parse_math=False,
            )  # fmt: skip
    axes.set_ylim(len(methods) - 0.55, -0.7)
    axes.set_yticks([])
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, 0.0), min(high, 100.0))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("test accuracy, %", color=MUTED, fontsize=9)


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME // 2]}…{name[-(_NAME // 2) :]}"


def _figures(mean: float, deviation: float) -> str:
    if np.isnan(mean):
        return "no run"
    return f"{mean:.2f}" + ("" if np.isnan(deviation) else f" ± {deviation:.2f}")


def _draw(path: Path, methods: Sequence[Accuracies], title: str, subtitle: str) -> None:
    require_extra("sweep", "matplotlib")
    from matplotlib.figure import Figure

    # Narrow, so that it can be read on a phone.
    width, side, bottom = 4.4, 0.3, 0.55
    heading = Heading(title, f"{subtitle}. {LEGEND}", width - 2 * side, side)
    rows = ROW_INCHES * len(methods)
    height = heading.height + rows + bottom
    figure = Figure(figsize=(width, height), dpi=240, facecolor="white")
    heading.draw(figure)
    axes = figure.add_axes(
        (side / width, bottom / height, 1 - 2 * side / width, rows / height), facecolor="none"
    )
    draw_accuracies(axes, methods)
    save(figure, path)
