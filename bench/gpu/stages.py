"""The stages of a run, each of which ends within its time even if something hangs.

warm         compiles the kernels that the run will launch, on all cores
first        measures the device's ceilings, and the first times of a step and of attention
correctness  checks models, steps and operators against fp64; runs tests and compute-sanitizer
times        times every comparison, most important first, compiled providers last
profile      profiles one step of vpt_fast and of the fastest other provider
tune         times candidate tiles of attention at 64 channels in bf16
demo         tunes a model on digits with VPT-Deep and VAPT, and loads a saved adapter
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.jobs.cases import Plan, correctness_jobs, first_jobs, timed_jobs
from bench.gpu.jobs.profile import ProfileJob
from bench.gpu.jobs.tiles import TilesJob
from bench.gpu.programs import run_program
from bench.gpu.session import Budget, Session
from bench.providers.models import COMPILED, OURS, PUBLISHED, WITHOUT

ROOT = Path(__file__).resolve().parent.parent.parent
_TESTS_SHARE = 0.75
"""Share of the remaining time for the tests; compute-sanitizer gets the rest."""

_PROGRAMS = "programs.log"
_DEMO = "import bench, sys, vpt_fast.train.demo.demo as demo; sys.exit(demo.main())"
"""Runs the demo from a source tree that is not installed."""


@dataclass(frozen=True)
class ProgramResult:
    """Exit status of a program, None if it was stopped or did not start, and its output."""

    status: int | None
    lines: list[str]


@dataclass(frozen=True)
class Run:
    """What the stages share."""

    session: Session
    plan: Plan
    device: str

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return self.session.record.folder

    def program(
        self,
        name: str,
        command: Sequence[str],
        budget: Budget,
        **environment: str,
    ) -> ProgramResult:
        """Run a program and append its output to the programs' log as it arrives."""
        say, log = self.session.record.line, self.folder / _PROGRAMS
        say(f"{name}: {' '.join(map(str, command))}"[:200])
        with log.open("a", encoding="utf-8") as output:
            output.write(f"== {name}\n")
        start = log.stat().st_size
        try:
            status = run_program(command, budget.left(), log, environment)
        except OSError as error:
            say(f"    {error}")
            return ProgramResult(None, [])
        if status is None:
            say(f"    stopped, its time is over; see {log.name} for its output")
        with log.open("rb") as output:
            output.seek(start)
            return ProgramResult(status, output.read().decode("utf-8", "replace").splitlines())


def warm(run: Run, budget: Budget, tiles: bool = False) -> None:
    """Compile kernels: those of the plan, or candidate tiles."""
    command = [sys.executable, "-m", "bench.gpu.jobs.warm", *(["--tiles"] if tiles else [])]
    if run.plan.trial:
        command += ["--trial"]
    elif not run.plan.full:
        command += ["--quick"]
    for line in run.program("warm", command, budget).lines[-1:]:
        run.session.record.line(f"    {line}")


def first(run: Run, budget: Budget) -> None:
    """Measure the ceilings and the first times."""
    run.session.run(first_jobs(run.plan), budget)


def correctness(run: Run, budget: Budget) -> None:
    """Check models, steps and operators; run tests and compute-sanitizer."""
    run.session.run(correctness_jobs(run.plan), budget)
    _tests(run, budget.part(_TESTS_SHARE))
    _memcheck(run, budget)


def _tests(run: Run, budget: Budget) -> None:
    """Run the tests of kernels and CUDA graphs in parallel on the device; record every failure."""
    found = [
        *ROOT.glob("tests/**/test_*_on_gpu.py"),
        *sorted(ROOT.glob("tests/kernels/test_*_kernels.py")),
    ]
    files = [str(path.relative_to(ROOT)) for path in found]
    if run.device == "cpu":
        files = ["tests/test_bare_tree.py"]  # kernel tests would take minutes on a CPU
    processes = max(1, min(14, (os.cpu_count() or 2) - 2)) if run.device == "cuda" else 0
    command = [
        sys.executable, "-m", "pytest", *files, "-m", "not full", "-v", "-n", str(processes),
        "--dist", "worksteal", "--tb=short", "--rootdir", str(ROOT),
    ]  # fmt: skip
    if run.device == "cpu":
        command += ["-k", "one_rounding"]
    result = run.program("tests", command, budget)
    passed, failed = _verdicts(result.lines)
    status = result.status
    run.session.record.line(f"    {passed} passed, {len(failed)} failed, exit status {status}")
    run.session.wrong += [f"test {name}" for name in failed]
    if status is None:
        run.session.skipped.append(f"tests after the first {passed + len(failed)}")
    elif status and not failed:
        run.session.wrong.append(f"tests: exit status {status}, see {_PROGRAMS}")


