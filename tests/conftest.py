"""Settings of the whole suite: threads, and the order of tests."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from support.grids import mark_the_rest_full
from support.processes import prepared

# Fixtures of tests that execute kernels; see `support.kernels.kernel_device`.
KERNEL_FIXTURES = {"kernel_device", "kernel_device_large", "kernel_device_sm80"}


def pytest_configure() -> None:
    """Split the CPU's threads among the processes of pytest-xdist."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose the cases that run by default; sort tests by what they do to their process.

    A process executes kernels before it compiles any to machine code.
    Compiling resets the printer from which ttsem reads the IR, for the rest of the process. Tests
    of a file stay together, but those that execute kernels are a group of their own, and all such
    groups come first.
    """
    mark_the_rest_full(items)
    items.sort(key=lambda item: not _executes(item))
    for item in items:
        part = " executed" if _executes(item) else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}{part}"))


@pytest.fixture
def prepared_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start processes as `support.processes` does, where tested code starts new interpreters."""
    get_context = multiprocessing.get_context
    monkeypatch.setattr(
        multiprocessing,
        "get_context",
        lambda method=None: prepared() if method == "spawn" else get_context(method),
    )


def _executes(item: pytest.Item) -> bool:
    return bool(KERNEL_FIXTURES & set(getattr(item, "fixturenames", ())))
