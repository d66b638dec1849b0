"""A GPU benchmark ends within its time, and saves its results through hangs and crashes."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.ceilings import Ceilings
from bench.compare.cases import Case
from bench.compare.collect import read
from bench.compare.facts import facts
from bench.gpu import session as sessions
from bench.gpu import stages
from bench.gpu.jobs.cases import Plan
from bench.gpu.jobs.job import CeilingsJob, FactsJob, KernelCheck, case_columns
from bench.gpu.jobs.row_checks import NormCase
from bench.gpu.outcome import Emit
from bench.gpu.programs import run_program
from bench.gpu.results.record import Record
from bench.gpu.run import measure
from bench.gpu.session import Budget, Session
from bench.gpu.stages import STAGES, Run
from bench.gpu.worker import Worker, WorkerDied
from bench.providers.models import COMPILED, GPU_PROVIDERS, OURS

SMALL = Case(model="test_vit", batch=2, prompts=3, image_size=32, dtype="bfloat16")
Event = tuple[str, Any]


def row(name: str, **more: Any) -> Event:
    return "row", {**case_columns(SMALL, "bfloat16"), "provider": name, "rounds": 3, **more}


class Scripted:
    """A runner that emits the given events, and whose jobs take 100 seconds each."""

    def __init__(self, *script: list[Event | WorkerDied]) -> None:
        self.script, self.asked, self.now = list(script), [], 0.0
        self.limits: list[float] = []

    def measure(self, job: Any, seconds: float, emit: Emit) -> None:
        self.asked.append(job)
        self.limits.append(seconds)
        self.now += 100
        for event in self.script.pop(0):
            if isinstance(event, WorkerDied):
                raise event
            emit(*event)

    def close(self) -> None:
        pass


@pytest.fixture
def make_session(tmp_path: Path) -> Callable[[Any], Session]:
    """Return a function that creates a runner's session."""

    def make(runner: Any) -> Session:
        record = Record(tmp_path, lambda _: None)
        record.facts = facts(gpu=False)
        return Session(runner, record)

    return make


def test_jobs_that_do_not_fit_are_skipped_and_reported(make_session: Any) -> None:
    runner = Scripted([("ceilings", Ceilings(1.0, 2.0))], [row(OURS)], [])
    session = make_session(runner)
    check = KernelCheck(NormCase(8))
    jobs = [CeilingsJob(), SMALL, dataclasses.replace(SMALL, prompts=9), check]
    session.run(jobs, Budget(207, lambda: runner.now))
    # 7 seconds are left: too little for a step, enough for a check.
    assert runner.asked == [jobs[0], jobs[1], check] and runner.limits[2] == 7
    assert session.skipped == ["step-test_vit-vpt-deep-p9-b2-bfloat16"]
    assert session.ceilings == Ceilings(1.0, 2.0) and len(session.rows) == 1
    (stored,) = read(session.record.path)
    assert stored["tflops_ceiling"] == "1" and stored["torch"]


def test_completely_timed_cases_are_not_timed_again(make_session: Any) -> None:
    whole = [row("concat", p50_ms="1"), row(OURS, p50_ms="2")]
    runner = Scripted(whole, [row("concat", p50_ms="1"), row(OURS)], whole)
    session, other = make_session(runner), dataclasses.replace(SMALL, prompts=9)
    session.run([SMALL, SMALL, other, other], Budget(900))
    assert runner.asked == [SMALL, other, other]


def test_rows_are_written_before_their_job_ends(make_session: Any) -> None:
    seen: list[list[str]] = []

    class Watched(Scripted):
        def measure(self, job: Any, seconds: float, emit: Emit) -> None:
            emit(*row("concat", error="0.1"))
            emit(*row(OURS))
            seen.append([r["provider"] for r in read(session.record.path)])
            emit(*row("concat", error="0.1", p50_ms="3"))
            seen.append([r["p50_ms"] for r in read(session.record.path)])

    session = make_session(Watched())
    session.run([SMALL], Budget(900))
    assert seen == [["concat", OURS], ["3", ""]]