def _verdicts(lines: Sequence[str]) -> tuple[int, list[str]]:
    """Return how many tests passed, and the names of those that failed."""
    text = "\n".join(lines)
    named = r"\b(FAILED|ERROR) (tests/\S+)|(tests/\S+) (FAILED|ERROR)\b"
    failed = {found[1] or found[2] for found in re.findall(named, text)}
    return len(re.findall(r"\bPASSED\b", text)), sorted(failed)


def _memcheck(run: Run, budget: Budget) -> None:
    """Launch every operator on small inputs under compute-sanitizer, if it is installed."""
    launches = [sys.executable, "-m", "bench.gpu.jobs.sanitized", "--device", run.device]
    tool = shutil.which("compute-sanitizer")
    if tool is None and run.device == "cuda":
        run.session.skipped.append("memcheck: no compute-sanitizer on PATH")
        return
    if tool is not None and run.device == "cuda":
        launches = [tool, "--tool", "memcheck", "--print-limit", "20", *launches]
    # Without the caching allocator, an access past the end of a tensor is detected.
    result = run.program("memcheck", launches, budget, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    for line in result.lines:
        if "ERROR SUMMARY" in line or line.startswith(("launched", "failed")):
            run.session.record.line(f"    {line}")
    bad = [line for line in result.lines if re.search(r"ERROR SUMMARY: [1-9]", line)]
    if result.status is None:
        run.session.skipped.append("memcheck: it did not end")
    elif result.status or bad:
        run.session.wrong.append(f"memcheck: exit status {result.status}, see {_PROGRAMS}")


def times(run: Run, budget: Budget) -> None:
    """Time every comparison."""
    run.session.run(timed_jobs(run.plan), budget)


def profile(run: Run, budget: Budget) -> None:
    """Run the profiler on a step of vpt_fast, and of the fastest other timed provider."""
    case = run.plan.step
    others = {
        row["provider"]: float(row["p50_ms"])
        for row in run.session.rows
        if row.get("p50_ms") and row["bench"] == case.work and row["model"] == case.model
        and row["prompts"] == case.prompts and row["batch"] == case.batch
        and row["method"] == case.method
        and row["provider"] not in (OURS, WITHOUT, PUBLISHED, *COMPILED)
    }  # fmt: skip
    best = min(others, key=others.__getitem__, default="concat")
    run.session.run([ProfileJob(case, name, str(run.folder)) for name in (OURS, best)], budget)


def tune(run: Run, budget: Budget) -> None:
    """Time candidate tiles, as many as there is time for."""
    warm(run, budget.part(0.45), tiles=True)
    wanted = TilesJob(str(run.folder / "tiles.csv"), run.plan.trial, 0.4 * budget.left())
    run.session.run([wanted], budget)


def demo(run: Run, budget: Budget) -> None:
    """Run the demo, which fails if a loaded adapter's predictions differ from the saved one's."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-c", _DEMO, "--device", run.device, "--output", folder,
            *(["--methods", "vpt-deep", "--epochs", "1"] if run.plan.trial else []),
        ]  # fmt: skip
        result = run.program("demo", command, budget)
    for line in result.lines:
        if line.startswith(("Linear", "VPT", "VAPT", "Loaded", "Done")):
            run.session.record.line(f"    {line}")
    if result.status is None:
        run.session.skipped.append("demo: it did not end")
    elif result.status:
        run.session.wrong.append(f"demo: exit status {result.status}, see {_PROGRAMS}")


STAGES: dict[str, tuple[Callable[[Run, Budget], None], float]] = {
    "warm": (warm, 70),
    "first": (first, 45),
    "correctness": (correctness, 150),
    "times": (times, 170),
    "profile": (profile, 30),
    "tune": (tune, 75),
    "demo": (demo, 30),
}
"""Stages, each with its weight in dividing the time; what one leaves over goes to the others."""


def run_stages(run: Run, names: Sequence[str], budget: Budget) -> None:
    """Run stages in order, each within its share of the remaining time."""
    for index, name in enumerate(names):
        function, share = STAGES[name]
        of_all = share / sum(STAGES[other][1] for other in names[index:])
        run.session.record.line(f"== {name}, {of_all * budget.left():.0f} s")
        function(run, budget.part(of_all))
