"""The files of a run: rows of results, whole at any moment, and a log of its lines."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

from bench.compare import collect
from bench.compare.collect import Row
from bench.compare.facts import file_stem

BESIDE = ("host_ms", "sm_mhz", "watts", "memory", "tokens", "heads", "head_dim")
"""What only a GPU's results have beside a time: the host's own time until the last launch, clock
(MHz) and power (W) under that work, the memory mode; and the shapes of attention alone."""

FIELDS = (*collect.FIELDS, *BESIDE)


def write(rows: Iterable[Row], path: Path) -> None:
    """Write a results file whole, or leave the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with open(fresh, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(fresh, path)


class Record:
    """What is kept of a run, as it goes.

    Args:
        folder: of the files.
        say: prints a line.

    Attributes:
        folder: of the files.
        facts: columns of every row; set once they are known.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._say = folder, say
        self.facts: dict[str, str] = {}

    @property
    def path(self) -> Path:
        """Of the results."""
        trial = "" if "cuda" in self.facts else "_trial"
        return self.folder / f"{file_stem(self.facts)}{trial}.csv"

    def line(self, text: str) -> None:
        """Print a line, and keep it."""
        self._say(text)
        with open(self.folder / "gpu.log", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def rows(self, rows: Iterable[Row]) -> None:
        """Keep all rows so far."""
        today = date.today().isoformat()
        write(({**row, **self.facts, "date": today} for row in rows), self.path)
