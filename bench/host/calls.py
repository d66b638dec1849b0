"""Python calls per block of a step, counted: the part of the host's time that does not vary.

Counts are those of a model with more blocks minus those of one with fewer, forward and backward,
after the caches are full. Calls of Python functions (a generator counts each time that it resumes)
and of builtins are separate: an operator of PyTorch's is a builtin where it is called as a method
or function, and is not counted where it is written as `+`.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from bench.host.cases import INFERENCE, WARMUP, HostCase, Work, one_thread
from bench.host.null_driver import null_driver
from bench.providers.models import OURS, WITHOUT

DEPTHS = {"swin": (8, 10)}
"""Blocks of the two models; Swin's blocks come in pairs, with regular and shifted windows."""
DEFAULT_DEPTHS = (4, 5)

METHODS = {
    "vpt-deep": HostCase("vit", OURS),
    "vpt-deep, balanced": HostCase("vit", OURS, memory="balanced"),
    "vapt": HostCase("vit", OURS, "vapt"),
    "swin vpt-deep": HostCase("swin", OURS),
    "inference": HostCase("vit", OURS, work=INFERENCE),
    "no prompts": HostCase("vit", WITHOUT),
    "concatenation": HostCase("vit", "concat"),
}
"""Cases to count, by name; the last two are timm's blocks, for comparison."""


class Calls(NamedTuple):
    """Calls of Python functions and of builtins."""

    python: float
    builtin: float


def counted(function: Callable[[], Any]) -> tuple[Any, Calls]:
    """Return what a function returns, and the calls inside it.

    Raises:
        RuntimeError: If a profiler is already set on this thread.
    """
    if sys.getprofile() is not None:
        raise RuntimeError("a profiler is set already; count calls without one")
    events = {"call": 0, "c_call": 0}

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event in events:
            events[event] += 1

    gc.disable()
    sys.setprofile(count)
    try:
        result = function()
    finally:
        sys.setprofile(None)
        gc.enable()
    # Excludes the builtin that ends the count.
    return result, Calls(events["call"], events["c_call"] - 1)


def calls_of_step(work: Work) -> dict[str, Calls]:
    """Return the calls of one forward and one backward pass (inference: forward only).

    Raises:
        RuntimeError: If the backward pass ran in another thread, where calls are not counted.
    """
    for _ in range(WARMUP):
        work()
    loss, forward = counted(work.forward)
    if work.infers:
        return {"forward": forward}
    threads: set[int] = set()
    loss.register_hook(lambda gradient: threads.add(threading.get_ident()))
    _, backward = counted(loss.backward)
    if threads != {threading.get_ident()}:
        raise RuntimeError("the backward pass ran in a thread of its own; its calls are not seen")
    return {"forward": forward, "backward": backward}


def calls_per_block(case: HostCase) -> dict[str, Calls]:
    """Return the calls per block, by part; call it inside `null_driver()`."""
    few, more = DEPTHS.get(case.model, DEFAULT_DEPTHS)
    less, all_calls = calls_of_step(Work(case, few)), calls_of_step(Work(case, more))
    return {
        part: Calls(*((a - b) / (more - few) for a, b in zip(calls, less[part], strict=True)))
        for part, calls in all_calls.items()
    }


def count_methods() -> dict[str, dict[str, Calls]]:
    """Return the calls per block by method and part."""
    with one_thread(), null_driver():
        return {name: calls_per_block(case) for name, case in METHODS.items()}


def show(found: dict[str, dict[str, Calls]]) -> None:
    """Print a line per method and part."""
    print(f"{'calls per block, counted':34}{'Python':>10}{'builtin':>10}")
    for name, parts in found.items():
        for part, calls in parts.items():
            print(f"{name + ', ' + part:34}{calls.python:10g}{calls.builtin:10g}")
