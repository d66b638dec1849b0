"""The GPU benchmark, run on the CPU; what needs a GPU is small, and driven here by stand-ins."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import correctness, gpu, gpu_measure, gpu_page
from bench.attention_ways import AttentionCase
from bench.bank_ways import ONE_BY_ONE, OWN_NAMES
from bench.cases import Case
from bench.ceilings import Ceilings
from bench.collect import read, write
from bench.device_timer import CpuTimer, CudaTimer, repeats
from bench.gpu import Budget, counted, main, run
from bench.gpu.cases import COMPILED_PROMPTS, Plan, gpu_subjects
from bench.gpu.checks import ActivationCase, NormCase, check_kernel, kernel_cases
from bench.gpu.device import WARM_UP, CapturedGraph, CpuDevice, CudaDevice, replay_error
from bench.gpu.measure import CeilingsWanted, KernelCheck, Outcome, measure
from bench.gpu.worker import Lost, Worker
from bench.providers import COMPILED, EAGER, OURS, PROVIDERS, PUBLISHED, provide
from vpt_fast.ops import activation

pytest_plugins = ("kernel_device",)

SMALL = Case(model="test_vit", batch=2, prompts=3, image_size=32, dtype="bfloat16")
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are computed faster without threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def results(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    return read(path)


def of(rows: list[dict[str, str]], **wanted: str) -> list[dict[str, str]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# --- a whole run --------------------------------------------------------------------------------


def test_a_run_ends_in_a_csv_and_a_page(tmp_path: Path, capsys: Any) -> None:
    assert main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = results(tmp_path)
    steps = of(rows, bench="step", method="vpt-deep", dropout="0.0")
    assert {row["prompts"] for row in steps} == {"3", "5"}
    for bench in ("step", "inference", "attention"):
        assert {row["provider"] for row in of(rows, bench=bench)} == set(EAGER)
    for bench, names in (("attention", OWN_NAMES), ("inference", [ONE_BY_ONE])):
        many = of(rows, bench=f"{bench} of many tasks")
        assert {row["provider"] for row in many} == {*names, OURS}
        assert all(float(row["ratio_p50"]) > 0 and row["batch"] == "2" for row in many)
    assert {row["method"] for row in of(rows, bench="step")} == {"vpt-deep", "vapt"}
    assert of(rows, bench="step", dropout="0.1") and of(rows, bench="experts")
    assert len(of(rows, bench="check")) == len(kernel_cases())
    for row in rows:
        assert row["kind"] == "measured" and row["error"] and not row["note"], row
        assert (row["bench"] == "check") == (row["p50_ms"] == ""), row
        assert not row["peak_mib"] and not row["graph_p50_ms"] and not row["cuda"]
    for row in steps:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert all(float(row[n]) > 0 for n in ("tflops", "gb_per_s", "tflops_ceiling")), row
    assert {row["ratio_p50"] for row in of(steps, provider=OURS)} == {"1.000"}
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(PNG)
    said = capsys.readouterr().out
    assert "FLOP and bytes are counted, times measured" in said and str(picture) in said
    assert "WRONG" not in said and "Skipped" not in said


QUICK = ["--device", "cpu", "--cases", "quick", "--prompts", "3", "--providers", "concat", OURS]


def test_a_wrong_provider_is_caught_and_not_timed(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(name: str, model: Any, method: Any) -> Any:
        module = provide(name, model, method)
        if name == OURS:
            module.get_parameter("blocks.2.prompt.tokens").register_hook(lambda g: 1.5 * g)
        return module

    monkeypatch.setattr(correctness, "provide", wrong)
    assert main([*QUICK, "--output", str(tmp_path)]) == 1
    rows = of(results(tmp_path), bench="step")
    (ours,), (theirs,) = of(rows, provider=OURS), of(rows, provider="concat")
    assert ours["p50_ms"] == "" and ours["note"].startswith("wrong: blocks.2.prompt.tokens is ")
    assert float(ours["error"]) == pytest.approx(0.5, rel=0.1)
    assert theirs["p50_ms"] and not theirs["ratio_p50"] and not theirs["note"]
    assert "WRONG:\n  step-test_vit-vpt-deep-p3-b2-bfloat16, vpt_fast: " in capsys.readouterr().out


def test_a_wrong_operator_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = KernelCheck(ActivationCase("silu"))
    right = activation.reference
    monkeypatch.setattr(activation, "reference", lambda h, kind: 1.1 * right(h, kind))
    outcome = measure(case, CpuDevice())
    (row,) = outcome.rows
    assert row["note"].startswith("wrong: out is 1.0e-01") and len(outcome.wrong) == 1


@pytest.mark.parametrize(
    ("error", "note", "wrong"),
    [
        (torch.OutOfMemoryError("no"), "check: out of memory", 0),
        (RuntimeError("does not\nwork"), "check: RuntimeError: does not", 1),
    ],
    ids=["memory", "failure"],
)
def test_a_failure_is_a_row_and_the_others_go_on(
    error: Exception, note: str, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, model: Any, method: Any) -> Any:
        if name == OURS:
            raise error
        return provide(name, model, method)

    monkeypatch.setattr(correctness, "provide", broken)
    case = dataclasses.replace(SMALL, providers=(OURS, "concat"))
    ours, theirs = (outcome := measure(case, CpuDevice())).rows
    assert ours["note"] == note and ours["rounds"] == 0 and "p50_ms" not in ours
    assert float(theirs["p50_ms"]) > 0 and len(outcome.wrong) == wrong and not outcome.faulted


def test_a_fault_of_the_device_ends_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, model: Any, method: Any) -> Any:
        if name == OURS:
            raise RuntimeError("illegal memory access")
        return provide(name, model, method)

    monkeypatch.setattr(correctness, "provide", broken)
    monkeypatch.setattr(CpuDevice, "well", lambda _: False)
    case = dataclasses.replace(SMALL, providers=("keys_concat", OURS, "concat"))
    outcome = measure(case, CpuDevice())
    assert outcome.faulted == (OURS,)
    assert [row["provider"] for row in outcome.rows] == ["keys_concat", OURS]


@pytest.mark.full
def test_compiled_providers(tmp_path: Path, capsys: Any) -> None:
    names = ["concat", *COMPILED, OURS]
    arguments = ["--device", "cpu", "--cases", "quick", "--prompts", "3", "--minutes", "30"]
    assert main([*arguments, "--providers", *names, "--output", str(tmp_path)]) == 0
    rows = of(results(tmp_path), bench="step")
    assert [row["provider"] for row in rows if row["p50_ms"]] == [
        n for n in PROVIDERS if n in names
    ]
    assert "s to compile and check, not counted" in capsys.readouterr().out


def test_every_operator_is_checked_in_other_dtypes() -> None:
    for case in (NormCase(72), ActivationCase("gelu", 40), AttentionCase(2, 1, 5, 1, 32)):
        if isinstance(case, AttentionCase):
            case = dataclasses.replace(case, providers=("concat", OURS))
        check = check_kernel(case, torch.float32, "cpu")
        assert check.holds and 0 < check.error < check.limit < 1e-4


# --- arguments ----------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    said = capsys.readouterr()
    assert "no CUDA GPU here" in said.err and "--device cpu" in said.err and not said.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--minutes", "0"], "0 is not greater than 0"),
        (["--batch", "-2"], "-2 is not greater than 0"),
        (["--prompts", "-1"], "-1 is less than 0"),
        (["--providers", "ours"], "invalid choice: 'ours'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--cases", "all"], "invalid choice: 'all'"),
    ],
)
def test_wrong_arguments(arguments: list[str], complaint: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert complaint in capsys.readouterr().err


def test_what_matters_most_comes_first() -> None:
    subjects = gpu_subjects(Plan())
    assert isinstance(subjects[0], CeilingsWanted)
    checks = [s for s in subjects if isinstance(s, KernelCheck)]
    attention = [c.case for c in checks if isinstance(c.case, AttentionCase)]
    assert {case.head_dim for case in attention} == {32, 64, 80, 128}
    cases = [s for s in subjects if isinstance(s, Case)]
    assert [case.prompts for case in cases[:5]] == [50, 10, 100, 200, 0]
    assert all(case.batch == 64 and case.model == "vit_base_patch16_224" for case in cases[:5])
    assert all(case.dtype == "bfloat16" for case in cases)
    assert cases[0].providers == PROVIDERS and cases[0].prompts == COMPILED_PROMPTS
    assert all(case.providers == EAGER for case in cases[1:5])
    quick = gpu_subjects(Plan("vit_tiny_patch16_224", 2, (7,), (OURS,), full=False))
    steps = [s for s in quick if isinstance(s, Case)]
    assert {s.model for s in steps} == {"vit_tiny_patch16_224"} and len(quick) < len(subjects)
    assert all(s.providers == (OURS,) and s.prompts == 7 and s.batch == 2 for s in steps)


# --- time that runs out, processes that do not come back ----------------------------------------


class Scripted:
    """A runner whose outcomes are given, and whose subjects take 100 seconds each."""

    def __init__(self, *script: Outcome | Lost) -> None:
        self.script, self.asked, self.now = list(script), [], 0.0
        self.limits: list[float] = []

    def measure(self, subject: Any, seconds: float) -> Outcome:
        self.asked.append(subject)
        self.limits.append(seconds)
        self.now += 100
        outcome = self.script.pop(0)
        if isinstance(outcome, Lost):
            raise outcome
        return outcome


def rows_of(*names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"provider": name, "rounds": 3, **more} for name in names]


def test_what_does_not_fit_is_skipped_and_said() -> None:
    runner = Scripted(Outcome(ceilings=Ceilings(1.0, 2.0)), Outcome(rows_of(OURS)), Outcome())
    said: list[str] = []
    subjects = [
        CeilingsWanted(),
        SMALL,
        dataclasses.replace(SMALL, prompts=9),
        KernelCheck(NormCase(8)),
    ]
    session = run(subjects, runner, Budget(215, lambda: runner.now), said.append)  # type: ignore[arg-type]
    # 15 seconds are left: too little for a step, enough for a check.
    assert runner.asked == [subjects[0], subjects[1], subjects[3]] and runner.limits[2] == 15
    assert session.skipped == ["step-test_vit-vpt-deep-p9-b2-bfloat16"]
    assert any("skipped, 15 s are left and it may take 20" in line for line in said)
    assert session.ceilings == Ceilings(1.0, 2.0) and len(session.rows) == 1


def test_with_no_time_nothing_is_measured(tmp_path: Path, capsys: Any) -> None:
    assert main(["--device", "cpu", "--minutes", "0.01", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "Nothing was measured" in said.err and "skipped" in said.out
    assert not list(tmp_path.iterdir())


def test_compilers_that_hang_do_not_cost_the_others() -> None:
    runner = Scripted(Lost("stopped after 9 s"), Outcome(rows_of(*EAGER)))
    case = dataclasses.replace(SMALL, providers=PROVIDERS)
    session = run([case], runner, Budget(900, lambda: runner.now), lambda _: None)  # type: ignore[arg-type]
    assert runner.asked[1].providers == EAGER and not session.wrong
    notes = {row["provider"]: row.get("note", "") for _, row in session.rows}
    assert notes == {n: "stopped after 9 s" if n in COMPILED else "" for n in PROVIDERS}


def test_a_fault_does_not_cost_the_others() -> None:
    first = Outcome(rows_of("concat", OURS), ["ours, wrong"], faulted=(OURS,))
    again = Outcome(rows_of("concat", "keys_concat", p50_ms="1"))
    runner = Scripted(first, again)
    case = dataclasses.replace(SMALL, providers=("concat", "keys_concat", OURS))
    session = run([case], runner, Budget(900, lambda: runner.now), lambda _: None)  # type: ignore[arg-type]
    assert runner.asked[1].providers == ("concat", "keys_concat")
    assert [row["provider"] for _, row in session.rows] == [OURS, "concat", "keys_concat"]
    assert session.wrong == ["ours, wrong"]


def test_a_lost_case_is_reported_once() -> None:
    runner = Scripted(Lost("its process ended with exit status -11"))
    case = dataclasses.replace(SMALL, providers=("concat", OURS))
    session = run([case], runner, Budget(900, lambda: runner.now), lambda _: None)  # type: ignore[arg-type]
    assert len(runner.asked) == 1 and len(session.wrong) == 1
    assert {row["note"] for _, row in session.rows} == {"its process ended with exit status -11"}


def end_or_answer(subject: Any, device: Any, dtype: str) -> Outcome:
    """What the worker of the test below calls."""
    if isinstance(subject, CeilingsWanted):
        os._exit(3)
    return Outcome(said=[f"{subject} on {device.name} in {dtype}"])


def test_a_worker_that_ends_or_hangs_is_replaced() -> None:
    worker = Worker("cpu", "float32", end_or_answer)
    try:
        outcome = worker.measure(KernelCheck(NormCase(8)), 60)
        assert outcome.said == ["check residual_norm-d8-layer_scale on cpu in float32"]
        with pytest.raises(Lost, match="ended with exit status 3"):
            worker.measure(CeilingsWanted(), 60)
        # A new process, which is stopped before it has even started.
        with pytest.raises(Lost, match="stopped after 0 s"):
            worker.measure(KernelCheck(NormCase(8)), 0.1)
    finally:
        worker.close()


# --- counts -------------------------------------------------------------------------------------


def test_counted_work_of_a_row() -> None:
    device = "NVIDIA H100 80GB HBM3"
    attention = AttentionCase(3, 2, 17, 2, 32)
    inference = dataclasses.replace(SMALL, work="inference")
    tasks = [(s, OURS, "bfloat16", device) for s in (SMALL, attention, inference)]
    step, alone, nothing = counted([*tasks, (SMALL, "nobody", "bfloat16", device)], 0, 0)[:3]
    assert nothing is None
    assert isinstance(step, gpu.Counted) and step.eager_ms and step.graph_ms
    # Two products forward and five backward, of 17 queries with 20 keys each.
    assert isinstance(alone, gpu.Counted) and alone.eager_ms is None
    assert alone.flop >= 7 * 2 * 2 * 2 * 17 * 20 * 32
    larger = counted([(dataclasses.replace(SMALL, image_size=64), OURS, "bfloat16", device)], 0, 0)
    assert isinstance(larger[0], gpu.Counted) and larger[0].flop > step.flop


def test_what_cannot_be_counted_is_said() -> None:
    (found,) = counted([(SMALL, "nobody", "bfloat16", "a GPU")], 0, 0)
    assert isinstance(found, str) and "nobody is not counted: " in found


@pytest.mark.full
def test_the_kernels_are_what_is_checked_and_timed(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where "cuda" is not the CPU; the times are the simulator's own."""

    class Simulated(CpuDevice):
        name = kernel_device.type

    monkeypatch.setitem(gpu_measure.ROUNDS, "cuda", 1)
    outcome = measure(dataclasses.replace(SMALL, providers=("concat", OURS)), Simulated())
    assert not outcome.wrong and [row["provider"] for row in outcome.rows] == ["concat", OURS]
    assert all(row["p50_ms"] for row in outcome.rows)
    for case in (AttentionCase(3, 2, 17, 1, 32, ("concat", OURS)), NormCase(72, 4)):
        assert check_kernel(case, torch.bfloat16, kernel_device).holds


