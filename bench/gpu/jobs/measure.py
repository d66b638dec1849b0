"""One comparison on a device: every provider checked, then timed in turns, then replayed.

What goes wrong for a provider (a wrong result, memory that does not suffice, a failure to compile
or to capture) is written in its row, and the others go on. Everything is told as soon as it is
known, and who is at work before it starts.
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
from bench.gpu.jobs.subjects import (
    CeilingsWanted,
    Comparison,
    FactsWanted,
    Job,
    KernelCheck,
    Subject,
    facts_of,
)
from bench.gpu.outcome import Outcome, Tell, nobody
from bench.providers import (
    attention as attention_ways,
)
from bench.providers import (
    bank_attention as bank_ways,
)
from bench.providers import (
    bank_models as bank_model_ways,
)
from bench.providers import (
    experts as expert_ways,
)
from bench.providers.attention import AttentionCase
from bench.providers.bank_attention import BankAttentionCase
from bench.providers.bank_models import BankModelCase
from bench.providers.experts import ExpertCase
from bench.providers.models import COMPILED, OURS

ROUNDS = {"cuda": 15, "cpu": 3}
GRAPH_ROUNDS = {"cuda": 10, "cpu": 0}


_WAYS = {
    AttentionCase: attention_ways,
    ExpertCase: expert_ways,
    BankAttentionCase: bank_ways,
}


@dataclass(frozen=True)
class _Entrant:
    check: Check
    run: Run
    parameters: tuple[torch.nn.Parameter, ...] = ()


class _Fault(Exception):
    """The device no longer computes."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self.names = names


def measure(
    subject: Subject, device: Device, dtype: str = "bfloat16", tell: Tell = nobody
) -> Outcome:
    """Check and time a subject, or do a job.

    Args:
        subject: what.
        device: where.
        dtype: of attention, experts and checks; a `Case` says its own.
        tell: is told everything as it becomes known.

    Returns:
        All that was told.
    """
    outcome = Outcome()

    def both(kind: str, value: Any) -> None:
        outcome.take(kind, value)
        tell(kind, value)

    if isinstance(subject, CeilingsWanted):
        both("ceilings", measure_ceilings(device))
    elif isinstance(subject, FactsWanted):
        both("facts", facts(gpu=device.name == "cuda"))
    elif isinstance(subject, Job):
        subject.run(device, both)
        device.release()
    else:
        _Measuring(subject, device, dtype, both)
    return outcome


