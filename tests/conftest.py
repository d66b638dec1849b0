"""What holds for the whole suite."""

from __future__ import annotations

import os

import torch


def pytest_configure() -> None:
    """Processes of pytest-xdist share the CPU's threads instead of each taking all of them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
