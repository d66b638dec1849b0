"""Ctrl-C while a run writes: it waits until what is written is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C does nothing; where it was pressed, KeyboardInterrupt is raised at the end.

    Libraries that write are not made for it: TensorBoard's then waits for its thread for ever, and
    PyTorch's takes it for a disk that is full.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        before(signal.SIGINT, None)
