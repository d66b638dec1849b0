"""One comparison on a device: every provider checked, then timed in turns, then replayed.

What goes wrong for a provider (a wrong result, memory that does not suffice, a failure to compile
or to capture) is written in its row, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from bench import attention_ways, bank_model_ways, bank_ways, expert_ways
from bench.attention_ways import AttentionCase
from bench.bank_model_ways import BankModelCase
from bench.bank_ways import BankAttentionCase
from bench.cases import DTYPES, INFERENCE, Case
from bench.ceilings import Ceilings, measure_ceilings
from bench.collect import FIELDS, Row, percentiles, ratios
from bench.correctness import SLACK, Check, Truth
from bench.device_timer import Run, repeats, times_of
from bench.expert_ways import ExpertCase
from bench.gpu_checks import KernelCase, check_kernel
from bench.gpu_device import Device, replay_error
from bench.providers import COMPILED, OURS
from bench.turns import work

ROUNDS = {"cuda": 15, "cpu": 3}
GRAPH_ROUNDS = {"cuda": 10, "cpu": 0}


@dataclass(frozen=True)
class KernelCheck:
    """An operator that is checked, and not timed."""

    case: KernelCase

    def __str__(self) -> str:
        case, heads = self.case, ""
        if isinstance(case, AttentionCase | BankAttentionCase):
            heads = f"-heads {case.heads}x{case.head_dim}"
        return f"check {case}{heads}"


@dataclass(frozen=True)
class CeilingsWanted:
    """The device's own ceilings."""

    def __str__(self) -> str:
        return "ceilings: one large product, one large copy"


Comparison = Case | AttentionCase | ExpertCase | BankAttentionCase | BankModelCase
Subject = Comparison | KernelCheck | CeilingsWanted


_WAYS = {
    AttentionCase: attention_ways,
    ExpertCase: expert_ways,
    BankAttentionCase: bank_ways,
}


@dataclass
class Outcome:
    """What a subject gave.

    Attributes:
        rows: of the results.
        wrong: results that are wrong, and steps that failed, in words. Too little memory, and what
            torch.compile or a capture could not do, are only noted in the row.
        said: what else there is to print.
        ceilings: if they were asked for.
        faulted: providers one of which left the device so that it no longer computes; what came
            after them has no times.
        spent: whether the device no longer computes, though all that could be timed was.
    """

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    ceilings: Ceilings | None = None
    faulted: tuple[str, ...] = ()
    spent: bool = False


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


def measure(subject: Subject, device: Device, dtype: str = "bfloat16") -> Outcome:
    """Check and time a subject.

    Args:
        subject: what.
        device: where.
        dtype: of attention, experts and checks; a `Case` says its own.
    """
    if isinstance(subject, CeilingsWanted):
        return Outcome(ceilings=measure_ceilings(device))
    return _Measuring(subject, device, dtype).outcome


def facts_of(subject: Subject, dtype: str) -> Row:
    """The columns that say what a row is about."""
    row = {"kind": "measured", "dtype": dtype}
    if isinstance(subject, KernelCheck):
        return {**row, "bench": "check", "model": str(subject)}
    if isinstance(subject, Case):
        row |= {"bench": subject.work}
    elif isinstance(subject, AttentionCase):
        row |= {"bench": "attention"}
    elif isinstance(subject, ExpertCase):
        row |= {"bench": "experts", "method": "vapt"}
    elif isinstance(subject, BankAttentionCase):
        row |= {"bench": "attention of many tasks"}
    elif isinstance(subject, BankModelCase):
        row |= {"bench": "inference of many tasks"}
    row |= {name: value for name, value in vars(subject).items() if name in FIELDS}
    return row


class _Measuring:
    def __init__(self, subject: Comparison | KernelCheck, device: Device, dtype: str) -> None:
        self.subject, self.device = subject, device
        self.facts = facts_of(subject, dtype)
        self.dtype = self.facts["dtype"]
        self.rows: dict[str, Row] = {}
        self.outcome = Outcome()
        self._truth: Truth | None = None
        try:
            if isinstance(subject, KernelCheck):
                self._check_kernel(subject)
            else:
                self._compare(subject)
            if not self.outcome.spent:
                device.release()
        except _Fault as fault:
            self.outcome.faulted = fault.names
        self.outcome.rows = list(self.rows.values())

    def _row(self, name: str) -> Row:
        return self.rows.setdefault(name, {**self.facts, "provider": name, "rounds": 0})

    def _failed(self, name: str, note: str, wrong: bool = True) -> None:
        row = self._row(name)
        row["note"] = "; ".join(filter(None, [row.get("note", ""), note]))
        if wrong:
            self.outcome.wrong.append(f"{self.subject}, {name}: {note}")

    def _try(
        self, names: tuple[str, ...], what: str, function: Callable[[], Any], wrong: bool = True
    ) -> Any:
        """The function's result; None, and a note in the providers' rows, if it fails.

        Raises:
            _Fault: the device no longer computes.
        """
        try:
            return function()
        except torch.OutOfMemoryError:
            note, wrong = f"{what}: out of memory", False
        # Compilers raise whatever their authors chose.
        except Exception as error:
            note = f"{what}: {_one_line(error)}"
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
        self._row(check.provider)["error"] = f"{check.error:.2g}"
        if not check.holds:
            self._failed(
                check.provider,
                f"wrong: {check.worst} is {check.error:.1e} from fp64, limit {check.limit:.1e}",
            )
        return check.holds

    def _compare(self, subject: Comparison) -> None:
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
                self.outcome.said.append(f"{name}: {took:.0f} s to compile and check, not counted")
            self.device.release()
            peak = self._try((name,), "peak memory", partial(_peak, self.device, entrant.run))
            if peak is not None and isinstance(self.subject, Case):
                self._row(name)["peak_mib"] = f"{(peak - before) / 2**20:.1f}"
            entrants[name] = entrant
        self._truth = None
        self.device.release()
        # Ours last: a capture that fails may leave its process without a device.
        timed = sorted(self._time(entrants), key=lambda name: name == OURS)
        if isinstance(subject, BankModelCase):
            return  # a bank looks its tasks up on the host, which a graph would not do again
        for place, name in enumerate(timed):
            replay = partial(self._replay, name, entrants.pop(name))
            try:
                self._try((name,), "graph", replay, wrong=False)
            except _Fault:
                self.outcome.spent = True
                for other in timed[place + 1 :]:
                    self._failed(other, "graph: not tried, another's failed", wrong=False)
                return
            del replay
            self.device.release()

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
        times = self._try(names, "timing", partial(times_of, timer, counts, rounds)) or {}
        for name, found in times.items():
            row = self._row(name)
            row |= {"rounds": rounds, **percentiles(found.seconds.tolist())}
            if OURS in times:
                row |= ratios(found.seconds.tolist(), times[OURS].seconds.tolist())
        return tuple(times)

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
        self._row(name)["graph_p50_ms"] = found["p50_ms"]

    def _dropout(self) -> bool:
        """Whether two runs draw different masks."""
        return isinstance(self.subject, Case) and self.subject.dropout > 0


def _peak(device: Device, run: Run) -> int | None:
    run()  # what is allocated once, and compiled, does not count
    return device.peak(run)


def _trained(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
