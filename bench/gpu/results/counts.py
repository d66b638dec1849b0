"""FLOP, bytes and rates of a results file's rows, and plots: computed afterwards, anywhere."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.compare import collect
from bench.compare.cases import STEP, Case
from bench.counted import fusion
from bench.gpu.results import page
from bench.gpu.results.counted import Counted, count, rates
from bench.gpu.results.record import FIELDS, write
from bench.providers.attention import AttentionCase

Task = tuple[Case | AttentionCase, str, str, str]
"""Arguments of `bench.gpu.results.counted.count`."""


def case_of(row: dict[str, str]) -> Case | AttentionCase | None:
    """Return the case that a row timed; None if it has no time, or cannot be traced."""
    if not row["p50_ms"]:
        return None
    if row["bench"] == STEP:
        return Case(
            model=row["model"], method=row["method"], batch=int(row["batch"]),
            prompts=int(row["prompts"]), dropout=float(row["dropout"]), dtype=row["dtype"],
            image_size=int(row["image_size"]), memory=row["memory"] or "speed",
        )  # fmt: skip
    if row["bench"] == "attention" and row["tokens"]:
        names = ("prompts", "batch", "tokens", "heads", "head_dim")
        return AttentionCase(**{name: int(row[name]) for name in names})  # type: ignore[arg-type]
    return None


def _count(task: Task) -> Counted | str | None:
    """Return the counted work of a row, or an error message."""
    try:
        return count(*task)
    # A failure to count must not lose what was measured.
    except Exception as error:
        return f"{task[0]}, {task[1]} is not counted: {type(error).__name__}: {error}"


def counted(tasks: Sequence[Task], processes: int) -> list[Counted | str | None]:
    """Return the counted work of rows, in parallel processes; in this process with 0."""
    if not processes:
        return [_count(task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, max(len(tasks), 1)), context) as pool:
        return list(pool.map(_count, tasks))


def add_counts(path: Path, processes: int | None = None) -> list[str]:
    """Add rates (FLOP and bytes over measured time) to a results file, and draw it next to it.

    Args:
        path: CSV file, which is rewritten.
        processes: Processes to count in; by default the number of cores.

    Returns:
        Lines to print: what was not counted, a note on the figures, and both paths.

    Raises:
        OSError: If the file cannot be read or written.
        ValueError: If it is not a results file of a GPU, or has no rows.
    """
    rows = collect.read(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    missing = set(FIELDS) - set(rows[0])
    if missing:
        raise ValueError(f"{path} has no columns {', '.join(sorted(missing))}")
    cases = [case_of(row) for row in rows]
    tasks = [
        (case, row["provider"], row["dtype"], row["device"])
        for case, row in zip(cases, rows, strict=True)
        if case is not None
    ]
    found = iter(counted(tasks, os.cpu_count() or 1 if processes is None else processes))
    by_row = [None if case is None else next(found) for case in cases]
    for row, work in zip(rows, by_row, strict=True):
        if isinstance(work, Counted):
            row |= rates(row, work)
    write(rows, path)
    picture = path.with_suffix(".png")
    page.draw(rows, picture, [work if isinstance(work, Counted) else None for work in by_row])
    return [
        *sorted({work for work in by_row if isinstance(work, str)}),
        "Achieved rates: FLOP and bytes are counted, times measured. Compiled providers are "
        f"counted after {fusion.NAME}.",
        str(path),
        str(picture),
    ]
