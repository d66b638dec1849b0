"""Comparisons of the GPU benchmark on the CPU, with stand-ins for a GPU's functions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.compare import correctness
from bench.compare.cases import Case
from bench.compare.device_timer import CpuTimer, CudaTimer, repeats
from bench.gpu.device import (
    HOST_ROUNDS,
    WARM_UP,
    CapturedGraph,
    CpuDevice,
    CudaDevice,
    replay_error,
)
from bench.gpu.jobs import measure as measuring
from bench.gpu.jobs.checks import check_kernel
from bench.gpu.jobs.measure import KernelCheck, measure
from bench.gpu.jobs.row_checks import ActivationCase, NormCase
from bench.providers.attention import AttentionCase
from bench.providers.models import OURS, provide
from vpt_fast.ops.rowwise import activation

pytest_plugins = ("support.kernels.kernel_device",)

SMALL = Case(model="test_vit", batch=2, prompts=3, image_size=32, dtype="bfloat16")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, which is faster for tiny tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def test_a_failure_is_a_row_and_the_others_are_measured(
    error: Exception, note: str, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, model: Any, method: Any, memory: str = "speed") -> Any:
        if name == OURS:
            raise error
        return provide(name, model, method)

    monkeypatch.setattr(correctness, "provide", broken)
    case = dataclasses.replace(SMALL, providers=(OURS, "concat"))
    ours, theirs = (outcome := measure(case, CpuDevice())).rows
    assert ours["note"] == note and ours["rounds"] == 0 and "p50_ms" not in ours
    assert float(theirs["p50_ms"]) > 0 and len(outcome.wrong) == wrong and not outcome.faulted


def test_a_fault_of_the_device_ends_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, model: Any, method: Any, memory: str = "speed") -> Any:
        if name == OURS:
            raise RuntimeError("illegal memory access")
        return provide(name, model, method)

    monkeypatch.setattr(correctness, "provide", broken)
    monkeypatch.setattr(CpuDevice, "usable", lambda _: False)
    case = dataclasses.replace(SMALL, providers=("keys_concat", OURS, "concat"))
    outcome = measure(case, CpuDevice())
    assert outcome.faulted == (OURS,)
    assert [row["provider"] for row in outcome.rows] == ["keys_concat", OURS]


def test_every_operator_is_checked_in_other_dtypes() -> None:
    for case in (NormCase(72), ActivationCase("gelu", 40), AttentionCase(2, 1, 5, 1, 32)):
        if isinstance(case, AttentionCase):
            case = dataclasses.replace(case, providers=("concat", OURS))
        check = check_kernel(case, torch.float32, "cpu")
        assert check.holds and 0 < check.error < check.limit < 1e-4


@pytest.mark.full
def test_the_kernels_are_checked_and_timed(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where "cuda" is not the CPU; times are the simulator's."""

    class Simulated(CpuDevice):
        name = kernel_device.type

    monkeypatch.setitem(measuring.ROUNDS, "cuda", 1)
    outcome = measure(dataclasses.replace(SMALL, providers=("concat", OURS)), Simulated())
    assert not outcome.wrong and [row["provider"] for row in outcome.rows] == ["concat", OURS]
    assert all(row["p50_ms"] for row in outcome.rows)
    for case in (AttentionCase(3, 2, 17, 1, 32, ("concat", OURS)), NormCase(72, 4)):
        assert check_kernel(case, torch.bfloat16, kernel_device).holds


