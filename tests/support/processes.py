"""Processes that start in milliseconds, forked from one that has imported the package.

A new interpreter spends five seconds of a core on the imports of PyTorch, timm and this package.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

IMPORTED = [
    *("vpt_fast.cli.app", "vpt_fast.cli.work.train", "vpt_fast.cli.work.eval"),
    *("vpt_fast.train.sweep.sweep", "bench.gpu.worker"),
]


@functools.cache
def prepared() -> BaseContext:
    """Return the start method of such processes; a tensor's operations use one thread there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def in_ranks(function: Callable[..., object], folder: Path, count: int = 2) -> None:
    """Call a function of a rank and a folder in several processes, and raise what one raises."""
    prepared()
    mp.start_processes(function, (str(folder),), nprocs=count, start_method="forkserver")


def started(function: Callable[..., object], *arguments: Any) -> Any:
    """Start a process that calls a function, importable by name; return the process."""
    process: Any = prepared().Process(target=function, args=arguments)  # type: ignore[attr-defined]
    process.start()
    return process


def exit_codes(processes: list[Any], seconds: float = 300.0) -> list[int | None]:
    """Wait for processes to end; the exit code of one that does not is None."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]
