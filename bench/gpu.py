"""The GPU benchmark: correctness, times, memory and rates on a CUDA GPU, in one command.

    python -m bench.gpu [--minutes 9] [--cases quick] [--model M] [--prompts P ...]
    python -m bench.gpu --device cpu      # the same code on a tiny model, to show that it runs

Every provider is held against fp64 on the device before it is timed (`bench.correctness`). Times
are of CUDA events, in turns; `graph_p50_ms` is a replay of the same step as a CUDA graph. FLOP and
bytes are counted by a trace (`bench.trace`), so that achieved rates are counted work over measured
time; their ceilings are measured in the same run. Peak memory is what a provider's own model,
images and step need: what else is on the device is subtracted. What matters most comes first, and
what there was no time for is printed. Ends in one CSV file and one page of plots; the exit status
is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import torch

from bench import fusion, gpu_page
from bench.ceilings import Ceilings
from bench.collect import RESULTS, Row, read, write
from bench.facts import facts, file_stem
from bench.gpu_cases import Plan, gpu_subjects, guessed_seconds, only, trial_subjects
from bench.gpu_counts import Counted, count, rates
from bench.gpu_measure import CeilingsWanted, KernelCheck, Outcome, Subject, facts_of
from bench.gpu_worker import InProcess, Lost, Worker
from bench.providers import COMPILED, EAGER, OURS, PROVIDERS

DTYPE = "bfloat16"
_RESERVE_SECONDS = 45.0
"""Kept for counting and drawing, and for what was imported before the clock ran."""

_PATIENCE = 2.0
"""A subject that takes so many times what it was guessed to is stopped."""

_START_SECONDS = 30.0
_COUNTING_PROCESSES = 8

TRIAL = Path("bench_output")
"""Where results of `--device cpu` go: they are of nobody's interest."""

NO_GPU = (
    "bench.gpu: PyTorch finds no CUDA GPU here. This benchmark measures one: run it on a machine "
    "with a GPU and a CUDA (or ROCm) build of PyTorch. `--device cpu` runs the same code on a tiny "
    "model, and `make bench` measures this CPU."
)


class Budget:
    """Time that runs out.

    Args:
        seconds: from now on.
        clock: seconds that only grow.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds left, 0 at the least."""
        return max(0.0, self._end - self._clock())


