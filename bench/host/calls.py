"""Python calls per block of a step, counted: the part of the host's time that does not vary.

A step of a model with more blocks less one with fewer, forward and backward, after the caches are
filled. Functions of Python (generators count each time that they go on) and builtins apart: an
operator of PyTorch's is a builtin where its method or function is called, and nothing where it is
written as `+`.
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
"""Blocks of the two models; Swin's blocks come in pairs, whole and shifted windows."""
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
"""What is counted, by name; the last two are timm's blocks, to compare with."""


class Calls(NamedTuple):
    """Calls of Python functions and of builtins."""

    python: float
    builtin: float


def counted(function: Callable[[], Any]) -> tuple[Any, Calls]:
    """What a function returns, and the calls inside it.

    Raises:
        RuntimeError: something else is profiling this thread.
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
    # The builtin that ends the count is in it.
    return result, Calls(events["call"], events["c_call"] - 1)


def calls_of_step(work: Work) -> dict[str, Calls]:
    """Calls of one forward and one backward pass (inference: forward alone).

    Raises:
        RuntimeError: the backward pass ran in another thread, where nobody counts.
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
    """Calls per block, by part; inside `null_driver()`."""
    few, more = DEPTHS.get(case.model, DEFAULT_DEPTHS)
    less, all_calls = calls_of_step(Work(case, few)), calls_of_step(Work(case, more))
    return {
        part: Calls(*((a - b) / (more - few) for a, b in zip(calls, less[part], strict=True)))
        for part, calls in all_calls.items()
    }


def count_methods() -> dict[str, dict[str, Calls]]:
    """Calls per block by method and part."""
    with one_thread(), null_driver():
        return {name: calls_per_block(case) for name, case in METHODS.items()}


def show(found: dict[str, dict[str, Calls]]) -> None:
    """Print a line per method and part."""
    print(f"{'calls per block, counted':34}{'Python':>10}{'builtin':>10}")
    for name, parts in found.items():
        for part, calls in parts.items():
            print(f"{name + ', ' + part:34}{calls.python:10g}{calls.builtin:10g}")
