"""Bytes that a launch has to move, and the rate that device memory moves them at."""

from __future__ import annotations

from collections.abc import Collection

import torch

from bench.machine_code.multiprocessor import MULTIPROCESSORS
from bench.machine_code.offline import Architecture
from vpt_fast.kernels.runtime.launch import Launch

RATED_TARGETS = [a for a, sm in MULTIPROCESSORS.items() if sm.memory is not None]
"""Architectures whose published bandwidth is known here."""


def tensor_bytes(launch: Launch, in_place: Collection[str] = ()) -> int:
    """Bytes of the tensors that a launch reads or writes, each tensor once.

    Args:
        launch: of a kernel.
        in_place: parameters that are read and written, which count twice.
    """
    tensors = {
        id(value): value for value in launch.arguments.values() if isinstance(value, torch.Tensor)
    }
    twice = [launch.arguments[name] for name in in_place if name in launch.arguments]
    return sum(t.numel() * t.element_size() for t in [*tensors.values(), *twice])


def memory_rate(architecture: Architecture) -> float | None:
    """Bytes of device memory per clock and multiprocessor; None where it is not known here."""
    if not isinstance(architecture, int):
        return None
    return MULTIPROCESSORS[architecture].memory
