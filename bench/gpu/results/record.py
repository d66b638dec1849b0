"""The files of a run: rows of results, complete at any moment, and a log of the printed lines."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

from bench.compare import collect
from bench.compare.collect import Row
from bench.compare.facts import file_stem

GPU_COLUMNS = ("host_ms", "sm_mhz", "watts", "memory", "tokens", "heads", "head_dim")
"""Columns of GPU results only: the host's time until the last launch, clock (MHz) and power (W)
under that work, the memory mode, and the shapes of attention alone.
"""

FIELDS = (*collect.FIELDS, *GPU_COLUMNS)


def write(rows: Iterable[Row], path: Path) -> None:
    """Write a results file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with open(fresh, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(fresh, path)


class Record:
    """Files of a run, written as it proceeds.

    Args:
        folder: Folder of the files.
        say: Prints a line.

    Attributes:
        folder: Folder of the files.
        facts: Columns of every row; set once they are known.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._say = folder, say
        self.facts: dict[str, str] = {}

    @property
    def path(self) -> Path:
        """Path of the results file."""
        trial = "" if "cuda" in self.facts else "_trial"
        return self.folder / f"{file_stem(self.facts)}{trial}.csv"

    def line(self, text: str) -> None:
        """Print a line, and append it to the log."""
        self._say(text)
        with open(self.folder / "gpu.log", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def rows(self, rows: Iterable[Row]) -> None:
        """Write all rows so far."""
        today = date.today().isoformat()
        write(({**row, **self.facts, "date": today} for row in rows), self.path)
