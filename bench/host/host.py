"""The host's time of a training step and of inference, with kernels launched into nothing.

    python -m bench.host [--rounds 40] [--only NAME ...] [--output bench/results]
    python -m bench.host --profile NAME
    python -m bench.host --calls

CPU time of one thread on tensors so small that PyTorch's own kernels, which run on the CPU here,
hardly count; all subjects in one process, in turns. Ours launch into nothing
(`bench.host.null_driver`): the driver's own time of a launch is in no figure, neither ours nor
PyTorch's. A step is forward, cross-entropy and backward, without the optimizer's. In its turn a
subject runs twice, as in a loop where the step before is the same model's; the first time, which
finds caches as another model has left them, is a part of its own. Writes one CSV per machine and
set of versions; the last line gives host time over that of the same model without prompts, least
over least.
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import datetime
import gc
import pstats
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare.collect import FACTS, RESULTS
from bench.compare.facts import facts, file_stem
from bench.host import calls as host_calls
from bench.host.null_driver import NullLauncher, null_driver
from bench.host.subjects import INFERENCE, WARMUP, Subject, Work, one_thread
from bench.providers.models import OURS, WITHOUT

FIRST = "first"
PARTS = ("forward", "backward", "whole", FIRST)
FIELDS = (
    "kind", "bench", "subject", "work", "model", "method", "provider", "memory", "part",
    "least_ms", "p50_ms", "ratio_least", "ratio_p50", "rounds", "launches",
    *(name for name in FACTS if name != "cuda"),
)  # fmt: skip
"""Columns. Times are milliseconds of CPU time; a ratio is over the same model, work and part
without prompts, `ratio_p50` the median of the rounds' ratios. `launches` counts our own kernels.
The part `first` is a whole call right after another model's."""

ROUNDS = 40

Row = dict[str, Any]


SUBJECTS = (
    Subject("vit", WITHOUT),
    Subject("vit", "concat"),
    Subject("vit", "keys_concat"),
    Subject("vit", OURS),
    Subject("vit", OURS, memory="balanced"),
    Subject("vit", "concat", "vapt"),
    Subject("vit", "keys_concat", "vapt"),
    Subject("vit", OURS, "vapt"),
    Subject("vit_layerscale", WITHOUT),
    Subject("vit_layerscale", OURS),
    Subject("swin", WITHOUT),
    Subject("swin", "concat"),
    Subject("swin", OURS),
    Subject("swin", OURS, "vapt"),
    Subject("vit", WITHOUT, work=INFERENCE),
    Subject("vit", OURS, work=INFERENCE),
    Subject("vit", OURS, "vapt", INFERENCE),
)
RATIOS = {
    "vpt-deep": Subject("vit", OURS),
    "vapt": Subject("vit", OURS, "vapt"),
    "swin": Subject("swin", OURS),
    "inference": Subject("vit", OURS, work=INFERENCE),
}
"""What the last line is about."""


def launches(work: Work) -> int:
    """How many of our kernels one call launches."""
    before = NullLauncher.launches
    work()
    return NullLauncher.launches - before


def measure(subjects: Sequence[Subject], rounds: int) -> list[Row]:
    """Rows of all subjects and of those without prompts that they are compared with.

    Args:
        subjects: what is timed.
        rounds: of each; every round takes all of them in a new order.

    Raises:
        RuntimeError: a subject of ours launched no kernel, so that something else was timed.
    """
    subjects = list(dict.fromkeys(s for subject in subjects for s in (subject.base, subject)))
    with one_thread(), null_driver():
        works = {subject: Work(subject) for subject in subjects}
        for work in works.values():
            for _ in range(WARMUP):
                work()
        counts = {subject: launches(work) for subject, work in works.items()}
        for subject, count in counts.items():
            if subject.provider == OURS and not count:
                raise RuntimeError(f"{subject} launched none of our kernels: update null_driver")
        times = _take_rounds(works, rounds)
        known = {**facts(gpu=False), "date": datetime.date.today().isoformat()}
    rows = []
    for subject, of_parts in times.items():
        for part, values in of_parts.items():
            theirs = times[subject.base][part]
            rows.append(
                {
                    "kind": "measured", "bench": "host", "subject": str(subject),
                    "work": subject.work, "model": subject.model, "provider": subject.provider,
                    "method": subject.method if subject.provider != WITHOUT else "",
                    "memory": subject.memory if subject.provider == OURS else "", "part": part,
                    "least_ms": f"{1e3 * values.min():.3f}",
                    "p50_ms": f"{1e3 * np.median(values):.3f}",
                    "ratio_least": f"{values.min() / theirs.min():.3f}",
                    "ratio_p50": f"{np.median(values / theirs):.3f}",
                    "rounds": rounds, "launches": counts[subject], **known,
                }
            )  # fmt: skip
    return rows


