"""The host's time of a training step and of inference, with kernels launched by a null driver.

    python -m bench.host [--rounds 40] [--only NAME ...] [--output bench/results]
    python -m bench.host --profile NAME
    python -m bench.host --calls

CPU time of one thread on tensors so small that PyTorch's own kernels, which run on the CPU here,
take negligible time; all cases in one process, in interleaved rounds. Launches of vpt_fast do
nothing (`bench.host.null_driver`): no figure includes the driver's own time of a launch, neither
ours nor PyTorch's. A step is forward, cross-entropy and backward, without the optimizer. In each
round a case runs twice, as in a loop where the step before is the same model's; the first run,
which finds caches as another model has left them, is a part of its own. Writes one CSV per machine
and set of versions; the last line gives the host time over that of the same model without prompts,
least over least.
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
from bench.host.cases import INFERENCE, WARMUP, HostCase, Work, one_thread
from bench.host.null_driver import NullLauncher, null_driver
from bench.providers.models import OURS, WITHOUT

FIRST = "first"
PARTS = ("forward", "backward", "whole", FIRST)
FIELDS = (
    "kind", "bench", "subject", "work", "model", "method", "provider", "memory", "part",
    "least_ms", "p50_ms", "ratio_least", "ratio_p50", "rounds", "launches",
    *(name for name in FACTS if name != "cuda"),
)  # fmt: skip
"""Columns. Times are milliseconds of CPU time; a ratio is over the same model, work and part
without prompts, `ratio_p50` the median of the rounds' ratios. `launches` counts vpt_fast's kernels.
The part `first` is a whole call right after another model's.
"""

ROUNDS = 40

Row = dict[str, Any]


CASES = (
    HostCase("vit", WITHOUT),
    HostCase("vit", "concat"),
    HostCase("vit", "keys_concat"),
    HostCase("vit", OURS),
    HostCase("vit", OURS, memory="balanced"),
    HostCase("vit", "concat", "vapt"),
    HostCase("vit", "keys_concat", "vapt"),
    HostCase("vit", OURS, "vapt"),
    HostCase("vit_layerscale", WITHOUT),
    HostCase("vit_layerscale", OURS),
    HostCase("swin", WITHOUT),
    HostCase("swin", "concat"),
    HostCase("swin", OURS),
    HostCase("swin", OURS, "vapt"),
    HostCase("vit", WITHOUT, work=INFERENCE),
    HostCase("vit", OURS, work=INFERENCE),
    HostCase("vit", OURS, "vapt", INFERENCE),
)
RATIOS = {
    "vpt-deep": HostCase("vit", OURS),
    "vapt": HostCase("vit", OURS, "vapt"),
    "swin": HostCase("swin", OURS),
    "inference": HostCase("vit", OURS, work=INFERENCE),
}
"""Cases of the last line, by the name printed there."""


def launches(work: Work) -> int:
    """Return how many of vpt_fast's kernels one call launches."""
    before = NullLauncher.launches
    work()
    return NullLauncher.launches - before


def measure(cases: Sequence[HostCase], rounds: int) -> list[Row]:
    """Return the rows of all cases, and of the cases without prompts that they are compared with.

    Args:
        cases: Cases to time.
        rounds: Interleaved rounds; every case runs once in each, in a new order.

    Raises:
        RuntimeError: If a case of vpt_fast launched no kernel, so that something else was timed.
    """
    cases = list(dict.fromkeys(s for case in cases for s in (case.base, case)))
    with one_thread(), null_driver():
        works = {case: Work(case) for case in cases}
        for work in works.values():
            for _ in range(WARMUP):
                work()
        counts = {case: launches(work) for case, work in works.items()}
        for case, count in counts.items():
            if case.provider == OURS and not count:
                raise RuntimeError(f"{case} launched none of our kernels: update null_driver")
        times = _take_rounds(works, rounds)
        known = {**facts(gpu=False), "date": datetime.date.today().isoformat()}
    rows = []
    for case, of_parts in times.items():
        for part, values in of_parts.items():
            theirs = times[case.base][part]
            rows.append(
                {
                    "kind": "measured", "bench": "host", "subject": str(case),
                    "work": case.work, "model": case.model, "provider": case.provider,
                    "method": case.method if case.provider != WITHOUT else "",
                    "memory": case.memory if case.provider == OURS else "", "part": part,
                    "least_ms": f"{1e3 * values.min():.3f}",
                    "p50_ms": f"{1e3 * np.median(values):.3f}",
                    "ratio_least": f"{values.min() / theirs.min():.3f}",
                    "ratio_p50": f"{np.median(values / theirs):.3f}",
                    "rounds": rounds, "launches": counts[case], **known,
                }
            )  # fmt: skip
    return rows


def _take_rounds(
    works: Mapping[HostCase, Work], rounds: int
) -> dict[HostCase, dict[str, np.ndarray]]:
    """Return the seconds of all rounds, by case and part."""
    order, names = random.Random(0), list(works)
    seconds: dict[HostCase, dict[str, list[float]]] = {name: {} for name in names}
    # Objects alive now are not a step's garbage: exempt them from collection.
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


def profile(case: HostCase, steps: int = 20) -> None:
    """Print where the time of some calls of a case goes, by Python function."""
    with one_thread(), null_driver():
        work = Work(case)
        for _ in range(WARMUP):
            work()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(steps):
            work()
        profiler.disable()
    print(f"{case}, {steps} calls; seconds are those of all calls, with the profiler's own")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(rows: Sequence[Row]) -> None:
    """Print the rows as a table, one line per case, and the ratios last."""
    print(f"{'ms of CPU time, least (median)':34}" + "".join(f"{part:>18}" for part in PARTS))
    by = {(row["subject"], row["part"]): row for row in rows}
    for case in dict.fromkeys(row["subject"] for row in rows):
        found = [by.get((case, part)) for part in PARTS]
        cells = [
            "" if row is None else f"{float(row['least_ms']):.2f} ({float(row['p50_ms']):.2f})"
            for row in found
        ]
        whole, first = by[case, "whole"], by[case, FIRST]
        print(
            f"{case:34}" + "".join(f"{cell:>18}" for cell in cells)
            + f"   {float(whole['ratio_least']):5.2f} ({float(whole['ratio_p50']):.2f}) of no "
            f"prompts (first call {float(first['ratio_least']):.2f}), "
            f"{whole['launches']} launches of ours"
        )  # fmt: skip
    ratios = [
        f"{name}={float(by[str(case), 'whole']['ratio_least']):.2f}"
        for name, case in RATIOS.items()
        if (str(case), "whole") in by
    ]
    if ratios:
        print("ratio", *ratios)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; write the CSV if all cases were measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = {str(case): case for case in CASES}
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default %(default)s")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(names),
        help="measure these cases only, and write no file",
    )
    parser.add_argument("--profile", choices=tuple(names), help="profile one case, without times")
    parser.add_argument(
        "--calls", action="store_true", help="count Python calls per block, without times"
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
