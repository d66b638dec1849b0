"""Output folder of a command that may overwrite its own earlier files and nothing else."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReportFolder:
    """Files that a command recognises as its own.

    Attributes:
        command: Name of the command, for messages.
        files: Pattern of the names of its files.
        table: Name of the CSV file that marks a folder as its own.
        header: First line of that file.
    """

    command: str
    files: re.Pattern[str]
    table: str
    header: Sequence[str]

    def check(self, folder: Path) -> None:
        """Raise FileExistsError unless `folder` is new, empty or written by an earlier call."""
        if not folder.exists():
            return
        entries = list(folder.iterdir()) if folder.is_dir() else [folder]
        strange = [entry.name for entry in entries if not self.files.fullmatch(entry.name)]
        if strange or (entries and not self._is_own_table(folder / self.table)):
            holds = f" (it holds {sorted(strange)[0]})" if strange and folder.is_dir() else ""
            raise FileExistsError(
                f"{folder} exists and is not of an earlier {self.command}{holds}; choose another "
                "--output"
            )

    def claim(self, folder: Path) -> None:
        """Create the folder and delete an earlier call's files, the table that marks it last."""
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name == self.table)
        for entry in entries:
            entry.unlink()
        write_csv(folder / self.table, self.header, [])

    def _is_own_table(self, path: Path) -> bool:
        start = ",".join(self.header).encode()
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(start)) == start


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a header line, in UTF-8."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
