"""Measured times of candidate tiles: their CSV file, and how they are measured on a CUDA GPU.

A row is one candidate of one entry of the launch table; `milliseconds` is the geometric mean, over
the shapes of `bench.tiles.candidates.SHAPES`, of the launch's median time, for 64 images of 12
heads.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton.testing
from triton.errors import TritonError

from bench.tiles.candidates import DTYPES, SHAPES, TIE, candidates, current, launch_of
from vpt_fast.kernels.attention.tiles import HEAD_DIMS, KERNELS, Choice, Key
from vpt_fast.kernels.runtime.launch import Launch, target_of

COLUMNS = (
    "kernel", "head_dim", "dtype", "architecture",
    "rows", "step", "num_warps", "num_stages", "milliseconds",
)  # fmt: skip

STAGES = (2, 3, 4)
"""Pipeline stages to time. Static figures see no benefit in more than two, and are wrong: on an
H200 a third one took 5 to 25% off the time of most tiles.
"""

Row = tuple[Key, Choice, float]
Value = TypeVar("Value")


def read_times(path: Path) -> dict[Key, dict[Choice, float]]:
    """Return milliseconds by entry of the launch table and candidate, the least of several.

    Raises:
        ValueError: If a column or value is missing or invalid; names the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}: write it with --measure")
        times: dict[Key, dict[Choice, float]] = {}
        for row in reader:
            try:
                key, choice, milliseconds = _parsed(row)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
            before = times.setdefault(key, {}).get(choice, math.inf)
            times[key][choice] = min(before, milliseconds)
    return times


def _parsed(row: dict[str, str]) -> Row:
    architecture = row["architecture"].removeprefix("sm_")
    key: Key = (
        _one_of(row["kernel"], KERNELS),
        _one_of(int(row["head_dim"]), HEAD_DIMS),
        _one_of(row["dtype"], tuple(DTYPES)),
        int(architecture) if architecture.isdigit() else architecture,
    )
    rows, step, warps, stages = (int(row[name]) for name in COLUMNS[4:8])
    for name, size in (("rows", rows), ("step", step), ("num_warps", warps)):
        if size < 1 or size & (size - 1):
            raise ValueError(f"{name} is {size}: it must be a power of two")
    if stages < 1:
        raise ValueError(f"num_stages is {stages}: it must be at least 1")
    milliseconds = float(row["milliseconds"])
    if not (math.isfinite(milliseconds) and milliseconds > 0):
        raise ValueError(f"milliseconds is {milliseconds}: it must be positive")
    return key, (rows, step, warps, stages), milliseconds


def _one_of(value: Value, known: Sequence[Value]) -> Value:
    if value not in known:
        raise ValueError(f"{value!r} is unknown: use one of {', '.join(map(str, known))}")
    return value


def best_of(times: Mapping[Choice, float]) -> Choice:
    """Return the fastest candidate; among those within 2% of it, one with the fewest stages."""
    limit = TIE * min(times.values())
    equal = [choice for choice, time in times.items() if time <= limit]
    return min(equal, key=lambda choice: (choice[3], times[choice], choice))


def write_times(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as they arrive, so that measured times survive an interruption.

    Raises:
        FileExistsError: If `path` exists.
    """
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for key, choice, milliseconds in rows:
            writer.writerow((*key, *choice, milliseconds))
            file.flush()


def median_milliseconds(launch: Launch) -> float:
    """Return the median time of a launch by CUDA events, with a cold L2 cache."""
    return float(triton.testing.do_bench(launch.run, return_mode="median"))


def measure(
    keys: Sequence[Key],
    device: str = "cuda",
    time: Callable[[Launch], float] = median_milliseconds,
) -> Iterable[Row]:
    """Time every candidate of every entry on the current GPU.

    Args:
        keys: Entries; their architecture is replaced by the GPU's own.
        device: Device of the tensors.
        time: Returns the milliseconds of a launch.

    Yields:
        The candidates that can run with their times, as they are measured.
    """
    target = target_of(torch.empty(0, device=device))
    own = "gfx942" if target.hip else target.capability
    for key in dict.fromkeys((*key[:3], own) for key in keys):
        for choice in dict.fromkeys((current(key), *candidates(key, STAGES))):
            try:
                found = [time(_randomized(launch_of(key, s, choice, device)[1])) for s in SHAPES]
            except (RuntimeError, TritonError):  # does not compile, or exceeds the GPU's resources
                continue
            yield key, choice, statistics.geometric_mean(found)


def _randomized(launch: Launch) -> Launch:
    """Fill the tensors of a launch with random numbers, like activations."""
    for tensor in launch.arguments.values():
        if isinstance(tensor, torch.Tensor):
            tensor.normal_()
    return launch
