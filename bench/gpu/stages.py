"""The stages of a run, each of which ends in its minutes whatever hangs.

warm         the plan's kernels are compiled, by all cores at once
first        the device's ceilings, and the first times of a step and of attention
correctness  models, steps and operators against fp64; the kernels' tests; compute-sanitizer
times        every comparison, what matters most first, compiled providers last
profile      the kernels of one step of ours and of the best other
tune         candidate tiles of attention at 64 channels in bf16, timed
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.cases import Plan, correctness_subjects, first_subjects, timed_subjects
from bench.gpu.profile import ProfileWanted
from bench.gpu.programs import run_program
from bench.gpu.session import Budget, Session
from bench.gpu.tiles import TilesWanted
from bench.providers import COMPILED, OURS, PUBLISHED, WITHOUT

ROOT = Path(__file__).resolve().parent.parent.parent
_TESTS_SHARE = 0.75
"""Of what models, steps and operators leave, for the kernels' tests; the sanitizer has the rest."""


@dataclass(frozen=True)
class Run:
    """What stages work with."""

    session: Session
    plan: Plan
    device: str

    @property
    def folder(self) -> Path:
        """Of the results."""
        return self.session.record.folder

    def program(
        self,
        name: str,
        command: Sequence[str],
        budget: Budget,
        **environment: str,
    ) -> int | None:
        """Run a program into its log; its exit status, None if it did not come to its end."""
        say, log = self.session.record.line, self.folder / f"{name}.log"
        say(f"{name}: {' '.join(map(str, command))}"[:200])
        try:
            status = run_program(command, budget.left(), log, environment)
        except OSError as error:
            say(f"    {error}")
            return None
        if status is None:
            say(f"    stopped, its time is over; {log.name} has what it said")
        return status


def warm(run: Run, budget: Budget, tiles: bool = False) -> None:
    """Compile kernels: those of the plan, or candidate tiles."""
    command = [sys.executable, "-m", "bench.gpu.warm", *(["--tiles"] if tiles else [])]
    if run.plan.trial:
        command += ["--trial"]
    elif not run.plan.full:
        command += ["--quick"]
    run.program("warm", command, budget)
    for line in _last_lines(run.folder / "warm.log", 1):
        run.session.record.line(f"    {line}")


def first(run: Run, budget: Budget) -> None:
    """The first times."""
    run.session.run(first_subjects(run.plan), budget)


def correctness(run: Run, budget: Budget) -> None:
    """What holds."""
    run.session.run(correctness_subjects(run.plan), budget)
    _kernel_tests(run, budget.part(_TESTS_SHARE))
    _memcheck(run, budget)


def _kernel_tests(run: Run, budget: Budget) -> None:
    """The kernels' tests, on the device and in processes; every failure is said."""
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*_kernels.py"))
    if run.device == "cpu":
        files = ["tests/test_bare_tree.py"]  # kernels would take minutes on a CPU
    processes = max(1, min(14, (os.cpu_count() or 2) - 2)) if run.device == "cuda" else 0
    command = [
        sys.executable, "-m", "pytest", *files, "-m", "not full", "-v", "-n", str(processes),
        "--dist", "loadgroup", "--tb=short", "--rootdir", str(ROOT),
    ]  # fmt: skip
    if run.device == "cpu":
        command += ["-k", "no_other_name or one_rounding"]
    status = run.program("kernel_tests", command, budget)
    passed, failed = _verdicts(run.folder / "kernel_tests.log")
    run.session.record.line(f"    {passed} passed, {len(failed)} failed, exit status {status}")
    run.session.wrong += [f"kernel test {name}" for name in failed]
    if status is None:
        run.session.skipped.append(f"kernel tests after the first {passed + len(failed)}")
    elif status and not failed:
        run.session.wrong.append(f"kernel tests: exit status {status}, see kernel_tests.log")


def _verdicts(log: Path) -> tuple[int, list[str]]:
    """How many tests passed, and the names of those that did not."""
    if not log.exists():
        return 0, []
    text = log.read_text(encoding="utf-8", errors="replace")
    named = r"\b(FAILED|ERROR) (tests/\S+)|(tests/\S+) (FAILED|ERROR)\b"
    failed = {found[1] or found[2] for found in re.findall(named, text)}
    return len(re.findall(r"\bPASSED\b", text)), sorted(failed)


def _memcheck(run: Run, budget: Budget) -> None:
    """Small launches of every operator under compute-sanitizer, where there is one."""
    launches = [sys.executable, "-m", "bench.gpu.sanitized", "--device", run.device]
    tool = shutil.which("compute-sanitizer")
    if tool is None and run.device == "cuda":
        run.session.skipped.append("memcheck: no compute-sanitizer on PATH")
        return
    if tool is not None and run.device == "cuda":
        launches = [tool, "--tool", "memcheck", "--print-limit", "20", *launches]
    # Every tensor in memory of its own: an access past its end shows.
    status = run.program("memcheck", launches, budget, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = _last_lines(run.folder / "memcheck.log", 400)
    for line in lines:
        if "ERROR SUMMARY" in line or line.startswith("launched"):
            run.session.record.line(f"    {line}")
    bad = [line for line in lines if re.search(r"ERROR SUMMARY: [1-9]", line)]
    if status is None:
        run.session.skipped.append("memcheck: it did not end")
    elif status or bad:
        run.session.wrong.append(f"memcheck: exit status {status}, see memcheck.log")


def times(run: Run, budget: Budget) -> None:
    """What is timed."""
    run.session.run(timed_subjects(run.plan), budget)


def profile(run: Run, budget: Budget) -> None:
    """Where a step's time goes: ours, and that of the other that was fastest, if any was timed."""
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
    run.session.run([ProfileWanted(case, name, str(run.folder)) for name in (OURS, best)], budget)


def tune(run: Run, budget: Budget) -> None:
    """Times of candidate tiles, as many as there is time for."""
    warm(run, budget.part(0.45), tiles=True)
    wanted = TilesWanted(str(run.folder / "tiles.csv"), run.plan.trial, 0.4 * budget.left())
    run.session.run([wanted], budget)


def _last_lines(path: Path, count: int) -> list[str]:
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


STAGES: dict[str, tuple[Callable[[Run, Budget], None], float]] = {
    "warm": (warm, 70),
    "first": (first, 45),
    "correctness": (correctness, 150),
    "times": (times, 170),
    "profile": (profile, 30),
    "tune": (tune, 75),
}
"""Each with its share of the time; what one leaves is the others'."""


def run_stages(run: Run, names: Sequence[str], budget: Budget) -> None:
    """Run stages in order, each in its share of what is left."""
    for place, name in enumerate(names):
        function, share = STAGES[name]
        of_all = share / sum(STAGES[other][1] for other in names[place:])
        run.session.record.line(f"== {name}, {of_all * budget.left():.0f} s")
        function(run, budget.part(of_all))
