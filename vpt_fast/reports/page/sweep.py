"""Content of a sweep's output folder, for a report: its table, and what its plot shows."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from vpt_fast.train.common.curves import format_bytes
from vpt_fast.train.common.style import decimal
from vpt_fast.train.sweep.report import HEADER, TABLE, Accuracies, mean_and_deviation


@dataclass(frozen=True)
class SweepFolder:
    """Content of a sweep's folder.

    Attributes:
        path: Path of the folder.
        name: Name of the folder.
        header, summary: Column titles, and one row of text per method: the chosen point, mean and
            deviation of the final runs.
        columns, runs: Columns of the CSV file, and one row of text per final run.
        accuracies: Final runs of each method.
    """

    path: Path
    name: str
    header: tuple[str, ...]
    summary: list[list[str]]
    columns: tuple[str, ...]
    runs: list[list[str]]
    accuracies: list[Accuracies]


_SUMMARY = (
    "method", "learning rate", "weight decay", "prompts", "validation, %", "test, mean, %",
    "standard deviation", "trained parameters", "adapter", "seeds",
)  # fmt: skip


def is_sweep(folder: Path) -> bool:
    """Return whether a sweep has written its table into the folder."""
    return (folder / TABLE).is_file()


def read_sweep(folder: Path) -> SweepFolder:
    """Read a sweep's table.

    Raises:
        ValueError: If the table is damaged.
    """
    path = folder / TABLE
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    by_method: dict[str, list[dict[str, str]]] = {}
    try:
        for row in rows:
            by_method.setdefault(row["method"], []).append(row)
        summary = [_summary(name, finals) for name, finals in by_method.items()]
        runs = [[_short(row[name]) for name in HEADER] for row in rows]
        accuracies = [
            Accuracies(
                name, int(finals[0]["trained_parameters"]), [float(f["test_top1"]) for f in finals]
            )
            for name, finals in by_method.items()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    name = folder.resolve().name
    return SweepFolder(folder, name, _SUMMARY, summary, HEADER, runs, accuracies)


def _short(cell: str) -> str:
    """Return a cell of the table with at most six significant digits, if it is a fraction."""
    try:
        return decimal(float(cell)).replace(",", "") if "." in cell or "e" in cell else cell
    except ValueError:
        return cell


def _summary(name: str, finals: list[dict[str, str]]) -> list[str]:
    first = finals[0]
    mean, deviation = mean_and_deviation([float(row["test_top1"]) for row in finals])
    return [
        name,
        f"{float(first['lr']):g}",
        f"{float(first['weight_decay']):g}",
        first["num_prompts"],
        f"{float(first['validation_top1']):.2f}",
        f"{mean:.2f}",
        "" if math.isnan(deviation) else f"{deviation:.2f}",
        f"{int(first['trained_parameters']):,}",
        format_bytes(int(first["adapter_bytes"])),
        str(len(finals)),
    ]