def test_a_hang_affects_its_provider_alone(make_session: Any) -> None:
    """The other providers are measured again without it, and emitted rows are saved."""
    hung = "concat_compiled"
    runner = Scripted(
        [row("concat"), ("running", (hung,)), WorkerDied("stopped after 9 s")],
        [row(name, p50_ms="1") for name in GPU_PROVIDERS if name != hung],
    )
    session = make_session(runner)
    case = dataclasses.replace(SMALL, providers=GPU_PROVIDERS)
    session.run([case], Budget(900, lambda: runner.now))
    assert runner.asked[1].providers == tuple(n for n in GPU_PROVIDERS if n != hung)
    notes = {r["provider"]: r.get("note", "") for r in session.rows}
    assert notes == {n: "stopped after 9 s" if n == hung else "" for n in GPU_PROVIDERS}
    assert len(session.rows) == len(GPU_PROVIDERS)
    assert not session.wrong  # compilers may hang
    assert hung in COMPILED


def test_a_hang_in_a_graph_costs_no_times(make_session: Any) -> None:
    timed = [row("concat", p50_ms="2"), row(OURS, p50_ms="1"), ("running", (OURS,))]
    runner = Scripted([*timed, WorkerDied("its process ended with exit status -11")])
    session = make_session(runner)
    session.run(
        [dataclasses.replace(SMALL, providers=("concat", OURS))], Budget(900, lambda: runner.now)
    )
    assert len(runner.asked) == 1 and [r["p50_ms"] for r in session.rows] == ["2", "1"]
    assert session.wrong == [f"{SMALL}, {OURS}: its process ended with exit status -11"]


def test_after_a_fault_the_other_providers_are_measured_again(make_session: Any) -> None:
    first = [row("concat"), ("wrong", "ours, wrong"), row(OURS, note="lost"), ("faulted", (OURS,))]
    runner = Scripted(first, [row("concat", p50_ms="1"), row("keys_concat", p50_ms="1")])
    session = make_session(runner)
    case = dataclasses.replace(SMALL, providers=("concat", "keys_concat", OURS))
    session.run([case], Budget(900, lambda: runner.now))
    assert runner.asked[1].providers == ("concat", "keys_concat")
    assert [r["provider"] for r in session.rows] == [OURS, "concat", "keys_concat"]
    assert session.wrong == ["ours, wrong"]


def hang_or_answer(job: Any, device: Any, dtype: str, emit: Emit) -> None:
    """Measure a job of the workers below: answer, hang or exit."""
    if isinstance(job, CeilingsJob):
        os._exit(3)
    if isinstance(job, FactsJob):
        return emit("facts", facts(gpu=False))
    emit("message", f"{job} on {device.name} in {dtype}")
    if not isinstance(job, KernelCheck):
        time.sleep(600)
    return None


@pytest.mark.usefixtures("prepared_processes")
def test_a_worker_that_ends_or_hangs_is_replaced() -> None:
    worker, messages = Worker("cpu", "float32", hang_or_answer), []

    def emit(kind: str, value: Any) -> None:
        messages.append(value)

    check = KernelCheck(NormCase(8))
    try:
        worker.measure(check, 60, emit)
        assert messages == ["check residual_norm-d8-layer_scale on cpu in float32"]
        with pytest.raises(WorkerDied, match="stopped after 1 s"):
            worker.measure(SMALL, 1.0, emit)
        assert messages[1] == f"{SMALL} on cpu in float32"
        with pytest.raises(WorkerDied, match="ended with exit status 3"):
            worker.measure(CeilingsJob(), 60, emit)
        # A new process, which is stopped before it has started.
        with pytest.raises(WorkerDied, match="stopped after 0 s"):
            worker.measure(check, 0.1, emit)
    finally:
        worker.close()