def _take_rounds(
    works: Mapping[Subject, Work], rounds: int
) -> dict[Subject, dict[str, np.ndarray]]:
    """Seconds of all rounds, by subject and part."""
    order, names = random.Random(0), list(works)
    seconds: dict[Subject, dict[str, list[float]]] = {name: {} for name in names}
    # What is alive now is none of a step's garbage: collections look at the rest only.
    gc.collect()
    gc.freeze()
    try:
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                first = works[name].parts()["whole"]
                for part, value in {**works[name].parts(), FIRST: first}.items():
                    seconds[name].setdefault(part, []).append(value)
    finally:
        gc.unfreeze()
    return {
        name: {part: np.array(values) for part, values in of_parts.items()}
        for name, of_parts in seconds.items()
    }


def profile(subject: Subject, steps: int = 20) -> None:
    """Print where Python's time goes, by function, over some calls of a subject."""
    with one_thread(), null_driver():
        work = Work(subject)
        for _ in range(WARMUP):
            work()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(steps):
            work()
        profiler.disable()
    print(f"{subject}, {steps} calls; seconds are those of all calls, with the profiler's own")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(rows: Sequence[Row]) -> None:
    """Print the rows as a table, a subject a line, and the ratios last."""
    print(f"{'ms of CPU time, least (median)':34}" + "".join(f"{part:>18}" for part in PARTS))
    by = {(row["subject"], row["part"]): row for row in rows}
    for subject in dict.fromkeys(row["subject"] for row in rows):
        found = [by.get((subject, part)) for part in PARTS]
        cells = [
            "" if row is None else f"{float(row['least_ms']):.2f} ({float(row['p50_ms']):.2f})"
            for row in found
        ]
        whole, first = by[subject, "whole"], by[subject, FIRST]
        print(
            f"{subject:34}" + "".join(f"{cell:>18}" for cell in cells)
            + f"   {float(whole['ratio_least']):5.2f} ({float(whole['ratio_p50']):.2f}) of no "
            f"prompts (first call {float(first['ratio_least']):.2f}), "
            f"{whole['launches']} launches of ours"
        )  # fmt: skip
    ratios = [
        f"{name}={float(by[str(subject), 'whole']['ratio_least']):.2f}"
        for name, subject in RATIOS.items()
        if (str(subject), "whole") in by
    ]
    if ratios:
        print("ratio", *ratios)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; write the CSV where all subjects were measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = {str(subject): subject for subject in SUBJECTS}
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default %(default)s")
    parser.add_argument("--only", nargs="+", choices=tuple(names), help="writes no file")
    parser.add_argument("--profile", choices=tuple(names), help="of one subject, no times")
    parser.add_argument(
        "--calls", action="store_true", help="count Python calls per block, no times"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; give 1 or more")
    if options.profile:
        profile(names[options.profile])
        return 0
    if options.calls:
        host_calls.show(host_calls.count_methods())
        return 0
    rows = measure([names[name] for name in options.only or names], options.rounds)
    if not options.only:
        path = options.output / f"host_{file_stem(rows[0])}.csv"
        write(rows, path)
        print(path)
    show(rows)
    return 0
