"""One comparison on a device: every provider checked, timed in interleaved rounds, then replayed.

A provider's failure (a wrong result, lack of memory, a failure to compile or to capture) is written
to its row, and the others continue. Every event is emitted as soon as it is known, and the running
providers before they start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from bench.ceilings import measure_ceilings
from bench.compare.cases import DTYPES, INFERENCE, Case
from bench.compare.collect import Row, percentiles, ratios
from bench.compare.correctness import SLACK, Check, Truth
from bench.compare.device_timer import Run, Timer, repeats, times_of
from bench.compare.facts import facts
from bench.compare.interleave import Times
from bench.compare.rounds import work
from bench.gpu.device import Device, replay_error
from bench.gpu.jobs.checks import check_kernel
from bench.gpu.jobs.job import (
    CeilingsJob,
    Comparison,
    FactsJob,
    Job,
    KernelCheck,
    RunnableJob,
    case_columns,
)
from bench.gpu.outcome import Emit, Outcome, ignore_event
from bench.providers import (
    attention as attention_providers,
)
from bench.providers import (
    bank_attention as bank_attention_providers,
)
from bench.providers import (
    bank_models as bank_model_providers,
)
from bench.providers import (
    experts as expert_providers,
)
from bench.providers.attention import AttentionCase
from bench.providers.bank_attention import BankAttentionCase
from bench.providers.bank_models import BankModelCase
from bench.providers.experts import ExpertCase
from bench.providers.models import COMPILED, OURS

ROUNDS = {"cuda": 15, "cpu": 3}
GRAPH_ROUNDS = {"cuda": 10, "cpu": 0}


_PROVIDERS = {
    AttentionCase: attention_providers,
    ExpertCase: expert_providers,
    BankAttentionCase: bank_attention_providers,
}


@dataclass(frozen=True)
class _Prepared:
    check: Check
    run: Run
    parameters: tuple[torch.nn.Parameter, ...] = ()


class _DeviceFault(Exception):
    """The device no longer computes."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self.names = names


def measure(
    job: Job, device: Device, dtype: str = "bfloat16", emit: Emit = ignore_event
) -> Outcome:
    """Run a job.

    Args:
        job: Job to run.
        device: Device to run it on.
        dtype: Dtype of attention, experts and checks; a `Case` has its own.
        emit: Receives every event as it occurs.

    Returns:
        All events.
    """
    outcome = Outcome()

    def both(kind: str, value: Any) -> None:
        outcome.add(kind, value)
        emit(kind, value)

    if isinstance(job, CeilingsJob):
        both("ceilings", measure_ceilings(device))
    elif isinstance(job, FactsJob):
        both("facts", facts(gpu=device.name == "cuda"))
    elif isinstance(job, RunnableJob):
        job.run(device, both)
        device.release()
    else:
        _Comparing(job, device, dtype, both)
    return outcome


