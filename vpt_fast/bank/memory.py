"""Tasks of a bank that are in memory, their rows, and eviction when memory is full."""

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
from vpt_fast.bank.task_modules import TaskModules

_SPARE = 16
"""Inverse of the share of spare rows that a growing pool gets."""

Kind = Literal["prompt_kv", "heads"]
_KINDS: tuple[Kind, ...] = ("prompt_kv", "heads")


@dataclass(frozen=True)
class Resident:
    """Task that is in memory; it owns its rows while there is a reference to this object.

    Attributes:
        task: Name, method and classes of the task.
        blocks: First row and number of rows of each block whose prompt keys and values are cached.
        prompt_kv: Rows of these prompts, one block after another.
        heads: Rows of the task's head.
        experts: Prompt experts or modules of the other blocks, or None.
    """

    task: BankTask
    blocks: Mapping[int, tuple[int, int]]
    prompt_kv: Extent
    heads: Extent
    experts: TaskExperts | TaskModules | None


@dataclass(frozen=True)
class State:
    """Immutable state that a call works on, whatever is added or removed meanwhile.

    Attributes:
        prompt_kv: Prompt keys and values of all tasks in memory, rows of (2, H, d).
        heads: Heads of these tasks, rows of (F,) and ().
        tasks: All tasks by name, in the order in which they were added.
        residents: Tasks in memory by name.
    """

    prompt_kv: RowPool
    heads: RowPool
    tasks: Mapping[str, BankTask]
    residents: Mapping[str, Resident]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, free rows included."""
        experts = [r.experts for r in self.residents.values() if r.experts is not None]
        return self.prompt_kv.nbytes + self.heads.nbytes + sum(e.nbytes for e in experts)

    def find(self, name: str) -> BankTask:
        """Return the task of that name.

        Raises:
            ValueError: If there is none.
        """
        if name not in self.tasks:
            known = ", ".join(itertools.islice(self.tasks, 10)) or "none"
            more = "" if len(self.tasks) <= 10 else f" and {len(self.tasks) - 10} more"
            raise ValueError(f"the bank has no task {name!r}; it has {known}{more}")
        return self.tasks[name]


class BankMemory:
    """State of a bank and its changes; not safe for concurrent use.

    Args:
        backbone: Backbone that all tasks share.
        limit: Bytes that the tasks may take, or None for no limit.
        spill: Whether tasks may be evicted from memory and read from their files again.

    Attributes:
        state: Current state; replaced by each change, never modified.
    """

    def __init__(self, backbone: Backbone, limit: int | None, spill: bool) -> None:
        self._like, self._limit, self._spill = backbone.like, limit, spill
        self._clock = itertools.count()
        self._used: dict[str, int] = {}
        attn: Any = backbone.model.blocks[0].attn
        prompt_kv = self._pool([(2, attn.num_heads, attn.head_dim)], 0)
        self.state = State(prompt_kv, self._pool([(backbone.head_width,), ()], 0), {}, {})

    def _pool(self, shapes: Sequence[tuple[int, ...]], rows: int) -> RowPool:
        return RowPool(shapes, rows, self._like.dtype, self._like.device)

    def touch(self, names: Iterable[str]) -> None:
        """Mark tasks as the most recently used."""
        for name in names:
            self._used[name] = next(self._clock)

    def forget(self, name: str) -> None:
        """Remove a task."""
        self.state = replace(
            self.state,
            tasks=_without(self.state.tasks, name),
            residents=_without(self.state.residents, name),
        )
        del self._used[name]

    def put(self, task: BankTask, tensors: TaskTensors, needed: frozenset[str]) -> None:
        """Add a task to memory.

        Args:
            task: The task.
            tensors: Its tensors, on the model's device.
            needed: Names of tasks that must not be evicted for it.

        Raises:
            ValueError: If there is no room; nothing has changed then.
        """
        self._make_room(task, needed)
        prompt_kv = self._store("prompt_kv", (tensors.prompt_kv,))
        heads = self._store("heads", (tensors.head_weight, tensors.head_bias))
        resident = Resident(task, tensors.blocks, prompt_kv, heads, tensors.experts)
        state = self.state
        self.state = replace(
            state,
            tasks=MappingProxyType({**state.tasks, task.name: task}),
            residents=MappingProxyType({**state.residents, task.name: resident}),
        )
        for kind in _KINDS:
            # Free rows count too: a fragmented pool may be over the limit.
            if self._limit is not None and self.state.nbytes > self._limit:
                self._repack(kind, 0)
        self.touch([task.name])

    def _make_room(self, task: BankTask, needed: frozenset[str]) -> None:
        """Evict the least recently used tasks until one more fits; none if it cannot fit."""
        if self._limit is None:
            return
        remaining = dict(self.state.residents)
        taken = sum(r.task.nbytes for r in remaining.values())
        idle = sorted(remaining.keys() - needed, key=self._used.__getitem__) if self._spill else []
        for name in idle:
            if taken + task.nbytes <= self._limit:
                break
            taken -= remaining.pop(name).task.nbytes
        if taken + task.nbytes > self._limit:
            raise ValueError(_does_not_fit(task, taken, self._limit, self._spill))
        self.state = replace(self.state, residents=MappingProxyType(remaining))

    def _store(self, kind: Kind, values: Sequence[torch.Tensor]) -> Extent:
        extent = self._pool_of(kind).store(values)
        if extent is None:
            self._repack(kind, len(values[0]))
            extent = self._pool_of(kind).store(values)
        return _stored(extent)

    def _pool_of(self, kind: Kind) -> RowPool:
        return self.state.prompt_kv if kind == "prompt_kv" else self.state.heads

    def _repack(self, kind: Kind, more: int) -> None:
        """Replace a pool by one without gaps that has room for `more` rows."""
        old, residents = self._pool_of(kind), self.state.residents
        extents = {
            name: resident.prompt_kv if kind == "prompt_kv" else resident.heads
            for name, resident in residents.items()
        }
        need = more + sum(extent.count for extent in extents.values())
        pool = self._pool(old.shapes, need + self._spare_rows(old, need))
        moved = {}
        for name, resident in residents.items():
            extent = _stored(pool.store(old.read(extents[name])))
            if kind == "prompt_kv":
                moved[name] = replace(resident, prompt_kv=extent)
            else:
                moved[name] = replace(resident, heads=extent)
        state = replace(self.state, residents=MappingProxyType(moved))
        if kind == "prompt_kv":
            self.state = replace(state, prompt_kv=pool)
        else:
            self.state = replace(state, heads=pool)

    def _spare_rows(self, pool: RowPool, need: int) -> int:
        """Return how many spare rows a pool of `need` rows gets, as far as the limit allows."""
        spare = need // _SPARE
        if self._limit is None:
            return spare
        others = self.state.nbytes - pool.nbytes
        return max(0, min(spare, (self._limit - others) // pool.row_nbytes - need))


def _stored(extent: Extent | None) -> Extent:
    if extent is None:
        raise RuntimeError("a pool that was allocated large enough is not")
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
