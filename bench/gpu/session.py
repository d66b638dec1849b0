"""Runs jobs in order, as many as there is time for; a job that fails does not affect the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.ceilings import Ceilings
from bench.compare.collect import Row
from bench.gpu.jobs.cases import estimated_seconds, with_providers
from bench.gpu.jobs.job import Comparison, Job, KernelCheck, RunnableJob, case_columns
from bench.gpu.outcome import Outcome
from bench.gpu.results.record import Record
from bench.gpu.worker import InProcess, Worker, WorkerDied
from bench.providers.models import COMPILED, OURS

_PATIENCE = 2.0
"""A job is stopped when it takes this many times its estimated time."""

_START_SECONDS = 30.0
_LEAST_SECONDS = 3.0
DTYPE = "bfloat16"

Runner = InProcess | Worker


class Budget:
    """Time that runs out.

    Args:
        seconds: Seconds from now.
        clock: Returns monotonic seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Return the remaining seconds, at least 0."""
        return max(0.0, self._end - self._clock())

    def part(self, share: float) -> Budget:
        """Return a budget of a share of the remaining time."""
        return Budget(share * self.left(), self._clock)


@dataclass
class Session:
    """State of a run: what was measured, and what was skipped.

    Attributes:
        runner: Runs the jobs.
        record: Writes the results file and the log.
        outcomes: Jobs and their outcomes, in order.
        wrong: Descriptions of wrong results.
        skipped: Names of jobs that there was no time for.
        ceilings: Ceilings of the device, or None.
        pace: Ratio of the time that jobs took to their estimated time.
    """

    runner: Runner
    record: Record
    outcomes: list[tuple[Job, Outcome]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    ceilings: Ceilings | None = None
    pace: float = 1.0

    @property
    def rows(self) -> list[Row]:
        """Rows of the results so far, with the ceilings once they are known."""
        known: Row = {}
        if self.ceilings is not None:
            known["tflops_ceiling"] = f"{self.ceilings.tflops:.4g}"
            known["gb_per_s_ceiling"] = f"{self.ceilings.gb_per_s:.4g}"
        return [{**row, **known} for _, outcome in self.outcomes for row in outcome.rows]

    def run(self, jobs: Sequence[Job], budget: Budget) -> None:
        """Run jobs in order, as many as there is time for."""
        for job in jobs:
            if any(job == finished and is_complete(outcome) for finished, outcome in self.outcomes):
                continue  # the step of the stage "first" is also among those of "times"
            pace = 1.0 if isinstance(job, RunnableJob) else self.pace
            estimate = pace * estimated_seconds(job)
            if budget.left() < max(estimate, _LEAST_SECONDS):
                self.skipped.append(str(job))
                self.record.line(
                    f"{job}: skipped, {budget.left():.0f} s are left and it may take {estimate:.0f}"
                )
                continue
            self._run(job, budget, estimate)

    def _run(self, job: Job, budget: Budget, estimate: float) -> None:
        """Run a job; if some of its providers make the device fault, repeat it without them."""
        start, outcome = time.monotonic(), Outcome()
        self.outcomes.append((job, outcome))

        def on_event(kind: str, value: object) -> None:
            outcome.add(kind, value)
            if kind == "row":
                self.record.rows(self.rows)

        limit = min(budget.left(), _PATIENCE * estimate + _START_SECONDS)
        try:
            self.runner.measure(job, limit, on_event)
        except WorkerDied as death:
            _note_worker_death(job, outcome, str(death))
        else:
            taken = (time.monotonic() - start) / estimated_seconds(job)
            self.pace = 0.7 * self.pace + 0.3 * min(max(taken, 0.2), 3.0)
        self._close(job, outcome, time.monotonic() - start)
        if not outcome.faulted or not isinstance(job, Comparison):
            return
        names = [
            name
            for name in job.providers
            if name not in outcome.faulted and not outcome.by_provider.get(name, {}).get("p50_ms")
        ]
        others = with_providers(job, names)
        if others.providers and budget.left() > estimate:
            for name in names:
                outcome.by_provider.pop(name, None)
            self._run(others, budget, estimate)

    def _close(self, job: Job, outcome: Outcome, seconds: float) -> None:
        """Write and print the outcome of a job."""
        self.wrong += outcome.wrong
        if outcome.ceilings is not None:
            self.ceilings = outcome.ceilings
        if outcome.facts:
            self.record.facts = outcome.facts
        self.record.line(f"{job}: {seconds:.1f} s")
        for line in [*map(_line, outcome.rows), *outcome.messages, *outcome.wrong]:
            self.record.line(f"    {line}")
        if self.record.facts and (outcome.rows or outcome.ceilings):
            self.record.rows(self.rows)


def is_complete(outcome: Outcome) -> bool:
    """Return whether every provider of a comparison was timed."""
    return bool(outcome.rows) and all(row.get("p50_ms") for row in outcome.rows)


def _note_worker_death(job: Job, outcome: Outcome, why: str) -> None:
    """Record that the worker died, for the providers that were running.

    For compiled providers it is only a note in the row: compilers may hang or run out of memory.
    """
    named = isinstance(job, Comparison | KernelCheck)
    running = outcome.running or (
        job.providers if isinstance(job, Comparison) else (OURS,) if named else ()
    )
    if isinstance(job, Comparison | KernelCheck):
        for name in running:
            row = outcome.by_provider.get(name) or {**case_columns(job, DTYPE), "rounds": 0}
            note = "; ".join(filter(None, [row.get("note", ""), why]))
            outcome.add("row", {**row, "provider": name, "note": note})
    if not running or not set(running) <= set(COMPILED):
        outcome.add("wrong", f"{job}{', ' * bool(running)}{', '.join(running)}: {why}")
    outcome.add("faulted", running)


def _line(row: Row) -> str:
    figures = [f"{row['provider']:21}"]
    if "error" in row:
        figures.append(f"error {row['error']:>8}")
    for name, form in (
        ("p50_ms", "{:>8} ms"), ("ratio_p50", "{}x ours"), ("graph_p50_ms", "graph {} ms"),
        ("host_ms", "host {} ms"), ("peak_mib", "peak {} MiB"), ("sm_mhz", "{} MHz"),
        ("watts", "{} W"), ("note", "{}"),
    ):  # fmt: skip
        if row.get(name):
            figures.append(form.format(row[name]))
    return "  ".join(figures)