@dataclass
class Session:
    """What a run measured.

    Attributes:
        rows: of the results, each with its subject.
        wrong: what is wrong, in words.
        skipped: what there was no time for, in words.
        ceilings: of the device, or None.
    """

    rows: list[tuple[Subject, Row]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    ceilings: Ceilings | None = None


Runner = InProcess | Worker


def run(
    subjects: Sequence[Subject],
    runner: Runner,
    budget: Budget,
    say: Callable[[str], None] = print,
) -> Session:
    """Measure subjects in order, as many as there is time for."""
    session = Session()
    for subject in subjects:
        guess = guessed_seconds(subject)
        if budget.left() < guess:
            session.skipped.append(str(subject))
            say(f"{subject}: skipped, {budget.left():.0f} s are left and it may take {guess:.0f}")
            continue
        start = time.monotonic()
        outcome = _measured(subject, runner, budget, guess)
        say(f"{subject}: {time.monotonic() - start:.1f} s")
        for line in [*map(_line, outcome.rows), *outcome.said]:
            say(f"    {line}")
        session.rows += [(subject, row) for row in outcome.rows]
        session.wrong += outcome.wrong
        session.ceilings = outcome.ceilings or session.ceilings
    return session


def _measured(subject: Subject, runner: Runner, budget: Budget, guess: float) -> Outcome:
    """A subject's outcome; if some of its providers spoil it, that of the others with theirs."""
    limit = min(budget.left(), _PATIENCE * guess + _START_SECONDS)
    try:
        outcome = runner.measure(subject, limit)
    except Lost as lost:
        outcome = _lost(subject, str(lost))
    if not outcome.faulted or isinstance(subject, CeilingsWanted | KernelCheck):
        return outcome
    others = only(subject, [n for n in subject.providers if n not in outcome.faulted])
    if not others.providers or budget.left() < guess:
        return outcome
    again = _measured(others, runner, budget, guess)
    kept = [row for row in outcome.rows if row["provider"] in outcome.faulted]
    return replace(again, rows=[*kept, *again.rows], wrong=[*outcome.wrong, *again.wrong])


def _lost(subject: Subject, why: str) -> Outcome:
    """The outcome where there is none: compiled providers are blamed first, compilers may hang."""
    if isinstance(subject, CeilingsWanted):
        return Outcome(wrong=[f"{subject}: {why}"])
    providers = (OURS,) if isinstance(subject, KernelCheck) else subject.providers
    compiled = tuple(name for name in providers if name in COMPILED)
    blamed = compiled or providers
    facts = facts_of(subject, DTYPE)
    rows = [{**facts, "provider": name, "rounds": 0, "note": why} for name in blamed]
    return Outcome(rows, [] if compiled else [f"{subject}: {why}"], faulted=blamed)


def _line(row: Row) -> str:
    figures = [f"{row['provider']:21}"]
    if "error" in row:
        figures.append(f"error {row['error']:>8}")
    for name, form in (
        ("p50_ms", "{:>8} ms"), ("ratio_p50", "{}x ours"), ("graph_p50_ms", "graph {} ms"),
        ("peak_mib", "peak {} MiB"), ("note", "{}"),
    ):  # fmt: skip
        if row.get(name):
            figures.append(form.format(row[name]))
    return "  ".join(figures)


Task = tuple[Subject, str, str, str]


def _count(task: Task) -> Counted | str | None:
    """The counted work of a row, or what went wrong."""
    try:
        return count(*task)
    # It adds to what was measured, and must not cost it.
    except Exception as error:
        return f"{task[0]}, {task[1]} is not counted: {type(error).__name__}: {error}"


def counted(tasks: Sequence[Task], processes: int, seconds: float) -> list[Counted | str | None]:
    """Counted work of rows, as far as time allows.

    Args:
        tasks: arguments of `bench.gpu_counts.count`.
        processes: to count in; 0 for this one.
        seconds: after which what is not counted is left out; only with processes.
    """
    if not processes:
        return [_count(task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, max(len(tasks), 1)), context) as pool:
        futures = [pool.submit(_count, task) for task in tasks]
        wait(futures, seconds)
        pool.shutdown(wait=False, cancel_futures=True)
        return [
            f.result() if f.done() and not f.cancelled() else "not counted: no time was left"
            for f in futures
        ]


def _finished(session: Session, known: Row, found: Sequence[Counted | str | None]) -> Iterator[Row]:
    """Rows as they are written: with facts, rates and ceilings."""
    for (_, row), work in zip(session.rows, found, strict=True):
        extra: Row = {**known, "date": date.today().isoformat()}
        if row.get("p50_ms") and isinstance(work, Counted):
            extra |= rates(row, work)
            if session.ceilings is not None:
                extra["tflops_ceiling"] = f"{session.ceilings.tflops:.4g}"
                extra["gb_per_s_ceiling"] = f"{session.ceilings.gb_per_s:.4g}"
        yield {**row, **extra}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=_positive(float), default=9.0, help="default 9")
    parser.add_argument("--cases", choices=("full", "quick"), default="full")
    parser.add_argument("--model", help=f"timm's name of most steps' model; default {Plan.model}")
    parser.add_argument("--batch", type=_positive(int), help=f"its images; default {Plan.batch}")
    parser.add_argument("--prompts", type=_number, nargs="+", help="of its blocks")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: all")
    parser.add_argument(
        "--output", type=Path, help=f"folder; default bench/results, of a trial {TRIAL}"
    )
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parsed(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return value

    return parsed


def _number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _plan(options: argparse.Namespace) -> Plan:
    plan = Plan(full=options.cases == "full")
    if options.device == "cpu":
        plan = replace(plan, model="test_vit", batch=2, prompts=(3, 5), providers=EAGER)
    return replace(
        plan,
        model=options.model or plan.model,
        batch=options.batch or plan.batch,
        prompts=tuple(options.prompts or plan.prompts),
        providers=tuple(options.providers or plan.providers),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and draw.

    Returns:
        0; 1 if something was wrong or nothing was measured; 2 if there is no GPU.
    """
    options = _parser().parse_args(arguments)
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    whole = Budget(60 * options.minutes)
    known = facts(gpu=cuda)
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    runner: Runner = (Worker if cuda else InProcess)(options.device, DTYPE)
    subjects = (gpu_subjects if cuda else trial_subjects)(_plan(options))
    try:
        session = run(subjects, runner, Budget(max(1.0, whole.left() - _RESERVE_SECONDS)))
    finally:
        runner.close()
    if not session.rows:
        print("Nothing was measured: give it more --minutes.", file=sys.stderr)
        return 1
    tasks = [(subject, r["provider"], DTYPE, known["device"]) for subject, r in session.rows]
    processes = min(_COUNTING_PROCESSES, os.cpu_count() or 1) if cuda else 0
    found = counted(tasks, processes, max(5.0, whole.left() - _RESERVE_SECONDS / 3))
    stem = file_stem(known) + ("" if cuda else "_trial")
    path = (options.output or (RESULTS if cuda else TRIAL)) / f"{stem}.csv"
    write(_finished(session, known, found), path)
    times = [work if isinstance(work, Counted) else None for work in found]
    gpu_page.draw(read(path), path.with_suffix(".png"), times)
    _report(session, [work for work in found if isinstance(work, str)], path)
    return 1 if session.wrong else 0


def _report(session: Session, uncounted: Sequence[str], path: Path) -> None:
    if session.ceilings is not None:
        print(
            f"Ceilings, measured: {session.ceilings.tflops:.4g} TFLOP/s (bf16 product), "
            f"{session.ceilings.gb_per_s:.4g} GB/s (copy, read and written)"
        )
    print(
        "Achieved rates: FLOP and bytes are counted, times measured. Compiled providers are counted"
    )
    print(f"after {fusion.NAME}.")
    for title, lines in (
        ("Not counted", sorted(set(uncounted))),
        ("Skipped, there was no time", session.skipped),
        ("WRONG", session.wrong),
    ):
        if lines:
            print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
    print(path, path.with_suffix(".png"), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
