"""Which tasks of a bank are in memory, where, and which go when there is no room."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from vpt_fast.bank.read_task import Backbone, BankTask, TaskTensors
from vpt_fast.bank.row_pool import Extent, RowPool
from vpt_fast.bank.task_experts import TaskExperts

_SPARE = 16
"""A pool that grows gets 1 / `_SPARE` more rows than it needs."""

Kind = Literal["keys", "heads"]
_KINDS: tuple[Kind, ...] = ("keys", "heads")


@dataclass(frozen=True)
class Resident:
    """A task that is in memory: its rows are its own while anybody holds this.

    Attributes:
        task: what is known of it.
        blocks: those whose prompts' keys and values are at rest.
        keys: their rows, one block after another.
        heads: rows of its head.
        experts: what makes the other blocks' prompts, or None.
    """

    task: BankTask
    blocks: tuple[int, ...]
    keys: Extent
    heads: Extent
    experts: TaskExperts | None


@dataclass(frozen=True)
class State:
    """What a call works on, unchanged to its end, whatever is added or removed meanwhile.

    Attributes:
        keys: keys and values of all tasks in memory, rows of (2, H, d).
        heads: their heads, rows of (F,) and ().
        tasks: all tasks by name, in the order in which they were added.
        residents: those in memory.
    """

    keys: RowPool
    heads: RowPool
    tasks: Mapping[str, BankTask]
    residents: Mapping[str, Resident]

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory, rows that nobody owns included."""
        experts = [r.experts for r in self.residents.values() if r.experts is not None]
        return self.keys.nbytes + self.heads.nbytes + sum(e.nbytes for e in experts)

    def find(self, name: str) -> BankTask:
        """The task of that name.

        Raises:
            ValueError: there is none.
        """
        if name not in self.tasks:
            known = ", ".join(itertools.islice(self.tasks, 10)) or "none"
            more = "" if len(self.tasks) <= 10 else f" and {len(self.tasks) - 10} more"
            raise ValueError(f"the bank has no task {name!r}; it has {known}{more}")
        return self.tasks[name]


class BankMemory:
    """A bank's state, and its changes; not for several threads at once.

    Args:
        backbone: whose tasks they are.
        limit: bytes that they may take, or None.
        spill: whether tasks may be left in their files to make room.

    Attributes:
        state: as it is now; never changed, only replaced.
    """

    def __init__(self, backbone: Backbone, limit: int | None, spill: bool) -> None:
        self._like, self._limit, self._spill = backbone.like, limit, spill
        self._clock = itertools.count()
        self._used: dict[str, int] = {}
        attn: Any = backbone.model.blocks[0].attn
        keys = self._pool([(2, attn.num_heads, attn.head_dim)], 0)
        self.state = State(keys, self._pool([(backbone.head_width,), ()], 0), {}, {})

    def _pool(self, shapes: Sequence[tuple[int, ...]], rows: int) -> RowPool:
        return RowPool(shapes, rows, self._like.dtype, self._like.device)

    def use(self, names: Iterable[str]) -> None:
        """Tasks are used now."""
        for name in names:
            self._used[name] = next(self._clock)

    def forget(self, name: str) -> None:
        """Drop a task."""
        self.state = replace(
            self.state,
            tasks=_without(self.state.tasks, name),
            residents=_without(self.state.residents, name),
        )
        del self._used[name]

    def put(self, task: BankTask, tensors: TaskTensors, needed: frozenset[str]) -> None:
        """Take one more task into memory.

        Args:
            task: what is known of it.
            tensors: what is kept.
            needed: names of tasks that are not spilled for it.

        Raises:
            ValueError: there is no room; nothing has been changed then.
        """
        self._make_room(task, needed)
        keys = self._place("keys", (tensors.keys,))
        heads = self._place("heads", (tensors.head_weight, tensors.head_bias))
        resident = Resident(task, tensors.blocks, keys, heads, tensors.experts)
        state = self.state
        self.state = replace(
            state,
            tasks=MappingProxyType({**state.tasks, task.name: task}),
            residents=MappingProxyType({**state.residents, task.name: resident}),
        )
        for kind in _KINDS:
            # Rows that nobody owns count too: a pool with holes may be over the limit.
            if self._limit is not None and self.state.nbytes > self._limit:
                self._repack(kind, 0)
        self.use([task.name])

    def _make_room(self, task: BankTask, needed: frozenset[str]) -> None:
        """Spill what has to go for one more task; nothing goes if it does not fit anyway."""
        if self._limit is None:
            return
        keep = dict(self.state.residents)
        taken = sum(r.task.nbytes for r in keep.values())
        idle = sorted(keep.keys() - needed, key=self._used.__getitem__) if self._spill else []
        for name in idle:
            if taken + task.nbytes <= self._limit:
                break
            taken -= keep.pop(name).task.nbytes
        if taken + task.nbytes > self._limit:
            raise ValueError(_does_not_fit(task, taken, self._limit, self._spill))
        self.state = replace(self.state, residents=MappingProxyType(keep))

    def _place(self, kind: Kind, values: Sequence[torch.Tensor]) -> Extent:
        extent = self._of(kind).place(values)
        if extent is None:
            self._repack(kind, len(values[0]))
            extent = self._of(kind).place(values)
        return _placed(extent)

    def _of(self, kind: Kind) -> RowPool:
        return self.state.keys if kind == "keys" else self.state.heads

    def _repack(self, kind: Kind, more: int) -> None:
        """Replace a pool by one without holes that has room for `more` rows."""
        old, residents = self._of(kind), self.state.residents
        extents = {n: r.keys if kind == "keys" else r.heads for n, r in residents.items()}
        need = more + sum(extent.count for extent in extents.values())
        pool = self._pool(old.shapes, need + self._spare_rows(old, need))
        moved = {}
        for name, resident in residents.items():
            extent = _placed(pool.place(old.read(extents[name])))
            if kind == "keys":
                moved[name] = replace(resident, keys=extent)
            else:
                moved[name] = replace(resident, heads=extent)
        state = replace(self.state, residents=MappingProxyType(moved))
        self.state = replace(state, keys=pool) if kind == "keys" else replace(state, heads=pool)

    def _spare_rows(self, pool: RowPool, need: int) -> int:
        """Rows that a pool of `need` rows gets beyond them, as far as the limit allows."""
        spare = need // _SPARE
        if self._limit is None:
            return spare
        others = self.state.nbytes - pool.nbytes
        return max(0, min(spare, (self._limit - others) // pool.row_nbytes - need))


def _placed(extent: Extent | None) -> Extent:
    if extent is None:
        raise RuntimeError("a pool that was made large enough is not")
    return extent


def _without(every: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return MappingProxyType({k: v for k, v in every.items() if k != name})


def _does_not_fit(task: BankTask, taken: int, limit: int, spill: bool) -> str:
    cure = "remove a task, raise memory_limit, or use spill=True"
    if spill:
        cure = "raise memory_limit, or ask for fewer tasks in one batch"
    return (
        f"task {task.name!r} takes {task.nbytes:,} bytes, and {taken:,} of the bank's "
        f"{limit:,} are taken; {cure}"
    )