@pytest.mark.usefixtures("prepared_processes")
def test_a_gpus_plan_ends_in_its_minutes_though_every_stage_hangs(
    make_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job and every program hangs, as with a driver that no longer responds."""
    programs: list[str] = []

    def sleep(command: Any, seconds: float, log: Path, environment: Any) -> int | None:
        assert log.name == "programs.log"
        programs.append(log.read_text().splitlines()[-1].removeprefix("== "))
        return run_program(["sleep", "600"], seconds, log, environment)

    monkeypatch.setattr(stages, "run_program", sleep)
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sessions, "estimated_seconds", lambda job: 0.1)
    monkeypatch.setattr(sessions, "_LEAST_SECONDS", 0.1)
    worker = Worker("cpu", "bfloat16", hang_or_answer)
    session = make_session(worker)
    worker.measure(FactsJob(), 60, lambda kind, value: None)  # starting does not count
    start, seconds = time.monotonic(), 8.0
    try:
        measure(Run(session, Plan(), "cuda"), ["all"], Budget(seconds))
    finally:
        worker.close()
    assert time.monotonic() - start < seconds + 3
    # Each stage had its share of the time, and reports the jobs that were stopped.
    assert programs == ["warm", "tests", "memcheck", "warm", "demo"]
    asked = {type(job).__name__ for job, _ in session.outcomes}
    assert {"CeilingsJob", "ModelCheck", "Case", "ProfileJob", "TilesJob"} <= asked
    assert any("stopped after" in text for text in session.wrong)
    assert "memcheck: it did not end" in session.skipped
    assert [r["note"] for r in read(session.record.path) if r["provider"] == OURS]


def test_a_program_ends_with_its_child_processes(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; print('begun'); child = subprocess.Popen(['sleep', '600']); "
        "print(child.pid); child.wait()"
    )
    log = tmp_path / "log"
    assert run_program([sys.executable, "-c", code], 2.0, log) is None
    begun, child = log.read_text().split()
    command, patience = Path(f"/proc/{child}/cmdline"), time.monotonic() + 10
    # A killed process that is not scheduled takes a moment to end.
    while command.exists() and command.read_bytes() and time.monotonic() < patience:
        time.sleep(0.05)
    assert begun == "begun" and not (command.exists() and command.read_bytes())
    assert run_program(["sh", "-c", "echo $NAME; exit 7"], 5.0, log, {"NAME": "value"}) == 7
    assert log.read_text().endswith("value\n")


def test_verdicts_of_tests() -> None:
    lines = [
        "[gw1] [  1%] PASSED tests/test_a_kernels.py::test_x[1] ",
        "[gw0] [  2%] FAILED tests/test_a_kernels.py::test_x[2] ",
        "tests/test_b_kernels.py::test_y PASSED [ 3%]",
        "FAILED tests/test_a_kernels.py::test_x[2] - AssertionError",
        "ERROR tests/test_c_kernels.py::test_z",
    ]
    passed, failed = stages._verdicts(lines)
    assert passed == 2
    assert failed == ["tests/test_a_kernels.py::test_x[2]", "tests/test_c_kernels.py::test_z"]
    assert stages._verdicts([]) == (0, [])


def test_shares_of_the_time() -> None:
    """Time that a stage does not use is split among the others."""
    given: list[float] = []
    now = 0.0

    def stage(seconds: float) -> Any:
        def function(run: Run, budget: Budget) -> None:
            nonlocal now
            given.append(budget.left())
            now += seconds

        return function, 10.0

    parts = {"a": stage(1.0), "b": stage(60.0), "c": stage(1.0)}
    before = dict(STAGES)
    try:
        STAGES.clear()
        STAGES.update(parts)
        silent = Record(Path("/tmp"), lambda _: None)
        silent.line = lambda text: None  # type: ignore[method-assign]
        run = Run(Session(Scripted(), silent), Plan(), "cpu")  # type: ignore[arg-type]
        stages.run_stages(run, ["a", "b", "c"], Budget(90, lambda: now))
    finally:
        STAGES.clear()
        STAGES.update(before)
    assert given == [30, 44.5, 29]