class _Comparing:
    def __init__(
        self, job: Comparison | KernelCheck, device: Device, dtype: str, emit: Emit
    ) -> None:
        self.job, self.device, self.emit = job, device, emit
        self.facts = case_columns(job, dtype)
        self.dtype = self.facts["dtype"]
        self.rows: dict[str, Row] = {}
        self._truth: Truth | None = None
        device_lost = False
        try:
            if isinstance(job, KernelCheck):
                self._check_kernel(job)
            else:
                device_lost = self._compare(job)
            if not device_lost:
                device.release()
        except _DeviceFault as fault:
            emit("faulted", fault.names)

    def _note(self, name: str, **columns: Any) -> None:
        """Add columns to a provider's row, and emit the row."""
        row = self.rows.setdefault(name, {**self.facts, "provider": name, "rounds": 0})
        row |= columns
        self.emit("row", dict(row))

    def _failed(self, name: str, note: str, wrong: bool = True) -> None:
        before = self.rows.get(name, {}).get("note", "")
        self._note(name, note="; ".join(filter(None, [before, note])))
        if wrong:
            self.emit("wrong", f"{self.job}, {name}: {note}")

    def _try(
        self, names: tuple[str, ...], what: str, function: Callable[[], Any], wrong: bool = True
    ) -> Any:
        """Return the function's result; None, and a note in the providers' rows, if it fails.

        Raises:
            _DeviceFault: If the device no longer computes.
        """
        self.emit("running", names)
        try:
            return function()
        except torch.OutOfMemoryError:
            note, wrong = f"{what}: out of memory", False
        # Compilers raise errors of any type.
        except Exception as error:
            note = f"{what}: {one_line(error)}"
        for name in names:
            self._failed(name, note, wrong)
        if not self.device.usable():
            raise _DeviceFault(names)
        self.device.release()
        return None

    def _check_kernel(self, job: KernelCheck) -> None:
        check = partial(check_kernel, job.case, DTYPES[self.dtype], self.device.name)
        found = self._try((OURS,), "check", check)
        if found is not None:
            self._holds(found)

    def _holds(self, check: Check) -> bool:
        self._note(check.provider, error=f"{check.error:.2g}")
        if not check.holds:
            self._failed(
                check.provider,
                f"wrong: {check.worst} is {check.error:.1e} from fp64, limit {check.limit:.1e}",
            )
        return check.holds

    def _compare(self, job: Comparison) -> bool:
        """Check, time and replay; return whether the device was lost after the times."""
        prepared: dict[str, _Prepared] = {}
        for name in job.providers:
            self.device.release()
            before, start = self.device.allocated(), perf_counter()
            entry = self._try(
                (name,), "check", partial(self._enter, job, name), name not in COMPILED
            )
            if entry is None or not self._holds(entry.check):
                continue
            if name in COMPILED:
                took = perf_counter() - start
                self.emit("message", f"{name}: {took:.0f} s to compile and check, not counted")
            self.device.release()
            peak = self._try((name,), "peak memory", partial(_peak, self.device, entry.run))
            if peak is not None and isinstance(self.job, Case):
                self._note(name, peak_mib=f"{(peak - before) / 2**20:.1f}")
            prepared[name] = entry
        self._truth = None
        self.device.release()
        # Ours last: a capture that fails may leave its process without a device.
        timed = sorted(self._time(prepared), key=lambda name: name == OURS)
        if isinstance(job, BankModelCase):
            return False  # a bank looks tasks up on the host, which a graph would not repeat
        return self._replay_all(timed, prepared)

    def _replay_all(self, timed: Sequence[str], prepared: dict[str, _Prepared]) -> bool:
        """Replay the providers that were timed; return whether the device was lost."""
        for index, name in enumerate(timed):
            replay = partial(self._replay, name, prepared.pop(name))
            try:
                self._try((name,), "graph", replay, wrong=False)
            except _DeviceFault:
                for other in timed[index + 1 :]:
                    self._failed(other, "graph: not tried, another provider's failed", wrong=False)
                self.emit("device_lost", True)
                return True
            del replay
            self.device.release()
        return False

    def _enter(self, job: Comparison, name: str) -> _Prepared:
        if name in COMPILED:
            # Compiled code of another case would make shapes dynamic, or stop compilation.
            torch.compiler.reset()
        device, dtype = self.device.name, DTYPES[self.dtype]
        if isinstance(job, Case):
            if self._truth is None:
                self._truth = Truth(job, device, whole=True)
            module = self._truth.module(name, 0.0)
            check = self._truth.check(name, module)
            if job.dropout:
                module = self._truth.module(name, job.dropout)
            trained = () if job.work == INFERENCE else tuple(_trained(module))
            return _Prepared(check, work(job, module, device), trained)
        if isinstance(job, BankModelCase):
            return _Prepared(*bank_model_providers.prepare(job, name, dtype, device))
        providers: Any = _PROVIDERS[type(job)]
        one = replace(job, providers=(name,))
        check = providers.checks(one, dtype, device)[name]
        return _Prepared(check, providers.functions(one, dtype, device)[name])

    def _time(self, prepared: Mapping[str, _Prepared]) -> tuple[str, ...]:
        """Time the providers in interleaved rounds; return the names of those that have times."""
        timer, rounds = self.device.timer, ROUNDS[self.device.name]
        counts = {}
        for name, entry in prepared.items():
            count = self._try((name,), "timing", partial(repeats, timer, entry.run))
            if count is not None:
                counts[name] = entry.run, count
        names = tuple(counts)
        announcing_timer = _AnnouncingTimer(
            timer, self.emit, {run: name for name, (run, _) in counts.items()}
        )
        times = (
            self._try(names, "timing", partial(times_of, announcing_timer, counts, rounds)) or {}
        )
        for name, found in times.items():
            columns = {"rounds": rounds, **percentiles(found.seconds.tolist())}
            if OURS in times:
                columns |= ratios(found.seconds.tolist(), times[OURS].seconds.tolist())
            self._note(name, **columns)
        for name, found in times.items():
            self._try((name,), "host time", partial(self._add_load, name, counts[name][0], found))
        return tuple(times)

    def _add_load(self, name: str, run: Run, found: Times) -> None:
        """Add the host's time, and the device's clock and power, to a provider's row."""
        host = self.device.host_seconds(run)
        columns = {} if host is None else {"host_ms": f"{host * 1e3:.4g}"}
        self._note(name, **columns, **self.device.load(run, found.median))

    def _replay(self, name: str, entry: _Prepared) -> None:
        graph = self.device.capture(entry.run, entry.parameters)
        if graph is None:
            return
        error = 0.0 if self._dropout() else replay_error(graph)
        if not error <= SLACK[self.dtype]:
            self._failed(name, f"wrong: a replay's results are {error:.1e} from eager ones")
            return
        timer, rounds = self.device.timer, GRAPH_ROUNDS[self.device.name]
        counts = {name: (graph.replay, repeats(timer, graph.replay))}
        found = percentiles(times_of(timer, counts, rounds)[name].seconds.tolist())
        self._note(name, graph_p50_ms=found["p50_ms"])

    def _dropout(self) -> bool:
        """Return whether two runs draw different masks."""
        return isinstance(self.job, Case) and self.job.dropout > 0


@dataclass
class _AnnouncingTimer:
    """Timer that emits which provider runs before each round, so that a hang can be attributed."""

    timer: Timer
    emit: Emit
    names: Mapping[Run, str]

    round_seconds: float = 0.0  # calls per round are known by then

    def seconds(self, run: Run, repeats: int = 1) -> float:
        self.emit("running", (self.names[run],))
        return self.timer.seconds(run, repeats)


def _peak(device: Device, run: Run) -> int | None:
    run()  # excludes one-time allocations and compilation
    return device.peak(run)


def _trained(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def one_line(error: Exception) -> str:
    """Return an error as one line, for a column of a table."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
