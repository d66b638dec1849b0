"""What holds for the whole suite."""

from __future__ import annotations

import os

import pytest
import torch

# Of tests that execute kernels; see `kernel_device`.
KERNEL_FIXTURES = {"kernel_device", "kernel_device_large", "kernel_device_sm80"}


def pytest_configure() -> None:
    """Processes of pytest-xdist share the CPU's threads instead of each taking all of them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels are executed before any is compiled to machine code, in every process.

    Compiling resets the printer that ttsem reads the IR from, for the rest of the process. Tests of
    a file stay together, but those that execute kernels are a group of their own, and all such
    groups come first.
    """
    items.sort(key=lambda item: not _executes(item))
    for item in items:
        part = " executed" if _executes(item) else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}{part}"))


def _executes(item: pytest.Item) -> bool:
    return bool(KERNEL_FIXTURES & set(getattr(item, "fixturenames", ())))
