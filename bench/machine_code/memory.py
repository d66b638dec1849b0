"""Bytes that a launch has to move, and the rate of device memory."""

from __future__ import annotations

from collections.abc import Collection

import torch

from bench.machine_code.multiprocessor import MULTIPROCESSORS
from bench.machine_code.offline import Architecture
from vpt_fast.kernels.runtime.launch import Launch

RATED_TARGETS = [a for a, sm in MULTIPROCESSORS.items() if sm.memory is not None]
"""Architectures whose published bandwidth is known."""


def tensor_bytes(launch: Launch, in_place: Collection[str] = ()) -> int:
    """Return the bytes of the tensors that a launch reads or writes, each tensor once.

    Args:
        launch: Launch of a kernel.
        in_place: Parameters that are both read and written, which count twice.
    """
    tensors = {
        id(value): value for value in launch.arguments.values() if isinstance(value, torch.Tensor)
    }
    twice = [launch.arguments[name] for name in in_place if name in launch.arguments]
    return sum(t.numel() * t.element_size() for t in [*tensors.values(), *twice])


def memory_rate(architecture: Architecture) -> float | None:
    """Return the bytes of device memory per clock and multiprocessor; None if unknown."""
    if not isinstance(architecture, int):
        return None
    return MULTIPROCESSORS[architecture].memory
