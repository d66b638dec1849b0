"""The table of docs/versions.md, generated from the results of `python -m bench.matrix`.

python -m bench.matrix.page [--check]
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.compare.collect import RESULTS
from bench.compare.tables import replaced
from bench.host.page import finish
from bench.matrix.rows import ROWS, Row

FILE = RESULTS / "versions.csv"
PAGE = Path(__file__).parents[2] / "docs" / "versions.md"
MARKS = "<!-- versions: made by bench.matrix -->", "<!-- end of versions -->"


class Result(NamedTuple):
    """What a row gave; versions are those that were installed.

    Attributes:
        python, torch, torchvision, triton, timm: Versions.
        checks: Passed checks of the smoke program, "46 of 46"; empty if it did not run.
        tests: pytest's last line; empty if no tests ran.
        note: What failed; empty if nothing did.
    """

    python: str
    torch: str
    torchvision: str
    triton: str
    timm: str
    checks: str
    tests: str
    note: str


COLUMNS = ("kind", "row", *Result._fields, "device", "system", "commit", "date")


def read(path: Path = FILE) -> list[dict[str, str]]:
    """Return the rows of the results file; none if it does not exist."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merge(row: Row, result: Result, about: Mapping[str, str], path: Path = FILE) -> None:
    """Put a row's result into the file, in place of an earlier one.

    Args:
        row: Row of the table.
        result: What it gave.
        about: Device, system, commit and date.
        path: Results file.
    """
    rows = {found["row"]: found for found in read(path)}
    rows[row.name] = {"kind": "measured", "row": row.name, **result._asdict(), **about}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[known.name] for known in ROWS if known.name in rows)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return results as a table of the page."""
    heads = "Python", "torch", "torchvision", "Triton", "timm", "checks", "tests", "measured"
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        checks = row["checks"] or "not run"
        cells = [row[name] for name in Result._fields[:5]]
        cells += [
            f"{checks}; {row['note']}" if row["note"] else checks,
            row["tests"].partition(" in ")[0],
            row["date"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machines = sorted({f"{row['device']}, {row['system']}" for row in rows})
    return "\n".join([*lines, "", f"Machines: {'; '.join(machines)}."])


def write_page(page: Path = PAGE, path: Path = FILE, check: bool = False) -> int:
    """Write the page's table, or only report whether it would change; return the exit status."""
    old = page.read_text(encoding="utf-8")
    return finish(page, old, replaced(old, table(read(path)), MARKS), check)


def main(arguments: Sequence[str] | None = None) -> int:
    """Update the page; with --check only report whether it is up to date (1 if not)."""
    parser = argparse.ArgumentParser(prog="python -m bench.matrix.page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    return write_page(check=parser.parse_args(arguments).check)


if __name__ == "__main__":
    sys.exit(main())