def test_a_round_repeats_short_functions() -> None:
    timer = SimpleNamespace(round_seconds=0.02, seconds=lambda run, count=1: 0.003)
    assert repeats(timer, lambda: None) == 7
    timer.round_seconds = 0.0
    assert repeats(timer, lambda: None) == 1
    calls: list[int] = []
    assert CpuTimer().seconds(lambda: calls.append(1), 4) > 0 and len(calls) == 4


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record calls of CUDA in order; an event's time is its position in that order."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.position = len(log)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            assert log[-1] == "wait"
            return end.position - self.position

    def recorded_launches(name: str, value: Any = None) -> Callable[[], Any]:
        return lambda: (log.append(name), value)[1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", recorded_launches("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", recorded_launches("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", recorded_launches("peak", 77))
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
    # The check notices that the stand-in's replay computes nothing.
    assert not replay_error(graph) <= 1.0
    graph.replay = lambda: [t.copy_(graph.wanted[n]) for n, t in graph.held.items()]  # type: ignore[method-assign]
    assert replay_error(graph) == 0.0


class Graphed(CpuDevice):
    """A device whose graphs compute `factor` times the right results."""

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
    monkeypatch.setitem(measuring.GRAPH_ROUNDS, "cpu", 2)
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
    assert not outcome.wrong and not outcome.device_lost
    # If the device is unusable afterwards, times are saved, and nothing is measured again.
    monkeypatch.setattr(CpuDevice, "usable", lambda _: False)
    outcome = measure(case, CpuDevice())
    ours, theirs = outcome.rows
    assert ours["p50_ms"] and ours["note"] == "graph: not tried, another provider's failed"
    assert theirs["p50_ms"] and theirs["ratio_p50"] and outcome.device_lost and not outcome.faulted


def test_inference_is_replayed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results created in inference mode can be written in inference mode only."""

    class Replaying(CpuDevice):
        def capture(self, run: Any, parameters: Any) -> Any:
            held = {"0": run()}
            assert held["0"].is_inference()
            wanted = {"0": held["0"].clone()}

            def replay() -> None:
                with torch.inference_mode():
                    held["0"].copy_(wanted["0"])

            return SimpleNamespace(wanted=wanted, held=held, replay=replay)

    monkeypatch.setitem(measuring.GRAPH_ROUNDS, "cpu", 2)
    case = dataclasses.replace(SMALL, work="inference", providers=(OURS, "concat"))
    outcome = measure(case, Replaying())
    assert [float(row["graph_p50_ms"]) > 0 for row in outcome.rows] == [True, True]
    assert not outcome.wrong and not any(row.get("note") for row in outcome.rows)


def test_rows_are_emitted_as_they_grow() -> None:
    emitted: list[tuple[str, Any]] = []
    case = dataclasses.replace(SMALL, providers=("concat", OURS))
    outcome = measure(case, CpuDevice(), emit=lambda kind, value: emitted.append((kind, value)))
    rows = [value for kind, value in emitted if kind == "row"]
    assert [row["provider"] for row in rows[:2]] == ["concat", OURS]
    assert "error" in rows[0] and "p50_ms" not in rows[0] and "p50_ms" in rows[-1]
    assert {row["provider"]: row for row in rows} == outcome.by_provider
    # A provider is emitted before it starts.
    assert emitted[0] == ("running", ("concat",)) and ("running", (OURS,)) in emitted


def test_the_host_is_timed_from_an_idle_device(events: list[str]) -> None:
    assert CudaDevice().host_seconds(lambda: events.append("run")) is not None
    assert events == [*["synchronize", "run"] * HOST_ROUNDS, "synchronize"]


def test_clock_and_power_are_read_under_load(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: (events.append("clock"), 1980)[1])

    def refused() -> int:
        raise RuntimeError("NVML is not found")

    monkeypatch.setattr(torch.cuda, "power_draw", refused)
    assert CudaDevice().load(lambda: events.append("run"), 0.049) == {"sm_mhz": "1980"}
    assert events == ["run", "run", "run", "clock", "synchronize"]


class Cuda(CpuDevice):
    """A device that reports host time, clock and power."""

    def host_seconds(self, run: Any) -> float | None:
        return 0.0123

    def load(self, run: Any, seconds: float) -> dict[str, str]:
        return {"sm_mhz": "1755", "watts": "610"}


def test_host_time_clock_and_power_stand_beside_a_time() -> None:
    (row,) = measure(dataclasses.replace(SMALL, providers=(OURS,)), Cuda()).rows
    assert (row["host_ms"], row["sm_mhz"], row["watts"]) == ("12.3", "1755", "610")
    (row,) = measure(dataclasses.replace(SMALL, providers=(OURS,), memory="lean"), Cuda()).rows
    assert row["memory"] == "lean"