@pytest.mark.full
def test_counting_in_processes() -> None:
    tasks = [(SMALL, name, "bfloat16", "a GPU") for name in ("concat", OURS)]
    assert counted(tasks, 2, 120) == counted(tasks, 0, 0)
    assert counted(tasks, 2, 0.0)[1] == "not counted: no time was left"


# --- the parts that need a GPU, with stand-ins ----------------------------------------------------


def test_a_round_repeats_short_functions() -> None:
    timer = SimpleNamespace(round_seconds=0.02, seconds=lambda run, count=1: 0.003)
    assert repeats(timer, lambda: None) == 7
    timer.round_seconds = 0.0
    assert repeats(timer, lambda: None) == 1
    calls: list[int] = []
    assert CpuTimer().seconds(lambda: calls.append(1), 4) > 0 and len(calls) == 4


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA, in order; an event's time is its place in that order."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.place = len(log)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            assert log[-1] == "wait"
            return end.place - self.place

    def noted(name: str, value: Any = None) -> Callable[[], Any]:
        return lambda: (log.append(name), value)[1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", noted("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", noted("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", noted("peak", 77))
    return log


def test_events_surround_the_repetitions(events: list[str]) -> None:
    seconds = CudaTimer().seconds(lambda: events.append("run"), 3)
    assert events == ["synchronize", "record", "run", "run", "run", "record", "wait"]
    assert seconds == pytest.approx(4e-3 / 3)  # 4 milliseconds by the stand-in's clock


def test_peak_memory_is_of_the_step_alone(events: list[str]) -> None:
    assert CudaDevice().peak(lambda: events.append("run")) == 77
    assert events == ["synchronize", "reset", "run", "synchronize", "peak"]


def test_a_capture_warms_up_and_has_gradients_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    captured = []

    @contextlib.contextmanager
    def capturing(graph: Any, stream: Any) -> Iterator[None]:
        captured.append((len(calls), weight.grad))
        yield

    monkeypatch.setattr(torch.cuda, "graph", capturing)
    weight = torch.ones(3, requires_grad=True)
    calls: list[int] = []

    def step() -> torch.Tensor:
        calls.append(1)
        weight.grad = None
        loss = (weight * torch.arange(3.0)).sum()
        loss.backward()
        return loss.detach()

    graph = CapturedGraph(step, [weight])
    assert captured == [(WARM_UP, None)] and len(calls) == WARM_UP + 1
    assert graph.held["1"] is weight.grad and torch.equal(graph.wanted["1"], torch.arange(3.0))
    # The stand-in's replay computes nothing, and that shows.
    assert not replay_error(graph) <= 1.0
    graph.replay = lambda: [t.copy_(graph.wanted[n]) for n, t in graph.held.items()]  # type: ignore[method-assign]
    assert replay_error(graph) == 0.0


class Graphed(CpuDevice):
    """A device whose graphs compute `factor` times what they should."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def capture(self, run: Any, parameters: Any) -> Any:
        wanted = {"0": run().detach().clone()}
        held = {"0": torch.zeros_like(wanted["0"])}
        return SimpleNamespace(
            wanted=wanted, held=held, replay=lambda: held["0"].copy_(self.factor * wanted["0"])
        )


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_replays_are_checked_before_they_are_timed(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_measure.GRAPH_ROUNDS, "cpu", 2)
    case = dataclasses.replace(SMALL, providers=("concat",))
    outcome = measure(case, Graphed(factor))
    (row,) = outcome.rows
    assert row["p50_ms"]
    if factor == 1.0:
        assert float(row["graph_p50_ms"]) > 0 and not outcome.wrong
    else:
        assert "graph_p50_ms" not in row and "a replay's results are 5.0e-01" in row["note"]
        assert len(outcome.wrong) == 1


def test_a_capture_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, run: Any, parameters: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CpuDevice, "capture", fail)
    case = dataclasses.replace(SMALL, providers=(OURS, "concat"))
    outcome = measure(case, CpuDevice())
    for row in outcome.rows:
        assert row["p50_ms"] and row["note"].startswith("graph: RuntimeError: operation not")
    assert not outcome.wrong and not outcome.spent
    # If it leaves no device behind, what was timed stands, and nothing is measured again.
    monkeypatch.setattr(CpuDevice, "well", lambda _: False)
    outcome = measure(case, CpuDevice())
    ours, theirs = outcome.rows
    assert ours["p50_ms"] and ours["note"] == "graph: not tried, another's failed"
    assert theirs["p50_ms"] and theirs["ratio_p50"] and outcome.spent and not outcome.faulted


# --- the page -------------------------------------------------------------------------------------


def test_the_page_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Made-up numbers: with graphs, memory, a ceiling, an H100's name, and a row without times."""

    def row(name: str, prompts: int, times: bool = True) -> dict[str, Any]:
        made = {
            "bench": "step", "model": "test_vit", "method": "vpt-deep", "batch": 2,
            "prompts": prompts, "dropout": 0.0, "dtype": "bfloat16", "image_size": 32,
            "provider": name, "device": "NVIDIA H100 80GB HBM3", "cuda": "13.0",
        }  # fmt: skip
        slow = 30 if name == PUBLISHED else 1
        times_of = {
            "p50_ms": 3 * slow, "graph_p50_ms": 2 * slow, "ratio_p50": slow, "peak_mib": 50,
            "tflops": 2, "tflops_ceiling": 9, "gb_per_s": 4, "gb_per_s_ceiling": 8,
        }  # fmt: skip
        return made | (times_of if times else {"note": "check: out of memory"})

    names = (PUBLISHED, "concat", OURS)
    rows = [row(name, p) for p in (3, 5) for name in names] + [row("keys_concat", 3, times=False)]
    path = tmp_path / "made_up.csv"
    write(rows, path)
    drawn: dict[str, Any] = {}
    save = gpu_page.Figure.savefig

    def keep(self: Any, where: Path) -> None:
        drawn["axes"] = self.axes
        save(self, where)

    monkeypatch.setattr(gpu_page.Figure, "savefig", keep)
    assert gpu_page.main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path.with_suffix(".png"))
    assert path.with_suffix(".png").read_bytes().startswith(PNG)
    speedup, time, memory, tflops, rate, model = drawn["axes"]
    assert [list(line.get_xdata()) for line in speedup.lines if len(line.get_xdata())] == 3 * [
        [3, 5]
    ]
    assert [bar.get_width() for bar in time.patches] == [3, 3, 90, 2, 2, 60]
    assert "90 (cut off)" in [text.get_text().replace("90.0", "90") for text in time.texts]
    assert all(ax.axison for ax in drawn["axes"]) and len(memory.lines) == len(PROVIDERS)
    assert "dotted: the device's 9" in tflops.get_xlabel() and "GB/s" in rate.get_xlabel()
    # Each of six rows eager and as a graph, and the diagonal.
    assert len(model.lines) == 13


def test_a_page_of_nothing_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.csv").write_text("provider\n")
    with pytest.raises(SystemExit):
        gpu_page.main([str(tmp_path / "empty.csv")])
    assert "has no columns" in capsys.readouterr().err