class _Measuring:
    def __init__(
        self, subject: Comparison | KernelCheck, device: Device, dtype: str, tell: Tell
    ) -> None:
        self.subject, self.device, self.tell = subject, device, tell
        self.facts = facts_of(subject, dtype)
        self.dtype = self.facts["dtype"]
        self.rows: dict[str, Row] = {}
        self._truth: Truth | None = None
        spent = False
        try:
            if isinstance(subject, KernelCheck):
                self._check_kernel(subject)
            else:
                spent = self._compare(subject)
            if not spent:
                device.release()
        except _Fault as fault:
            tell("faulted", fault.names)

    def _note(self, name: str, **columns: Any) -> None:
        """Add to a provider's row, and tell it."""
        row = self.rows.setdefault(name, {**self.facts, "provider": name, "rounds": 0})
        row |= columns
        self.tell("row", dict(row))

    def _failed(self, name: str, note: str, wrong: bool = True) -> None:
        before = self.rows.get(name, {}).get("note", "")
        self._note(name, note="; ".join(filter(None, [before, note])))
        if wrong:
            self.tell("wrong", f"{self.subject}, {name}: {note}")

    def _try(
        self, names: tuple[str, ...], what: str, function: Callable[[], Any], wrong: bool = True
    ) -> Any:
        """The function's result; None, and a note in the providers' rows, if it fails.

        Raises:
            _Fault: the device no longer computes.
        """
        self.tell("doing", names)
        try:
            return function()
        except torch.OutOfMemoryError:
            note, wrong = f"{what}: out of memory", False
        # Compilers raise whatever their authors chose.
        except Exception as error:
            note = f"{what}: {one_line(error)}"
        for name in names:
            self._failed(name, note, wrong)
        if not self.device.well():
            raise _Fault(names)
        self.device.release()
        return None

    def _check_kernel(self, subject: KernelCheck) -> None:
        check = partial(check_kernel, subject.case, DTYPES[self.dtype], self.device.name)
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

    def _compare(self, subject: Comparison) -> bool:
        """Check, time, replay; whether the device was lost after the times."""
        entrants: dict[str, _Entrant] = {}
        for name in subject.providers:
            self.device.release()
            before, start = self.device.allocated(), perf_counter()
            entrant = self._try(
                (name,), "check", partial(self._enter, subject, name), name not in COMPILED
            )
            if entrant is None or not self._holds(entrant.check):
                continue
            if name in COMPILED:
                took = perf_counter() - start
                self.tell("said", f"{name}: {took:.0f} s to compile and check, not counted")
            self.device.release()
            peak = self._try((name,), "peak memory", partial(_peak, self.device, entrant.run))
            if peak is not None and isinstance(self.subject, Case):
                self._note(name, peak_mib=f"{(peak - before) / 2**20:.1f}")
            entrants[name] = entrant
        self._truth = None
        self.device.release()
        # Ours last: a capture that fails may leave its process without a device.
        timed = sorted(self._time(entrants), key=lambda name: name == OURS)
        if isinstance(subject, BankModelCase):
            return False  # a bank looks its tasks up on the host: a graph would not do it again
        return self._replay_all(timed, entrants)

    def _replay_all(self, timed: Sequence[str], entrants: dict[str, _Entrant]) -> bool:
        """Replay those that were timed; whether the device was lost."""
        for place, name in enumerate(timed):
            replay = partial(self._replay, name, entrants.pop(name))
            try:
                self._try((name,), "graph", replay, wrong=False)
            except _Fault:
                for other in timed[place + 1 :]:
                    self._failed(other, "graph: not tried, another's failed", wrong=False)
                self.tell("spent", True)
                return True
            del replay
            self.device.release()
        return False

    def _enter(self, subject: Comparison, name: str) -> _Entrant:
        if name in COMPILED:
            # Or what another case left behind would make shapes dynamic, or stop compilation.
            torch.compiler.reset()
        device, dtype = self.device.name, DTYPES[self.dtype]
        if isinstance(subject, Case):
            if self._truth is None:
                self._truth = Truth(subject, device, whole=True)
            module = self._truth.module(name, 0.0)
            check = self._truth.check(name, module)
            if subject.dropout:
                module = self._truth.module(name, subject.dropout)
            trained = () if subject.work == INFERENCE else tuple(_trained(module))
            return _Entrant(check, work(subject, module, device), trained)
        if isinstance(subject, BankModelCase):
            return _Entrant(*bank_model_ways.entrant(subject, name, dtype, device))
        ways: Any = _WAYS[type(subject)]
        one = replace(subject, providers=(name,))
        check = ways.checks(one, dtype, device)[name]
        return _Entrant(check, ways.functions(one, dtype, device)[name])

    def _time(self, entrants: Mapping[str, _Entrant]) -> tuple[str, ...]:
        """Time them in turns; the names of those that have times."""
        timer, rounds = self.device.timer, ROUNDS[self.device.name]
        counts = {}
        for name, entrant in entrants.items():
            count = self._try((name,), "timing", partial(repeats, timer, entrant.run))
            if count is not None:
                counts[name] = entrant.run, count
        names = tuple(counts)
        telling = _Telling(timer, self.tell, {run: name for name, (run, _) in counts.items()})
        times = self._try(names, "timing", partial(times_of, telling, counts, rounds)) or {}
        for name, found in times.items():
            columns = {"rounds": rounds, **percentiles(found.seconds.tolist())}
            if OURS in times:
                columns |= ratios(found.seconds.tolist(), times[OURS].seconds.tolist())
            self._note(name, **columns)
        for name, found in times.items():
            self._try((name,), "host time", partial(self._beside, name, counts[name][0], found))
        return tuple(times)

    def _beside(self, name: str, run: Run, found: Times) -> None:
        """What stands beside a time: the host's own, and the device's clock and power."""
        host = self.device.host_seconds(run)
        columns = {} if host is None else {"host_ms": f"{host * 1e3:.4g}"}
        self._note(name, **columns, **self.device.load(run, found.median))

    def _replay(self, name: str, entrant: _Entrant) -> None:
        graph = self.device.capture(entrant.run, entrant.parameters)
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
        """Whether two runs draw different masks."""
        return isinstance(self.subject, Case) and self.subject.dropout > 0


@dataclass
class _Telling:
    """A timer that tells whose round it is before it starts: a hang has a name."""

    timer: Timer
    tell: Tell
    names: Mapping[Run, str]

    round_seconds: float = 0.0  # rounds are counted by then

    def seconds(self, run: Run, repeats: int = 1) -> float:
        self.tell("doing", (self.names[run],))
        return self.timer.seconds(run, repeats)


def _peak(device: Device, run: Run) -> int | None:
    run()  # what is allocated once, and compiled, does not count
    return device.peak(run)


def _trained(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def one_line(error: Exception) -> str:
    """What went wrong, for a column of a table."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
