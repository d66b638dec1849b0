"""Results of a sweep: a table, a CSV file and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vpt_fast.extras import require_extra
from vpt_fast.train.common.curves import COLOURS, GRID, INK, MUTED, format_bytes, format_table
from vpt_fast.train.common.output_folder import write_csv

if TYPE_CHECKING:
    from vpt_fast.train.sweep.sweep import Result

TABLE, PICTURE = "sweep.csv", "sweep.png"
_COLOURS = (*COLOURS, INK)
HEADER = (
    "method", "lr", "weight_decay", "num_prompts", "validation_top1", "seed", "test_top1",
    "test_loss", "trained_parameters", "adapter_bytes", "seconds",
)  # fmt: skip


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
    _draw(folder / PICTURE, results, title)
    return folder / TABLE, folder / PICTURE


def _draw(path: Path, results: Sequence[Result], title: str) -> None:
    """Draw the test accuracy of every final run by method, and its mean by trained parameters."""
    require_extra("sweep", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    figure.suptitle(title, color=INK, fontsize=11)
    seeds, sizes = figure.subplots(1, 2)
    for index, result in enumerate(results):
        colour = _COLOURS[index % len(_COLOURS)]
        accuracies = [final.top1 for final in result.finals.values()]
        if not accuracies:
            continue
        mean, deviation = mean_and_deviation(accuracies)
        spread = 0.0 if np.isnan(deviation) else deviation
        seeds.plot([index] * len(accuracies), accuracies, "o", color=colour, alpha=0.45)
        for ax, x in ((seeds, index + 0.2), (sizes, result.validation.trained)):
            ax.errorbar(x, mean, spread, color=colour, marker="D", markersize=5, capsize=4)
        sizes.annotate(
            result.name, (result.validation.trained, mean), textcoords="offset points",
            xytext=(7, 5), color=INK, fontsize=9,
        )  # fmt: skip
    seeds.set_xticks(range(len(results)), [result.name for result in results], rotation=20)
    seeds.set_title("final runs; diamond: mean and standard deviation", loc="left", fontsize=10)
    sizes.set_title("mean over trained parameters", loc="left", fontsize=10)
    sizes.set_xscale("log")
    sizes.margins(x=0.2)
    sizes.set_xlabel("trained parameters, head included", color=MUTED)
    for ax in (seeds, sizes):
        ax.set_ylabel("test accuracy, percent", color=MUTED)
        ax.grid(color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
