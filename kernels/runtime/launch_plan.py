"""Launch plans: launches that are built once for a layout of tensors, and repeated.

What a launch needs besides addresses (tiles, grid, strides, compiled kernel) depends on shapes,
strides, dtypes, scalars and the device only. A `Launcher` belongs to one operator and one such
layout: its first call builds the launches, later calls only replace addresses. It holds no tensor.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from .launch import Launch, run

_MOST_LAYOUTS = 2048
"""Most layouts that `launcher` caches, of all operators together."""

_MOST_ALIGNMENTS = 16
"""Most plans per layout for tensors whose addresses are not all multiples of 16."""

_compiling = threading.RLock()
"""Held where Triton may compile: CPython 3.11's parser can fail in two threads at once (gh-106905).
"""

Tensors = Sequence[Tensor | None]

_runtime = triton.knobs.runtime
_enter, _exit = _runtime.launch_enter_hook, _runtime.launch_exit_hook
# The lists of Triton's chains of hooks. A profiler adds itself to them, or replaces a chain.
_hooks = [() if hook is None else getattr(hook, "calls", (hook,)) for hook in (_enter, _exit)]


def _is_hooked() -> bool:
    """Return whether Triton's launches have hooks."""
    if _runtime.launch_enter_hook is not _enter or _runtime.launch_exit_hook is not _exit:
        return True
    return bool(_hooks[0] or _hooks[1])


class _Step(NamedTuple):
    """One compiled launch.

    Attributes:
        call: Launch function of the compiled kernel.
        grid: Programs along the three axes.
        handles: Function and metadata, as `call` takes them.
        addresses: Function from the tensors' addresses to those of the pointer arguments.
        others: Arguments after the pointers.
        runner: Launch function that calls Triton's hooks.
    """

    call: Any
    grid: tuple[int, int, int]
    handles: tuple[Any, Any]
    addresses: Callable[[list[int]], Sequence[int]]
    others: list[Any]
    runner: Any


class _Plan(NamedTuple):
    """The launches of one operator without addresses.

    Attributes:
        steps: Launches in order.
        device: Index of the GPU; None on the CPU.
        current_device, current_stream: Functions of the driver.
    """

    steps: list[_Step]
    device: int | None
    current_device: Callable[[], int]
    current_stream: Callable[[int], int]


class Launcher:
    """Launcher of one operator for tensors of one layout.

    The caller guarantees that shapes, strides, dtypes, device and scalars are always the same. The
    alignment of the tensors' addresses, on which compiled kernels depend too, is checked here:
    every combination has its own plan. Where pointers cannot be assigned to tensors, because two of
    them share memory, launches are built in every call.
    """

    __slots__ = ("_aligned", "_others")

    def __init__(self) -> None:
        self._aligned: _Plan | None = None
        self._others: dict[tuple[int, ...], _Plan] = {}

    @property
    def is_new(self) -> bool:
        """Whether it has no plan yet, so that the arguments should be checked."""
        return self._aligned is None and not self._others

    def __call__(self, tensors: Tensors, build: Callable[..., Any], *others: Any) -> None:
        """Launch on the tensors' device and its current stream.

        Args:
            tensors: All tensors that the launches read or write.
            build: Called as build(*tensors, *others) where there is no plan yet; returns one
                launch, or several in order.
            others: Further arguments of `build`.
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
    """Return the launcher of an operator's name, scalars, and `layout_of` its tensors."""
    return Launcher()


def layout_of(tensor: Tensor | None) -> Hashable:
    """Return the part of a launcher's key that is due to a tensor."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def contiguous(*tensors: Any) -> Any:
    """Return the tensors, contiguous; None stays None."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def _run_and_plan(built: Launch | Sequence[Launch], tensors: Tensors) -> _Plan | None:
    """Run launches, and return the plan that repeats them; None where there can be none."""
    launches = [built] if isinstance(built, Launch) else built
    device = next(t.device for t in tensors if t is not None)
    steps: list[_Step] | None = []
    with _compiling:
        ran = run(launches, device)
    for launch, compiled in ran:
        sources = _sources(launch, tensors) if isinstance(compiled, CompiledKernel) else None
        if sources is None:
            steps = None
        elif steps is not None:
            values = {**launch.arguments, **launch.constexprs}
            others = [values[name] for name in launch.kernel.arg_names[len(sources) :]]
            handles = compiled.function, compiled.packed_metadata
            runner = compiled[launch.grid]
            found = _addresses(sources)
            steps.append(_Step(compiled.run, launch.grid, handles, found, others, runner))
    if steps is None:
        return None
    driver = triton.runtime.driver.active
    index = device.index if device.type == "cuda" else None
    return _Plan(steps, index, driver.get_current_device, driver.get_current_stream)


def _addresses(sources: list[tuple[int, int]]) -> Callable[[list[int]], Sequence[int]]:
    """Return the function from the tensors' addresses to those of pointers at `sources`."""
    if len(sources) > 1 and not any(offset for _, offset in sources):
        found: Any = operator.itemgetter(*(index for index, _ in sources))
        return found
    return lambda pointers: [pointers[index] + offset for index, offset in sources]


def _sources(launch: Launch, tensors: Tensors) -> list[tuple[int, int]] | None:
    """Return index of the tensor, and byte offset in it, of each pointer of the launch.

    Pointers are the first arguments. None where a pointer belongs to no tensor, or to several.
    """
    sources = []
    for name in launch.kernel.arg_names:
        if not name.endswith("_ptr"):
            break
        value = launch.arguments[name]
        if value is None:  # not used by the compiled kernel
            sources.append((0, 0))
            continue
        found = [(i, t) for i, t in enumerate(tensors) if t is not None and _holds(t, value)]
        found = [(i, t) for i, t in found if t is value] or found
        if len(found) != 1:
            return None
        index, source = found[0]
        sources.append((index, value.data_ptr() - source.data_ptr()))
    return sources


def _holds(tensor: Tensor, part: Tensor) -> bool:
    """Return whether `part` starts in the memory of `tensor`."""
    storage = tensor.untyped_storage()
    return (
        storage.data_ptr() == part.untyped_storage().data_ptr()
        and tensor.data_ptr() <= part.data_ptr() < storage.data_ptr() + storage.nbytes()
    )
