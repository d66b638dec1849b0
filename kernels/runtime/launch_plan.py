"""Launches that are worked out once for tensors of one layout, and repeated for others of it.

What a launch needs besides addresses (tiles, grid, strides, the compiled kernel) depends on shapes,
strides, dtypes, scalars and the device only. A `Launcher` stands for one operator and one such
layout: its first call builds the launches, later ones put addresses into them. No tensor is held.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from .launch import Launch, run

_MOST_LAYOUTS = 2048
"""Layouts that are remembered by `launcher`, of all operators together."""

_MOST_ALIGNMENTS = 16
"""Plans for tensors whose addresses are not all multiples of 16, per layout."""

Tensors = Sequence[Tensor | None]

_runtime = triton.knobs.runtime
_enter, _exit = _runtime.launch_enter_hook, _runtime.launch_exit_hook
# The lists that Triton's own chains of hooks add to; a profiler may be in them, or instead of one.
_hooks = [() if hook is None else getattr(hook, "calls", (hook,)) for hook in (_enter, _exit)]


def _is_hooked() -> bool:
    """Whether somebody wants to be told of Triton's launches."""
    if _runtime.launch_enter_hook is not _enter or _runtime.launch_exit_hook is not _exit:
        return True
    return bool(_hooks[0] or _hooks[1])


class _Step(NamedTuple):
    """One compiled launch.

    Attributes:
        call: what a compiled kernel launches with.
        grid: its programs.
        handles: function and metadata, as `call` takes them.
        addresses: those of its pointers, which are its first arguments, from those of the tensors.
        others: the arguments after them.
        runner: the same launch with Triton's hooks called.
    """

    call: Any
    grid: tuple[int, int, int]
    handles: tuple[Any, Any]
    addresses: Callable[[list[int]], Sequence[int]]
    others: list[Any]
    runner: Any


class _Plan(NamedTuple):
    """The launches of one operator with everything but addresses.

    Attributes:
        steps: in order.
        device: index of the GPU; None where there is none.
        current_device, current_stream: of the driver.
    """

    steps: list[_Step]
    device: int | None
    current_device: Callable[[], int]
    current_stream: Callable[[int], int]


class Launcher:
    """Makes the launches of one operator for tensors of one layout.

    That shapes, strides, dtypes, device and scalars are always the same is its holder's promise.
    Alignment of the tensors' addresses, which the compiled kernels depend on too, is looked at
    here: every combination has a plan of its own. Where a launch's pointers cannot be told from
    the tensors (two of them share memory) it is built anew each time.
    """

    __slots__ = ("_aligned", "_others")

    def __init__(self) -> None:
        self._aligned: _Plan | None = None
        self._others: dict[tuple[int, ...], _Plan] = {}

    @property
    def is_new(self) -> bool:
        """Whether it has planned nothing yet, so that what it is given should be checked."""
        return self._aligned is None and not self._others

    def __call__(self, tensors: Tensors, build: Callable[..., Any], *others: Any) -> None:
        """Launch on the tensors' device and its current stream.

        Args:
            tensors: everything that the launches read or write.
            build: called as build(*tensors, *others) if there is no plan yet; returns the launches
                in order, or the one that there is.
            others: what `build` gets besides.
        """
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        if not bits & 15:
            plan = self._aligned
            if plan is None:
                self._aligned = _run_and_plan(build(*tensors, *others), tensors)
                return
        else:
            alignments = tuple([pointer & 15 for pointer in pointers])
            plan = self._others.get(alignments)
            if plan is None:
                plan = _run_and_plan(build(*tensors, *others), tensors)
                if plan is not None and len(self._others) < _MOST_ALIGNMENTS:
                    self._others[alignments] = plan
                return
        steps, device, current_device, current_stream = plan
        if device is None:
            stream = current_stream(0)
        elif current_device() == device:
            stream = current_stream(device)
        else:
            with torch.cuda.device(device):
                self(tensors, build, *others)
            return
        if _is_hooked():
            for step in steps:
                step.runner(*step.addresses(pointers), *step.others, stream=stream)
            return
        for call, (x, y, z), (function, metadata), addresses, values, _ in steps:
            found = addresses(pointers)
            call(x, y, z, stream, function, metadata, None, None, None, *found, *values)


@functools.lru_cache(maxsize=_MOST_LAYOUTS)
def launcher(*layout: Hashable) -> Launcher:
    """The launcher of an operator's layout: its name, scalars, and `layout_of` its tensors."""
    return Launcher()


def layout_of(tensor: Tensor | None) -> Hashable:
    """What a tensor adds to the key of a launch plan."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def contiguous(*tensors: Any) -> Any:
    """The tensors, those that are not contiguous copied; None stays None."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def _run_and_plan(built: Launch | Sequence[Launch], tensors: Tensors) -> _Plan | None:
    """Launch, and return what repeats it; None where that cannot be."""
    launches = [built] if isinstance(built, Launch) else built
    device = next(t.device for t in tensors if t is not None)
    steps: list[_Step] | None = []
    for launch, compiled in run(launches, device):
        places = _places(launch, tensors) if isinstance(compiled, CompiledKernel) else None
        if places is None:
            steps = None
        elif steps is not None:
            values = {**launch.arguments, **launch.constexprs}
            others = [values[name] for name in launch.kernel.arg_names[len(places) :]]
            handles = compiled.function, compiled.packed_metadata
            runner = compiled[launch.grid]
            found = _addresses(places)
            steps.append(_Step(compiled.run, launch.grid, handles, found, others, runner))
    if steps is None:
        return None
    driver = triton.runtime.driver.active
    index = device.index if device.type == "cuda" else None
    return _Plan(steps, index, driver.get_current_device, driver.get_current_stream)


def _addresses(places: list[tuple[int, int]]) -> Callable[[list[int]], Sequence[int]]:
    """Of pointers at `places`, as a function of the tensors' addresses."""
    if len(places) > 1 and not any(offset for _, offset in places):
        found: Any = operator.itemgetter(*(index for index, _ in places))
        return found
    return lambda pointers: [pointers[index] + offset for index, offset in places]


def _places(launch: Launch, tensors: Tensors) -> list[tuple[int, int]] | None:
    """Tensor and byte offset of each of the launch's pointers, which are its first arguments.

    None where a pointer belongs to none of the tensors, or to several.
    """
    places = []
    for name in launch.kernel.arg_names:
        if not name.endswith("_ptr"):
            break
        value = launch.arguments[name]
        if value is None:  # compiled away, whatever is passed
            places.append((0, 0))
            continue
        found = [(i, t) for i, t in enumerate(tensors) if t is not None and _holds(t, value)]
        found = [(i, t) for i, t in found if t is value] or found
        if len(found) != 1:
            return None
        index, source = found[0]
        places.append((index, value.data_ptr() - source.data_ptr()))
    return places


def _holds(tensor: Tensor, part: Tensor) -> bool:
    """Whether `part` starts in the memory of `tensor`."""
    storage = tensor.untyped_storage()
    return (
        storage.data_ptr() == part.untyped_storage().data_ptr()
        and tensor.data_ptr() <= part.data_ptr() < storage.data_ptr() + storage.nbytes()
    )
