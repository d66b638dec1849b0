"""`PromptBank`: one frozen backbone that answers for many tasks, mixed in one batch."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.bank.read_task import Backbone, BankTask, TaskTensors, read_task
from vpt_fast.bank.row_pool import Extent, RowPool
from vpt_fast.bank.shared_pass import Held, features, find_places
from vpt_fast.bank.task_experts import TaskExperts
from vpt_fast.baselines import LinearProbe
from vpt_fast.checks import check_model
from vpt_fast.models import TUNED_CLASS
from vpt_fast.ops.grouped_heads import grouped_heads

_SPARE = 16
"""A pool that grows gets 1 / `_SPARE` more rows than it needs."""

_POOLS = ("keys", "heads")
"""Names of a state's pools, and of a resident task's extents in them."""


@dataclass(frozen=True)
class _Resident:
    """A task that is in memory: its rows are its own while anybody holds this."""

    task: BankTask
    blocks: tuple[int, ...]
    keys: Extent  # of the pool of keys and values
    heads: Extent  # of the pool of heads
    experts: TaskExperts | None

    @property
    def held(self) -> Held:
        count = self.task.method.num_prompts
        return Held(self.keys.start, self.blocks, count, self.experts)


@dataclass(frozen=True)
class _State:
    """What a call works on, unchanged to its end, whatever is added or removed meanwhile."""

    keys: RowPool
    heads: RowPool
    tasks: Mapping[str, BankTask]
    residents: Mapping[str, _Resident]

    @property
    def nbytes(self) -> int:
        experts = [r.experts for r in self.residents.values() if r.experts is not None]
        return self.keys.nbytes + self.heads.nbytes + sum(e.nbytes for e in experts)


class PromptBank:
    """Adapters of one frozen backbone, kept ready to answer for images of any of them.

    What a task's prompts are in attention, keys and values that do not depend on the image, is
    computed once, when it is added; for VAPT (arXiv 2501.18936) that is block 0, and the experts of
    the later blocks are computed in the call, each image with the weights of its own task. All
    keys and values lie in one buffer, where an image finds its own by their place, and all heads in
    another. An image's logits do not depend on the other images and tasks of the batch.

    A bank may be called, and added to, from several threads at once.

    Args:
        model: a plain timm VisionTransformer (or the distilled one); frozen and put into eval mode.
            Its own head is not used. Move it to its device and dtype before.
        memory_limit: bytes of the device's memory that the tasks may take, heads included, the
            backbone and a call's activations not; None for no limit. Buffers are replaced when they
            grow, and take twice their size while their rows are copied.
        spill: where a task does not fit any more, leave the least recently used ones in their
            files, and read them again when they are asked for. Their adapters must stay where they
            are and as they are.

    Raises:
        TypeError: `model` is of another class, or an argument of a wrong type.
        ValueError: `model` is tuned, or something in it cannot be honoured.
    """

    def __init__(
        self, model: nn.Module, memory_limit: int | None = None, spill: bool = False
    ) -> None:
        _check_arguments(model, memory_limit, spill)
        self._model: Any = model.eval().requires_grad_(False)
        self._backbone = Backbone(self._model)
        self._limit, self._spill = memory_limit, spill
        self._lock = threading.RLock()  # of changes; calls take it for a moment
        self._clock = itertools.count()
        self._used: dict[str, int] = {}
        attn: Any = self._backbone.model.blocks[0].attn
        self._key_shapes = [(2, attn.num_heads, attn.head_dim)]
        self._head_shapes: list[tuple[int, ...]] = [(self._backbone.head_width,), ()]
        self._state = _State(
            self._pool(self._key_shapes, 0), self._pool(self._head_shapes, 0), {}, {}
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were added."""
        return tuple(self._state.tasks)

    @property
    def resident_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are in memory: all of them without `spill`."""
        state = self._state
        return tuple(name for name in state.tasks if name in state.residents)

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that the tasks take, heads included."""
        return self._state.nbytes

    def task(self, name: str) -> BankTask:
        """What is known of a task.

        Raises:
            ValueError: there is no such task.
        """
        return _find(self._state, name)

    def add(self, name: str, directory: str | os.PathLike[str]) -> BankTask:
        """Add the task of an adapter; calls under way go on without it.

        Args:
            name: not yet in use.
            directory: what `save_adapter` wrote, for this backbone; tuned with `VPTDeep` in all or
                the last blocks, `VAPT` or `LinearProbe`.

        Returns:
            What is known of the task.

        Raises:
            FileNotFoundError: there is no adapter.
            TypeError: `name` is no string.
            ValueError: the name is empty or in use; the adapter is damaged, has values that are not
                finite, is of another backbone or of a method that no bank holds; or it does not fit
                into `memory_limit`. The bank is as it was then.
        """
        if not isinstance(name, str):
            raise TypeError(f"a task's name must be a string, got {name!r}")
        if not name:
            raise ValueError("a task's name must not be empty")
        self._check_new(name)
        task, tensors = read_task(self._backbone, name, Path(directory))
        with self._lock:
            self._check_new(name)
            self._put(task, tensors, frozenset())
            self._used[name] = next(self._clock)
        return task

    def _check_new(self, name: str) -> None:
        if name in self._state.tasks:
            raise ValueError(f"the bank has a task {name!r} already; remove it first")

    def remove(self, name: str) -> None:
        """Forget a task; its memory is free as soon as the calls under way have ended.

        Raises:
            ValueError: there is no such task.
        """
        with self._lock:
            _find(self._state, name)
            state = self._state
            self._state = replace(
                state,
                tasks=_without(state.tasks, {name}),
                residents=_without(state.residents, {name}),
            )
            del self._used[name]

    @torch.no_grad()
    def __call__(self, images: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        """Logits of images, each for a task of its own.

        Args:
            images: (B, channels, height, width), on the model's device, prepared as each image's
                task says in `inputs`.
            tasks: B names, any mix in any order.

        Returns:
            For every image its task's logits (num_classes,); views of one tensor.

        Raises:
            TypeError: `tasks` is one string.
            ValueError: an unknown task, another number of names than images, an image size that a
                task's experts were not made for, or tasks that do not fit into memory together.
        """
        if isinstance(tasks, str):
            raise TypeError(f"tasks must name one task per image, got the string {tasks!r}")
        if images.ndim != 4 or len(images) != len(tasks):
            raise ValueError(
                f"images {tuple(images.shape)} and {len(tasks)} tasks do not fit: images must be "
                "(B, channels, height, width), with B names"
            )
        if self._model.training:
            raise ValueError("the bank's model is in training mode; call model.eval()")
        if not len(images):
            return []
        state = self._holding(tasks)
        residents = [state.residents[name] for name in tasks]
        self._check_grid(images, residents)
        (rest,) = state.keys.tensors
        places = find_places([r.held for r in residents], self._backbone.depth, rest)
        pooled = features(self._model, images, places)
        return _logits(pooled, state.heads, [r.heads for r in residents])

    def _holding(self, names: Sequence[str]) -> _State:
        """A state in which all these tasks are in memory."""
        with self._lock:
            wanted = dict.fromkeys(names)
            for name in wanted:
                _find(self._state, name)
                self._used[name] = next(self._clock)
            for name in wanted:
                if name in self._state.residents:
                    continue
                known = self._state.tasks[name]
                task, tensors = read_task(self._backbone, name, known.directory)
                if task.digest != known.digest:
                    raise ValueError(
                        f"the adapter of task {name!r} in {known.directory} has changed since it "
                        "was added; remove the task and add it again"
                    )
                self._put(task, tensors, frozenset(wanted))
            return self._state

    def _check_grid(self, images: Tensor, residents: Sequence[_Resident]) -> None:
        grids = {r.experts.grid: r.task.name for r in residents if r.experts is not None}
        if not grids:
            return
        height, width = images.shape[-2:]
        grid = tuple(self._model.patch_embed.dynamic_feat_size((height, width)))
        for wanted, name in grids.items():
            if grid != wanted:
                raise ValueError(
                    f"the experts of task {name!r} mix a {wanted[0]} x {wanted[1]} grid of patches,"
                    f" but these images of {height} x {width} pixels have {grid[0]} x {grid[1]}; "
                    "resize them to the size that the task was tuned with"
                )

    # --- memory ------------------------------------------------------------------------------

    def _pool(self, shapes: Sequence[tuple[int, ...]], rows: int) -> RowPool:
        like = self._backbone.like
        return RowPool(shapes, rows, like.dtype, like.device)

    def _make_room(self, task: BankTask, needed: frozenset[str]) -> None:
        """Spill what has to go for one more task; nothing goes if it does not fit anyway."""
        if self._limit is None:
            return
        keep = dict(self._state.residents)
        taken = sum(r.task.nbytes for r in keep.values())
        idle = sorted(keep.keys() - needed, key=self._used.__getitem__) if self._spill else []
        for name in idle:
            if taken + task.nbytes <= self._limit:
                break
            taken -= keep.pop(name).task.nbytes
        if taken + task.nbytes > self._limit:
            raise ValueError(_does_not_fit(task, taken, self._limit, self._spill))
        self._state = replace(self._state, residents=MappingProxyType(keep))

    def _put(self, task: BankTask, tensors: TaskTensors, needed: frozenset[str]) -> None:
        """Take one more task into memory; `needed` ones are not spilled for it."""
        self._make_room(task, needed)
        extents: dict[str, Any] = {}
        for kind, rows in zip(_POOLS, (tensors[1:2], tensors[2:4]), strict=True):
            pool: RowPool = getattr(self._state, kind)
            extent = pool.place(rows)
            if extent is None:
                self._repack(kind, len(rows[0]))
                extent = getattr(self._state, kind).place(rows)
            if extent is None:
                raise RuntimeError("a pool that was made large enough is not")
            extents[kind] = extent
        state = self._state
        resident = _Resident(task, tensors.blocks, experts=tensors.experts, **extents)
        self._state = replace(
            state,
            tasks=MappingProxyType({**state.tasks, task.name: task}),
            residents=MappingProxyType({**state.residents, task.name: resident}),
        )
        for kind in _POOLS:
            # Rows that were removed still count: a pool with holes may be over the limit.
            if self._limit is not None and self._state.nbytes > self._limit:
                self._repack(kind, 0)

    def _repack(self, kind: str, more: int) -> None:
        """Replace a pool by one without holes that has room for `more` rows."""
        state = self._state
        old: RowPool = getattr(state, kind)
        need = more + sum(getattr(r, kind).count for r in state.residents.values())
        pool = self._pool(old.shapes, need + self._spare_rows(old, need))
        moved = {}
        for name, resident in state.residents.items():
            extent = pool.place(old.read(getattr(resident, kind)))
            if extent is None:
                raise RuntimeError("a pool that was made large enough is not")
            change: dict[str, Any] = {kind: extent}
            moved[name] = replace(resident, **change)
        changes: dict[str, Any] = {kind: pool, "residents": MappingProxyType(moved)}
        self._state = replace(state, **changes)

    def _spare_rows(self, pool: RowPool, need: int) -> int:
        """Rows that a pool of `need` rows gets beyond them, as far as the limit allows."""
        spare = need // _SPARE
        if self._limit is None:
            return spare
        row = sum(t[:1].nbytes for t in self._pool(pool.shapes, 1).tensors)
        others = self._state.nbytes - pool.nbytes
        return max(0, min(spare, (self._limit - others) // row - need))


def _check_arguments(model: Any, memory_limit: int | None, spill: bool) -> None:
    check_model(model, LinearProbe())
    if type(model) not in TUNED_CLASS:
        raise TypeError(
            f"a bank cannot hold tasks of a {type(model).__name__}: the prompts of its stages "
            "differ in width and stand in windows; use a timm VisionTransformer"
        )
    if not model.global_pool:
        raise ValueError(
            "global_pool is '', so that a head gives logits for every token; use a model that pools"
        )
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, (int, type(None))):
        raise TypeError(f"memory_limit must be a number of bytes or None, got {memory_limit!r}")
    if memory_limit is not None and memory_limit < 1:
        raise ValueError(f"memory_limit must be at least 1 byte, got {memory_limit}")
    if not isinstance(spill, bool):
        raise TypeError(f"spill must be True or False, got {spill!r}")
    if spill and memory_limit is None:
        raise ValueError("spill=True needs a memory_limit, beyond which tasks are spilled")


def _find(state: _State, name: str) -> BankTask:
    if name not in state.tasks:
        known = ", ".join(itertools.islice(state.tasks, 10)) or "none"
        more = "" if len(state.tasks) <= 10 else f" and {len(state.tasks) - 10} more"
        raise ValueError(f"the bank has no task {name!r}; it has {known}{more}")
    return state.tasks[name]


def _without(every: Mapping[str, Any], names: set[str]) -> Mapping[str, Any]:
    return MappingProxyType({k: v for k, v in every.items() if k not in names})


def _does_not_fit(task: BankTask, taken: int, limit: int, spill: bool) -> str:
    cure = (
        "raise memory_limit, or ask for fewer tasks in one batch"
        if spill
        else ("remove a task, raise memory_limit, or use spill=True")
    )
    return (
        f"task {task.name!r} takes {task.nbytes:,} bytes, and {taken:,} of the bank's "
        f"{limit:,} are taken; {cure}"
    )


def _logits(pooled: Tensor, heads: RowPool, extents: Sequence[Extent]) -> list[Tensor]:
    """Every image's logits from its features, one grouped product with its task's head."""
    weight, bias = heads.tensors
    counts = [extent.count for extent in extents]
    ends = list(itertools.accumulate(counts))
    at = [[extent.start for extent in extents], counts, [0, *ends[:-1]]]
    starts, sizes, offsets = torch.tensor(at, device=pooled.device)
    weight, bias = weight.to(pooled.dtype), bias.to(pooled.dtype)
    flat = grouped_heads(pooled, weight, bias, starts, sizes, offsets, ends[-1], max(counts))
    return list(flat.split(counts))
